"""Vanilla gradient ascent of the theorems' algorithms (v5 Eq. 10 and 11), with ‖∇J‖² exact at every step.

Outer step: draw prompts, sample G responses each from π_old = π_θ, cut the prompts into K disjoint mini-batches (v5
§2.2). Inner step: one plain gradient step on one mini-batch. Only the responses are sampled; ∇J(θ_{n,k}) is computed by
dynamic programming at every horizon. Runs of all algorithms and seeds advance together, and algorithms share their
random numbers, so that differences between algorithms are paired.
"""

from dataclasses import dataclass

import torch

from tic_grpo_trl.objective import Clip

from .estimators import Algorithm, group_advantages, length_normaliser, package_algorithm, token_coefficients
from .policy import STOP, Responses, Task, chain_task, expected_reward, policy_gradient, sample_responses, score_sum


HORIZONS = (4, 8, 16, 32, 64)


def theorem_algorithms() -> dict[str, Algorithm]:
    """The algorithms of Theorems 4.1–4.3, GRPO with DAPO's normaliser, and TIC-GRPO without its clip.

    The theorem's GRPO is per response (1/|o_i|), the package's algorithm `grpo` is DAPO's loss: both are run. TIC-GRPO
    without the clip tells what the weight does from what the clip does.
    """
    return {
        "GRPO (1/|o|)": Algorithm("token", Clip("two_sided", 0.2, 0.28), "grpo"),
        "GRPO (DAPO)": package_algorithm("grpo"),
        "GRPO2": package_algorithm("grpo2"),
        "TIC-GRPO": package_algorithm("tic_grpo"),
        "TIC-GRPO, no clip": package_algorithm("tic_grpo").unclipped(),
    }


@dataclass(frozen=True)
class Setting:
    """One point of the sweep.

    Args:
        horizon: T.
        inner_steps: K, mini-batches per rollout.
        rate: η/T of the algorithms with normaliser 1/T; their effective rate per unit of ∇J is about this, whatever T
            is.
        group_size: G.
        matched: divide η of GRPO's two normalisers by T·E[1/|o|] or T/E|o| at the start, so that all algorithms begin
            with the same expected step size; else η is the same number for all.
        steps: total number of inner steps N·K, the same for every K.
        prompts: prompts per mini-batch, the same for every K.
        seeds: independent runs on each task.
        tasks: seeds of the tasks (rewards, moves, starting policy).
    """

    horizon: int
    inner_steps: int = 4
    rate: float = 2.0
    group_size: int = 8
    matched: bool = False
    steps: int = 96
    prompts: int = 4
    seeds: int = 4
    tasks: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Ascent:
    """What came out of a setting, each (algorithms, seeds).

    Attributes:
        gap: mean ‖∇J(θ_{n,k})‖² over inner and outer steps.
        final_gap: the same over the last quarter of the steps.
        gain: J after the last step minus J at the start.
        clipped: share of tokens whose gradient the clip rule removed.
    """

    gap: torch.Tensor
    final_gap: torch.Tensor
    gain: torch.Tensor
    clipped: torch.Tensor


