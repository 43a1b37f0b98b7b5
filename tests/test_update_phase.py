"""update_phase.py and padding_free.py: whatever is left out of an update, its gradients and metrics stay TRL's.

Everything runs through real trainers and `train()`, on rollouts that are fixed beforehand: a `rollout_func` returns
random ids of given lengths and the reward function random rewards, both from a seed, so that two trainers see the same.
After each update the one under test takes over the other's weights, so that rounding does not grow from step to step.
"""

import copy
import gc
import math
import os
import random
from types import SimpleNamespace

import pytest
import torch


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from conftest import CPU, TINY_PROMPTS, TRL_UPDATE_PHASE, WORDS, drifted, logps, tiny_model, tiny_tokenizer
from peft import LoraConfig, PromptTuningConfig
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)
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


@pytest.fixture(scope="module", autouse=True)
def cheap_garbage_collection():
    """`train()` collects garbage, which otherwise walks through all modules that are imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def random_rollouts(seed=0, longest=24, dead=0.5, truncated=0.0, tools=False, sampler=None, prompt=None, group=4):
    """A `rollout_func` and a reward function.

    Args:
        seed: of everything; evaluation has its own stream.
        longest: completions have 1 … `longest` tokens, a tenth of them exactly so many.
        dead: share of the groups whose responses all have the same reward.
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
        for _ in prompts:
            length = longest if chance(0.1) else draw(1, longest + 1)
            ids = [draw(1, len(WORDS)) for _ in range(length)]
            output["prompt_ids"].append([draw(1, len(WORDS)) for _ in range(prompt or draw(1, 6))])
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
            if chance(dead):
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
    torch.manual_seed(0)  # for a new adapter
    recorder = Recorder(leader)
    trainer = trainer_class(
        model=tiny_model() if model is None else copy.deepcopy(model),
        reward_funcs=rollouts[1],
        args=config_class(output_dir=str(tmp_path), **CPU | SETTINGS | config),
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
        trainer._way_to_pack()  # which takes a few of its own, once

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
    arm = "gspo" if settings["importance_sampling_level"] == "sequence" else "grpo"
    reference = train(tmp_path / "trl", trl=True, **settings, **config)
    config |= {"arm": arm, "partition_by_prompt": False, "leader": reference}
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


# Against TRL


# per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation, num_iterations
GEOMETRIES = [
    (8, 1, 4, 1),
    (2, 4, 16, 1),
    (4, 2, 4, 2),
    (4, 4, 2, 1),  # two rollouts an update: nothing is scored
    (4, 3, 2, 1),  # a rollout begins in the middle of an update
    (4, 3, 2, 3),  # and is used three times
    (8, 1, 1, 2),  # one mini-batch, used twice
    (1, 8, 8, 1),
    (8, 1, 1, 1),
    (2, 2, 6, 1),
    (3, 2, 4, 2),
    (1, 2, 4, 3),
]
LOSSES = ["dapo", "grpo", "dr_grpo", "bnpo"]


@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_random_settings_give_trl_s_updates(tmp_path, case):
    rows, window, steps, iterations = GEOMETRIES[case]
    generator = random.Random(case + 1)
    rollouts = {
        "seed": case,
        "longest": generator.choice([2, 5, 24]),
        "dead": generator.choice([0.0, 0.6] if rows * steps > 12 else [0.0, 0.3]),
        "truncated": generator.choice([0.0, 0.3]),
    }
    settings = SEQUENCE if case % 3 == 0 else TOKEN
    settings = settings | {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": window,
        "steps_per_generation": steps,
        "num_iterations": iterations,
        "loss_type": LOSSES[case % 4],
        "max_steps": max(2, 2 * steps * iterations // window),  # two rollouts
        "learning_rate": generator.choice([0.03, 0.3]),
    }
    # the two ways in which responses that share rows are kept apart on a CPU
    model = tiny_model(attn_implementation=["sdpa", "eager"][case % 2])
    reference, ours = trl_and_ours(tmp_path, settings, rollouts=rollouts, model=model)
    assert_same_updates(ours, reference)
    assert reference.forwards - ours.forwards == total(ours, "update/forwards_saved")


def test_responses_of_one_token(tmp_path):
    assert_same_updates(*reversed(trl_and_ours(tmp_path, {}, rollouts={"longest": 1})))


def test_an_epoch_that_ends_in_the_middle_of_an_update(tmp_path):
    """Three rollouts of one micro-batch each, two to an update: every other update has one."""
    settings = {"steps_per_generation": 1, "max_steps": 5}
    reference, ours = trl_and_ours(tmp_path, settings, prompts=3, rollouts={"dead": 0.3})
    assert_same_updates(ours, reference)
    assert reference.forwards - ours.forwards == total(ours, "update/forwards_saved")


def test_skipped_rows_of_an_update_that_an_epoch_ends(tmp_path):
    config = {"steps_per_generation": 1, "max_steps": 4, "prompts": 3, "rollouts": {"dead": 1.0}}
    assert [entry["update/rows_skipped"] for entry in train(tmp_path, **config).logs] == [1.0] * 4


@pytest.mark.parametrize("loss_type", LOSSES)
def test_nothing_but_dead_rows(tmp_path, loss_type):
    """Every update still makes the one pass that synchronises, and its gradient is exactly 0."""
    settings = {"loss_type": loss_type, "learning_rate": 1.0}
    reference, ours = trl_and_ours(tmp_path, settings, rollouts={"dead": 1.0})
    for result in (reference, ours):
        assert len(result.gradients) == 4
        assert not any(gradient.any() for gradient in result.gradients)
        assert [entry["loss"] for entry in result.logs] == [0.0] * 4
    if loss_type != "bnpo":
        assert [entry["update/rows_skipped"] for entry in ours.logs] == [1.0] * 4
        # per rollout: the second mini-batch's blank row is scored, and each mini-batch makes one pass
        assert ours.forwards == 2 * (1 + 2)


def in_float64(trainer):
    """A head that keeps float64, where TRL's computes in float32 (which allows for 1e-7, like Qwen3's norms)."""
    model = trainer.model

    def forward(fused_lm_head, labels, **inputs):
        logits = type(model).forward(model, **inputs).logits[:, :-1]
        labels = labels[:, 1:]
        log_softmax = logits.log_softmax(-1)
        log_probs = log_softmax.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        return SimpleNamespace(
            log_probs=log_probs.masked_fill(labels < 0, 0), entropy=entropy.masked_fill(labels < 0, 0)
        )

    model.forward = forward


@pytest.mark.parametrize("settings", [TOKEN, SEQUENCE, {"loss_type": "grpo"}, {"loss_type": "dr_grpo"}])
def test_in_float64_the_updates_are_trl_s_to_twelve_digits(tmp_path, settings):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.3,
        resid_pdrop=0.0,  # TRL leaves dropout on
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).double()
    # TRL counts this model's positions from the first column, so that prompts of one length are not padded
    pair = trl_and_ours(tmp_path, settings, model=model, prepare=in_float64, rollouts={"prompt": 3})
    assert pair[1].trainer._way_to_pack()
    assert pair[1].gradients[0].dtype == torch.float64
    assert_same_updates(*reversed(pair), gradient=1e-12, loss=1e-7)  # the logged loss is float32


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


def with_vllm_correction(columns):
    def prepare(trainer):
        """As if vLLM had sampled: ratios per response or per token, in the rollout and in the loss."""
        generate = trainer._generate_and_score_completions
        generator = torch.Generator().manual_seed(1)

        def edited(inputs):
            trainer.use_vllm = False  # it is not installed
            rollout = generate(inputs)
            trainer.use_vllm = True
            size, width = rollout["completion_mask"].shape
            ratio = 0.5 + torch.rand(size, columns or width, generator=generator)
            return rollout | {"importance_sampling_ratio": ratio}

        trainer._generate_and_score_completions = edited

    return prepare


def own_logprobs(drift):
    """A sampler that is the initial model, moved by a drift."""
    model = drifted(tiny_model(), drift)

    def sampler(prompt, completion):
        ids = {"prompt_ids": torch.tensor([prompt]), "completion_ids": torch.tensor([completion])}
        ids |= {name.replace("ids", "mask"): torch.ones_like(value) for name, value in ids.items()}
        return logps(model, ids)[0].tolist()

    return sampler


LORA = LoraConfig(
    r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
)
# name: (settings, settings of the rollouts, what is done to the trainer, whether rows are dead)
OPTIONS = {
    "kl": ({"beta": 0.3}, {"truncated": 0.4}, None, False),
    "kl_of_grpo_loss": ({"beta": 0.3, "loss_type": "grpo", "use_bias_correction_kl": False}, {}, None, False),
    "kl_without_masked_rows": ({"beta": 0.3, "mask_truncated_completions": True}, {"truncated": 0.4}, None, True),
    "lora": ({"peft_config": LORA}, {}, None, True),
    "lora_and_kl": ({"peft_config": LORA, "beta": 0.3}, {}, None, False),
    "tool_mask": ({}, {"tools": True}, None, True),
    "tool_mask_and_kl": ({"beta": 0.3}, {"tools": True}, None, True),
    "truncated_rows_masked": ({"mask_truncated_completions": True}, {"truncated": 0.4, "dead": 0.0}, None, True),
    "advantages_per_token": ({}, {}, with_advantages_per_token, True),
    "vllm_correction_per_response": ({}, {}, with_vllm_correction(1), True),
    "vllm_correction_per_token": ({}, {}, with_vllm_correction(0), True),
    "off_policy_mask": ({"off_policy_mask_threshold": 0.02}, {}, None, True),
    "off_policy_mask_of_a_sampler": (
        {"off_policy_mask_threshold": 0.1},
        {"sampler": own_logprobs(0.1)},
        None,
        True,
    ),
    "delta": ({"delta": 1.4}, {}, None, True),
    "padded_to_a_multiple": ({"pad_to_multiple_of": 8}, {}, None, True),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, {}, None, True),
    # what depends on which rows share a micro-batch keeps TRL's, dead rows included
    "entropy_bonus": ({"entropy_coef": 0.1}, {}, None, False),
    "top_entropy": ({"top_entropy_quantile": 0.5}, {}, None, False),
    "bnpo": ({"loss_type": "bnpo"}, {}, None, False),
    "vespo": ({"loss_type": "vespo"}, {}, None, False),
    # these do not
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, {}, None, True),
    "sapo": ({"loss_type": "sapo"}, {}, None, True),
    "luspo": ({"loss_type": "luspo", **SEQUENCE}, {}, None, True),
    "gspo": ({"loss_type": "grpo", **SEQUENCE}, {}, None, True),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_gives_trl_s_updates(tmp_path, option):
    settings, rollouts, prepare, dead_rows = OPTIONS[option]
    model = None
    if settings.get("beta"):
        model = tiny_model()
        drifted(model, 0.05, seed=9).save_pretrained(tmp_path / "reference")  # TRL loads it from the policy's name
        model.config._name_or_path = str(tmp_path / "reference")
    reference, ours = trl_and_ours(tmp_path, settings, rollouts=rollouts, prepare=prepare, model=model)
    assert_same_updates(ours, reference)
    assert (total(ours, "update/rows_skipped") > 0) == dead_rows
    if "vllm" not in option:  # where the test's trainer does not score although it says that it uses vLLM
        assert reference.forwards - ours.forwards == total(ours, "update/forwards_saved")
    if settings.get("beta"):
        assert all(entry["kl"] > 0 for entry in reference.logs)
        # TRL averages over micro-batches, which differ
        single = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
        pair = trl_and_ours(tmp_path, settings | single, rollouts=rollouts, prepare=prepare, model=model)
        for mine, theirs in zip(pair[1].logs, pair[0].logs, strict=True):
            assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-5, abs=1e-7)


