"""Tabular softmax policies small enough that J(θ) and ∇J(θ) need no sampling, in float64.

A [`Task`] is a deterministic automaton: it says which state a token leads to, which row of logits the policy uses in a
state, and what a response that ends there is worth. One class covers both uses: with a state per prefix the reward is
an arbitrary function of the complete trajectory, and every trajectory can be listed; with a handful of states the
horizon can be 64 and J is still exact, by dynamic programming.

Shapes: θ is (..., R, V), R rows of logits over V tokens; responses are (..., N, T). Leading dimensions broadcast, so
that many policies or many groups are treated at once. Token 0 is the stop token; it is part of the response (v5 §2.2),
so |o| counts it.
"""

import itertools
import math
import random
from dataclasses import dataclass

import torch


STOP = 0
REWARD_LEVELS = 5  # rewards of the listed tasks are 0, ¼, ½, ¾, 1: few values keep E[σ_G] exact for any group size


@dataclass(frozen=True)
class Task:
    """An episodic task with a terminal reward (v5 §2.1), prompts drawn uniformly.

    Args:
        next_state: (Q, V) the state that a token leads to; with the stop token, the state whose reward is given.
        row: (Q,) the row of logits that the policy uses in a state. Equal rows tie parameters.
        start: (S,) the state in which each of the S prompts starts.
        reward: (Q,) reward of a response that ends in a state, in [0, 1].
        horizon: T, the largest number of tokens in a response.
    """

    next_state: torch.Tensor
    row: torch.Tensor
    start: torch.Tensor
    reward: torch.Tensor
    horizon: int

    @property
    def shape(self) -> tuple[int, int]:
        """(R, V), the shape of θ."""
        return int(self.row.max()) + 1, self.next_state.shape[1]


@dataclass(frozen=True)
class Responses:
    """Complete responses as the rows and tokens that they visit.

    Args:
        rows: (..., N, T) row of logits at each position.
        tokens: (..., N, T) the token chosen there.
        mask: (..., N, T) float64, 1 on tokens of the response, the stop token included.
        rewards: (..., N) r(s_T).
        prompts: (..., N) index of s_0.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    rewards: torch.Tensor
    prompts: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """(..., N) |o_i|, in tokens."""
        return self.mask.sum(-1)

    def __getitem__(self, index) -> "Responses":
        return Responses(
            self.rows[index], self.tokens[index], self.mask[index], self.rewards[index], self.prompts[index]
        )


def tree_task(vocabulary: int, horizon: int, prompts: int = 1, tie: str = "last_token", seed: int = 0) -> Task:
    """A task with one state per prefix: the reward is an arbitrary function of the trajectory.

    Rewards are a noisy score of the token pairs in the trajectory, rounded to five levels, and differ between prompts.

    Args:
        vocabulary: V, the stop token included.
        horizon: T.
        prompts: S; each has rewards and a first row of logits of its own and shares all other rows.
        tie: `"last_token"`: one row per last token, tied over positions; `"prefix"`: one row per prefix.
        seed: of the rewards.

    Returns:
        The task; it has S·(((V−1)^T − 1)/(V−2) + (V−1)^T) trajectories.
    """
    generator = random.Random(seed)
    value = [[[generator.gauss(0, 1) for _ in range(vocabulary)] for _ in range(vocabulary)] for _ in range(prompts)]
    next_state: list[list[int]] = []
    row, reward, start = [], [], []

    def add(prompt: int, prefix: tuple[int, ...]) -> int:
        state = len(next_state)
        next_state.append([state] * vocabulary)
        last = prompt if not prefix else prompts + prefix[-1]
        row.append(last if tie == "last_token" else state)
        score = generator.gauss(0, 0.5)
        score += sum(value[prompt][previous][token] for previous, token in itertools.pairwise((STOP, *prefix)))
        reward.append(round((REWARD_LEVELS - 1) / (1 + math.exp(-score))) / (REWARD_LEVELS - 1))
        if len(prefix) < horizon and STOP not in prefix:
            next_state[state] = [add(prompt, (*prefix, token)) for token in range(vocabulary)]
        return state

    for prompt in range(prompts):
        start.append(add(prompt, ()))
    return Task(
        torch.tensor(next_state),
        torch.tensor(row),
        torch.tensor(start),
        torch.tensor(reward, dtype=torch.float64),
        horizon,
    )


def chain_task(horizon: int, contexts: int = 5, vocabulary: int = 4, prompts: int = 6, seed: int = 0) -> Task:
    """A task whose size does not grow with the horizon: the reward depends on the context in which the response stops.

    Tokens move between contexts in a fixed random way. The reward is uniform random per prompt and context, and 0 for a
    response that has not stopped by T. The policy sees the context, not the prompt, so prompts share all parameters:
    an update on one mini-batch of prompts makes the next mini-batch's responses off-policy, as in a language model.
    """
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randint(contexts, (contexts, vocabulary), generator=generator)
    value = torch.rand(prompts, contexts, generator=generator, dtype=torch.float64)
    context = torch.arange(contexts)
    next_state, reward = [], []
    for prompt in range(prompts):
        first = 2 * contexts * prompt  # states: the contexts, then the same contexts after the stop token
        active = moves + first
        active[:, STOP] = context + first + contexts
        stopped = (context + first + contexts).unsqueeze(1).expand(contexts, vocabulary)
        next_state += [active, stopped]
        reward += [torch.zeros(contexts, dtype=torch.float64), value[prompt]]
    return Task(
        torch.cat(next_state),
        context.repeat(2 * prompts),
        torch.arange(prompts) * 2 * contexts + torch.arange(prompts) % contexts,
        torch.cat(reward),
        horizon,
    )


def random_policy(task: Task, seed: int, scale: float = 0.5) -> torch.Tensor:
    """(R, V) normal logits with standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(task.shape, generator=generator, dtype=torch.float64)


