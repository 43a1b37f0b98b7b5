"""The tables of `log_completions`: what a console and the files show of training and of evaluations."""

import io
import re

import pandas as pd
import pytest
from conftest import TINY_PROMPTS, make_trainer
from rich.console import Console

from tic_grpo_trl.metrics.completions import NO_RATIO


SETTINGS = {"log_completions": True, "steps_per_generation": 2, "skip_on_policy_logps": False}
EVALUATIONS = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4, "num_generations_eval": 1}


@pytest.fixture
def console(monkeypatch):
    """What TRL prints, on a terminal of 200 columns."""
    stream = io.StringIO()
    monkeypatch.setattr("trl.trainer.utils.Console", lambda: Console(file=stream, width=200))
    return stream


def cells(panel):
    """The header of a printed table, and its lines by column."""
    lines = [line.strip("│ \n") for line in panel.splitlines()]  # the panel's border
    header = next([cell.strip() for cell in line.strip("┃").split("┃")] for line in lines if line.startswith("┃"))
    return header, [[cell.strip() for cell in line.split("│")] for line in lines if line.count("│") >= len(header) - 2]


def test_a_missing_ratio_is_shown_as_nothing(tmp_path, console):
    trainer = make_trainer(tmp_path, **SETTINGS, max_steps=1)
    trainer.train()
    header, rows = cells(console.getvalue().split(" Step 1 ")[1])
    table = pd.read_parquet(tmp_path / "completions/completions_00001.parquet")
    assert len(rows) == len(table) == 16  # a rollout, of which half has been trained on
    assert 0 < table["trajectory_ratio"].notna().sum() < 16
    assert header[-1] == "trajectory_ratio"
    shown = [row[-1] if len(row) == len(header) else "" for row in rows]
    assert shown == ["" if pd.isna(ratio) else str(ratio) for ratio in table["trajectory_ratio"]]
    assert table["trajectory_ratio"].dtype == float
    assert "None" not in console.getvalue()
    assert "nan" not in console.getvalue()


def test_an_evaluation_has_a_table_of_its_own(tmp_path, console):
    """In the middle of a rollout, with fewer prompts than the rollout has responses."""
    trainer = make_trainer(tmp_path, **SETTINGS, **EVALUATIONS, max_steps=4)
    trainer.train()
    files = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert files == [
        *(f"completions_0000{step}.parquet" for step in (1, 2, 3, 4)),
        "eval_00003.parquet",
        "eval_00004.parquet",
    ]
    own = pd.read_parquet(tmp_path / "completions/eval_00003.parquet")
    assert sorted(own["prompt"]) == TINY_PROMPTS["prompt"][:4]
    assert "trajectory_ratio" not in own
    before, after = (pd.read_parquet(tmp_path / f"completions/completions_0000{step}.parquet") for step in (3, 4))
    assert before["completion"].tolist() == after["completion"].tolist()  # of the rollout that goes on
    assert before["trajectory_ratio"].notna().sum() < after["trajectory_ratio"].notna().sum()
    printed = console.getvalue()
    own_table, training = printed.split(" Step 3 ")[2], printed.split(" Step 3 ")[1]
    header, rows = cells(own_table.split(" Step 4 ")[0])
    assert "trajectory_ratio" not in header
    assert [row[0] for row in rows] == own["prompt"].tolist()
    assert [row[0] for row in cells(training)[1]] == before["prompt"].tolist()


def test_a_table_is_printed_once(tmp_path, console):
    """The log at the end of training repeats the latest step, unless `logging_steps` left that one out."""
    trainer = make_trainer(tmp_path, **SETTINGS, **EVALUATIONS | {"eval_steps": 2}, max_steps=4)
    trainer.train()
    order = re.findall(r" Step (\d) ", console.getvalue())
    assert order == ["1", "2", "2", "3", "4", "4"]  # of training, and after it at 2 and 4 of the evaluation
    trainer.evaluate()
    trainer.evaluate()
    assert re.findall(r" Step (\d) ", console.getvalue())[len(order) :] == ["4", "4"]

    console.truncate(console.seek(0))
    make_trainer(tmp_path, **SETTINGS, logging_steps=3, max_steps=4).train()
    assert re.findall(r" Step (\d) ", console.getvalue()) == ["3", "4"]


