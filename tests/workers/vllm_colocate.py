"""Started by test_vllm_colocate.py: trains with a vLLM engine in each process and writes what happened, one file each.

Arguments: a folder for the results, the engine's dtype and the names of the runs."""

from vllm_engine import CARRIED, GROUP, ROWS, SPANNING, one_engine_on_cpu, train, uneven_sums  # isort: skip (first, because of its settings)

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


MASK = {"vllm_importance_sampling_mode": "sequence_mask"}
TRUNCATE = {"vllm_importance_sampling_mode": "sequence_truncate"}
RUNS = {
    "synced": {},
    # Bounds close to 1, so that the correction acts on some responses and not on all
    "stale": {"sync": False, "vllm_importance_sampling_clip_max": 1.2, **MASK},
    "stale, truncated": {"sync": False, "vllm_importance_sampling_clip_max": 1.2, "max_steps": 8, **TRUNCATE},
    "stale, tokens": {
        "sync": False,
        "algorithm": "grpo",
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 1.05,
        "max_steps": 8,
    },
    "lora": {"lora": True, "learning_rate": 5e-3},
    "trainer": {"vllm_importance_sampling_correction": False, "max_steps": 8},
    "sampler": {"behaviour_policy": "sampler", "max_steps": 8},
    "carried": CARRIED,
    "carried, stale": CARRIED | {"sync": False, "eval_strategy": "no"},
    "carried, lora": CARRIED | {"lora": True, "learning_rate": 5e-3},
    "carried, corrected": {
        "max_carry_over": 2,
        "behaviour_policy": "trainer",
        "vllm_importance_sampling_clip_max": 1.2,
        **MASK,
    },
}
# in two processes
HALF, OF_HALF = ROWS // 2, ROWS // 2 * 4 // GROUP  # responses of a mini-batch and prompts of a rollout, of one process
UNEVEN = {"data": uneven_sums(0, OF_HALF), "shuffle_dataset": False, "per_device_train_batch_size": HALF}
RUNS |= {"both": CARRIED | UNEVEN, "both, spanning": SPANNING}


def refusal(**settings) -> str:
    """The message of the ValueError that a trainer with these settings raises."""
    try:
        train(**settings)
    except ValueError as error:
        return str(error)
    raise AssertionError("The settings are not refused.")


if __name__ == "__main__":
    folder, dtype, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    one_engine_on_cpu(dtype)
    rank = os.environ.get("RANK", "0")
    for name in names:
        settings = {"folder": folder / "out", "vllm_mode": "colocate"} | RUNS[name]
        noted = {"refused": refusal(**settings)} if name == "both, spanning" else train(**settings)
        torch.save(noted, folder / f"{name}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
