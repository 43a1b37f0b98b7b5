"""transformers' own generation in segments: recorded log-probabilities are those of the weights that sampled."""

import math

import pytest
import torch
from carrying import generate, logps_by_version, talkative_model
from conftest import drifted, make_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig

from tic_grpo_trl.carry_over.transformers_engine import Recorder, truncation


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

LONGEST, SEGMENT = 48, 8
SETTINGS = {
    "max_completion_length": LONGEST,
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "max_carry_over": 2,
    "max_steps": 100,
}
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def plain_copy(trainer):
    """A model of its own with the weights of a trainer's, and its adapter merged."""
    with torch.random.fork_rng():
        model = talkative_model()
    if isinstance(trainer.model, PeftModel):
        model = get_peft_model(model, LORA)
    model.load_state_dict(trainer.model.state_dict())
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def carried(tmp_path, calls=6, drift=0.3, model=None, **config):
    """Rollouts of a model whose weights change before every call, and the models with the weights of each call."""
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, talkative_model() if model is None else model, **SETTINGS | config)
    rollouts, versions = [], []
    for call in range(calls):
        moved = dict(drifted(trainer.model, drift, seed=call).named_parameters())
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(moved[name])
        versions.append(plain_copy(trainer))
        rollouts.append(generate(trainer))
    return trainer, rollouts, versions


def errors(rollouts, versions, temperature=1.0, shift=0):
    """Of every token: against the weights of its version, or those `shift` calls later."""
    found = []
    for call, rollout in enumerate(rollouts):
        version = (call - rollout["token_age"] + shift).clamp(max=call)
        of_versions = logps_by_version(versions, rollout, lambda logits: logits / temperature)
        own = of_versions.gather(0, version.unsqueeze(0)).squeeze(0)
        found.append((own - rollout["sampling_per_token_logps"])[rollout["completion_mask"].bool()].abs())
    return torch.cat(found)


def versions_of(rollout):
    """How many versions wrote each response; (n,)."""
    pairs = zip(rollout["token_age"], rollout["completion_mask"].bool(), strict=True)
    return torch.tensor([age[mask].unique().numel() for age, mask in pairs])


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "lora": {"peft_config": LORA, "drift": 1.0},
    "temperature of generate": {"generation_kwargs": {"temperature": 0.7}},
    "no cache": {"generation_kwargs": {"use_cache": False}},
    "bf16": {"bf16": True},
}


def test_the_model_s_own_sampling_options_are_not_used(tmp_path):
    model = talkative_model()
    model.generation_config.min_p, model.generation_config.typical_p = 0.5, 0.5
    trainer, rollouts, versions = carried(tmp_path, model=model)
    assert errors(rollouts, versions).max() < 1e-4
    improbable = torch.cat([each["sampling_per_token_logps"].flatten() for each in rollouts]) < math.log(1 / 12)
    assert improbable.any()  # with six tokens the likeliest has more than 1/6, so min_p would leave these out
    assert trainer.model.generation_config.min_p == 0.5  # as it was


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_version_that_sampled(tmp_path, case):
    config = CASES[case]
    _, rollouts, versions = carried(tmp_path, **config)
    ages = torch.cat([r["token_age"][r["completion_mask"].bool()] for r in rollouts])
    assert {0, 1, 2} <= set(ages.tolist())
    assert max(versions_of(rollout).max() for rollout in rollouts) >= 3  # a response of three versions
    assert len({int(row.sum()) for r in rollouts for row in r["prompt_mask"]}) > 1  # padded on the left
    temperature = (config | config.get("generation_kwargs", {})).get("temperature", 1.0)
    found = errors(rollouts, versions, temperature)
    print(f"{case}: largest error {found.max():.1e} of {len(found)} tokens, {int((ages > 0).sum())} carried over")
    assert found.max() < (0.2 if case == "bf16" else 1e-4)
    assert found.mean() < (0.01 if case == "bf16" else 1e-5)
    for wrong in (1, 2):  # the next version, and the last one
        mixed_up = errors(rollouts, versions, temperature, shift=wrong)
        assert mixed_up.max() > 0.5
        assert mixed_up[ages > 0].mean() > 0.05
    if temperature != 1:
        assert errors(rollouts, versions).mean() > 0.05


