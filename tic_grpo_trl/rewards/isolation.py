"""Test what the sandbox prevents on this host, instead of assuming it."""

import functools
import json
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .sandbox import Limits, run_program


# Runs in the sandbox and prints the names of the things it should not have been able to do
PROBE = """
import json, os, socket, tempfile, time
job = json.loads(input())
others = [pid for pid in (job["pid"], os.getppid()) if pid not in (0, os.getpid())]

def attempt(name, action):
    try:
        if action():
            print(name)
    except Exception:
        pass

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
    attempt("writing", lambda: tempfile.NamedTemporaryFile(dir=folder))
attempt("reading", lambda: open(job["folder"] + "/file").read(1))
attempt("reading", lambda: open("/etc/passwd").read(1))
attempt("processes", processes)
"""

GUARANTEES = {
    "network": "no connection can be made, not even to this host",
    "processes": "no more than Limits.processes can be started",
    "signals": "no other process can be killed",
    "environment": "no other process's environment can be read",
    "writing": "no file can be written outside the temporary folder",
    "reading": "no file can be read outside Python and the system's libraries",
}


@dataclass(frozen=True)
class Report:
    """List what holds on this host, as tested by a program in the sandbox."""

    mechanisms: tuple[str, ...]  # the isolation mechanisms in force
    missing: tuple[str, ...]  # the names in `GUARANTEES` that do not hold

    def __str__(self):
        lines = [f"in force: {', '.join(self.mechanisms) or 'resource limits alone'}"]
        lines += [f"{name:12} {'NO ' if name in self.missing else 'yes':4} {text}" for name, text in GUARANTEES.items()]
        return "\n".join(lines)


@functools.cache
def sandbox_report(without: tuple[str, ...] = ()) -> Report:
    """Test what the sandbox prevents on this host, once per process.

    Args:
        without: mechanisms to leave out, as for `run_program`.

    Raises:
        RuntimeError: if the sandbox cannot be set up, or a program in it cannot use the standard library.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o777)  # open to everyone, so that only the sandbox can prevent access
        Path(folder, "file").write_text("readable")
        job = {"pid": os.getpid(), "port": server.getsockname()[1], "folder": folder, "processes": 16}
        result = run_program(PROBE, json.dumps(job), Limits(processes=16), without=without)
    if result.status != "ok":
        raise RuntimeError(
            f"a program in the sandbox ended with {result.status}: {result.stderr_tail}. It needs to read "
            f"{sys.base_prefix}: install Python where every user may read it, or do not run as root."
        )
    possible = result.stdout.split()
    return Report(result.mechanisms, tuple(name for name in GUARANTEES if name in possible))
