"""Runs a Python program that nobody has read, within limits and apart from everything else. Linux.

Each run is a fresh interpreter (`runner/`) that gives up its rights before it executes the program. Several means
overlap, so that what one host forbids another means still holds: namespaces, Landlock, a seccomp filter, an
unprivileged user, resource limits; `isolation.py` tries out what holds. This keeps accidents and reward hacking in; it
is not a boundary against an attacker with a kernel exploit (docs/code_reward.md).
"""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


HERE = Path(__file__).parent
START = "import sys; sys.path.append({!r}); from runner.guard import main; main()"
STDERR_TAIL = 4096  # bytes kept
GRACE = 5.0  # seconds from the order to stop until the process group is killed

Status = Literal["ok", "error", "timeout", "memory", "output"]


@dataclass(frozen=True)
class Limits:
    """What one run of a program may use.

    Attributes:
        wall_seconds: time on the clock, the interpreter's start (some 50 ms) included.
        cpu_seconds: processor time, rounded up to whole seconds.
        memory_bytes: address space.
        output_bytes: standard output and standard error, each, and the result of a called function.
        file_bytes: size of any one file.
        temp_bytes: all files together, where a mount namespace is permitted.
        processes: processes and threads together, where they can be counted (see docs/code_reward.md). The seccomp
            filter refuses processes altogether and leaves threads.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 20
    file_bytes: int = 16 << 20
    temp_bytes: int = 64 << 20
    processes: int = 64

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"Limits({name}={value}): pass a number above 0")


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        status: `ok` (exit code 0), `error`, `timeout` (on the clock or of the processor), `memory` (a `MemoryError`
            that was not caught), `output` (more than `Limits.output_bytes`; the run was stopped).
        stdout: what it wrote, at most `Limits.output_bytes`.
        stderr_tail: the last 4 KiB of its standard error.
        seconds: time on the clock, start and cleaning up included.
        answer: the called function's result as JSON, `None` where none was called or it did not return.
        held: the means in force.
    """

    status: Status
    stdout: str
    stderr_tail: str
    seconds: float
    answer: str | None = None
    held: tuple[str, ...] = ()

    @property
    def error(self) -> str:
        """The last line of the standard error, such as `ZeroDivisionError: division by zero`."""
        lines = self.stderr_tail.strip().splitlines()
        return lines[-1] if lines else ""


def run_program(
    code: str,
    stdin: str = "",
    limits: Limits = DEFAULT_LIMITS,
    *,
    function: str | None = None,
    arguments: Collection[Any] = (),
    without: Collection[str] = (),
) -> Result:
    """Runs one program in the sandbox.

    Args:
        code: the program, Python source. It sees the standard library alone, an empty environment, and a temporary
            folder of its own as the current one.
        stdin: its standard input.
        limits: what it may use.
        function: a function to call with `arguments` after the program has run: a method of its class `Solution`
            where it defines one, a function of that name otherwise. The program is then imported rather than run
            (`__name__` is not `"__main__"`).
        arguments: JSON values.
        without: means to leave out, of `namespaces`, `landlock`, `seccomp` and `uid`, to see what the others hold.

    Returns:
        The result. Nothing of the run is left: no process, no file.

    Raises:
        RuntimeError: where the sandbox itself could not be set up.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="sandbox-")
        stack.callback(remove_folder, folder)
        job = {
            "code": code,
            "function": function,
            "arguments": list(arguments),
            "limits": asdict(limits),
            "without": list(without),
            "folder": folder,
            "parent": os.getpid(),
        }
        job_fd, stdin_fd = (memory_file(stack, text) for text in (json.dumps(job), stdin))
        (report, report_end), (result, result_end) = (os.pipe() for _ in range(2))
        for fd in (report, result):
            stack.callback(os.close, fd)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", "-c", START.format(str(HERE))]
                + [str(fd) for fd in (job_fd, report_end, result_end)],
                stdin=stdin_fd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                pass_fds=(job_fd, report_end, result_end),
                start_new_session=True,
            )
        finally:
            os.close(report_end)
            os.close(result_end)
        outputs, stopped = collect(process, report, result, limits, started)
    return judge(outputs, stopped, limits, time.monotonic() - started)


def memory_file(stack: ExitStack, text: str) -> int:
    """A descriptor to read the text from, which no pipe's size bounds and no disk holds."""
    fd = os.memfd_create("sandbox")
    stack.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(text.encode(errors="surrogatepass"))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def remove_folder(folder: str) -> None:
    """Removes a temporary folder, folders without permissions in it included."""

    def open_up(function, path, _):
        os.chmod(os.path.dirname(path), 0o700)
        os.chmod(path, 0o700)
        shutil.rmtree(path, onerror=open_up) if os.path.isdir(path) else function(path)

    shutil.rmtree(folder, onerror=open_up)


def collect(
    process: subprocess.Popen, report: int, result: int, limits: Limits, started: float
) -> tuple[dict[str, bytes], Status | None]:
    """Reads what a run writes until it ends or breaks a limit, and ends it.

    Returns:
        The bytes of `stdout`, `stderr`, `report` and `result`, and the limit it was stopped for.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    outputs = dict.fromkeys(("stdout", "stderr", "report", "result"), b"")
    counts = dict.fromkeys(outputs, 0)
    stopped: Status | None = None
    deadline = started + limits.wall_seconds
    pipes = (process.stdout.fileno(), process.stderr.fileno(), report, result)
    try:
        with selectors.DefaultSelector() as selector, process.stdout, process.stderr:
            for name, pipe in zip(outputs, pipes, strict=True):
                selector.register(pipe, selectors.EVENT_READ, name)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    counts[key.data] += len(data)
                    if key.data == "stderr":
                        outputs["stderr"] = (outputs["stderr"] + data)[-STDERR_TAIL:]
                    elif counts[key.data] <= limits.output_bytes:
                        outputs[key.data] += data
                too_much = max(counts.values()) > limits.output_bytes
                if stopped is None and (too_much or time.monotonic() >= deadline):
                    stopped = "output" if too_much else "timeout"
                    deadline = time.monotonic() + GRACE
                    process.terminate()  # the guardian kills the program and reports
                elif time.monotonic() >= deadline:
                    break
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # not yet waited for, so the number is still this group's
        process.wait()
    return outputs, stopped


def judge(outputs: dict[str, bytes], stopped: Status | None, limits: Limits, seconds: float) -> Result:
    """The result in what a run wrote; the guardian's report is in the trainer's hands alone."""
    report: dict[str, Any] = {}
    for line in outputs["report"].splitlines():
        report |= json.loads(line)
    stdout, stderr, answer = (outputs[name].decode(errors="replace") for name in ("stdout", "stderr", "result"))
    if "failed" in report or ("held" not in report and stopped is None):
        raise RuntimeError(f"the sandbox could not be set up: {report.get('failed') or stderr or 'no report'}")
    exit_code = report.get("exit_code")
    status: Status
    if stopped is not None:
        status = stopped
    elif exit_code == -signal.SIGXCPU or (exit_code == -signal.SIGKILL and report["cpu"] >= limits.cpu_seconds):
        status = "timeout"
    elif exit_code == 0:
        status = "ok"
    else:
        status = "memory" if stderr.rstrip().endswith("MemoryError") else "error"
        if not stderr and exit_code is not None and exit_code < 0:
            stderr = f"killed by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    return Result(status, stdout, stderr, seconds, answer or None, tuple(report.get("held", ())))
