"""Simulate generation at full size from a latency model of decode steps: a calculation, not a measurement.

A step that samples a token for each of R running responses, reads K tokens of their keys and values and computes p
tokens of prompts (or of responses that go on) takes

    step + response · R + cached · K + prefill · p   seconds.

A generation call ends when the last engine has its part of the rollout. What a rollout holds is decided by the
package's own pool and release rule.
"""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from cases import skewed_lengths

from research.theory.generation_steps import most_groups
from tic_grpo_trl.carry_over.pool import Group, Pool, Response


# The authors' run: 128 prompts of 16 responses, of 1,186 tokens on average and 18,000 at most, on two nodes
PROMPTS, GENERATIONS, MEAN, LONGEST, PROMPT = 128, 16, 1_186, 18_000, 150
ENGINES, SLOTS = 8, 256
AUTHORS = ((405, 500), (713, 900))  # seconds of generation and of the whole step
CARRIED = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Latency:
    """Seconds that a step needs at least, and for each running response, cached token and computed prompt token."""

    step: float
    response: float
    cached: float
    prefill: float


# Qwen3-8B (8.2 billion parameters, 36 layers, 8 heads of 128 for keys and values) in bfloat16 on one H200 (4.8 TB/s,
# 989 TFLOP/s dense). Assumed: 75 % of the bandwidth, half of the arithmetic, 2 ms of the engine's own work per step.
PARAMETERS, CACHE_BYTES = 8.2e9, 36 * 8 * 128 * 2 * 2
BANDWIDTH, ARITHMETIC, OVERHEAD = 0.75 * 4.8e12, 0.5 * 989e12, 2e-3
H200 = Latency(
    step=OVERHEAD + 2 * PARAMETERS / BANDWIDTH,
    response=2 * PARAMETERS / ARITHMETIC,
    cached=CACHE_BYTES / BANDWIDTH,
    prefill=2 * PARAMETERS / ARITHMETIC,
)


@dataclass(frozen=True)
class Work:
    """What an engine does in a generation call: steps and tokens sampled, read from its cache and computed at once."""

    steps: int
    sampled: int
    cached: int
    prefilled: int

    def seconds(self, latency: Latency) -> float:
        per_token = self.sampled * latency.response + self.cached * latency.cached + self.prefilled * latency.prefill
        return self.steps * latency.step + per_token


