"""Test what the progress bar shows, which step it says the numbers are of, and that it stays within one line."""

import io
import re
from types import SimpleNamespace

import pytest
from conftest import make_trainer
from tqdm.auto import tqdm

from tic_grpo_trl.metrics.progress import LatestValues, RewardProgressCallback, fitting, shown_values


ENTRY = {
    "loss": -0.00123,
    "reward": 0.9184,
    "trajectory_ratio/ess": 0.9732,
    "trajectory_ratio/clip_high_pos": 0.0123,
    "trajectory_ratio/clip_high_neg": 0.03,
    "trajectory_ratio/clip_low_neg": 0.05,
    "trajectory_ratio/inner_3/ess": 0.1,
    "frac_non_finite": 0.0,
    "update/skipped": 0.0,
}


def test_values_by_hand():
    expected = {"reward": "0.918", "ess": "0.973", "clipped": "1%/8%", "loss": "-0.0012"}
    assert list(shown_values(ENTRY).items()) == list(expected.items())
    assert shown_values({"eval_reward": 0.5, "eval_trajectory_ratio/ess": 0.1}) == {"eval_reward": "0.500"}
    assert shown_values(None) == shown_values({"train_loss": 0.1, "trajectory_ratio/noise_floor": 0.1}) == {}
    without = {name: value for name, value in ENTRY.items() if not name.endswith("clip_high_pos")}
    assert shown_values(without | {"reward": None})["clipped"] == "–/8%"  # no response with A > 0
    assert "reward" not in shown_values(without | {"reward": None})
    bad = shown_values(ENTRY | {"frac_non_finite": 1 / 32, "update/skipped": 0.25})
    assert list(bad)[:3] == ["reward", "skipped", "non-finite"]
    assert (bad["non-finite"], bad["skipped"]) == ("0.031", "0.25")
    carried = shown_values(ENTRY | {"carry_over/share": 0.234, "eval_reward": 0.5})
    assert list(carried)[-3:] == ["eval_reward", "carried", "loss"]
    assert carried["carried"] == "23%"
    assert shown_values({"carry_over/share": 0.0}) == {"carried": "0%"}


def test_numbers_of_an_earlier_step_say_so():
    latest = LatestValues()
    assert latest.parts(0) == []
    latest.add({"eval_reward": 0.25}, 0)
    assert latest.parts(0) == ["eval_reward 0.250"]
    assert latest.parts(1) == ["eval_reward 0.250 (step 0)"]
    latest.add({"loss": 0.5, "reward": 0.75, "trajectory_ratio/ess": 1.0, "update/skipped": 1.0}, 5)
    assert latest.parts(5) == ["reward 0.750", "skipped 1", "ess 1.000", "eval_reward 0.250 (step 0)", "loss 0.5"]
    assert latest.parts(7)[:2] == ["step 5: reward 0.750", "skipped 1"]
    latest.add({"eval_reward": 0.5}, 7)  # the bar's own step, but the line begins with another
    assert latest.parts(7)[::3] == ["step 5: reward 0.750", "eval_reward 0.500 (step 7)"]
    # A later update on the same rollout: its reward stays, every other number is the update's own.
    latest.add({"loss": 0.25, "trajectory_ratio/ess": 0.5}, 10)
    latest.add({"eval_reward": 0.625}, 10)
    assert latest.parts(10) == ["reward 0.750", "ess 0.500", "eval_reward 0.625", "loss 0.25"]
    latest.add({"train_runtime": 3.0}, 12)
    assert latest.parts(12) == ["step 10: reward 0.750", "ess 0.500", "eval_reward 0.625", "loss 0.25"]


def test_the_share_carried_over_is_that_of_the_rollout():
    latest = LatestValues()
    latest.add({"loss": 0.5, "carry_over/share": 0.25, "reward": 0.75, "trajectory_ratio/ess": 1.0}, 4)
    latest.add({"loss": 0.25, "trajectory_ratio/ess": 0.5}, 5)  # a later update on the same rollout
    assert latest.parts(5) == ["reward 0.750", "ess 0.500", "carried 25%", "loss 0.25"]
    assert latest.parts(6) == ["step 5: reward 0.750", "ess 0.500", "carried 25%", "loss 0.25"]
    latest.add({"loss": 0.5, "carry_over/share": 0.5, "trajectory_ratio/ess": 1.0}, 6)
    assert latest.parts(6) == ["reward 0.750", "ess 1.000", "carried 50%", "loss 0.5"]


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_what_does_not_fit_is_left_out_whole(columns):
    """A number that is cut off would be another number."""
    stream = io.StringIO()
    bar = tqdm(total=1200, initial=1199, file=stream, ncols=columns)
    parts = ["reward 0.123", "ess 0.456", "clipped 10%/20%", "eval_reward 0.987 (step 1100)", "loss 0.012"]
    shown = fitting(bar, parts)
    assert ", ".join(parts).startswith(shown)
    assert shown.split(", ") == parts[: shown.count(", ") + 1] != []
    bar.set_postfix_str(shown)
    line = stream.getvalue().rpartition("\r")[2].rstrip()
    bar.close()
    assert len(line) <= columns
    assert line.endswith(f"{shown}]")
    assert (shown == ", ".join(parts)) == (columns == 140)
    assert fitting(SimpleNamespace(format_dict={"ncols": None}, format_meter=bar.format_meter), []) == ""


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_every_line_of_a_run_shows_the_numbers_of_its_step_or_names_theirs(
    tmp_path, capsys, monkeypatch, logging_steps
):
    monkeypatch.setenv("TQDM_MININTERVAL", "0")  # draw at every step
    trainer = make_trainer(
        tmp_path,
        disable_tqdm=False,
        steps_per_generation=2,
        max_steps=6,
        logging_steps=logging_steps,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    assert any(type(callback) is RewardProgressCallback for callback in trainer.callback_handler.callbacks)
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "/6 [" in line]
    assert "trajectory_ratio" not in "".join(lines)
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    evaluated = {entry["step"]: entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry}
    named = own = 0
    for line in lines:
        at = int(re.search(r"(\d+)/6 \[", line)[1])
        if ess := re.search(r"ess ([\d.]+)", line):
            of = int(match[1]) if (match := re.search(r"step (\d+): reward", line)) else at
            named, own = named + (of != at), own + (of == at)
            assert (of == at) == (match is None)
            assert ess[1] == f"{logged[of]['trajectory_ratio/ess']:.3f}"
            assert f"loss {logged[of]['loss']:.2g}" in line
            at = of  # of an evaluation, too, unless it names its own
        if reward := re.search(r"eval_reward ([\d.]+)(?: \(step (\d+)\))?", line):
            assert reward[1] == f"{evaluated[int(reward[2] or at)]:.3f}"
    assert own >= 6 // logging_steps
    assert (named > 0) == (logging_steps > 1)
    assert f"reward {logged[6 - (logging_steps == 1)]['reward']:.3f}, ess" in lines[-1]
    assert f"eval_reward {evaluated[6]:.3f}, loss {logged[6]['loss']:.2g}]" in lines[-1]
