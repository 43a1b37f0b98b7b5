"""Started in two processes by test_mini_batch_processes.py: trains on fixed rollouts whose responses are short on one
rank and long on the other, and notes what every mini-batch was decided from, the decisions, learning rates and weights.

Argument: a folder for the results."""

import copy
import gc
import os
import sys
from pathlib import Path


os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # its warning about rollout_func

import torch
import torch.distributed as dist
from conftest import CPU, TINY_PROMPTS, WORDS, tiny_model, tiny_tokenizer
from on_cpu import describe, of_all_ranks, prepare, split_every_parameter
from transformers import TrainerCallback

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.forward.responses import loss_mask


LONGEST = (4, 30)  # tokens of a response, by rank
CASES = {
    # a mini-batch is a group of four on each rank; rank 0 has nothing to do in two of four
    "adaptive": {"algorithm": "tic_grpo_adaptive", "equal": ([1, 2], [3])},
    "prefix": {
        "algorithm": "tic_grpo_adaptive",
        "importance_sampling_level": "prefix",
        "equal": ([0], []),
        "max_steps": 4,
    },
    # a mini-batch is a group of eight, half of it on either rank
    "vcpo": {"algorithm": "vcpo", "num_generations": 8, "equal": ([], [1])},
}


def fixed_rollouts(rank, equal, size):
    """A rollout_func and a reward function; groups with the numbers `equal` have equal rewards."""
    generator = torch.Generator().manual_seed(5 + rank)

    def words(most):
        count = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(1, len(WORDS), (count,), generator=generator).tolist()

    def rollout(prompts, trainer):
        completions = [[*words(LONGEST[rank]), 0] for _ in prompts]
        return {"prompt_ids": [words(4) for _ in prompts], "completion_ids": completions, "logprobs": None}

    def reward(completions, **kwargs):
        rewards = torch.randint(0, 3, (len(completions),), generator=generator).div(2).tolist()
        return [1.0 if i // size in equal else value for i, value in enumerate(rewards)]

    return rollout, reward


class Rates(TrainerCallback):
    """The learning rate of the optimizer before every update."""

    def __init__(self):
        self.rates = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def run(name, equal, **config):
    rank, rates, decided = int(os.environ["RANK"]), Rates(), []
    defaults = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 16,
        "num_generations": 4,
        "max_steps": 8,  # two rollouts
        "max_completion_length": max(LONGEST) + 1,
        "optim": "sgd",
        "learning_rate": 0.2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    args = TICGRPOConfig(output_dir=str(folder / name), **CPU | defaults | config)
    split_every_parameter(args)
    rollout, reward = fixed_rollouts(rank, equal[rank], args.num_generations)
    trainer = TICGRPOTrainer(
        model=copy.deepcopy(start),
        reward_funcs=reward,
        args=args,
        train_dataset=TINY_PROMPTS,
        processing_class=tiny_tokenizer(),
        rollout_func=rollout,
        callbacks=[rates],
    )
    decide = trainer.mini_batch._decide

    def noting(micro_batches, log_ratios, norms=None):
        decision = decide(micro_batches, log_ratios, norms)
        responses = []
        for (number, inputs), log_ratio in zip(micro_batches.items(), log_ratios, strict=True):
            shifts = decision.shifts.get(number, torch.zeros(len(log_ratio)))
            groups = inputs.get("group", torch.zeros(len(log_ratio)))
            for values in zip(log_ratio, loss_mask(inputs), inputs["advantages"], groups, shifts, strict=True):
                responses.append([value.cpu() for value in values])
        decided.append({"responses": responses, "log_cap": decision.log_cap, "passes": len(micro_batches)})
        return decision

    trainer.mini_batch._decide = noting
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return describe(trainer) | {
        "logged": [entry for entry in trainer.state.log_history if "loss" in entry],
        "decided": list(zip(*of_all_ranks(decided), strict=True)),
        "rates": of_all_ranks(rates.rates),
        "weights": {key.removeprefix("module."): value.cpu() for key, value in (weights or {}).items()},
    }


folder = Path(sys.argv[1])
prepare()
start = tiny_model()
gc.freeze()  # every trainer collects garbage: spare it what was imported
results = {name: run(name, **config) for name, config in CASES.items()}
if os.environ["RANK"] == "0":
    torch.save(results, folder / "result.pt")
dist.barrier()
dist.destroy_process_group()
