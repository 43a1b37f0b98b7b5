"""Updates against TRL's: whatever is left out of one, its gradients stay the same."""

import random
from types import SimpleNamespace

import pytest
import torch
import zoo
from conftest import WORDS, drifted, tiny_model, tiny_moe_model
from peft import LoraConfig, PromptTuningConfig
from rollouts import (
    SEQUENCE,
    TOKEN,
    assert_same_updates,
    build,
    own_logprobs,
    random_rollouts,
    total,
    train,
    trl_and_ours,
    with_advantages_per_token,
    with_reference,
    with_vllm_correction,
)
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")


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
        "zero_advantage": generator.choice([0.0, 0.6] if rows * steps > 12 else [0.0, 0.3]),
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
    assert_same_updates(*reversed(trl_and_ours(tmp_path, {}, rollouts={"longest": 1, "truncated": 0.5})))


def test_an_epoch_that_ends_in_the_middle_of_an_update(tmp_path):
    """Three rollouts of one micro-batch each, two to an update: every other update has one."""
    settings = {"steps_per_generation": 1, "max_steps": 5}
    reference, ours = trl_and_ours(tmp_path, settings, prompts=3, rollouts={"zero_advantage": 0.3})
    assert_same_updates(ours, reference)
    assert reference.forwards - ours.forwards == total(ours, "update/forwards_saved")


def test_skipped_rows_of_an_update_that_an_epoch_ends(tmp_path):
    config = {"steps_per_generation": 1, "max_steps": 4, "prompts": 3, "rollouts": {"zero_advantage": 1.0}}
    assert [entry["update/responses_skipped"] for entry in train(tmp_path, **config).logs] == [1.0] * 4


@pytest.mark.parametrize("loss_type", LOSSES)
def test_nothing_but_dead_rows(tmp_path, loss_type):
    """Every update still makes the one pass that synchronises, and its gradient is exactly 0."""
    settings = {"loss_type": loss_type, "learning_rate": 1.0}
    reference, ours = trl_and_ours(tmp_path, settings, rollouts={"zero_advantage": 1.0})
    for result in (reference, ours):
        assert len(result.gradients) == 4
        assert not any(gradient.any() for gradient in result.gradients)
        assert [entry["loss"] for entry in result.logs] == [0.0] * 4
    if loss_type != "bnpo":
        assert [entry["update/responses_skipped"] for entry in ours.logs] == [1.0] * 4
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
    assert pair[1].trainer.packed_forward.choose_layout() == "segments"
    assert pair[1].gradients[0].dtype == torch.float64
    assert_same_updates(*reversed(pair), gradient=1e-12, loss=1e-7)  # the logged loss is float32


