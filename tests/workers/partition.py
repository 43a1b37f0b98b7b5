"""Started in two processes by test_partition_processes.py: trains with groups that span the processes and notes, per
case, what every rank generated and what its loss then saw, with no row left out or scored later."""

import copy
import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import TRL_UPDATE_PHASE, logps, make_trainer
from messages import Messages
from on_cpu import of_all_ranks


CASES = {
    "one micro-batch": {
        "per_device_train_batch_size": 2,
        "steps_per_generation": 4,
        "save_strategy": "steps",
        "save_steps": 6,  # inside a rollout
    },
    "resumed": {"per_device_train_batch_size": 2, "steps_per_generation": 4},
    "accumulation and reuse": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 8,
        "num_iterations": 2,
    },
    # the 6 rows of a process are not whole groups: the sampler itself splits one over the processes
    "rollout cut inside a group": {"per_device_train_batch_size": 2, "steps_per_generation": 3, "max_steps": 6},
    "rows that stay": {"per_device_train_batch_size": 2, "steps_per_generation": 4, "max_steps": 4},
}
PAD = 5  # unlike the 0 that pads everything else


def rows_of(inputs):
    """Per row: its tag, unpadded prompt and completion, and advantage."""
    prompts, completions = inputs["prompt_mask"].bool(), inputs["completion_mask"].bool()
    return [
        {
            "tag": inputs["tags"][i],
            "prompt": inputs["prompt_ids"][i][prompts[i]].tolist(),
            "completion": inputs["completion_ids"][i][completions[i]].tolist(),
            "advantage": inputs["advantages"][i].item(),
        }
        for i in range(len(inputs["tags"]))
    ]


def old_of(inputs, model):
    """Per row: its old log-probabilities, and how far they lie from those of the model that generated."""
    completions, old = inputs["completion_mask"].bool(), inputs["old_per_token_logps"]
    gap = (old - logps(model, inputs)).abs() * completions if model is not None else torch.zeros_like(old)
    return [{"old": old[i][completions[i]].tolist(), "gap": gap[i].max().item()} for i in range(len(old))]


def run(name, config):
    trainer = make_trainer(folder / name, **{"max_steps": 8, "learning_rate": 0.02} | TRL_UPDATE_PHASE | config)
    trainer._tokenizer.pad_token_id = trainer.batcher.pad_token_id = PAD
    generated, widths, windows, window, padding = [], [], [], [], set()
    generate, compute_loss = trainer._generate_and_score_completions, trainer._compute_loss

    def noted_rollout(inputs):
        rollout = generate(inputs)
        rank, size = trainer.accelerator.process_index, len(rollout["prompt_ids"])
        rollout["tags"] = [f"{len(generated)}/{rank}/{i}" for i in range(size)]
        trainer.generating_model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model))
        generated.append(rows_of(rollout))
        widths.append((rollout["prompt_ids"].size(1), rollout["completion_ids"].size(1)))
        if name == "rows that stay" and rank == 1:
            rollout["pictures"] = torch.zeros(size, 2, 2)
        return rollout

    def noted_loss(model, inputs):
        old = old_of(inputs, getattr(trainer, "generating_model", None))
        window.extend(row | own for row, own in zip(rows_of(inputs), old, strict=True))
        for part in ("prompt", "completion"):
            padding.update(inputs[f"{part}_ids"][inputs[f"{part}_mask"] == 0].tolist())
        if trainer.accelerator.sync_gradients:
            windows.append(window.copy())
            window.clear()
        return compute_loss(model, inputs)

    trainer._generate_and_score_completions, trainer._compute_loss = noted_rollout, noted_loss
    trainer.train(resume_from_checkpoint=str(folder / "one micro-batch/checkpoint-6") if name == "resumed" else None)
    return {
        "generated": list(zip(*of_all_ranks(generated), strict=True)),  # rollout, rank, row
        "windows": list(zip(*of_all_ranks(windows), strict=True)),  # mini-batch, rank, row
        "widths": of_all_ranks(widths),
        "padding": of_all_ranks(sorted(padding)),
        "parameters": of_all_ranks([p.double().sum().item() for p in trainer.model.parameters()]),
        "moved": not any(
            torch.equal(a, b) for a, b in zip(trainer.model.parameters(), start.model.parameters(), strict=True)
        ),
        "logged": [entry for entry in trainer.state.log_history if "trajectory_ratio/ess" in entry],
    }


folder = Path(sys.argv[1])
notes = Messages()
logging.getLogger("tic_grpo_trl").addHandler(notes)
start = make_trainer(folder / "start")
cases = {}
for name, config in CASES.items():
    notes.texts.clear()
    cases[name] = run(name, config) | {"messages": notes.texts.copy()}
if start.accelerator.is_main_process:
    result = {
        "num_processes": start.accelerator.num_processes,
        "distributed_type": str(start.accelerator.distributed_type),
        "cases": cases,
    }
    (folder / "result.json").write_text(json.dumps(result))
dist.destroy_process_group()
