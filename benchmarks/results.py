"""Report the measurements as Markdown and a figure."""

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import linear_regression, median

import matplotlib


matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from formats import met, spread
from measure import Run, disagreement
from shared_prompts import SharedPrompts, prompt_sections

from tic_grpo_trl.metrics.run_summary import BLUE, GREY, ORANGE, table


AGREEMENT = 1e-4  # allowed relative difference of gradient norms
MIB = 2**20


@dataclass
class Case:
    """Runs of both trainers on the same rollouts.

    Attributes:
        title: description of the case.
        target: smallest accepted ratio of TRL's time to ours.
        pairs: runs of TRL's trainer and of ours with the same seed.
    """

    title: str
    target: float
    pairs: list[tuple[Run, Run]] = field(default_factory=list)

    @property
    def disagreement(self) -> float:
        return max(disagreement(*pair) for pair in self.pairs)


@dataclass
class Results:
    """All measurements. Those that were not selected stay empty.

    Attributes:
        command: command line.
        threads: number of torch threads.
        cases: cases by name.
        losses: seconds of TRL and of ours, by kind of trainer and lengths.
        limits: our run, a run with the default algorithm, and the limit's seconds of training passes, seconds of
            scoring and tokens.
        saved, resident: bytes of TRL and of ours.
        growth: (real tokens or responses, seconds), by panel and kind of trainer.
        seconds: duration of the benchmark.
    """

    command: str
    threads: int
    cases: dict[str, Case] = field(default_factory=dict)
    losses: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)
    limits: list[tuple[Run, Run, tuple[float, float, int]]] = field(default_factory=list)
    saved: tuple[int, int] | None = None
    resident: tuple[int, int] | None = None
    growth: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)
    prompts: SharedPrompts | None = None
    seconds: float = 0.0

    @property
    def comparable(self) -> bool:
        """Return whether both trainers computed the same gradients in all cases."""
        prompts = [self.prompts.disagreement] if self.prompts else []
        return all(each <= AGREEMENT for each in [*(case.disagreement for case in self.cases.values()), *prompts])


def _cases(results: Results) -> str:
    rows = []
    for case in results.cases.values():
        ratios = [trl.seconds / ours.seconds for trl, ours in case.pairs]
        trl, ours = case.pairs[0]
        rows.append(
            [
                case.title,
                f"≥ {case.target:g}",
                spread(ratios),
                met(median(ratios) >= case.target),
                spread([trl.seconds for trl, _ in case.pairs]),
                spread([ours.seconds for _, ours in case.pairs]),
                f"{trl.forwards} / {ours.forwards}",
                f"{trl.positions:,} / {ours.positions:,}",
                f"{case.disagreement:.0e}",
            ]
        )
    for (kind, lengths), pairs in results.losses.items():
        ratios = [trl / ours for trl, ours in pairs]
        columns = [spread([1e3 * pair[side] for pair in pairs], 1) + " ms" for side in (0, 1)]
        title = f"loss without the model, {lengths}, algorithm `{kind}`"
        rows.append([title, "≥ 1", spread(ratios), met(median(ratios) >= 1), *columns, "–", "–", "–"])
    header = ["case", "target", "TRL's time / ours", "met", "TRL, s", "ours, s"]
    return table([*header, "forwards TRL / ours", "positions TRL / ours", "gradients differ by"], rows)


def _memory(results: Results) -> str:
    rows = []
    for title, pair in (
        ("held by autograd for the backward pass, peak", results.saved),
        ("resident memory, peak increase during training", results.resident),
    ):
        if pair:
            trl, ours = pair
            ratio = ours / trl if trl > 0 else float("nan")
            sizes = [f"{trl / MIB:,.1f}", f"{ours / MIB:,.1f}"]
            rows.append([title, "≤ 0.4", f"{ratio:.2f}", met(ratio <= 0.4), *sizes])
    return table(["memory", "target", "ours / TRL's", "met", "TRL, MiB", "ours, MiB"], rows)


PASSES = ("forward for the loss", "forward for old log-probabilities", "backward")


def _limit(results: Results) -> str:
    learning = [forward_back for _, _, (forward_back, _, _) in results.limits]
    limits = [forward_back + scoring for _, _, (forward_back, scoring, _) in results.limits]
    rows = [
        ["the limit", spread(limits, 3), "", ""],
        ["of it forward and backward passes", spread(learning, 3), "", ""],
    ]
    for label, seconds in {
        "ours, passes through the model": [sum(run.parts[part] for part in PASSES) for run, _, _ in results.limits],
        "ours, with loss, optimizer and training loop": [run.seconds for run, _, _ in results.limits],
        "the same, default algorithm `tic_grpo`": [run.seconds for _, run, _ in results.limits],
    }.items():
        shares = [100 * limit / run for limit, run in zip(limits, seconds, strict=True)]
        rows.append([label, spread(seconds, 3), spread(shares, 0), met(median(shares) >= 80)])
    return table(["work of one rollout", "seconds", "the limit's share of it, %", "≥ 80"], rows)


