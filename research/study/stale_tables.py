"""Tables and verdicts of the study of stale data."""

import math
from collections.abc import Sequence
from statistics import fmean

from tic_grpo_trl.metrics.run_summary import table

from .stale_outcome import CURVES, Outcome, engine_step_ratio
from .stale_plan import LENGTH_PAIRS, OURS, RETUNED, RIVALS, SELECTION_SEEDS, Condition
from .stale_results import PREFILLED_AGAIN, StaleResult
from .tables import difference, label, paired_differences, t_interval


CLOSE = 0.01  # to the best rule without lag, in training reward
HALF = 0.5  # of the engine steps
STALE = 2  # the goal's smallest lag
DECISIVE = "held-out accuracy"  # the curve of the goal on engine steps

AGE_CELL = "effective sample size / σ of R in nats / share of A > 0 and of A < 0 above the cap in %"


def _age_cell(results: Sequence[StaleResult], age: int) -> str:
    values: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.line["by_age"].get(str(age), {}).items():
            values.setdefault(name, []).append(value)
    if not values:
        return "–"
    scales = {"ess": (1, 2), "log_std": (1, 2), "clip_high_pos": (100, 1), "clip_high_neg": (100, 1)}
    found = (
        f"{scale * fmean(values[name]):.{digits}f}" if name in values else "–"
        for name, (scale, digits) in scales.items()
    )
    return " / ".join(found)


def lag_ratio_table(outcome: Outcome) -> str:
    """Format the ratios at each lag, once the rollouts have that age, as a Markdown table of rules and lags."""
    header = ["rule", *(f"lag {condition.lag}" for condition in outcome.lagged)]
    rows = [
        [label(spec), *(_age_cell(outcome.of_rule(rule, condition), condition.lag) for condition in outcome.lagged)]
        for rule, spec in outcome.choice.items()
    ]
    return table(header, rows)


def age_ratio_table(outcome: Outcome, condition: Condition) -> str:
    """Format the ratios at each age of a condition with carry-over, as a Markdown table of rules and ages."""
    ages = range(condition.carry_over + 1)
    rows = [
        [label(spec), *(_age_cell(outcome.of_rule(rule, condition), age) for age in ages)]
        for rule, spec in outcome.choice.items()
    ]
    return table(["rule", *(f"age {age}" for age in ages)], rows)


def _differences(outcome: Outcome, rule: str, condition: Condition) -> list[float]:
    """Return how far ours is ahead of a rule in training reward, by seed."""
    return paired_differences(outcome.of_rule(OURS, condition), outcome.of_rule(rule, condition), "reward")


def ahead_verdict(outcome: Outcome) -> str:
    """Say whether ours is ahead of every rival at each lag of at least [`STALE`], by intervals that leave out 0."""
    conditions = [condition for condition in outcome.lagged if condition.lag >= STALE]
    rivals = [rival for rival in RIVALS if rival in outcome.choice]
    rows, failed, known = [], [], 0
    for rival in rivals:
        cells = []
        for condition in conditions:
            differences = _differences(outcome, rival, condition)
            known += len(differences) > 1
            if len(differences) > 1 and t_interval(differences)[0] <= 0:
                failed.append(f"`{rival}` at lag {condition.lag}")
            cells.append(difference(differences, t_interval) if differences else "–")
        rows.append([f"`{rival}`", *cells])
    text = table([f"`{OURS}` minus", *(f"lag {condition.lag}" for condition in conditions)], rows)
    asked = len(RIVALS) * len(conditions)
    if not known:
        verdict = "no results"
    elif failed:
        verdict = f"does not hold: not ahead of {', '.join(failed)}"
    else:
        verdict = f"holds for {known} of {asked} comparisons" + ("" if known == asked else ", the others were not run")
    return f"Ahead of each at lag {STALE} and above: **{verdict}**.\n\n{text}"