def test_packed_rows_are_as_wide_as_pad_to_multiple_of_asks(tmp_path):
    widths = []

    def prepare(trainer):
        def note(module, args, kwargs):
            if "position_ids" in kwargs:
                widths.append(kwargs["input_ids"].size(1))

        trainer._way_to_pack()
        trainer.model.register_forward_pre_hook(note, with_kwargs=True)

    train(tmp_path, prepare=prepare, pad_to_multiple_of=8)
    assert widths
    assert all(width % 8 == 0 for width in widths)


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_a_mixture_of_experts_gives_trl_s_updates(tmp_path, coefficient):
    """Without its auxiliary loss the rows are packed; with it they are only trimmed, since it is a mean over tokens."""
    config = Qwen3MoeConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    reference, ours = trl_and_ours(tmp_path, {"router_aux_loss_coef": coefficient}, model=model)
    assert_same_updates(ours, reference)
    assert (total(ours, "update/rows_skipped") > 0) == (coefficient == 0)
    for mine, theirs in zip(ours.logs, reference.logs, strict=True):
        assert ("aux_loss" in theirs) == (coefficient > 0)
        assert mine.get("aux_loss", 0) == pytest.approx(theirs.get("aux_loss", 0), rel=1e-5)


SLIDING = {
    "sliding_window": 4,
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def mistral():
    return MistralForCausalLM(MistralConfig(**SLIDING))


def gemma3():
    return Gemma3ForCausalLM(Gemma3TextConfig(**SLIDING))


@pytest.mark.parametrize("model", [mistral, gemma3])
def test_a_sliding_window_stays_in_its_response(tmp_path, model):
    """Much shorter than the responses."""
    torch.manual_seed(0)
    reference, ours = trl_and_ours(tmp_path, {}, model=model())
    assert ours.trainer._way_to_pack()
    assert_same_updates(ours, reference)


PROMPT_TUNING = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def test_virtual_tokens_before_prompts_of_one_length(tmp_path):
    """Prompt tuning takes no positions, so it cannot pack."""
    reference, ours = trl_and_ours(tmp_path, {}, peft_config=PROMPT_TUNING, rollouts={"prompt": 3})
    assert not ours.trainer._way_to_pack()
    assert_same_updates(ours, reference)


def test_virtual_tokens_before_padded_prompts(tmp_path):
    reference, ours = trl_and_ours(tmp_path, {}, peft_config=PROMPT_TUNING)
    assert_same_updates(ours, reference)


CLIP_MEANS = ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "clip_ratio/high_max"]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("settings", [TOKEN, SEQUENCE])
def test_clip_ratios_count_the_rows_that_were_left_out(tmp_path, settings, per_token):
    # one micro-batch an update, since TRL averages over micro-batches
    single = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 0.3}
    prepare = with_advantages_per_token if per_token else None
    reference, ours = trl_and_ours(tmp_path, settings | single, prepare=prepare)
    assert total(ours, "update/rows_skipped") > 0
    assert total(reference, "clip_ratio/low_mean") > 0
    assert total(reference, "clip_ratio/high_mean") > 0
    for mine, theirs in zip(ours.logs, reference.logs, strict=True):
        for name in CLIP_MEANS:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name


