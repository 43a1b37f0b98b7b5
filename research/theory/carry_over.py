"""Measurements of carry-over: responses of several versions, and rollouts that do not wait for the longest response."""

from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from .estimators import Listed, group_advantages, listed
from .policy import (
    drifted_policy,
    enumerate_responses,
    policy_gradient,
    random_policy,
    score_sum,
    token_logps,
    tree_task,
)
from .release import Engine, as_batch, draw_lengths, draw_tokens, every_rollout, learn
from .reporting import Check
from .several_versions import (
    after,
    after_ends,
    after_token,
    all_groups,
    denominators,
    group_update,
    recorded_logps,
    term_of_the_group_mean,
    update_of_each,
)


INTERRUPTIONS = {
    "after the first token": after(1),
    "after the third token": after(3),
    "when the text has its first `a`": after_token(1),
    "three versions: after the first and the second token": after(1, 2),
    "three versions: at the first and the second `a`": after_token(1, times=2),
}
CONSTANT, GROUP_MEAN = "true mean", "group mean"


@dataclass(frozen=True)
class Mixture:
    """Responses of several versions: their ratio, and the update that other ratios give."""

    carried: float  # share of the tokens that the last version did not sample
    total_probability: float  # of all responses
    worst_expectation: float  # largest |E[w·f] − E_θ[f]| of any f between −1 and 1
    errors: dict[str, float]  # what the ratio is taken to -> ‖E[w·A·∇log P_θ] − ∇J(θ)‖/‖∇J(θ)‖


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def versions_apart(theta: torch.Tensor, drift: float, count: int) -> torch.Tensor:
    """(count, R, V) policies, each one drifted from the one before, in a direction of its own."""
    policies = [theta]
    for index in range(1, count):
        policies.append(drifted_policy(policies[-1], drift, 200 + index))
    return torch.stack(policies)


def mixture(behaviour: Listed, interruption, drift: float, baseline: float = 0.4) -> Mixture:
    """Measure a kind of interruption. The current policy has drifted once more from the last version."""
    responses = behaviour.responses
    versions = interruption(responses)
    last = int(versions.max())
    path = versions_apart(behaviour.theta_old, drift, last + 2)
    policies, theta = path[:-1], path[-1]
    recorded = recorded_logps(policies, responses, versions)
    probability = recorded.sum(-1).exp()
    by_theta = token_logps(theta, responses).sum(-1)
    weighted = probability * (by_theta - recorded.sum(-1)).exp()
    gradient = policy_gradient(behaviour.task, theta)
    errors = {}
    for name, denominator in denominators(policies, responses, versions).items():
        updates = update_of_each(theta, responses, denominator, responses.rewards - baseline)
        errors[name] = _relative(torch.tensordot(probability, updates, 1), gradient)
    earlier = ((versions < last) * responses.mask).sum(-1)
    return Mixture(
        carried=float(probability @ earlier / (probability @ responses.lengths)),
        total_probability=float(probability.sum()),
        worst_expectation=float((weighted - by_theta.exp()).abs().sum()),
        errors=errors,
    )


def probability_if_foreseen(behaviour: Listed, drift: float) -> float:
    """Sum of the recorded probabilities if the second version wrote only responses that become long (not allowed)."""
    responses = behaviour.responses
    longer = (responses.lengths > 2)[:, None] & (torch.arange(behaviour.task.horizon) >= 1)
    policies = versions_apart(behaviour.theta_old, drift, 2)
    return float(recorded_logps(policies, responses, longer.long()).sum(-1).exp().sum())


@dataclass(frozen=True)
class GroupMean:
    """E[update] with the group mean as baseline, against (G−1)/G·∇J(θ); all relative to ‖∇J(θ)‖·(G−1)/G."""

    added: float  # what carry-over adds
    unexplained: float  # the same without the term that the formula gives
    total_probability: float


