"""Lemma A.1 of v5, exactly: what the cut of a rollout into two mini-batches does to the second step.

Two prompts are drawn, two responses each. The first mini-batch moves θ_0 to θ_1, the second gives the update of
unclipped TIC-GRPO at θ_1. Where θ_1 is independent of the second mini-batch (whole groups), that update is unbiased for
∇J(θ_1) up to the factor (G−1)/G of the group mean. A cut through the groups leaves half of each group in either
mini-batch, and the group mean makes them dependent; the reuse of the whole rollout (v2's Algorithm 2) makes them equal.
"""

import torch

from .estimators import NO_CLIP, Algorithm, Listed, group_advantages, token_coefficients
from .policy import policy_gradient, score_sum


PARTITIONS = ("by prompt", "through the groups", "reuse")
_TIC = Algorithm("trajectory", NO_CLIP, "dr_grpo")


def second_step_bias(behaviour: Listed, learning_rate: float) -> dict[str, float]:
    """Relative bias of the second step of unclipped TIC-GRPO under each of `PARTITIONS`, over every rollout.

    Args:
        behaviour: a list with two prompts or more and few trajectories (n per prompt: (prompts·n²)² rollouts).
        learning_rate: η of the first step, with the gradient of J as unit (the constant 1/T is left out).

    Returns:
        partition -> ‖E[update(θ_1)] − ((G−1)/G)·E[∇J(θ_1)]‖/‖E[∇J(θ_1)]‖, G = 2.
    """
    responses, theta = behaviour.responses, behaviour.theta_old
    n = len(behaviour.p_old)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    pairs = pairs[responses.prompts[pairs[:, 0]] == responses.prompts[pairs[:, 1]]]  # a group shares its prompt
    prompts = len(behaviour.task.start)
    p_pair = behaviour.p_old[pairs].prod(-1) * prompts  # P(s_0)·P(o_1|s_0)·P(o_2|s_0)
    first, second = torch.cartesian_prod(torch.arange(len(pairs)), torch.arange(len(pairs))).T
    rollout = torch.cat([pairs[first], pairs[second]], 1)  # (M, 4): two groups of two
    probability = p_pair[first] * p_pair[second]
    drawn = responses[rollout]
    advantages = group_advantages(drawn.rewards.unflatten(-1, (2, 2))).flatten(-2)
    members = {"by prompt": ([0, 1], [2, 3]), "through the groups": ([0, 2], [1, 3]), "reuse": ([0, 1, 2, 3],) * 2}

    def update(at, chosen):
        part, a = drawn[:, chosen], advantages[:, chosen]
        return score_sum(at, part, token_coefficients(at, theta, part, a, _TIC) / len(chosen))

    found = {}
    for name, (batch_1, batch_2) in members.items():
        moved = theta + learning_rate * update(theta, batch_1)  # (M, R, V) θ_1
        expected = torch.tensordot(probability, update(moved, batch_2), 1)
        target = torch.tensordot(probability, policy_gradient(behaviour.task, moved), 1)
        found[name] = float((expected - target / 2).norm() / target.norm())
    return found
