"""Measure prompts that are computed once, against TRL's trainer and against this one without sharing."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import matplotlib.pyplot as plt
from cases import GROUP, Rollout, Scale, make_rollout
from formats import met, spread
from measure import Limit, Run, disagreement, peak_memory, train

from tic_grpo_trl.metrics.run_summary import BLUE, GREY, ORANGE, table
from tic_grpo_trl.rollout.partition import shuffle_prompts


TARGETS = {256: (3, 6), 64: (1.5, 10), 8: (0.97, None)}  # least time of sharing off, and of TRL, per time of sharing on
SHARE = 0.75  # of the limit in our time, with the longest prompts of a case
OPTIONS = {"partition_by_prompt": True}  # mini-batches of whole groups, the default


@dataclass
class PromptCase:
    """Runs on the same rollouts and mini-batches.

    Attributes:
        trl, off, on: runs of TRL's trainer, and of ours without and with sharing, by seed.
        limits: seconds of the strictly necessary work, by seed.
        saved: peak bytes that autograd held for the backward pass, in the same order as the runs.
    """

    trl: list[Run] = field(default_factory=list)
    off: list[Run] = field(default_factory=list)
    on: list[Run] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    saved: tuple[int, int, int] = (0, 0, 0)


@dataclass
class SharedPrompts:
    """All measurements.

    Attributes:
        scale: sizes.
        cases: by tokens per prompt.
        growth: seconds without and with sharing, by tokens per prompt.
    """

    scale: Scale
    cases: dict[int, PromptCase] = field(default_factory=dict)
    growth: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def disagreement(self) -> float:
        """Return the largest relative difference of gradient norms with sharing to the others."""
        cases = self.cases.values()
        pairs = [
            pair for case in cases for others in (case.trl, case.off) for pair in zip(others, case.on, strict=True)
        ]
        return max(disagreement(*pair) for pair in pairs)

    @classmethod
    def measure(cls, scale: Scale, model, lengths: Sequence[int], repeats: int | None) -> "SharedPrompts":
        """Measure every case, one trainer after the other for each seed."""
        found = cls(scale)
        for tokens in scale.shared_prompts:
            case = found.cases[tokens] = PromptCase()
            rollout = _rollout(scale, lengths, tokens)
            limit = Limit(scale, model, rollout)
            limit.minibatches = rollout.shared_minibatches
            limit.run(0)
            for seed in range(repeats or scale.pairs):
                case.trl.append(_train_trl(scale, model, rollout, seed))
                case.off.append(train("ours", scale, model, rollout, seed, share_prompts=False, **OPTIONS))
                case.on.append(train("ours", scale, model, rollout, seed, **OPTIONS))
                case.limits.append(sum(limit.run(seed)[:2]))
            kinds: list[tuple[str, dict]] = [("trl", {}), ("ours", {"share_prompts": False}), ("ours", {})]
            saved = [
                peak_memory(kind, scale, model, rollout, **(OPTIONS | options if kind == "ours" else {}))[0]
                for kind, options in kinds
            ]
            case.saved = (saved[0], saved[1], saved[2])
        for tokens in scale.shared_growth:
            rollout = _rollout(scale, lengths, tokens)
            off, on = (train("ours", scale, model, rollout, share_prompts=s, **OPTIONS).seconds for s in (False, True))
            found.growth[tokens] = off, on
        return found


def _rollout(scale: Scale, lengths: Sequence[int], tokens: int) -> Rollout:
    return make_rollout(replace(scale, prompt=(tokens, tokens)), lengths, zero_advantage_groups=0)


def _train_trl(scale: Scale, model, rollout: Rollout, seed: int) -> Run:
    """Run TRL's trainer on our mini-batches of whole groups, so that gradients can be compared."""

    def shuffle(values):
        return shuffle_prompts(values, GROUP)

    with patch("trl.trainer.grpo_trainer.shuffle_sequence_dict", shuffle):
        return train("trl", scale, model, rollout, seed)


def prompt_sections(prompts: SharedPrompts) -> list[str]:
    """Write the blocks of the report."""
    scale, rows = prompts.scale, []
    for tokens, case in prompts.cases.items():
        least_off, least_trl = TARGETS.get(tokens, (None, None))
        of_off, of_trl = (
            [other.seconds / on.seconds for other, on in zip(others, case.on, strict=True)]
            for others in (case.off, case.trl)
        )
        shares = [limit / on.seconds for limit, on in zip(case.limits, case.on, strict=True)]
        rows.append(
            [
                f"{tokens} / {scale.mean}",
                _against(of_off, least_off),
                _against(of_trl, least_trl),
                f"{spread([100 * share for share in shares], 0)} %"
                + (f" (≥ {100 * SHARE:.0f}: {met(median(shares) >= SHARE)})" if tokens == max(TARGETS) else ""),
                " / ".join(f"{run[0].positions:,}" for run in (case.trl, case.off, case.on)),
                " / ".join(spread([run.seconds for run in runs]) for runs in (case.trl, case.off, case.on)),
                " / ".join(f"{saved / 2**20:,.0f}" for saved in case.saved),
            ]
        )
    header = ["prompt / mean response, tokens", "time without sharing / with", "TRL's time / ours", "the limit's share"]
    of_each = "TRL / without / with sharing"
    header += [f"positions: {of_each}", f"seconds: {of_each}", f"MiB for the backward pass: {of_each}"]
    growth = [[f"{tokens:,}", f"{off:.2f}", f"{on:.2f}"] for tokens, (off, on) in prompts.growth.items()]
    return [
        "Times are for all updates of one rollout (K = 4), with scoring but without generation: median (range). The "
        "trainers run alternately in one process on the same weights, rollouts and mini-batches. "
        f"{scale.responses} responses in groups of {GROUP} have log-normal lengths, the longest {scale.longest} "
        "tokens, and every group is active. Mini-batches consist of whole groups, also with TRL. The limit is the work "
        "of a batch of equal lengths with as many tokens as are unique in each mini-batch. Largest relative difference "
        f"of gradient norms to those with sharing: {prompts.disagreement:.1e}.",
        table(header, rows),
        "![Seconds against the tokens of a prompt](shared_prompts.png)",
        table(["tokens per prompt", "seconds without sharing", "seconds with"], growth),
    ]


def _against(ratios: list[float], least: float | None) -> str:
    return spread(ratios) + (f" (≥ {least:g}: {met(median(ratios) >= least)})" if least else "")


def prompt_figure(prompts: SharedPrompts, path: Path) -> None:
    """Plot seconds per rollout against the tokens of a prompt."""
    figure, axis = plt.subplots(figsize=(5.6, 4.2), constrained_layout=True)
    tokens = list(prompts.growth)
    off, on = zip(*prompts.growth.values(), strict=True)
    trl = [(each, median(run.seconds for run in case.trl)) for each, case in sorted(prompts.cases.items())]
    axis.plot(*zip(*trl, strict=True), "^-", color=ORANGE, label="TRL")
    axis.plot(tokens, off, "s-", color=GREY, label="this package, share_prompts=False")
    axis.plot(tokens, on, "o-", color=BLUE, label="this package")
    axis.set(xlabel="tokens per prompt", ylabel="seconds per rollout of 4 updates", xlim=(0, None), ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
