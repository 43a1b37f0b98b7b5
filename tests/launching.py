"""Start a script through `accelerate launch`, as a user does, and leave nothing running behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "accelerate_configs"
ON_CPU = "--num_processes 2 --mixed_precision no".split()  # what makes a file for GPUs start two processes on the CPU


# A run of the starter recipe in seconds: two rollouts, eight updates
QUICK = "--per_device_train_batch_size 16 --train_size 64 --test_size 16".split()
QUICK += "--per_device_eval_batch_size 16 --max_steps 8 --eval_steps 8".split()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch_command(config, *flags) -> list[str]:
    """`accelerate launch` with a configuration file and its own flags; script and arguments follow."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", *map(str, (config, *flags))]


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A process and all that it started: the launcher detaches its workers, so that no process group holds them."""
    try:
        parent = psutil.Process(process.pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def kill(process: subprocess.Popen):
    """What happens to the processes of a machine that loses its power."""
    for member in family(process):
        member.kill()
    process.wait()


def stop(process: subprocess.Popen, seconds: float = 20):
    """End a process and all that it started. It may do so itself first: a vLLM server that is killed leaves sockets and
    shared memory behind."""
    members = family(process)
    process.terminate()
    psutil.wait_procs(members, timeout=seconds)
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def hear_ctrl_c():
    """Undo what a shell does to its background jobs, which ignore Ctrl-C: for `preexec_fn`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment_of_script() -> dict[str, str]:
    """Offline, one thread, and the tests' modules within reach."""
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return os.environ | own


def run_command(command, cwd: Path, seconds: float = 300) -> subprocess.CompletedProcess:
    """Run a command to its end, whatever that is, and return what it printed."""
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment_of_script(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def run_script(*arguments, config: Path = CONFIGS / "cpu.yaml", flags=(), cwd: Path = ROOT, seconds: float = 300):
    """Run the training script through `accelerate launch`, as [`run_command`] does."""
    return run_command([*launch_command(config, *flags), "-m", "tic_grpo_trl.scripts.train", *arguments], cwd, seconds)


@contextmanager
def started(command: list, log: Path, cwd: Path = ROOT, **environment: str) -> Iterator[subprocess.Popen]:
    """Run a command with its output in `log`; whatever it started is gone afterwards."""
    environment = {
        "PYTHONWARNINGS": "ignore",  # they would hide the end of the log
        "TMPDIR": str(log.parent),  # the launcher leaves folders behind
    } | environment
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=cwd,
            env=environment_of_script() | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=hear_ctrl_c,
        )
        try:
            yield process
        finally:
            stop(process)


def finish(process: subprocess.Popen, log: Path, seconds: float):
    """Wait for a launch and require that it succeeds."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = f"still running after {seconds} s"
    assert status == 0, f"{status}\n{log.read_text()[-5000:]}"


def launch(folder: Path, config, script: str, *arguments, flags=(), seconds: float = 240):
    """Run `tests/workers/<script>.py` in the processes of one machine."""
    command = launch_command(config, *flags, "--main_process_port", free_port())
    log = folder / "log.txt"
    with started([*command, ROOT / f"tests/workers/{script}.py", *arguments], log) as process:
        finish(process, log, seconds)
