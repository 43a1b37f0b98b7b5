"""Started in two processes by test_update_phase_processes.py: trains on fixed rollouts whose responses are short on one
rank and long on the other, and notes, per run, what was logged, how often every rank used its models, and the weights.

Arguments: a folder for the results and the names of the cases."""

import copy
import gc
import json
import os
import sys
from pathlib import Path


os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # its warning about rollout_func

import torch
import torch.distributed as dist
from conftest import CPU, TINY_PROMPTS, TRL_UPDATE_PHASE, WORDS, tiny_model, tiny_tokenizer
from on_cpu import DEEPSPEED, FSDP, describe, of_all_ranks, prepare, split_every_parameter
from rollouts import own_logprobs, with_vllm_correction
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer


LONGEST = (3, 40)  # tokens of a response, by rank
RUNS = {"on": {}, "off": TRL_UPDATE_PHASE}
SHUFFLED = {"partition_by_prompt": False}  # as TRL does
RUNS_LIKE_TRL = {"on": SHUFFLED, "off": SHUFFLED | TRL_UPDATE_PHASE, "trl": {"trl": True}}

# Four mini-batches a rollout. `zero_advantage`: groups that move no weight, by rank, in every rollout.
TWO_ROWS = {"per_device_train_batch_size": 2}
ONE_MICRO_BATCH = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 4}
CASES = {
    # a group of four makes a mini-batch of a rank
    "tic_grpo": {"zero_advantage": ([2], []), "runs": RUNS},
    "grpo": {"zero_advantage": ([1, 2], [3]), "runs": RUNS_LIKE_TRL, "algorithm": "grpo", **TWO_ROWS},
    "mean over rows": {
        "zero_advantage": ([0, 1, 5], [3]),
        "runs": RUNS,
        "algorithm": "tic_grpo_v2",
        "max_steps": 4,
        **TWO_ROWS,
    },
    # rank 0 never has anything to do; in one mini-batch of every rollout rank 1 has not either
    "zero-advantage rank": {"zero_advantage": ([0, 1, 2, 3], [1]), "runs": RUNS},
    # a mini-batch is a group of eight, half of it on either rank
    "spanning groups": {"zero_advantage": ([], [1]), "runs": RUNS, "num_generations": 8, "max_steps": 4},
    "reference": {"zero_advantage": ([2], []), "runs": RUNS, "beta": 0.1, **TWO_ROWS},
    # with a reference only responses without any token that counts have zero advantage
    "masked rank": {
        "zero_advantage": ([0, 1, 2, 3], [1]),
        "runs": RUNS,
        "beta": 0.1,
        "mask_truncated_completions": True,
        "max_steps": 4,
    },
    # with the sampler's log-probabilities, of which rank 1 lacks one
    "sampler": {"zero_advantage": ([2], []), "runs": RUNS, "max_steps": 4, "behaviour_policy": "sampler"},
    # TRL's correction for it
    "corrected": {
        "zero_advantage": ([], []),
        "runs": {"on": SHUFFLED | {"skip_zero_advantage": False}, "trl": {"trl": True}},
        "algorithm": "grpo",
        "max_steps": 4,
        "correction": "token_truncate",
    },
    "corrected zero-advantage rank": {
        "zero_advantage": ([0, 1, 2, 3], [1]),
        "runs": {"on": {}},
        "max_steps": 4,
        "correction": "sequence_truncate",
    },
    "one micro-batch": {"zero_advantage": ([1], []), "runs": RUNS, "algorithm": "grpo", **ONE_MICRO_BATCH},
    "one micro-batch, reference": {
        "zero_advantage": ([], []),
        "runs": RUNS,
        "algorithm": "grpo",
        "beta": 0.1,
        **ONE_MICRO_BATCH,
    },
}


