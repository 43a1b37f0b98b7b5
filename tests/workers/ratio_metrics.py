"""Started in two processes by test_partition_processes.py: trains the tiny model and notes every rank's own ratio rows,
the texts of every mini-batch, and what the table of completions showed."""

import json
import sys
from pathlib import Path

import pandas as pd
import torch.distributed as dist
from conftest import TRL_UPDATE_PHASE, make_trainer
from on_cpu import of_all_ranks


# A mini-batch is 16 rows of both processes
CASES = {"groups on a process": {"num_generations": 4}, "groups on both": {"num_generations": 16}}


def run(folder, **config):
    """What happened in two rollouts of two updates each."""
    config |= {"steps_per_generation": 2, "max_steps": 4, "log_completions": True, "num_completions_to_print": 1}
    trainer = make_trainer(folder, **config, **TRL_UPDATE_PHASE)
    ratios, prompts, completions = [], [], []
    compute_loss, close_window = trainer._compute_loss, trainer.ratios.close

    def texts(ids, masks):
        rows = [row[mask.bool()] for row, mask in zip(ids, masks, strict=True)]
        return trainer.processing_class.batch_decode(rows, skip_special_tokens=True)

    def noted_ratios(*args):
        ratios.append([row for window in trainer.ratios._open for row in window.tolist()])
        return close_window(*args)

    def noted_texts(model, inputs):
        prompts.append(texts(inputs["prompt_ids"], inputs["prompt_mask"]))
        completions.append(texts(inputs["completion_ids"], inputs["completion_mask"]))
        return compute_loss(model, inputs)

    trainer.ratios.close, trainer._compute_loss = noted_ratios, noted_texts
    trainer.train()
    tables = sorted((folder / "completions").glob("*.parquet")) if trainer.accelerator.is_main_process else []
    columns = ["prompt", "completion", "trajectory_ratio"]
    return {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "rows": [of_all_ranks(step) for step in ratios],
        "prompts": [of_all_ranks(step) for step in prompts],
        "completions": [of_all_ranks(step) for step in completions],
        "logged": [entry for entry in trainer.state.log_history if "trajectory_ratio/ess" in entry],
        "tables": [pd.read_parquet(path)[columns].values.tolist() for path in tables],
    }


folder = Path(sys.argv[1])
results = {case: run(folder / case, **config) for case, config in CASES.items()}
if dist.get_rank() == 0:
    (folder / "result.json").write_text(json.dumps(results["groups on a process"] | {"cases": results}))
dist.destroy_process_group()
