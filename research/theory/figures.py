"""Figures of the theory report, from [`Results`](experiments.py)."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # figures go to files, also where there is no display

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator

from tic_grpo_trl.metrics.run_summary import AMBER, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY

from .carry_over import CONSTANT
from .decomposition import IDENTITIES
from .efficiency_grid import mean
from .efficiency_report import compared, relative
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


def _bias_by_update(axis, results: Results) -> None:
    styles = {(0, 1.0): (BLACK, ":", "v"), (1, 1.5): (SKY, "--", "s"), (1, 2.0): (BLUE, "-", "o")}
    styles |= {(2, 2.0): (GREEN, "-.", "^"), (3, 2.0): (ORANGE, ":", "D")}
    updates = range(1, results.carry_over.rollouts + 1)
    for engine, found in results.carry_over.releases.items():
        if engine.prompts == 2:
            key = engine.max_carry_over, engine.oversampling if engine.max_carry_over else 1.0
            colour, dashes, marker = styles[key]
            label = f"S = {key[0]}, O = {key[1]:g}" if key[0] else "waits for all (S = 0)"
            biases = found.biases[CONSTANT]
            axis.plot(updates, biases, color=colour, linestyle=dashes, marker=marker, markersize=5, label=label)
    axis.set(title="two prompts per rollout", xlabel="update of the run", ylabel="bias of one update / ‖∇J‖")
    axis.set_xticks(list(updates))


def _bias_by_bound(axis, results: Results) -> None:
    runs = {
        engine.max_carry_over: found.biases[CONSTANT]
        for engine, found in results.carry_over.releases.items()
        if engine.prompts == engine.group_size == 1
    }
    rollouts = results.carry_over.rollouts
    shown = {
        1: (BLUE, "-", "o"),
        3: (SKY, "--", "s"),
        rollouts // 2 + 1: (GREEN, "-.", "^"),
        rollouts: (ORANGE, ":", "D"),
    }
    for update, (colour, dashes, marker) in shown.items():
        label = f"update {update}" + (", the last" if update == rollouts else "")
        values = [biases[update - 1] for biases in runs.values()]
        axis.plot(list(runs), values, color=colour, linestyle=dashes, marker=marker, label=label)
    axis.set(title="one prompt per rollout, O = S + 1", xlabel="S: max_carry_over", ylabel="bias of one update / ‖∇J‖")
    axis.set_xticks(list(runs))


def _length_by_age(axis, results: Results) -> None:
    styles = {1: (BLUE, "-"), 2: (GREEN, "-."), 3: (ORANGE, ":")}
    for engine, found in results.carry_over.releases.items():
        if engine.prompts == engine.group_size == 1 and engine.max_carry_over:
            colour, dashes = styles[engine.max_carry_over]
            ages = list(found.by_age)
            shares, lengths = zip(*found.by_age.values(), strict=True)
            axis.plot(ages, lengths, color=colour, linestyle=dashes, label=f"S = {engine.max_carry_over}")
            axis.scatter(ages, lengths, s=[400 * share for share in shares], color=colour, alpha=0.8)
    axis.axhline(results.carry_over.mean_length, color=BLACK, linewidth=0.8, linestyle="--", label="all responses")
    axis.set(title="O = S + 1; area of a dot: share of the responses", xlabel="age: rollouts since the first token")
    axis.set(ylabel="mean length, tokens")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _bias_of_learning(axis, results: Results) -> None:
    (by_rate,) = (by for engine, by in results.carry_over.learning.items() if engine.max_carry_over)
    rates = [rate for rate in by_rate if rate]
    axis.plot(
        rates, [by_rate[rate][0] for rate in rates], color=BLUE, marker="o", label="S = 1, mean of the run's updates"
    )
    axis.plot(
        rates, [by_rate[rate][1] for rate in rates], color=SKY, linestyle="--", marker="s", label="S = 1, worst update"
    )
    axis.set(xscale="log", yscale="log", title="policy that learns; S = 0 has no bias", xlabel="learning rate η")
    axis.set(ylabel="bias / ‖∇J‖ at the start")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()


def carry_over_figure(results: Results, path: Path) -> None:
    """Bias of one update against the rollout and S, length against age, and the bias with a policy that learns."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    for axis, draw in zip(axes.flat, (_bias_by_update, _bias_by_bound, _length_by_age, _bias_of_learning), strict=True):
        draw(axis, results)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


