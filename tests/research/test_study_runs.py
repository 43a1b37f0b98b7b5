"""The runs of the study and its command: short real runs that finish once, resume after a kill, or fail early."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from research.study.__main__ import main
from research.study.pool import execute_all
from research.study.runs import TASKS, Run, execute, last_checkpoint, parse_settings


SMALL = (
    ("num_generations", 4),
    ("per_device_train_batch_size", 8),
    ("save_steps", 4),
)


def small(algorithm="tic_grpo", seed=0, steps=8, settings=SMALL):
    return Run(algorithm, seed, steps=steps, k=2, test_size=8, eval_steps=steps, settings=settings)


def curve(folder, *names):
    history = json.loads((folder / "log_history.json").read_text())
    return [{name: entry[name] for name in ("step", *names) if name in entry} for entry in history]


def test_settings_are_typed_and_only_those_named():
    assert parse_settings(["--delta=3", "--learning_rate", "1e-4", "--clip_mode", "two_sided"]) == {
        "delta": 3.0,
        "learning_rate": 1e-4,
        "clip_mode": "two_sided",
    }
    assert parse_settings([]) == {}
    with pytest.raises(ValueError, match="--epsilonhigh"):
        parse_settings(["--epsilonhigh=3"])


def test_configuration_of_a_run():
    run = Run("tic_grpo:epsilon_high=1.0,learning_rate=3e-4", 7, steps=64, k=16, settings=(("learning_rate", 1e-3),))
    args = run.config("unused")
    assert (args.algorithm, args.epsilon_high, args.clip_mode) == ("tic_grpo", 1.0, "up_only")
    assert args.learning_rate == 3e-4  # the algorithm's own setting is the narrower one
    assert (args.steps_per_generation, args.max_steps, args.seed) == (16, 64, 7)
    assert args.save_steps % 16 == 0  # at the end of a rollout, where a checkpoint has no rollout in it
    assert args.max_completion_length == 48
    assert Run("gspo", 0, task="long").config("unused").max_completion_length == 72


@pytest.mark.parametrize("task", TASKS)
def test_a_task_lists_every_number_of_digits_that_occurs(task):
    prompts, listed = TASKS[task].make_dataset("train", 8000)["prompt"], TASKS[task].term_counts
    found = {message["content"].count("+") + 1 for (message,) in prompts}
    assert found <= {*listed}
    assert (min(found), max(found)) == (listed[0], listed[-1])


def test_folder_names_are_unique():
    runs = [small(), small("grpo"), small(seed=1), small(steps=4), small(settings=()), small("tic_grpo:delta=3")]
    assert len({run.name for run in runs}) == len(runs)
    assert small().name == small().name
    assert small("tic_grpo:delta=3", seed=5).name.startswith("tic_grpo-seed5-")


def test_bad_settings_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="Unknown algorithm 'tic_gspo'"):
        execute_all([small(), small("tic_gspo")], tmp_path / "study")
    with pytest.raises(ValueError, match=r"epsilon_high=-0\.1 must be in \(0, inf\)"):
        execute_all([small(), small("tic_grpo:epsilon_high=-0.1")], tmp_path / "study")
    with pytest.raises(ValueError, match="seed cannot be a setting here: use --seeds"):
        execute_all([small("tic_grpo:seed=3")], tmp_path / "study")
    with pytest.raises(ValueError, match=r"max_steps .* use --steps"):
        execute_all([small(settings=(("max_steps", 3),))], tmp_path / "study")
    with pytest.raises(ValueError, match="workers is 0"):
        execute_all([small()], tmp_path / "study", workers=0)
    assert not (tmp_path / "study").exists()


def test_a_finished_run_is_not_repeated(tmp_path):
    folder = execute(small(steps=4), tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 4
    assert summary["accuracy_after"] is not None
    assert len([entry for entry in curve(folder, "reward") if "reward" in entry]) == 2  # one per rollout
    assert not list(folder.glob("checkpoint-*"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert execute(small(steps=4), tmp_path) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")} == before


def test_same_seed_means_same_prompts_for_every_algorithm(tmp_path):
    first = [
        next(
            entry["reward"]
            for entry in curve(execute(small(algorithm, steps=2), tmp_path), "reward")
            if "reward" in entry
        )
        for algorithm in ("tic_grpo", "gspo")
    ]
    assert first[0] == first[1]  # the first rollout comes from the same weights


@pytest.mark.slow
def test_a_killed_study_resumes_to_the_same_result(tmp_path):
    whole = execute(small(), tmp_path / "whole")
    process = multiprocessing.get_context("spawn").Process(target=execute_all, args=([small()], tmp_path / "killed", 1))
    process.start()
    folder = tmp_path / "killed" / "runs" / small().name
    deadline = time.monotonic() + 120
    while not last_checkpoint(folder) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    with FileLock(folder / "lock", timeout=30):  # the worker ends with its parent
        assert last_checkpoint(folder)
        assert not (folder / "summary.json").exists()  # it was killed in time
    execute(small(), tmp_path / "killed")
    assert curve(folder, "reward", "loss", "eval_reward") == curve(whole, "reward", "loss", "eval_reward")


def test_an_incomplete_checkpoint_is_skipped(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in ((40, '{"global_step": 40}'), (80, '{"global_'), (120, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-40")


def test_a_run_that_fails_stops_no_other(tmp_path):
    bad, good = small(steps=4), small("grpo", steps=4)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / bad.name).write_text("a file where the run's folder should be")
    with pytest.raises(RuntimeError, match=f"1 of 2 runs failed, see .*workers.log: {bad.name}"):
        execute_all([bad, good], tmp_path, workers=1)
    assert (tmp_path / "runs" / good.name / "summary.json").exists()


def study(*arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "research.study", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_command_from_algorithms_to_report(tmp_path):
    flags = "--steps 4 --k 2 --eps_high 0.5 --test_size 8 --num_generations 4 --per_device_train_batch_size 8".split()
    algorithms = ["grpo", "tic_grpo:delta=3", "grpo_no_is"]
    done = study(
        "--plan", "quick", "--algorithms", *algorithms, "--seeds", 3, "--output_dir", tmp_path, "--name", "mine", *flags
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12/12" in done.stderr  # the progress bar: updates
    assert "3/3 runs" in done.stderr
    report = (tmp_path / "mine.md").read_text()
    for row in ("| grpo | 1 |", "| tic_grpo, delta 3 | 1 |", "| grpo_no_is | 1 |"):
        assert row in report
    figures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert figures == ["mine_algorithms.png", "mine_causes.png", "mine_fig1.png", "mine_inner.png"]
    assert all(f"({figure})" in report for figure in figures)
    assert "--eps_high 0.5" in report  # the command that made it
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/summary.json")]
    caps = {summary["algorithm"]: summary["epsilon_high"] for summary in summaries}
    assert caps == {"grpo": 0.5, "tic_grpo": 0.5, "grpo_no_is": None}


def test_the_tuned_plan_refuses_what_its_grid_decides(tmp_path, monkeypatch):
    for flags, named in (
        (["--learning_rate", "1e-4"], "remove --learning_rate 1e-4"),
        (["--algorithms", "dapo"], "dapo"),
    ):
        monkeypatch.setattr(sys, "argv", ["study", "--plan", "tuned", *flags, "--output_dir", str(tmp_path / "study")])
        with pytest.raises(ValueError, match=named):
            main()
    assert not (tmp_path / "study").exists()
