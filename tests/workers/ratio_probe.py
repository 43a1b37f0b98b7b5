"""Started in two processes by test_guards_processes.py: short runs whose settings make the ratio meaningless, and what
every process was warned of.

Arguments: a folder for the results, the names of the cases."""

import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_trainer, tiny_model
from on_cpu import DEEPSPEED, describe, of_all_ranks, prepare, split_every_parameter


CASES = {
    "sampling": {"top_p": 0.7},
    "dropout": {"disable_dropout": False, "algorithm": "grpo"},
    "precision": {"bf16": True, "max_completion_length": 48, "generation_kwargs": {"min_new_tokens": 40}},
}


class Noting(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def run(folder, name, measures=True):
    noting = Noting()
    logging.getLogger("tic_grpo_trl.safety.ratio_probe").addHandler(noting)
    torch.manual_seed(0)
    model = tiny_model(attention_dropout=0.2 if name == "dropout" else 0.0, initializer_range=0.5)
    trainer = make_trainer(folder / name, model, steps_per_generation=2, max_steps=3, **CASES[name])
    split_every_parameter(trainer.args)
    if not DEEPSPEED:  # which makes no pass before training
        assert trainer.packed_forward.choose_layout()
    if not measures:
        trainer.probe.check_rollout = lambda *args, **kwargs: None
    rollouts = []
    generate = trainer._generate_and_score_completions

    def noted(inputs):
        rollouts.append(generate(inputs))
        return rollouts[-1]

    trainer._generate_and_score_completions = noted
    trainer.train()
    logging.getLogger("tic_grpo_trl.safety.ratio_probe").removeHandler(noting)
    lengths = rollouts[0]["completion_mask"].sum(1)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return describe(trainer) | {
        "warned": of_all_ranks(noting.messages),
        "lengths": of_all_ranks(lengths.tolist()),
        "noise": of_all_ranks(trainer.state.log_history[0].get("trajectory_ratio/noise_floor")),
        "sum": sum(value.double().abs().sum().item() for value in weights.values()) if weights else None,
    }


folder = Path(sys.argv[1])
prepare()
results = {}
for case in sys.argv[2:]:
    results[case] = run(folder, case)
    results[f"{case}, not measured"] = run(folder, case, measures=False)
if dist.get_rank() == 0:
    (folder / "result.json").write_text(json.dumps(results))
dist.barrier()
dist.destroy_process_group()