RULE_STYLES = {
    "`tic_grpo_adaptive`": (BLUE, "-", "o", "tic_grpo_adaptive"),
    "trajectory, no cap": (SKY, "--", "d", "trajectory weight, no cap"),
    "seq_tis": (GREEN, "--", "P", "seq_tis: held at 2"),
    "cispo": (AMBER, "-.", "X", "cispo: token weight held at 5"),
    "vespo": (PURPLE, "-.", "D", "vespo"),
    "tic_grpo": (BLACK, "-", "s", "tic_grpo: stopped at 1.28"),
    "grpo_no_is": (GREY, ":", "<", "no importance weight"),
    "grpo": (ORANGE, "-", "^", "grpo: PPO's clip"),
    "ctpo": (ORANGE, ":", "v", "ctpo"),
}


def _gain_by_drift(axis, results: Results, n: int) -> None:
    found = results.efficiency
    drifts = found.size.drifts
    for name, (colour, dashes, marker, label) in RULE_STYLES.items():
        values = [100 * compared(found, name, drift, n) for drift in drifts]
        width = 3 if name == "`tic_grpo_adaptive`" else 1.5
        axis.plot(drifts, values, color=colour, linestyle=dashes, marker=marker, linewidth=width, label=label)
    if n in found.size.own_ns:
        cells = [[c for c in found.cells if c.drift == drift and not c.sampled] for drift in drifts]
        own = [[relative(c, mean([v for v, _ in c.own_sample["trajectory"][n]]), n) for c in here] for here in cells]
        label = "tic_grpo_adaptive, cap from the update's own responses"
        axis.plot(drifts, [100 * mean(each) for each in own], color=BLUE, linestyle=":", marker="o", label=label)
    axis.set(title=f"{n:,} responses per update", ylim=(25, 104), ylabel="efficiency, % of the best constant cap's")


def _caps_by_drift(axis, results: Results) -> None:
    found = results.efficiency
    drifts, cells = found.size.drifts, [cell for cell in found.cells if not cell.sampled]
    for n, colour in zip(found.size.ns, (SKY, BLUE, BLACK), strict=False):
        best, own = [], []
        for drift in drifts:
            here = [cell for cell in cells if cell.drift == drift]
            best.append(torch.tensor([cell.best(n)[0] for cell in here]).log().median().exp())
            own.append(torch.tensor([cap for cell in here for cap in cell.caps["trajectory"][n]]).log().median().exp())
        axis.plot(
            drifts, best, color=colour, linestyle="--", marker="o", markerfacecolor="white", label=f"best, n = {n:,}"
        )
        axis.plot(drifts, own, color=colour, marker="o", label=f"the rule's, n = {n:,}")
    axis.set(yscale="log", title="the cap: best constant, and the rule's", ylabel="cap on the trajectory weight")
    axis.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axis.legend(frameon=False)


def efficiency_figure(results: Results, path: Path) -> None:
    """Efficiency of the rules for stale data against drift at two sizes of an update, and the caps."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.9), constrained_layout=True)
    figure.suptitle("What an update gains from stale responses")
    ns = results.efficiency.size.ns
    _gain_by_drift(axes[0], results, ns[0])
    _gain_by_drift(axes[1], results, ns[-1])
    _caps_by_drift(axes[2], results)
    for axis in axes:
        axis.set(xscale="log", xlabel="drift: root mean square change of a logit")
        axis.set_xticks(results.efficiency.size.drifts, [f"{drift:g}" for drift in results.efficiency.size.drifts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


FIGURES = {
    "bias.png": bias_figure,
    "terms.png": terms_figure,
    "stationarity.png": stationarity_figure,
    "moments.png": moments_figure,
    "carry_over.png": carry_over_figure,
    "efficiency.png": efficiency_figure,
}
