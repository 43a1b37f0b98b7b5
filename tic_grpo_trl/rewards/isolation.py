"""What the sandbox holds back on this host, tried out rather than assumed."""

import functools
import json
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .sandbox import Limits, run_program


# What the report tries, in the sandbox; it prints the names of what it should not have been able to do.
PROBE = """
import json, os, socket, time
job = json.loads(input())
others = [pid for pid in (job["pid"], os.getppid()) if pid not in (0, os.getpid())]

def attempt(name, action):
    try:
        if action():
            print(name)
    except Exception:
        pass

def write(path):
    with open(path, "x"):
        pass
    os.remove(path)
    return True

def processes():
    children = []
    try:
        while len(children) <= job["processes"]:
            child = os.fork()
            if child == 0:
                time.sleep(3)
                os._exit(0)
            children.append(child)
    except OSError:
        pass
    for child in children:
        os.kill(child, 9)
    return len(children) >= job["processes"]

attempt("network", lambda: socket.create_connection(("127.0.0.1", job["port"]), 1))
for pid in others:
    attempt("signals", lambda: os.kill(pid, 0) is None)
    attempt("environment", lambda: open(f"/proc/{pid}/environ").read(1) is not None)
for folder in (job["folder"], "/tmp", "/var/tmp", "/dev/shm"):
    attempt("writing", lambda: write(f"{folder}/sandbox-probe-{job['pid']}"))
attempt("reading", lambda: open(job["folder"] + "/file").read(1))
attempt("reading", lambda: open("/etc/passwd").read(1))
attempt("processes", processes)
"""

HOLDS = {
    "network": "no connection can be made, not even to this host",
    "processes": "no more than Limits.processes can be started",
    "signals": "no other process can be killed",
    "environment": "no other process's environment can be read",
    "writing": "no file can be written outside the temporary folder",
    "reading": "no file can be read outside Python and the system's libraries",
}


@dataclass(frozen=True)
class Report:
    """What holds on this host, as tried by a program in the sandbox.

    Attributes:
        means: the means in force.
        held, missing: what the sandbox holds back and what it does not, names in `HOLDS`.
    """

    means: tuple[str, ...]
    held: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self):
        lines = [f"in force: {', '.join(self.means) or 'resource limits alone'}"]
        lines += [f"{name:12} {'yes' if name in self.held else 'NO ':4} {text}" for name, text in HOLDS.items()]
        return "\n".join(lines)


@functools.cache
def sandbox_report(without: tuple[str, ...] = ()) -> Report:
    """Tries out, with a program in the sandbox, what the sandbox holds back on this host.

    Args:
        without: as for `run_program`.

    Returns:
        The report; tried once in each process.

    Raises:
        RuntimeError: where the sandbox cannot be set up, or a program in it cannot use the standard library.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o777)  # open to all, so that only the sandbox stands in the way
        Path(folder, "file").write_text("readable")
        limits = Limits(processes=16)
        job = {"pid": os.getpid(), "port": server.getsockname()[1], "folder": folder, "processes": limits.processes}
        result = run_program(PROBE, json.dumps(job), limits, without=without)
    if result.status != "ok":
        raise RuntimeError(
            f"a program in the sandbox ended with {result.status}: {result.stderr_tail}. It needs {sys.base_prefix} to "
            "be readable: install Python where every user may read it, or run as another user than root."
        )
    missing = result.stdout.split()
    return Report(
        result.held,
        tuple(name for name in HOLDS if name not in missing),
        tuple(name for name in HOLDS if name in missing),
    )
