"""Figures and summaries from the log history of a run (`trainer.state.log_history`)."""

from bisect import bisect_right
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt

from .config import TICGRPOConfig


# Okabe and Ito's colours, told apart by colour-blind readers too
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
AMBER, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"

LogHistory = list[dict[str, Any]]


def series(log_history: LogHistory, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, in order; entries without it (or with `None`) are left out."""
    points = [(entry["step"], entry[name]) for entry in log_history if entry.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_name(reward_name: str) -> str:
    """The log history's name for the mean held-out reward of a reward function."""
    return f"eval_rewards/{reward_name}/mean"


def summarize_run(log_history: LogHistory, args: TICGRPOConfig, reward_name: str) -> dict[str, Any]:
    """What a run was and what came out.

    Args:
        log_history: as the trainer kept it.
        args: the run's configuration.
        reward_name: the reward function whose held-out mean is the accuracy.

    Returns:
        JSON-ready: `accuracy_before` and `accuracy_after` (first and last evaluation, `None` without one), `updates`,
        `seconds` (of `train()`, evaluations included), `seed`, the arm's settings in force, `versions`.
    """
    _, accuracy = series(log_history, accuracy_name(reward_name))
    _, seconds = series(log_history, "train_runtime")
    packages = ("tic-grpo-trl", "trl", "transformers", "torch", "accelerate")
    return {
        "accuracy_before": accuracy[0] if accuracy else None,
        "accuracy_after": accuracy[-1] if accuracy else None,
        "updates": log_history[-1]["step"] if log_history else 0,
        "seconds": sum(seconds),
        "seed": args.seed,
        **args.resolved_arm,
        "versions": {package: version(package) for package in packages},
    }


def smooth(steps: list[int], values: list[float], window: int) -> list[float]:
    """Mean of the values whose step lies within the last `window` steps, for each step (in order)."""
    return [fmean(values[bisect_right(steps, step - window) : bisect_right(steps, step)]) for step in steps]


def plot_curves(log_history: LogHistory, path: str | Path, reward_name: str, window: int = 20) -> None:
    """Draw a run's learning curves: reward, held-out accuracy, response length, effective sample size, clip share.

    Args:
        log_history: as the trainer kept it.
        path: where to write the figure (the ending decides the format).
        reward_name: the reward function whose held-out mean is the accuracy.
        window: updates to average over for the thick lines.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, constrained_layout=True)

    def draw(axis, name: str, label: str, colour: str):
        steps, values = series(log_history, name)
        if values:
            axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
            axis.plot(steps, smooth(steps, values, window), color=colour, linewidth=2, label=label)

    draw(axes[0, 0], "reward", "training reward", BLUE)
    steps, accuracy = series(log_history, accuracy_name(reward_name))
    if accuracy:
        axes[0, 0].plot(steps, accuracy, "o-", color=ORANGE, linewidth=2, label="held-out accuracy")
    axes[0, 0].set(ylabel="mean reward per response", ylim=(0, 1) if not accuracy or max(accuracy) <= 1 else None)
    draw(axes[0, 1], "completions/mean_length", "mean response length", GREEN)
    axes[0, 1].set(ylabel="tokens", ylim=(0, None))
    draw(axes[1, 0], "trajectory_ratio/ess", "effective sample size", BLUE)
    axes[1, 0].set(ylabel="share of the mini-batch", ylim=(0, 1.02))
    draw(axes[1, 1], "trajectory_ratio/clip_high_pos", "above the cap, A > 0", BLUE)
    draw(axes[1, 1], "trajectory_ratio/clip_high_neg", "above the cap, A < 0", ORANGE)
    if any(series(log_history, "trajectory_ratio/clip_low_neg")[1]):  # rules without a lower bound log zeros
        draw(axes[1, 1], "trajectory_ratio/clip_low_neg", "below the lower bound, A < 0", GREY)
    axes[1, 1].set(ylabel="share of responses of that sign", ylim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, loc="lower right" if axis is axes[1, 0] else "best")
    for axis in axes[1]:
        axis.set_xlabel("update")
    figure.savefig(path, dpi=120)
    plt.close(figure)
