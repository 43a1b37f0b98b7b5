"""Figures of the study: mean over seeds, with a band from the lowest to the highest seed."""

import csv
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tic_grpo_trl.metrics.run_summary import AMBER, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, series, smooth

from .tables import ACCURACY, RATIO_METRICS, Result, Results, label, mean_metric


# Okabe and Ito's colours with different line styles, so that colour is not needed to distinguish algorithms
STYLES = [
    (GREY, "-"),
    (BLUE, "--"),
    (ORANGE, "-"),
    (GREEN, "-."),
    (PURPLE, ":"),
    (AMBER, "--"),
    (SKY, "-"),
]
WINDOW = 16  # moving average of the training reward, in updates
DPI = 110


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _band(axis: Axes, results: Sequence[Result], name: str, window: int, style: tuple[str, str], text: str) -> None:
    """Plot a metric against the update: mean over seeds, and a band from the lowest to the highest seed."""
    curves = []
    for result in results:
        steps, values = series(result.history, name)
        if values:
            curves.append((steps, smooth(steps, values, window)))
    if not curves:
        return
    shortest = min(len(steps) for steps, _ in curves)
    steps = curves[0][0][:shortest]
    by_seed = np.array([values[:shortest] for _, values in curves])  # (seeds, steps)
    colour, line = style
    axis.fill_between(steps, by_seed.min(axis=0), by_seed.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    axis.plot(steps, by_seed.mean(axis=0), line, color=colour, linewidth=2, label=text)


def plot_comparison(results: Results, algorithms: Sequence[str], path: Path) -> None:
    """Plot held-out accuracy (left) and training reward (right) against the update, as in v5 Fig. 3 and 4."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharex=True, constrained_layout=True)
    for algorithm, style in zip([algorithm for algorithm in algorithms if algorithm in results], STYLES, strict=False):
        _band(left, results[algorithm], ACCURACY, 1, style, label(algorithm))
        _band(right, results[algorithm], "reward", WINDOW, style, label(algorithm))
    left.set(xlabel="update", ylabel="held-out accuracy, share of problems")
    right.set(xlabel="update", ylabel=f"training reward, mean of {WINDOW} updates")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.legend(frameon=False, loc="best")
    save(figure, path)


def _grid_of_algorithms(
    algorithms: list[str], draw: Callable[[Axes, str], None], path: Path, xlabel: str, ylabel: str
) -> None:
    """Draw one small panel per algorithm, with a common legend."""
    columns = min(3, len(algorithms))
    rows = -(-len(algorithms) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.5 * columns, 2.4 * rows + 0.5), sharex=True, sharey=True, squeeze=False
    )
    for axis, algorithm in zip(axes.flat, algorithms, strict=False):
        draw(axis, algorithm)
        axis.set_title(textwrap.fill(label(algorithm), 40), fontsize=10 if len(label(algorithm)) <= 40 else 8)
        axis.grid(alpha=0.3)
    for number, axis in enumerate(axes.flat):
        axis.set_visible(number < len(algorithms))
        axis.xaxis.set_tick_params(labelbottom=number >= len(algorithms) - columns)  # the lowest panel of its column
    figure.supxlabel(xlabel, fontsize=11)
    figure.supylabel(ylabel, fontsize=11)
    handles = {
        text: handle for axis in axes.flat for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="upper center", ncols=len(handles))
    figure.tight_layout(rect=(0.01, 0, 1, 1 - 0.35 / figure.get_figheight()))
    save(figure, path)


def plot_every_algorithm(results: Results, path: Path, baseline: str = "grpo") -> None:
    """Plot the training reward of every algorithm with the baseline's, one panel per algorithm."""

    def draw(axis: Axes, algorithm: str) -> None:
        if baseline in results and algorithm != baseline:
            _band(axis, results[baseline], "reward", WINDOW, (GREY, "--"), label(baseline))
        _band(axis, results[algorithm], "reward", WINDOW, (BLUE, "-"), "the algorithm of the panel")

    _grid_of_algorithms(list(results), draw, path, "update", f"training reward, mean of {WINDOW} updates")


INNER_LINES = {
    "ess": ("effective sample size", BLUE, "o-"),
    "clip_high_pos": ("A > 0 above the cap", GREEN, "^--"),
    "clip_high_neg": ("A < 0 above the cap", ORANGE, "v-."),
    "clip_low_neg": ("A < 0 below the lower bound", GREY, "s:"),
}


def plot_inner_steps(results: Results, path: Path) -> None:
    """Plot effective sample size and clip shares per inner step k = 1 … K, means over all rollouts and seeds."""

    def draw(axis: Axes, algorithm: str) -> None:
        k_max = max(result.run["k"] for result in results[algorithm])
        for name, (text, colour, line) in INNER_LINES.items():
            points = []
            for k in range(1, k_max + 1):
                values = [
                    value
                    for result in results[algorithm]
                    if (value := mean_metric(result, f"inner_{k}/{name}")) is not None
                ]
                if values:
                    points.append((k, float(np.mean(values))))
            if points:
                axis.plot(*zip(*points, strict=True), line, color=colour, label=text, markersize=4)
        axis.set_ylim(-0.03, 1.03)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))

    xlabel, ylabel = "inner step k (updates since the rollout)", "share of the mini-batch's responses"
    _grid_of_algorithms(list(results), draw, path, xlabel, ylabel)


