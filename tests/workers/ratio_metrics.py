"""Started in two processes by test_examples.py: trains the tiny model and notes every rank's own ratio rows."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from conftest import make_trainer


folder = Path(sys.argv[1])
trainer = make_trainer(folder / "out", steps_per_generation=2, max_steps=4)
local, rows = [], []
gather_window = trainer._close_ratio_window


def noted():
    local.append([row for window in trainer._ratio_rows for row in window.tolist()])
    gather_window()


trainer._close_ratio_window = noted
trainer.train()

for step in local:
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, step)
    rows.append(of_all)
if trainer.accelerator.is_main_process:
    result = {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "rows": rows,
        "logged": [entry for entry in trainer.state.log_history if "trajectory_ratio/ess" in entry],
    }
    (folder / "result.json").write_text(json.dumps(result))
dist.destroy_process_group()
