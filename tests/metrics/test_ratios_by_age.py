"""Test the ratio metrics and the alarm that look at the age of tokens."""

import math
from collections import defaultdict

import pytest
import torch
from conftest import logps, make_trainer, tiny_model
from rollouts import ACTIVE, GIVEN, active_inputs, given_rollouts, own_logprobs, train
from test_ratios import rows_of

from tic_grpo_trl.metrics.ratios import default_metrics, mean_sampler_ratio, merge_steps, ratio_metrics


def test_ratio_metrics_by_age_by_hand():
    """The cap is log 1.28 = 0.247; a response is as old as its oldest token that counts."""
    rows = rows_of(
        [[0.1, 0.1, 0.0], [0.1, -0.1, 0.0], [0.5, 0.0, 0.0], [math.log(3), 0.0, 0.0], [0.3, 0.0, 0.0]],
        [1.0, -1.0, 1.0, -1.0, 1.0],
        mask=[[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]],
        age=[[0, 0, 0], [0, 0, 5], [1, 1, 0], [1, 0, 0], [3, 1, 0]],  # 5: on padding
    )
    assert rows[:, 9].tolist() == [0, 0, 1, 1, 3]
    metrics = ratio_metrics(rows)
    by_age = {name: value for name, value in metrics.items() if name.startswith("age_")}
    w = [math.exp(0.5), 3.0]
    assert by_age == pytest.approx(
        {
            "age_0/ess": (math.exp(0.2) + 1) ** 2 / (2 * (math.exp(0.4) + 1)),
            "age_0/log_std": 0.1,
            "age_0/clip_high_pos": 0.0,
            "age_0/clip_high_neg": 0.0,
            "age_1/ess": sum(w) ** 2 / (2 * sum(x * x for x in w)),
            "age_1/log_std": (math.log(3) - 0.5) / 2,
            "age_1/clip_high_pos": 1.0,
            "age_1/clip_high_neg": 1.0,
            "age_3/ess": 1.0,
            "age_3/log_std": 0.0,
            "age_3/clip_high_pos": 1.0,  # and none with A < 0
        },
        abs=1e-6,
    )
    young = rows_of([[0.1], [0.3]], [1.0, -1.0], age=[[0], [0]])
    overall = {name: value for name, value in metrics.items() if name not in by_age}
    assert overall.keys() == ratio_metrics(young).keys()  # ages are logged only if they differ from 0
    assert overall == pytest.approx(ratio_metrics(rows * (torch.arange(10) < 9)))  # and change nothing overall


def test_ages_are_averaged_over_the_steps_that_have_them():
    first = rows_of([[0.0], [0.2]], [1.0, 1.0], age=[[0], [0]])
    second = rows_of([[0.0], [0.2], [0.0], [0.4]], [1.0] * 4, age=[[0], [0], [2], [2]])
    third = rows_of([[0.0], [0.8]], [1.0, 1.0], age=[[2], [2]])
    merged = merge_steps([(1, first), (1, second), (2, third)])
    assert merged["age_2/log_std"] == pytest.approx((0.2 + 0.4) / 2)
    assert merged["inner_1/age_0/log_std"] == merged["age_0/log_std"] == pytest.approx(0.1)
    assert merged["inner_1/age_2/log_std"] == pytest.approx(0.2)
    default = default_metrics(merged, 2)
    assert len(set(default)) == len(default)
    by_age = {name for name in default if "age_" in name}
    per_age = {f"age_{age}/{name}" for age in (0, 2) for name in ("ess", "log_std", "clip_high_pos")}
    assert by_age == per_age | {"inner_1/age_0/log_std"}
    assert "inner_1/log_std" in default
    assert not any("age_" in name for name in default_metrics(merge_steps([(1, first), (2, first)]), 2))