def drifted_policy(theta: torch.Tensor, drift: float, seed: int) -> torch.Tensor:
    """θ moved in a random direction by logits of root mean square `drift`, bounded by √3·drift."""
    generator = torch.Generator().manual_seed(seed)
    return theta + drift * 3**0.5 * (2 * torch.rand(theta.shape, generator=generator, dtype=torch.float64) - 1)


def enumerate_responses(task: Task) -> Responses:
    """Every trajectory of every prompt, once."""
    horizon, vocabulary = task.horizon, task.next_state.shape[1]
    state, prompts = task.start.clone(), torch.arange(len(task.start))
    rows = torch.zeros(len(state), horizon, dtype=torch.long)
    tokens, mask = rows.clone(), rows.double()
    finished: list[Responses] = []
    for position in range(horizon):
        token = torch.arange(vocabulary).repeat(len(state))
        rows, tokens, mask, state, prompts = (
            x.repeat_interleave(vocabulary, 0) for x in (rows, tokens, mask, state, prompts)
        )
        rows[:, position], tokens[:, position], mask[:, position] = task.row[state], token, 1
        state = task.next_state[state, token]
        ends = token == STOP if position < horizon - 1 else torch.ones_like(token, dtype=torch.bool)
        finished.append(Responses(rows[ends], tokens[ends], mask[ends], task.reward[state[ends]], prompts[ends]))
        rows, tokens, mask, state, prompts = (x[~ends] for x in (rows, tokens, mask, state, prompts))
    return Responses(*(torch.cat([getattr(f, name) for f in finished]) for name in Responses.__dataclass_fields__))


