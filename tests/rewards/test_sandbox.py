"""Run well-behaved programs and programs that use too much. All are bounded in case one escapes."""

import json
import signal
import threading
import time

import pytest
from sandboxing import DEGRADED, QUICK, nothing_is_left, ok, report_for, require, runs_left

from tic_grpo_trl.rewards import sandbox
from tic_grpo_trl.rewards.sandbox import Limits, run_program


__all__ = ["nothing_is_left"]  # an autouse fixture


# Well-behaved programs


def test_a_program_reads_and_prints():
    result = run_program("print(input()[::-1])\nimport sys\nprint('note', file=sys.stderr)", "äbc\n", QUICK)
    assert (result.status, result.stdout, result.stderr_tail) == ("ok", "cbä\n", "note\n")


def test_large_input_arrives_whole():
    assert ok("import sys; print(len(sys.stdin.read()))", "1 2\n" * 1_000_000) == "4000000\n"


def test_idioms_of_programming_contests():
    code = """
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(64 << 20)
def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)
def main():
    print(depth(50_000), gcd(12, 18), deque([1])[0], heapq.nsmallest(1, [3, 2]), pow(2, 5, 7), List[int])
    open("scratch", "w").write("x" * 10)
    print(open("scratch").read())
if __name__ == "__main__":
    threading.Thread(target=main).start()
"""
    assert ok(code) == "50000 6 1 [2] 4 typing.List[int]\nxxxxxxxxxx\n"
    assert ok("print(1)\nexit()\nprint(2)") == "1\n"


def test_the_whole_standard_library_can_be_imported():
    code = "import decimal, sqlite3, encodings.idna, collections.abc, zoneinfo, asyncio\nprint('é'.encode('cp850'))"
    assert ok(code) == "b'\\x82'\n"


def test_site_packages_are_out_of_sight():
    result = run_program("import numpy", limits=QUICK)
    assert result.error == "ModuleNotFoundError: No module named 'numpy'"


def test_functions_are_called_with_json():
    code = (
        "class Solution:\n    def pair(self, xs: List[int], s: str):\n        print('noise')\n        return sum(xs), s"
    )
    result = run_program(code, limits=QUICK, function="pair", arguments=([1, 2], "é"))
    assert (result.status, json.loads(result.answer), result.stdout) == ("ok", [3, "é"], "noise\n")
    bare = run_program(
        "def add(a, b): return a + b\nif __name__ == '__main__': 1 / 0", "", QUICK, function="add", arguments=(1, 2)
    )
    assert bare.answer == "3"
    result = run_program("def add(a, b): return {a, b}", limits=QUICK, function="add", arguments=(1, 2))
    assert (result.status, result.answer) == ("error", None)
    assert result.error == "TypeError: Object of type set is not JSON serializable"


def test_errors_are_named():
    assert run_program("1 / 0", limits=QUICK).error == "ZeroDivisionError: division by zero"
    assert run_program("def f(:", limits=QUICK).error == "SyntaxError: invalid syntax"
    assert run_program("\ud800", limits=QUICK).status == "error"
    assert run_program("exit('sorry')", limits=QUICK).error == "sorry"
    crash = run_program("import ctypes; ctypes.string_at(0)", limits=QUICK)
    assert (crash.status, crash.error) == ("error", "killed by signal 11 (Segmentation fault)")
    last = run_program("import os; os.kill(os.getpid(), 40)", limits=QUICK, without=("namespaces",))
    assert (last.status, last.error) == ("error", f"killed by signal 40 ({signal.strsignal(40)})")


def test_limits_are_checked():
    with pytest.raises(ValueError, match=r"Limits\(wall_seconds=0\): pass a number above 0"):
        Limits(wall_seconds=0)


def test_runs_in_threads():
    answers = {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: run_program(f"print({i})", limits=QUICK).stdout}))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: f"{i}\n" for i in range(6)}


# Programs that use too much


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "input = 0\nimport sys\nsys.stdin.close()\nimport time\ntime.sleep(60)",
    ],
)
@pytest.mark.parametrize("without", [(), ("namespaces", "seccomp")])
def test_the_clock_ends_a_run(code, without):
    started = time.monotonic()
    result = run_program("print('before', flush=True)\n" + code, limits=Limits(wall_seconds=2), without=without)
    assert (result.status, result.stdout) == ("timeout", "before\n")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("without", [(), ("namespaces",)])
