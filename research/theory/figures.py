"""Figures of the theory report, from [`Results`](experiments.py)."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # figures go to files, also where there is no display

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator

from tic_grpo_trl.metrics.run_summary import AMBER, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY

from .decomposition import IDENTITIES
from .experiments import Results


BLACK = "#000000"
ALGORITHM_STYLES = {
    "tic_grpo": (BLUE, "-", "o"),
    "tic_grpo_released": (SKY, "--", "s"),
    "tic_grpo_capped": (SKY, "-", "d"),
    "tic_grpo_truncated": (PURPLE, "-.", "D"),
    "tic_grpo_v2": (GREY, ":", "v"),
    "grpo": (ORANGE, "-", "^"),
    "grpo2": (GREEN, "--", "P"),
    "grpo_traj_is": (AMBER, "-.", "X"),
    "gspo": (BLACK, ":", "*"),
    "grpo_no_is": (BLACK, "--", "<"),
}
ASCENT_STYLES = {
    "GRPO (1/|o|)": (AMBER, ":", "v"),
    "GRPO (DAPO)": (ORANGE, "-.", "^"),
    "GRPO2": (GREEN, "--", "P"),
    "TIC-GRPO": (BLUE, "-", "o"),
    "TIC-GRPO, no clip": (SKY, (0, (4, 2)), "s"),
}
TERM_STYLES = {
    "gradient error": (ORANGE, "//"),
    "sampling error": (SKY, ""),
    "length error": (AMBER, "\\\\"),
    "clip error": (GREY, "xx"),
}
DPI = 110


def bias_figure(results: Results, path: Path) -> None:
    """Direction error and relative error of every algorithm's expected update against drift."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.6), constrained_layout=True)
    drifts = results.scale.drifts
    panels = (
        (axes[0], False, "relative_error", "bounds out of reach", "relative error ‖u/c − ∇J‖ / ‖∇J‖"),
        (axes[1], False, "direction_error", "bounds out of reach", "direction error (no step size repairs it)"),
        (
            axes[2],
            True,
            "direction_error",
            "with the algorithm's own clip",
            "direction error (no step size repairs it)",
        ),
    )
    for axis, clipped, quantity, title, label in panels:
        for name, by_clip in results.biases.items():
            colour, dashes, marker = ALGORITHM_STYLES[name]
            values = torch.tensor([[getattr(b, quantity) for b in row] for row in by_clip[clipped]])
            xs, values = list(drifts[1:]), values[1:]
            axis.plot(xs, values.mean(-1), color=colour, linestyle=dashes, marker=marker, markersize=5, label=name)
            axis.fill_between(xs, values.amin(-1), values.amax(-1), color=colour, alpha=0.05, linewidth=0)
        axis.set(xscale="log", xlabel="drift: root mean square change of a logit", ylabel=label, title=title)
        axis.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def terms_figure(results: Results, path: Path) -> None:
    """Mean size of each error term against drift, stacked, for the five identities."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.4), sharex=True, sharey=True, constrained_layout=True)
    order = ("v5_a1", "v5_a3", "v5_a2", "v2_eq7", "v2_eq11")
    drifts = results.scale.drifts
    for axis, key in zip(axes.flat, order, strict=False):
        terms = results.terms[key]
        floor = torch.zeros(len(drifts))
        for name, (colour, hatch) in TERM_STYLES.items():
            if name not in terms:
                continue
            top = floor + torch.tensor([size for size, _ in terms[name]])
            axis.fill_between(
                drifts,
                floor,
                top,
                facecolor=colour,
                hatch=hatch,
                alpha=0.75,
                edgecolor="white",
                linewidth=0,
                label=name,
            )
            floor = top
        leading = [size for size, _ in terms["policy gradient"]]
        axis.plot(drifts, leading, color=BLACK, linestyle="--", label="policy-gradient term, one group")
        axis.plot(drifts, [s for s, _ in terms["∇J(θ)"]], color=BLACK, linewidth=2, label="‖∇J(θ)‖")
        axis.set(title=IDENTITIES[key].name)
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylim=(0, None), xlim=(0, max(drifts)))
    for axis in (axes[0, 2], *axes[1, :2]):
        axis.set_xlabel("drift: root mean square change of a logit")
        axis.tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean norm over groups, in units of c/σ")
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _sweep(axis, points, title: str, label: str) -> None:
    xs = [x for x, _ in points]
    for index, (name, (colour, dashes, marker)) in enumerate(ASCENT_STYLES.items()):
        gaps = torch.stack([outcome.gap[index] for _, outcome in points])  # (points, runs)
        log, runs = gaps.log(), gaps.shape[-1]
        middle, error = log.mean(-1), log.std(-1) / runs**0.5
        axis.plot(xs, middle.exp(), color=colour, linestyle=dashes, marker=marker, label=name)
        axis.fill_between(xs, (middle - error).exp(), (middle + error).exp(), color=colour, alpha=0.15, linewidth=0)
    axis.set(xscale="log", yscale="log", title=title, xlabel=label)
    axis.set_xticks(xs, [f"{x:g}" for x in xs])
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(lambda y, _: f"{1e3 * y:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def stationarity_figure(results: Results, path: Path) -> None:
    """Mean ‖∇J‖² against T under three step-size conventions, and against K, η and G."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.8), constrained_layout=True)
    horizon = results.scale.ascent_horizon
    titles = {
        "T, equal η": ("η = 32 for every T and algorithm", "horizon T, tokens"),
        "T, η ∝ T": ("η = 2T for every algorithm", "horizon T, tokens"),
        "T, matched step": ("η = 2T, equal first step size", "horizon T, tokens"),
        "K": (f"T = {horizon}, equal first step size", "inner steps K per rollout"),
        "η/T": (f"T = {horizon}, K = 4, equal first step size", "learning rate η/T"),
        "G": (f"T = {horizon}, K = 4, equal first step size", "group size G, responses per prompt"),
    }
    for axis, (key, (title, label)) in zip(axes.flat, titles.items(), strict=True):
        _sweep(axis, results.ascents[key], title, label)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean ‖∇J‖² over all steps, in 10⁻³")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


MOMENT_STYLES = {
    "scores, own measure": (BLACK, "-", "o"),
    "token weights": (ORANGE, "-.", "^"),
    "token weights, up-only": (GREEN, "--", "P"),
    "trajectory weight": (SKY, ":", "v"),
    "trajectory weight, up-only": (BLUE, "-", "s"),
}


def moments_figure(results: Results, path: Path) -> None:
    """Second moment of the score sums of v5 §4.4 per token, against T."""
    figure, axes = plt.subplots(1, len(results.growth), figsize=(11, 4.9), sharey=True, constrained_layout=True)
    horizons = results.scale.horizons
    for axis, (drift, cases) in zip(axes, results.growth.items(), strict=True):
        for name, (colour, dashes, marker) in MOMENT_STYLES.items():
            of_sum = cases[name][..., 0]  # (horizons, tasks)
            axis.plot(horizons, of_sum.mean(-1), color=colour, linestyle=dashes, marker=marker, label=name)
            axis.fill_between(horizons, of_sum.amin(-1), of_sum.amax(-1), color=colour, alpha=0.12, linewidth=0)
        axis.set(xscale="log", yscale="log", title=f"drift {drift:g}", xlabel="horizon T, tokens")
        axis.set_xticks(horizons, [str(t) for t in horizons])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("E‖Σ_t c_t·∇log π_θ(o_t)‖² / E|o|")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


FIGURES = {
    "bias.png": bias_figure,
    "terms.png": terms_figure,
    "stationarity.png": stationarity_figure,
    "moments.png": moments_figure,
}
