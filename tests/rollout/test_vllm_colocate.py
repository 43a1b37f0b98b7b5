"""The trainer with a real vLLM engine in its own process: what the ratios, gradients and warnings are made of is
computed again from plain logits. Needs the environment of `make test-vllm`."""

import math
from collections import Counter

import pytest
import torch
from conftest import logps
from launching import free_port
from transformers import AutoTokenizer
from workers.vllm_records import (
    GROUP,
    LONGEST,
    MINI_BATCH,
    Record,
    assert_carried_ratios,
    assert_each_prompt_once,
    assert_logged,
    assert_old_weights_noticed,
    assert_old_weights_noticed_in_current_tokens,
    assert_ratios_of_the_weights,
    assert_recorded_when_sampled,
    assert_weights_arrived,
    largest_gradient_error,
    log_ratios,
    mismatch,
    of_several_versions,
    own_logps,
    policy,
    prompts_of,
    real_rows,
    run,
    sampler_logps,
)

from tic_grpo_trl.starter import STARTER_MODEL


pytestmark = pytest.mark.vllm

FLOAT32 = ["synced", "stale", "stale, truncated", "stale, tokens", "lora", "sampler"]
FLOAT32 += ["carried", "carried, stale", "carried, lora", "carried, corrected"]
BFLOAT16 = ["trainer", "sampler"]


