"""What each algorithm's update is on average, without sampling, through the package's own ratios and clip rules.

Two exact forms of the expectation over the rollout:

- **i.i.d.** ([`expected_update`]): one response at a time with the true mean (and standard deviation) of the reward in
  the advantage, and E|o| in the denominator of `dapo`, as both papers' appendices do. Any policy that can be listed.
- **groups** ([`expected_group_update`]): every multiset of G responses with its multinomial weight, the group's own
  mean and standard deviation in the advantage, and its own Σ|o_i| in `dapo`. Policies with few trajectories.

An update is the *ascent* direction: minus the gradient of the trainer's loss.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch

from tic_grpo_trl.config import TICGRPOConfig
from tic_grpo_trl.objective import Clip, clip_log_weight, log_importance_weight, token_log_ratio

from .policy import Responses, Task, policy_gradient, probabilities, score_sum, token_logps


STD_OFFSET = 1e-4  # δ of v2's Algorithm 2; TRL's value
NO_CLIP = Clip("none")  # bounds out of reach


@dataclass(frozen=True)
class Algorithm:
    """The axes of an algorithm that decide its update: level, clip rule, `loss_type` and `scale_rewards`."""

    level: str
    clip: Clip
    loss_type: str
    scale_rewards: str = "none"

    def unclipped(self) -> "Algorithm":
        return replace(self, clip=NO_CLIP)


def package_algorithm(name: str) -> Algorithm:
    """An algorithm as [`~tic_grpo_trl.TICGRPOConfig`] resolves it.

    Raises:
        ValueError: for an unknown name.
    """
    args = TICGRPOConfig(output_dir="unused", algorithm=name, report_to=[], use_cpu=True)
    return Algorithm(str(args.importance_sampling_level), args.clip, str(args.loss_type), str(args.scale_rewards))


def weighted_advantages(
    logps: torch.Tensor,  # (..., N, T)
    recorded: torch.Tensor,  # (..., N, T) of the behaviour policy, whichever it was at each token
    mask: torch.Tensor,  # (..., N, T)
    advantages: torch.Tensor,  # (..., N)
    algorithm: Algorithm,
    log_cap: torch.Tensor | None = None,  # 0-dimensional, of the clip mode `adaptive`
) -> torch.Tensor:
    """(..., N, T) what multiplies ∇log π_θ(o_{i,t}) before the length normaliser: 1[kept]·w·A_i (v2 Eq. 11, line *)."""
    logps, recorded, mask = torch.broadcast_tensors(logps, recorded, mask)
    shape = mask.shape
    # the package's functions take (B, T) and (B,)
    logps, recorded, mask = (x.reshape(-1, shape[-1]) for x in (logps, recorded, mask))
    advantages = advantages.expand(shape[:-1]).reshape(-1)
    log_weight = log_importance_weight(token_log_ratio(logps, recorded, mask), mask, algorithm.level)
    clipped = clip_log_weight(log_weight, advantages, mask, algorithm.clip, log_cap)
    coefficients = clipped.log_weight.exp() * clipped.keeps_gradient * advantages.unsqueeze(1) * mask
    return coefficients.reshape(shape)


def token_coefficients(
    theta: torch.Tensor,  # (..., R, V)
    theta_old: torch.Tensor,  # (..., R, V)
    responses: Responses,  # (..., N, T)
    advantages: torch.Tensor,  # (..., N)
    algorithm: Algorithm,
) -> torch.Tensor:
    """(..., N, T) [`weighted_advantages`] of responses from one policy π_old."""
    logps, old_logps = token_logps(theta, responses), token_logps(theta_old, responses)
    return weighted_advantages(logps, old_logps, responses.mask, advantages, algorithm)


def length_normaliser(responses: Responses, loss_type: str, horizon: int, mean_length: float | None = None):
    """(..., N) factor of each response in the *mean* over responses: 1/|o_i|, 1/T, or 1/(mean length).

    Args:
        responses: the batch.
        loss_type: `"grpo"`, `"dr_grpo"` or `"dapo"`.
        horizon: T.
        mean_length: for `dapo`, E|o| in the i.i.d. form; `None` takes the batch's own mean length.

    Raises:
        ValueError: for another loss type.
    """
    lengths = responses.lengths
    if loss_type == "grpo":
        return 1 / lengths
    if loss_type == "dr_grpo":
        return torch.full_like(lengths, 1 / horizon)
    if loss_type == "dapo":
        mean = lengths.mean(-1, keepdim=True) if mean_length is None else mean_length
        return torch.ones_like(lengths) / mean
    raise ValueError(f"Unknown loss_type {loss_type!r}: choose 'grpo', 'dr_grpo' or 'dapo'.")


def group_advantages(rewards: torch.Tensor, scale_rewards: str = "none", correction: int = 1) -> torch.Tensor:
    """(..., G) A_i of a group: r_i − μ_G, divided by σ_G + δ where rewards are scaled.

    `correction` is 1 for TRL's σ_G (divisor G − 1) and 0 for v2's (divisor G).
    """
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if scale_rewards == "group":
        return advantages / (rewards.std(-1, keepdim=True, correction=correction) + STD_OFFSET)
    return advantages


@dataclass(frozen=True)
class Listed:
    """A task's complete list of responses with what the behaviour policy makes of it.

    Attributes:
        task: the task.
        responses: every trajectory, N of them.
        theta_old: (R, V) π_old.
        p_old: (N,) probability of prompt and response under π_old.
        mean: (N,) true mean reward of the response's prompt, μ(s_0) of v5 Eq. 17.
        std: (N,) true standard deviation of the reward given the prompt.
        mean_length: E|o|.
        mean_inverse_length: E[1/|o|], T^{(−1)} of v2 Eq. 8.
    """

    task: Task
    responses: Responses
    theta_old: torch.Tensor
    p_old: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    mean_length: float
    mean_inverse_length: float


def listed(task: Task, responses: Responses, theta_old: torch.Tensor) -> Listed:
    """Weigh a complete list of responses by π_old."""
    prompts = len(task.start)
    p = probabilities(theta_old, responses, prompts)
    given_prompt = torch.zeros(2, prompts, dtype=p.dtype)
    for k, moment in enumerate((responses.rewards, responses.rewards**2)):
        given_prompt[k].index_add_(0, responses.prompts, prompts * p * moment)
    mean, square = given_prompt[:, responses.prompts]
    std = (square - mean**2).clamp(min=0).sqrt()
    lengths = responses.lengths
    return Listed(task, responses, theta_old, p, mean, std, float((p * lengths).sum()), float((p / lengths).sum()))


def expected_update(behaviour: Listed, theta: torch.Tensor, algorithm: Algorithm) -> torch.Tensor:
    """(R, V) E[an algorithm's update at θ], responses from π_old, i.i.d. form with true mean and deviation."""
    responses = behaviour.responses
    advantages = responses.rewards - behaviour.mean
    if algorithm.scale_rewards == "group":
        advantages = advantages / (behaviour.std + STD_OFFSET)
    normaliser = length_normaliser(responses, algorithm.loss_type, behaviour.task.horizon, behaviour.mean_length)
    coefficients = token_coefficients(theta, behaviour.theta_old, responses, advantages, algorithm)
    return score_sum(theta, responses, (behaviour.p_old * normaliser).unsqueeze(-1) * coefficients)


def known_scale(behaviour: Listed, algorithm: Algorithm) -> float:
    """The constant of an algorithm's normalisers before the gradient: 1/T, 1/E|o| or E[1/|o|], over E[σ] if scaled."""
    constants = {
        "dr_grpo": 1 / behaviour.task.horizon,
        "dapo": 1 / behaviour.mean_length,
        "grpo": behaviour.mean_inverse_length,
    }
    std = (behaviour.p_old * (behaviour.std + STD_OFFSET)).sum() if algorithm.scale_rewards == "group" else 1.0
    return constants[algorithm.loss_type] / float(std)


@dataclass(frozen=True)
class Bias:
    """Distance of an expected update u from the policy gradient g = ∇J(θ).

    Attributes:
        relative_error: ‖u/c − g‖/‖g‖ with c the algorithm's [`known_scale`].
        direction_error: min over s ≥ 0 of ‖s·u − g‖/‖g‖, in [0, 1]: what no step size can repair. √(1 − cos²), or 1
            where u points away from g; a zero update counts as 1.
        cosine: of the angle between u and g, 0 for a zero update.
    """

    relative_error: float
    direction_error: float
    cosine: float


def bias(update: torch.Tensor, gradient: torch.Tensor, scale: float) -> Bias:
    """Measure an expected update against the policy gradient, see [`Bias`]."""
    size, norm = float(gradient.norm()), float(update.norm())
    relative_error = float((update / scale - gradient).norm()) / size
    cosine = float((update * gradient).sum()) / (size * norm) if norm else 0.0
    # the residual of the projection keeps its digits where 1 − cos² would lose them
    step = max(cosine, 0.0) * size / norm if norm else 0.0
    return Bias(relative_error, float((step * update - gradient).norm()) / size, cosine)


def bias_of_algorithm(behaviour: Listed, theta: torch.Tensor, algorithm: Algorithm) -> Bias:
    """Bias of an algorithm's expected update (i.i.d. form) at θ."""
    gradient = policy_gradient(behaviour.task, theta)
    return bias(expected_update(behaviour, theta, algorithm), gradient, known_scale(behaviour, algorithm))


def multisets(behaviour: Listed, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every group of a task with one prompt, up to order.

    Returns:
        (M, G) indices into the list and (M,) probabilities (multinomial), which sum to 1.
    """
    index = torch.tensor(list(itertools.combinations_with_replacement(range(len(behaviour.p_old)), size)))
    # G!/Π(multiplicities)!: element j contributes 1/(how many equal ones precede it, itself included)
    equal_so_far = (index.unsqueeze(2) == index.unsqueeze(1)).tril().sum(-1)  # (M, G)
    orders = math.factorial(size) / equal_so_far.prod(-1).double()
    return index, orders * behaviour.p_old[index].prod(-1)


def expected_group_update(behaviour: Listed, theta: torch.Tensor, algorithm: Algorithm, size: int, correction: int = 1):
    """(R, V) E[update of an algorithm at θ] over all groups of G responses, with the group's own mean, std and Σ|o_i|.

    Args:
        behaviour: a list with one prompt.
        theta: (R, V).
        algorithm: the algorithm.
        size: G.
        correction: of the group's standard deviation, see [`group_advantages`].
    """
    index, weight = multisets(behaviour, size)
    groups = behaviour.responses[index]  # (M, G, T)
    advantages = group_advantages(groups.rewards, algorithm.scale_rewards, correction)
    normaliser = length_normaliser(groups, algorithm.loss_type, behaviour.task.horizon) / size
    coefficients = token_coefficients(theta, behaviour.theta_old, groups, advantages, algorithm)
    return torch.tensordot(weight, score_sum(theta, groups, normaliser.unsqueeze(-1) * coefficients), 1)
