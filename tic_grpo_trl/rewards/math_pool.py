"""Compare answers in separate processes, each of which can be killed without losing more than one answer.

The workers are started by path with `subprocess`. Nothing is forked from a process with threads or CUDA, and the user's
script is not imported a second time, so it needs no `if __name__ == "__main__"`.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from .math_worker import READY


WORKER = Path(__file__).with_name("math_worker.py")
TIMEOUT, CRASH = "timeout", "crash"  # outcomes in addition to the worker's

START_SECONDS = 120.0  # importing sympy from a busy file system can be slow
MEMORY = 2 * 2**30  # bytes of address space per worker; sympy and one answer need about 0.3 GB
MAX_JOBS = 50_000  # comparisons per process: sympy's caches grow by about 1.5 MB per 1,000

Job = tuple[str, str | None]


class MathWorker:
    """
    Compare one answer at a time in a process, which is replaced after a timeout or a crash.

    Args:
        timeout: seconds per comparison.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.process: subprocess.Popen | None = None
        self.jobs_done = 0

    def compare(self, job: Job) -> str:
        """Return the worker's reply to a job, `TIMEOUT` or `CRASH`."""
        if self.process is None or self.process.poll() is not None or self.jobs_done >= MAX_JOBS:
            self._start()
        self.jobs_done += 1
        reply = self._receive(json.dumps(job), self.timeout)
        if reply in (TIMEOUT, CRASH):
            self.end()
        return reply

    def end(self):
        """Kill the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.connection.close()

    def _start(self):
        self.end()
        self.connection, theirs = socket.socketpair()
        # a comparison that outlives this process kills its worker a little later; -P keeps this folder off sys.path
        command = [sys.executable, "-P", str(WORKER), str(MEMORY), str(int(self.timeout) + 5)]
        with theirs:
            fd = theirs.fileno()
            self.process = subprocess.Popen(command, stdin=fd, stdout=fd, stderr=subprocess.DEVNULL)
        self.jobs_done = 0
        if (reply := self._receive("", START_SECONDS)) != READY:
            self.connection.settimeout(1.0)
            reason = reply
            if reply not in (TIMEOUT, CRASH):  # the worker sends its traceback and exits
                reason = "".join(iter(lambda: self.connection.recv(4096).decode(), ""))
            self.end()
            raise RuntimeError(f"A math worker did not start; check that `import math_verify` works: {reason}")

    def _receive(self, line: str, timeout: float) -> str:
        """Send a line, if there is one, and wait for one letter."""
        try:
            self.connection.sendall(line.encode() + b"\n" if line else b"")
            self.connection.settimeout(timeout)
            return self.connection.recv(1).decode() or CRASH
        except TimeoutError:
            return TIMEOUT
        except OSError:
            return CRASH


class MathPool:
    """
    Compare answers in worker processes, which start at the first use and are reused by later calls.

    Args:
        timeout: seconds per comparison, from the moment a worker begins it.
        size: maximum number of workers.
    """

    def __init__(self, timeout: float, size: int):
        self.owner = os.getpid()  # a fork must not talk to the workers of its parent
        self.workers = [MathWorker(timeout) for _ in range(size)]
        self._lock = threading.Lock()
        weakref.finalize(self, end_workers, self.workers, self.owner)  # also runs when the interpreter exits

    def close(self):
        """End all workers. The next use starts new ones."""
        end_workers(self.workers, self.owner)

    def run(self, jobs: Sequence[Job]) -> list[str]:
        """Compare answers.

        Args:
            jobs: pairs of solution and answer. With an answer of `None`, the job is only to parse the solution.

        Returns:
            Per job one of the worker's `RIGHT`, `WRONG`, `NO_GOLD` and `FAILED`, or `TIMEOUT` or `CRASH`.

        Raises:
            RuntimeError: if a worker cannot be started.
        """
        free: SimpleQueue[MathWorker] = SimpleQueue()
        for worker in self.workers:
            free.put(worker)

        def compare(job: Job) -> str:
            worker = free.get()
            try:
                return worker.compare(job)
            finally:
                free.put(worker)

        with self._lock, ThreadPoolExecutor(len(self.workers)) as threads:
            try:
                return list(threads.map(compare, jobs))
            except BaseException:  # Ctrl-C or a reward timeout: do not wait for the comparisons under way
                self.close()
                raise


def end_workers(workers: list[MathWorker], owner: int):
    """End the workers, unless this process is a fork of the one that started them."""
    if os.getpid() == owner:
        for worker in workers:
            worker.end()