def group_mean(behaviour: Listed, drift: float, size: int, ended: int | None) -> GroupMean:
    """Measure groups whose members are interrupted when `ended` of them have ended; `None`: each one on its own."""
    path, groups = versions_apart(behaviour.theta_old, drift, 3), all_groups(behaviour, size)
    policies, theta = path[:-1], path[-1]
    if ended is None:
        rules = list(INTERRUPTIONS.values())[:3]
        versions = torch.stack([rules[member % 3](groups[:, member]) for member in range(size)], 1)
        term = torch.zeros_like(theta)
    else:
        versions = after_ends(groups, ended)
        term = term_of_the_group_mean(behaviour, theta, policies, size, ended)
    update, total = group_update(theta, policies, groups, versions)
    shrunk = policy_gradient(behaviour.task, theta) * (size - 1) / size
    return GroupMean(_relative(update, shrunk), _relative(update - term, shrunk), float(total))


@dataclass(frozen=True)
class Release:
    """What the rollouts of a run hold, at a fixed policy; biases are relative to ‖∇J‖.

    With the group mean, an update is compared after division by its known factor (G−1)/G.
    """

    biases: dict[str, list[float]]  # baseline -> of each update
    of_the_run: dict[str, float]  # baseline -> of the mean of all updates
    mean_lengths: list[float]  # of the responses in each rollout, in tokens
    by_age: dict[int, tuple[float, float]]  # age -> share of the run's responses, their mean length


def _expected_updates(behaviour: Listed):
    """Functions from the lengths of a group to its expected update, (R, V), by baseline."""
    responses, p = behaviour.responses, behaviour.p_old
    scores = score_sum(behaviour.theta_old, responses[:, None], responses.mask[:, None])  # (N, R, V)
    score, reward, both = {}, {}, {}
    for length in range(1, behaviour.task.horizon + 1):
        given = p * (responses.lengths == length)
        given = given / given.sum()
        score[length], reward[length] = torch.tensordot(given, scores, 1), given @ responses.rewards
        both[length] = torch.tensordot(given * responses.rewards, scores, 1)
    mean = p @ responses.rewards

    def constant(lengths: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([both[n] - mean * score[n] for n in lengths]).mean(0)

    def by_others(lengths: tuple[int, ...]) -> torch.Tensor:
        """The group mean, over (G−1)/G: the mean of the other members as the baseline."""
        rewards = torch.stack([reward[n] for n in lengths])
        others = (rewards.sum() - rewards) / (len(lengths) - 1)
        return torch.stack([both[n] - b * score[n] for n, b in zip(lengths, others, strict=True)]).mean(0)

    return {CONSTANT: constant, GROUP_MEAN: by_others}


def release(behaviour: Listed, engine: Engine, rollouts: int) -> Release:
    """List a run of an engine at a fixed policy and measure each of its updates."""
    found = every_rollout(engine, rollouts, draw_lengths(behaviour), keeps_plan=True)
    gradient = policy_gradient(behaviour.task, behaviour.theta_old)
    ages: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    mean_lengths = []
    for rollout, groups in enumerate(found):
        tokens = 0.0
        for responses, count in groups.items():
            for each in responses:
                share = count / (rollouts * engine.prompts * engine.group_size)
                ages[rollout - each.versions[0]][0] += share
                ages[rollout - each.versions[0]][1] += share * len(each.tokens)
                tokens += count * len(each.tokens)
        mean_lengths.append(tokens / (engine.prompts * engine.group_size))
    biases, of_the_run = {}, {}
    for name, expected in _expected_updates(behaviour).items():
        if name == GROUP_MEAN and engine.group_size == 1:
            continue
        updates = [
            sum(count * expected(tuple(len(each.tokens) for each in group)) for group, count in groups.items())
            / engine.prompts
            for groups in found
        ]
        biases[name] = [_relative(update, gradient) for update in updates]
        of_the_run[name] = _relative(torch.stack(updates).mean(0), gradient)
    by_age = {age: (share, tokens / share) for age, (share, tokens) in sorted(ages.items())}
    return Release(biases, of_the_run, mean_lengths, by_age)


@dataclass(frozen=True)
class MovingRun:
    """A run whose policy drifts along a given path while its responses are written; relative to the norm of ∇J."""

    biases: list[float]  # of update k, at θ_k, with the true mean reward as baseline
    worst_expectation: float  # |Σ E[w·f] / responses − E_θ[f]| at the end's θ, of any f between −1 and 1
    errors: dict[str, float]  # what the ratio is taken to -> error of the mean of all updates, at the end's θ
    group_mean: float  # the same with what was recorded and the group mean, over (G−1)/G; nan for one response


def moving_run(behaviour: Listed, engine: Engine, rollouts: int, drift: float) -> MovingRun:
    """List a run in which call k samples from θ_k."""
    policies = versions_apart(behaviour.theta_old, drift, rollouts + 1)
    theta, size = policies[-1], engine.group_size
    found = every_rollout(engine, rollouts, draw_tokens(behaviour, policies))
    mass = torch.zeros_like(behaviour.p_old)
    totals: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros_like(theta))
    biases = []
    for call, groups in enumerate(found):
        responses, versions, index = as_batch(behaviour, list(groups))
        count = torch.tensor(list(groups.values()), dtype=theta.dtype) / engine.prompts
        recorded = recorded_logps(policies, responses, versions)
        advantages = responses.rewards - behaviour.mean[0]
        weight = (token_logps(theta, responses) - recorded).sum(-1).exp()
        mass.index_add_(0, index.flatten(), (weight * count[:, None]).flatten() / (rollouts * size))
        newest = versions.amax(-1, keepdim=True).expand_as(versions)
        oldest = versions[..., :1].expand_as(versions)
        ratios = {"what was recorded": recorded}
        ratios["the last version"] = recorded_logps(policies, responses, newest)
        ratios["the first version"] = recorded_logps(policies, responses, oldest)
        for name, denominator in ratios.items():
            updates = update_of_each(theta, responses, denominator, advantages).mean(-3)
            totals[name] += torch.tensordot(count, updates, 1) / rollouts
        if size > 1:
            updates = update_of_each(theta, responses, recorded, group_advantages(responses.rewards)).mean(-3)
            totals[GROUP_MEAN] += torch.tensordot(count, updates, 1) / rollouts * size / (size - 1)
        now = torch.tensordot(count, update_of_each(policies[call], responses, recorded, advantages).mean(-3), 1)
        biases.append(_relative(now, policy_gradient(behaviour.task, policies[call])))
    gradient = policy_gradient(behaviour.task, theta)
    worst = float((mass - token_logps(theta, behaviour.responses).sum(-1).exp()).abs().sum())
    errors = {name: _relative(total, gradient) for name, total in totals.items()}
    of_group_mean = errors.pop(GROUP_MEAN, float("nan"))
    return MovingRun(biases, worst, errors, of_group_mean)