def starting_point(horizon: int, seed: int = 0) -> tuple[Task, torch.Tensor]:
    """Task and θ_{1,0} of a horizon: the same logits for every T, but the stop token's, so that E|o| grows with T."""
    task = chain_task(horizon, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    theta = 0.3 * torch.randn(task.shape, generator=generator, dtype=torch.float64)
    # three other tokens: a stop logit of log(3·2/T) stops with probability of about 2/T
    theta[:, STOP] += torch.log(torch.tensor(6.0 / horizon, dtype=torch.float64))
    return task, theta


def _mini_batch_update(theta, theta_old, batch: Responses, advantages, algorithms: list[Algorithm], horizon: int):
    """(algorithms, seeds, R, V) ascent directions on the mini-batches, and the share of tokens without gradient."""
    coefficients, clipped = [], []
    for a, algorithm in enumerate(algorithms):
        one = batch[a]
        normaliser = length_normaliser(one, algorithm.loss_type, horizon) / one.rewards.shape[-1]
        raw = token_coefficients(theta[a], theta_old[a], one, advantages[a], algorithm)
        active = one.mask.bool() & (advantages[a] != 0).unsqueeze(-1)
        clipped.append(((raw == 0) & active).sum((-1, -2)) / active.sum((-1, -2)).clamp(min=1))
        coefficients.append(normaliser.unsqueeze(-1) * raw)
    return score_sum(theta, batch, torch.stack(coefficients)), torch.stack(clipped)


def ascend(setting: Setting, algorithms: dict[str, Algorithm]) -> Ascent:
    """Run every algorithm on every task and seed of a setting.

    Args:
        setting: the point of the sweep.
        algorithms: name -> algorithm, in the order of the result's first dimension.

    Returns:
        Gaps, gains and clip shares, (algorithms, runs) each, runs = tasks·seeds in that order.
    """
    found = [_ascend_task(setting, list(algorithms.values()), task_seed) for task_seed in setting.tasks]
    return Ascent(*(torch.cat([getattr(f, name) for f in found], -1) for name in Ascent.__dataclass_fields__))


def _ascend_task(setting: Setting, algorithms: list[Algorithm], task_seed: int) -> Ascent:
    task, start = starting_point(setting.horizon, task_seed)
    generator = torch.Generator().manual_seed(task_seed)
    runs, group = (len(algorithms), setting.seeds), setting.group_size
    theta = start.expand(*runs, *start.shape).clone()
    rate = torch.full((len(algorithms), 1, 1, 1), setting.rate * setting.horizon, dtype=torch.float64)
    if setting.matched:
        rate = rate * initial_step_ratio(task, start, algorithms)[:, None, None, None]
    per_rollout = setting.inner_steps * setting.prompts
    gaps, clip_shares = [], []
    for _ in range(setting.steps // setting.inner_steps):
        theta_old = theta
        prompts = torch.randint(len(task.start), (setting.seeds, per_rollout), generator=generator)
        prompts = prompts.repeat_interleave(group, -1).expand(*runs, -1)
        size = (setting.seeds, per_rollout * group, setting.horizon)
        uniforms = torch.rand(size, generator=generator, dtype=torch.float64).expand(len(algorithms), *size)
        rollout = sample_responses(task, theta_old, prompts, uniforms)
        advantages = group_advantages(rollout.rewards.unflatten(-1, (-1, group))).flatten(-2)
        # prompts are i.i.d., so that consecutive blocks are a uniform partition by prompt
        for k in range(setting.inner_steps):
            part = slice(k * setting.prompts * group, (k + 1) * setting.prompts * group)
            gaps.append(policy_gradient(task, theta).square().sum((-1, -2)))
            update, clipped = _mini_batch_update(
                theta, theta_old, rollout[:, :, part], advantages[:, :, part], algorithms, setting.horizon
            )
            clip_shares.append(clipped)
            theta = theta + rate * update
    every = torch.stack(gaps)  # (N·K, algorithms, seeds)
    gain = expected_reward(task, theta) - expected_reward(task, start)
    return Ascent(every.mean(0), every[-max(1, len(every) // 4) :].mean(0), gain, torch.stack(clip_shares).mean(0))


def initial_step_ratio(
    task: Task, theta: torch.Tensor, algorithms: list[Algorithm], samples: int = 4096
) -> torch.Tensor:
    """(algorithms,) (1/T) over the mean normaliser of each algorithm at θ, from a sample of responses."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.arange(samples) % len(task.start)
    uniforms = torch.rand(samples, task.horizon, generator=generator, dtype=torch.float64)
    responses = sample_responses(task, theta, prompts, uniforms)
    factors = [length_normaliser(responses, algorithm.loss_type, task.horizon).mean() for algorithm in algorithms]
    return 1 / (task.horizon * torch.stack(factors))


def slope(xs: list[float], values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope of log value against log x, fitted per seed.

    Args:
        xs: (n,) the abscissae.
        values: (n, ..., seeds).

    Returns:
        mean and standard deviation over seeds, (...,) each.
    """
    x = torch.tensor(xs, dtype=torch.float64).log()
    x = (x - x.mean()) / (x - x.mean()).square().sum()
    slopes = torch.tensordot(x, values.double().log(), 1)
    return slopes.mean(-1), slopes.std(-1)