def plot_causes(results: Results, path: Path) -> None:
    """Plot reward and ratio metrics, one row per algorithm. Large dots are means, small dots are seeds."""
    panels = {"reward": "training reward, mean over the run"} | RATIO_METRICS
    algorithms = list(results)
    width = 1.8 * len(panels) + 0.085 * max(
        len(label(algorithm)) for algorithm in algorithms
    )  # inches, with the labels on the left
    height = 0.36 * len(algorithms) + 1.5
    figure, axes = plt.subplots(1, len(panels), figsize=(width, height), sharey=True, constrained_layout=True)
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        scale = 100 if title.endswith("%") else 1
        for row, algorithm in enumerate(algorithms):
            found = [r.measure("reward") if name == "reward" else mean_metric(r, name) for r in results[algorithm]]
            values = [scale * value for value in found if value is not None]
            if values:
                axis.plot(values, [row] * len(values), "o", color=BLUE, alpha=0.35, markersize=3)
                axis.plot(np.mean(values), row, "D", color=ORANGE, markersize=6)
        axis.set_xlabel(textwrap.fill(title, 18), fontsize=9)
        axis.grid(alpha=0.3)
        if name not in ("reward", "ess"):
            axis.set_xlim(left=0)
    axes[0].set_yticks(range(len(algorithms)), [label(algorithm) for algorithm in algorithms])
    axes[0].invert_yaxis()
    save(figure, path)


def plot_grid(results: Results, grid: dict[str, dict[str, list[str]]], rates: Sequence[float], path: Path) -> None:
    """Plot the training reward over the run against the learning rate, a panel per algorithm and a line per cap.

    Args:
        results: finished runs of the whole grid.
        grid: algorithm -> label of a line -> specifications, one per learning rate.
        rates: learning rates.
        path: file of the figure.
    """

    def draw(axis: Axes, algorithm: str) -> None:
        for (name, specs), (colour, line) in zip(
            grid[algorithm].items(), ((BLUE, "o-"), (ORANGE, "s--")), strict=False
        ):
            rewards = [np.mean([result.measure("reward") for result in results[one]]) for one in specs]
            axis.plot(rates, rewards, line, color=colour, label=name)
        axis.set_xscale("log")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()

    _grid_of_algorithms(list(grid), draw, path, "learning rate", "training reward, mean over the run")


def plot_published(csv_file: Path, path: Path) -> None:
    """Plot the reward curves that the paper's authors published, raw and averaged over 10 steps.

    Args:
        csv_file: columns `step` and one per method.
        path: file of the figure.
    """
    with csv_file.open() as lines:
        rows = list(csv.DictReader(lines))
    steps = [int(row["step"]) for row in rows]
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    methods = [name for name in ("grpo", "dapo", "gspo", "tic_grpo") if name in rows[0]]
    for name, (colour, line) in zip(methods, (STYLES[0], STYLES[3], STYLES[1], STYLES[2]), strict=False):
        points = [(step, float(row[name])) for step, row in zip(steps, rows, strict=True) if row[name]]
        xs, ys = [step for step, _ in points], [value for _, value in points]
        axis.plot(xs, ys, color=colour, alpha=0.2, linewidth=0.8)
        axis.plot(xs, smooth(xs, ys, 10), line, color=colour, linewidth=2, label=name)
    axis.set(xlabel="training step", ylabel="training reward, mean of 10 steps")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    save(figure, path)
