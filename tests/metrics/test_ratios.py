"""The ratio metrics against hand-computed values."""

import math

import pytest
import torch
from conftest import make_trainer

from tic_grpo_trl.metrics.ratios import (
    effective_sample_size,
    mean_sampler_ratio,
    merge_steps,
    ratio_metrics,
    ratio_statistics,
)
from tic_grpo_trl.objective import Clip, clip_log_weight, log_importance_weight


def rows_of(log_ratio, advantages, mask=None, level="trajectory", clip=None, sampler=None, age=None):
    log_ratio = torch.tensor(log_ratio)
    mask = torch.ones_like(log_ratio) if mask is None else torch.tensor(mask)
    weight = log_importance_weight(log_ratio, mask, level)
    advantages = torch.tensor(advantages)
    clipped = clip_log_weight(weight, advantages, mask, clip or Clip("up_only", epsilon_high=0.28))
    sampler, age = (None if value is None else torch.tensor(value) for value in (sampler, age))
    return ratio_statistics(log_ratio, clipped, advantages, mask, sampler, age)


def test_effective_sample_size_by_hand():
    # w = 1, 3: (1 + 3)² / (2·(1 + 9)) = 0.8
    assert effective_sample_size(torch.tensor([0.0, math.log(3)])).item() == pytest.approx(0.8, rel=1e-6)
    assert effective_sample_size(torch.full((5,), -1e4)).item() == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([1e4, 0.0, -1e4, 0.0])).item() == pytest.approx(0.25)
    assert effective_sample_size(torch.tensor([7.0])).item() == pytest.approx(1.0)


def test_effective_sample_size_of_a_gaussian_drift():
    # R ~ N(−σ²T/2, σ²T) gives ESS/n = exp(−σ²T): 0.44 at σ = 0.01, T = 8192
    generator = torch.Generator().manual_seed(0)
    variance = 0.01**2 * 8192
    log_weights = torch.randn(200_000, generator=generator) * math.sqrt(variance) - variance / 2
    assert effective_sample_size(log_weights).item() == pytest.approx(math.exp(-variance), abs=0.01)


def test_clip_shares_of_prefixes_are_shares_of_tokens():
    # R_t = 0.1, 0.4, 0.2, the cap is log 1.28 = 0.247: one token of three; the tool's token does not count
    clip = Clip("dual_clip", epsilon_low=0.2, epsilon_high=0.28)
    rows = rows_of([[0.1, 0.3, 0.0, -0.2]] * 2, [1.0, -1.0], [[1.0, 1.0, 0.0, 1.0]] * 2, level="prefix", clip=clip)
    metrics = ratio_metrics(rows)
    assert metrics["clip_high_pos"] == pytest.approx(1 / 3)
    assert metrics["clip_high_neg"] == pytest.approx(1 / 3)
    assert metrics["log_mean"] == pytest.approx(0.2)  # R of the response


def test_metrics_by_hand():
    # R = 0.4, 0.5, −3, 0.1, 0.2: w' = 1.49, 1.65, 0.0498, 1.105, 1.22; the cap is log 1.28 = 0.247
    rows = rows_of(
        [[0.2, 0.2], [0.5, 0.0], [-1.0, -2.0], [0.1, 0.0], [0.1, 0.1]],
        [1.0, -1.0, -0.5, 2.0, 0.0],
    )
    metrics = ratio_metrics(rows)
    log_ratio = torch.tensor([0.4, 0.5, -3.0, 0.1, 0.2], dtype=torch.float64)
    assert metrics["log_mean"] == pytest.approx(-0.36, abs=1e-6)
    assert metrics["log_std"] == pytest.approx(log_ratio.std(correction=0).item(), abs=1e-6)
    assert (metrics["log_min"], metrics["log_max"]) == (pytest.approx(-3.0), pytest.approx(0.5))
    assert metrics["log_q50"] == pytest.approx(0.2, abs=1e-6)
    assert metrics["log_q05"] == pytest.approx(-3 + 0.2 * 3.1, abs=1e-6)  # linear between −3 and 0.1
    assert metrics["log_q95"] == pytest.approx(0.4 + 0.8 * 0.1, abs=1e-6)
    w = log_ratio.exp()
    assert metrics["ess"] == pytest.approx((w.sum() ** 2 / (5 * w.square().sum())).item(), rel=1e-6)
    assert metrics["share_below_0.1"] == pytest.approx(0.2)
    assert metrics["clip_high_pos"] == pytest.approx(0.5)  # one of two responses with A > 0
    assert metrics["clip_high_neg"] == pytest.approx(0.5)
    assert metrics["clip_low_neg"] == 0.0


def test_lower_bound_and_token_level_shares():
    two_sided = Clip("two_sided", epsilon_low=0.2, epsilon_high=0.28)
    metrics = ratio_metrics(rows_of([[-0.5, 0.0], [0.0, 0.0]], [-1.0, -1.0], clip=two_sided))
    assert (metrics["clip_low_neg"], metrics["clip_high_neg"]) == (0.5, 0.0)
    assert "clip_high_pos" not in metrics  # a share of nothing

    # token level: one of the two tokens of the first response, none of the second
    metrics = ratio_metrics(rows_of([[0.5, 0.0], [0.0, 0.0]], [1.0, 1.0], level="token", clip=two_sided))
    assert metrics["clip_high_pos"] == pytest.approx(0.25)