# Against this trainer with every switch off


@pytest.mark.parametrize("arm", ANCHORED)
def test_the_switches_change_no_gradient_of_the_anchored_arms(tmp_path, arm):
    config = {"arm": arm, "learning_rate": 0.3, "loss_type": None, "scale_rewards": None, "num_iterations": 2}
    off = train(tmp_path, **config, **TRL_UPDATE_PHASE)
    on = train(tmp_path, leader=off, **config)
    assert_same_updates(on, off)
    assert on.forwards == off.forwards - total(on, "update/forwards_saved") < off.forwards
    assert all(entry["update/rows_skipped"] == 0 for entry in off.logs)
    assert total(off, "update/forwards_saved") == 0
    # the weights were off-policy, so that something was at stake
    assert any(entry["trajectory_ratio/log_std"] > 0.05 for entry in off.logs)


@pytest.mark.parametrize("settings", [{"arm": "grpo"}, {"arm": "tic_grpo", "beta": 0.3}, {"loss_type": "grpo"}])
@pytest.mark.parametrize("switch", TRL_UPDATE_PHASE)
def test_each_switch_alone_changes_no_gradient(tmp_path, switch, settings):
    model = tiny_model()
    model.save_pretrained(tmp_path / "reference")
    model.config._name_or_path = str(tmp_path / "reference")
    settings = settings | {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 8,
    }
    off = train(tmp_path, model=model, **settings, **TRL_UPDATE_PHASE)
    on = train(tmp_path, model=model, leader=off, **settings, **TRL_UPDATE_PHASE | {switch: True})
    assert_same_updates(on, off)
    padded = off.logs[0]["update/real_token_share"]
    if switch == "padding_free":
        assert on.logs[0]["update/real_token_share"] > padded
        assert all(entry["update/rows_skipped"] == 0 for entry in on.logs)
        assert on.forwards < off.forwards  # TRL's micro-batches of one mini-batch share passes
    if switch == "skip_dead_rows":
        assert (total(on, "update/rows_skipped") > 0) == ("beta" not in settings)
    if switch == "skip_on_policy_logps":
        assert off.forwards - on.forwards == 2 * 4  # two rollouts, four micro-batches of the first update each
        assert all(entry["trajectory_ratio/inner_1/log_std"] == 0 for entry in on.logs[::2])