def test_processor_time_ends_a_run(without):
    started = time.monotonic()
    code = (
        "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass"  # leaves only the hard limit
    )
    result = run_program(code, limits=Limits(wall_seconds=60, cpu_seconds=1), without=without)
    assert result.status == "timeout"
    assert time.monotonic() - started < 30


def test_a_program_cannot_refuse_to_end():
    code = """
import ctypes, signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
print(ctypes.CDLL(None).prctl(1, 0, 0, 0, 0), flush=True)  # would let it outlive its guardian
time.sleep(60)
"""
    result = run_program(code, limits=Limits(wall_seconds=2))
    assert (result.status, result.stdout) == ("timeout", "-1\n")


def test_memory_is_bounded():
    code = "blocks = [bytearray(64 << 20) for _ in range(32)]\nprint(len(blocks))"  # 2 GiB at most
    result = run_program(code, limits=Limits(wall_seconds=30, memory_bytes=256 << 20))
    assert (result.status, result.stdout) == ("memory", "")
    assert ok("print(len(bytearray(300 << 20)))") == f"{300 << 20}\n"


def test_memory_outside_the_address_space_is_refused():
    code = """
import ctypes, mmap, os
try:
    os.memfd_create("hidden")
    print("memfd")
except PermissionError:
    pass
if ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) != -1:
    print("shm")
"""
    require("seccomp")
    assert ok(code) == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_bounded(stream):
    code = f"import sys\nfor _ in range(64): print('x' * (1 << 20), file=sys.{stream})"  # 64 MiB at most
    result = run_program(code, limits=Limits(wall_seconds=30, output_bytes=1 << 18))
    assert result.status == "output"
    assert len(result.stdout) <= 1 << 18
    assert len(result.stderr_tail) <= sandbox.STDERR_TAIL


def test_an_answer_is_bounded():
    result = run_program("def f(): return 'x' * (1 << 22)", limits=QUICK, function="f")
    assert result.status == "output"


def test_files_are_bounded():
    code = "with open('large', 'wb') as file:\n    for _ in range(32): file.write(bytes(1 << 20))"  # 32 MiB at most
    result = run_program(code, limits=QUICK)
    assert (result.status, result.error) == ("error", "OSError: [Errno 27] File too large")
    require("sized temporary folder")
    code = "for i in range(12):\n    with open(f'{i}', 'wb') as file: file.write(bytes(8 << 20))"  # 96 MiB at most
    assert run_program(code, limits=QUICK).error == "OSError: [Errno 28] No space left on device"


FORKS = """
import os, sys, time
made = 0
for _ in range(200):
    try:
        child = os.fork()
    except OSError:
        break
    if child == 0:
        time.sleep(1)
        os._exit(0)
    made += 1
print(made)
"""


@pytest.mark.parametrize("without", DEGRADED)
def test_processes_are_bounded(without):
    report = report_for("processes", without)
    made = int(ok(FORKS, limits=Limits(wall_seconds=30, processes=16), without=without))
    assert made == 0 if "seccomp" in report.mechanisms else 0 < made < 16


@pytest.mark.parametrize("without", [(), ("seccomp",)])
def test_a_fork_bomb(without):
    """At most 2^6 processes in total if nothing stops it. Each ends after a second."""
    report_for("processes", without)
    code = """
import os, time
for _ in range(6):
    try:
        os.fork()
    except OSError:
        pass
print("x", flush=True)
time.sleep(1)
"""
    result = run_program(code, limits=Limits(wall_seconds=30, processes=12), without=without)
    assert result.status == "ok"
    assert 1 <= result.stdout.count("x") <= 12


def test_threads_are_bounded():
    require("process limit")
    code = """
import threading, time
made = 0
try:
    for _ in range(100):
        threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
        made += 1
except RuntimeError:
    pass
print(made)
"""
    assert 8 < int(ok(code, limits=Limits(wall_seconds=30, processes=16))) < 16


def test_a_daemon_ends_with_its_program():
    """Without the filter a program can detach a process, but its PID namespace ends it."""
    require("namespaces")
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(64):
            try: os.close(fd)
            except OSError: pass
        time.sleep(20)
    os._exit(0)
time.sleep(0.3)
print("done")
"""
    started = time.monotonic()
    assert ok(code, without=("seccomp",)) == "done\n"
    assert not runs_left()
    assert time.monotonic() - started < 15
