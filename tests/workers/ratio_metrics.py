"""Started in two processes by test_examples.py: trains the tiny model and notes every rank's own ratio rows and the
prompts of every mini-batch."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from conftest import TRL_UPDATE_PHASE, make_trainer


folder = Path(sys.argv[1])
trainer = make_trainer(folder / "out", steps_per_generation=2, max_steps=4, **TRL_UPDATE_PHASE)
local, prompts = [], []
gather_window = trainer._close_ratio_window


def noted():
    local.append([row for window in trainer._ratio_rows for row in window.tolist()])
    gather_window()


compute_loss = trainer._compute_loss


def noted_prompts(model, inputs):
    masks, ids = inputs["prompt_mask"].bool(), inputs["prompt_ids"]
    prompts.append([prompt[mask].tolist() for mask, prompt in zip(masks, ids, strict=True)])
    return compute_loss(model, inputs)


trainer._close_ratio_window, trainer._compute_loss = noted, noted_prompts
trainer.train()


def of_all_ranks(value):
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


rows = [of_all_ranks(step) for step in local]
prompts = [of_all_ranks(step) for step in prompts]
if trainer.accelerator.is_main_process:
    result = {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "rows": rows,
        "prompts": prompts,
        "logged": [entry for entry in trainer.state.log_history if "trajectory_ratio/ess" in entry],
    }
    (folder / "result.json").write_text(json.dumps(result))
dist.destroy_process_group()
