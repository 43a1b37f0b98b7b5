"""Rules that look at a whole mini-batch, as pure functions."""

import torch

from ..objective import LOG_WEIGHT_BOUND


def adaptive_cap(
    log_weight: torch.Tensor,  # (B, 1) or (B, T)
    advantages: torch.Tensor,  # (B,) or (B, T)
    mask: torch.Tensor,  # (B, T)
    noise_scale: float,
) -> torch.Tensor:
    """Choose the cap at which the update of a mini-batch has the largest estimated efficiency.

    The efficiency of an update ĝ is (E ĝ·g)²/(‖g‖²·E‖ĝ‖²), with g = ∇J(θ): what a step of the best size gains. With
    u = min(w, c), κ the gradient noise scale and L the length of a response, it is estimated as 1 / (1 + e(c)) with

        e = ((1 − S)² + κ/n·N) / S²,   S = Σ A²·u / Σ A²·w,   N = Σ A²·L·u² / Σ A²·L·w

    S is the share of the signal that the cap keeps, if a response's share of it grows with A² and not otherwise with w.
    N is the noise, relative to fresh responses: the squared norm of a response's score grows with L (Property 4.1). For
    weights of tokens, S takes the mean of u over a response and N the sum of u². All that the cap cuts off counts as
    bias. A response with A = 0 does not count, in n neither. E[w] is 1, so no denominator is larger than it is with
    w = 1, and S is at most 1: otherwise a single large weight would be its own measure, and nothing capped. Truncated
    importance sampling (Ionides, 2008) has a cap that grows with √n alone.

    Args:
        log_weight: finite log-weights of responses that have a token, B ≥ 1, in nats.
        advantages: A_i, not all 0.
        mask: 1 on the tokens that count, at least one per response.
        noise_scale: κ, the variance of one response's gradient over ‖g‖² (arXiv 1812.06162), in responses.

    Returns:
        The log of the cap, 0-dimensional, in nats: the best of 1 and the weights themselves.
    """
    lengths = mask.sum(dim=1, keepdim=True).double()  # (B, 1)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    squares = ((advantages.double().square() * mask).sum(dim=1, keepdim=True) / lengths).expand_as(log_weight)
    if log_weight.size(1) == 1:
        signal, noise = squares, squares * lengths
    else:
        signal, noise = squares / lengths, squares
        log_weight, signal, noise = (each[mask.bool()] for each in (log_weight, signal, noise))
    # a cap of 1 is a candidate too, as no weight may be near it; beyond its bound the loss doesn't tell weights apart
    log_w = torch.cat([log_weight.flatten(), log_weight.new_zeros(1)]).clamp(max=LOG_WEIGHT_BOUND)
    log_w, order = log_w.sort()
    signal, noise = (torch.cat([each.flatten(), each.new_zeros(1)])[order] for each in (signal, noise))
    w = log_w.double().exp()
    kept = (signal * w).cumsum(0) + w * (signal.sum() - signal.cumsum(0))
    squared = (noise * w.square()).cumsum(0) + w.square() * (noise.sum() - noise.cumsum(0))
    share = (kept / torch.minimum(kept[-1], signal.sum())).clamp(max=1)
    noise_of_cap = squared / torch.minimum((noise * w).sum(), noise.sum())
    error = ((1 - share).square() + noise_scale / squares[:, 0].count_nonzero() * noise_of_cap) / share.square()
    return log_w[torch.where(kept > 0, error, torch.inf).argmin()]


def minimum_variance_advantages(
    advantages: torch.Tensor,  # (n,)
    log_weights: torch.Tensor,  # (n,)
    squared_norms: torch.Tensor,  # (n,)
    groups: torch.Tensor,  # (n,)
) -> torch.Tensor:
    """Subtract VCPO's baseline, the one with the least variance, from every response's advantage.

    The baseline of response i is b_i = Σ k_j·A_j / Σ k_j over the other responses j of its group, with
    k = w²·‖∇ log P_θ(o)‖². Leaving i out keeps the update unbiased (arXiv 2602.17616). The group's mean, which TRL has
    subtracted from A, cancels. A response whose group has no other keeps its advantage.

    Args:
        advantages: rewards minus any constant of the group.
        log_weights: R, finite, in nats; w is not capped.
        squared_norms: ‖∇ log P_θ(o)‖², or anything proportional to it.
        groups: the same number for the responses of a group.

    Returns:
        (n,) advantages, of the dtype of `advantages`.
    """
    same = groups.unsqueeze(0) == groups.unsqueeze(1)  # (n, n)
    others = same & ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    log_k = 2 * log_weights.double() + squared_norms.double().clamp(min=torch.finfo(torch.float32).tiny).log()
    shares = log_k.expand_as(others).masked_fill(~others, -torch.inf).softmax(dim=1)  # the largest k cancels
    baselines = (shares * advantages.double()).sum(dim=1)
    return (advantages - torch.where(others.any(dim=1), baselines, 0.0)).to(advantages.dtype)
