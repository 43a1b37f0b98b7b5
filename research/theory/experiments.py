"""The measurements behind the report: each function returns plain numbers, at a size given by a [`Scale`]."""

from dataclasses import dataclass, replace

import torch

from ..compared import COMPARED
from .ascent import HORIZONS, Ascent, Setting, ascend, starting_point, theorem_algorithms
from .carry_over import CarryOver, measure_carry_over
from .decomposition import (
    IDENTITIES,
    advantages_of,
    decompose,
    printed_residual,
    relative_residual,
    true_moments,
    update_by_autograd,
)
from .efficiency_grid import FULL_SIZE, QUICK_SIZE, Efficiencies, Size, measure_efficiencies
from .estimators import (
    Algorithm,
    Bias,
    Listed,
    bias_of_algorithm,
    expected_group_update,
    expected_update,
    listed,
    multisets,
    package_algorithm,
)
from .martingale import SecondMoments, property_4_1_cases
from .minibatch import second_step_bias
from .policy import (
    drifted_policy,
    enumerate_responses,
    expected_reward,
    policy_gradient,
    probabilities,
    random_policy,
    sample_responses,
    token_logps,
    tree_task,
)
from .reporting import Check


@dataclass(frozen=True)
class Scale:
    """How much to compute; the defaults are the report's, [`QUICK`] is a smoke test of the same code."""

    vocabulary: int = 4
    horizon: int = 8
    prompts: int = 2
    drifts: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
    policies: int = 3
    groups: int = 200
    group_sizes: tuple[int, ...] = (2, 3, 4)
    horizons: tuple[int, ...] = HORIZONS
    inner_steps: tuple[int, ...] = (1, 2, 4, 8)
    rates: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    ascent_groups: tuple[int, ...] = (2, 4, 8, 16, 32)
    ascent_horizon: int = 16
    ascent_steps: int = 96
    seeds: int = 4
    tasks: tuple[int, ...] = (0, 1, 2)
    samples: int = 8000
    first_rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    rollouts: int = 12
    efficiency: Size = FULL_SIZE


QUICK = Scale(
    vocabulary=3,
    horizon=4,
    drifts=(0.0, 0.3, 2.0),
    policies=2,
    groups=20,
    group_sizes=(2,),
    horizons=(4, 8),
    inner_steps=(1, 2),
    rates=(1.0, 2.0),
    ascent_groups=(2, 4),
    ascent_horizon=4,
    ascent_steps=4,
    seeds=2,
    tasks=(0, 1),
    samples=200,
    first_rates=(1.0,),
    rollouts=4,
    efficiency=QUICK_SIZE,
)


def package_algorithms() -> dict[str, Algorithm]:
    """The package's algorithms that the report compares."""
    return {name: package_algorithm(name) for name in COMPARED}


def large_lists(scale: Scale) -> list[Listed]:
    """Complete lists of the task of the bias curves, one per behaviour policy (rewards differ too)."""
    tasks = [tree_task(scale.vocabulary, scale.horizon, scale.prompts, seed=seed) for seed in range(scale.policies)]
    return [listed(task, enumerate_responses(task), random_policy(task, 100 + k)) for k, task in enumerate(tasks)]


def small_list(seed: int = 3) -> Listed:
    """31 trajectories, one prompt: every group can be listed as well."""
    task = tree_task(3, 4, 1, seed=seed)
    return listed(task, enumerate_responses(task), random_policy(task, 1))


def drifted(behaviour: Listed, drift: float, seed: int) -> torch.Tensor:
    return drifted_policy(behaviour.theta_old, drift, 200 + seed)


def spread_of_log_ratio(behaviour: Listed, theta: torch.Tensor) -> tuple[float, float]:
    """Standard deviation of R under π_old and the largest R of any trajectory, in nats."""
    ratio = (token_logps(theta, behaviour.responses) - token_logps(behaviour.theta_old, behaviour.responses)).sum(-1)
    mean = behaviour.p_old @ ratio
    return float((behaviour.p_old @ (ratio - mean).square()).sqrt()), float(ratio.max())