def test_shares_of_a_response_count_its_own_tokens():
    rows = rows_of([[0.5, 0.0, 0.0, 0.0]], [1.0], mask=[[1.0, 1.0, 0.0, 0.0]], level="token")
    assert ratio_metrics(rows)["clip_high_pos"] == pytest.approx(0.5)


def test_per_token_advantages_split_a_response_by_sign():
    metrics = ratio_metrics(rows_of([[0.5, 0.5, 0.5, 0.5]], [[1.0, 1.0, 1.0, -1.0]]))
    assert (metrics["clip_high_pos"], metrics["clip_high_neg"]) == (1.0, 1.0)


def test_responses_without_tokens_do_not_count():
    rows = rows_of([[0.0, 0.0], [0.1, 0.2]], [1.0, 1.0], mask=[[0.0, 0.0], [1.0, 1.0]])
    assert ratio_metrics(rows)["log_mean"] == pytest.approx(0.3)
    assert ratio_metrics(rows[:1]) == {}


def test_extreme_ratios_stay_finite():
    rows = rows_of([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]], [1.0, -1.0, 0.0])
    assert all(math.isfinite(value) for value in ratio_metrics(rows).values())


@pytest.mark.parametrize("logs_all", [False, True])
@pytest.mark.parametrize("logging_steps", [1, 8])
def test_a_run_logs_a_handful_of_metrics_unless_all_are_asked_for(tmp_path, logs_all, logging_steps):
    """What is logged by default has the values that it has among all."""
    settings = {"steps_per_generation": 4, "max_steps": 8, "skip_zero_advantage": False, "eval_strategy": "steps"}
    settings |= {"eval_steps": 8, "logging_steps": logging_steps, "algorithm": "grpo"}
    trainer = make_trainer(tmp_path, log_all_ratio_metrics=logs_all, **settings)
    statistics, close = [], trainer.ratios.close
    trainer.ratios.close = lambda *args: statistics.append((args[1], close(*args))) or statistics[-1][1]
    trainer.train()
    statistics = [(k, rows) for k, rows in statistics if k is not None]  # without the evaluation's
    overall = ["ess", "log_std", "log_q05", "log_q50", "log_q95", "clip_high_pos", "clip_high_neg", "clip_low_neg"]
    default = {*overall, "inner_1/log_std", "inner_4/ess", "inner_4/log_std"}
    logged, evaluated = set(), set()
    for entry in trainer.state.log_history:
        own = {name.removeprefix("trajectory_ratio/"): v for name, v in entry.items() if name[:10] == "trajectory"}
        merged = merge_steps(statistics[entry["step"] - logging_steps : entry["step"]]) if own else {}
        assert own == pytest.approx({name: v for name, v in merged.items() if logs_all or name in default})
        logged |= own.keys()
        evaluated |= {name.removeprefix("eval_trajectory_ratio/") for name in entry if name[:15] == "eval_trajectory"}
    every = {*overall, "log_mean", "log_min", "log_max", "share_below_0.1"}
    assert evaluated == (every if logs_all else set(overall))
    assert logged == (every | {f"inner_{k}/{name}" for k in (1, 2, 3, 4) for name in every} if logs_all else default)


def test_steps_are_averaged_and_split_by_inner_step():
    first, second = rows_of([[0.0], [0.0]], [1.0, -1.0]), rows_of([[0.5], [-1.5]], [1.0, -1.0])
    merged = merge_steps([(1, first), (2, second), (2, first)])
    assert merged["log_mean"] == pytest.approx(-0.5 / 3)
    assert (merged["log_min"], merged["log_max"]) == (-1.5, 0.5)  # extremes, not means of extremes
    assert merged["inner_1/log_std"] == 0.0
    assert merged["inner_2/log_mean"] == pytest.approx(-0.25)
    assert merged["inner_2/ess"] == pytest.approx((ratio_metrics(second)["ess"] + 1.0) / 2)
    assert not any(name.startswith("inner_") for name in merge_steps([(None, first)]))
    assert merge_steps([]) == {}


def test_mean_sampler_ratio_by_hand():
    nan = math.nan
    known = rows_of(
        [[0.3, 0.1, 0.0], [0.0, 0.0, 0.0]],
        [1.0, -1.0],
        mask=[[1, 1, 0], [1, 1, 1]],
        sampler=[[-0.2, -0.1, 9.0], [nan, 0.1, -0.4]],  # masked, not given
    )
    unknown = rows_of([[0.5, 0.5]], [1.0])
    # four tokens: (−0.2 − 0.1 + 0.1 − 0.4) / 4
    assert mean_sampler_ratio([(1, known), (2, unknown)]) == pytest.approx(math.exp(-0.15), rel=1e-6)
    assert mean_sampler_ratio([(1, unknown)]) is None
    for extreme in (1e4, -1e4, math.inf, -math.inf):  # finite and not 0, so that its logarithm exists
        rows = rows_of([[0.0, 0.0]], [1.0], sampler=[[extreme, 0.0]])
        assert math.log(mean_sampler_ratio([(1, rows)])) == pytest.approx(math.copysign(700, extreme))
    assert ratio_metrics(known)["log_max"] == pytest.approx(0.4)
