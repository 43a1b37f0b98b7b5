"""Started by test_vllm_colocate.py: trains with a vLLM engine in the same process and writes what happened.

Arguments: a folder for the results, the engine's dtype and the names of the runs."""

from vllm_engine import one_engine_on_cpu, train  # isort: skip (first, because of its settings)

import sys
from pathlib import Path

import torch


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
}

if __name__ == "__main__":
    folder, dtype, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    one_engine_on_cpu(dtype)
    for name in names:
        torch.save(train(folder / "out", vllm_mode="colocate", **RUNS[name]), folder / f"{name}.pt")