def test_responses_end_at_an_end_token_or_at_the_longest_length(tmp_path):
    """Also where a segment ends, and every response has its log-probabilities and nothing beyond its end."""
    _, rollouts, _ = carried(tmp_path, calls=10)
    at_end_of_segment = at_limit = 0
    for rollout in rollouts:
        lengths = rollout["completion_mask"].sum(1)
        for ids, logps, age, length in zip(
            rollout["completion_ids"].tolist(),
            rollout["sampling_per_token_logps"],
            rollout["token_age"],
            lengths.tolist(),
            strict=True,
        ):
            assert 0 not in ids[: length - 1]
            assert ids[length - 1] == 0 or length == LONGEST
            assert (logps[:length] < 0).all()
            assert not age[length:].any()
            assert age.tolist()[:length] == sorted(age.tolist()[:length], reverse=True)
            ends = ids[length - 1] == 0
            at_end_of_segment += ends and length % SEGMENT == 0 and length < LONGEST
            at_limit += length == LONGEST and not ends
    print(f"ends: {at_end_of_segment} at a segment's end, {at_limit} at the limit")
    assert at_end_of_segment > 0
    assert at_limit > 0


def no_end_token(logits):
    logits[..., 0] = -torch.inf
    return logits


def test_fewest_tokens_hold_over_segments(tmp_path):
    """Until then nothing may end, and what is recorded is what was sampled from: the policy without its end token."""
    fewest = 12
    _, rollouts, versions = carried(tmp_path, generation_kwargs={"min_new_tokens": fewest})
    lengths = torch.cat([rollout["completion_mask"].sum(1) for rollout in rollouts])
    assert lengths.min() == fewest + 1  # the end token is one more
    assert lengths.max() == LONGEST
    carried_over = 0
    for call, rollout in enumerate(rollouts):
        mask = rollout["completion_mask"].bool()
        version = (call - rollout["token_age"]).unsqueeze(0)
        own, without_ends = (
            logps_by_version(versions, rollout, process).gather(0, version).squeeze(0)
            for process in (lambda logits: logits, no_end_token)
        )
        recorded = rollout["sampling_per_token_logps"]
        assert (recorded - without_ends)[:, :fewest].abs().max() < 1e-4
        assert (recorded - own)[:, :fewest].mean() > 0.01  # the other tokens were given the end token's share
        later = (recorded - own)[:, fewest:][mask[:, fewest:]]
        assert later.abs().max() < 1e-4
        carried_over += int((rollout["token_age"] > 0).sum())
    assert carried_over > 100


def truncated(logits):
    """The case of this name by hand: log-probabilities among the tokens that are left."""
    probabilities = logits.softmax(-1)
    fourth = probabilities.sort(descending=True).values[..., 3:4]
    probabilities = torch.where(probabilities < fourth, 0, probabilities)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    more_probable = (probabilities.unsqueeze(-1) < probabilities.unsqueeze(-2)) * probabilities.unsqueeze(-2)
    probabilities = torch.where(more_probable.sum(-1) >= 0.8, 0, probabilities)
    probabilities = torch.where(probabilities < 0.05 * probabilities.max(-1, keepdim=True).values, 0, probabilities)
    return probabilities.log()


# Without carry-over: the same responses as TRL's, with log-probabilities

