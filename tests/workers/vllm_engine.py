"""What the workers of the vLLM tests share: the real engine on a CPU, and runs of the trainer that note everything."""

import vllm_cpu  # noqa: F401  # isort: skip (settings that torch and vLLM read when they are imported)

import copy
import logging
import math
from pathlib import Path

import torch
import trl.generation.vllm_generation
from datasets import Dataset, concatenate_datasets
from messages import Messages
from peft import LoraConfig
from transformers import TrainerCallback

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.starter import STARTER_MODEL, exact_match_reward, make_dataset


ROWS, GROUP, LONGEST = 32, 8, 48  # responses of a mini-batch and of a prompt, tokens of a response
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "use_vllm": True,
    "vllm_max_model_length": 128,
    "per_device_train_batch_size": ROWS,
    "steps_per_generation": 4,
    "num_generations": GROUP,
    "max_completion_length": LONGEST,
    "max_steps": 12,  # three rollouts
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,  # gradients as they are
    "logging_steps": 1,
    "log_all_ratio_metrics": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}
# Four rollouts, the last of which empties the pool, and an evaluation after each
CARRIED = {"max_carry_over": 2, "max_steps": 16, "eval_strategy": "steps"}
CARRIED |= {"eval_steps": 4, "per_device_eval_batch_size": ROWS}
# In two processes: an update is one group, and a rollout three
SPANNING = {"per_device_train_batch_size": GROUP // 2, "steps_per_generation": 3, "max_carry_over": 2, "max_steps": 18}
SPANNING |= {"skip_zero_advantage": False}


def one_engine_on_cpu(dtype: str):
    """Let all trainers of this process colocate the same engine, with this precision: TRL leaves both to vLLM."""
    make, engines = trl.generation.vllm_generation.LLM, []

    def engine(**kwargs):
        if not engines:
            engines.append(make(**kwargs, dtype=dtype, enforce_eager=True))
        return engines[0]

    trl.generation.vllm_generation.LLM = engine


class Gradients(TrainerCallback):
    """Of every update, by parameter name."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({n.removeprefix("module."): p.grad.clone() for n, p in named if p.grad is not None})


def tensors(inputs: dict) -> dict:
    return {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}


def weights_of(model, merged: bool) -> dict:
    """Of the whole policy: an adapter is merged into a copy."""
    if merged:
        model = copy.deepcopy(model).merge_and_unload()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def waiting(trainer: TICGRPOTrainer) -> list[tuple[int, list[int]]]:
    """Number of each group in this process's pool, and how many tokens its responses have."""
    groups = trainer.carry_over.pool.groups if trainer.carry_over else []
    return [(group.number, [len(each.tokens) for each in group.responses]) for group in groups]


def uneven_sums(seed: int, size: int) -> Dataset:
    """Sums of three digits and of six in turns, `size` each: read in this order, one of two processes has the short."""
    kinds = [make_dataset("train", 5 * size, seed, (count,)) for count in (3, 6)]
    parts = [kind.select(range(start, start + size)) for start in range(0, 5 * size, size) for kind in kinds]
    return concatenate_datasets(parts)


def train(
    folder: Path, sync: bool = True, lora: bool = False, prepare=None, seed: int = 0, data=None, **config
) -> dict:
    """Train the starter.

    Args:
        folder: for the trainer.
        sync: whether the engine gets new weights; without, it keeps those of the start.
        lora: train an adapter.
        prepare: called with the trainer before it starts.
        seed: of trainer and prompts.
        data: prompts to train on; by default the starter's.
        config: over `SETTINGS`.

    Returns:
        What was logged; rollouts, evaluations and mini-batches with the policy's weights at that moment, and what then
        waited in the pool; what the engine did for each rollout with carry-over; gradients; how many forward passes
        scored and trained; warnings; the frozen weights before and after.
    """
    messages, gradients = Messages(logging.WARNING), Gradients()
    logging.getLogger("tic_grpo_trl").addHandler(messages)
    trainer = TICGRPOTrainer(
        model=STARTER_MODEL,
        reward_funcs=exact_match_reward,
        args=TICGRPOConfig(str(folder), **SETTINGS | {"seed": seed} | config),
        train_dataset=data or make_dataset("train", 200, seed),
        eval_dataset=make_dataset("test", 8, seed),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if lora else None,
        callbacks=[gradients],
    )
    rollouts, evaluations, batches, uses, forwards = [], [], [], [], {"scored": 0, "trained": 0}
    generate, compute_loss = trainer._generate_and_score_completions, trainer._compute_loss

    def noted_rollout(inputs):
        rollout = generate(inputs)
        state = {"weights": weights_of(trainer.model, lora), "waiting": waiting(trainer)}
        (rollouts if trainer.model.training else evaluations).append(tensors(rollout) | state)
        return rollout

    def noted_loss(model, inputs):
        if model.training:
            batches.append(tensors(inputs) | {"weights": weights_of(trainer.model, lora)})
        return compute_loss(model, inputs)

    def noted_run(*args):
        uses.append(run_engine(*args))
        return uses[-1]

    def count(module, args):
        if module.training:
            forwards["trained" if torch.is_grad_enabled() else "scored"] += 1

    trainer._generate_and_score_completions, trainer._compute_loss = noted_rollout, noted_loss
    if trainer.carry_over:
        run_engine = trainer.carry_over.engine.run
        trainer.carry_over.engine.run = noted_run
    assert trainer.packed_forward.choose_layout()  # makes a few passes of its own, once
    trainer.model.register_forward_pre_hook(count)
    if not sync:
        load, loaded = trainer.vllm_generation.sync_weights, []
        # an engine that other runs used has to get the weights of the start
        trainer.vllm_generation.sync_weights = lambda: loaded or loaded.append(load())
    if prepare:
        prepare(trainer)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    logging.getLogger("tic_grpo_trl").removeHandler(messages)
    return {
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "rollouts": rollouts,
        "evaluations": evaluations,
        "batches": batches,
        "uses": [vars(use) for use in uses],
        "updates": trainer.schedule.updates,
        "oldest": math.ceil(trainer.args.max_carry_over + trainer.args.oversampling - 1),
        "gradients": gradients.steps,
        "forwards": forwards,
        "warnings": messages.texts,
        "frozen": (frozen, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if n in frozen}),
        "num_processes": trainer.accelerator.num_processes,
    }
