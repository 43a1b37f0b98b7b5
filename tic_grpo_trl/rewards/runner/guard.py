"""Run the two processes between the trainer and an untrusted program: the guardian and the candidate.

The guardian enters its own namespaces where permitted, forks the candidate, waits for it and reports how it ended. On
`SIGTERM`, which it also receives when the trainer dies, it kills the candidate. The candidate is the first process of
its PID namespace, so the kernel then kills everything it started. It gives up all rights before it runs the program.
"""

import contextlib
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from . import kernel


UIDS = range(60_001, 64_001)  # when started by root: one user per run, so that process limits count that run alone
SYSTEM_FILES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# Imported for the candidate, as on the sites from which LiveCodeBench collects its problems
IMPORT_ALL = ("typing", "collections", "functools", "itertools", "heapq", "bisect", "math")
IMPORT = (*IMPORT_ALL, "sys", "re", "random", "string", "operator", "copy")


def main() -> None:
    """Run one job. The arguments are the descriptors of the job (JSON), the report and the result."""
    job_fd, report_fd, result_fd = map(int, sys.argv[1:])
    with open(job_fd) as file:
        job = json.load(file)
    try:
        guard(job, report_fd, result_fd)
    except Exception as error:
        send(report_fd, {"failed": f"{type(error).__name__}: {error}"})


def send(fd: int, message: dict[str, Any]) -> None:
    os.write(fd, json.dumps(message).encode() + b"\n")


def guard(job: dict[str, Any], report_fd: int, result_fd: int) -> None:
    """Isolate this process, fork the candidate, wait for it, and report its exit code and processor seconds."""
    child = 0

    def stop(*_) -> None:
        os.kill(child, signal.SIGKILL) if child else os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    die_with_parent(signal.SIGTERM, job["parent"])
    os.chdir(job["folder"])
    uid = UIDS[os.getpid() % len(UIDS)] if os.getuid() == 0 and "uid" not in job["without"] else None
    # opened while every path is still reachable
    library, devices = open_paths([*sys.path[:-1], *SYSTEM_FILES]), open_paths(DEVICES)
    mechanisms = enter_namespaces(job, uid)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    guardian = os.getpid()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        parent = 0 if "namespaces" in mechanisms else guardian
        mechanisms += drop_rights(job, uid, library, devices, parent, set(mechanisms))
        send(report_fd, {"mechanisms": mechanisms})
        os.close(report_fd)
        run(job, result_fd)
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.close(result_fd)
    _, status, usage = os.wait4(child, 0)
    send(report_fd, {"exit_code": os.waitstatus_to_exitcode(status), "cpu": usage.ru_utime + usage.ru_stime})
    os._exit(0)  # skips the interpreter's shutdown


def open_paths(paths: Iterable[str]) -> dict[str, int]:
    """Open the paths that exist."""
    opened = {}
    for path in paths:
        with contextlib.suppress(OSError):
            opened[path] = os.open(path, os.O_PATH | os.O_CLOEXEC)
    return opened


