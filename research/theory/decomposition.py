r"""The papers' decompositions of an update, term by term, as identities that hold for every sampled group.

All five have one form. With k_{i,t} = 1 on the tokens that the clip keeps (the papers' events B, D), else 0, weight
w_{i,t}, score g_{i,t} = ∇log π(o_{i,t}), length factor n_i and constants c (length), μ (true mean reward), σ (scale):

    (1/|G|) Σ_i n_i Σ_t k·w·g(θ)·A_i                         the update
      =  (c/σ)(1/|G|) Σ_i Σ_t g(θ_old)·(r_i − μ)             policy gradient at θ_old, token weights
       + (c/σ)(1/|G|) Σ_i Σ_t (w·g(θ) − g(θ_old))·(r_i − μ)  gradient error, token weights
      [=  (c/σ)(1/|G|) Σ_i Σ_t w'·g(θ)·(r_i − μ)             policy gradient at θ, trajectory weights: replaces both]
       + c (1/|G|) Σ_i Σ_t k·w·g(θ)·(A_i − (r_i − μ)/σ)      sampling error of the group mean
       + (1/|G|) Σ_i (n_i − c) Σ_t k·w·g(θ)·A_i              length error
       − (c/σ)(1/|G|) Σ_i Σ_t (1 − k)·w·g(θ)·(r_i − μ)       clip error

| identity | update | n_i | c | σ |
|---|---|---|---|---|
| v2 Eq. 7 (GRPO) | token, two-sided | 1/|o_i| | E[1/|o|] | E[σ_G] |
| v2 Eq. 11 (TIC-GRPO) | trajectory, up-only | 1/|o_i| | E[1/|o|] | E[σ_G] |
| v5 A.1 (GRPO) | token, two-sided | 1/|o_i| | 1/E|o| | 1 |
| v5 A.2 (TIC-GRPO) | trajectory, up-only | 1/T | 1/T | 1 |
| v5 A.3 (GRPO2) | token, up-only | 1/T | 1/T | 1 |

v5's formulas are lost; A.1–A.3 are rebuilt from its prose, which names these terms. v2's are whole, but as printed they
are not identities. [`CORRECTIONS`] names what has to change; [`printed_residual`] measures what the print misses.
"""

import itertools
import math
from dataclasses import dataclass

import torch

from tic_grpo_trl.objective import Clip

from .estimators import Listed, group_advantages
from .policy import Responses, score_sum, token_logps


CORRECTIONS = (
    (
        "v2 Eq. 7, first and second term",
        "the indicator 1_B goes: with it the first term is not unbiased for ∇J(θ_old), and the clipped tokens, which "
        "Clip Error subtracts, were never added",
    ),
    (
        "v2 Eq. 7 and Eq. 11, Sampling Error 2",
        "the factor is (1/|s_T| − T^(−1)), not (T^(−1) − 1/|s_T|): the sign is reversed in print",
    ),
    ("v2 Eq. 11, first term", "∇log π_θ, not ∇log π_θold: only then is it unbiased for ∇J(θ), as the text says it is"),
    ("v2 Eq. 11, Sampling Error 1", "the event is D(s_T), of the trajectory, not D(s_t)"),
    (
        "v2 Eq. 9 and line (*) of Eq. 11",
        "Σ_t over a weight that does not depend on t makes the gradient of Eq. 9 |s_T| times line (*). The line, which "
        "the package implements, is the gradient of the objective without that sum",
    ),
    ("v2, expectations below Eq. 7 and Eq. 11", "∇log P_θold in the third line of the first; ∇̃J(θ) in the second"),
)


@dataclass(frozen=True)
class Identity:
    """One of the five decompositions, see the table above.

    Args:
        name: as in the papers.
        level: `"token"` or `"trajectory"`.
        clip: the clip rule, `"two_sided"` or `"up_only"`.
        per_response: n_i = 1/|o_i|; else the constant 1/T.
        constant: which c: `"mean_inverse_length"`, `"inverse_mean_length"` or `"horizon"`.
        scaled: whether the advantage is divided by the group's standard deviation (v2).
    """

    name: str
    level: str
    clip: Clip
    per_response: bool
    constant: str
    scaled: bool