@dataclass(frozen=True)
class CarryOver:
    """Everything that the report shows of carry-over; see the functions of the same names."""

    mixtures: dict[str, dict[float, Mixture]]  # by interruption and drift
    foreseen: float
    group_means: dict[tuple[int, int | None], dict[float, GroupMean]]  # by (G, members that have ended) and drift
    rollouts: int
    mean_length: float  # of a response, in tokens
    releases: dict[Engine, Release]
    moving: dict[float, MovingRun]  # by drift per rollout; single responses
    moving_groups: dict[Engine, MovingRun]
    learning: dict[Engine, dict[float, tuple[float, float]]]  # η -> bias of the run's sum, largest of one update
    checks: list[Check]


def releases(behaviour: Listed, rollouts: int) -> dict[Engine, Release]:
    """Engines with room for every response, except for the last."""
    one, two = Engine(prompts=1), Engine(prompts=2)
    engines = [replace(two, max_carry_over=0)]
    engines += [replace(two, max_carry_over=s, oversampling=o) for s, o in ((1, 1.5), (1, 2.0), (2, 2.0), (3, 2.0))]
    engines += [replace(one, max_carry_over=s, oversampling=s + 1.0) for s in (0, 1, 2, 3)]
    engines += [replace(one, group_size=2, max_carry_over=s) for s in (1, 2, 3)]
    engines.append(replace(one, group_size=2, max_carry_over=2, slots=2))
    return {engine: release(behaviour, engine, rollouts) for engine in engines}