@pytest.mark.parametrize("arm", ["tic_grpo", "grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_micro_batch_is_only_a_matter_of_memory(tmp_path, arm, beta):
    """Eight passes of one row or one of eight: the same gradients and the same metrics."""
    model = tiny_model()
    drifted(model, 0.05, seed=9).save_pretrained(tmp_path / "reference")
    model.config._name_or_path = str(tmp_path / "reference")
    config = {"arm": arm, "beta": beta, "model": model, "learning_rate": 0.3, "rollouts": {"tools": True}}
    eight = train(
        tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1, steps_per_generation=4, **config
    )
    config |= {"gradient_accumulation_steps": 8, "steps_per_generation": 32, "leader": eight}
    one = train(tmp_path, per_device_train_batch_size=1, **config)
    assert_same_updates(one, eight)
    compared = set()
    for mine, theirs in zip(one.logs, eight.logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"step_time", "update/forwards_saved", "update/real_token_share"}:
            if theirs[name] is None:  # of no response at all
                assert mine[name] is None, name
                continue
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
            compared.add(name.split("/")[0])
    assert {"loss", "grad_norm", "entropy", "trajectory_ratio"} <= compared
    assert ("kl" in compared) == (beta > 0)
    assert ("clip_ratio" in compared) == (arm == "grpo")
    if arm == "grpo":
        assert total(eight, "clip_ratio/region_mean") > 0


def bloom():
    """Cannot pack: ALiBi takes distances over the row."""
    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            n_layer=2,
            n_head=2,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


@pytest.mark.parametrize("model", [bloom, tiny_model])
def test_a_model_that_cannot_pack_sees_trimmed_rows_of_like_length(tmp_path, model):
    shapes = []

    def prepare(trainer):
        if isinstance(trainer, TICGRPOTrainer):
            if model is tiny_model:
                trainer._way = ""
            assert not trainer._way_to_pack()

            def note(module, args, kwargs):
                shapes.append((kwargs["attention_mask"].shape, kwargs["attention_mask"].sum(1).tolist()))

            trainer.model.register_forward_pre_hook(note, with_kwargs=True)

    reference, ours = trl_and_ours(tmp_path, {}, model=model(), prepare=prepare)
    assert_same_updates(ours, reference)
    assert ours.forwards == len(shapes) < reference.forwards
    for (rows, width), lengths in shapes:
        assert rows <= 4
        assert lengths == sorted(lengths, reverse=True)
        assert width < max(lengths) + 5  # only the longest prompt and the longest response may be in different rows


# Metrics by hand


def live_rows(prompts, lengths, rewards, live):
    """The rows that count, padded, from the same ids as [`given_rollouts`]."""
    output = given_rollouts(prompts, lengths, rewards)[0]([""] * len(lengths), None)
    width = max(lengths)
    completions = [output["completion_ids"][i] + [0] * (width - lengths[i]) for i in live]
    masks = [[1] * lengths[i] + [0] * (width - lengths[i]) for i in live]
    ids = torch.tensor([output["prompt_ids"][i] for i in live])
    return {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": torch.tensor(completions),
        "completion_mask": torch.tensor(masks),
    }


# Four groups of two; the second and the last are dead. Live rows hold 8, 4, 5 and 3 tokens with their prompts of 2.
GIVEN = {"prompts": 2, "lengths": [6, 2, 5, 5, 3, 1, 7, 1], "rewards": [1, 0, 1, 1, 0, 0.5, 0, 0]}
LIVE = [0, 1, 4, 5]


def test_metrics_of_the_work_by_hand(tmp_path):
    config = {"num_generations": 2, "steps_per_generation": 2, "max_steps": 1, "learning_rate": 0.0}
    settings = config | {"rollouts": given_rollouts(**GIVEN)}
    reference = train(tmp_path, trl=True, **settings)
    for attention, share in (
        ("sdpa", 1.0),  # called for one response after the other, all in one row
        # A mask keeps them apart: 8+3 and 5+4 tokens in two rows of 11 slots, since rows of 8 would have to be three.
        ("eager", 20 / 22),
    ):
        result = train(tmp_path, model=tiny_model(attn_implementation=attention), **settings)
        (log,) = result.logs
        assert log["update/real_token_share"] == pytest.approx(share)
        assert log["update/rows_skipped"] == 4 / 8
        assert log["update/forwards_saved"] == 1
        assert (reference.forwards, result.forwards) == (2, 1)
    # Off-policy: the other mini-batch is scored in one pass, too
    config |= {"steps_per_generation": 4, "max_steps": 2}
    rollouts = given_rollouts(2, GIVEN["lengths"] * 2, GIVEN["rewards"] * 2)
    reference = train(tmp_path, trl=True, rollouts=rollouts, **config)
    result = train(tmp_path, rollouts=rollouts, **config)
    assert (reference.forwards, result.forwards) == (4 + 2 + 2, 1 + 1 + 1)
    assert [entry["update/forwards_saved"] for entry in result.logs] == [4 + 2 - 2, 2 - 1]
    # All off: everything that TRL computes, two rows of 2+7 tokens' width per row
    off = train(tmp_path, **settings, **TRL_UPDATE_PHASE)
    assert off.logs[0]["update/real_token_share"] == pytest.approx((30 + 16) / (8 * 9))
    assert off.logs[0]["update/forwards_saved"] == off.logs[0]["update/rows_skipped"] == 0


@pytest.mark.parametrize("rows", [1, 4])
def test_entropy_and_kl_are_means_over_the_tokens_of_the_rows_that_count(tmp_path, rows):
    model, reference = tiny_model(), drifted(tiny_model(), 0.1, seed=9)
    reference.save_pretrained(tmp_path / "reference")
    model.config._name_or_path = str(tmp_path / "reference")
    config = {
        "num_generations": 2,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 8 // rows,
        "steps_per_generation": 8 // rows,
        "max_steps": 1,
        "model": model,
        "rollouts": given_rollouts(**GIVEN),
    }
    inputs = live_rows(**GIVEN, live=LIVE)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = type(model).forward(model, input_ids=ids, attention_mask=attention).logits[:, 1:-1].detach()
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    mask = inputs["completion_mask"].bool()
    (log,) = train(tmp_path, **config).logs
    assert log["entropy"] == pytest.approx(entropy[mask].mean().item(), rel=1e-5)

    # With a KL term every row counts
    inputs = live_rows(**GIVEN, live=range(8))
    gap = (logps(reference, inputs) - logps(model, inputs)).detach()[inputs["completion_mask"].bool()]
    (log,) = train(tmp_path, beta=0.1, **config).logs
    assert log["kl"] == pytest.approx((gap.exp() - gap - 1).mean().item(), rel=1e-4)
    assert log["update/rows_skipped"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 1, "steps_per_generation": 4, "num_iterations": 2},
        # rows that share a mask round according to their neighbours
        {"skip_on_policy_logps": False, "model": tiny_model(attn_implementation="eager")},
    ],
)
def test_without_a_step_every_ratio_is_exactly_one(tmp_path, settings):
    """Scored in the very shapes that are trained on: no kernel may round differently."""
    settings = {"steps_per_generation": 8, "learning_rate": 0.0, "max_steps": 8} | settings
    logs = train(tmp_path, rollouts={"dead": 0.0}, **settings).logs
    updates = settings["steps_per_generation"] // settings.get("gradient_accumulation_steps", 2)
    assert {name for log in logs for name in log if name.endswith("/log_std")} == {
        "trajectory_ratio/log_std",
        *(f"trajectory_ratio/inner_{k + 1}/log_std" for k in range(updates * settings.get("num_iterations", 1))),
    }
    for log in logs:
        assert log["trajectory_ratio/log_std"] == 0.0
        assert log["trajectory_ratio/log_min"] == log["trajectory_ratio/log_max"] == 0.0


