"""A reward function that fails or hangs on one of two processes ends both with the same message, long before any
collective times out."""

import json
import time

import pytest
from launching import CONFIGS, ON_CPU, ROOT, free_port, launch_command, started


pytestmark = pytest.mark.distributed

SECONDS = 60  # after the failure; torch's own timeout is half an hour


def launched(folder, how: str):
    """Run two processes whose reward function fails; return exit status, end time and log."""
    config = [CONFIGS / "multi_gpu.yaml", *ON_CPU, "--main_process_port", free_port()]
    log = folder / "log.txt"
    with started([*launch_command(*config), ROOT / "tests/workers/reward_failure.py", folder, how], log) as process:
        status = process.wait(300)
        return status, time.time(), log


@pytest.fixture(params=["raise", "nan", "hang"])
def failed(request, tmp_path):
    """Return what both processes recorded."""
    status, ended, log = launched(tmp_path, request.param)
    notes = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert status != 0, log.read_text()
    for note in notes:
        assert note["num_processes"] == 2
        assert note["distributed_type"] == "DistributedType.MULTI_CPU"
        assert note["steps"] == 1
    failed_at = max(note["failed_at"] or 0 for note in notes)
    assert all(note["raised_at"] - failed_at < SECONDS for note in notes)
    assert ended - failed_at < SECONDS
    assert "RewardError" in log.read_text()
    return request.param, notes


def test_both_processes_end_with_one_message(failed):
    how, (first, second) = failed
    assert first["message"] == second["message"]
    message = first["message"]
    if how == "raise":
        assert "On process 1 of 2: Reward function 'fragile' raised ZeroDivisionError: a judge divided" in message
        assert "On process 0" not in message
        assert (first["cause"], second["cause"]) == ("NoneType", "ZeroDivisionError")
    elif how == "hang":
        assert "On process 1 of 2: Reward function 'fragile' did not return within reward_timeout = 20 s" in message
        assert "On process 0" not in message
        assert "time.sleep(3600)" in message
    else:
        assert "On process 0 of 2: Reward function 'fragile' returned nan" in message
        assert "On process 1 of 2: Reward function 'fragile' returned nan" in message
        assert "Sample 7 of 8\n  prompt: '" in message
        assert "Sample 0 of 8\n  prompt: '" in message


def test_a_process_that_nothing_can_interrupt_ends_both(tmp_path):
    status, ended, log = launched(tmp_path, "hang in C")
    assert status != 0
    assert ended - float((tmp_path / "failed_at").read_text()) < SECONDS + 30  # the launcher waits for the other one
    text = log.read_text()
    assert "Reward function 'fragile' did not return within reward_timeout = 20 s" in text
    assert "libc.pthread_mutex_lock(lock)" in text
    assert "Nothing could interrupt it, so this process ends." in text
