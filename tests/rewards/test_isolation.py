"""Run programs that try to leave the sandbox, and check the report and the filter. All programs are bounded."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from sandboxing import DEGRADED, ROOT, TRAINER, nothing_is_left, ok, report_for, require

from tic_grpo_trl.rewards import isolation, sandbox
from tic_grpo_trl.rewards.runner import kernel


__all__ = ["nothing_is_left"]  # an autouse fixture


# Programs that try to reach outside


@pytest.mark.parametrize("without", DEGRADED)
def test_the_network_is_cut(without):
    report_for("network", without)
    code = """
import socket
for address, kind in (("127.0.0.1", socket.SOCK_STREAM), ("127.0.0.1", socket.SOCK_DGRAM), ("::1", socket.SOCK_STREAM)):
    try:
        one = socket.socket(socket.AF_INET if "." in address else socket.AF_INET6, kind)
        one.settimeout(2)
        one.connect((address, port))
        one.send(b"hello")
        print("sent")
    except OSError:
        pass
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert ok(f"port = {port}\n" + code, without=without) == ""
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_network_report_can_tell():
    """The probe does connect if nothing prevents it, so its failure elsewhere is meaningful."""
    report = isolation.sandbox_report(("namespaces", "seccomp"))
    assert "network" in report.missing


def test_the_environment_is_empty_and_the_trainers_is_unreadable():
    code = """
import os
print(dict(os.environ))
for pid in {os.getppid(), int(input())} - {0, os.getpid()}:
    for name in ("environ", "cmdline", "maps"):
        try:
            print(name, open(f"/proc/{pid}/{name}").read(100))
        except OSError:
            pass
"""
    require("landlock")
    for without in DEGRADED:
        assert ok(code, str(os.getpid()), without=without) == "{}\n"


@pytest.mark.parametrize("without", DEGRADED)
def test_no_other_process_can_be_killed(without):
    report_for("signals", without)
    confined = bool({"namespaces", "seccomp"} - set(without))
    bystander = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
    code = f"""
import os
def attempt(name, kill):
    try:
        kill()
        print(name)
    except OSError:
        pass
attempt("bystander", lambda: os.kill({bystander.pid}, 9))
# signal 0 only checks permission: a failing test must not kill anything
attempt("trainer", lambda: os.kill({os.getpid()}, 0))
if {confined}:  # otherwise Linux returns 0 even if it would permit none
    attempt("everyone", lambda: os.kill(-1, 0))
if os.getppid() != 0:  # otherwise it is in its own PID namespace
    attempt("guardian", lambda: os.kill(os.getppid(), 0))
"""
    try:
        assert ok(code, without=without) == ""
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("without", [(), ("namespaces",), ("landlock",)])
def test_files_outside_stay_as_they_are(without):
    report_for("writing", without)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        target = Path(folder, "file")
        target.write_text("kept")
        target.chmod(0o666)
        code = f"""
import ctypes, os
target = {str(target)!r}
libc = ctypes.CDLL(None)
for attempt in (lambda: open(target, "w"), lambda: open(target, "a").write("x"), lambda: os.remove(target),
                lambda: os.rename(target, target + "2"), lambda: os.truncate(target, 0), lambda: os.chmod(target, 0),
                lambda: os.symlink(target, "link") or open("link", "w"), lambda: os.mkdir({folder!r} + "/made"),
                lambda: os.link(target, "hard") or open("hard", "w"), lambda: os.utime(target, (0, 0))):
    try:
        attempt()
    except OSError:
        pass
for place in ("/tmp", "/var/tmp", "/dev/shm", {folder!r}):
    try:
        open(place + "/sandbox-test-{os.getpid()}", "w")
        print(place)
    except OSError:
        pass
"""
        assert ok(code, without=without) == ""
        assert [path.name for path in Path(folder).iterdir()] == ["file"]
        assert target.read_text() == "kept"
        assert target.stat().st_mode & 0o777 == 0o666


def test_files_outside_cannot_be_read():
    require("landlock")
    paths = [__file__, "/etc/passwd", "/proc/cpuinfo", tempfile.gettempdir(), sandbox.__file__]
    code = f"""
import os
for path in {paths!r}:
    for read in (os.listdir, open):
        try:
            read(path)
            print(path)
        except OSError:
            pass
"""
    for without in DEGRADED:
        assert ok(code, without=without) == ""