def bias_curves(scale: Scale, lists: list[Listed]) -> dict[str, dict[bool, list[list[Bias]]]]:
    """algorithm -> clipped? -> drift -> policy -> bias of the expected update (i.i.d. form)."""
    return {
        name: {
            clipped: [
                [
                    bias_of_algorithm(
                        behaviour, drifted(behaviour, drift, seed), algorithm if clipped else algorithm.unclipped()
                    )
                    for seed, behaviour in enumerate(lists)
                ]
                for drift in scale.drifts
            ]
            for clipped in (False, True)
        }
        for name, algorithm in package_algorithms().items()
    }


def group_expectations(scale: Scale, drift: float = 0.2) -> dict[str, dict[int, tuple[float, float]]]:
    """algorithm -> G -> distance of the exact group expectation from (G−1)/G·(i.i.d. form), and from the i.i.d. form.

    Both with the algorithm's own clip, relative to the norm of the i.i.d. form.
    """
    behaviour = small_list()
    theta = drifted(behaviour, drift, 0)
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for name, algorithm in package_algorithms().items():
        exact = expected_update(behaviour, theta, algorithm)
        found[name] = {}
        for size in scale.group_sizes:
            group = expected_group_update(behaviour, theta, algorithm, size)
            shrunk = (group - exact * (size - 1) / size).norm() / exact.norm()
            found[name][size] = (float(shrunk), float((group - exact).norm() / exact.norm()))
    return found


def sampled_groups(behaviour: Listed, count: int, size: int, seed: int = 0):
    """(count, G) groups of a list's task from π_old, and r_i − μ(s_0)."""
    generator = torch.Generator().manual_seed(seed)
    task = behaviour.task
    prompts = torch.randint(len(task.start), (count, 1), generator=generator).expand(-1, size)
    uniforms = torch.rand(count, size, task.horizon, generator=generator, dtype=torch.float64)
    groups = sample_responses(task, behaviour.theta_old, prompts, uniforms)
    of_prompt = torch.zeros(len(task.start), dtype=torch.float64)
    of_prompt[behaviour.responses.prompts] = behaviour.mean
    return groups, groups.rewards - of_prompt[groups.prompts]


def decomposition_residuals(scale: Scale, lists: list[Listed], size: int = 8) -> dict[str, tuple[float, float]]:
    """identity -> (worst residual as corrected, smallest median residual as printed (v2 only, else nan))."""
    found = {}
    for key, identity in IDENTITIES.items():
        worst, printed = 0.0, []
        for seed, behaviour in enumerate(lists):
            groups, centred = sampled_groups(behaviour, scale.groups, size, seed)
            moments, horizon = true_moments(behaviour, identity, size), behaviour.task.horizon
            advantages = advantages_of(groups, identity)
            for drift in scale.drifts:
                theta = drifted(behaviour, drift, seed)
                arguments = (theta, behaviour.theta_old, groups, advantages)
                update = update_by_autograd(*arguments, identity, horizon)
                terms = decompose(*arguments, centred, identity, moments, horizon)
                worst = max(worst, relative_residual(update, terms))
                if identity.scaled:
                    printed.append(printed_residual(*arguments, centred, identity, moments, horizon))
        found[key] = (worst, min(printed, default=float("nan")))
    return found


def term_sizes(scale: Scale) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """identity -> term -> per drift (E‖term‖, ‖E term‖) in units of c/σ, exact over all groups of the small list.

    In these units the policy-gradient term has expectation ∇J; `∇J(θ)` itself is among the terms. G is the largest of
    the scale's group sizes.
    """
    behaviour, size = small_list(), scale.group_sizes[-1]
    index, weight = multisets(behaviour, size)
    groups, centred = behaviour.responses[index], (behaviour.responses.rewards - behaviour.mean)[index]
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for key, identity in IDENTITIES.items():
        moments = true_moments(behaviour, identity, size)
        unit = moments.constant / moments.std
        advantages = advantages_of(groups, identity)
        found[key] = {}
        for drift in scale.drifts:
            theta = drifted(behaviour, drift, 0)
            terms = decompose(
                theta, behaviour.theta_old, groups, advantages, centred, identity, moments, behaviour.task.horizon
            )
            for name, term in terms.items():
                flat = term.flatten(1) / unit
                pair = (float(weight @ flat.norm(dim=-1)), float((weight @ flat).norm()))
                found[key].setdefault(name, []).append(pair)
            exact = float(policy_gradient(behaviour.task, theta).norm())
            found[key].setdefault("∇J(θ)", []).append((exact, exact))
    return found