def test_one_mini_batch_used_twice_is_never_scored(tmp_path):
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 1}
    settings |= {"num_iterations": 2, "max_steps": 6, "learning_rate": 0.3}
    reference, ours = trl_and_ours(tmp_path, settings, rollouts={"dead": 0.0})
    assert_same_updates(ours, reference)
    assert (reference.forwards, ours.forwards) == (6 + 3, 6)
    # the ratios of the second time are those against the first
    assert all(log["trajectory_ratio/log_std"] == 0 for log in ours.logs[::2])
    assert all(log["trajectory_ratio/log_std"] > 0.01 for log in ours.logs[1::2])


# The sampler as behaviour policy


SAMPLER = {"num_generations": 2, "behaviour_policy": "sampler", "learning_rate": 0.0}


def expected_log_ratios(sampler):
    """R of the live rows of GIVEN, own minus the sampler's, from plain logits."""
    inputs = live_rows(**GIVEN, live=LIVE)
    own = (logps(tiny_model(), inputs) * inputs["completion_mask"]).sum(1).tolist()
    output = given_rollouts(**GIVEN)[0]([""] * 8, None)
    sampled = [sum(sampler(output["prompt_ids"][i], output["completion_ids"][i])) for i in LIVE]
    return [mine - theirs for mine, theirs in zip(own, sampled, strict=True)]