def sample_responses(task: Task, theta: torch.Tensor, prompts: torch.Tensor, uniforms: torch.Tensor) -> Responses:
    """Draw responses by inverting the distribution function of each token.

    Args:
        task: the task.
        theta: (..., R, V) the policies that sample.
        prompts: (..., N) the prompt of each response.
        uniforms: (..., N, T) in [0, 1); policies that are given the same ones differ by their logits only.

    Returns:
        (..., N, T) responses.
    """
    bounds = theta.softmax(-1).cumsum(-1)[..., :-1]  # (..., R, V−1)
    bounds = bounds.expand(*prompts.shape[:-1], *bounds.shape[-2:])
    state, alive = task.start[prompts], torch.ones_like(prompts, dtype=torch.bool)
    rows, tokens = (torch.zeros(uniforms.shape, dtype=torch.long) for _ in range(2))
    mask = torch.zeros_like(uniforms)
    for position in range(task.horizon):
        row = task.row[state]
        bound = bounds.gather(-2, row.unsqueeze(-1).expand(*row.shape, bounds.shape[-1]))
        token = (uniforms[..., position, None] >= bound).sum(-1) * alive
        rows[..., position], tokens[..., position], mask[..., position] = row, token, alive.double()
        state = torch.where(alive, task.next_state[state, token], state)
        alive = alive & (token != STOP)
        if not alive.any():
            break
    return Responses(rows, tokens, mask, task.reward[state], prompts)


def token_logps(theta: torch.Tensor, responses: Responses) -> torch.Tensor:
    """(..., N, T) log π_θ(o_{i,t}), 0 where masked; differentiable in θ."""
    table = theta.log_softmax(-1).flatten(-2)  # (..., R·V)
    index = (responses.rows * theta.shape[-1] + responses.tokens).flatten(-2)  # (..., N·T)
    lead = torch.broadcast_shapes(table.shape[:-1], index.shape[:-1])
    logps = table.expand(*lead, -1).gather(-1, index.expand(*lead, -1))
    return logps.unflatten(-1, responses.mask.shape[-2:]) * responses.mask


def score_sum(theta: torch.Tensor, responses: Responses, coefficients: torch.Tensor) -> torch.Tensor:
    """Σ_i Σ_t c_{i,t}·∇log π_θ(o_{i,t}), from the softmax score 1[a] − π_θ(a).

    Args:
        theta: (..., R, V).
        responses: (..., N, T); for one sum per response, pass `responses[:, None]`.
        coefficients: (..., N, T) c_{i,t}, 0 where masked.

    Returns:
        (..., R, V).
    """
    index = (responses.rows * theta.shape[-1] + responses.tokens).flatten(-2)
    coefficients = coefficients.flatten(-2)
    lead = torch.broadcast_shapes(theta.shape[:-2], index.shape[:-1], coefficients.shape[:-1])
    size = theta.shape[-2] * theta.shape[-1]
    chosen = torch.zeros(*lead, size, dtype=theta.dtype)
    chosen.scatter_add_(-1, index.expand(*lead, -1), coefficients.expand(*lead, -1))
    chosen = chosen.unflatten(-1, theta.shape[-2:])
    return chosen - theta.softmax(-1) * chosen.sum(-1, keepdim=True)


def probabilities(theta: torch.Tensor, responses: Responses, prompts: int) -> torch.Tensor:
    """(..., N) P(s_0)·P_θ(s_T|s_0) of listed responses; sums to 1 over a full list."""
    return token_logps(theta, responses).sum(-1).exp() / prompts


def expected_reward(task: Task, theta: torch.Tensor) -> torch.Tensor:
    """(...,) J(θ), v5 Eq. 1, by dynamic programming over the states; differentiable in θ."""
    lead, states = theta.shape[:-2], len(task.row)
    probs = theta.softmax(-1)[..., task.row, :]  # (..., Q, V)
    moves, going_on = task.next_state[:, 1:].flatten(), probs[..., 1:]
    nothing = torch.zeros(*lead, states, dtype=theta.dtype)
    mass = nothing.index_add(-1, task.start, torch.ones(*lead, len(task.start), dtype=theta.dtype) / len(task.start))
    visits = nothing
    for _ in range(task.horizon):
        visits = visits + mass
        mass = nothing.index_add(-1, moves, (mass.unsqueeze(-1) * going_on).flatten(-2))
    stopping = visits * probs[..., STOP]
    return stopping @ task.reward[task.next_state[:, STOP]] + mass @ task.reward


def policy_gradient(task: Task, theta: torch.Tensor) -> torch.Tensor:
    """(..., R, V) ∇J(θ), v5 Eq. 2: the derivative of [`expected_reward`]."""
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(expected_reward(task, theta).sum(), theta)[0]
