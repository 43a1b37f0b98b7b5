"""Avg@k and its uncertainty: pure functions of rewards from 0 to 1."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance


Z = NormalDist().inv_cdf(0.975)  # 1.96, for 95 % intervals


@dataclass(frozen=True)
class Average:
    """Avg@k of one set of problems."""

    value: float  # mean over problems of the mean over samples
    interval: tuple[float, float]  # 95 %, for other problems of the same kind
    sampling_error: float | None  # standard error for new samples of the same problems; `None` for k = 1
    problems: int  # number of problems that count, n
    excluded: int  # number of problems that could not be scored
    means: dict[str, float]  # mean reward of each problem


def average_at_k(rewards: Mapping[str, Sequence[float | None]]) -> Average:
    r"""Compute Avg@k with its two uncertainties.

    With $r_{ij}$ the reward of sample $j$ of problem $i$, $p_i = \frac1k \sum_j r_{ij}$ and $s_i^2$ the variance of
    problem $i$'s samples (divisor $k - 1$):

    - $\text{Avg@}k = \bar p = \frac1n \sum_i p_i$
    - sampling error, for the same problems: $\sqrt{\frac1{n^2} \sum_i s_i^2 / k}$
    - interval for other problems: see `problem_interval`. It includes the sampling error, since $p_i$ depends on the
      samples.

    The unit is the problem, because samples of one problem are not independent (E. Miller, "Adding Error Bars to
    Evals", arXiv:2411.00640). A problem with a `None` reward is excluded.

    Raises:
        ValueError: if problems have different numbers of samples, a reward is outside [0, 1], or no problem is left.
    """
    if len({len(row) for row in rewards.values()}) > 1:
        raise ValueError("the problems have different numbers of samples; Avg@k needs k of each")
    scored = {name: [float(r) for r in row if r is not None] for name, row in rewards.items() if None not in row}
    if not any(scored.values()):
        raise ValueError(f"none of {len(rewards)} problems could be scored: each has a reward of None")
    if any(not 0 <= reward <= 1 for row in scored.values() for reward in row):
        raise ValueError("Avg@k needs rewards from 0 to 1; give a reward function with that range")
    n, k = len(scored), len(next(iter(scored.values())))
    means = {name: fmean(row) for name, row in scored.items()}
    return Average(
        value=fmean(means.values()),
        interval=problem_interval(list(means.values()), k),
        sampling_error=math.sqrt(sum(variance(row) / k for row in scored.values())) / n if k > 1 else None,
        problems=n,
        excluded=len(rewards) - n,
        means=means,
    )


def problem_interval(means: Sequence[float], k: int) -> tuple[float, float]:
    r"""Compute a 95 % interval for the mean over all problems of this kind, from n of them.

    This is Wilson's score interval (1927) with an effective number of observations m, as used for clustered surveys
    ("modified Wilson" in the documentation of SAS PROC SURVEYFREQ, after Korn and Graubard, 1998). With $s^2$ the
    variance of the problems' means (divisor $n - 1$),

    $$m = \min\Bigl(nk,\; \frac{\bar p (1 - \bar p)}{s^2} \cdot \frac{n}{n - 1} \cdot n\Bigr), \qquad
    \frac{\bar p + z^2 / 2m \pm z \sqrt{\bar p (1 - \bar p) / m + z^2 / 4 m^2}}{1 + z^2 / m}.$$

    For k = 1 and rewards of 0 and 1, $m = n$, which gives the plain Wilson interval. Unlike
    $\bar p \pm z s / \sqrt n$, it stays within [0, 1] and keeps a positive width if (almost) every answer is wrong.

    `means` has the mean reward of each problem, k its number of samples. A single problem, which tells nothing about
    others, gives 0 and 1.
    """
    n, p = len(means), fmean(means)
    if n == 1:
        return 0.0, 1.0
    most = p * (1 - p)  # variance of a single 0-or-1 observation
    spread = variance(means) * (n - 1) / n
    m = n if most == 0 else min(n * k, n * most / spread) if spread else n * k
    centre = (p + Z**2 / (2 * m)) / (1 + Z**2 / m)
    half = Z * math.sqrt(most / m + Z**2 / (4 * m**2)) / (1 + Z**2 / m)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    means: Mapping[str, float], baseline: Mapping[str, float]
) -> tuple[float, tuple[float, float] | None]:
    r"""Compute how much better one model is than another on the problems that both answered.

    The interval is $\bar d \pm z\, s_d / \sqrt n$ with $d_i$ the difference of problem $i$'s means. Differences remove
    the variation of difficulty, which is common to both models (Miller, arXiv:2411.00640).

    The interval is `None` for fewer than two common problems.

    Raises:
        ValueError: if the two have no problem in common.
    """
    differences = [means[name] - baseline[name] for name in means if name in baseline]
    if not differences:
        raise ValueError("the two results have no problem in common")
    mean = fmean(differences)
    if len(differences) < 2:
        return mean, None
    half = Z * math.sqrt(variance(differences) / len(differences))
    return mean, (mean - half, mean + half)