def assert_ratios(log, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    assert log["trajectory_ratio/log_min"] == pytest.approx(expected.min().item(), abs=1e-5)
    assert log["trajectory_ratio/log_max"] == pytest.approx(expected.max().item(), abs=1e-5)
    assert log["trajectory_ratio/log_mean"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert log["trajectory_ratio/log_std"] == pytest.approx(expected.std(correction=0).item(), abs=1e-5)


@pytest.mark.parametrize("switches", [{}, TRL_UPDATE_PHASE | {"skip_dead_rows": True}])
def test_ratios_to_the_sampler(tmp_path, switches):
    sampler = own_logprobs(0.1)
    rollouts = given_rollouts(**GIVEN, sampler=sampler)
    result = train(tmp_path, steps_per_generation=2, max_steps=1, rollouts=rollouts, **SAMPLER, **switches)
    expected = expected_log_ratios(sampler)
    assert max(expected) - min(expected) > 0.1
    assert_ratios(result.logs[0], expected)
    assert result.logs[0]["sampling/rows_without_logps"] == 0
    assert result.forwards == (2 if switches else 1)  # nothing is scored

    # One mini-batch after the other: the second one's ratios are to the sampler, too, and still nothing is scored
    config = {"steps_per_generation": 4, "max_steps": 2, "partition_by_prompt": False}
    rollouts = given_rollouts(2, GIVEN["lengths"] * 2, GIVEN["rewards"] * 2, sampler=sampler)
    result = train(tmp_path, rollouts=rollouts, **config, **SAMPLER, **switches)
    assert all(log["trajectory_ratio/log_std"] > 0.01 for log in result.logs)
    assert result.forwards == (4 if switches else 2)


def test_the_sampler_s_ratio_is_in_the_gradient(tmp_path):
    """At A·w·∇log P with the trajectory weight, all from plain logits; the cap does not act."""
    sampler = own_logprobs(0.1)
    rollouts = given_rollouts(**GIVEN, sampler=sampler)
    config = SAMPLER | {"steps_per_generation": 2, "max_steps": 1, "loss_type": "dr_grpo", "epsilon_high": 1e3}
    result = train(tmp_path, rollouts=rollouts, **config)
    model, inputs = tiny_model(), live_rows(**GIVEN, live=LIVE)
    ratio = torch.tensor(expected_log_ratios(sampler)).exp()
    advantages = torch.tensor([0.5, -0.5, -0.25, 0.25])
    log_p = (logps(model, inputs) * inputs["completion_mask"]).sum(1)
    (-(ratio * advantages * log_p).sum() / (8 * SETTINGS["max_completion_length"])).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (result.gradients[0] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("switches", [{}, TRL_UPDATE_PHASE | {"skip_dead_rows": True}])
def test_a_row_that_the_sampler_left_a_token_out_of_has_ratio_one(tmp_path, switches):
    whole = own_logprobs(0.1)

    def sampler(prompt, completion):
        values = whole(prompt, completion)
        return [None, *values[1:]] if len(completion) == 3 else values  # the third live row

    rollouts = given_rollouts(**GIVEN, sampler=sampler)
    result = train(tmp_path, steps_per_generation=2, max_steps=1, rollouts=rollouts, **SAMPLER, **switches)
    expected = expected_log_ratios(whole)
    expected[2] = 0.0
    assert_ratios(result.logs[0], expected)
    assert result.logs[0]["sampling/rows_without_logps"] == 1 / 8
    assert result.forwards == (1 + 1 if not switches else 2 + 2)  # without padding that row alone is scored
    assert result.gradients[0].isfinite().all()


def test_a_sampler_without_log_probabilities_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"behaviour_policy='sampler', but the rollout has no log-probabilities"):
        train(tmp_path, **SAMPLER)
    with pytest.raises(ValueError, match=r"behaviour_policy='sampler' needs .* set use_vllm=True"):
        build(tmp_path, (None, random_rollouts()[1]), **SAMPLER)
    with pytest.raises(ValueError, match=r"vllm_importance_sampling_correction=True would correct for once more"):
        build(tmp_path, random_rollouts(), vllm_importance_sampling_correction=True, **SAMPLER)
    assert TICGRPOConfig(str(tmp_path), **CPU).vllm_importance_sampling_correction is True
    assert TICGRPOConfig(str(tmp_path), **CPU, behaviour_policy="sampler").vllm_importance_sampling_correction is False


# Evaluation


@pytest.mark.parametrize("settings", [{"arm": "grpo"}, {"arm": "tic_grpo", "beta": 0.3}])
def test_evaluation_is_the_same_with_and_without_padding(tmp_path, settings):
    model = tiny_model()
    drifted(model, 0.05, seed=9).save_pretrained(tmp_path / "reference")
    model.config._name_or_path = str(tmp_path / "reference")

    def evaluated(**switches):
        trainer = build(tmp_path, random_rollouts(dead=0.2), model=model, **settings, **switches)
        forwards = count_forwards(trainer)
        return trainer.evaluate() | trainer.state.log_history[-1], forwards[0]

    on, passes = evaluated()
    off, trl_passes = evaluated(**TRL_UPDATE_PHASE)
    assert on["eval_loss"] != 0
    assert on.keys() == off.keys()
    compared = [name for name in on if not any(part in name for part in ("time", "runtime", "per_second"))]
    assert {"eval_loss", "eval_entropy"} <= set(compared)
    for name in compared:
        assert on[name] == pytest.approx(off[name], rel=1e-5, abs=1e-6), name
    assert passes < trl_passes  # nothing off-policy is evaluated, so nothing is scored


def test_evaluation_between_updates_changes_nothing_about_them(tmp_path):
    alone = train(tmp_path)
    between = train(tmp_path, eval_strategy="steps", eval_steps=1)
    assert_same_updates(between, alone)
    for mine, theirs in zip(between.logs, alone.logs, strict=True):
        for name in mine:
            if name != "step_time":
                assert mine[name] == theirs[name], name


# Images


def vision_model():
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 12,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=8,
        video_token_id=9,
        vision_start_token_id=10,
        vision_end_token_id=11,
    )
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config)


