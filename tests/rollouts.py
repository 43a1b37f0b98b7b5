"""Fixed rollouts for the tests of the update phase, and runs of trainers on them.

Everything goes through real trainers and `train()`: a `rollout_func` returns random ids of given lengths and the reward
function random rewards, both from a seed, so that two trainers see the same. After each update the one under test takes
over the other's weights, so that rounding does not grow from step to step.
"""

import copy
import os
from types import SimpleNamespace

import pytest
import torch


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from conftest import CPU, TINY_PROMPTS, WORDS, drifted, logps, tiny_model, tiny_tokenizer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer


SETTINGS = {
    "num_generations": 4,
    "num_generations_eval": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "max_steps": 4,
    "max_completion_length": 24,
    "scale_rewards": "none",
    "loss_type": "dapo",
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
TOKEN = {"importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": 0.28}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03}
ANCHORED = ["tic_grpo", "tic_grpo_truncated", "grpo2", "tic_grpo_released", "grpo_no_is"]


def random_rollouts(
    seed=0, longest=24, zero_advantage=0.5, truncated=0.0, tools=False, sampler=None, prompt=None, group=4
):
    """A `rollout_func` and a reward function.

    Args:
        seed: of everything; evaluation has its own stream.
        longest: completions have 1 … `longest` tokens, a tenth of them exactly so many.
        zero_advantage: share of the groups whose responses all have the same reward.
        truncated: share of the completions without an end token.
        tools: let every third token be one that a tool wrote.
        prompt: tokens of every prompt, if they are all to have the same.
        sampler: maps prompt and completion ids to the log-probabilities that are returned.
        group: responses per prompt.
    """
    generators = {mode: torch.Generator().manual_seed(2 * seed + mode) for mode in (True, False)}
    current = [generators[True]]

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=current[0]))

    def chance(share):
        return float(torch.rand((), generator=current[0])) < share

    def rollout(prompts, trainer):
        current[0] = generators[trainer.model.training]
        output = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
        size = group if trainer.model.training else 2
        for i in range(len(prompts)):
            if i % size == 0:  # responses of a group have one prompt
                ids_of_prompt = [draw(1, len(WORDS)) for _ in range(prompt or draw(1, 6))]
            length = longest if chance(0.1) else draw(1, longest + 1)
            ids = [draw(1, len(WORDS)) for _ in range(length)]
            output["prompt_ids"].append(ids_of_prompt)
            output["completion_ids"].append(ids if chance(truncated) else [*ids[:-1], 0])
        if tools:
            output["env_mask"] = [[int(i % 3 != 1) for i in range(len(ids))] for ids in output["completion_ids"]]
            output["env_mask"][0] = [0] * len(output["completion_ids"][0])  # a response without a token of its own
        if sampler:
            pairs = zip(output["prompt_ids"], output["completion_ids"], strict=True)
            output["logprobs"] = [sampler(*pair) for pair in pairs]
        return output

    def reward(completions, **kwargs):
        rewards = [draw(0, 3) / 2 for _ in completions]
        size = group if current[0] is generators[True] else 2
        for start in range(0, len(rewards), size):
            if chance(zero_advantage):
                rewards[start : start + size] = [0.5] * size
        return rewards

    return rollout, reward


def given_rollouts(prompts: int, lengths: list[int], rewards: list[float], sampler=None):
    """The same every time: prompts of `prompts` tokens and completions of the given lengths."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, len(WORDS), (len(lengths), prompts + max(lengths)), generator=generator).tolist()

    def rollout(texts, trainer):
        assert len(texts) == len(lengths)
        prompt_ids = [row[:prompts] for row in ids]
        completion_ids = [[*row[prompts : prompts + n - 1], 0] for row, n in zip(ids, lengths, strict=True)]
        sampled = [sampler(*pair) for pair in zip(prompt_ids, completion_ids, strict=True)] if sampler else None
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": sampled}

    return rollout, lambda completions, **kwargs: rewards


class Recorder(TrainerCallback):
    """The gradients of every update, and the weights after it, which those of another run may replace."""

    def __init__(self, leader=None):
        self.gradients, self.weights = [], []
        self.followed = leader.weights if leader else None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(gradients))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.followed:
            for parameter, weights in zip(model.parameters(), self.followed[state.global_step - 1], strict=True):
                parameter.data.copy_(weights)
        self.weights.append([p.detach().clone() for p in model.parameters()])


def build(tmp_path, rollouts, trl=False, model=None, prompts=32, leader=None, **config):
    """A trainer on fixed rollouts: ours, or TRL's own with the same settings."""
    trainer_class, config_class = (GRPOTrainer, GRPOConfig) if trl else (TICGRPOTrainer, TICGRPOConfig)
    peft_config = config.pop("peft_config", None)
    own = {} if trl else {"log_all_ratio_metrics": True}
    torch.manual_seed(0)  # for a new adapter
    recorder = Recorder(leader)
    trainer = trainer_class(
        model=tiny_model() if model is None else copy.deepcopy(model),
        reward_funcs=rollouts[1],
        args=config_class(output_dir=str(tmp_path), **CPU | SETTINGS | own | config),
        train_dataset=TINY_PROMPTS.select(range(prompts)),
        eval_dataset=TINY_PROMPTS.select(range(4)),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=[recorder],
        rollout_func=rollouts[0],
    )
    trainer.recorder = recorder
    return trainer


