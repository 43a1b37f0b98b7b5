"""The anchored loss against the theory's exact values, for policies that hypothesis searches.

Every trajectory of a policy is listed and weighed by its probability under π_old, so that nothing is sampled.
"""

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from searching import ALGORITHM_RULES, Batch, bounds, clipped_weight, close, ratios_of, searched, tensors

from research.theory.estimators import STD_OFFSET, expected_update, listed, package_algorithm
from research.theory.policy import enumerate_responses, policy_gradient, token_logps, tree_task
from tic_grpo_trl.algorithms import FAMILY


TASKS = [
    (task, enumerate_responses(task)) for task in (tree_task(3, 3, 2, seed=1), tree_task(2, 4, 1, "prefix", seed=2))
]


@st.composite
def policies(draw):
    """A task's listed responses under π_old, and θ: logits, and steps from them, of up to 2."""
    task, responses = draw(st.sampled_from(TASKS))
    theta_old, step = (draw(tensors(task.shape, st.floats(-2, 2, width=32))) for _ in range(2))
    return listed(task, responses, theta_old), theta_old + step


def anchored_update(behaviour, theta, algorithm) -> torch.Tensor:
    """(R, V) minus the gradient of the token-level loss at θ, responses weighed by their probability under π_old."""
    theta, responses = theta.clone().requires_grad_(), behaviour.responses
    logps, old = token_logps(theta, responses), token_logps(behaviour.theta_old, responses)
    batch = Batch(logps, old, advantages_of(behaviour, algorithm), responses.mask)
    ratio = ratios_of(logps, clipped_weight(batch, algorithm.level, algorithm.clip), responses.mask)
    objective = (ratio * batch.advantages.unsqueeze(1) * responses.mask).sum(-1)
    return torch.autograd.grad((weight_of(behaviour, algorithm) * objective).sum(), theta)[0]


def advantages_of(behaviour, algorithm) -> torch.Tensor:
    centred = behaviour.responses.rewards - behaviour.mean
    return centred / (behaviour.std + STD_OFFSET) if algorithm.scale_rewards == "group" else centred


def weight_of(behaviour, algorithm) -> torch.Tensor:
    length = {"grpo": behaviour.responses.lengths, "dr_grpo": behaviour.task.horizon, "dapo": behaviour.mean_length}
    return behaviour.p_old / length[algorithm.loss_type]


def clipped_objective(log_p, w, a, clip, low, high) -> torch.Tensor:
    """The papers' objective of one response, as a function to differentiate."""
    held = (min(w, high) * a).detach() * log_p  # truncated importance sampling
    if clip.mode == "up_only":
        return w.clamp(max=high) * a
    if clip.mode == "two_sided":
        return torch.min(w * a, w.clamp(low, high) * a)
    if clip.mode == "capped":
        return held
    if clip.mode == "masked":
        return w * a * (low <= w <= high)
    return (w.clamp(max=high) * a) if a >= 0 else held * (w >= low)


@searched(25)
@given(policies())
def test_the_unclipped_loss_has_the_exact_policy_gradient(policy):
    behaviour, theta = policy
    exact = policy_gradient(behaviour.task, theta) / behaviour.task.horizon  # by dynamic programming
    update = anchored_update(behaviour, theta, package_algorithm("tic_grpo").unclipped())
    close(update, exact, 1e-12)


@searched(25)
@given(
    policies(),
    st.sampled_from([name for name, algorithm in ALGORITHM_RULES.items() if algorithm.level == "trajectory"]),
)
def test_the_clipped_loss_has_the_exact_gradient_of_its_objective(policy, name):
    (behaviour, theta), algorithm = policy, ALGORITHM_RULES[name]
    theta.requires_grad_()
    log_p = token_logps(theta, behaviour.responses).sum(-1)
    log_old = token_logps(behaviour.theta_old, behaviour.responses).sum(-1)
    objective = 0.0
    for i, a in enumerate(advantages_of(behaviour, algorithm)):
        limits = bounds(algorithm.clip, bool(a >= 0), int(behaviour.responses.lengths[i]))
        assume(all(abs(log_p[i].item() - log_old[i].item() - limit) > 1e-12 for limit in limits))
        low, high = map(math.exp, limits)
        weight = weight_of(behaviour, algorithm)[i]
        objective = objective + weight * clipped_objective(
            log_p[i], (log_p[i] - log_old[i]).exp(), a, algorithm.clip, low, high
        )
    (exact,) = torch.autograd.grad(objective, theta)
    close(anchored_update(behaviour, theta.detach(), algorithm), exact, 1e-11)


@searched(25)
@given(policies(), st.sampled_from(FAMILY))
def test_the_loss_of_every_arm_has_the_expected_update_of_the_theory(policy, name):
    (behaviour, theta), algorithm = policy, ALGORITHM_RULES[name]
    close(anchored_update(behaviour, theta, algorithm), expected_update(behaviour, theta, algorithm), 1e-11)
