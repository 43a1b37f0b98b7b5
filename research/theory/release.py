"""Which responses a rollout holds when generation does not wait for the longest: every run of a small engine, listed.

A run is a Markov chain: its state is what has been begun and not trained on, and a call draws how every unfinished
response would go on. [`generate`](generation_steps.py), with the package's own release rule, decides how far each of
them comes and which groups are trained on. Equal states are merged, so that a run of many rollouts can be listed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from tic_grpo_trl.carry_over.pool import Group, Pool, Response

from .estimators import Listed
from .generation_steps import generate, most_groups
from .policy import Responses, policy_gradient, token_logps
from .several_versions import recorded_logps, update_of_each


@dataclass(frozen=True)
class Engine:
    """A small engine and its release rule."""

    prompts: int = 1  # of a rollout
    group_size: int = 1
    max_carry_over: int = 1
    oversampling: float = 2.0
    slots: int = 8


class Written(NamedTuple):
    """A response: its tokens, the generation call that sampled each, and whether it has ended.

    Where lengths are all that matters, `tokens` may already hold what a later call writes.
    """

    tokens: tuple[int, ...] = ()
    versions: tuple[int, ...] = ()
    finished: bool = False


class Begun(NamedTuple):
    """A group: the prompt's number, in the order of the run, and its responses."""

    number: int
    responses: tuple[Written, ...]


State = tuple[Begun, ...]
Draw = Callable[[int, Written], list[tuple[float, tuple[int, ...]]]]
Found = dict[tuple[Written, ...], float]  # the responses of a group -> the expected number of such groups


@cache
def _generated(engine: Engine, groups: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]):
    """Indices of the groups that a call releases, and how many tokens of every response are written after it.

    `groups`: number, counted from the first prompt of the call's own rollout, and (tokens written, tokens at its end)
    of each response.
    """
    pool = Pool(engine.prompts, engine.max_carry_over, admitted=len(groups))
    for number, responses in groups:
        begun = [Response([0] * n, [0.0] * n, [0] * n, n == end) for n, end in responses]
        pool.groups.append(Group(number, None, {}, [], begun))
    all_groups, numbers, ends = list(pool.groups), [number for number, _ in groups], dict(groups)
    rollout = generate(pool, engine.slots, lambda group, index: ends[group.number][index][1])
    written = tuple(tuple(len(each.tokens) for each in group.responses) for group in all_groups)
    return frozenset(numbers.index(number) for number in rollout.groups), written


def one_call(
    engine: Engine, call: int, rollouts: int, state: State, draw: Draw, keeps_plan: bool = False
) -> Iterator[tuple[float, State, State]]:
    """Yield (probability, released groups, state after the call) for every way in which a call can go.

    `draw` gives every complete response, with its probability, that a call makes of a response so far. With
    `keeps_plan`, an interrupted response remembers how it would have gone on and `draw` is asked for new ones only.
    """
    admitted = call * engine.prompts + len(state)
    most = most_groups(engine.prompts, engine.max_carry_over, engine.oversampling)
    new = range(admitted, min(admitted + most - len(state), rollouts * engine.prompts))
    state += tuple(Begun(number, (Written(),) * engine.group_size) for number in new)
    before = [each for group in state for each in group.responses]
    options = [
        [(1.0, each.tokens)] if each.finished or (keeps_plan and each.tokens) else draw(call, each) for each in before
    ]
    first = call * engine.prompts
    for ways in product(*options):
        lengths = iter([(len(each.versions), len(tokens)) for each, (_, tokens) in zip(before, ways, strict=True)])
        released, written = _generated(
            engine, tuple((group.number - first, tuple(next(lengths) for _ in group.responses)) for group in state)
        )
        plans, after = iter(ways), []
        for group, counts in zip(state, written, strict=True):
            responses = []
            for each, count in zip(group.responses, counts, strict=True):
                tokens = next(plans)[1]
                versions = each.versions + (call,) * (count - len(each.versions))
                responses.append(Written(tokens if keeps_plan else tokens[:count], versions, count == len(tokens)))
            after.append(Begun(group.number, tuple(responses)))
        yield (
            prod(probability for probability, _ in ways),
            tuple(group for index, group in enumerate(after) if index in released),
            tuple(group for index, group in enumerate(after) if index not in released),
        )