def die_with_parent(number: int, parent: int) -> None:
    """Receive a signal when the parent dies. `parent` is its process id as this process sees it."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def drop_uid(uid: int | None) -> bool:
    """Become the unprivileged user permanently, if one is given and this process may."""
    if uid is None or os.getuid() == uid:
        return uid is not None
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except PermissionError:
        return False
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # otherwise root would own /proc/self
    return True


def enter_namespaces(job: dict[str, Any], uid: int | None) -> list[str]:
    """Enter new namespaces where permitted, as root or through a user namespace, and return the mechanisms applied."""
    if uid is not None:
        with contextlib.suppress(PermissionError):
            os.chown(".", uid, uid)
    applied: list[str] = []
    if "namespaces" in job["without"]:
        return applied
    owner = uid or os.getuid()
    try:
        kernel.unshare(kernel.NAMESPACES)
    except OSError:
        drop_uid(uid)
        die_with_parent(signal.SIGTERM, job["parent"])  # changing the user clears it
        owner, group = os.getuid(), os.getgid()
        try:
            kernel.unshare(kernel.CLONE_NEWUSER | kernel.NAMESPACES)
        except OSError:
            return applied
        for name, text in (("setgroups", "deny"), ("uid_map", f"{owner} {owner} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        applied.append("user namespace")
    applied.append("namespaces")
    with contextlib.suppress(OSError):
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        with contextlib.suppress(OSError):
            kernel.mount_read_only("/")
            applied.append("read-only mounts")
        options = f"size={job['limits']['temp_bytes']},nr_inodes=1024,mode=0700,uid={owner}"
        kernel.mount("none", job["folder"], "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
        os.chdir(job["folder"])
        applied.append("sized temporary folder")
    return applied


def drop_rights(
    job: dict[str, Any],
    uid: int | None,
    library: dict[str, int],
    devices: dict[str, int],
    parent: int,
    before: set[str],
) -> list[str]:
    """Give up every right, in an order in which each step is still permitted, and return the mechanisms applied."""
    applied: list[str] = []
    if "namespaces" in before:
        try:
            kernel.mount("none", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV)
        except OSError:  # a container that masks parts of /proc: an empty one is better than the host's
            if uid is None:
                with contextlib.suppress(OSError):
                    kernel.mount("none", "/proc", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=0")
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if "landlock" not in job["without"]:
        with contextlib.suppress(OSError):
            kernel.landlock(list(library.values()), list(devices.values()), os.open(".", os.O_PATH | os.O_CLOEXEC))
            applied.append("landlock")
    if drop_uid(uid):
        applied.append("uid")
    kernel.drop_capabilities()
    die_with_parent(signal.SIGKILL, parent)
    sys.path[:] = sys.path[:-1]  # remove this package
    for path in list(sys.path):
        if path in library and not os.access(path, os.R_OK | os.X_OK):
            redirect_imports(path, f"/proc/self/fd/{library[path]}")  # Python is in a home this user cannot enter
    # Elsewhere the limit would count all processes of the trainer's user; before Linux 5.14, in user namespaces too.
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    limits_processes = "uid" in applied or ("user namespace" in before and release >= (5, 14))
    set_limits(job["limits"], limits_processes)
    if limits_processes:
        applied.append("process limit")
    if "seccomp" not in job["without"]:
        with contextlib.suppress(OSError):
            kernel.seccomp()
            applied.append("seccomp")
    return applied


def redirect_imports(old: str, new: str) -> None:
    """Import from the folder `new` instead of `old`, including submodules of packages imported already."""
    sys.path[:] = [new if path == old else path for path in sys.path]
    for package in list(sys.modules.values()):
        if hasattr(package, "__path__"):
            paths = list(package.__path__)
            package.__path__ = [new + path.removeprefix(old) if path.startswith(old) else path for path in paths]


def set_limits(limits: dict[str, Any], limits_processes: bool) -> None:
    cpu = math.ceil(limits["cpu_seconds"])
    wanted = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (limits["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_STACK: (64 << 20, 64 << 20),
        resource.RLIMIT_CORE: (0, 0),
    }
    if limits_processes:
        wanted[resource.RLIMIT_NPROC] = (limits["processes"],) * 2
    for name, (soft, hard) in wanted.items():
        most = resource.getrlimit(name)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(name, (soft, hard))


def run(job: dict[str, Any], result_fd: int) -> None:
    """Execute the candidate as `__main__`, or import it and call its function with the job's arguments."""
    function = job["function"]
    module = ModuleType("candidate" if function else "__main__")
    sys.modules[module.__name__] = module
    sys.argv = ["candidate.py"]
    os.environ.clear()  # Python itself sets a variable
    namespace, builtins = vars(module), sys.modules["builtins"]
    imported = {name: __import__(name) for name in IMPORT if name in IMPORT_ALL or name in job["code"]}
    for name in IMPORT_ALL:
        public = getattr(imported[name], "__all__", None) or [n for n in dir(imported[name]) if n[0] != "_"]
        namespace.update({n: getattr(imported[name], n) for n in public if not hasattr(builtins, n)})
    namespace.update(imported)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # usually done by the site module
    try:
        exec(compile(job["code"], "candidate.py", "exec"), namespace)
        if function:
            owner = namespace["Solution"]() if "Solution" in namespace else module
            answer = json.dumps(getattr(owner, function)(*job["arguments"]))
            with open(result_fd, "w") as file:
                file.write(answer)
    except MemoryError:
        os.write(2, b"MemoryError\n")
        sys.exit(1)
    except Exception as error:
        trace = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(1)