def retuned_verdict(outcome: Outcome) -> str:
    """Say whether ours is level, by an interval within a point, with [`RETUNED`] at the best settings for each lag."""
    lines = []
    for condition in outcome.lagged:
        other = outcome.retuned_results(condition)
        differences = paired_differences(outcome.of_rule(OURS, condition), other, "reward")
        if len(differences) > 1:
            low, high = t_interval(differences)
            if low > 0 or high < 0:
                verdict = "ahead" if low > 0 else "behind"
            else:
                verdict = "level" if max(-low, high) <= CLOSE else "not told apart"
            against = label(outcome.retuned[condition])
            lines.append(f"- lag {condition.lag}: **{verdict}** ({difference(differences, t_interval)}; {against})")
    text = (
        f"`{OURS}` minus `{RETUNED}` retuned for each lag, at the settings that were best there in selection, with "
        f"{len(SELECTION_SEEDS)} run per setting. *Level*: the interval lies within ±{100 * CLOSE:.0f} point."
    )
    lacking = [f"lag {condition.lag}" for condition in outcome.lagged if condition not in outcome.part.selection]
    if lacking:
        text += f" Without selection runs, and so without a retuned rule: {', '.join(lacking)}."
    return f"{text}\n\n" + ("\n".join(lines) or "- no results")


def fresh_verdict(outcome: Outcome) -> str:
    """Say whether ours is within a point of the best rule without lag."""
    fresh = next((condition for condition in outcome.lagged if condition.lag == 0), None)
    rewards = {
        rule: fmean(result.measure("reward") for result in results)
        for rule in outcome.choice
        if fresh and (results := outcome.of_rule(rule, fresh))
    }
    if OURS not in rewards:
        return "Within one point of the best at lag 0: **no results**."
    best = max(rewards, key=rewards.__getitem__)
    behind = rewards[best] - rewards[OURS]
    verdict = "holds" if behind <= CLOSE else "does not hold"
    return f"Within one point of the best at lag 0: **{verdict}** (best: `{best}`, {100 * behind:.1f} points ahead)."


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "not reached" if value > 0 else "–"


def _prefilled_again(results: Sequence[StaleResult]) -> str:
    shares = [share for each in results if (share := each.line["ratios"].get(PREFILLED_AGAIN)) is not None]
    return f"{fmean(shares):.2f}" if shares else "–"


def engine_verdict(outcome: Outcome, carry_over: int = 2) -> str:
    """Say whether carry-over needs at most half the engine steps to the final accuracy of the run that waits."""
    fresh = Condition(outcome.part.regime.task)
    carried = Condition(outcome.part.regime.task, carry_over=carry_over)
    rows, verdict = [], "no results"
    for rule, spec in outcome.choice.items():
        ours, waiting = outcome.of_rule(rule, carried), outcome.of_rule(rule, fresh)
        if not ours or not waiting:
            continue
        found = {kind: engine_step_ratio(ours, waiting, kind) for kind in CURVES}
        decisive = found[DECISIVE][0]
        if rule == OURS and not math.isnan(decisive):
            verdict = "holds" if decisive <= HALF else "does not hold"
        per_update = (fmean(each.measure("engine_steps") for each in some) for some in (waiting, ours))
        steps = [f"{each:.1f}" for each in per_update]
        cells = [
            "–" if math.isnan(value) else f"{_ratio(value)} ({_ratio(low)} to {_ratio(high)})"
            for value, low, high in found.values()
        ]
        rows.append([label(spec), *steps, _prefilled_again(ours), *cells])
    header = ["rule", "steps per update, S = 0", f"S = {carry_over}", "tokens prefilled again per token"]
    header += [f"ratio to the same {kind}" for kind in CURVES]
    text = f"S = {carry_over} reaches the final {DECISIVE} of S = 0 in at most half the engine steps: **{verdict}**."
    note = (
        "The ratio for the training reward is information only, because carry-over trains on short and easy groups "
        "first, and the mean reward is then over other prompts."
    )
    return f"{text} {note}\n\n{table(header, rows)}" if rows else text


def length_table(outcome: Outcome) -> str:
    """Format the claims on length normalisation: differences in training reward and held-out accuracy, in points."""
    condition = Condition(outcome.part.regime.task)
    rows = []
    for first, second in LENGTH_PAIRS:
        results = outcome.of_rule(first, condition), outcome.of_rule(second, condition)
        pairs = [paired_differences(*results, measure) for measure in ("reward", "accuracy")]
        if pairs[0]:
            rows.append([f"`{first}` minus `{second}`", *(difference(each, t_interval) for each in pairs)])
    return table(["", "training reward", "held-out accuracy"], rows)
