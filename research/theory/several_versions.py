"""Responses whose tokens come from several versions of the policy, as an interrupted generation writes them.

Version 0 writes until a first interruption, version 1 from there on, and so on. When a response is interrupted may
depend on everything sampled so far, of the other responses too, but not on what comes. The behaviour probability of a
response is the product of the probabilities that were recorded when its tokens were sampled.

Shapes: policies (M, R, V), responses (..., T), versions (..., T) the index of the policy that sampled each token.
"""

from collections.abc import Callable

import torch

from .estimators import NO_CLIP, Algorithm, Listed, group_advantages, weighted_advantages
from .policy import Responses, score_sum, token_logps


TIC = Algorithm("trajectory", NO_CLIP, "dr_grpo")
Interruption = Callable[[Responses], torch.Tensor]


def after(*tokens: int) -> Interruption:
    """Interrupt after so many tokens, once for each number."""
    places = torch.tensor(tokens)

    def versions(responses: Responses) -> torch.Tensor:
        position = torch.arange(responses.tokens.shape[-1])
        return (position.unsqueeze(-1) >= places).sum(-1).expand(responses.tokens.shape)

    return versions


def after_token(token: int, times: int = 1) -> Interruption:
    """Interrupt when a token has been sampled, the first `times` times: it depends on the text so far."""

    def versions(responses: Responses) -> torch.Tensor:
        sampled = (responses.tokens == token).long()
        return (sampled.cumsum(-1) - sampled).clamp(max=times)

    return versions


def after_ends(responses: Responses, ended: int) -> torch.Tensor:
    """(..., G, T) versions of groups that are written side by side and interrupted when `ended` members have ended."""
    interrupted = responses.lengths.sort(-1).values[..., ended - 1, None, None]
    return (torch.arange(responses.tokens.shape[-1]) >= interrupted).long().expand(responses.tokens.shape)


def recorded_logps(policies: torch.Tensor, responses: Responses, versions: torch.Tensor) -> torch.Tensor:
    """(..., T) log-probability of each token under the policy that sampled it, 0 where masked."""
    by_version = torch.stack([token_logps(theta, responses) for theta in policies])
    return by_version.gather(0, versions.unsqueeze(0)).squeeze(0)


def denominators(policies: torch.Tensor, responses: Responses, versions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> (..., T) what the ratio of a response may be taken to: what was recorded, and three that are wrong."""
    by_version = torch.stack([token_logps(theta, responses) for theta in policies])
    return {
        "what was recorded": recorded_logps(policies, responses, versions),
        "the last version": by_version[-1],
        "the first version": by_version[0],
        "the mean over versions": by_version.mean(0),
    }


def update_of_each(
    theta: torch.Tensor, responses: Responses, recorded: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    """(..., R, V) w·A·Σ_t ∇log π_θ(o_t) of every response, through the package's own ratio, without the factor 1/T."""
    logps = token_logps(theta, responses)
    coefficients = weighted_advantages(logps, recorded, responses.mask, advantages, TIC)
    rows, tokens, mask = (x.unsqueeze(-2) for x in (responses.rows, responses.tokens, responses.mask))
    one = Responses(rows, tokens, mask, responses.rewards, responses.prompts)
    return score_sum(theta, one, coefficients.unsqueeze(-2))


def all_groups(behaviour: Listed, size: int) -> Responses:
    """(N^G, G, T) every group of G responses to the one prompt of a list, in every order."""
    return behaviour.responses[torch.cartesian_prod(*[torch.arange(len(behaviour.p_old))] * size).view(-1, size)]


def group_update(
    theta: torch.Tensor, policies: torch.Tensor, groups: Responses, versions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """E[update with the group mean as baseline] over all groups, (R, V), and the sum of their probabilities."""
    recorded = recorded_logps(policies, groups, versions)
    probability = recorded.sum((-1, -2)).exp()
    updates = update_of_each(theta, groups, recorded, group_advantages(groups.rewards)).mean(-3)
    return torch.tensordot(probability, updates, 1), probability.sum()


def term_of_the_group_mean(
    behaviour: Listed, theta: torch.Tensor, policies: torch.Tensor, size: int, ended: int
) -> torch.Tensor:
    """(R, V) what interruptions by the other members add to (G−1)/G·∇J(θ), with the group mean as baseline.

    The versions of member j depend on how long member i is, and so does the mean reward m(L) of j, given that i has L
    tokens. The group mean is no longer independent of i, although j is another response:

        −(G−1)/G · Σ_L m(L)·∇P_θ(|o| = L)

    Args:
        behaviour: a list with one prompt.
        theta: (R, V) the current policy.
        policies: (2, R, V) before and after the interruption.
        size: G.
        ended: how many members have ended when the others are interrupted.
    """
    responses = behaviour.responses
    scores = score_sum(theta, responses[:, None], responses.mask[:, None])  # (N, R, V)
    by_theta = token_logps(theta, responses).sum(-1).exp()
    others = all_groups(behaviour, size - 1)
    term = torch.zeros_like(theta)
    for length in range(1, behaviour.task.horizon + 1):
        ends = torch.cat([others.lengths, torch.full_like(others.lengths[:, :1], length)], -1)
        interrupted = ends.sort(-1).values[:, ended - 1, None, None]
        versions = (torch.arange(behaviour.task.horizon) >= interrupted).long().expand(others.tokens.shape)
        probability = recorded_logps(policies, others, versions).sum((-1, -2)).exp()
        mean_reward = probability @ others.rewards[:, 0]
        of_length = (responses.lengths == length) * by_theta
        term -= (size - 1) / size * mean_reward * torch.tensordot(of_length, scores, 1)
    return term
