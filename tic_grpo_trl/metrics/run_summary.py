"""Summarize and plot a run from its log history (`trainer.state.log_history`)."""

import re
from bisect import bisect_right
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt

from ..config import TICGRPOConfig
from .ratios import DEFAULT, QUANTILES


# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
AMBER, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"

NOISE_FLOOR = "trajectory_ratio/noise_floor"
CARRIED = "carry_over/share"
CURRENT_WEIGHTS = "inner_1/age_0/log_std"  # the noise floor with carry-over
INNER_STEP = re.compile(r"trajectory_ratio/inner_(\d+)/log_std")
LINES = 4  # most inner steps in a figure

LogHistory = list[dict[str, Any]]


def series(log_history: LogHistory, name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one metric, in order, from the entries that have it."""
    points = [(entry["step"], entry[name]) for entry in log_history if entry.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_name(reward_name: str) -> str:
    """Return the metric with the mean held-out reward of a reward function."""
    return f"eval_rewards/{reward_name}/mean"


def inner_steps(log_history: LogHistory) -> list[int]:
    """Return the inner steps, out of k = 1 … K, that have metrics of their own, in order."""
    return sorted({int(match[1]) for entry in log_history for match in map(INNER_STEP.fullmatch, entry) if match})


def ratio_means(log_history: LogHistory) -> dict[str, float]:
    """Average the ratio metrics over a run: over all updates and, under `inner_<k>/`, over each inner step.

    The keys are the metrics' names without `trajectory_ratio/`; quantiles of R are in nats.
    """
    places = ["", *(f"inner_{k}/" for k in inner_steps(log_history))]
    names = {f"{place}{name}": f"trajectory_ratio/{place}{name}" for place in places for name in DEFAULT}
    names |= {"noise_floor": NOISE_FLOOR, CURRENT_WEIGHTS: f"trajectory_ratio/{CURRENT_WEIGHTS}"}
    names |= {name: name for name in ("frac_non_finite", "update/skipped", CARRIED, "carry_over/mean_age")}
    values = {short: series(log_history, name)[1] for short, name in names.items()}
    return {short: fmean(of_name) for short, of_name in values.items() if of_name}


def summarize_run(log_history: LogHistory, args: TICGRPOConfig, reward_name: str) -> dict[str, Any]:
    """Summarize a run's settings and results.

    Args:
        log_history: of the trainer's state.
        args: the run's configuration.
        reward_name: the reward function whose held-out mean is the accuracy.

    Returns:
        Values that JSON can store. The accuracy is `None` without an evaluation, `seconds` are those of `train()` with
        its evaluations, and [`ratio_means`] describes `ratios`.
    """
    _, accuracy = series(log_history, accuracy_name(reward_name))
    packages = ("tic-grpo-trl", "trl", "transformers", "torch", "accelerate")
    return {
        "accuracy_before": accuracy[0] if accuracy else None,
        "accuracy_after": accuracy[-1] if accuracy else None,
        "updates": log_history[-1]["step"] if log_history else 0,
        "seconds": sum(series(log_history, "train_runtime")[1]),
        "seed": args.seed,
        **args.resolved_algorithm,
        "ratios": ratio_means(log_history),
        "versions": {package: version(package) for package in packages},
    }


def smooth(steps: list[int], values: list[float], window: int) -> list[float]:
    """Average, for each step in order, the values of the last `window` steps."""
    return [fmean(values[bisect_right(steps, step - window) : bisect_right(steps, step)]) for step in steps]


def plot_curves(log_history: LogHistory, path: str | Path, reward_name: str, window: int = 20) -> None:
    """Plot a run's learning curves and its ratios.

    The panels show reward and held-out accuracy, response length, effective sample size and spread of R per inner step,
    quantiles of R, and clip shares by the advantage's sign. With `log_all_ratio_metrics`, up to four inner steps are
    drawn and the quantiles are those at the last one, otherwise the first and the last inner step, and the quantiles
    over all updates.

    Args:
        log_history: of the trainer's state.
        path: of the figure; its extension decides the format.
        reward_name: the reward function whose held-out mean is the accuracy.
        window: number of updates that the thick lines average over.
    """
    figure, axes = plt.subplots(3, 2, figsize=(10, 9.4), sharex=True, constrained_layout=True)

    def draw(axis, name: str, label: str, colour, faint: bool = True):
        steps, values = series(log_history, name)
        if values and faint:
            axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        if values:
            axis.plot(steps, smooth(steps, values, window), color=colour, linewidth=2, label=label)

    draw(axes[0, 0], "reward", "training reward", BLUE)
    steps, accuracy = series(log_history, accuracy_name(reward_name))
    if accuracy:
        axes[0, 0].plot(steps, accuracy, "o-", color=ORANGE, linewidth=2, label="held-out accuracy")
    axes[0, 0].set(ylabel="mean reward per response", ylim=(0, 1) if max([0, *accuracy]) <= 1 else None)
    draw(axes[0, 1], "completions/mean_length", "mean response length", GREEN)
    axes[0, 1].set(ylabel="tokens", ylim=(0, None))

    inner = inner_steps(log_history)
    if not inner:  # one update per rollout, or a history with only means over the inner steps
        draw(axes[1, 0], "trajectory_ratio/ess", "effective sample size", BLUE)
        draw(axes[1, 1], "trajectory_ratio/log_std", "all updates", BLUE)
    shown = sorted({inner[i * (len(inner) - 1) // (LINES - 1)] for i in range(LINES)}) if inner else []
    colours = plt.get_cmap("viridis")([0.9 - 0.9 * i / max(1, len(shown) - 1) for i in range(len(shown))])
    for k, colour in zip(shown, colours, strict=True):  # the last k darkest
        draw(axes[1, 0], f"trajectory_ratio/inner_{k}/ess", f"k = {k}", colour, faint=k == shown[-1])
        label = f"k = {k}" + " (noise floor)" * (k == 1 and not any(series(log_history, CARRIED)[1]))
        draw(axes[1, 1], f"trajectory_ratio/inner_{k}/log_std", label, colour, faint=k == shown[-1])
    draw(axes[1, 1], f"trajectory_ratio/{CURRENT_WEIGHTS}", "k = 1, age 0 (noise floor)", GREY, faint=False)
    for step, noise in zip(*series(log_history, NOISE_FLOOR), strict=True):
        axes[1, 1].axhline(noise, color=GREY, linestyle=":", label=f"measured at update {step}: {noise:.2g}")
    axes[1, 0].set(ylabel="effective sample size, share of n", ylim=(0, 1.02))
    axes[1, 1].set(ylabel="standard deviation of R, nats", ylim=(0, None))

    last, at = "", ""
    if inner and series(log_history, f"trajectory_ratio/inner_{inner[-1]}/log_q05")[1]:
        last, at = f"inner_{inner[-1]}/", f" at k = {inner[-1]}"
    for name, text, line in zip(QUANTILES, ("5 %", "50 %", "95 %"), (ORANGE, GREY, BLUE), strict=True):
        draw(axes[2, 0], f"trajectory_ratio/{last}{name}", text, line)
    axes[2, 0].set(ylabel=f"quantiles of R{at}, nats", xlabel="update")
    draw(axes[2, 1], "trajectory_ratio/clip_high_pos", "above the cap, A > 0", BLUE)
    draw(axes[2, 1], "trajectory_ratio/clip_high_neg", "above the cap, A < 0", ORANGE)
    if any(series(log_history, "trajectory_ratio/clip_low_neg")[1]):  # clip modes without a lower bound log zeros
        draw(axes[2, 1], "trajectory_ratio/clip_low_neg", "below the lower bound, A < 0", GREY)
    axes[2, 1].set(ylabel="share of responses of that sign", ylim=(0, None), xlabel="update")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, loc="lower right" if axis is axes[1, 0] else "best")
    figure.savefig(path, dpi=120)
    plt.close(figure)