def martingale_table(behaviour: Listed, drift: float = 0.3) -> dict[str, SecondMoments]:
    """Property 4.1 and its variants on a complete list."""
    theta = drifted(behaviour, drift, 0)
    log_ratio = token_logps(theta, behaviour.responses) - token_logps(behaviour.theta_old, behaviour.responses)
    return property_4_1_cases(theta, behaviour.responses, behaviour.p_old, log_ratio)


def second_moment_growth(scale: Scale, drift: float) -> dict[str, torch.Tensor]:
    """case of Property 4.1 -> (horizons, tasks, 2) E‖Σ_t x_t‖² and Σ_t E‖x_t‖², sampled, per token of E|o|."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for horizon in scale.horizons:
        rows: dict[str, list[tuple[float, float]]] = {}
        for seed in scale.tasks:
            task, start = starting_point(horizon, seed)
            theta = drifted_policy(start, drift, 300 + seed)
            generator = torch.Generator().manual_seed(seed)
            uniforms = torch.rand(scale.samples, horizon, generator=generator, dtype=torch.float64)
            responses = sample_responses(task, start, torch.arange(scale.samples) % len(task.start), uniforms)
            weight = torch.full((scale.samples,), 1 / scale.samples, dtype=torch.float64)
            log_ratio = token_logps(theta, responses) - token_logps(start, responses)
            length = float(responses.lengths.mean())
            for name, moments in property_4_1_cases(theta, responses, weight, log_ratio).items():
                rows.setdefault(name, []).append((moments.of_sum / length, moments.summed / length))
        for name, values in rows.items():
            found.setdefault(name, []).append(values)
    return {name: torch.tensor(values) for name, values in found.items()}


def mini_batch_bias(scale: Scale) -> dict[float, dict[str, float]]:
    """η -> partition -> bias of the second step (Lemma A.1), 14 trajectories over two prompts."""
    task = tree_task(3, 2, 2)
    behaviour = listed(task, enumerate_responses(task), random_policy(task, 1))
    return {rate: second_step_bias(behaviour, rate) for rate in scale.first_rates}


def ascent_sweeps(scale: Scale) -> dict[str, list[tuple[float, Ascent]]]:
    """sweep -> (abscissa, outcome): three over T (step-size conventions), then K, η/T and G at one horizon."""
    algorithms = theorem_algorithms()
    base = Setting(scale.ascent_horizon, steps=scale.ascent_steps, seeds=scale.seeds, tasks=scale.tasks)
    matched = replace(base, matched=True)

    def sweep(setting: Setting, name: str, values) -> list[tuple[float, Ascent]]:
        return [(float(x), ascend(replace(setting, **{name: x}), algorithms)) for x in values]

    return {
        "T, equal η": [(float(t), ascend(replace(base, horizon=t, rate=32 / t), algorithms)) for t in scale.horizons],
        "T, η ∝ T": sweep(base, "horizon", scale.horizons),
        "T, matched step": sweep(matched, "horizon", scale.horizons),
        "K": sweep(matched, "inner_steps", scale.inner_steps),
        "η/T": sweep(matched, "rate", scale.rates),
        "G": sweep(matched, "group_size", scale.ascent_groups),
    }


def exactness_checks(scale: Scale, lists: list[Listed], residuals, groups, mini_batches) -> list[Check]:
    """The exact claims, worst case over drifts and policies, with targets; the last three arguments as in `Results`."""
    tic = package_algorithm("tic_grpo").unclipped()
    total = dynamic = unbiased = 0.0
    for seed, behaviour in enumerate(lists):
        total = max(total, abs(float(behaviour.p_old.sum()) - 1))
        for drift in scale.drifts:
            theta = drifted(behaviour, drift, seed)
            listed_value = probabilities(theta, behaviour.responses, scale.prompts) @ behaviour.responses.rewards
            dynamic = max(dynamic, abs(float(expected_reward(behaviour.task, theta) - listed_value)))
            unbiased = max(unbiased, bias_of_algorithm(behaviour, theta, tic).relative_error)
    found = [
        Check("probabilities of all trajectories sum to 1", total),
        Check("J by dynamic programming = J by enumeration", dynamic),
        Check("unclipped TIC-GRPO is unbiased for ∇J(θ), relative (v5 A.2)", unbiased),
    ]
    for key, (worst, _) in residuals.items():
        found.append(Check(f"{IDENTITIES[key].name}: update = sum of its terms, relative", worst))
    tables = [martingale_table(b, drift) for b in lists for drift in scale.drifts]
    gaps = {case: max(abs(cases[case].gap) for cases in tables) for case in ("scores, own measure", "token weights")}
    found.append(Check("Property 4.1: E‖Σ g_t‖² = Σ E‖g_t‖², relative", gaps["scores, own measure"]))
    found.append(Check("the same for w_t·g_t under π_old, no clip, relative", gaps["token weights"]))
    shrunk = [distance for name in ("tic_grpo", "grpo2") for distance, _ in groups[name].values()]
    found.append(Check("group mean: E[update] = (G−1)/G·(i.i.d. form), tic_grpo and grpo2, relative", max(shrunk)))
    whole = max(by["by prompt"] for by in mini_batches.values())
    found.append(Check("Lemma A.1: second mini-batch of whole groups is unbiased at θ_1, relative", whole))
    return found


@dataclass(frozen=True)
class Results:
    """Everything that the report shows; see the functions of the same names."""

    scale: Scale
    trajectories: int
    spreads: list[tuple[float, float]]  # per drift, standard deviation of R (mean over policies) and the largest R
    checks: list[Check]
    biases: dict[str, dict[bool, list[list[Bias]]]]
    groups: dict[str, dict[int, tuple[float, float]]]
    residuals: dict[str, tuple[float, float]]
    terms: dict[str, dict[str, list[tuple[float, float]]]]
    martingale: dict[str, SecondMoments]
    growth: dict[float, dict[str, torch.Tensor]]
    mini_batches: dict[float, dict[str, float]]
    ascents: dict[str, list[tuple[float, Ascent]]]
    carry_over: CarryOver
    efficiency: Efficiencies


def measure(scale: Scale) -> Results:
    """Run every measurement."""
    lists = large_lists(scale)
    spreads = []
    for drift in scale.drifts:
        stds, largest = zip(*(spread_of_log_ratio(b, drifted(b, drift, s)) for s, b in enumerate(lists)), strict=True)
        spreads.append((sum(stds) / len(stds), max(largest)))
    residuals, groups = decomposition_residuals(scale, lists), group_expectations(scale)
    mini_batches, efficiency = mini_batch_bias(scale), measure_efficiencies(scale.efficiency)
    carry_over = measure_carry_over(small_list(), scale.drifts, scale.rollouts, scale.first_rates)
    return Results(
        scale=scale,
        trajectories=len(lists[0].p_old),
        spreads=spreads,
        checks=exactness_checks(scale, lists, residuals, groups, mini_batches) + carry_over.checks + efficiency.checks,
        biases=bias_curves(scale, lists),
        groups=groups,
        residuals=residuals,
        terms=term_sizes(scale),
        martingale=martingale_table(lists[0]),
        growth={drift: second_moment_growth(scale, drift) for drift in (0.1, 0.3)},
        mini_batches=mini_batches,
        ascents=ascent_sweeps(scale),
        carry_over=carry_over,
        efficiency=efficiency,
    )