_TWO_SIDED, _UP_ONLY = Clip("two_sided", 0.2, 0.28), Clip("up_only", epsilon_high=0.28)
IDENTITIES = {
    "v2_eq7": Identity("v2 Eq. 7 (GRPO)", "token", _TWO_SIDED, True, "mean_inverse_length", True),
    "v2_eq11": Identity("v2 Eq. 11 (TIC-GRPO)", "trajectory", _UP_ONLY, True, "mean_inverse_length", True),
    "v5_a1": Identity("v5 A.1 (GRPO)", "token", _TWO_SIDED, True, "inverse_mean_length", False),
    "v5_a2": Identity("v5 A.2 (TIC-GRPO)", "trajectory", _UP_ONLY, False, "horizon", False),
    "v5_a3": Identity("v5 A.3 (GRPO2)", "token", _UP_ONLY, False, "horizon", False),
}


@dataclass(frozen=True)
class TrueMoments:
    """The constants of an identity, exact under π_old: c, E[σ_G] (1 where rewards are not scaled) and (N,) μ(s_0)."""

    constant: float
    std: float
    mean: torch.Tensor


def expected_group_std(behaviour: Listed, size: int) -> float:
    """σ̄_G = E[σ_G] of v2 Eq. 8 (divisor G), exact for any G: over multisets of the few reward values, by prompt."""
    total, prompts = 0.0, len(behaviour.task.start)
    responses = behaviour.responses
    for prompt in range(prompts):
        here = responses.prompts == prompt
        values, which = responses.rewards[here].unique(return_inverse=True)
        share = torch.zeros(len(values)).to(values).index_add(0, which, prompts * behaviour.p_old[here])
        for group in itertools.combinations_with_replacement(range(len(values)), size):
            counts = [group.count(k) for k in range(len(values))]
            orders = math.factorial(size) / math.prod(math.factorial(n) for n in counts)
            p = orders * float(share[list(group)].prod())
            total += p * float(values[list(group)].std(correction=0)) / prompts
    return total


def true_moments(behaviour: Listed, identity: Identity, size: int) -> TrueMoments:
    """The constants of an identity for groups of G = `size`."""
    constants = {
        "mean_inverse_length": behaviour.mean_inverse_length,
        "inverse_mean_length": 1 / behaviour.mean_length,
        "horizon": 1 / behaviour.task.horizon,
    }
    std = expected_group_std(behaviour, size) if identity.scaled else 1.0
    return TrueMoments(constants[identity.constant], std, behaviour.mean)


def advantages_of(groups: Responses, identity: Identity) -> torch.Tensor:
    """(..., G) A_i = (r_i − μ_G)/(σ_G + δ) of v2 (divisor G), or r_i − μ_G of v5."""
    return group_advantages(groups.rewards, "group" if identity.scaled else "none", correction=0)


def update_by_autograd(
    theta: torch.Tensor,  # (R, V)
    theta_old: torch.Tensor,  # (R, V)
    groups: Responses,  # (M, G, T)
    advantages: torch.Tensor,  # (M, G)
    identity: Identity,
    horizon: int,
) -> torch.Tensor:
    """(M, R, V) gradient of the printed objective of each group: the left side, independent of every term.

    Token level: min(w·A, clip(w)·A), v2 Eq. 5, or min(w, 1 + ε_high)·A, v5 Eq. 14. Trajectory level:
    n_i·min(w', 1 + ε_high)·A_i, whose gradient is line (*) of v2 Eq. 11 (see `CORRECTIONS` on the printed sum).
    """
    copies = theta.detach().expand(len(advantages), *theta.shape).clone().requires_grad_()
    log_ratio = token_logps(copies, groups) - token_logps(theta_old, groups)
    if identity.level == "trajectory":
        log_ratio = log_ratio.sum(-1, keepdim=True)
        mask = torch.ones_like(log_ratio)
    else:
        mask = groups.mask
    ratio, a, clip = log_ratio.exp(), advantages.unsqueeze(-1), identity.clip
    if clip.mode == "two_sided":
        surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip.epsilon_low, 1 + clip.epsilon_high) * a)
    else:
        surrogate = ratio.clamp(max=1 + clip.epsilon_high) * a
    normaliser = 1 / groups.lengths if identity.per_response else torch.full_like(groups.lengths, 1 / horizon)
    objective = (normaliser * (surrogate * mask).sum(-1)).mean(-1)
    return torch.autograd.grad(objective.sum(), copies)[0]