def every_rollout(engine: Engine, rollouts: int, draw: Draw, keeps_plan: bool = False) -> list[Found]:
    """List a run: what each of its rollouts holds, on average over all ways in which the run can go.

    Args:
        engine: the engine and its rule.
        rollouts: of the whole run; the last ones drain the pool.
        draw: as in [`one_call`].
        keeps_plan: as in [`one_call`]; exact only where all calls sample from the same policy.
    """
    states: dict[State, float] = {(): 1.0}
    found = []
    for call in range(rollouts):
        released: Found = defaultdict(float)
        following: dict[State, float] = defaultdict(float)
        for state, weight in states.items():
            for probability, groups, left in one_call(engine, call, rollouts, state, draw, keeps_plan):
                following[left] += weight * probability
                for group in groups:
                    released[group.responses] += weight * probability
        states = following
        found.append(dict(released))
    return found


def draw_lengths(behaviour: Listed) -> Draw:
    """Draw of responses to the one prompt of a list, of which only the lengths are kept (with `keeps_plan`)."""
    lengths = behaviour.responses.lengths
    options = [(float(behaviour.p_old[lengths == n].sum()), (0,) * n) for n in range(1, behaviour.task.horizon + 1)]
    return lambda call, response: options


def _texts(behaviour: Listed) -> list[tuple[int, ...]]:
    """The tokens of every listed response, without padding."""
    responses = behaviour.responses
    ends = zip(responses.tokens.tolist(), responses.lengths.int().tolist(), strict=True)
    return [tuple(tokens[:length]) for tokens, length in ends]


def draw_tokens(behaviour: Listed, policies: torch.Tensor) -> Draw:
    """Draw of responses to the one prompt of a list; call k samples from `policies[k]`, (calls, R, V)."""
    logps, texts = token_logps(policies, behaviour.responses), _texts(behaviour)

    @cache
    def options(call: int, so_far: tuple[int, ...]):
        rest = logps[call, :, len(so_far) :].sum(-1).exp().tolist()
        return [(p, text) for p, text in zip(rest, texts, strict=True) if text[: len(so_far)] == so_far]

    return lambda call, response: options(call, response.tokens)


def as_batch(behaviour: Listed, groups: Sequence[Sequence[Written]]) -> tuple[Responses, torch.Tensor, torch.Tensor]:
    """Groups as (M, G, T) responses, the (M, G, T) calls that sampled their tokens, and (M, G) places in the list."""
    place = {text: index for index, text in enumerate(_texts(behaviour))}
    index = torch.tensor([[place[each.tokens] for each in group] for group in groups])
    horizon = behaviour.task.horizon
    versions = [[[*each.versions, *[0] * (horizon - len(each.versions))] for each in group] for group in groups]
    return behaviour.responses[index], torch.tensor(versions), index


def learn(behaviour: Listed, engine: Engine, rollouts: int, learning_rate: float) -> list[torch.Tensor]:
    """Let the policy follow its updates, in every way in which a run can go.

    Rollouts have one group, and update k is a step along w·(r − μ)·∇log P_θ at the policy θ_k which the updates before
    it led to, and which samples in call k. μ is the mean reward at the start.

    Returns:
        For each rollout, (R, V) E[update k − ∇J(θ_k)].
    """
    paths: list[tuple[float, State, torch.Tensor]] = [(1.0, (), behaviour.theta_old[None])]
    excess = []
    for call in range(rollouts):
        following, total = [], torch.zeros_like(behaviour.theta_old)
        for weight, state, policies in paths:
            theta = policies[-1]
            draw = draw_tokens(behaviour, policies)
            merged: dict[tuple[State, State], float] = defaultdict(float)
            for probability, released, left in one_call(engine, call, rollouts, state, draw):
                merged[released, left] += probability
            responses, versions, index = as_batch(behaviour, [released[0].responses for released, _ in merged])
            advantages = (behaviour.responses.rewards - behaviour.mean)[index]
            recorded = recorded_logps(policies, responses, versions)
            updates = update_of_each(theta, responses, recorded, advantages).mean(1)
            probabilities = torch.tensor(list(merged.values()), dtype=theta.dtype)
            total += weight * (torch.tensordot(probabilities, updates, 1) - policy_gradient(behaviour.task, theta))
            for (_, left), probability, update in zip(merged, probabilities.tolist(), updates, strict=True):
                following.append(
                    (weight * probability, left, torch.cat([policies, (theta + learning_rate * update)[None]]))
                )
        paths = following
        excess.append(total)
    return excess
