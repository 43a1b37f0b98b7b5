"""Measures of finished runs, as numbers and Markdown tables."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from tic_grpo_trl.metrics.run_summary import LogHistory, accuracy_name, series
from tic_grpo_trl.starter import exact_match_reward


ACCURACY = accuracy_name(exact_match_reward.__name__)
LAST_UPDATES = 32  # window of the reward at the end
MEASURES = {
    "accuracy": "held-out accuracy at the end",
    "reward": "training reward, mean over the run",
    "final_reward": f"training reward, last {LAST_UPDATES} updates",
}


@dataclass(frozen=True)
class Result:
    """A finished run.

    Args:
        algorithm: algorithm, with optional settings after a colon.
        seed: random seed.
        run: fields of [`~research.study.runs.Run`].
        summary: result of [`~tic_grpo_trl.metrics.run_summary.summarize_run`].
        history: log history of the trainer.
    """

    algorithm: str
    seed: int
    run: dict[str, Any]
    summary: dict[str, Any]
    history: LogHistory

    def measure(self, name: str) -> float:
        """Return one of [`MEASURES`], a share of correct answers between 0 and 1."""
        if name == "accuracy":
            return self.summary["accuracy_after"]
        steps, rewards = series(self.history, "reward")  # one entry per rollout
        first = 0 if name == "reward" else self.run["steps"] - LAST_UPDATES
        return fmean(reward for step, reward in zip(steps, rewards, strict=True) if step > first)


Results = dict[str, list[Result]]  # by algorithm, each in the order of its seeds
Interval = Callable[[Sequence[float]], tuple[float, float]]


def load(folders: Sequence[Path]) -> Results:
    """Read finished runs; algorithms keep the order of the folders."""
    results: Results = defaultdict(list)
    for folder in folders:
        run, summary, history = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("run", "summary", "log_history")
        )
        results[run["algorithm"]].append(Result(run["algorithm"], run["seed"], run, summary, history))
    return {algorithm: sorted(runs, key=lambda result: result.seed) for algorithm, runs in results.items()}


SHORT = {
    "learning_rate": "lr",
    "epsilon": "ε",
    "epsilon_high": "ε_high",
    "length_scaled_cap": "σ",
    "length_scaled_floor": "σ_low",
    "importance_sampling_level": "level",
    "gradient_noise_scale": "κ",
    "vespo_k_pos": "k₊",
    "vespo_lambda_pos": "λ₊",
    "vespo_k_neg": "k₋",
    "vespo_lambda_neg": "λ₋",
}


def short(settings: str) -> str:
    """Abbreviate settings: `epsilon=0.1,learning_rate=0.01` gives `ε 0.1, lr 0.01`."""
    pairs = (pair.partition("=") for pair in settings.split(",") if pair)
    return ", ".join(f"{SHORT.get(key, key)} {value}" for key, _, value in pairs)


def label(algorithm: str) -> str:
    """Abbreviate an algorithm's specification: `gspo:learning_rate=0.01` gives `gspo, lr 0.01`."""
    name, _, own = algorithm.partition(":")
    return f"{name}, {short(own)}" if own else name


def bootstrap_interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """Compute the 95 % percentile bootstrap interval of the mean.

    Args:
        values: one value per seed, such as differences on the same seeds.
        resamples: number of resamples with replacement (numpy's generator, seed 0).

    Returns:
        Lower and upper end. With few values the interval is too narrow: with three it is at most their range.
    """
    array = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).integers(len(array), size=(resamples, len(array)))
    low, high = np.quantile(array[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


# 97.5 % quantiles of Student's distribution with 1, 2, … degrees of freedom
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Compute the 95 % interval of the mean by Student's distribution, which allows for few values.

    Args:
        values: two to 31 values, one per seed, such as differences on the same seeds.

    Returns:
        Lower and upper end: mean ± t·sd/√n.

    Raises:
        ValueError: for another number of values.
    """
    if not 2 <= len(values) <= len(STUDENT) + 1:
        raise ValueError(f"{len(values)} seeds: an interval by Student's distribution needs 2 to {len(STUDENT) + 1}.")
    half = STUDENT[len(values) - 2] * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def paired_differences(results: Sequence[Result], baseline: Sequence[Result], measure: str) -> list[float]:
    """Return the differences from the baseline on the seeds that both have, in order."""
    reference = {result.seed: result.measure(measure) for result in baseline}
    return [result.measure(measure) - reference[result.seed] for result in results if result.seed in reference]


def difference(differences: Sequence[float], interval: Interval = bootstrap_interval) -> str:
    """Format paired differences in points: their mean and its 95 % interval, which one difference doesn't have."""
    text = f"{100 * fmean(differences):+.1f}"
    if len(differences) == 1:
        return text
    low, high = interval(differences)
    return f"{text}, {100 * low:+.1f} to {100 * high:+.1f}"


def _cell(results: Sequence[Result], baseline: Sequence[Result] | None, measure: str, interval: Interval) -> str:
    values = [100 * result.measure(measure) for result in results]
    text = f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
    differences = paired_differences(results, baseline, measure) if baseline else []
    if not differences or baseline is results:
        return text
    return f"{text} ({difference(differences, interval)})"


def comparison_table(
    results: Results,
    algorithms: Sequence[str],
    baseline: str = "grpo",
    measures: Mapping[str, str] = MEASURES,
    interval: Interval = bootstrap_interval,
) -> str:
    """Format a Markdown table like the paper's Tables 1 and 2, in points (percent).

    Each cell is the mean over seeds ± standard deviation (mean difference from the baseline on the same seeds, its 95 %
    interval).

    Args:
        results: finished runs.
        algorithms: rows of the table, in order; those without a run are skipped.
        baseline: algorithm to compare with, if there is a run of it.
        measures: titles of the columns by measure.
        interval: computes the interval of a mean.
    """
    reference = results.get(baseline)
    lines = [f"| algorithm | seeds | {' | '.join(measures.values())} |", "|---|---|" + "---|" * len(measures)]
    for algorithm in algorithms:
        if algorithm in results:
            cells = (_cell(results[algorithm], reference, measure, interval) for measure in measures)
            lines.append(f"| {label(algorithm)} | {len(results[algorithm])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_metric(result: Result, name: str) -> float | None:
    """Return the mean of a logged metric over the updates of a run; `None` if it was never logged."""
    values = series(result.history, f"trajectory_ratio/{name}")[1]
    return fmean(values) if values else None


# Trajectory ratios before the clip, which explain the differences between algorithms
RATIO_METRICS = {
    "log_std": "σ of R, nats",
    "ess": "effective sample size, share",
    "clip_high_pos": "A > 0 above the cap, %",
    "clip_high_neg": "A < 0 above the cap, %",
    "clip_low_neg": "A < 0 below the bound, %",
}


def ratio_table(results: Results, algorithms: Sequence[str]) -> str:
    """Format a Markdown table of [`RATIO_METRICS`], means over the updates of all seeds."""
    lines = [f"| algorithm | {' | '.join(RATIO_METRICS.values())} |", "|---|" + "---|" * len(RATIO_METRICS)]
    for algorithm in algorithms:
        if algorithm not in results:
            continue
        cells = []
        for name, title in RATIO_METRICS.items():
            values = [value for result in results[algorithm] if (value := mean_metric(result, name)) is not None]
            scale, digits = (100, 1) if title.endswith("%") else (1, 3)
            cells.append(f"{scale * fmean(values):.{digits}f}" if values else "–")
        lines.append(f"| {label(algorithm)} | {' | '.join(cells)} |")
    return "\n".join(lines)
