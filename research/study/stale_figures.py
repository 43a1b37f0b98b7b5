"""Figures of the study of stale data."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tic_grpo_trl.metrics.run_summary import AMBER, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY

from .figures import save
from .stale_outcome import Outcome, accuracy_curve, mean_curve
from .stale_plan import OURS, Condition


# A colour and a line for each of the others, told apart without colour too
LOOKS = [(colour, line) for line in ("o-", "s--", "^:") for colour in (BLUE, GREEN, PURPLE, SKY, AMBER, GREY)]


DEPTH = 35  # points below the best rule that a panel shows


def _points(outcome: Outcome, rule: str) -> np.ndarray | None:
    """Return the training reward in points, (lags, seeds), or `None` unless all lags have the same seeds."""
    found = [
        [100 * result.measure("reward") for result in outcome.of_rule(rule, condition)] for condition in outcome.lagged
    ]
    return np.array(found) if found[0] and len({len(each) for each in found}) == 1 else None


def plot_lag(outcomes: Sequence[Outcome], path: Path) -> None:
    """Plot the training reward of every rule against the lag, a panel per part. Ours has the range of its seeds.

    Rules far below the best leave their panel.
    """
    figure, axes = plt.subplots(
        1, len(outcomes), figsize=(6.4 * len(outcomes), 4.6), squeeze=False, constrained_layout=True
    )
    others = dict.fromkeys(rule for outcome in outcomes for rule in outcome.choice if rule != OURS)
    looks = dict(zip(others, LOOKS, strict=False))
    for axis, outcome in zip(axes.flat, outcomes, strict=True):
        lags = [condition.lag for condition in outcome.lagged]
        points = {rule: found for rule in outcome.choice if (found := _points(outcome, rule)) is not None}
        for rule in sorted(points, key=lambda rule: -points[rule][-1].mean()):  # the legend in the order of the ends
            means = points[rule].mean(axis=1)
            if rule == OURS:
                axis.fill_between(lags, points[rule].min(axis=1), points[rule].max(axis=1), color=ORANGE, alpha=0.2)
                axis.plot(lags, means, "D-", color=ORANGE, linewidth=4, markersize=8, label=rule, zorder=5)
            else:
                colour, line = looks[rule]
                axis.plot(lags, means, line, color=colour, linewidth=1.3, markersize=4, label=rule.replace(":", ", "))
        axis.set_xticks(lags)
        axis.set(xlabel="lag, rollouts since the weights that sampled", ylabel="training reward, points")
        best = max((found.mean(axis=1).max() for found in points.values()), default=100)
        axis.set_ylim(bottom=max(axis.get_ylim()[0], best - DEPTH))
        axis.set_title(outcome.part.regime.title.split(":")[0])
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save(figure, path)


def plot_engine_steps(outcomes: Sequence[Outcome], path: Path) -> None:
    """Plot the held-out accuracy of our rule against engine steps, waiting and with carry-over, a panel per task."""
    figure, axes = plt.subplots(
        1, len(outcomes), figsize=(5 * len(outcomes), 4), sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, outcome in zip(axes.flat, outcomes, strict=True):
        for condition, (colour, line) in zip(
            [Condition(outcome.part.regime.task), *outcome.carried],
            ((GREY, "s--"), (ORANGE, "o-"), (BLUE, "^-."), (GREEN, "v:")),
            strict=False,
        ):
            results = outcome.of_rule(OURS, condition)
            if not results:
                continue
            engine, values = mean_curve(results, "held-out accuracy")
            by_seed = 100 * np.array([accuracy_curve(result)[1] for result in results])
            axis.fill_between(engine, by_seed.min(axis=0), by_seed.max(axis=0), color=colour, alpha=0.15, linewidth=0)
            text = f"S = {condition.carry_over}" if condition.carry_over else "waits for every response"
            axis.plot(engine, 100 * np.array(values), line, color=colour, linewidth=2, markersize=5, label=text)
            if not condition.carry_over:
                axis.axhline(100 * values[-1], color=colour, linewidth=0.8)
        axis.set(xlabel="decoding steps of the engine", title=outcome.part.regime.task.replace("_", " "))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="lower right")
    axes[0, 0].set_ylabel("held-out accuracy, %")
    save(figure, path)