def _parts(results: Results) -> str:
    pairs = results.cases["authors"].pairs
    names = sorted({name for pair in pairs for run in pair for name in run.parts})

    def cells(part) -> list[str]:
        columns = []
        for side in (0, 1):
            seconds = median(part(pair[side]) for pair in pairs)
            share = seconds / median(pair[side].seconds for pair in pairs)
            columns.append(f"{seconds:.3f} ({share:.0%})")
        return columns

    rows = [[name, *cells(lambda run, name=name: run.parts.get(name, 0.0))] for name in names]
    rows.append(["everything else", *cells(lambda run: run.seconds - sum(run.parts.values()))])
    rows.append(["together", *cells(lambda run: run.seconds)])
    return table(["part", "TRL, s", "ours, s"], rows)


def machine() -> str:
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return f"{os.cpu_count()} cores, {int(memory.split()[1]) / 2**20:.0f} GiB of memory"


def growth_figure(results: Results, path: Path) -> None:
    """Plot seconds per rollout against its real tokens and its responses, with a linear fit of ours."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    for axis, (label, by_kind) in zip(axes, results.growth.items(), strict=True):
        xs, seconds = zip(*by_kind["ours"], strict=True)
        slope, intercept = linear_regression(xs, seconds)
        fit = [slope * x + intercept for x in xs]
        mean = sum(seconds) / len(seconds)
        unexplained = sum((y - f) ** 2 for y, f in zip(seconds, fit, strict=True))
        r2 = 1 - unexplained / sum((y - mean) ** 2 for y in seconds)
        axis.plot(xs, fit, color=GREY, linestyle="--", label=f"linear fit, R² = {r2:.4f}")
        axis.plot(xs, seconds, "o", color=BLUE, label="this package")
        if by_kind.get("trl"):
            axis.plot(*zip(*by_kind["trl"], strict=True), "^", color=ORANGE, label="TRL")
        axis.set(xlabel=label, ylabel="seconds per rollout of 4 updates", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _head(results: Results, title: str) -> list[str]:
    packages = ("tic-grpo-trl", "trl", "transformers", "torch", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return [
        f"# {title}",
        f"`{results.command}`, {results.seconds:.0f} s on {machine()}, {results.threads} threads; "
        f"Python {platform.python_version()}, {versions}.",
    ]


def report_prompts(results: Results) -> str:
    """Write the Markdown report on shared prompts."""
    assert results.prompts is not None
    sections = prompt_sections(results.prompts)
    return "\n\n".join([*_head(results, "Prompts that are computed once"), *sections]) + "\n"


def report(results: Results) -> str:
    """Write the Markdown report on all but shared prompts."""
    blocks = [
        *_head(results, "Update phase compared with TRL"),
        "Times are for all updates of one rollout (K = 4), with scoring but without generation: median (range). Both "
        "trainers run alternately in one process on the same weights, rollouts and mini-batches. Responses and rewards "
        "are replayed. Skewed lengths are log-normal with a median of 0.6 of the mean, limited to 8 times the mean, "
        "and scaled so that the mean is exact with the one longest response. In a zero-advantage group all rewards are "
        "equal, so its advantages are exactly 0; the group of the longest response is never one.",
    ]
    if results.cases or results.losses:
        blocks.append(_cases(results))
    if results.cases:
        worst = max(case.disagreement for case in results.cases.values())
        verdict = "the trainers made the same updates" if results.comparable else "**THE UPDATES DIFFER**"
        blocks.append(
            f"Largest relative difference between the two trainers' gradient norms of the same update: {worst:.1e} "
            f"(allowed: {AGREEMENT:.0e}): {verdict}. A forward is one pass through the model's layers. A position is "
            "one token in it, including padding."
        )
    if results.saved or results.resident:
        note = "Each trainer runs in its own process with one thread. Resident memory includes the optimizer state."
        blocks += ["## Memory, first case", _memory(results), note]
    if results.limits:
        tokens = [tokens for _, _, (_, _, tokens) in results.limits]
        blocks += [
            "## Lower limit, first case",
            "The work that no trainer can avoid: for each mini-batch one forward and backward pass over the tokens of "
            f"the active responses ({median(tokens):,.0f} per rollout), as one batch of equal lengths without padding "
            "or mask, and for all mini-batches except the first a forward pass for the old log-probabilities. It is "
            "measured alternately with our trainer. No trainer can reach it: it has no loss, optimizer or training "
            "loop, and its equal lengths avoid the attention over the long response.",
            _limit(results),
        ]
    if "authors" in results.cases:
        blocks += ["## Where the time goes, first case", _parts(results)]
    if results.growth:
        blocks += [
            "## Growth, first case",
            "![Seconds against tokens and responses](growth.png)",
            "On the left, all responses grow by the same factor. On the right, there are more responses in four larger "
            "mini-batches. The cost of attention grows with the square of a response's length, which bends the left "
            "curve upwards once the longest response has thousands of tokens.",
        ]
        rows = [
            [label, kind, ", ".join(f"{x:,}: {seconds:.2f} s" for x, seconds in points)]
            for label, by_kind in results.growth.items()
            for kind, points in by_kind.items()
        ]
        blocks.append(table(["against", "trainer", "seconds per rollout"], rows))
    return "\n\n".join(blocks) + "\n"
