"""Refuse a second run in the output folder of one that is training."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout


logger = get_logger(__name__)

LOCK = "_training.lock"  # files whose names begin with an underscore are not pushed to the Hub


@contextmanager
def locked(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock of an output folder in a `with` block; the operating system releases that of a killed process.

    Raise a ValueError on every process if another run holds it. Where the file system has no locks, warn and go on.
    """
    path = folder / LOCK
    lock = FileLock(path)
    problem = [_acquire(lock, path) if accelerator.is_main_process else None]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise ValueError(problem[0])
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                path.unlink()  # before the release: afterwards it may be another run's
            lock.release()


def _acquire(lock: FileLock, path: Path) -> str | None:
    """Take the lock, and return why it can't be taken, if another run has it."""
    holder = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            holder = path.read_text()
        lock.acquire(timeout=0)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout:
        other = f"another run ({holder or 'an unknown process'}) is training there"
        return f"output_dir {path.parent}: {other}; choose another --output_dir, or stop it."
    except (OSError, NotImplementedError) as error:
        logger.warning(f"{path} cannot be locked ({error}): a second run in this folder would not be noticed.")
    return None
