"""How much an update of each algorithm gains where the data is stale: bias, variance and efficiency.

The efficiency of an update ĝ, a mean over n responses, is η = (E ĝ·∇J)² / (‖∇J‖²·E‖ĝ‖²). It is the share of the gain
of the exact gradient that a step in the direction ĝ has on average, each with its best step size. η lies between 0 and
1 and does not depend on the scale of ĝ.

Trees of up to 8 tokens are listed completely, so η is exact. Longer responses are sampled: the gradient is exact, the
moments are unbiased estimates, and every η has its standard error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from tic_grpo_trl.algorithms import CISPO_CAP
from tic_grpo_trl.loss.mini_batch_rules import adaptive_cap
from tic_grpo_trl.objective import Clip, log_importance_weight

from .ascent import starting_point
from .estimators import NO_CLIP, Algorithm, length_normaliser, package_algorithm, weighted_advantages
from .policy import (
    Responses,
    Task,
    drifted_policy,
    enumerate_responses,
    expected_reward,
    policy_gradient,
    probabilities,
    random_policy,
    sample_responses,
    score_sum,
    token_logps,
    tree_task,
)


NOISE_SCALE = 20.0  # κ of the rule, the package's default
BLOCKS = 20  # of a sample, for the jackknife


@dataclass(frozen=True)
class Case:
    """One task, the behaviour policy of its responses and a current policy that has drifted from it.

    Attributes:
        responses: (N, T) every trajectory, or a sample.
        probability: (N,) of each under the behaviour policy; 1/N in a sample.
        advantages: (N,) reward minus the true mean.
        theta_old: (R, V) behaviour policy.
        theta: (R, V) current policy.
        gradient: (R, V) ∇J(θ), exact.
        sampled: whether the responses are a sample.
    """

    responses: Responses
    probability: torch.Tensor
    advantages: torch.Tensor
    theta_old: torch.Tensor
    theta: torch.Tensor
    gradient: torch.Tensor
    sampled: bool

    @property
    def log_ratio(self) -> torch.Tensor:
        """(N, T) log-ratios of the tokens."""
        return token_logps(self.theta, self.responses) - token_logps(self.theta_old, self.responses)

    def log_weight(self, level: str) -> torch.Tensor:
        """(N, 1) or (N, T) log-weights of a level, uncapped."""
        return log_importance_weight(self.log_ratio, self.responses.mask, level)

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """(B, N/B, ...) the blocks of a sample; a complete list is one block."""
        return values.unflatten(0, (BLOCKS if self.sampled else 1, -1))

    @property
    def spread(self) -> float:
        """Standard deviation of R under the behaviour policy, in nats."""
        total = self.log_ratio.sum(-1)
        return float((self.probability @ (total - self.probability @ total).square()).sqrt())


def tree_case(vocabulary: int, horizon: int, tie: str, arbitrary: bool, seed: int, drift: float) -> Case:
    """Return a case with every trajectory listed.

    Args:
        vocabulary, horizon, tie: of the task, see [`tree_task`](policy.py).
        arbitrary: whether each trajectory's reward is 0 or 1 at random; else it depends on the pairs of its tokens.
        seed: of the task, the behaviour policy and the direction of the drift.
        drift: root mean square change of a logit.
    """
    task = tree_task(vocabulary, horizon, 1, tie, seed)
    if arbitrary:
        generator = torch.Generator().manual_seed(400 + seed)
        task = replace(task, reward=torch.randint(2, task.reward.shape, generator=generator).double())
    theta_old = random_policy(task, 100 + seed)
    responses = enumerate_responses(task)
    return _case(task, responses, probabilities(theta_old, responses, 1), theta_old, seed, drift, sampled=False)


def chain_case(horizon: int, seed: int, drift: float, samples: int) -> Case:
    """Return a case with sampled responses of a task whose size does not grow with the horizon."""
    task, theta_old = starting_point(horizon, seed)
    task = replace(task, start=task.start[:1])  # one prompt
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(samples, horizon, generator=generator, dtype=torch.float64)
    responses = sample_responses(task, theta_old, torch.zeros(samples, dtype=torch.long), uniforms)
    probability = torch.full((samples,), 1 / samples, dtype=torch.float64)
    return _case(task, responses, probability, theta_old, seed, drift, sampled=True)


def _case(task: Task, responses: Responses, probability, theta_old, seed: int, drift: float, sampled: bool) -> Case:
    theta = drifted_policy(theta_old, drift, 200 + seed)
    advantages = responses.rewards - expected_reward(task, theta_old)
    return Case(responses, probability, advantages, theta_old, theta, policy_gradient(task, theta), sampled)


def squared_norms(theta: torch.Tensor, responses: Responses, coefficients: torch.Tensor) -> torch.Tensor:
    """(..., N) ‖Σ_t c_t·∇log π_θ(o_t)‖² of each response."""
    ordered = responses.rows.masked_fill(responses.mask == 0, -1).sort(-1).values
    if ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any():  # a row of logits serves several tokens
        return score_sum(theta, responses[..., None, :], coefficients.unsqueeze(-2)).flatten(-2).square().sum(-1)
    probs = theta.softmax(-1)
    chosen = probs[responses.rows, responses.tokens]
    of_tokens = 1 - 2 * chosen + probs.square().sum(-1)[responses.rows]
    return (coefficients.square() * of_tokens).sum(-1)


@dataclass(frozen=True)
class Moments:
    """First and second moments of f, the contribution of one response to the update; sums over B blocks of a sample.

    Attributes:
        mean: (B, R·V) sum of p·f.
        square: (B,) sum of p·‖f‖².
        along: (B,) sum of p·(f·∇J)².
        gradient: (R·V,) ∇J.
        samples: N, or `None` where the list is complete and B = 1.
    """

    mean: torch.Tensor
    square: torch.Tensor
    along: torch.Tensor
    gradient: torch.Tensor
    samples: int | None

    def _unbiased(self, mean: torch.Tensor, square, along, samples: int | None):
        """(E f·∇J)², ‖E f‖² and E‖f‖², each without bias where they come from a sample."""
        on_gradient, size = (mean @ self.gradient).square(), mean.square().sum(-1)
        if samples is None:
            return on_gradient, size, square
        correct = lambda of_mean, of_each: (samples * of_mean - of_each) / (samples - 1)  # noqa: E731
        return correct(on_gradient, along), correct(size, square), square

    def totals(self) -> tuple[float, float, float]:
        """Return (E f·∇J)², ‖E f‖² and E‖f‖²."""
        sums = self.mean.sum(0), self.square.sum(0), self.along.sum(0)
        on_gradient, size, square = self._unbiased(*sums, self.samples)
        return float(on_gradient), float(size), float(square)

    @property
    def bias(self) -> float:
        """‖E f − ∇J‖ / ‖∇J‖ of a complete list."""
        return float((self.mean.sum(0) - self.gradient).norm() / self.gradient.norm())

    @property
    def variance(self) -> float:
        """(E‖f‖² − ‖E f‖²) / ‖∇J‖², n times that of the update."""
        _, size, square = self.totals()
        return (square - size) / float(self.gradient.square().sum())

    def efficiency(self, n: int) -> float:
        """η of a mean over n responses."""
        return self._efficiency(self.totals(), n)

    def _efficiency(self, totals, n: int):
        on_gradient, size, square = totals
        return on_gradient / (float(self.gradient.square().sum()) * (size * (1 - 1 / n) + square / n))

    def standard_error(self, n: int) -> float:
        """Standard error of η, by leaving out one block at a time; 0 for a complete list."""
        if self.samples is None:
            return 0.0
        blocks = len(self.square)
        mean, square, along = ((x.sum(0) - x) * blocks / (blocks - 1) for x in (self.mean, self.square, self.along))
        left_out = self._efficiency(self._unbiased(mean, square, along, self.samples * (blocks - 1) // blocks), n)
        return float((left_out.var(correction=0) * (blocks - 1)).sqrt())


def _slopes(case: Case) -> torch.Tensor:
    """(N, T) ∇log π_θ(o_t)·∇J."""
    slope = case.gradient - (case.theta.softmax(-1) * case.gradient).sum(-1, keepdim=True)
    return slope[case.responses.rows, case.responses.tokens] * case.responses.mask


def moments(case: Case, coefficients: torch.Tensor) -> Moments:
    """Return the moments of an update whose token t of response i has the factor c_{i,t} before ∇log π_θ.

    Args:
        case: the case.
        coefficients: (N, T), 0 where masked.
    """
    cut = Responses(*(case.cut(getattr(case.responses, name)) for name in Responses.__dataclass_fields__))
    mean = score_sum(case.theta, cut, case.cut(case.probability.unsqueeze(-1) * coefficients)).flatten(1)
    along = (coefficients * _slopes(case)).sum(-1)
    return _moments(case, mean, squared_norms(case.theta, case.responses, coefficients), along)


def _moments(case: Case, mean: torch.Tensor, squares: torch.Tensor, along: torch.Tensor) -> Moments:
    square, on_gradient = (case.cut(case.probability * each).sum(-1) for each in (squares, along.square()))
    return Moments(mean, square, on_gradient, case.gradient.flatten(), len(along) if case.sampled else None)


def held_trajectories(case: Case, caps: Sequence[float]) -> list[Moments]:
    """Return the moments of the trajectory weight held at each cap: those of [`held`], faster for many caps."""
    responses = case.responses
    scores = score_sum(case.theta, responses[:, None], responses.mask.unsqueeze(-2)).flatten(1)  # (N, R·V)
    squares, along, weight = scores.square().sum(-1), _slopes(case).sum(-1), case.log_ratio.sum(-1).exp()
    found = []
    for cap in caps:
        factor = weight.clamp(max=cap) * case.advantages
        mean = (case.cut(case.probability * factor).unsqueeze(1) @ case.cut(scores)).squeeze(1)
        found.append(_moments(case, mean, factor.square() * squares, factor * along))
    return found


def coefficients(case: Case, algorithm: Algorithm, log_cap: torch.Tensor | None = None) -> torch.Tensor:
    """(N, T) factors of an algorithm that is data, with the package's ratios and clips; mean normaliser 1."""
    responses = case.responses
    mean_length = float(case.probability @ responses.lengths)
    normaliser = length_normaliser(responses, algorithm.loss_type, responses.mask.shape[-1], mean_length)
    normaliser = normaliser / (case.probability @ normaliser)
    logps, old_logps = token_logps(case.theta, responses), token_logps(case.theta_old, responses)
    factors = weighted_advantages(logps, old_logps, responses.mask, case.advantages, algorithm, log_cap)
    return factors * normaliser.unsqueeze(-1)