def test_the_sampler_ratio_leaves_ages_alone():
    rows = rows_of([[0.0, 0.0]], [1.0], sampler=[[-0.2, -0.1]], age=[[7, 0]])
    assert mean_sampler_ratio([(1, rows)]) == pytest.approx(math.exp(-0.15), rel=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_statistics_of_a_checkpoint_without_ages_go_on(tmp_path, mode):
    trainer = make_trainer(tmp_path)
    old, new = rows_of([[0.1], [0.3]], [1.0, -1.0], age=[[0], [0]]), rows_of([[0.2]], [1.0], age=[[1]])
    trainer.ratios.load_state_dict({"train": [], "eval": []} | {mode: [(1, old[:, :9]), (2, new)]})
    (_, padded), (_, same) = trainer.ratios.state_dict()[mode]
    assert torch.equal(padded, old)
    assert torch.equal(same, new)
    metrics = defaultdict(list)
    trainer.ratios.log(mode, metrics)
    assert metrics["trajectory_ratio/inner_1/log_std"] == [pytest.approx(0.1)]
    assert metrics["trajectory_ratio/age_1/ess"] == [1.0]


# Tokens of earlier weights in a run


AGES = {0: [2, 2, 1, 1, 0, 0], 1: [1, 1], 4: [0, 0, 0], 5: [0]}  # by response of GIVEN; those that train
POLICIES = [{}, {"behaviour_policy": "sampler"}, {"skip_on_policy_logps": False}]


def with_ages(trainer):
    """Add `token_age` to the rollouts of a trainer, as carry-over does."""
    generate = trainer._generate_and_score_completions

    def edited(inputs):
        rollout = generate(inputs)
        rollout["token_age"] = torch.zeros_like(rollout["completion_ids"])
        for response, ages in AGES.items():
            rollout["token_age"][response, : len(ages)] = torch.tensor(ages)
        return rollout

    trainer._generate_and_score_completions = edited


def sampler_by_age(current, earlier):
    """Give the log-probabilities of one sampler to tokens of the current weights, of another to all others."""
    output = given_rollouts(**GIVEN)[0]([""] * 8, None)
    ages = {tuple(output["completion_ids"][response]): of_tokens for response, of_tokens in AGES.items()}

    def sampler(prompt, completion):
        pairs = zip(current(prompt, completion), earlier(prompt, completion), strict=True)
        of_tokens = ages.get(tuple(completion), [0] * len(completion))
        return [old if age else new for (new, old), age in zip(pairs, of_tokens, strict=True)]

    return sampler


def run(tmp_path, sampler, prepare=with_ages, **config):
    rollouts = given_rollouts(**GIVEN, sampler=sampler)
    settings = {"num_generations": 2, "learning_rate": 0.0, "steps_per_generation": 2, "max_steps": 1} | config
    return train(tmp_path, rollouts=rollouts, prepare=prepare, **settings)


def is_stale(caplog):
    return any("weights look stale" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_of_earlier_weights_raise_no_alarm(tmp_path, caplog, policy):
    sampler = sampler_by_age(own_logprobs(0.0), own_logprobs(0.5))
    result = run(tmp_path / "aged", sampler, **policy)
    assert result.logs[0]["sampling/mean_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert not is_stale(caplog)
    result = run(tmp_path / "unknown", sampler, prepare=None, **policy)  # were their ages not known
    assert abs(result.logs[0]["sampling/mean_ratio"] - 1) > 0.01
    assert is_stale(caplog)


@pytest.mark.parametrize("policy", POLICIES)
def test_stale_weights_raise_the_alarm_among_tokens_of_earlier_weights(tmp_path, caplog, policy):
    def surer(prompt, completion):
        return [value + 0.02 for value in own_logprobs(0.0)(prompt, completion)]

    result = run(tmp_path, sampler_by_age(surer, own_logprobs(0.0)), **policy)
    assert result.logs[0]["sampling/mean_ratio"] == pytest.approx(math.exp(-0.02), abs=1e-6)
    assert is_stale(caplog)


def test_a_run_logs_the_ratios_of_each_age(tmp_path):
    """Of the four active responses one has age 2, one age 1 and two age 0; the ratios come from plain logits."""
    sampler = sampler_by_age(own_logprobs(0.05), own_logprobs(0.5))
    log = run(tmp_path, sampler, behaviour_policy="sampler", log_all_ratio_metrics=False).logs[0]
    inputs = active_inputs(**GIVEN, active=ACTIVE)
    own = (logps(tiny_model(), inputs) * inputs["completion_mask"]).sum(1).tolist()
    output = given_rollouts(**GIVEN)[0]([""] * 8, None)
    sampled = [sum(sampler(output["prompt_ids"][i], output["completion_ids"][i])) for i in ACTIVE]
    log_ratios = [mine - theirs for mine, theirs in zip(own, sampled, strict=True)]
    of_age_0 = [math.exp(log_ratio) for log_ratio in log_ratios[2:]]
    assert log["trajectory_ratio/age_0/ess"] == pytest.approx(
        sum(of_age_0) ** 2 / (2 * sum(w * w for w in of_age_0)), abs=1e-6
    )
    assert log["trajectory_ratio/age_0/log_std"] == pytest.approx(abs(log_ratios[2] - log_ratios[3]) / 2, abs=1e-5)
    assert log_ratios[0] < math.log(1.28)
    assert log["trajectory_ratio/age_2/ess"] == log["trajectory_ratio/age_1/ess"] == 1.0
    assert log["trajectory_ratio/age_2/clip_high_pos"] == 0.0  # A = 0.5
    assert log["trajectory_ratio/age_1/clip_high_neg"] == float(log_ratios[1] > math.log(1.28))  # A = −0.5
    assert {name.split("/")[1] for name in log if "/age_" in name} == {"age_0", "age_1", "age_2"}
