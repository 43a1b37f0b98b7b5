"""What the study of stale data has found: chosen settings, results by condition, engine steps to a level."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from tic_grpo_trl.metrics.run_summary import smooth

from .runs import Run
from .stale_plan import RETUNED, SELECTION_SEEDS, Condition, Part
from .stale_results import ENGINE_STEPS, LAST_ROLLOUTS, ResultsFile, StaleResult
from .tables import Results
from .tuning import candidates


@dataclass(frozen=True)
class Outcome:
    """The results of a part of the plan.

    Args:
        part: the part.
        choice: specification of each rule whose selection runs are all finished, by rule.
        grid: results of the selection runs.
        retuned: the specification of [`RETUNED`] that is best in a condition by its own selection runs.
        finals: results on the report seeds by condition, as far as there are any.
    """

    part: Part
    choice: dict[str, str]
    grid: Results
    retuned: dict[Condition, str]
    finals: dict[Condition, Results]

    @classmethod
    def of(cls, part: Part, file: ResultsFile, seeds: Sequence[int]) -> "Outcome":
        """Choose the settings and collect the results that there are."""
        runs = part.selection_runs()
        grid = file.results(runs)
        choice = part.choose(grid, _complete(part, grid, len(SELECTION_SEEDS) * len(part.selection)))
        retuned = {}
        for condition in part.selection if RETUNED in part.rules else ():
            own = file.results(run for run in runs if Condition.of(run.fields) == condition)
            if RETUNED in _complete(part, own, len(SELECTION_SEEDS)):
                retuned[condition] = part.choose(own, [RETUNED])[RETUNED]
        finals = {
            condition: file.results(part.report_runs(condition, _specs(choice, retuned, condition), seeds))
            for condition in part.conditions
        }
        return cls(part, choice, grid, retuned, {condition: found for condition, found in finals.items() if found})

    def runs(self, condition: Condition, seeds: Sequence[int]) -> list[Run]:
        """List the runs of the chosen settings in a condition."""
        return self.part.report_runs(condition, _specs(self.choice, self.retuned, condition), seeds)

    def of_rule(self, rule: str, condition: Condition) -> list[StaleResult]:
        """Return the results of a rule with its chosen settings, by seed."""
        return self.finals.get(condition, {}).get(self.choice.get(rule, ""), [])  # type: ignore[return-value]

    def retuned_results(self, condition: Condition) -> list[StaleResult]:
        """Return the results of [`RETUNED`] with the settings that are best in the condition, by seed."""
        return self.finals.get(condition, {}).get(self.retuned.get(condition, ""), [])  # type: ignore[return-value]

    @property
    def lagged(self) -> list[Condition]:
        """List the conditions without carry-over that have results, by lag."""
        return sorted(condition for condition in self.finals if not condition.carry_over)

    @property
    def carried(self) -> list[Condition]:
        """List the conditions with carry-over that have results, by S."""
        return sorted(condition for condition in self.finals if condition.carry_over)


def _complete(part: Part, grid: Results, runs: int) -> list[str]:
    """Return the rules all of whose candidates have so many results."""
    return [
        rule
        for rule in part.rules
        if not part.selection or all(len(grid.get(each, ())) == runs for each in candidates(rule, part.regime))
    ]


def _specs(choice: dict[str, str], retuned: dict[Condition, str], condition: Condition) -> list[str]:
    return list(dict.fromkeys([*choice.values(), *([retuned[condition]] if condition in retuned else [])]))


# Curves over engine steps


def reward_curve(result: StaleResult) -> tuple[list[float], list[float]]:
    """Return engine steps so far and the mean training reward of the last six rollouts, after each rollout."""
    reward = result.line["reward"]
    return list(accumulate(result.line[ENGINE_STEPS])), smooth(list(range(len(reward))), reward, LAST_ROLLOUTS)


def accuracy_curve(result: StaleResult) -> tuple[list[float], list[float]]:
    """Return engine steps so far and held-out accuracy, at each evaluation."""
    used = [0, *accumulate(result.line[ENGINE_STEPS])]
    steps, accuracy = zip(*result.line["accuracy"], strict=True)
    return [used[step // result.run["k"]] for step in steps], list(accuracy)


CURVES = {"training reward": reward_curve, "held-out accuracy": accuracy_curve}


def mean_curve(results: Sequence[StaleResult], kind: str) -> tuple[list[float], list[float]]:
    """Average a curve of [`CURVES`] over seeds, engine steps and values alike."""
    engine, values = zip(*map(CURVES[kind], results), strict=True)
    return np.mean(engine, axis=0).tolist(), np.mean(values, axis=0).tolist()


def steps_to(level: float, engine: Sequence[float], values: Sequence[float]) -> float:
    """Return the engine steps until a curve reaches a level, on the line between its points; inf if it never does."""
    i = next((i for i, value in enumerate(values) if value >= level), None)
    if i is None:
        return math.inf
    if i == 0:
        return engine[0]
    share = (level - values[i - 1]) / (values[i] - values[i - 1])
    return engine[i - 1] + share * (engine[i] - engine[i - 1])


def engine_step_ratio(
    carried: Sequence[StaleResult], waiting: Sequence[StaleResult], kind: str, resamples: int = 1000
) -> tuple[float, float, float]:
    """Compare the engine steps of two conditions until the mean curve reaches the final level of the waiting one.

    Args:
        carried: results with carry-over.
        waiting: results that wait for every response, with some of the same seeds.
        kind: key of [`CURVES`].
        resamples: number of bootstrap resamples of the seeds that both have (numpy's generator, seed 0).

    Returns:
        The ratio of steps, inf if the level is not reached, and its 95 % bootstrap interval; NaN if the conditions have
        no seed in common, or the waiting runs are at their final level before training.
    """
    pairs = [(one, other) for one in carried for other in waiting if one.seed == other.seed]
    if not pairs:
        return math.nan, math.nan, math.nan

    def ratio(chosen: Sequence[int]) -> float:
        ours, reference = (mean_curve([pairs[i][side] for i in chosen], kind) for side in (0, 1))
        level = reference[1][-1]
        waited = steps_to(level, *reference)
        return steps_to(level, *ours) / waited if waited else math.nan  # it was there before training

    draws = np.random.default_rng(0).integers(len(pairs), size=(resamples, len(pairs)))
    low, high = np.quantile([ratio(draw) for draw in draws], (0.025, 0.975), method="nearest")  # inf is no mean
    return ratio(range(len(pairs))), float(low), float(high)