def held(level: str, cap: float) -> Algorithm:
    """The weight of a level, held at a cap with its gradient kept."""
    return Algorithm(level, Clip("capped", epsilon_high=cap - 1), "dr_grpo")


# TRL's CISPO: the token weight held at the cap, all tokens alike
CISPO = Algorithm("token", Clip("capped", epsilon_high=CISPO_CAP - 1), "dapo")


def _vespo(case: Case) -> torch.Tensor:
    """(N, T) TRL's VESPO (arXiv 2602.10693): e^λ·w^k·e^(−λw), (k, λ) = (2, 3) for A ≥ 0 and (3, 2) for A < 0."""
    total, gains = case.log_ratio.sum(-1), case.advantages >= 0
    k, rate = torch.where(gains, 2.0, 3.0).double(), torch.where(gains, 3.0, 2.0).double()
    weight = (rate + k * total - rate * total.exp()).exp()
    return (weight * case.advantages).unsqueeze(-1) * case.responses.mask


def _vcpo(case: Case) -> torch.Tensor:
    """(N, T) VCPO (arXiv 2602.17616): held at its cap, with the baseline E[w²‖s‖²r]/E[w²‖s‖²], w without the cap."""
    scale = case.probability * (2 * case.log_ratio.sum(-1)).exp()
    scale = scale * squared_norms(case.theta, case.responses, case.responses.mask)
    shifted = replace(case, advantages=case.advantages - scale @ case.advantages / scale.sum())
    return coefficients(shifted, package_algorithm("vcpo"))


