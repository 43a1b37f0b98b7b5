"""The trainer with a real vLLM engine in its own process: what the ratios, gradients and warnings are made of is
computed again from plain logits. Needs the environment of `make test-vllm`."""

import math

import pytest
import torch
from conftest import logps
from transformers import AutoTokenizer
from workers.vllm_records import (
    LONGEST,
    MINI_BATCH,
    Record,
    assert_logged,
    assert_old_weights_noticed,
    assert_ratios_of_the_weights,
    assert_weights_arrived,
    largest_gradient_error,
    log_ratios,
    mismatch,
    own_logps,
    policy,
    real_rows,
    run,
    sampler_logps,
)

from tic_grpo_trl.starter import STARTER_MODEL


pytestmark = pytest.mark.vllm

FLOAT32 = ["synced", "stale", "stale, truncated", "stale, tokens", "lora", "sampler"]
BFLOAT16 = ["trainer", "sampler"]


@pytest.fixture(scope="module")
def float32(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float32")
    run(folder, "vllm_colocate.py", "float32", *FLOAT32)
    return {name: Record(folder / f"{name}.pt") for name in FLOAT32}


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat16")
    run(folder, "vllm_colocate.py", "bfloat16", *BFLOAT16)
    return {name: Record(folder / f"{name}.pt") for name in BFLOAT16}


def of_stale_rollout(record, step):
    """The rows of a mini-batch, their sampler ratios per token (log) and R."""
    batch = real_rows(record.batches[step])
    old = own_logps(record.rollout_of(step)["weights"], batch)
    return batch, old - sampler_logps(batch), log_ratios(record, step)


def test_the_engine_answers_as_the_starter_does(float32):
    record = float32["synced"]
    assert 0.15 < record.metric("reward")[0] < 0.5
    rollout = record.rollouts[0]
    tokenizer = AutoTokenizer.from_pretrained(STARTER_MODEL)
    texts = tokenizer.batch_decode(rollout["completion_ids"])
    assert len(texts) == 4 * MINI_BATCH
    assert sum("\\boxed{" in text for text in texts) > 0.9 * len(texts)
    assert (sampler_logps(rollout) <= 0).all()
    assert (sampler_logps(rollout) < -0.01).any()


@pytest.mark.parametrize("name", ["synced", "lora"])
def test_weights_reach_the_engine_after_they_moved(float32, name):
    record = float32[name]
    assert len(record.rollouts) == 3
    assert_weights_arrived(record)
    for batch in record.batches:  # scored as they are trained on
        difference = batch["old_per_token_logps"] - sampler_logps(batch)
        assert difference[batch["completion_mask"] > 0].abs().max() <= 1e-4


def test_an_engine_with_old_weights_is_noticed(float32):
    record = float32["stale"]
    assert_old_weights_noticed(record)
    assert len(record.metric("sampling/mean_ratio")) == len(record.logs)
    for step, log in enumerate(record.logs):
        batch, log_sampler_ratio, _ = of_stale_rollout(record, step)
        expected = math.exp(log_sampler_ratio.sum() / batch["completion_mask"].sum())
        assert log["sampling/mean_ratio"] == pytest.approx(expected, abs=1e-4)


def test_an_engine_with_the_policy_s_weights_raises_no_alarm(float32):
    for name in ("synced", "lora", "sampler"):
        assert all(ratio == pytest.approx(1, abs=1e-4) for ratio in float32[name].metric("sampling/mean_ratio"))
        assert float32[name].metric("sampling/mean_ratio")
        assert not float32[name].stale_warnings


@pytest.mark.parametrize("name", ["synced", "lora"])
def test_logged_ratios_are_those_of_the_weights(float32, name):
    assert_ratios_of_the_weights(float32[name])


def test_the_adapter_leaves_the_base_weights_as_they_were(float32):
    """Every sync merges it into them and takes it out again."""
    before, after = float32["lora"].frozen
    assert before
    for name, weights in before.items():
        assert (after[name] - weights).abs().max() <= 1e-6, name


def test_ratios_to_the_engine(float32):
    record = float32["sampler"]
    assert record.forwards == {"scored": 0, "trained": 8}
    assert all(log["update/forwards_saved"] == 4 for log in record.logs[::4])
    assert record.metric("sampling/responses_without_logps") == [0, 0]
    for step, log in enumerate(record.logs):
        batch = real_rows(record.batches[step])
        expected = (own_logps(batch["weights"], batch) - sampler_logps(batch)).sum(dim=1)
        assert_logged(log, expected)
        if step % 4 == 0:
            assert 0 < log["trajectory_ratio/log_std"] < 1e-3  # measured, not defined
        else:
            assert log["trajectory_ratio/log_std"] > 1e-2


@pytest.mark.parametrize("name", ["stale", "stale, truncated"])
@pytest.mark.parametrize("step", [4, 5, 6])
def test_trl_s_correction_multiplies_the_clipped_weight(float32, name, step):
    """Gradient of one mini-batch: s · w' · A · ∇log P for w' up to the cap, s from TRL's bounds."""
    record = float32[name]
    batch, log_sampler_ratio, log_ratio = of_stale_rollout(record, step)
    ratio = log_sampler_ratio.sum(dim=1).exp()
    assert 0 < (ratio > 1.2).float().mean() < 1  # the correction acts on some of them
    correction = ratio.clamp(max=1.2) if name == "stale, truncated" else ratio.where(ratio <= 1.2, 0.0)
    weight = log_ratio.exp()
    weight = correction * weight.where(weight <= 1.28, 0.0)

    model = policy(batch["weights"])
    log_p = (logps(model, batch) * batch["completion_mask"]).sum(dim=1)
    (-(weight * batch["advantages"] * log_p).sum() / (MINI_BATCH * LONGEST)).backward()
    assert largest_gradient_error(record.gradients[step], model) < 1e-4


def test_token_correction_with_token_ratios(float32):
    """Algorithm `grpo`: every token has a ratio and a correction of its own."""
    record, step = float32["stale, tokens"], 5
    batch, log_sampler_ratio, _ = of_stale_rollout(record, step)
    correction = log_sampler_ratio.exp()
    assert 0 < (correction > 1.05)[batch["completion_mask"] > 0].float().mean() < 1
    old = own_logps(record.rollout_of(step)["weights"], batch)
    model = policy(batch["weights"])
    ratio = (logps(model, batch) * batch["completion_mask"] - old).exp()
    advantages = batch["advantages"].unsqueeze(1)
    gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages) * correction.clamp(max=1.05)
    tokens = batch["num_items_in_batch"] / 4  # of the rollout, so many of which a mini-batch has on average
    (-(gain * batch["completion_mask"]).sum() / tokens).backward()
    assert largest_gradient_error(record.gradients[step], model) < 1e-4


def test_an_engine_in_bfloat16_is_another_policy(bfloat16):
    """With the policy's own old log-probabilities the ratios do not know of it; those to the sampler do."""
    for record in bfloat16.values():
        for rollout in record.rollouts:
            assert 1e-2 < mismatch(rollout).abs().max() < 2
    for log in bfloat16["trainer"].logs[::4]:
        assert log["trajectory_ratio/log_std"] == 0
    for step in (0, 4):
        record = bfloat16["sampler"]
        assert record.logs[step]["trajectory_ratio/log_std"] > 1e-3
        batch = real_rows(record.batches[step])
        assert_logged(record.logs[step], (own_logps(batch["weights"], batch) - sampler_logps(batch)).sum(dim=1))
    assert bfloat16["sampler"].forwards["scored"] == 0
    assert bfloat16["trainer"].forwards["scored"] == 2 * 3  # what the updates 2 to 4 train on
