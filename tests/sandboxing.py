"""Share what the sandbox tests need: runs, what the host permits, and a check that a run leaves nothing behind."""

import os
import tempfile
import time

import psutil
import pytest

from tic_grpo_trl.rewards import isolation, sandbox
from tic_grpo_trl.rewards.sandbox import Limits, run_program


ROOT = os.getuid() == 0
QUICK = Limits(wall_seconds=30)  # for programs that end by themselves, even on a busy host

# what a host may forbid
DEGRADED = [(), ("namespaces",), ("seccomp",), ("namespaces", "seccomp")]


# another trainer, without the package's slow imports
TRAINER = """
import importlib, json, os, sys, types
package = sys.modules["rewards"] = types.ModuleType("rewards")
package.__path__ = [sys.argv[1]]
isolation, sandbox = (importlib.import_module(f"rewards.{name}") for name in ("isolation", "sandbox"))
"""


def require(*names):
    """Skip the test if the host does not permit these mechanisms."""
    missing = set(names) - set(isolation.sandbox_report().mechanisms)
    if missing:
        pytest.skip(f"not permitted on this host: {', '.join(sorted(missing))}")


ENFORCED_BY = {  # any one of these
    "network": {"namespaces", "seccomp"},
    "processes": {"seccomp", "process limit"},
    "signals": {"namespaces", "seccomp", "uid"},
    "writing": {"landlock", "read-only mounts"},
}


def report_for(name, without):
    """Return the report without some mechanisms. Skip the test if no other mechanism enforces the guarantee `name`."""
    report = isolation.sandbox_report(without)
    if not ENFORCED_BY[name] & set(report.mechanisms):
        pytest.skip(f"nothing enforces it without {', '.join(without) or 'any'} on this host")
    assert name not in report.missing
    return report


def runs_left() -> list[psutil.Process]:
    """Return the processes of this test's runs, whatever their parent is by now."""
    found, start = [], sandbox.START.format(sandbox.HERE)
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        if start in command and process.info["status"] != "zombie":
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sandbox, "START", f"{sandbox.START}  # {tmp_path}")  # distinguishes its runs from other tests'
    before = set(psutil.Process().children(recursive=True))  # other tests' math workers
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
