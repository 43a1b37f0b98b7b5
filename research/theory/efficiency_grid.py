"""The grid of the section on efficiency: tasks, lengths, drifts and policies, and what each rule gains on them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from .efficiency import (
    RULES,
    Case,
    Moments,
    cap_of_the_first_form,
    cap_of_the_rule,
    chain_case,
    coefficients,
    held,
    held_trajectories,
    moments,
    rule_on_own_sample,
    squared_norms,
    tree_case,
)
from .estimators import package_algorithm
from .policy import Responses
from .reporting import Check


LEVELS = ("trajectory", "prefix")
CONSTANTS = (1.28, 2.0, 3.0, 5.0)
NO_CAP = 1e8
# Caps that the best constant is looked for among
CAPS = (*(round(float(c), 3) for c in torch.logspace(-0.7, 2.3, 31)), *CONSTANTS, NO_CAP)
PREFIX_CAPS = (*(round(float(c), 3) for c in torch.logspace(-0.4, 1.8, 12)), *CONSTANTS, NO_CAP)


@dataclass(frozen=True)
class Task:
    """A kind of task at one length; its rewards, behaviour policies and drifts follow from seeds."""

    kind: str
    length: int
    case: Callable[[int, float], Case]  # of a seed and a drift


@dataclass(frozen=True)
class Size:
    """How much of the section to compute."""

    drifts: tuple[float, ...] = (0.1, 0.3, 0.6, 1.0)
    ns: tuple[int, ...] = (64, 512, 4096)
    own_ns: tuple[int, ...] = (64, 512)
    policies: int = 4
    tree_lengths: tuple[int, ...] = (4, 6, 8)
    chain_lengths: tuple[int, ...] = (16, 32, 64)
    samples: int = 10000
    draws: int = 16384  # responses drawn per estimate on the rule's own sample

    def tasks(self) -> Iterator[Task]:
        """Every kind of task at every length, the longest without shared parameters with fewer tokens."""
        for tie, sharing in (("last_token", "shared"), ("prefix", "not shared")):
            for arbitrary, rewards in ((False, "token pairs"), (True, "arbitrary")):
                for length in self.tree_lengths:
                    tokens = 3 if tie == "prefix" and length > 6 else 4
                    case = partial(tree_case, tokens, length, tie, arbitrary)
                    yield Task(f"{sharing}, {rewards}", length, case)
        for length in self.chain_lengths:
            yield Task("chain, sampled", length, partial(chain_case, length, samples=self.samples))


FULL_SIZE = Size()
QUICK_SIZE = Size(
    drifts=(0.3, 1.0),
    ns=(64, 512),
    own_ns=(64,),
    policies=2,
    tree_lengths=(4,),
    chain_lengths=(8,),
    samples=400,
    draws=640,
)


@dataclass(frozen=True)
class Cell:
    """What was found for one task, length and drift; lists hold one value per policy.

    Attributes:
        kind, length, drift: of the cell.
        sampled: whether the values are estimates.
        spread: standard deviation of R, mean over policies.
        noise_scale: κ = E[A²‖s‖²]/‖∇J‖², s = ∇log P_θ(o), under the current policy, of each policy.
        rules: rule -> its moments.
        held: level -> cap -> n -> η.
        caps: level -> n -> the caps that the rule picks on the distribution itself.
        adaptive: level -> n -> η of the rule at that cap.
        first_form: n -> η of the first form's cap, at the trajectory level.
        own_sample: level -> n -> η of the rule with the cap of the mini-batch's own sample, and its standard error.
    """

    kind: str
    length: int
    drift: float
    sampled: bool
    spread: float
    noise_scale: list[float]
    rules: dict[str, list[Moments]]
    held: dict[str, dict[float, dict[int, list[float]]]]
    caps: dict[str, dict[int, list[float]]]
    adaptive: dict[str, dict[int, list[float]]]
    first_form: dict[int, list[float]]
    own_sample: dict[str, dict[int, list[tuple[float, float]]]]

    def best(self, n: int, level: str = "trajectory") -> tuple[float, float]:
        """Return the constant cap with the largest mean η over the policies, in hindsight, and that η."""
        by_cap = {cap: mean(values[n]) for cap, values in self.held[level].items()}
        cap = max(by_cap, key=by_cap.__getitem__)
        return cap, by_cap[cap]

    def efficiency(self, rule: str, n: int) -> float:
        """Mean η of a rule over the policies."""
        return mean([each.efficiency(n) for each in self.rules[rule]])


def mean(values) -> float:
    """Return the mean of a sequence."""
    return sum(values) / len(values)


def _noise_scale(case: Case) -> float:
    """κ = E_θ[A²‖s‖²]/‖∇J‖², with responses of the behaviour policy weighed by w."""
    w = case.log_ratio.sum(-1).exp()
    size = squared_norms(case.theta, case.responses, case.responses.mask)
    return float((case.probability * w * case.advantages.square()) @ size / case.gradient.square().sum())


def measure_cell(task: Task, drift: float, size: Size) -> Cell:
    """Measure every rule on one task at one drift."""
    cases = [task.case(seed, drift) for seed in range(size.policies)]
    by_cap = {
        "trajectory": [held_trajectories(case, CAPS) for case in cases],
        "prefix": [[moments(case, coefficients(case, held("prefix", cap))) for cap in PREFIX_CAPS] for case in cases],
    }
    grids = {"trajectory": CAPS, "prefix": PREFIX_CAPS}
    log_caps = {lv: {n: [cap_of_the_rule(case, n, lv) for case in cases] for n in size.ns} for lv in LEVELS}
    adaptive = package_algorithm("tic_grpo_adaptive")
    at_level = {lv: replace(adaptive, level=lv) for lv in LEVELS}
    return Cell(
        kind=task.kind,
        length=task.length,
        drift=drift,
        sampled=cases[0].sampled,
        spread=mean([case.spread for case in cases]),
        noise_scale=[_noise_scale(case) for case in cases],
        rules={name: [moments(case, rule(case)) for case in cases] for name, rule in RULES.items()},
        held={
            lv: {
                cap: {n: [of_case[k].efficiency(n) for of_case in by_cap[lv]] for n in size.ns}
                for k, cap in enumerate(grids[lv])
            }
            for lv in LEVELS
        },
        caps={lv: {n: [float(c.exp()) for c in caps] for n, caps in by_n.items()} for lv, by_n in log_caps.items()},
        adaptive={
            lv: {
                n: [
                    moments(case, coefficients(case, at_level[lv], log_cap)).efficiency(n)
                    for case, log_cap in zip(cases, by_n[n], strict=True)
                ]
                for n in size.ns
            }
            for lv, by_n in log_caps.items()
        },
        first_form={
            n: [
                held_trajectories(case, [float(cap_of_the_first_form(case, n).exp())])[0].efficiency(n)
                for case in cases
            ]
            for n in size.ns
        },
        own_sample={
            lv: {
                n: [rule_on_own_sample(case, n, lv, size.draws // n, seed) for seed, case in enumerate(cases)]
                for n in size.own_ns
            }
            for lv in LEVELS
        },
    )


@dataclass(frozen=True)
class Efficiencies:
    """Everything that the section shows."""

    size: Size
    cells: list[Cell]
    checks: list[Check]


def _zero_advantages(case: Case, n: int) -> float:
    """How far the cap moves if every response appears once more, with advantage 0."""
    twice = Responses(*(torch.cat([getattr(case.responses, f)] * 2) for f in Responses.__dataclass_fields__))
    advantages = torch.cat([case.advantages, torch.zeros_like(case.advantages)])
    padded = replace(case, responses=twice, probability=case.probability.repeat(2), advantages=advantages)
    return max(abs(float(cap_of_the_rule(padded, n, lv) - cap_of_the_rule(case, n, lv))) for lv in LEVELS)


def _checks(size: Size, cells: list[Cell]) -> list[Check]:
    listed = [cell for cell in cells if not cell.sampled]
    scaled, moved = 0.0, 0.0
    for drift in size.drifts:
        case = tree_case(3, 4, "last_token", False, 0, drift)
        factors = RULES["seq_tis"](case)
        one, other = (moments(case, scale * factors).efficiency(64) for scale in (1.0, 1e-3))
        scaled = max(scaled, abs(other / one - 1))
        moved = max(moved, _zero_advantages(case, 64))
    bias = max(each.bias for cell in listed for each in cell.rules["trajectory, no cap"])
    largest = max(each.efficiency(n) for cell in listed for by in cell.rules.values() for each in by for n in size.ns)
    return [
        Check("trajectory weight without a cap: bias / ‖∇J‖ (section 9)", bias),
        Check("η of an update and of the same update times 0.001, relative", scaled),
        Check("η is at most 1: excess of the largest", max(0.0, largest - 1)),
        Check("cap of `tic_grpo_adaptive`: change with responses whose advantage is 0, nats", moved),
    ]


def measure_efficiencies(size: Size) -> Efficiencies:
    """Run every measurement of the section."""
    cells = [measure_cell(task, drift, size) for task in size.tasks() for drift in size.drifts]
    return Efficiencies(size, cells, _checks(size, cells))
