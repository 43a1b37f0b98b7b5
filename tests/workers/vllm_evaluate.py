"""Started by test_evaluate_vllm.py: evaluates the starter with a real vLLM engine, one run folder per kind of sampling.

Argument: the folder for the runs."""

import vllm_cpu  # noqa: F401  # isort: skip (settings that torch and vLLM read when they are imported)

import sys
from pathlib import Path

import tic_grpo_trl.evaluation.run as run
from tic_grpo_trl.evaluation import EvaluationConfig, evaluate
from tic_grpo_trl.evaluation.sampling import vllm_sampler


if __name__ == "__main__":
    engines = {}

    def one_engine(*model, **engine):
        """For all runs: an engine takes long to start."""
        if not engines:
            engines["sampler"] = vllm_sampler(*model, **engine | {"enforce_eager": True})
        return engines["sampler"]

    run.vllm_sampler = one_engine
    for name, settings in {
        "sampled": {"limit": 100, "batch_size": 150},
        "sampled, other batches": {"limit": 100, "batch_size": 400},
        "greedy": {"limit": 60, "k": 1, "temperature": 0.0},
    }.items():
        evaluate(EvaluationConfig(backend="vllm", output_dir=str(Path(sys.argv[1], name)), **settings))
