"""Compare answers in separate processes, each of which can be killed without losing more than one answer.

The workers are started by path with `subprocess`. Nothing is forked from a process with threads or CUDA, and the user's
script is not imported a second time, so it needs no `if __name__ == "__main__"`.
"""

import json
import os
import socket
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from subprocess import DEVNULL, Popen

from .math_worker import READY


WORKER = Path(__file__).with_name("math_worker.py")
TIMEOUT, CRASH = "timeout", "crash"  # outcomes in addition to the worker's

START_SECONDS = 120.0  # importing sympy from a busy file system can be slow
MEMORY = 2 * 2**30  # bytes of address space per worker; sympy and one answer need about 0.3 GB
MAX_JOBS = 50_000  # comparisons per process: sympy's caches grow by about 1.5 MB per 1,000

Job = tuple[str, str | None]  # solution and answer; `None`: only parse the solution


class MathWorker:
    """Compare one answer at a time in a process, which is replaced after a timeout or a crash."""

    def __init__(self, timeout: float):
        self.timeout = timeout  # seconds per comparison
        self.process: Popen | None = None
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
            self.process = Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=DEVNULL)
        self.jobs_done = 0
        if (reply := self._receive("", START_SECONDS)) != READY:
            self.connection.settimeout(1.0)
            if reply not in (TIMEOUT, CRASH):  # the worker sends its traceback and exits
                reply = "".join(iter(lambda: self.connection.recv(4096).decode(), ""))
            self.end()
            raise RuntimeError(f"A math worker did not start; check that `import math_verify` works: {reply}")

    def _receive(self, line: str, timeout: float) -> str:
        """Send a line, if there is one, and wait for one letter."""
        try:
            self.connection.sendall(line.encode() + b"\n" if line else b"")
            self.connection.settimeout(timeout)
            return self.connection.recv(1).decode() or CRASH
        except OSError as error:
            return TIMEOUT if isinstance(error, TimeoutError) else CRASH


class MathPool:
    """Compare answers in at most `size` worker processes, which start at the first use and serve later calls too."""

    def __init__(self, timeout: float, size: int):
        self.owner = os.getpid()  # a fork must not talk to the workers of its parent
        self.workers = [MathWorker(timeout) for _ in range(size)]
        self._lock = threading.Lock()
        self.close = partial(end_workers, self.workers, self.owner)  # the next use starts new ones
        weakref.finalize(self, self.close)  # also runs when the interpreter exits

    def run(self, jobs: Sequence[Job]) -> list[str]:
        """Compare answers with solutions, and return the worker's reply, `TIMEOUT` or `CRASH` for each pair."""
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