def _ingredients(theta, theta_old, groups: Responses, advantages, identity: Identity):
    """Weights w (or w', on every token) and the papers' events B, D as 0/1, each (M, G, T)."""
    log_ratio = token_logps(theta, groups) - token_logps(theta_old, groups)
    if identity.level == "trajectory":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    weight = log_ratio.exp() * groups.mask
    below_cap = weight <= 1 + identity.clip.epsilon_high
    if identity.clip.mode == "two_sided":  # B = B⁺ ∪ B⁻
        gains = advantages.unsqueeze(-1) >= 0
        kept = torch.where(gains, below_cap, weight >= 1 - identity.clip.epsilon_low)
    else:
        kept = below_cap
    return weight, kept * groups.mask


def decompose(
    theta: torch.Tensor,  # (R, V)
    theta_old: torch.Tensor,  # (R, V)
    groups: Responses,  # (M, G, T)
    advantages: torch.Tensor,  # (M, G)
    centred: torch.Tensor,  # (M, G)
    identity: Identity,
    moments: TrueMoments,
    horizon: int,
) -> dict[str, torch.Tensor]:
    """The right side of an identity (corrected), term by term, for each of M groups.

    Args:
        theta: the current policy.
        theta_old: the policy that the groups came from.
        groups: the responses; a "group" may as well be a mini-batch of several groups.
        advantages: A_i.
        centred: r_i − μ(s_0), with the true mean.
        identity: which of the five.
        moments: c and σ.
        horizon: T.

    Returns:
        name -> (M, R, V): `policy gradient`, `gradient error` (token level), `sampling error`, `length error` (per-
        response normaliser) and `clip error`, signs included, so that they add up to the update.
    """
    size = groups.rewards.shape[-1]
    weight, kept = _ingredients(theta, theta_old, groups, advantages, identity)
    constant, scaled = moments.constant, (centred / moments.std).unsqueeze(-1)  # (M, G, 1)
    a, normaliser = advantages.unsqueeze(-1), (1 / groups.lengths).unsqueeze(-1)

    def total(policy, coefficients):
        return score_sum(policy, groups, coefficients / size)

    terms = {}
    if identity.level == "token":
        leading = total(theta_old, constant * scaled * groups.mask)
        terms["policy gradient"] = leading
        terms["gradient error"] = total(theta, constant * scaled * weight) - leading
    else:
        terms["policy gradient"] = total(theta, constant * scaled * weight)
    terms["sampling error"] = total(theta, constant * kept * weight * (a - scaled))
    if identity.per_response:
        terms["length error"] = total(theta, (normaliser - constant) * kept * weight * a)
    terms["clip error"] = -total(theta, constant * (groups.mask - kept) * weight * scaled)
    return terms


def relative_residual(update: torch.Tensor, terms: dict[str, torch.Tensor]) -> float:
    """Largest over groups of ‖update − Σ terms‖ over the norm of the largest vector in the identity."""
    stacked = torch.stack(list(terms.values())).flatten(2)  # (terms, M, R·V)
    residual = (update.flatten(1) - stacked.sum(0)).norm(dim=-1)
    size = torch.maximum(update.flatten(1).norm(dim=-1), stacked.norm(dim=-1).amax(0))
    return float((residual / size.clamp(min=1e-300)).max())


def printed_residual(theta, theta_old, groups, advantages, centred, identity, moments, horizon) -> float:
    """Relative residual, median over groups, of v2's Eq. 7 or Eq. 11 exactly as printed: what `CORRECTIONS` repairs."""
    size = groups.rewards.shape[-1]
    weight, kept = _ingredients(theta, theta_old, groups, advantages, identity)
    terms = decompose(theta, theta_old, groups, advantages, centred, identity, moments, horizon)
    scaled = moments.constant * (centred / moments.std).unsqueeze(-1) / size
    printed = dict(terms)
    if identity.level == "token":  # the first two terms over B only
        printed["policy gradient"] = score_sum(theta_old, groups, scaled * kept)
        printed["gradient error"] = score_sum(theta, groups, scaled * kept * weight) - printed["policy gradient"]
    else:  # the score of the old policy in the first term
        printed["policy gradient"] = score_sum(theta_old, groups, scaled * weight)
    printed["length error"] = -terms["length error"]
    update = torch.stack(list(terms.values())).sum(0)
    error = (update - torch.stack(list(printed.values())).sum(0)).flatten(1).norm(dim=-1)
    norm = update.flatten(1).norm(dim=-1)
    return float((error / norm)[norm > 0].median())
