"""Trackers and the table of completions: what a run leaves behind is read back from the files that they wrote."""

import json
import math
import sqlite3

import pandas as pd
import pytest
import yaml
from launching import QUICK, ROOT, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_files import wandb_records


METRICS = ("reward", "trajectory_ratio/ess", "trajectory_ratio/log_std", "update/real_token_share", "grad_norm")


def values(items):
    """Values of wandb's history or configuration by name."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run of two rollouts with every tracker, and what its terminal showed."""
    folder = tmp_path_factory.mktemp("tracked")
    recipe = yaml.safe_load((ROOT / "examples/recipes/starter.yaml").read_text())
    recipe |= {"report_to": ["wandb", "trackio", "tensorboard"], "run_name": "tracked", "project": "sums"}
    recipe |= {
        "log_completions": True,
        "log_all_ratio_metrics": True,
        "num_completions_to_print": 2,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    places = {"WANDB_MODE": "offline", "WANDB_DIR": folder, "TRACKIO_DIR": folder / "trackio", "COLUMNS": 200}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in places.items():
            patch.setenv(name, str(value))
        patch.delenv("WANDB_PROJECT", raising=False)
        done = run_script("--config", folder / "recipe.yaml", "--output_dir", folder / "out", *QUICK, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((folder / "out/trainer_state.json").read_text())["log_history"]
    steps = {entry["step"]: entry for entry in history if "loss" in entry}
    assert sorted(steps) == list(range(1, 9))
    return folder, done, steps


def expected(steps, name):
    return {step: entry[name] for step, entry in steps.items() if name in entry}


def test_wandb_offline_run_holds_history_and_configuration(tracked):
    folder, _, steps = tracked
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = list(wandb_records(path))
    logged = [values(record.history.item) for record in records if record.HasField("history")]
    for name in METRICS:
        shown = {entry["train/global_step"]: entry[f"train/{name}"] for entry in logged if f"train/{name}" in entry}
        assert shown == pytest.approx(expected(steps, name)), name
    assert any("train/trajectory_ratio/inner_4/log_std" in entry for entry in logged)
    config = {}
    for record in records:
        for change in (record.run.config, record.config):
            config |= values(change.update)
    in_force = {"algorithm": "tic_grpo", "epsilon_high": 0.28, "clip_mode": "up_only", "scale_rewards": "none"}
    assert {name: config[name] for name in in_force} == in_force
    assert config["learning_rate"] == 1.5e-4

    tables = [json.loads(path.read_text()) for path in folder.glob("wandb/offline-run-*/files/media/table/*.json")]
    frames = [pd.DataFrame(table["data"], columns=table["columns"]) for table in tables]
    assert {step for frame in frames for step in frame["step"]} == set(range(1, 9))
    for frame in frames:
        assert {"prompt", "completion", "exact_match_reward", "advantage"} <= set(frame)
        own = pd.read_parquet(folder / f"out/completions/completions_{frame['step'][0]:05d}.parquet")
        assert frame["trajectory_ratio"].dropna().tolist() == own["trajectory_ratio"].dropna().tolist() != []


def test_trackio_holds_history_and_configuration(tracked):
    folder, _, steps = tracked
    with sqlite3.connect(folder / "trackio" / "sums.db") as database:
        rows = database.execute("select metrics from metrics where run_name = 'tracked'").fetchall()
        ((config,),) = database.execute("select config from configs where run_name = 'tracked'").fetchall()
    logged = [json.loads(metrics) for (metrics,) in rows]
    for name in METRICS:
        shown = {entry["train/global_step"]: entry[f"train/{name}"] for entry in logged if f"train/{name}" in entry}
        assert shown == pytest.approx(expected(steps, name)), name
    assert json.loads(config)["algorithm"] == "tic_grpo"


def test_tensorboard_holds_history_and_configuration(tracked):
    folder, _, steps = tracked
    (events,) = folder.glob("out/runs/*/events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    for name in METRICS:
        shown = {event.step: event.value for event in board.Scalars(f"train/{name}")}
        assert shown == pytest.approx(expected(steps, name), rel=1e-6), name
    text = board.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text)["algorithm"] == "tic_grpo"


def test_completions_show_text_reward_advantage_and_trajectory_ratio(tracked):
    folder, done, steps = tracked
    tables = {step: pd.read_parquet(folder / f"out/completions/completions_{step:05d}.parquet") for step in steps}
    for first in (1, 5):  # the rollouts
        shown = pd.DataFrame({k: tables[first + k]["trajectory_ratio"] for k in range(4)})  # (64, 4)
        assert (shown[0].dropna() == 1).all()  # at a rollout's first update the policy is the one that sampled
        for k in range(4):
            log, table = steps[first + k], tables[first + k]
            before = shown[k - 1].notna() if k else shown[0].isna() & False
            assert shown[k][before].equals(shown.get(k - 1, shown[0])[before])
            new = shown[k][shown[k].notna() & ~before]
            assert len(new) == round(16 * (1 - log["update/responses_skipped"])) > 0
            assert math.log(new.max()) == pytest.approx(log["trajectory_ratio/log_max"], abs=1e-3)
            assert math.log(new.min()) == pytest.approx(log["trajectory_ratio/log_min"], abs=1e-3)
            assert (table["advantage"][new.index] != 0).all()
        assert shown[3].notna().equals(tables[first]["advantage"] != 0)
        table = tables[first]
        assert set(table["exact_match_reward"]) == {0.0, 1.0}
        for start in range(0, 64, 8):  # groups of eight responses to a prompt
            group = table[start : start + 8]
            assert len({str(prompt) for prompt in group["prompt"]}) == 1
            above_mean = group["exact_match_reward"] - group["exact_match_reward"].mean()
            assert group["advantage"].tolist() == pytest.approx(above_mean.tolist(), abs=1e-6)
        texts = [message["content"] for (message,) in table["completion"]]
        assert sum("\\boxed{" in text for text in texts) > 48
    assert "trajectory_ratio" in done.stdout
