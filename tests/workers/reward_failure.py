"""Train in two processes with a reward function that fails or hangs in its second step (test_failures_processes.py)."""

import ctypes
import json
import sys
import time
from pathlib import Path

import conftest
import torch.distributed as dist
from conftest import count_a, make_trainer

from tic_grpo_trl.rewards import RewardError, deadline


folder, how = Path(sys.argv[1]), sys.argv[2]
failed_at = None


def fragile(prompts, completions, log_metric, **kwargs):
    """Raise or hang in process 1, or return NaN in both: process 0 for its last sample, process 1 for its first."""
    global failed_at
    fragile.calls += 1
    if fragile.calls == 2 and how == "raise" and dist.get_rank() == 1:
        failed_at = time.time()
        raise ZeroDivisionError("a judge divided by zero")
    if fragile.calls == 2 and how in ("hang", "hang in C") and dist.get_rank() == 1:
        failed_at = time.time()
        (folder / "failed_at").write_text(str(failed_at))
        if how == "hang":
            time.sleep(3600)
        libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(128)
        for _ in range(2):  # no signal interrupts the second
            libc.pthread_mutex_lock(lock)
    rewards = count_a(completions)
    if fragile.calls >= 2 and how == "nan":
        failed_at = time.time()
        rewards[-1 if dist.get_rank() == 0 else 0] = float("nan")
    return rewards


fragile.calls = 0
conftest.count_a = fragile
deadline.GRACE = 2.0
trainer = make_trainer(folder / "run", reward_timeout=20.0)
try:
    trainer.train()
except RewardError as error:
    noted = {
        "message": str(error),
        "cause": type(error.__cause__).__name__,
        "steps": trainer.state.global_step,
        "failed_at": failed_at,
        "raised_at": time.time(),
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
    }
    (folder / f"rank_{dist.get_rank()}.json").write_text(json.dumps(noted))
    raise