LORA = LoraConfig(
    r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
)
# name: (settings, settings of the rollouts, what is done to the trainer, whether some have zero advantage)
OPTIONS = {
    "kl": ({"beta": 0.3}, {"truncated": 0.4}, None, False),
    "kl_of_grpo_loss": ({"beta": 0.3, "loss_type": "grpo", "use_bias_correction_kl": False}, {}, None, False),
    "kl_without_masked_rows": ({"beta": 0.3, "mask_truncated_completions": True}, {"truncated": 0.4}, None, True),
    "lora": ({"peft_config": LORA}, {}, None, True),
    "lora_and_kl": ({"peft_config": LORA, "beta": 0.3}, {}, None, False),
    "tool_mask": ({}, {"tools": True}, None, True),
    "tool_mask_and_kl": ({"beta": 0.3}, {"tools": True}, None, True),
    "truncated_rows_masked": (
        {"mask_truncated_completions": True},
        {"truncated": 0.4, "zero_advantage": 0.0},
        None,
        True,
    ),
    "advantages_per_token": ({}, {}, with_advantages_per_token, True),
    "vllm_sequence_mask": ({}, {"sampler": own_logprobs(0.1)}, with_vllm_correction("sequence_mask", 0.8, 1.2), True),
    "vllm_sequence_truncate": ({}, {"sampler": own_logprobs(0.1)}, with_vllm_correction("sequence_truncate"), True),
    "vllm_token_mask": ({}, {"sampler": own_logprobs(0.1)}, with_vllm_correction("token_mask", high=1.1), True),
    "vllm_token_truncate": (
        {"beta": 0.3},
        {"sampler": own_logprobs(0.1)},
        with_vllm_correction("token_truncate", 0.9, 1.1),
        False,
    ),
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
    # what depends on which rows share a micro-batch keeps TRL's, zero-advantage responses included
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
    settings, rollouts, prepare, zero_advantage = OPTIONS[option]
    model = None
    if settings.get("beta"):
        model = tiny_model()
        drifted(model, 0.05, seed=9).save_pretrained(tmp_path / "reference")  # TRL loads it from the policy's name
        model.config._name_or_path = str(tmp_path / "reference")
    reference, ours = trl_and_ours(tmp_path, settings, rollouts=rollouts, prepare=prepare, model=model)
    assert_same_updates(ours, reference)
    assert (total(ours, "update/responses_skipped") > 0) == zero_advantage
    assert reference.forwards - ours.forwards == total(ours, "update/forwards_saved")
    if "vllm" in option:
        assert "sampling/importance_sampling_ratio/mean" in ours.logs[0]
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

        assert trainer.packed_forward.choose_layout() == "segments"
        trainer.model.register_forward_pre_hook(note, with_kwargs=True)

    train(tmp_path, prepare=prepare, pad_to_multiple_of=8)
    assert widths
    assert all(width % 8 == 0 for width in widths)


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_a_mixture_of_experts_gives_trl_s_updates(tmp_path, coefficient):
    """Without its auxiliary loss the rows are packed; with it they are only trimmed, since it is a mean over tokens."""
    reference, ours = trl_and_ours(tmp_path, {"router_aux_loss_coef": coefficient}, model=tiny_moe_model())
    assert_same_updates(ours, reference)
    assert (total(ours, "update/responses_skipped") > 0) == (coefficient == 0)
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
    assert ours.trainer.packed_forward.choose_layout() == "segments"
    assert_same_updates(ours, reference)


ROPE = {
    "rope_theta": 10000.0,
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 12,
}
LONGEST = {"prompt": 3, "longest": 20, "zero_advantage": 0.25}


def rope_model(rope_type):
    """Whose original length is crossed by the longest responses alone."""
    rope = ROPE if rope_type == "longrope" else {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
    return tiny_model(rope_parameters=rope, max_position_embeddings=48 if rope_type == "longrope" else 12)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_frequencies_that_follow_the_longest_position(tmp_path, messages, rope_type, beta):
    """Each response's log-probabilities depend on what else is in its pass, so only TRL's own passes give TRL's."""
    prepare = with_reference if beta else None
    reference, ours = trl_and_ours(
        tmp_path, {"beta": 0.0}, model=rope_model(rope_type), rollouts=LONGEST, prepare=prepare
    )
    assert ours.trainer.packed_forward.choose_layout() == "padded"
    assert_same_updates(ours, reference)
    (warning,) = [text for text in messages() if "padding_free" in text]
    assert f"has no effect: with rope_type='{rope_type}'" in warning
    assert "costs as much as if every response were as long as the longest of the rollout" in warning


def openai_gpt():
    return zoo.tiny_model("openai-gpt", "eager")


def hunyuan():
    return zoo.tiny_model("hunyuan_v1_moe")


# frequencies of the kind "dynamic" also follow the longest pass before, so `rope_model` keeps TRL's passes
@pytest.mark.parametrize(
    ("model", "layout"),
    [(openai_gpt, "sorted"), (openai_gpt, None), (hunyuan, "sorted"), (hunyuan, None), (rope_model, None)],
)
def test_equal_weights_have_no_divergence(tmp_path, model, layout):
    """The reference is scored on the very micro-batches that train, where padding stands as it does there."""
    model = model("dynamic") if model is rope_model else model()

    def prepare(trainer):
        trainer.packed_forward.layout = layout or ""
        with_reference(trainer)

    settings = {"learning_rate": 0.0, "skip_on_policy_logps": False, "steps_per_generation": 8, "max_steps": 8}
    still = train(tmp_path, model=model, prepare=prepare, rollouts={"longest": 20, "zero_advantage": 0.0}, **settings)
    for log in still.logs:
        assert log["kl"] == 0.0
        assert max(abs(log["trajectory_ratio/log_min"]), abs(log["trajectory_ratio/log_max"])) < 1e-5


def test_dropout_does_not_hide_that_a_model_packs(tmp_path, messages):
    """Two passes of the start test would differ by what they drop."""
    model = tiny_model(attention_dropout=0.3)
    trainer = build(tmp_path, random_rollouts(), model=model, algorithm="grpo", disable_dropout=False)
    trainer.model.train()
    state = torch.get_rng_state()
    assert trainer.packed_forward.choose_layout() == "segments"
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not [text for text in messages() if "padding_free:" in text and "packed" not in text]


def test_a_head_that_trl_gets_wrong(tmp_path, messages):
    """TRL's head takes the hidden states as they are; RoBERTa's own has a layer before it."""
    assert (
        build(tmp_path, random_rollouts(), model=zoo.tiny_model("roberta")).packed_forward.choose_layout() == "sorted"
    )
    (warning,) = [text for text in messages() if "TRL's fused head" in text]
    assert "skips a step of this model" in warning
    assert (
        build(tmp_path, random_rollouts(), model=zoo.tiny_model("gemma3_text")).packed_forward.choose_layout()
        == "segments"
    )
    assert len([text for text in messages() if "TRL's fused head" in text]) == 1


PROMPT_TUNING = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def test_virtual_tokens_before_prompts_of_one_length(tmp_path):
    """Prompt tuning takes no positions, so it cannot pack."""
    reference, ours = trl_and_ours(tmp_path, {}, peft_config=PROMPT_TUNING, rollouts={"prompt": 3})
    assert ours.trainer.packed_forward.choose_layout() == "padded"
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
    assert total(ours, "update/responses_skipped") > 0
    assert total(reference, "clip_ratio/low_mean") > 0
    assert total(reference, "clip_ratio/high_mean") > 0
    for mine, theirs in zip(ours.logs, reference.logs, strict=True):
        for name in CLIP_MEANS:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
