"""Measures carry-over, in pure functions: how old the responses of a rollout are, and what generating them took."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from .engine import EngineUse
from .pool import Group


@dataclass(frozen=True)
class CarryOverCounts:
    """Hold what one process knows about a generation call; processes gather these."""

    responses: list[tuple[int, int, int]]  # of the rollout: age in rollouts, versions that wrote it, tokens
    pool_groups: int  # that stay in the pool
    pool_unfinished: int  # responses of these groups that have not ended
    use: EngineUse


def count_carry_over(
    released: Iterable[Group], remaining: Iterable[Group], use: EngineUse, version: int
) -> CarryOverCounts:
    """Count the responses of a rollout and of the pool that remains, by age and version.

    Args:
        released: the groups of the rollout, of which this process counts the responses; all tokens have versions.
        remaining: the groups that stay in the pool.
        use: what the engine did for this rollout.
        version: number of the generation call, which is the version of the current weights.

    Over all processes, each group and each engine must be counted once: a process that shares a pool or an engine with
    another one passes no groups, or `EngineUse()`.
    """
    remaining = list(remaining)
    return CarryOverCounts(
        [
            (version - min(each.versions, default=version), len(set(each.versions)), len(each.tokens))
            for group in released
            for each in group.responses
        ],
        len(remaining),
        sum(not each.finished for group in remaining for each in group.responses),
        use,
    )


def carry_over_metrics(counts: Iterable[CarryOverCounts]) -> dict[str, float]:
    """Compute the metrics of one rollout from the counts of every process.

    Returns:
        Floats by name, all under `carry_over/`: `mean_age` and `max_age` (rollouts from a response's first token to the
        rollout that trains on it), `mean_span` and `max_span` (versions of the weights that wrote a response), `share`
        (of responses with tokens of earlier weights), `mean_length_age_<a>` (tokens of the responses of age a),
        `prefilled_again_per_token` (tokens prefilled again by token released), `pool_groups` and `pool_unfinished`
        (groups and unfinished responses that remain), `engine_steps` (of the engine that made the most) and
        `slot_occupancy` (share of the slots of all steps that sampled a token). The last two are left out if the
        engines don't say.
    """
    counts = list(counts)
    responses = [each for of_process in counts for each in of_process.responses]
    uses = [of_process.use for of_process in counts]
    metrics: dict[str, float] = {
        "pool_groups": sum(each.pool_groups for each in counts),
        "pool_unfinished": sum(each.pool_unfinished for each in counts),
    }
    if responses:
        ages, spans, lengths = zip(*responses, strict=True)
        metrics |= {"mean_age": fmean(ages), "max_age": max(ages), "mean_span": fmean(spans), "max_span": max(spans)}
        metrics["share"] = fmean(age > 0 for age in ages)
        for age in sorted(set(ages)):
            metrics[f"mean_length_age_{age}"] = fmean(tokens for a, _, tokens in responses if a == age)
        metrics["prefilled_again_per_token"] = sum(use.prefilled_again for use in uses) / max(sum(lengths), 1)
    if steps := max((use.steps for use in uses), default=0):
        metrics["engine_steps"] = steps
    if slots := sum(use.steps * use.slots for use in uses):
        metrics["slot_occupancy"] = sum(use.sampled for use in uses if use.steps * use.slots) / slots
    return {f"carry_over/{name}": float(value) for name, value in metrics.items()}
