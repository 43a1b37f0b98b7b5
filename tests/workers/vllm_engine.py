"""What the workers of the vLLM tests share: the real engine on a CPU, and runs of the trainer that note everything."""

import vllm_cpu  # noqa: F401  # isort: skip (settings that torch and vLLM read when they are imported)

import copy
import logging
from pathlib import Path

import torch
import trl.generation.vllm_generation
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


def train(folder: Path, sync: bool = True, lora: bool = False, prepare=None, seed: int = 0, **config) -> dict:
    """Train the starter.

    Args:
        folder: for the trainer.
        sync: whether the engine gets new weights; without, it keeps those of the start.
        lora: train an adapter.
        prepare: called with the trainer before it starts.
        seed: of trainer and prompts.
        config: over `SETTINGS`.

    Returns:
        What was logged; rollouts and mini-batches with the policy's weights at that moment; gradients; how many forward
        passes scored and trained; warnings; the frozen weights before and after.
    """
    messages, gradients = Messages(logging.WARNING), Gradients()
    logging.getLogger("tic_grpo_trl").addHandler(messages)
    trainer = TICGRPOTrainer(
        model=STARTER_MODEL,
        reward_funcs=exact_match_reward,
        args=TICGRPOConfig(str(folder), **SETTINGS | {"seed": seed} | config),
        train_dataset=make_dataset("train", 200, seed),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if lora else None,
        callbacks=[gradients],
    )
    rollouts, batches, forwards = [], [], {"scored": 0, "trained": 0}
    generate, compute_loss = trainer._generate_and_score_completions, trainer._compute_loss

    def noted_rollout(inputs):
        rollout = generate(inputs)
        rollouts.append(tensors(rollout) | {"weights": weights_of(trainer.model, lora)})
        return rollout

    def noted_loss(model, inputs):
        batches.append(tensors(inputs) | {"weights": weights_of(trainer.model, lora)})
        return compute_loss(model, inputs)

    def count(module, args):
        forwards["trained" if torch.is_grad_enabled() else "scored"] += 1

    trainer._generate_and_score_completions, trainer._compute_loss = noted_rollout, noted_loss
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
        "batches": batches,
        "gradients": gradients.steps,
        "forwards": forwards,
        "warnings": messages.texts,
        "frozen": (frozen, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if n in frozen}),
        "num_processes": trainer.accelerator.num_processes,
    }