def test_training_again_prints_its_own_tables(tmp_path, console):
    trainer = make_trainer(tmp_path, **SETTINGS, max_steps=1)
    trainer.train()
    trainer.train()
    assert re.findall(r" Step (\d) ", console.getvalue()) == ["1", "1"]


@pytest.mark.parametrize("wrote", [False, True])
@pytest.mark.parametrize("begins", ["log", "evaluate"])
def test_a_run_killed_in_an_evaluation_keeps_its_training_table(tmp_path, wrote, begins):
    """Before or after the evaluation wrote its own table in place of that of training."""
    settings = {**SETTINGS, "num_completions_to_print": 0, "max_steps": 1}
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    file = tmp_path / "completions/completions_00001.parquet"
    trained = file.read_bytes()
    evaluation = trainer.completions_table.of_evaluation("eval", 1)
    evaluation.__enter__()  # and never left
    assert not file.exists()
    if wrote:
        trainer.log({"eval_loss": 0.0})
        assert file.read_bytes() != trained
    again = make_trainer(tmp_path, **settings)
    again.evaluate() if begins == "evaluate" else again.log({"loss": 0.0})
    own = "eval_00000.parquet" if begins == "evaluate" else "completions_00000.parquet"
    assert {path.name for path in file.parent.iterdir()} == {file.name, own}
    assert file.read_bytes() == trained


def test_evaluations_of_several_sets_have_a_file_each(tmp_path):
    settings = {**EVALUATIONS, "eval_strategy": "no", "per_device_eval_batch_size": 1}
    trainer = make_trainer(tmp_path, log_completions=True, num_completions_to_print=0, **settings, max_steps=1)
    trainer.train()
    trained = (tmp_path / "completions/completions_00001.parquet").read_bytes()
    trainer.evaluate({"two": TINY_PROMPTS.select(range(2)), "a/b": TINY_PROMPTS.select(range(3))})
    names = {path.name: len(pd.read_parquet(path)) for path in (tmp_path / "completions").iterdir()}
    assert names == {"completions_00001.parquet": 8, "eval_two_00001.parquet": 2, "eval_a_b_00001.parquet": 3}
    assert (tmp_path / "completions/completions_00001.parquet").read_bytes() == trained


def test_a_failed_evaluation_leaves_the_training_table(tmp_path):
    trainer = make_trainer(tmp_path, **SETTINGS, num_completions_to_print=0, max_steps=1)
    trainer.train()
    table = {name: list(values) for name, values in trainer._logs.items()}
    files = {path.name: path.read_bytes() for path in (tmp_path / "completions").glob("completions*")}

    def fail(**kwargs):
        raise ValueError("no such problem")

    trainer.reward_funcs[0] = fail
    with pytest.raises(ValueError, match="no such problem"):
        trainer.evaluate()
    assert {name: list(values) for name, values in trainer._logs.items()} == table
    assert {path.name: path.read_bytes() for path in (tmp_path / "completions").iterdir()} == files


def test_missing_ratios_survive_a_checkpoint(tmp_path, console):
    settings = {**SETTINGS, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, **settings, num_completions_to_print=0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    ours, theirs = (list(trainer._logs["extra"]["trajectory_ratio"]) for trainer in (resumed, whole))
    assert [str(ratio) for ratio in ours] == [str(ratio) for ratio in theirs]
    state = whole.completions_table.state_dict()
    assert {type(ratio) for ratio in state["logs"]["extra"]["trajectory_ratio"]} == {float}
    resumed.completions_table.load_state_dict(
        state | {"logs": state["logs"] | {"extra": {"trajectory_ratio": [None, 0.5, float("nan")]}}}
    )
    assert list(resumed._logs["extra"]["trajectory_ratio"]) == [NO_RATIO, 0.5, NO_RATIO]