@pytest.fixture(scope="module")
def float32(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float32")
    run(folder, "vllm_colocate.py", "float32", *FLOAT32)
    return {name: Record(folder / f"{name}-0.pt") for name in FLOAT32}


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat16")
    run(folder, "vllm_colocate.py", "bfloat16", *BFLOAT16)
    return {name: Record(folder / f"{name}-0.pt") for name in BFLOAT16}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the notes of two processes, each of which has its own engine."""
    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    run(folder, "vllm_colocate.py", "float32", "both", "both, spanning", launcher=launcher)
    return folder


def of_stale_rollout(record, step):
    """The rows of a mini-batch, their sampler ratios per token (log) and R."""
    batch = real_rows(record.batches[step])
    old = own_logps(record.rollout_of(step)["weights"], batch)
    return batch, old - sampler_logps(batch), log_ratios(record, step)


def capped(log_ratio):
    """The algorithm's weight of each response."""
    weight = log_ratio.exp()
    return weight.where(weight <= 1.28, 0.0)


def gradient_error(record, step, weight):
    """Relative error of a mini-batch's gradient against that of the mean of weight · A · log P."""
    batch = real_rows(record.batches[step])
    model = policy(batch["weights"])
    log_p = (logps(model, batch) * batch["completion_mask"]).sum(dim=1)
    (-(weight * batch["advantages"] * log_p).sum() / (MINI_BATCH * LONGEST)).backward()
    return largest_gradient_error(record.gradients[step], model)


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
    _, log_sampler_ratio, log_ratio = of_stale_rollout(record, step)
    ratio = log_sampler_ratio.sum(dim=1).exp()
    assert 0 < (ratio > 1.2).float().mean() < 1  # the correction acts on some of them
    correction = ratio.clamp(max=1.2) if name == "stale, truncated" else ratio.where(ratio <= 1.2, 0.0)
    assert gradient_error(record, step, correction * capped(log_ratio)) < 1e-4


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


# Responses that go on from one rollout to the next


@pytest.mark.parametrize("name", ["carried", "carried, lora"])
def test_carried_over_tokens_are_those_of_the_weights_that_sampled(float32, name):
    record = float32[name]
    assert_recorded_when_sampled(record)
    assert record.forwards == {"scored": 0, "trained": 16}
    assert max(rollout["token_age"].max() for rollout in record.rollouts) == 2
    assert of_several_versions(record) > 50


@pytest.mark.parametrize("name", ["carried", "carried, lora"])
def test_ratios_of_carried_over_responses(float32, name):
    assert abs(assert_carried_ratios([float32[name]])) > 0.01  # with which the alarm begins


def test_each_prompt_is_trained_on_once(float32):
    record, waits = float32["carried"], float32["synced"]
    assert_each_prompt_once([record])
    carried, waited = ([prompts_of(rollout) for rollout in each.rollouts] for each in (record, waits))
    assert set().union(*waited) < set().union(*carried)  # three rollouts of the same prompts, and a fourth
    assert [set(rollout) for rollout in carried[:3]] != [set(rollout) for rollout in waited]


def test_evaluations_with_a_full_pool(float32):
    record = float32["carried"]
    waiting = [rollout["waiting"] for rollout in record.rollouts]
    batches = len(record.evaluations) // len(waiting)
    assert [each["waiting"] for each in record.evaluations] == [each for each in waiting for _ in range(batches)]
    for pool in waiting[:-1]:
        assert sum(sum(lengths) for _, lengths in pool) > 100


@pytest.mark.parametrize("step", [4, 9, 13])
def test_the_loss_has_the_exact_ratio(float32, step):
    """With a control that takes all tokens for those of the rollout's weights."""
    record = float32["carried"]
    batch = real_rows(record.batches[step])
    log_ratio = (own_logps(batch["weights"], batch) - sampler_logps(batch)).sum(dim=1)
    assert gradient_error(record, step, capped(log_ratio)) < 1e-4
    assert gradient_error(record, step, capped(log_ratios(record, step))) > 0.01


def test_an_engine_with_old_weights_is_noticed_with_carry_over(float32):
    assert_old_weights_noticed_in_current_tokens(float32["carried, stale"])


def test_the_trainer_s_policy_as_the_behaviour_policy(float32):
    """All tokens are scored with the weights at the rollout's start, and TRL corrects for those that sampled them."""
    record, masked = float32["carried, corrected"], []
    assert_recorded_when_sampled(record)
    assert_each_prompt_once([record])
    assert_ratios_of_the_weights(record)
    assert not record.stale_warnings
    for step in range(len(record.batches)):
        batch, log_sampler_ratio, log_ratio = of_stale_rollout(record, step)
        old = own_logps(record.rollout_of(step)["weights"], batch)
        assert ((batch["old_per_token_logps"] - old) * batch["completion_mask"]).abs().max() <= 1e-4
        ratio = log_sampler_ratio.sum(dim=1).exp()
        correction = ratio.where(ratio <= 1.2, 0.0)
        torch.testing.assert_close(batch["importance_sampling_ratio"].squeeze(1), correction, rtol=1e-3, atol=0)
        masked += (ratio > 1.2).tolist()
        assert gradient_error(record, step, correction * capped(log_ratio)) < 1e-4
    assert 0 < sum(masked) < len(masked) / 2


def test_two_processes_with_an_engine_each(two):
    """One of them has short sums and the other long ones: it has enough earlier, and does not wait in vain."""
    records = [Record(two / f"both-{rank}.pt") for rank in (0, 1)]
    assert [record.num_processes for record in records] == [2, 2]
    for record in records:
        assert_recorded_when_sampled(record)
        assert len(record.uses) == len(record.rollouts) == 4
        for rollout in record.rollouts:
            assert set(Counter(prompts_of(rollout)).values()) == {GROUP}
    assert_each_prompt_once(records)
    assert_carried_ratios(records)
    short, long = (sum(use["steps"] for use in record.uses) for record in records)
    assert short < 0.75 * long
    for rollouts in zip(*(record.rollouts for record in records), strict=True):
        for name, weights in rollouts[0]["weights"].items():
            assert torch.equal(weights, rollouts[1]["weights"][name]), name


def test_groups_that_span_engines_are_refused(two):
    for rank in (0, 1):
        refused = torch.load(two / f"both, spanning-{rank}.pt")["refused"]
        assert "\n" not in refused
        for word in ("max_carry_over=2", "num_generations = 8", "vllm_mode='server'"):
            assert word in refused
