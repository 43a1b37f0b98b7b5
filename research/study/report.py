"""Write the reports of the study, with Markdown and figures, from finished runs."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from .figures import plot_causes, plot_comparison, plot_every_algorithm, plot_grid, plot_inner_steps, plot_published
from .runs import SETTINGS, TASKS
from .tables import MEASURES, Results, bootstrap_interval, comparison_table, label, paired_differences, ratio_table
from .tuning import REGIMES, SELECTION_SEEDS, choose, grid_table, lines_of


PUBLISHED = Path("docs/study/qwen3_8b_train_reward.csv")  # in the repository
PACKAGES = ("tic-grpo-trl", "trl", "transformers", "torch", "accelerate", "datasets")

TABLE_1 = ("grpo", "gspo", "tic_grpo")  # the paper's methods
TABLE_2 = ("grpo", "grpo_traj_is", "grpo2", "tic_grpo")  # its ablation
FIGURE_1 = ("grpo", "grpo_no_is")

HOW_TO_READ = (
    "In points: mean over seeds ± standard deviation (difference from `grpo` on the same seeds, and its 95 % bootstrap "
    "interval over seeds; with few seeds it is too narrow). Settings of an algorithm: lr is `learning_rate`, 1 − ε and "
    "1 + ε_high are the bounds of the weight, and σ is `length_scaled_cap`."
)


def _provenance(arguments: Sequence[str], results: Results) -> str:
    runs = [result for algorithm in results.values() for result in algorithm]
    task, k = TASKS[runs[0].run["task"]], runs[0].run["k"]
    terms = f"{task.term_counts[0]} to {task.term_counts[-1]}"
    own = ", ".join(f"{name} {value}" for name, value in runs[0].run["settings"]) or "none"
    return (
        f"Command: `python -m research.study {' '.join(arguments)}`. Versions: "
        + ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        + f".\n\nTask: sums of {terms} digits with the embedded model, at most {task.max_completion_length} tokens per "
        f"response; {runs[0].run['steps']} updates of {SETTINGS['per_device_train_batch_size']} responses "
        f"({SETTINGS['num_generations']} per prompt), K = {k} updates per rollout; learning rate "
        f"{SETTINGS['learning_rate']:g}, {SETTINGS['lr_scheduler_type']}, unless the algorithm or the settings "
        f"below specify another; {runs[0].run['test_size']} held-out problems, one answer each at temperature 1. "
        f"Settings for all runs: {own}."
    )


def verdicts(results: Results, baseline: str = "grpo", measure: str = "reward") -> str:
    """List the algorithms ahead of, equal to and behind the baseline, judged by the bootstrap interval."""
    groups: dict[str, list[str]] = {"ahead of": [], "about equal to": [], "behind": []}
    for algorithm, runs in results.items():
        differences = paired_differences(runs, results.get(baseline, []), measure)
        if algorithm == baseline or len(differences) < 2:  # one seed has no interval
            continue
        low, high = bootstrap_interval(differences)
        group = "ahead of" if low > 0 else "behind" if high < 0 else "about equal to"
        groups[group].append(f"{label(algorithm)} ({100 * fmean(differences):+.1f})")
    return "\n".join(
        f"- {group} `{label(baseline)}`: {', '.join(algorithms) or 'none'}" for group, algorithms in groups.items()
    )


def report_comparison(results: Results, folder: str | Path, name: str, arguments: Sequence[str]) -> Path:
    """Write `<name>.md` and its figures to `folder`.

    Args:
        results: finished runs, with the same settings except those of the algorithm.
        folder: folder to write to.
        name: name of the report; figures are `<name>_<figure>.png`.
        arguments: command-line arguments to quote in the report.

    Returns:
        Path of the report.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    algorithms = list(results)
    # if grpo was only run with changed settings, compare with that run
    baseline = (
        "grpo"
        if "grpo" in results
        else next((algorithm for algorithm in algorithms if algorithm.startswith("grpo:")), "grpo")
    )
    how_to_read = HOW_TO_READ.replace("`grpo`", f"`{label(baseline)}`")
    parts = [f"# Study: {name}", _provenance(arguments, results), "## All algorithms", how_to_read]
    parts += [comparison_table(results, algorithms, baseline)]
    if baseline in results and len(algorithms) > 1:
        parts += [f"By {MEASURES['reward']}, where the interval excludes 0:", verdicts(results, baseline)]

    def figure(suffix: str, title: str, draw) -> None:
        path = folder / f"{name}_{suffix}.png"
        draw(path)
        parts.append(f"![{title}]({path.name})")

    named = (
        ("table1", "The paper's methods (as its Table 1 and Fig. 3)", TABLE_1),
        ("table2", "The ablation (as Table 2 and Fig. 4)", TABLE_2),
        ("fig1", "Without importance sampling (as Fig. 1)", FIGURE_1),
    )
    for suffix, title, rows in named:
        if set(rows) <= set(algorithms):
            parts += [f"## {title}", comparison_table(results, rows)]
            figure(suffix, title, lambda path, rows=rows: plot_comparison(results, rows, path))
    parts += ["## Every algorithm"]
    figure(
        "algorithms", "training reward of every algorithm", lambda path: plot_every_algorithm(results, path, baseline)
    )
    parts += [
        "## Why: the trajectory ratios",
        "Means over all updates and seeds of the ratio P_θ/P_old of whole responses, before the clip. The clip shares "
        "refer to the algorithm's own rule and level, that is to responses, or to tokens at token level.",
        ratio_table(results, algorithms),
    ]
    figure("causes", "reward beside the ratios", lambda path: plot_causes(results, path))
    figure(
        "inner", "effective sample size and clip shares per inner step", lambda path: plot_inner_steps(results, path)
    )
    if PUBLISHED.exists() and set(TABLE_1) <= set(algorithms):
        parts += [
            "## The authors' published run",
            "Training reward of Qwen3-8B, published by the paper's authors with their code "
            "(https://github.com/pangleipll/dynamic_sen_clip, linked in Appendix A of v2). It is not a run of this "
            "package.",
        ]
        figure("published", "the authors' Qwen3-8B curves", lambda path: plot_published(PUBLISHED, path))
    path = folder / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def report_tuned(
    grids: dict[str, Results],
    finals: dict[str, Results],
    algorithms: Sequence[str],
    folder: str | Path,
    name: str,
    arguments: Sequence[str],
) -> Path:
    """Write the report of the tuned comparison and its figures to `folder`.

    Args:
        grids: runs on the selection seeds, by regime.
        finals: runs of each algorithm's best settings on the other seeds, by regime.
        algorithms: algorithms, in order.
        folder: folder to write to.
        name: name of the report.
        arguments: command-line arguments to quote in the report.

    Returns:
        Path of the report.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        f"# Study: {name}",
        "Every algorithm gets the same number of learning rates and caps. Its setting with the best training reward on "
        "the selection seeds is then run on other seeds.",
    ]
    for key, regime in REGIMES.items():
        results = finals[key]
        best = choose(grids[key], algorithms, regime)
        baseline = best.get("grpo", "")
        seeds = ", ".join(map(str, SELECTION_SEEDS))
        parts += [
            f"## {regime.title}",
            _provenance(arguments, results),
            f"The grid, {MEASURES['reward']} in points, on seeds {seeds} (chosen: bold):",
            grid_table(grids[key], algorithms, regime),
            "The best settings on the other seeds. " + HOW_TO_READ.replace("`grpo`", "`grpo` at its best setting"),
            comparison_table(results, list(best.values()), baseline),
            f"By {MEASURES['reward']}, where the interval excludes 0:",
            verdicts(results, baseline),
            "Ratios, means over all updates and seeds:",
            ratio_table(results, list(best.values())),
        ]
        for suffix, title, draw in (
            ("causes", "reward beside the ratios", plot_causes),
            ("inner", "effective sample size and clip shares per inner step", plot_inner_steps),
            (
                "algorithms",
                "training reward of every algorithm",
                lambda r, p, b=baseline: plot_every_algorithm(r, p, b),
            ),
        ):
            path = folder / f"{name}_{key}_{suffix}.png"
            draw(results, path)
            parts.append(f"![{regime.title}: {title}]({path.name})")
        # shows how an algorithm does with settings other than its best
        path = folder / f"{name}_{key}_grid.png"
        plot_grid(
            grids[key],
            {algorithm: lines_of(algorithm, regime) for algorithm in algorithms},
            regime.learning_rates,
            path,
        )
        parts.append(f"![{regime.title}: the whole grid]({path.name})")
    path = folder / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path
