"""Test what the progress bar shows, and that it stays within one line of the terminal."""

import io
import re
from types import SimpleNamespace

import pytest
from conftest import make_trainer
from tqdm.auto import tqdm

from tic_grpo_trl.metrics.progress import ORDER, RewardProgressCallback, fitting, shown_values


ENTRY = {
    "reward": 0.9184,
    "trajectory_ratio/ess": 0.9732,
    "trajectory_ratio/log_q05": -0.2345,
    "trajectory_ratio/log_q50": -0.0012,
    "trajectory_ratio/log_q95": 12.6,
    "trajectory_ratio/clip_high_pos": 0.0123,
    "trajectory_ratio/clip_high_neg": 0.03,
    "trajectory_ratio/clip_low_neg": 0.05,
    "trajectory_ratio/inner_3/ess": 0.9732,
    "frac_non_finite": 0.0,
    "update/skipped": 0.0,
}


def test_values_by_hand():
    expected = {"reward": "0.918", "ess": "0.973", "R": "-0.23/0.00/13", "clip": "1/8%", "k": "3"}
    assert shown_values(ENTRY) == expected | {"skipped": "", "non_finite": ""}
    assert shown_values({"eval_reward": 0.5, "eval_trajectory_ratio/ess": 0.1}) == {"eval_reward": "0.500"}
    assert shown_values(None) == {}
    without = {name: value for name, value in ENTRY.items() if not name.endswith("clip_high_pos")}
    assert shown_values(without | {"reward": None})["clip"] == "–/8%"  # no response with A > 0
    assert "reward" not in shown_values(without | {"reward": None})
    bad = shown_values(ENTRY | {"frac_non_finite": 1 / 32, "update/skipped": 0.25})
    assert (bad["non_finite"], bad["skipped"]) == ("0.031", "0.25")


def test_the_noise_floor_is_shown_where_it_was_measured():
    first = {"trajectory_ratio/inner_1/log_std": 0.0, "trajectory_ratio/inner_1/ess": 1.0}
    assert "noise" not in shown_values(first)  # 0 because nothing was scored
    assert shown_values(first, measures_noise=True)["noise"] == "0"
    assert shown_values(first | {"trajectory_ratio/noise_floor": 0.0312})["noise"] == "0.031"


def test_several_inner_steps_in_one_entry():
    inner = {f"trajectory_ratio/inner_{k}/ess": 1.0 for k in (1, 2, 12)}
    assert shown_values(inner) == {"k": "1-12"}


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_what_does_not_fit_is_left_out_whole(columns):
    """A number that is cut off would be another number."""
    stream = io.StringIO()
    bar = tqdm(total=1200, initial=1199, file=stream, ncols=columns)
    values = dict.fromkeys(ORDER, "0.123") | {"R": "-10/-0.55/0.22"}
    shown = fitting(bar, values)
    assert list(shown) == list(ORDER[: len(shown)])
    assert list(shown.items()) == list(values.items())[: len(shown)]
    bar.set_postfix(shown)
    line = stream.getvalue().rpartition("\r")[2].rstrip()
    bar.close()
    assert len(line) <= columns
    assert line.endswith("]")
    for name, value in shown.items():
        assert f"{name}={value}" in line
    assert 0 < len(shown) < len(ORDER) or columns == 140
    assert fitting(SimpleNamespace(format_dict={"ncols": None}), values) == values  # no terminal


def test_the_bar_of_a_run_shows_the_latest_values(tmp_path, capsys):
    """One log per inner step, an evaluation in between, and the noise measured at the first."""
    trainer = make_trainer(
        tmp_path,
        disable_tqdm=False,
        steps_per_generation=2,
        eval_strategy="steps",
        eval_steps=2,
        skip_on_policy_logps=False,
    )
    trainer.train()
    assert any(type(callback) is RewardProgressCallback for callback in trainer.callback_handler.callbacks)
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "4/4 [" in line]
    logged = {}
    for entry in trainer.state.log_history:
        logged |= entry
    assert f"reward={logged['reward']:.3f}, ess={logged['trajectory_ratio/ess']:.3f}" in lines[-1]
    assert f"eval_reward={logged['eval_reward']:.3f}" in lines[-1]
    quantiles = (f"{logged[f'trajectory_ratio/log_q{q}']:.2f}".replace("-0.00", "0.00") for q in ("05", "50", "95"))
    assert f"R={'/'.join(quantiles)}, clip=" in lines[-1]
    assert "noise=0, k=2" in lines[-1]
    assert "skipped" not in lines[-1]
    assert len(lines[-1]) < 160
