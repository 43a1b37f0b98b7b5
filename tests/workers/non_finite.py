"""Started in two processes by test_non_finite_processes.py: trains with a fault on one of them, once per case, and
notes what every process did.

Arguments: a folder for the results and the names of the cases."""

import gc
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from conftest import tiny_tokenizer
from faults import (
    INF,
    NAN,
    Judge,
    build,
    in_training,
    logged,
    marked_rollouts,
    poison_embedding,
    spoil_gradients,
    spoil_losses,
    without_marked,
)
from on_cpu import describe, of_all_ranks, prepare, split_every_parameter

from tic_grpo_trl.safety.non_finite import NonFiniteError


RANK = int(os.environ["RANK"])
ROWS = 8  # of a rollout on a process: two mini-batches of eight over both
METRICS = ("loss", "grad_norm", "frac_non_finite", "update/skipped")


def on(rank, inject):
    """A fault on one process alone."""

    def prepared(trainer):
        if rank == RANK:
            inject(trainer)

    return prepared


def policy(trainer):
    poison_embedding(trainer.model, NAN, in_training)


def policy_in_second(trainer):
    poison_embedding(trainer.model, NAN, lambda: in_training() and trainer.state.global_step == 1)


def tokenizer_of_judge(trainer):
    trainer.reward_processing_classes = [tiny_tokenizer()]


ALL = {"marked": range(ROWS)}
K4 = {"gradient_accumulation_steps": 1, "learning_rate": 0.3, "max_steps": 8}
CASES = {
    "policy": (on(1, policy), {}, {}),
    "policy, zeroed": (on(1, without_marked), {}, {}),
    "policy, padded": (on(0, policy), {}, {"padding_free": False}),
    "policy, checkpointing": (on(1, policy), {}, {"gradient_checkpointing": True}),
    "all of one": (on(1, policy), ALL, {}),
    "all of both": (policy_in_second, ALL, {}),
    "loss": (on(1, lambda trainer: spoil_losses(trainer, {2}, NAN)), {}, {}),
    "infinite loss": (on(0, lambda trainer: spoil_losses(trainer, {2}, INF)), {}, {}),
    "gradient": (on(1, lambda trainer: spoil_gradients(trainer, {2}, NAN)), {}, {}),
    "infinite gradient": (on(0, lambda trainer: spoil_gradients(trainer, {2}, INF)), {}, {}),
    "reward model": (tokenizer_of_judge, {}, {"reward": NAN}),
    "stop": (on(1, lambda trainer: spoil_losses(trainer, {2, 3}, NAN)), {}, {"max_non_finite_steps": 2}),
    "min_ess": (lambda trainer: None, {}, {"min_ess": 0.9999, **K4}),
}


def run(name):
    inject, rollouts, config = CASES[name]
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "num_generations": 2, "lr_scheduler_type": "linear"}
    config = settings | config
    if "reward" in config:
        config["reward"] = Judge(config["reward"] if RANK == 1 else None)
    rollouts = marked_rollouts(rows=ROWS, seed=RANK, **{"marked": (1, 2, 5)} | rollouts)
    trainer = build(folder / name, rollouts, adjust=split_every_parameter, **config)
    inject(trainer)
    error = None
    try:
        trainer.train()
    except NonFiniteError as stopped:
        error = str(stopped)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all processes, on the first
    noted = {
        "moved": trainer.states.moved,
        "rates": trainer.states.rates,
        "error": error,
        "finite": trainer.states.before.isfinite().all().item(),
        "weights": {key: value.double().sum().item() for key, value in weights.items()} if weights else None,
        **{metric: logged(trainer, metric) for metric in METRICS},
    }
    return describe(trainer) | {"ranks": of_all_ranks(noted)}


folder = Path(sys.argv[1])
prepare()
results = {}
gc.freeze()  # every trainer collects garbage: spare it what was imported
for case in sys.argv[2:]:
    results[case] = run(case)
if RANK == 0:
    (folder / "result.json").write_text(json.dumps(results))
dist.barrier()
dist.destroy_process_group()
