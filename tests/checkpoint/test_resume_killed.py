"""The training script, killed by SIGKILL at random moments and resumed from its checkpoints, ends like an undisturbed
run, bit for bit.

The moments differ every time; KILLED_SEED=<number> repeats those of a failed test."""

import functools
import json
import os
import shutil
import signal
import time

import pytest
from killing import assert_same_run, draw, fresh_chance, kill_again_and_again, launched, resuming
from launching import CONFIGS, ROOT, kill, launch_command, run_script, started


pytestmark = pytest.mark.slow

STEPS = 16
COMMON = f"""--config {ROOT}/examples/recipes/starter.yaml --reward_funcs killing.even_letters
    --per_device_train_batch_size 4 --num_generations 4 --max_completion_length 12
    --temperature 3 --max_steps {STEPS} --learning_rate 3e-4 --test_size 8 --per_device_eval_batch_size 8
    --save_strategy steps --log_completions true --num_completions_to_print 1 --disable_tqdm true""".split()
CASES = {
    # two epochs, a rollout each; saves between the updates of a rollout, and between two logs
    "full": "--train_size 4 --num_iterations 2 --save_steps 3 --logging_steps 2 --eval_steps 5",
    # four epochs of two rollouts, for two updates of two micro-batches each; a reference
    "lora": """--train_size 8 --gradient_accumulation_steps 2 --updates_per_rollout 2 --save_steps 1
        --save_total_limit 2 --logging_steps 1 --eval_steps 4 --beta 0.05 --use_peft --lora_r 4
        --lora_target_modules all-linear""",
}
SAVES = {"full": 3, "lora": 1}
KINDS = {"step": 4, "update": 2, "saving": 3, "start": 1}  # how many moments of each
KILLED = -9


def flags_of(case):
    return [*COMMON, *CASES[case].split()]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    with launched(tmp_path_factory.mktemp("jobs"), CONFIGS / "cpu.yaml") as jobs:
        yield jobs


@pytest.fixture(scope="module")
def whole(jobs, tmp_path_factory):
    """Return the folder of a case's undisturbed run, and when it entered which phase."""

    @functools.cache
    def run(case):
        folder = tmp_path_factory.mktemp(case)
        times = jobs.run(*resuming(folder, *flags_of(case)))["times"]
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert all(entry["grad_norm"] > 0 for entry in history if "loss" in entry)
        return folder, times

    return run


def kill_the_launched_script(folder, flags):
    """Start the script as a user does, and kill launcher and script around the first checkpoint."""
    script = [*launch_command(CONFIGS / "cpu.yaml"), "-m", "tic_grpo_trl.scripts.train", *resuming(folder, *flags)]
    log = folder.parent / "log.txt"
    with started(script, log) as process:
        latest = time.monotonic() + 240
        while not list(folder.glob("checkpoint-*")):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < latest
            time.sleep(0.01)
        kill(process)
        assert process.returncode == KILLED


def finish_the_launched_script(folder, flags):
    done = run_script(*resuming(folder, *flags))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_again_and_again_ends_as_if_undisturbed(jobs, whole, tmp_path, case):
    """Kill it ten times at random moments."""
    (expected, times), folder, flags = whole(case), tmp_path / "run", flags_of(case)
    if case == "full":
        kill_the_launched_script(folder, flags)
    kills = kill_again_and_again(jobs, folder, flags, draw(fresh_chance(), STEPS, SAVES[case], KINDS), times)
    print(dict(kills))
    assert kills.total() == 10
    assert not (folder / "summary.json").exists()
    if case == "full":
        finish_the_launched_script(folder, flags)
    else:
        jobs.run(*resuming(folder, *flags))
    assert_same_run(folder, expected)


def test_a_save_killed_before_each_of_its_renames(jobs, whole, tmp_path):
    """Between two renames a complete checkpoint has no name, an old one has lost its name, or there are too many."""
    (expected, _), folder = whole("lora"), tmp_path / "run"

    def left_by_death(at):
        job = jobs.start(*resuming(folder, *flags_of("lora")), DIE_AT_RENAME=str(at))
        assert job.wait() == [signal.SIGKILL], job.log()[-5000:]
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*checkpoint-*"))
        return job.phase()[0], found

    assert left_by_death(1) == (1, [".saving/checkpoint-1"])
    assert left_by_death(2) == (1, [".saving/checkpoint-1.done"])
    assert left_by_death(4) == (2, [".saving/checkpoint-2.done", "checkpoint-1"])
    # resumes from the second, which is complete, and is killed when it would delete the first
    assert left_by_death(3) == (3, ["checkpoint-1", "checkpoint-2", "checkpoint-3"])
    jobs.run(*resuming(folder, *flags_of("lora")))
    assert_same_run(folder, expected)


def test_a_process_killed_while_it_draws_a_progress_bar_leaves_no_lock(jobs, whole, tmp_path):
    expected, _ = whole("full")
    killed = jobs.start(*resuming(tmp_path / "run", *flags_of("full")), DIE_WITH_LOCK="1")
    assert killed.wait() == [signal.SIGKILL]
    jobs.run(*resuming(tmp_path / "run", *flags_of("full")))
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize("name", ["optimizer.pt", "tic_grpo_state_0.pt"])
def test_a_truncated_checkpoint_is_refused(jobs, whole, tmp_path, name):
    """The error names it and the one to use instead; with `true` it is skipped."""
    expected, _ = whole("full")
    shutil.copytree(expected, tmp_path / "run")
    cut = tmp_path / "run/checkpoint-16" / name
    os.truncate(cut, cut.stat().st_size - 1)
    flags = [*flags_of("full"), "--output_dir", tmp_path / "run"]
    refused = jobs.start(*flags, "--resume_from_checkpoint", cut.parent)
    assert refused.wait() != [0]
    assert f"ValueError: Cannot resume from checkpoint {cut.parent}: {name} " in refused.log()
    assert f"resume_from_checkpoint='{tmp_path}/run/checkpoint-15'" in refused.log()
    if name == "optimizer.pt":
        passed_over = jobs.start(*flags, "--resume_from_checkpoint", "true")
        assert passed_over.wait() == [0], passed_over.log()
        assert f"Skipping checkpoint {cut.parent}: optimizer.pt has" in passed_over.log()
        assert_same_run(tmp_path / "run", expected)
