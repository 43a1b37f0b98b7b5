"""Started in two processes by test_carry_over_processes.py: trains with carry-over on prompts whose responses are short
on one process and long on the other, and notes what every process generated, waited for and trained on.

Arguments: a folder for the results and the names of the cases."""

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from carrying import LONG, SHORT, model_with_lengths
from conftest import CPU, tiny_tokenizer
from datasets import Dataset
from on_cpu import describe, of_all_ranks, prepare, split_every_parameter
from peft import LoraConfig, PeftModel

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer


LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
CASES = {
    "full": {},
    "gathered": {"ds3_gather_for_generation": True},
    "split": {"ds3_gather_for_generation": False},
    "lora": {"peft_config": LORA},
    "two late, three times": {"max_carry_over": 2, "oversampling": 3.0},
    "recording alone": {"max_carry_over": 0, "behaviour_policy": "sampler"},
}
ROLLOUTS, PROMPTS = 5, 4  # prompts of one process in a rollout


def prompts():
    """All different; the first process reads those that have short responses, the second one the others."""
    kinds = [[f"{first} {second} {end}" for first in "abcde" for second in "abcde"] for end in (SHORT[0], LONG[0])]
    chosen = []
    for start in range(0, ROLLOUTS * PROMPTS, PROMPTS):
        chosen += [prompt for kind in kinds for prompt in kind[start : start + PROMPTS]]
    return Dataset.from_dict({"prompt": chosen, "number": list(range(len(chosen)))})


class NotingTrainer(TICGRPOTrainer):
    """Notes, for every rollout, the examples, tokens and log-probabilities, and what the engine did."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollouts, self.calls = [], []
        if self.carry_over:
            self.run_engine = self.carry_over.engine.run
            self.carry_over.engine.run = self._noted_run

    def _noted_run(self, unfinished, enough):
        pool, passes = self.carry_over.pool, []
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        begun, hook = len(pool.groups), model.register_forward_pre_hook(lambda *args: passes.append(args))
        use = self.run_engine(unfinished, enough)
        hook.remove()
        self.calls.append(
            {
                "begun": begun,
                "sampled": use.sampled,
                "steps": use.steps,
                "passes": len(passes),
                "sizes": [len(group.responses) for group in pool.groups],
                "unfinished": len(pool.unfinished),
            }
        )
        return use

    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        own = self.packed_forward.score(rollout).logps
        mask = rollout["completion_mask"].bool()
        age = rollout.get("token_age", torch.zeros_like(mask, dtype=torch.long))
        difference = (rollout["sampling_per_token_logps"] - own).abs()
        self.rollouts.append(
            {
                "numbers": [example["number"] for example in inputs],
                "lengths": mask.sum(1).tolist(),
                "age": age[mask].max().item(),
                "carried": (age[mask] > 0).sum().item(),
                "current": difference[mask & (age == 0)].amax().item() if (mask & (age == 0)).any() else 0.0,
                "earlier": difference[mask & (age > 0)].amax().item() if (mask & (age > 0)).any() else 0.0,
            }
        )
        return rollout


def count_short(completions, number, **kwargs):
    return [sum(word in SHORT for word in text.split()) / 16 for text in completions]


def build(**config):
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_generations": 4,
        "max_completion_length": 64,
        "max_carry_over": 1,
        "num_train_epochs": 1,
        "shuffle_dataset": False,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    torch.manual_seed(0)  # for a new adapter
    peft_config = config.pop("peft_config", None)
    args = TICGRPOConfig(str(folder / "out"), **CPU | settings | config)
    split_every_parameter(args)
    return NotingTrainer(
        model=model_with_lengths(),
        reward_funcs=count_short,
        args=args,
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def run(case):
    if case == "spanning groups":
        try:
            build(per_device_train_batch_size=1, num_generations=8)
        except ValueError as error:
            return {"refused": of_all_ranks(str(error))}
        raise AssertionError("groups that span processes were not refused")
    trainer = build(**CASES[case])
    trainer.train()
    left = len(trainer.carry_over.pool.groups) if trainer.carry_over else 0
    return describe(trainer) | {
        "logged": [entry for entry in trainer.state.log_history if "loss" in entry],
        "rollouts": of_all_ranks(trainer.rollouts),
        "calls": of_all_ranks(trainer.calls),
        "left": of_all_ranks(left),
    }


folder = Path(sys.argv[1])
prepare()
gc.freeze()  # every trainer collects garbage: spare it what was imported
results = {case: run(case) for case in sys.argv[2:]}
if os.environ["RANK"] == "0":
    (folder / "result.json").write_text(json.dumps(results))
dist.barrier()
dist.destroy_process_group()
