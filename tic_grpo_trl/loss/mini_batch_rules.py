"""Rules that look at a whole mini-batch, as pure functions."""

import torch


def adaptive_cap(
    log_weight: torch.Tensor,  # (B, 1) or (B, T)
    mask: torch.Tensor,  # (B, T)
) -> torch.Tensor:
    """Choose the cap of the weights of a mini-batch: the one with the largest estimated efficiency.

    With u = min(w, c), the cap is the c that minimises (E[w − u]² + E[u²]/B) / E[u]²: the squared bias and the variance
    of a mean over B responses, relative to its size. The candidates are the weights themselves.

    Args:
        log_weight: finite log-weights of the responses that are computed, B ≥ 1, in nats.
        mask: 1 on the tokens that count. With one weight per token, expectations are over these tokens.

    Returns:
        The log of the cap, 0-dimensional, in nats.
    """
    counted = log_weight.flatten() if log_weight.size(1) == 1 else log_weight[mask.bool()]
    ordered = counted.double().sort().values
    w = (ordered - ordered[-1]).exp()  # a common factor cancels
    n, above = len(w), torch.arange(len(w) - 1, -1, -1, device=w.device)  # weights after each candidate
    sums, squares = w.cumsum(0), w.square().cumsum(0)
    mean, mean_square = (sums + above * w) / n, (squares + above * w.square()) / n  # E[u] and E[u²]
    bias = sums[-1] / n - mean
    error = (bias.square() + mean_square / log_weight.size(0)) / mean.square()
    best = torch.where(w > 0, error, torch.inf).argmin()
    return ordered[best].to(log_weight.dtype)
