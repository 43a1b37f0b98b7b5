"""Start vLLM's server on this CPU."""

import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launching import free_port, started

from tic_grpo_trl.starter import STARTER_MODEL


# As a user starts it, but for the precision and the limits that suit a CPU
FLAGS = [
    "--weight-transfer-config",
    '{"backend": "nccl"}',
    "--logprobs-mode",
    "processed_logprobs",
    "--max-logprobs=-1",
]
ON_CPU = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "64"]


def wait_until_up(address: str, process: subprocess.Popen, seconds: int):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=10).close()
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise TimeoutError(f"The server is not up after {seconds} s, or it ended: {process.poll()}.")


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, int]]:
    """Address and process of a server of the starter; it and all that it started are gone afterwards."""
    port, log = free_port(), folder / "log.txt"
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, Path(__file__).parent / "workers/vllm_cpu.py", "--model", STARTER_MODEL]
    command += ["--host", "127.0.0.1", "--port", port, *FLAGS, *ON_CPU]
    # Not the test's folder for temporary files: the path of a socket must be short
    with (
        tempfile.TemporaryDirectory(prefix="vllm-") as scratch,
        started(command, log, cwd=folder, TMPDIR=scratch) as process,
    ):
        try:
            wait_until_up(address, process, 300)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{log.read_text()[-5000:]}") from error
        yield address, process.pid
