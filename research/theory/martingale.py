"""Property 4.1 of v5 (token scores are martingale differences), exactly, and where it stops holding.

The property is empty where every prefix has parameters of its own, because then the scores of two positions have no
coordinate in common: everything here needs rows tied over positions.
"""

from dataclasses import dataclass

import torch

from .policy import Responses, score_sum


@dataclass(frozen=True)
class SecondMoments:
    """E‖Σ_t x_t‖² and Σ_t E‖x_t‖² of token vectors x_t = c_t·∇log π_θ(o_t)."""

    of_sum: float
    summed: float

    @property
    def gap(self) -> float:
        """(E‖Σ_t x_t‖² − Σ_t E‖x_t‖²)/Σ_t E‖x_t‖²: 0 for martingale differences."""
        return (self.of_sum - self.summed) / self.summed


def second_moments(
    theta: torch.Tensor,  # (R, V)
    responses: Responses,  # (N, T)
    probability: torch.Tensor,  # (N,)
    coefficients: torch.Tensor,  # (N, T)
) -> SecondMoments:
    """Both sides of Property 4.1 for weighted token scores.

    Args:
        theta: the policy whose scores are taken.
        responses: a complete list, or a sample.
        probability: of each response under the measure of the expectation (1/N for a sample).
        coefficients: c_t, 0 where masked; the property itself has c_t = 1.
    """
    of_sum, chunk = 0.0, 8192  # (N, R, V) at once would not fit for large samples
    for start in range(0, len(probability), chunk):
        part = slice(start, start + chunk)
        sums = score_sum(theta, responses[part][:, None], coefficients[part][:, None])
        of_sum += float(probability[part] @ sums.flatten(1).square().sum(-1))
    probs = theta.softmax(-1)
    token_square = 1 - 2 * probs + probs.square().sum(-1, keepdim=True)  # (R, V) ‖1[a] − π‖²
    squares = token_square[responses.rows, responses.tokens] * coefficients.square()
    return SecondMoments(of_sum, float(probability @ squares.sum(-1)))


def property_4_1_cases(
    theta: torch.Tensor,  # (R, V)
    responses: Responses,  # (N, T)
    p_old: torch.Tensor,  # (N,)
    log_ratio: torch.Tensor,  # (N, T)
    epsilon_high: float = 0.28,
) -> dict[str, SecondMoments]:
    """Property 4.1 under the weights of v5 §4.4; responses come from π_old, with probability `p_old`.

    Returns:
        - `scores, own measure`: c = 1 under π_θ (Property 4.1), by the measure change w'·P_old.
        - `scores, old measure`: c = 1 under π_old: the scores are no longer centred.
        - `token weights`: c = w_t under π_old. Σ_a π_old·w·∇log π_θ = Σ_a ∇π_θ = 0, so the property holds.
        - `token weights, up-only`: c = 1[w_t ≤ 1+ε_high]·w_t under π_old.
        - `trajectory weight`: c = w' under π_old: w' looks ahead.
        - `trajectory weight, up-only`: c = 1[w' ≤ 1+ε_high]·w' under π_old, the update of TIC-GRPO without A.
    """
    mask, cap = responses.mask, 1 + epsilon_high
    token = log_ratio.exp() * mask
    trajectory = log_ratio.sum(-1, keepdim=True).exp() * mask
    own = p_old * log_ratio.sum(-1).exp()
    return {
        "scores, own measure": second_moments(theta, responses, own, mask),
        "scores, old measure": second_moments(theta, responses, p_old, mask),
        "token weights": second_moments(theta, responses, p_old, token),
        "token weights, up-only": second_moments(theta, responses, p_old, token * (token <= cap)),
        "trajectory weight": second_moments(theta, responses, p_old, trajectory),
        "trajectory weight, up-only": second_moments(theta, responses, p_old, trajectory * (trajectory <= cap)),
    }