def cap_of_the_rule(case: Case, n: int, level: str, noise_scale: float = NOISE_SCALE) -> torch.Tensor:
    """Return the log of the cap that the package's rule picks for n responses on the distribution itself.

    The rule's sums depend on the advantages by A² alone: √p·A makes them expectations. It divides κ by the number of
    responses that it is given: here that is the length of the list, instead of n. As in the trainer, responses whose
    advantage is 0 are left out.
    """
    listed = case.probability.sqrt() * case.advantages
    counts = listed != 0
    log_weight, mask = case.log_weight(level)[counts], case.responses.mask[counts]
    return adaptive_cap(log_weight, listed[counts], mask, noise_scale * len(mask) / n)


def cap_of_the_first_form(case: Case, n: int) -> torch.Tensor:
    """Return the log of the c that minimises (E[w−u]² + E[u²]/n)/E[u]²: the rule without A, lengths and κ."""
    log_weight, one = case.log_weight("trajectory"), case.probability.sqrt()
    return adaptive_cap(log_weight, one, torch.ones_like(log_weight), len(one) / n)


def _of_the_package(case: Case, name: str) -> torch.Tensor:
    return coefficients(case, package_algorithm(name))


def _rules() -> dict[str, Callable[[Case], torch.Tensor]]:
    names = ("grpo_no_is", "tic_grpo", "seq_mis", "ctpo", "gspo", "grpo", "seq_tis")
    ours = {
        "trajectory, no cap": Algorithm("trajectory", NO_CLIP, "dr_grpo"),
        "prefix, no cap": Algorithm("prefix", NO_CLIP, "dr_grpo"),
        "prefix held at 2": held("prefix", 2.0),
    }
    return {
        **{name: partial(_of_the_package, name=name) for name in names},
        "cispo": partial(coefficients, algorithm=CISPO),
        "vespo": _vespo,
        "vcpo": _vcpo,
        **{name: partial(coefficients, algorithm=algorithm) for name, algorithm in ours.items()},
    }