class Engine:
    """An engine with its own pool, which holds its part of every rollout's prompts.

    Args:
        lengths: tokens of each response, by group, in the order of the prompts.
        prompts: of a rollout, in this pool.
        slots: responses that it runs at once.
        max_carry_over, oversampling: as in `TICGRPOConfig`.
        prompt: tokens of a prompt.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        prompts: int,
        slots: int,
        max_carry_over: int,
        oversampling: float,
        prompt: int,
    ):
        self.lengths, self.slots, self.prompt = lengths, slots, prompt
        self.pool = Pool(prompts, max_carry_over)
        self.limit = most_groups(prompts, max_carry_over, oversampling)

    def begin_call(self):
        """Begin as many groups as the pool may hold."""
        for lengths in self.lengths[self.pool.admitted :][: self.limit - len(self.pool.groups)]:
            self.pool.admit(Group(self.pool.admitted, None, {}, [], [Response() for _ in lengths]))

    def run(self, least: int = 0) -> tuple[int, list[tuple[Response, int]]]:
        """Generate until there is a rollout, and at least so many steps if there is something to generate.

        Returns:
            The steps, and the new tokens of each response that had a slot. Only `finished` of the responses is changed.
        """
        waiting = [
            (each, self.lengths[group.number][index] - len(each.tokens), group)
            for group in self.pool.groups
            for index, each in enumerate(group.responses)
            if not each.finished
        ]
        running: list[tuple[int, int]] = []  # (step of its last token, index in `waiting`), soonest first
        started: list[int] = []  # step before the first token
        now, enough = 0, self.pool.chosen() is not None
        while True:
            while len(running) < self.slots and len(started) < len(waiting):
                heapq.heappush(running, (now + waiting[len(started)][1], len(started)))
                started.append(now)
            if enough and (now >= least or not running or running[0][0] > least):
                now = max(now, min(least, running[0][0])) if running else now
                break
            now, complete = running[0][0], False
            while running and running[0][0] == now:
                response, _, group = waiting[heapq.heappop(running)[1]]
                response.finished = True
                complete = complete or group.complete
            enough = enough or (complete and self.pool.chosen() is not None)
        written = [(each, min(left, now - at)) for (each, left, _), at in zip(waiting, started, strict=False)]
        return now, written

    def end_call(self, steps: int, written: Sequence[tuple[Response, int]]) -> Work:
        """Write the new tokens, take the rollout out of the pool, and return what the engine did."""
        sampled = cached = prefilled = 0
        for response, new in written:
            start = len(response.tokens)
            if new:
                prefilled += self.prompt + start
            sampled += new
            cached += new * self.prompt + new * start + new * (new - 1) // 2
            response.tokens = range(start + new)  # type: ignore[assignment]  # only their number matters
        self.pool.release()
        return Work(steps, sampled, cached, prefilled)


def simulate(engines: Sequence[Engine], rollouts: int, together: bool = False) -> list[list[Work]]:
    """Simulate the generation calls of a run, and return the work of each engine by call.

    Args:
        engines: engines with a part of the prompts each.
        rollouts: number of calls.
        together: whether an engine that has its part of the rollout goes on until the last one has.
    """
    calls = []
    for _ in range(rollouts):
        for engine in engines:
            engine.begin_call()
        runs = [engine.run() for engine in engines]
        if together:
            least = max(steps for steps, _ in runs)
            for _, written in runs:
                for response, _ in written:
                    response.finished = False
            runs = [engine.run(least) for engine in engines]
        calls.append([engine.end_call(*run) for engine, run in zip(engines, runs, strict=True)])
    return calls


def mean_seconds(calls: Sequence[Sequence[Work]], latency: Latency) -> float:
    """Return the mean time of the calls, each as long as its slowest engine needs."""
    return fmean(max(work.seconds(latency) for work in engines) for engines in calls)


def with_waiting_time(latency: Latency, waiting: Sequence[Sequence[Work]], seconds: float) -> Latency:
    """Return the latency with the fixed cost of a step for which waiting for all responses takes `seconds` per call."""
    low, high = 0.0, seconds
    for _ in range(60):
        middle = (low + high) / 2
        too_short = mean_seconds(waiting, replace(latency, step=middle)) < seconds
        low, high = (middle, high) if too_short else (low, middle)
    return replace(latency, step=low)


@dataclass(frozen=True)
class Outcome:
    """Steady state of a simulated run.

    Attributes:
        pools: which pools there are.
        max_carry_over: S.
        steps: mean over the calls, of the slowest engine.
        seconds: mean time of a call with the latency of an H200.
        speedups: waiting's time divided by this one's: on an H200, and with the fixed cost of a step for which waiting
            takes as long as the authors' shortest and longest generation.
        prefilled: tokens computed at once, prompts included, per token sampled.
    """

    pools: str
    max_carry_over: int
    steps: float
    seconds: float
    speedups: tuple[float, float, float]
    prefilled: float


def full_size(rollouts: int, oversampling: float = 2.0) -> list[Outcome]:
    """Simulate runs at the authors' size, with a pool per engine and with one pool for all engines."""
    groups: list[list[list[int]]] = []  # by rollout
    for seed in range(rollouts):
        drawn = skewed_lengths(PROMPTS * GENERATIONS, MEAN, LONGEST, seed)
        random.Random(seed).shuffle(drawn)
        groups.append([drawn[i : i + GENERATIONS] for i in range(0, len(drawn), GENERATIONS)])

    def run(max_carry_over: int, engines: int, together: bool) -> list[list[Work]]:
        share, slots = PROMPTS // engines, SLOTS * ENGINES // engines
        own = [[each for of in groups for each in of[e * share : (e + 1) * share]] for e in range(engines)]
        made = [Engine(lengths, share, slots, max_carry_over, oversampling, PROMPT) for lengths in own]
        calls = simulate(made, rollouts, together)
        first = max_carry_over + 2 if max_carry_over else 0
        return calls[first : rollouts - 1] or calls

    def spread_out(calls: list[list[Work]]) -> list[list[Work]]:
        parts = ENGINES // len(calls[0])
        return [
            [Work(w.steps, w.sampled // parts, w.cached // parts, w.prefilled // parts) for w in call] for call in calls
        ]

    waiting = run(0, ENGINES, together=False)
    latencies = [H200, *(with_waiting_time(H200, waiting, seconds) for seconds, _ in AUTHORS)]
    outcomes = []
    for pools, engines, together in (
        ("a pool per engine (colocated)", ENGINES, False),
        ("the same, if no engine stopped before the last", ENGINES, True),
        ("one pool for all engines (server)", 1, False),
    ):
        for max_carry_over in CARRIED:
            if together and not max_carry_over:
                continue
            calls = spread_out(run(max_carry_over, engines, together))
            speedups = [mean_seconds(waiting, each) / mean_seconds(calls, each) for each in latencies]
            every = [work for call in calls for work in call]
            outcomes.append(
                Outcome(
                    pools,
                    max_carry_over,
                    fmean(max(work.steps for work in call) for call in calls),
                    mean_seconds(calls, H200),
                    (speedups[0], speedups[1], speedups[2]),
                    sum(work.prefilled for work in every) / sum(work.sampled for work in every),
                )
            )
    return outcomes


def whole_step(outcome: Outcome, case: int) -> float:
    """Return the gain of the authors' whole step, of which only generation gets faster."""
    generation, step = AUTHORS[case]
    return step / (step - generation + generation / outcome.speedups[1 + case])