def count_forwards(trainer) -> list[int]:
    """A list that the number of forward passes is added up in, those of a reference model included."""
    count = [0]
    if isinstance(trainer, TICGRPOTrainer):
        assert trainer.packed_forward.choose_layout()  # which takes a few of its own, once

    def add(*args):
        count[0] += 1

    for model in {id(m): m for m in (trainer.model, trainer.ref_model) if m is not None}.values():
        model.register_forward_pre_hook(add)
    return count


def train(tmp_path, prepare=None, rollouts=None, **config):
    """Gradients and logged metrics of every update, and the number of forward passes of the whole run."""
    rollouts = rollouts or {}
    if isinstance(rollouts, dict):
        group = config.get("num_generations", SETTINGS["num_generations"])
        rollouts = random_rollouts(group=group, **rollouts)
    trainer = build(tmp_path, rollouts, **config)
    if prepare:
        prepare(trainer)
    forwards = count_forwards(trainer)
    trainer.train()
    return SimpleNamespace(
        trainer=trainer,
        gradients=trainer.recorder.gradients,
        weights=trainer.recorder.weights,
        logs=[entry for entry in trainer.state.log_history if "loss" in entry],
        forwards=forwards[0],
    )


def trl_and_ours(tmp_path, settings, **config):
    """TRL's own trainer and ours, which by default leaves out all that it can."""
    if "importance_sampling_level" not in settings:
        settings = TOKEN | settings
    algorithm = "gspo" if settings["importance_sampling_level"] == "sequence" else "grpo"
    reference = train(tmp_path / "trl", trl=True, **settings, **config)
    config |= {"algorithm": algorithm, "partition_by_prompt": False, "leader": reference}
    return reference, train(tmp_path / "ours", **settings, **config)


def assert_same_updates(actual, expected, gradient=1e-5, loss=1e-6):
    """Also that something was compared: at least one gradient is not 0. The first is the follower."""
    assert len(actual.gradients) == len(expected.gradients) == len(actual.logs) == len(expected.logs)
    for step, (mine, theirs) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        assert mine.shape == theirs.shape
        assert (mine - theirs).norm() <= gradient * theirs.norm(), f"update {step + 1}"
    for mine, theirs in zip(actual.logs, expected.logs, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0, abs=loss)
    assert any(theirs.norm() > 0 for theirs in expected.gradients)


def total(result, name) -> float:
    return sum(entry[name] for entry in result.logs)


def with_advantages_per_token(trainer):
    """(B, T) advantages: some rows 0 everywhere, one only outside of its response."""
    generate = trainer._generate_and_score_completions
    generator = torch.Generator().manual_seed(1)

    def edited(inputs):
        rollout = generate(inputs)
        advantages = torch.randn(rollout["completion_mask"].shape, generator=generator)
        advantages[::3] = 0
        advantages[1] *= 1 - rollout["completion_mask"][1]
        return rollout | {"advantages": advantages}

    trainer._generate_and_score_completions = edited


def with_vllm_correction(mode, low=None, high=3.0):
    def prepare(trainer):
        """Make TRL correct for the log-probabilities of a `rollout_func`, as it does for those of vLLM."""
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        for settings in (trainer, trainer.args):
            settings.vllm_importance_sampling_mode = mode
            settings.vllm_importance_sampling_clip_min, settings.vllm_importance_sampling_clip_max = low, high

    return prepare


def with_reference(trainer, beta=0.1):
    """Let a copy of the policy be the reference: TRL would load it, and not every model can be saved."""
    trainer.beta, trainer.ref_model = beta, copy.deepcopy(trainer.model)


def own_logprobs(drift):
    """A sampler that is the initial model, moved by a drift."""
    model = drifted(tiny_model(), drift)

    def sampler(prompt, completion):
        ids = {"prompt_ids": torch.tensor([prompt]), "completion_ids": torch.tensor([completion])}
        ids |= {name.replace("ids", "mask"): torch.ones_like(value) for name, value in ids.items()}
        return logps(model, ids)[0].tolist()

    return sampler


def active_inputs(prompts, lengths, rewards, active):
    """The rows that count, padded, from the same ids as [`given_rollouts`]."""
    output = given_rollouts(prompts, lengths, rewards)[0]([""] * len(lengths), None)
    width = max(lengths)
    completions = [output["completion_ids"][i] + [0] * (width - lengths[i]) for i in active]
    masks = [[1] * lengths[i] + [0] * (width - lengths[i]) for i in active]
    ids = torch.tensor([output["prompt_ids"][i] for i in active])
    return {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": torch.tensor(completions),
        "completion_mask": torch.tensor(masks),
    }


# Four groups of two; the second and the last have zero advantage. The active responses have 8, 4, 5 and 3 tokens with
# their prompts of 2.
GIVEN = {"prompts": 2, "lengths": [6, 2, 5, 5, 3, 1, 7, 1], "rewards": [1, 0, 1, 1, 0, 0.5, 0, 0]}
ACTIVE = [0, 1, 4, 5]
