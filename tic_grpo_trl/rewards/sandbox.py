"""Run an untrusted Python program within limits and isolated from everything else. Linux only.

Each run is a fresh interpreter (`runner/`) that gives up its rights before it executes the program. Namespaces,
Landlock, a seccomp filter, an unprivileged user and resource limits overlap, so if a host forbids one of them, another
still protects; `isolation.py` tests what does. The sandbox contains accidents and reward hacking. It is not a boundary
against an attacker with a kernel exploit (docs/code_reward.md).
"""

import json
import os
import selectors
import signal
import sys
import tempfile
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, Literal


HERE = Path(__file__).parent
START = "import sys; sys.path.append({!r}); from runner.guard import main; main()"
STDERR_TAIL = 4096  # bytes kept
GRACE = 5.0  # seconds from the order to stop until the process group is killed

# exit code 0, any other end, wall-clock or processor time, an uncaught `MemoryError`, more than `Limits.output_bytes`
Status = Literal["ok", "error", "timeout", "memory", "output"]


@dataclass(frozen=True)
class Limits:
    """Limit what one run of a program may use."""

    wall_seconds: float = 10.0  # wall-clock time, including some 50 ms to start the interpreter
    cpu_seconds: float = 10.0  # processor time, rounded up to whole seconds
    memory_bytes: int = 1 << 30  # address space
    output_bytes: int = 1 << 20  # standard output, standard error, and the result of a called function, each
    file_bytes: int = 16 << 20  # size of any one file
    temp_bytes: int = 64 << 20  # size of all files together, where a mount namespace is permitted
    processes: int = 64  # with threads, where they can be counted; seccomp allows threads alone (docs/code_reward.md)

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"Limits({name}={value}): pass a number above 0")


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Result:
    """Describe how a run ended."""

    status: Status
    stdout: str  # up to `Limits.output_bytes`
    stderr_tail: str  # the last 4 KiB of its standard error
    answer: str | None = None  # the called function's result as JSON; `None` if none was called or it did not return
    mechanisms: tuple[str, ...] = ()  # the isolation mechanisms in force

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
    """Run one program in the sandbox. Leave no process and no file behind.

    Args:
        code: Python source. The program sees only the standard library, an empty environment, and an empty temporary
            folder as its working directory.
        stdin: its standard input.
        limits: what it may use.
        function: function to call with `arguments` after the program has run: a method of its class `Solution`, if it
            defines one, otherwise a module-level function. `__name__` is then not `"__main__"`.
        arguments: JSON values.
        without: mechanisms to leave out (`namespaces`, `landlock`, `seccomp`, `uid`), to test the others.

    Raises:
        RuntimeError: if the sandbox itself cannot be set up.
    """
    with ExitStack() as stack:
        deadline = time.monotonic() + limits.wall_seconds
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-"))
        job: dict[str, Any] = {"code": code, "function": function, "arguments": list(arguments)}
        job |= {"limits": asdict(limits), "without": list(without), "folder": folder, "parent": os.getpid()}
        job_fd, stdin_fd = (memory_file(stack, text) for text in (json.dumps(job), stdin))
        (report, report_end), (result, result_end) = (os.pipe() for _ in range(2))
        for fd in (report, result):
            stack.callback(os.close, fd)
        fds = (job_fd, report_end, result_end)
        start = [sys.executable, "-I", "-S", "-X", "utf8", "-c", START.format(str(HERE)), *map(str, fds)]
        try:
            process = Popen(
                start, stdin=stdin_fd, stdout=PIPE, stderr=PIPE, env={}, cwd="/", pass_fds=fds, start_new_session=True
            )
        finally:
            os.close(report_end)
            os.close(result_end)
        outputs, stopped = collect(process, report, result, limits.output_bytes, deadline)
    return judge(outputs, stopped, limits.cpu_seconds)


def memory_file(stack: ExitStack, text: str) -> int:
    """Open a descriptor that reads the text, without the size limit of a pipe and without using the disk."""
    file = stack.enter_context(os.fdopen(os.memfd_create("sandbox"), "wb"))
    file.write(text.encode(errors="surrogatepass"))
    file.seek(0)
    return file.fileno()


def collect(
    process: Popen, report: int, result: int, output_bytes: int, deadline: float
) -> tuple[dict[str, bytes], Status | None]:
    """Read what a run writes until it ends or exceeds a limit, then end it. Return the bytes and the limit exceeded."""
    assert process.stdout is not None
    assert process.stderr is not None
    outputs = dict.fromkeys(("stdout", "stderr", "report", "result"), b"")
    counts = dict.fromkeys(outputs, 0)
    stopped: Status | None = None
    pipes = (process.stdout.fileno(), process.stderr.fileno(), report, result)
    try:
        with selectors.DefaultSelector() as selector, process.stdout, process.stderr:
            for name, pipe in zip(outputs, pipes, strict=True):
                selector.register(pipe, selectors.EVENT_READ, name)
            while selector.get_map():
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    counts[key.data] += len(data)
                    if key.data == "stderr":
                        outputs["stderr"] = (outputs["stderr"] + data)[-STDERR_TAIL:]
                    elif counts[key.data] <= output_bytes:
                        outputs[key.data] += data
                too_much = max(counts.values()) > output_bytes
                if stopped is None and (too_much or time.monotonic() >= deadline):
                    stopped = "output" if too_much else "timeout"
                    deadline = time.monotonic() + GRACE
                    process.terminate()  # the guardian kills the program and reports
                elif time.monotonic() >= deadline:
                    break
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # before waiting, so the id still belongs to this process group
        process.wait()
    return outputs, stopped


def judge(outputs: dict[str, bytes], stopped: Status | None, cpu_seconds: float) -> Result:
    """Make the result from what a run wrote. The program cannot write to the guardian's report."""
    report: dict[str, Any] = {}
    for line in outputs["report"].splitlines():
        report |= json.loads(line)
    stdout, stderr, answer = (outputs[name].decode(errors="replace") for name in ("stdout", "stderr", "result"))
    if "failed" in report or ("mechanisms" not in report and stopped is None):
        raise RuntimeError(f"the sandbox could not be set up: {report.get('failed') or stderr or 'no report'}")
    exit_code = report.get("exit_code")
    status: Status = "ok"
    if stopped is not None:
        status = stopped
    elif exit_code == -signal.SIGXCPU or (exit_code == -signal.SIGKILL and report["cpu"] >= cpu_seconds):
        status = "timeout"
    elif exit_code != 0:
        status = "memory" if stderr.rstrip().endswith("MemoryError") else "error"
        if not stderr and exit_code is not None and exit_code < 0:
            stderr = f"killed by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    return Result(status, stdout, stderr, answer or None, tuple(report.get("mechanisms", ())))