def fixed_rollouts(rank, zero_advantage, size, ends=0, sampler=None):
    """A rollout_func and a reward that give the same responses and rewards in every run.

    `zero_advantage`: groups (of `size`) whose rewards are all equal; their responses end with the token `ends`.
    `sampler`: gives their log-probabilities, of which rank 1 lacks one."""
    generator = torch.Generator().manual_seed(5 + rank)
    of_prompts = torch.Generator().manual_seed(4)  # the same on both ranks, which may hold parts of a group

    def draw(most, generator=generator):
        return int(torch.randint(1, most + 1, (), generator=generator))

    def words(count, generator=generator):
        return torch.randint(1, len(WORDS), (count,), generator=generator).tolist()

    def rollout(prompts, trainer):
        lengths = [LONGEST[rank] if draw(8) == 1 else draw(LONGEST[rank]) for _ in prompts]
        last = [ends if i // size in zero_advantage else 0 for i in range(len(prompts))]
        of_groups = [words(4 + draw(8, of_prompts), of_prompts) for _ in range(0, len(prompts), size)]
        prompt_ids = [of_groups[i // size] for i in range(len(prompts))]
        completion_ids = [[*words(length - 1), end] for length, end in zip(lengths, last, strict=True)]
        sampled = [sampler(*pair) for pair in zip(prompt_ids, completion_ids, strict=True)] if sampler else None
        if sampled and rank == 1:
            sampled[0][0] = None
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": sampled}

    def reward(completions, **kwargs):
        groups = range(len(completions) // size)
        alive = [[0.0, 1.0, *(draw(3) / 3 for _ in range(size - 2))] for _ in groups]
        return [value for i in groups for value in ([1.0] * size if i in zero_advantage else alive[i])]

    return rollout, reward


class Passes(TrainerCallback):
    """How often the models were used until the end of every step."""

    def __init__(self):
        self.now = {"trained": 0, "scored": 0, "reference": 0, "backward": 0}
        self.steps = []

    def watch(self, trainer):
        def count(module, args):
            self.now["trained" if torch.is_grad_enabled() else "scored"] += 1

        def count_reference(module, args):
            self.now["reference"] += 1

        backward = trainer.accelerator.backward

        def count_backward(loss, **kwargs):
            self.now["backward"] += 1
            backward(loss, **kwargs)

        trainer.model.register_forward_pre_hook(count)
        trainer.accelerator.backward = count_backward
        if trainer.ref_model is not None:
            trainer.ref_model.register_forward_pre_hook(count_reference)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.now.copy())


def run(name, model, zero_advantage, trl=False, correction=None, **config):
    rank = int(os.environ["RANK"])
    config = {"num_generations": 4} | config
    if trl:
        del config["algorithm"]
        config |= {"epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dapo", "scale_rewards": "none"}
    trainer_class, config_class = (GRPOTrainer, GRPOConfig) if trl else (TICGRPOTrainer, TICGRPOConfig)
    defaults = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 16,
        "max_steps": 8,  # two rollouts
        "max_completion_length": max(LONGEST),
        "optim": "sgd",  # Adam would turn the noise of tiny gradients into steps
        "learning_rate": 0.2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    ends = 1 if config.get("mask_truncated_completions") else 0  # a response that does not end with <eos>
    sampler = own_logprobs(0.1) if correction or "behaviour_policy" in config else None
    rollout, reward = fixed_rollouts(rank, zero_advantage[rank], config["num_generations"], ends, sampler)
    passes = Passes()
    args = config_class(output_dir=str(folder / "out"), **CPU | defaults | config)
    split_every_parameter(args)
    trainer = trainer_class(
        model=copy.deepcopy(model),
        reward_funcs=reward,
        args=args,
        train_dataset=TINY_PROMPTS,
        processing_class=tiny_tokenizer(),
        rollout_func=rollout,
        callbacks=[passes],
    )
    passes.watch(trainer)
    if correction:
        with_vllm_correction(correction)(trainer)
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if rank == 0:
        weights = {key.removeprefix("module."): value.cpu() for key, value in weights.items()}
        torch.save(weights, folder / f"{name}.pt")
    sums = of_all_ranks([p.double().sum().item() for p in trainer.model.parameters()] if plain_ddp else None)
    return describe(trainer) | {
        "logged": [entry for entry in trainer.state.log_history if "loss" in entry],
        "passes": of_all_ranks(passes.steps),
        "sums": sums,
    }


folder = Path(sys.argv[1])
plain_ddp = not DEEPSPEED and not FSDP
prepare()
path = folder / f"model-{os.environ['RANK']}"
tiny_model().save_pretrained(path)  # where the reference model is read from
start = tiny_model()
start.config._name_or_path = str(path)
results = {}
gc.freeze()  # every trainer collects garbage: spare it what was imported
for case in sys.argv[2:]:
    config = CASES[case].copy()
    for variant, switches in config.pop("runs").items():
        if not plain_ddp and variant != "on":
            continue
        name = f"{case}, {variant}"
        results[name] = run(name, start, **config | switches)
if os.environ["RANK"] == "0":
    torch.save(start.state_dict(), folder / "start.pt")
    (folder / "result.json").write_text(json.dumps(results))
dist.barrier()
dist.destroy_process_group()
