"""A launched run is stopped by a signal to its launcher: it leaves a checkpoint and no process, and resumes exactly."""

import functools
import importlib.util
import json
import shutil
import signal
import sys
import time
from contextlib import suppress

import psutil
import pytest
from killing import assert_same_run
from launching import CONFIGS, ON_CPU, ROOT, family, finish, free_port, launch_command, started
from test_interruption import default_handlers  # noqa: F401  # for every test here
from topologies import EXPECTED
from wandb_files import wandb_records

from tic_grpo_trl.checkpoint.output_lock import LOCK
from tic_grpo_trl.checkpoint.storage import checkpoints_in, find_damage, read_manifest


STEPS = 60
FLAGS = f"""--config {ROOT}/examples/recipes/starter.yaml --reward_funcs killing.even_letters
    --per_device_train_batch_size 4 --num_generations 4 --train_size 8 --max_steps {STEPS}
    --max_completion_length 12 --temperature 3 --eval_strategy no --eval_on_start false --save_strategy no
    --logging_steps 1 --disable_tqdm true""".split()
SCRIPT = ["-m", "tic_grpo_trl.scripts.train"]
DESCRIBED = [ROOT / "tests/workers/described.py"]


def command(topology, script, folder, *flags):
    launcher = launch_command(CONFIGS / f"{topology}.yaml", *(ON_CPU if topology != "cpu" else ()))
    return [*launcher, "--main_process_port", free_port(), *script, *FLAGS, "--output_dir", folder, *flags]


def run(topology, script, folder, *flags):
    """Run the script to its end."""
    log = folder.with_suffix(".log")
    with started(command(topology, script, folder, *flags), log) as process:
        finish(process, log, 240)


def stop_in_the_middle(number, topology, script, folder, *flags, **environment):
    """Send a signal to the launcher after a few updates; return its exit code and what all processes printed."""
    log = folder.with_suffix(".log")
    environment |= {"PYTHONUNBUFFERED": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    with started(command(topology, script, folder, *flags), log, **environment) as process:
        latest = time.monotonic() + 240
        while log.read_text().count("'grad_norm'") < 6:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < latest, log.read_text()[-3000:]
            time.sleep(0.01)
        members = family(process)
        process.send_signal(number)
        code = process.wait(150)
        _, alive = psutil.wait_procs(members, timeout=60)
        assert not alive
    return code, log.read_text()


def assert_stopped(folder, log, reason, processes):
    """Check what the stopped run left, and return its checkpoint."""
    (checkpoint,) = checkpoints_in(folder)
    step = int(checkpoint.name.split("-")[1])
    assert 6 <= step < STEPS
    assert find_damage(checkpoint) is None
    assert read_manifest(checkpoint)["settings"]["number of processes"] == processes
    assert (
        log.count(f"Stopped {reason} after update {step} of {STEPS}. Saved {checkpoint}; continue with --resume") == 1
    )
    assert not (folder / "summary.json").exists()
    assert not (folder / "model.safetensors").exists()
    assert not (folder / LOCK).exists()
    return checkpoint


def test_a_launcher_that_dies_of_sigterm_leaves_a_checkpoint_and_no_process(tmp_path):
    """accelerate's launcher does not pass it on to a single process."""
    run("cpu", SCRIPT, tmp_path / "whole")
    code, log = stop_in_the_middle(signal.SIGTERM, "cpu", SCRIPT, tmp_path / "run")
    assert code == -signal.SIGTERM
    checkpoint = assert_stopped(tmp_path / "run", log, "because the launcher has ended", 1)
    run("cpu", SCRIPT, tmp_path / "run", "--resume_from_checkpoint", "true")
    shutil.rmtree(checkpoint)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("launched", [True, False])
def test_a_changed_parent_means_nothing_without_a_launcher(tmp_path, launched):
    """A run under `nohup` outlives its shell."""
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    folder.mkdir()
    script = [sys.executable, ROOT / "tests/workers/orphan.py", folder]
    environment = {"ACCELERATE_MIXED_PRECISION": "no"} if launched else {}
    shell = 'pid=$1; shift; "$@" & while [ ! -s "$pid" ]; do sleep 0.1; done'
    with started(["sh", "-c", shell, "sh", folder / "pid", *script], log, **environment) as process:
        assert process.wait(240) == 0
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int((folder / "pid").read_text())).wait(60)
    steps = [path.name for path in checkpoints_in(folder)]
    assert (steps, (folder / "finished").exists()) == ((["checkpoint-1"], False) if launched else ([], True))
    assert ("Stopped because the launcher has ended after update 1 of 2." in log.read_text()) == launched


def test_wandb_shows_a_run_that_failed(tmp_path):
    flags = ["--report_to", "wandb"]
    stop_in_the_middle(signal.SIGTERM, "cpu", SCRIPT, tmp_path / "run", *flags, WANDB_DIR=str(tmp_path))
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    codes = [record.exit.exit_code for record in wandb_records(path) if record.HasField("exit")]
    assert codes == [143]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a topology's undisturbed run of two processes."""

    @functools.cache
    def of(topology):
        folder = tmp_path_factory.mktemp(topology) / "whole"
        run(topology, DESCRIBED, folder)
        return folder

    return of


CASES = {
    "DDP, SIGTERM": ("multi_gpu", signal.SIGTERM, "by SIGTERM"),
    "DDP, Ctrl-C": ("multi_gpu", signal.SIGINT, "by Ctrl-C"),
    "ZeRO-3, SIGTERM": ("zero3", signal.SIGTERM, "by SIGTERM"),
}


@pytest.mark.distributed
@pytest.mark.parametrize(("topology", "number", "reason"), CASES.values(), ids=CASES)
def test_two_processes_stop_after_the_same_update(whole, tmp_path, topology, number, reason):
    """torchrun's agent passes signals on."""
    if topology == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (extra [deepspeed]).")
    code, log = stop_in_the_middle(number, topology, DESCRIBED, tmp_path / "run")
    assert code != 0
    checkpoint = assert_stopped(tmp_path / "run", log, reason, 2)
    assert "forcefully exiting" not in log
    run(topology, DESCRIBED, tmp_path / "run", "--resume_from_checkpoint", "true")
    for folder in (whole(topology), tmp_path / "run"):
        described = json.loads(folder.with_name(f"{folder.name}.json").read_text())
        assert described["num_processes"] == 2
        assert {name: described[name] for name in EXPECTED[topology]} == EXPECTED[topology]
    shutil.rmtree(checkpoint)
    assert_same_run(tmp_path / "run", whole(topology))