def test_folders_without_permissions_are_removed(tmp_path):
    ok("import os\nos.makedirs('a/b')\nopen('a/b/c', 'w')\nos.mkdir('locked', 0)", without=("namespaces",))
    code = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w')\nos.chmod('a/b', 0)\nos.chmod('a', 0)"
    ok(code, without=("namespaces", "seccomp"))
    assert not list(tmp_path.glob("sandbox-*"))


def test_the_programs_die_with_the_trainer(tmp_path):
    code = TRAINER + 'sandbox.run_program("import time; time.sleep(60)", limits=sandbox.Limits(wall_seconds=60))'
    command = [sys.executable, "-I", "-c", code, str(sandbox.HERE)]
    trainer = subprocess.Popen(command, env={"TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 30
    while len(trainer_children := psutil.Process(trainer.pid).children(recursive=True)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    trainer.kill()
    trainer.wait()
    _, alive = psutil.wait_procs(trainer_children, timeout=10)
    assert not alive
    for left in tmp_path.glob("sandbox-*"):  # a killed trainer cannot clean up
        left.rmdir()


# What the report says


def test_every_mechanism_of_the_kernel_is_in_force():
    found = set(isolation.sandbox_report().mechanisms)
    if os.uname().machine in kernel.ARCHITECTURES and Path("/proc/sys/kernel/seccomp").exists():
        assert "seccomp" in found
    if kernel.libc.syscall(444, None, 0, 1) > 0:
        assert "landlock" in found
    assert not ROOT or "uid" in found
    command = ["unshare", *([] if ROOT else ["--user"]), "--mount", "--net", "--pid", "--fork", "true"]
    if shutil.which("unshare") and subprocess.run(command).returncode == 0:
        assert {"namespaces", "read-only mounts", "sized temporary folder", "process limit"} <= found


def test_the_report_agrees_with_the_mechanisms():
    report = isolation.sandbox_report()
    assert set(report.missing) <= set(isolation.GUARANTEES)
    if {"landlock", "seccomp"} <= set(report.mechanisms):
        assert not report.missing
    text = str(report)
    assert text.startswith("in force: ")
    for name in isolation.GUARANTEES:
        assert re.search(rf"^{name} +{'NO' if name in report.missing else 'yes'} ", text, re.MULTILINE)


def test_nothing_is_guaranteed_without_any_mechanism():
    report = isolation.sandbox_report(("namespaces", "landlock", "seccomp", "uid"))
    assert report.mechanisms == ()
    assert {"network", "processes", "signals", "reading"} <= set(report.missing)
    assert str(report).startswith("in force: resource limits alone")


REPORTS = """
reports = {}
for without in ((), ("namespaces",), ("namespaces", "landlock")):
    report = isolation.sandbox_report(without)
    reports[" ".join(without)] = {"mechanisms": report.mechanisms, "missing": report.missing}
print(json.dumps(reports))
"""


NOBODY = """
import os
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
"""


@pytest.mark.skipif(not ROOT, reason="all other tests already run unprivileged")
def test_an_unprivileged_trainer():
    """An ordinary user gets every guarantee, even without namespaces. Without Landlock some are missing."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")  # outside root's home
    if python is None:
        pytest.skip("no Python that every user may run")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(sandbox.HERE / "runner", f"{folder}/runner", ignore=ignore)
        for name in ("sandbox.py", "isolation.py"):
            shutil.copy(sandbox.HERE / name, folder)
        done = subprocess.run(
            [python, "-I", "-B", "-c", NOBODY + TRAINER + REPORTS, folder],
            capture_output=True,
            text=True,
            timeout=120,
            cwd="/",
            env={},
        )
        assert done.returncode == 0, done.stderr
        reports = json.loads(done.stdout)
    assert "uid" not in reports[""]["mechanisms"]
    if {"landlock", "seccomp"} <= set(reports["namespaces"]["mechanisms"]):
        assert reports[""]["missing"] == reports["namespaces"]["missing"] == []
    # the program can then access the same user's files and processes, and the report says so
    assert {"environment", "writing", "reading"} <= set(reports["namespaces landlock"]["missing"])


@pytest.mark.skipif(not ROOT, reason="needs capabilities to give up")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_root_in_a_container():
    """Docker's default: root without CAP_SYS_ADMIN, with or without user namespaces."""
    command = ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-I", "-c", TRAINER + REPORTS]
    done = subprocess.run([*command, str(sandbox.HERE)], capture_output=True, text=True, timeout=120, check=True)
    reports = json.loads(done.stdout)
    assert "uid" in reports["namespaces"]["mechanisms"]
    if {"landlock", "seccomp"} <= set(isolation.sandbox_report().mechanisms):
        assert reports[""]["missing"] == reports["namespaces"]["missing"] == []


# The filter, including the architecture that this host does not have


def verdict(machine: str, number: int, *arguments: int, arch: int | None = None) -> str:
    """Follow the filter's instructions and return its answer to a system call."""
    data = {kernel.NUMBER: number, kernel.ARCH: arch or kernel.ARCHITECTURES[machine][1]}
    data |= {kernel.ARGUMENTS + 8 * i: argument & 0xFFFFFFFF for i, argument in enumerate((*arguments, 0, 0, 0))}
    program, accumulator, at = kernel.seccomp_program(machine, pid=7), 0, 0
    while True:
        code, if_so, if_not, operand = program[at]
        at += 1
        if code == kernel.RETURN:
            return {kernel.ALLOW: "allow", kernel.KILL_PROCESS: "kill", kernel.ERROR | 1: "EPERM"}.get(
                operand, "ENOSYS"
            )
        if code == kernel.LOAD:
            accumulator = data[operand]
            continue
        true = {
            kernel.EQUAL: accumulator == operand,
            kernel.BITS: bool(accumulator & operand),
            kernel.AT_LEAST: accumulator >= operand,
        }[code]
        at += if_so if true else if_not


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter(machine):
    column = kernel.ARCHITECTURES[machine][0]
    read, openat, futex = {"x86_64": (0, 257, 202), "aarch64": (63, 56, 98)}[machine]
    for number in (read, openat, futex):
        assert verdict(machine, number, 3) == "allow"
    for numbers in kernel.DENIED.values():
        assert numbers[column] < 0 or verdict(machine, numbers[column]) == "EPERM"
    assert verdict(machine, kernel.CLONE[column], 0x003D0F00) == "allow"  # what pthread_create passes
    assert verdict(machine, kernel.CLONE[column], 0x01200011) == "EPERM"  # what fork passes
    assert verdict(machine, kernel.CLONE3[column]) == "ENOSYS"
    for name in (kernel.KILL, kernel.TGKILL):
        assert verdict(machine, name[column], 7, 9) == "allow"
        for pid in (1, 8, 0, -1, -7):
            assert verdict(machine, name[column], pid, 9) == "EPERM"
    assert verdict(machine, kernel.PRLIMIT[column], 0) == "allow"
    assert verdict(machine, kernel.PRLIMIT[column], 5) == "EPERM"
    assert verdict(machine, kernel.PRCTL[column], 1) == "EPERM"
    assert verdict(machine, kernel.PRCTL[column], 15) == "allow"
    for command, answer in ((8, "EPERM"), (15, "EPERM"), (1, "allow"), (1030, "allow")):
        assert verdict(machine, kernel.FCNTL[column], 3, command) == answer
    assert verdict(machine, read, arch=0x40000003) == "kill"  # 32-bit calls of x86
    if machine == "x86_64":
        assert verdict(machine, 0x40000000 | read) == "EPERM"


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_the_filters_numbers_are_the_kernels(column, header):
    if not Path(header).exists():
        pytest.skip(f"no {header}")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", Path(header).read_text()))
    named = kernel.DENIED | {
        name.lower(): getattr(kernel, name) for name in ("CLONE", "CLONE3", "KILL", "TGKILL", "PRCTL")
    }
    named |= {"prlimit64": kernel.PRLIMIT, "fcntl": kernel.FCNTL}
    checked = [name for name, pair in named.items() if name in numbers and int(numbers[name]) == pair[column]]
    wrong = [name for name, pair in named.items() if name in numbers and int(numbers[name]) != pair[column]]
    assert not wrong
    assert len(checked) > 45
