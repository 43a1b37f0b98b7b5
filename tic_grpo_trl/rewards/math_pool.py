"""Processes that compare answers, each of which may be killed over a single answer.

They are programs of their own, started by path: nothing is forked from a process with threads or CUDA, and the user's
script, which may train without an `if __name__ == "__main__"`, is not imported again.
"""

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .math_worker import READY


WORKER = Path(__file__).with_name("math_worker.py")
TIMEOUT, CRASH = "timeout", "crash"  # outcomes beside the worker's letters

START_SECONDS = 120.0  # to import sympy from a busy file system
MEMORY = 2 * 2**30  # bytes of address space of a process; sympy and an answer need about 0.3 GB
MAX_JOBS = 50_000  # sympy's caches grow by about 1.5 MB per 1,000 answers


class MathWorker:
    """A process and what it is doing: starting, idle, or comparing one answer since a moment."""

    def __init__(self, timeout: float):
        orphaned = str(int(timeout) + 5)
        # -P: this folder holds a `code.py`, which must not hide Python's own.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(MEMORY), orphaned],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self.jobs: Any = self.process.stdin
        self.replies: Any = self.process.stdout
        self.ready = False
        self.job: int | None = None  # its number
        self.done = 0
        self.deadline: float | None = time.monotonic() + START_SECONDS

    def give(self, number: int, job: tuple[str, str | None], timeout: float):
        self.job, self.deadline = number, time.monotonic() + timeout
        line = memoryview(json.dumps(job).encode() + b"\n")
        try:
            while line:
                line = line[self.jobs.write(line) or 0 :]
        except BrokenPipeError:
            pass  # it has died; reading from it says so

    def end(self):
        self.process.kill()
        self.process.wait()
        self.jobs.close()
        self.replies.close()


class MathPool:
    """
    Compares answers in processes that are started at the first use and shared by all later ones.

    Args:
        timeout: seconds that one comparison may take, from when a process begins with it.
        size: processes at most.
    """

    def __init__(self, timeout: float, size: int):
        self.timeout, self.size = timeout, size
        self.workers: list[MathWorker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        # when this object goes, and when the interpreter ends
        self._close = weakref.finalize(self, end_all, self.workers, self._owner)

    def close(self):
        """End all processes. The next use starts new ones."""
        end_all(self.workers, self._owner)

    def run(self, jobs: Sequence[tuple[str, str | None]]) -> list[str]:
        """Compare.

        Args:
            jobs: (gold, answer) each; without an answer (`None`), whether gold can be parsed.

        Returns:
            Per job one of the worker's `RIGHT`, `WRONG`, `NO_GOLD` and `FAILED`, or `TIMEOUT` or `CRASH`.

        Raises:
            RuntimeError: if a process cannot be started.
        """
        with self._lock:
            self._leave_to_owner()
            while len(self.workers) < min(self.size, len(jobs)):
                self.workers.append(MathWorker(self.timeout))
            try:
                return self._run(jobs)
            finally:
                # after an error or Ctrl-C: a reply to this call must not be taken for one to the next
                for worker in [worker for worker in self.workers if worker.job is not None]:
                    worker.end()
                    self.workers.remove(worker)

    def _leave_to_owner(self):
        """A fork of the process must not talk to processes that its parent talks to."""
        if self._owner != os.getpid():
            self._close.detach()
            self.workers, self._owner = [], os.getpid()
            self._close = weakref.finalize(self, end_all, self.workers, self._owner)

    def _run(self, jobs: Sequence[tuple[str, str | None]]) -> list[str]:
        outcomes = [""] * len(jobs)
        waiting = deque(range(len(jobs)))
        with selectors.DefaultSelector() as selector:

            def replace(worker: MathWorker):
                selector.unregister(worker.replies)
                worker.end()
                new = self.workers[self.workers.index(worker)] = MathWorker(self.timeout)
                selector.register(new.replies, selectors.EVENT_READ, new)

            def serve(worker: MathWorker):
                worker.job = worker.deadline = None
                if not waiting:
                    return
                if worker.done >= MAX_JOBS or worker.process.poll() is not None:
                    return replace(worker)
                number = waiting.popleft()
                worker.give(number, jobs[number], self.timeout)

            for worker in self.workers:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            for worker in [worker for worker in self.workers if worker.ready]:
                serve(worker)
            while not all(outcomes):
                deadlines = [worker.deadline for worker in self.workers if worker.deadline is not None]
                for key, _ in selector.select(max(0.0, min(deadlines) - time.monotonic())):
                    worker = key.data
                    reply = os.read(worker.replies.fileno(), 1).decode()
                    if not worker.ready:
                        if reply != READY:
                            raise RuntimeError(self._why_not_started(worker))
                        worker.ready = True
                        serve(worker)
                    elif worker.job is not None:
                        outcomes[worker.job] = reply or CRASH
                        worker.done += 1
                        serve(worker) if reply else replace(worker)
                    else:  # it has died idle
                        replace(worker)
                now = time.monotonic()
                for worker in [w for w in self.workers if w.deadline is not None and w.deadline < now]:
                    if worker.job is None:
                        raise RuntimeError(self._why_not_started(worker))
                    outcomes[worker.job] = TIMEOUT
                    replace(worker)
        return outcomes

    def _why_not_started(self, worker: MathWorker) -> str:
        worker.process.kill()
        reason = worker.replies.read().decode().strip() or f"exit status {worker.process.wait()}"
        self.workers.remove(worker)
        worker.end()
        return f"A process that compares answers did not start; does `import math_verify` work? {reason}"


def end_all(workers: list[MathWorker], owner: int):
    """End what the process `owner` has started."""
    if os.getpid() == owner:
        for worker in workers:
            worker.end()
        workers.clear()
