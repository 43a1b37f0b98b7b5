"""Write the report of the study of stale data, with its figures, from the lines of finished runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .runs import SETTINGS, TASKS
from .stale_figures import plot_engine_steps, plot_lag
from .stale_outcome import Outcome
from .stale_plan import (
    EVAL_STEPS,
    OURS,
    SELECTION_SEEDS,
    STEPS,
    TEST_SIZE,
    Condition,
    K,
)
from .stale_results import LAST_ROLLOUTS, ResultsFile
from .stale_tables import (
    AGE_CELL,
    age_ratio_table,
    ahead_verdict,
    engine_verdict,
    fresh_verdict,
    lag_ratio_table,
    length_table,
    retuned_verdict,
)
from .tables import comparison_table, label, t_interval
from .tuning import grid_table


MEASURES = {
    "reward": "training reward, mean over the run",
    "final_reward": f"training reward, last {LAST_ROLLOUTS} rollouts",
    "accuracy": "held-out accuracy at the end",
}
LENGTH = "length"  # the part on length normalisation

HOW_TO_READ = (
    f"In points: mean over seeds ± standard deviation (difference from `{OURS}` on the same seeds, and its 95 % "
    "interval by Student's distribution over the seeds). Each interval is for one comparison, not for all of them "
    "together. All updates have the same number of responses, so that a comparison per update is one per response."
)


def _provenance(
    outcomes: Mapping[str, Outcome], file: ResultsFile, seeds: Sequence[int], arguments: Sequence[str]
) -> str:
    tasks = {outcome.part.regime.task: TASKS[outcome.part.regime.task] for outcome in outcomes.values()}
    updates, limits = (
        ", ".join(f"{number} {what} on `{name}`" for name, number in numbers.items())
        for what, numbers in (
            ("updates", {name: STEPS[name] for name in tasks}),
            ("tokens", {name: task.max_completion_length for name, task in tasks.items()}),
        )
    )
    size, group = SETTINGS["per_device_train_batch_size"], SETTINGS["num_generations"]
    return (
        f"Command: `python -m research.study {' '.join(arguments)}`. Results: `{file.path}`, one line per run. "
        f"Versions: {'; '.join(file.versions())}.\n\n"
        f"A run has {updates}, of {size} responses each ({group} per prompt), with K = {K} updates per rollout and a "
        "constant learning rate. In every condition the ratio is to the sampler's own log-probabilities. *Lag ℓ*: each "
        "rollout is sampled by the weights of ℓ rollouts ago. *S*: `max_carry_over`; these runs have "
        f"half as many updates again, which tables leave out. A response has at most {limits}. "
        f"Every {EVAL_STEPS} updates, {TEST_SIZE} held-out problems are answered once at temperature 1. Seeds: "
        f"{', '.join(map(str, seeds))}."
    )


def _grid(outcome: Outcome) -> list[str]:
    if not outcome.part.selection or not outcome.choice:
        return []
    where = ", ".join(condition.title.removeprefix(f"{condition.task}, ") for condition in outcome.part.selection)
    seeds, steps = ", ".join(map(str, SELECTION_SEEDS)), outcome.part.selection[0].selection_steps
    return [
        f"Settings are chosen by the training reward of {steps} updates, on average over {where} and seeds "
        f"{seeds}, which the comparison doesn't use. The grid in points; the chosen settings are bold, and each rule's "
        "published bounds come first:",
        grid_table(outcome.grid, list(outcome.choice), outcome.part.regime),
    ]


def _condition(outcome: Outcome, condition: Condition, baseline: str) -> list[str]:
    results = outcome.finals[condition]
    order = sorted(results, key=lambda spec: -sum(r.measure("reward") for r in results[spec]) / len(results[spec]))
    return [
        f"### {condition.title}",
        comparison_table(results, order, outcome.choice.get(baseline, ""), MEASURES, t_interval),
    ]


def report_stale(
    outcomes: Mapping[str, Outcome],
    file: ResultsFile,
    seeds: Sequence[int],
    folder: str | Path,
    name: str,
    arguments: Sequence[str],
) -> Path:
    """Write `<name>.md` and its figures to `folder`.

    Args:
        outcomes: results by part of the plan.
        file: where they come from.
        seeds: seeds of the comparison.
        folder: folder to write to.
        name: name of the report; figures are `<name>_<figure>.png`.
        arguments: command-line arguments to quote in the report.

    Returns:
        Path of the report.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    main = {key: outcome for key, outcome in outcomes.items() if key != LENGTH}
    parts = ["# Study: the right weight for stale data", _provenance(outcomes, file, seeds, arguments)]

    def figure(suffix: str, title: str, draw, chosen: list[Outcome]) -> None:
        if chosen:
            path = folder / f"{name}_{suffix}.png"
            draw(chosen, path)
            parts.append(f"![{title}]({path.name})")

    lagged = [outcome for outcome in main.values() if len(outcome.lagged) > 1]
    figure("lag", "training reward of every rule against the lag", plot_lag, lagged)
    parts += [f"## The goal\n\nThe rule is `{OURS}`, named before the seeds of the comparison were run."]
    for outcome in main.values():
        parts += [f"### {outcome.part.regime.title}"]
        parts += [ahead_verdict(outcome), retuned_verdict(outcome), fresh_verdict(outcome), engine_verdict(outcome)]
    figure(
        "engine_steps",
        "held-out accuracy against engine steps, waiting and with carry-over",
        plot_engine_steps,
        [outcome for outcome in main.values() if OURS in outcome.choice and outcome.carried],
    )
    for key, outcome in outcomes.items():
        parts += [f"## {outcome.part.regime.title}", *_grid(outcome)]
        if key == LENGTH:
            parts += ["Differences in points, with 95 % intervals as below:", length_table(outcome)]
        parts += [HOW_TO_READ]
        for condition in outcome.finals:
            parts += _condition(outcome, condition, "grpo" if key == LENGTH else OURS)
        if outcome.retuned and key != LENGTH:
            chosen = "; ".join(f"{condition.title}: {label(spec)}" for condition, spec in outcome.retuned.items())
            parts += [f"Retuned: {chosen}."]
        parts += [f"### Ratios by age\n\nEach cell: {AGE_CELL}.", lag_ratio_table(outcome)]
        for condition in outcome.carried:
            parts += [f"With S = {condition.carry_over}:", age_ratio_table(outcome, condition)]
    path = folder / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path