def vision_rollout():
    """Eight responses to prompts with an image of one or two tokens, padded to the left; half of them dead."""
    generator = torch.Generator().manual_seed(2)
    images = [1 + i % 2 for i in range(8)]  # tokens
    prompts = [[1, 10, *[8] * n, 11, 2] for n in images]
    prompt_ids = torch.tensor([[0] * (6 - len(p)) + p for p in prompts])
    lengths = torch.tensor([5, 1, 3, 2, 4, 4, 1, 2]).unsqueeze(1)
    completion_mask = (torch.arange(6) < lengths).long()  # one column more than is used
    completion_ids = torch.randint(1, 8, (8, 6), generator=generator) * completion_mask
    kinds = torch.cat([(prompt_ids == 8).long(), torch.zeros(8, 6, dtype=torch.long)], dim=1)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": (prompt_ids > 0).long(),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([0.5, 0.0, -0.5, 0.0, 0.0, 1.0, 0.0, -1.0]),
        "num_items_in_batch": completion_mask.sum(),
        "old_per_token_logps": torch.full((8, 6), -math.log(12)),
        "pixel_values": torch.randn(4 * sum(images), 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 2 * n] for n in images]),
        "num_images": [1] * 8,
        "mm_token_type_ids": kinds,
    }


def test_rollouts_with_images_stay_in_trl_s_micro_batches(tmp_path):
    seen = {True: [], False: []}

    def prepare(trainer):
        trainer._generate_and_score_completions = lambda inputs: vision_rollout()
        compute_loss = trainer._compute_loss

        def noted(model, inputs):
            seen[isinstance(trainer, TICGRPOTrainer)].append(inputs)
            return compute_loss(model, inputs)

        trainer._compute_loss = noted

    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 2}
    reference, ours = trl_and_ours(tmp_path, settings, model=vision_model(), prepare=prepare)
    assert_same_updates(ours, reference)
    assert ours.forwards == reference.forwards == 2
    assert all(log["update/rows_skipped"] == 0 for log in ours.logs)
    for mine, theirs in zip(seen[True], seen[False], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(mine[name], value) if torch.is_tensor(value) else mine[name] == value, name
        assert mine["completion_ids"].shape == (4, 6)
