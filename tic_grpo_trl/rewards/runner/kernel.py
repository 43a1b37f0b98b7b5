"""Call the kernel's confinement mechanisms: namespaces, Landlock, a seccomp filter, capabilities. 64-bit Linux.

Each function either applies its mechanism or raises `OSError`. None needs more than the standard library.
"""

import ctypes
import os
import stat
import struct
import sys


libc = ctypes.CDLL(None, use_errno=True)

# prctl(2)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# unshare(2)
CLONE_NEWUSER = 0x10000000
NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000  # mount, IPC, PID, network

# mount(2), mount_setattr(2)
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 1 << 18
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1


def check(result: int) -> int:
    """Return the result of a call to the C library, or raise its error as `OSError`."""
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def syscall(number: int, *args) -> int:
    return check(libc.syscall(ctypes.c_long(number), *args))


def prctl(option: int, *args: int) -> None:
    padded = [*args, 0, 0, 0, 0][:4]
    check(libc.prctl(option, *[ctypes.c_ulong(arg) for arg in padded]))


def unshare(flags: int) -> None:
    check(libc.unshare(flags))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = (text.encode() if text else None for text in (source, target, kind))
    check(libc.mount(*encoded, ctypes.c_ulong(flags), options.encode() or None))


def mount_read_only(path: str) -> None:
    """Make every mount at and below `path` read-only in this mount namespace (Linux 5.12, `mount_setattr(2)`)."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    syscall(442, AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))


def drop_capabilities() -> None:
    """Empty all three capability sets of this thread (`capset(2)`, version 3)."""
    header = struct.pack("II", 0x20080522, 0)
    check(libc.capset(header, bytes(24)))


# Landlock: access rights in the order of the kernel's bits (`linux/landlock.h`)
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
SCOPES = 1 << 0 | 1 << 1  # abstract Unix sockets and signals of processes outside


def landlock(readable: list[int], devices: list[int], writable: int) -> None:
    """Forbid all files but the given descriptors, which are open with everything below them (Linux 5.13)."""
    version = syscall(444, None, ctypes.c_size_t(0), 1)
    # 13 rights at first, then renaming across folders (2), truncating (3), ioctl on devices (5)
    known = (1 << 13 if version < 2 else 1 << 14 if version < 3 else 1 << 15 if version < 5 else 1 << 16) - 1
    attributes = struct.pack("QQQ", known, 0, SCOPES) if version >= 6 else struct.pack("Q", known)
    ruleset = syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0)
    rights = [(fd, READ_FILE | READ_DIR if stat.S_ISDIR(os.stat(fd).st_mode) else READ_FILE) for fd in readable]
    rights += [(fd, READ_FILE | WRITE_FILE) for fd in devices] + [(writable, known & ~EXECUTE)]
    for fd, allowed in rights:
        syscall(445, ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
    syscall(446, ruleset, 0)
    os.close(ruleset)


# seccomp: numbers of system calls on x86_64 and on aarch64, -1 if it has none
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # index into the pair, AUDIT_ARCH
_TABLE = (
    # other processes and programs
    "fork 57 -1, vfork 58 -1, execve 59 221, execveat 322 281, setsid 112 157, setpgid 109 154, ptrace 101 117, "
    "process_vm_readv 310 270, process_vm_writev 311 271, tkill 200 130, rt_sigqueueinfo 129 138, "
    "rt_tgsigqueueinfo 297 240, pidfd_send_signal 424 424, pidfd_open 434 434, pidfd_getfd 438 438, "
    # the network, also through io_uring
    "socket 41 198, io_uring_setup 425 425, "
    # memory that no limit counts or that outlives the process
    "shmget 29 194, semget 64 190, msgget 68 186, mq_open 240 180, memfd_create 319 279, memfd_secret 447 447, "
    # changes to files that Landlock does not control
    "truncate 76 45, chmod 90 -1, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -1, fchown 93 55, "
    "lchown 94 -1, fchownat 260 54, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, open_by_handle_at 304 265, "
    # namespaces, mounts and other large parts of the kernel
    "unshare 272 97, setns 308 268, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, "
    "open_tree 428 428, move_mount 429 429, fsopen 430 430, mount_setattr 442 442, bpf 321 280, "
    "perf_event_open 298 241, userfaultfd 323 282, add_key 248 217, request_key 249 218, keyctl 250 219, "
)
DENIED = {name: (int(x86), int(arm)) for name, x86, arm in map(str.split, _TABLE.strip(" ,").split(","))}
CLONE, CLONE3, KILL, TGKILL, PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)
PRCTL, FCNTL = (157, 167), (72, 25)
CLONE_THREAD, F_SETOWN, F_SETOWN_EX = 0x00010000, 8, 15

# BPF: load a word of `struct seccomp_data`; jump if equal, if a bit is set, if greater or equal; return
LOAD, EQUAL, BITS, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets
ALLOW, KILL_PROCESS, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38


def seccomp_program(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """Build the filter for process `pid` as BPF instructions (code, jump if true, jump if false, operand)."""
    column, audit_arch = ARCHITECTURES[machine]
    no = ERROR | EPERM
    refuse = (RETURN, 0, 0, no)
    # calls of another architecture (32-bit ones on x86_64) kill the process
    program = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, audit_arch), (RETURN, 0, 0, KILL_PROCESS), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":  # the x32 calls
        program += [(AT_LEAST, 0, 1, 0x40000000), refuse]
    for numbers in DENIED.values():
        if numbers[column] >= 0:
            program += [(EQUAL, 0, 1, numbers[column]), refuse]
    # a filter cannot see the flags of `clone3`; the C library then uses `clone`
    program += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ERROR | ENOSYS)]

    def by_argument(numbers: tuple[int, int], index: int, test: int, operand: int, if_so: int, if_not: int) -> None:
        load = [(EQUAL, 0, 4, numbers[column]), (LOAD, 0, 0, ARGUMENTS + 8 * index)]
        program.extend([*load, (test, 0, 1, operand), (RETURN, 0, 0, if_so), (RETURN, 0, 0, if_not)])

    by_argument(CLONE, 0, BITS, CLONE_THREAD, ALLOW, no)  # threads but no processes
    by_argument(KILL, 0, EQUAL, pid, ALLOW, no)
    by_argument(TGKILL, 0, EQUAL, pid, ALLOW, no)
    by_argument(PRLIMIT, 0, EQUAL, 0, ALLOW, no)  # its own limits
    by_argument(PRCTL, 0, EQUAL, PR_SET_PDEATHSIG, no, ALLOW)  # outliving the guardian
    # having the kernel signal another process; an allowed `fcntl` falls through to the end, so its rule comes last
    program += [(EQUAL, 0, 4, FCNTL[column]), (LOAD, 0, 0, ARGUMENTS + 8)]
    program += [(EQUAL, 1, 0, F_SETOWN), (EQUAL, 0, 1, F_SETOWN_EX), refuse]
    return [*program, (RETURN, 0, 0, ALLOW)]


def seccomp() -> None:
    """Apply the filter to this thread and those it starts. `no_new_privs` must be set."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES or sys.maxsize < 2**32:
        raise OSError(ENOSYS, f"no filter for {machine}")
    program = seccomp_program(machine, os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))  # sock_fprog
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(header))
