"""A reward function that fails on one of two processes ends both, with one message, long before any collective times
out."""

import json
import time

import pytest
from launching import CONFIGS, ON_CPU, ROOT, free_port, launch_command, started


pytestmark = pytest.mark.distributed

SECONDS = 60  # from the failure; torch's own time-out is half an hour


@pytest.fixture(params=["raise", "nan"])
def failed(request, tmp_path):
    """What both processes noted."""
    config = [CONFIGS / "multi_gpu.yaml", *ON_CPU, "--main_process_port", free_port()]
    log = tmp_path / "log.txt"
    command = [*launch_command(*config), ROOT / "tests/workers/reward_failure.py", tmp_path, request.param]
    with started(command, log) as process:
        status = process.wait(300)
        ended = time.time()
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
    else:
        assert "On process 0 of 2: Reward function 'fragile' returned nan" in message
        assert "On process 1 of 2: Reward function 'fragile' returned nan" in message
        assert "Sample 7 of 8\n  prompt: '" in message
        assert "Sample 0 of 8\n  prompt: '" in message