def _exact_claims(found: CarryOver) -> list[Check]:
    mixtures = [each for by_drift in found.mixtures.values() for each in by_drift.values()]
    means = [each for by_drift in found.group_means.values() for each in by_drift.values()]
    alone = [each.added for (_, ended), by in found.group_means.items() if ended is None for each in by.values()]
    totals = [each.total_probability for each in mixtures] + [each.total_probability for each in means]
    worst = max([each.worst_expectation for each in mixtures] + [abs(total - 1) for total in totals])
    runs = [*found.moving.values(), *found.moving_groups.values()]
    room = [run.group_mean for engine, run in found.moving_groups.items() if engine.slots >= 2 * engine.group_size]
    waits = [
        max(values) for engine, by in found.learning.items() if not engine.max_carry_over for values in by.values()
    ]
    return [
        Check("several versions: E[w·f] = E_θ[f] for every f between −1 and 1", worst),
        Check(
            "several versions: E[w·A·∇log P_θ] = ∇J(θ) with a constant baseline, relative",
            max(each.errors["what was recorded"] for each in mixtures),
        ),
        Check("group mean, members interrupted independently: E[update] = (G−1)/G·∇J(θ), relative", max(alone)),
        Check(
            "group mean, members interrupted by one another: the formula of section 8 is the rest, relative",
            max(each.unexplained for each in means),
        ),
        Check(
            "carry-over, fixed policy: mean of all updates of a run = ∇J, relative",
            max(max(each.of_the_run.values()) for each in found.releases.values()),
        ),
        Check(
            "carry-over, versions on a given path: mean of w·f over a run = E_θ[f] for every f",
            max(run.worst_expectation for run in runs),
        ),
        Check("the same: mean of all updates = ∇J(θ), relative", max(run.errors["what was recorded"] for run in runs)),
        Check("the same with the group mean and a slot for every response, relative", max(room)),
        Check("no carry-over, policy that learns: every update is unbiased, relative", max(waits)),
    ]


def measure_carry_over(
    behaviour: Listed, drifts: tuple[float, ...], rollouts: int, rates: tuple[float, ...]
) -> CarryOver:
    """Run every measurement of carry-over.

    Args:
        behaviour: a list with one prompt and few trajectories.
        drifts: between two versions.
        rollouts: of the runs at a fixed policy.
        rates: η of a policy that learns, with the gradient of J as unit (the constant 1/T is left out).
    """
    task = tree_task(3, 2, seed=3)  # 7 trajectories: whole groups, and a policy that learns, stay few
    small = listed(task, enumerate_responses(task), random_policy(task, 1))
    sizes = [(2, None), (2, 1), (3, None), (3, 1), (3, 2)]
    pairs = Engine(group_size=2)
    moving_rollouts = min(rollouts, 8)
    norm = float(policy_gradient(task, small.theta_old).norm())
    learning: dict[Engine, dict[float, tuple[float, float]]] = {}
    for engine in (Engine(max_carry_over=0), Engine(max_carry_over=1)):
        learning[engine] = {}
        for rate in (0.0, *rates):
            excess = learn(small, engine, 3, rate)
            largest = max(float(each.norm()) for each in excess)
            learning[engine][rate] = float(torch.stack(excess).mean(0).norm()) / norm, largest / norm
    found = CarryOver(
        mixtures={name: {d: mixture(behaviour, rule, d) for d in drifts} for name, rule in INTERRUPTIONS.items()},
        foreseen=probability_if_foreseen(behaviour, max(drifts)),
        group_means={size: {d: group_mean(behaviour, d, *size) for d in drifts} for size in sizes},
        rollouts=rollouts,
        mean_length=behaviour.mean_length,
        releases=releases(behaviour, rollouts),
        moving={d: moving_run(behaviour, Engine(), moving_rollouts, d) for d in (0.0, 0.05, 0.1, 0.2)},
        moving_groups={
            engine: moving_run(small, engine, 5, 0.2) for engine in (replace(pairs, slots=s) for s in (4, 3, 2))
        },
        learning=learning,
        checks=[],
    )
    found.checks.extend(_exact_claims(found))
    return found
