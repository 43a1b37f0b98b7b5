"""What the tests of the sandbox share: its runs, what a host permits, and that nothing is left of a run."""

import os
import tempfile
import time

import psutil
import pytest

from tic_grpo_trl.rewards import isolation, sandbox
from tic_grpo_trl.rewards.sandbox import Limits, run_program


ROOT = os.getuid() == 0
QUICK = Limits(wall_seconds=30)  # for programs that end by themselves, on hosts that are busy

# what a host may forbid, down to resource limits and the user alone
DEGRADED = [(), ("namespaces",), ("seccomp",), ("namespaces", "seccomp")]


# another trainer, without the seconds that the package's imports take
TRAINER = """
import importlib, json, os, sys, types
package = sys.modules["rewards"] = types.ModuleType("rewards")
package.__path__ = [sys.argv[1]]
isolation, sandbox = (importlib.import_module(f"rewards.{name}") for name in ("isolation", "sandbox"))
"""


def means(*names):
    """Skips the test where the host does not permit the sandbox these means."""
    missing = set(names) - set(isolation.sandbox_report().means)
    if missing:
        pytest.skip(f"not permitted on this host: {', '.join(sorted(missing))}")


HELD_BY = {  # any one of these
    "network": {"namespaces", "seccomp"},
    "processes": {"seccomp", "process limit"},
    "signals": {"namespaces", "seccomp", "uid"},
    "writing": {"landlock", "read-only mounts"},
}


def report_for(name, without):
    """The report without some means; skips the test where no other one holds what `name` says."""
    report = isolation.sandbox_report(without)
    if not HELD_BY[name] & set(report.means):
        pytest.skip(f"nothing holds it without {', '.join(without) or 'any'} on this host")
    assert name in report.held
    return report


def runs_left() -> list[psutil.Process]:
    """Processes of this test's runs, whoever their parent is by now."""
    found, start = [], sandbox.START.format(sandbox.HERE)
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        if start in command and process.info["status"] != "zombie":
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sandbox, "START", f"{sandbox.START}  # {tmp_path}")  # tells its runs from other tests'
    before = set(psutil.Process().children(recursive=True))  # other tests' processes that compare answers
    yield
    assert not list(tmp_path.glob("sandbox-*"))
    assert set(psutil.Process().children(recursive=True)) <= before
    deadline = time.monotonic() + 5
    while runs_left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs_left()


def ok(code, stdin="", limits=QUICK, **options) -> str:
    result = run_program(code, stdin, limits, **options)
    assert result.status == "ok", result
    return result.stdout