RULES = _rules()  # those whose weight does not depend on n


def rule_on_own_sample(case: Case, n: int, level: str, batches: int, seed: int) -> tuple[float, float]:
    """Return η of the rule where cap and update share a sample of n responses, and its standard error.

    The moments are those of the cap of [`cap_of_the_rule`], which are known, plus the mean difference between the two
    updates of the same sample: far less noisy than the moments themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(case.probability, batches * n, replacement=True, generator=generator).view(batches, n)
    log_weight = case.log_weight(level)
    mask, fixed = case.responses.mask, cap_of_the_rule(case, n, level)
    caps = [adaptive_cap(log_weight[each], case.advantages[each], mask[each], NOISE_SCALE) for each in index]
    known = moments(case, coefficients(case, held(level, float(fixed.exp()))))
    on_gradient, size, square = known.totals()
    drawn, factor = case.responses[index], case.advantages[index].unsqueeze(-1) * mask[index] / n

    def updates(cap):  # (batches, R·V)
        weight = torch.minimum(log_weight[index], cap).exp()
        return score_sum(case.theta, drawn, weight * factor).flatten(1)

    own, other = updates(torch.stack(caps)[:, None, None]), updates(fixed)
    along = (own - other) @ known.gradient
    squares = own.square().sum(-1) - other.square().sum(-1)
    mean_along = on_gradient**0.5 + float(along.mean())
    mean_square = size * (1 - 1 / n) + square / n + float(squares.mean())
    efficiency = mean_along**2 / (float(known.gradient.square().sum()) * mean_square)
    relative = 2 * along / mean_along - squares / mean_square  # first order, of each mini-batch
    return efficiency, efficiency * float(relative.std()) / batches**0.5