WAITING = {"max_carry_over": 0, "per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 0.0}
WAITING |= {"max_completion_length": 24, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
SAMPLING = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "padded": {"pad_to_multiple_of": 8},
    "fewest": {"generation_kwargs": {"min_new_tokens": 24}},
    "truncated": {"top_p": 0.8, "top_k": 4, "min_p": 0.05},
    "lora": {"peft_config": LORA},
    "bf16": {"bf16": True},
    "end tokens": {"generation_kwargs": {"eos_token_id": 0}},
}
EXACT = ("plain", "temperature", "padded", "lora", "end tokens")


def waited(tmp_path, policy, **config):
    """Three rollouts and an evaluation of the same weights."""
    torch.manual_seed(0)  # for a new adapter
    trainer = make_trainer(tmp_path / policy, talkative_model(), behaviour_policy=policy, **WAITING | config)
    rollouts = []
    generate_and_score = trainer._generate_and_score_completions

    def noted(inputs):
        rollouts.append(generate_and_score(inputs))
        return rollouts[-1]

    trainer._generate_and_score_completions = noted
    trainer.train()
    return trainer, rollouts, trainer.evaluate()


@pytest.mark.parametrize("case", SAMPLING)
def test_recording_changes_nothing(tmp_path, case):
    """Token for token what behaviour_policy='trainer' generates, also in an evaluation."""
    config = SAMPLING[case]
    trainer, recorded, evaluated = waited(tmp_path, "sampler", **config)
    _, plain, expected = waited(tmp_path, "trainer", **config)
    assert len(recorded) == len(plain) == 3 + 2
    for mine, theirs in zip(recorded, plain, strict=True):
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
            assert torch.equal(mine[name], theirs[name]), name
    for name in ("eval_reward", "eval_completions/mean_length", "eval_completions/clipped_ratio"):
        assert evaluated[name] == expected[name]

    process = {
        "temperature": lambda logits: logits / 0.7,
        "truncated": truncated,
        "fewest": no_end_token,
    }.get(case, lambda logits: logits)
    for rollout in recorded[:3]:
        (own,) = logps_by_version([plain_copy(trainer)], rollout, process)
        difference = (rollout["sampling_per_token_logps"] - own)[rollout["completion_mask"].bool()].abs()
        assert difference.max() < (0.2 if case == "bf16" else 1e-5)
    if case in EXACT:  # the sampler is the policy
        assert evaluated["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
        for rollout in recorded:
            difference = rollout["sampling_per_token_logps"] - trainer.packed_forward.score(rollout).logps
            assert difference[rollout["completion_mask"].bool()].abs().max() < 1e-5


def test_segments_are_padded_as_asked(tmp_path):
    """What a segment continues is as wide as TRL makes prompts."""
    torch.manual_seed(0)
    trainer, widths = make_trainer(tmp_path, talkative_model(), pad_to_multiple_of=8, **SETTINGS), []
    trainer.model.train()
    trainer.state.max_steps = 100
    trainer.model.register_forward_pre_hook(
        lambda module, inputs, kwargs: widths.append(kwargs["input_ids"].size(1)), with_kwargs=True
    )
    trainer.carry_over.collect(trainer._metrics["train"])
    prefilled = [width for width in widths if width > 1]  # a step later on has one token
    assert len(prefilled) > 1
    assert not any(width % 8 for width in prefilled)


@pytest.mark.parametrize("undone", [0, 1])
def test_a_step_that_transformers_undoes_leaves_nothing_behind(undone):
    """On some devices it notices one step late that all responses have ended."""
    scores = torch.randn(5 + undone, 3, 6)  # of every step
    recorder = Recorder(0.5, [0], torch.zeros(3), truncation(GenerationConfig()))
    sequences = torch.zeros(3, 2, dtype=torch.long)  # prompts
    for step in range(5 + undone):
        recorder(sequences, scores[step])
        sequences = torch.cat([sequences, torch.randint(6, (3, 1))], dim=1)
    sampled = sequences[:, 2:7]
    expected = (scores[:5] / 0.5).log_softmax(-1).transpose(0, 1).gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(recorder.logps(sampled), expected)


def test_other_end_tokens_end_a_response(tmp_path):
    """Those that the generation options name; what transformers writes after them is no part of it."""
    _, rollouts, versions = carried(tmp_path, calls=4, generation_kwargs={"eos_token_id": [0, 3]})
    ended = 0
    for rollout in rollouts:
        for ids, length in zip(
            rollout["completion_ids"].tolist(), rollout["completion_mask"].sum(1).tolist(), strict=True
        ):
            assert not {0, 3} & set(ids[: length - 1])
            ended += ids[length - 1] == 3
    assert ended > 10
    assert errors(rollouts, versions).max() < 1e-4


def test_a_length_without_limit_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^behaviour_policy='sampler' needs max_completion_length, which is None: set "
    ):
        make_trainer(tmp_path, behaviour_policy="sampler", max_completion_length=None, loss_type="dapo")
