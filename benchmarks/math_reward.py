r"""Measure how many answers per second and core `math_reward` compares, next to TRL's `accuracy_reward`.

    python benchmarks/math_reward.py --output docs/bench/math_reward.md

A rollout has 128 problems with 16 responses each. Their answers are right, wrong, malformed or missing, and follow
reasoning as long as in the authors' run (1,186 tokens on average, at most 18,000). Processor time is more reliable than
wall-clock time on a machine that does other work.
"""

import argparse
import logging
import math
import platform
import random
import time
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import psutil
from trl.rewards import accuracy_reward

from tic_grpo_trl.metrics.run_summary import table
from tic_grpo_trl.rewards import MathReward
from tic_grpo_trl.rewards.mathematics import default_workers


PROBLEMS, RESPONSES = 128, 16
TOKENS, MOST_TOKENS, CHARACTERS = 1186, 18_000, 3.5  # mean and longest response; characters per token of mathematics
AUTHORS_SECONDS = (8, 13)  # for rewards, per step of the authors' run
KINDS = {"right": 0.4, "wrong": 0.4, "malformed": 0.1, "missing": 0.1}  # fraction of the answers
TRL = "TRL's `accuracy_reward`"
COLUMNS = ["reward", "wall-clock s", "trainer CPU s", "worker CPU s", "answers per CPU second", *KINDS]
REPORT = """# The math reward's throughput

`python benchmarks/math_reward.py --rollouts {rollouts}`; Python {python}, {packages};
{cores} cores, load average {load:.1f} at the end.

A rollout has {problems} problems with {responses} responses each: {answers:,} answers, 40 % right, 40 % wrong,
10 % malformed and 10 % missing. They end completions of {mean_length:,.0f} characters on average and {longest:,} at
most. The table shows means over {rollouts} rollouts, each scored by every reward in turn. Seconds are per rollout.
Wall-clock time depends on what else the machine does; processor time hardly does. The last columns are the mean rewards
of each kind of answer.

{table}

The workers compare **{per_core:.0f} answers per second and core**. The training process spends {share:.0f} µs
per answer.

Projection, not a measurement: with 16 workers on the 16 cores of a GPU host, {answers:,} answers take
{own:.2f} s + {workers:.1f} s / 16 = **{total:.1f} s**. The authors' run spent {low} to {high} s per step on rewards.
The comparisons are independent and are handed out one by one. The projection counts the training process's share as if
nothing ran in parallel.
"""

THOUGHTS = [
    "Let us set $x = {a}$ and see what follows from it. ",
    "Then $\\frac{{{a}}}{{{b}}} + {c}x$ has to be an integer, which leaves few cases. ",
    "Wait, this cannot be right, because {a} does not divide {b}. ",
    "By the identity above we get \\[ {a}x^2 + {b}x + {c} = 0 \\] and the discriminant is a square. ",
    "So the number of such triples is at most {c}.\n",
]


def make_gold(rng: random.Random) -> tuple[str, str, str]:
    """Return a solution, an equal one and a different one. Integers, as in AIME, are more frequent than the rest."""
    a, b, c = (rng.randint(2, 999) for _ in range(3))
    return rng.choice(
        [
            *[(str(a), f"{a:03d}", str(a + b))] * 5,
            (rf"\frac{{{a}}}{{{b}}}", f"{a}/{b}", rf"\frac{{{a}}}{{{c}}}"),
            (rf"{a}\sqrt{{{b}}}", rf"{a} \cdot {b}^{{1/2}}", rf"{a}\sqrt{{{b + 1}}}"),
            (f"({a}, {b})", rf"\left({a}, {b}\right)", f"({b}, {a + 1})"),
            (f"{a}x^2 + {b}", f"{b} + {a}x^2", f"{a}x^2 + {c}"),
        ]
    )


def make_rollout(seed: int) -> tuple[list[str], list[str], list[str]]:
    """Return 2,048 completions, solutions and kinds of answer."""
    rng = random.Random(seed)
    completions, solutions, kinds = [], [], []
    for _ in range(PROBLEMS):
        gold, same, other = make_gold(rng)
        for _ in range(RESPONSES):
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            answer = {
                "right": rng.choice([gold, same]),
                "wrong": other,
                "malformed": rng.choice([r"\frac{" + gold, gold + r" \foo^_", f"{gold} is what I get, or {other}"]),
                "missing": "",
            }[kind]
            # a mean of TOKENS with a long tail, as in the authors' run
            tokens = min(MOST_TOKENS, rng.lognormvariate(math.log(TOKENS) - 0.5, 1.0))
            thoughts = ""
            while len(thoughts) < tokens * CHARACTERS:
                a, b, c = (rng.randint(2, 99) for _ in range(3))
                thoughts += rng.choice(THOUGHTS).format(a=a, b=b, c=c)
            ending = rng.choice([rf"So the answer is $\boxed{{{answer}}}$.", f"\nAnswer: ${answer}$"]) if answer else ""
            completions.append(thoughts + ending)
            solutions.append(gold)
            kinds.append(kind)
    return completions, solutions, kinds


def measure(reward: MathReward, completions, solutions) -> dict:
    """Measure the seconds of one call: wall-clock, of this process, and of the workers."""

    def of_workers() -> float:
        times = [psutil.Process(worker.process.pid).cpu_times() for worker in reward._pool.workers]
        return sum(t.user + t.system for t in times)

    before, own, start = of_workers(), time.process_time(), time.perf_counter()
    rewards = reward(completions, solution=solutions)
    clock, own = time.perf_counter() - start, time.process_time() - own
    return {"clock": clock, "own": own, "workers": of_workers() - before, "rewards": rewards}


def measure_trl(completions, solutions) -> dict:
    """Measure TRL's function, which runs in this process."""
    messages = [[{"content": text}] for text in completions]
    own, start = time.process_time(), time.perf_counter()
    rewards = accuracy_reward(messages, [f"${gold}$" for gold in solutions])
    return {"clock": time.perf_counter() - start, "own": time.process_time() - own, "workers": 0.0, "rewards": rewards}


def row(name: str, runs: list[dict], kinds: list[list[str]]) -> list[str]:
    """Return a row of the table: means over rollouts."""
    clock, own, workers = (fmean(run[key] for run in runs) for key in ("clock", "own", "workers"))
    judged: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for run, of_run in zip(runs, kinds, strict=True):
        for reward, kind in zip(run["rewards"], of_run, strict=True):
            judged[kind].append(reward or 0.0)
    per_second = PROBLEMS * RESPONSES / (own + workers)
    return [
        name,
        f"{clock:.1f}",
        f"{own:.2f}",
        f"{workers:.1f}",
        f"{per_second:.0f}",
        *(f"{fmean(of_kind):.3g}" for of_kind in judged.values()),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rollouts", type=int, default=3, help="rollouts of 2,048 answers, each scored by every reward"
    )
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    logging.disable()  # TRL's function logs answers that took too long

    sizes = sorted({1, 2, default_workers()})
    rewards = {f"`math_reward`, workers: {size}": MathReward(workers=size) for size in sizes}
    for reward, size in zip(rewards.values(), sizes, strict=True):
        reward([r"\boxed{1}"] * 8 * size, solution=["1"] * 8 * size)  # start the workers
    runs: dict[str, list[dict]] = {name: [] for name in [*rewards, TRL]}
    kinds, lengths = [], []
    for seed in range(options.rollouts):
        completions, solutions, of_rollout = make_rollout(seed)
        kinds.append(of_rollout)
        lengths += [len(text) for text in completions]
        for name, reward in rewards.items():
            runs[name].append(measure(reward, completions, solutions))
        runs[TRL].append(measure_trl(completions, solutions))
    for reward in rewards.values():
        reward.close()

    one = next(iter(runs.values()))
    own, workers = (fmean(run[key] for run in one) for key in ("own", "workers"))
    answers = PROBLEMS * RESPONSES
    report = REPORT.format(
        rollouts=options.rollouts,
        python=platform.python_version(),
        packages=", ".join(f"{name} {version(name)}" for name in ("math-verify", "sympy", "trl")),
        cores=psutil.cpu_count(),
        load=psutil.getloadavg()[0],
        problems=PROBLEMS,
        responses=RESPONSES,
        answers=answers,
        mean_length=fmean(lengths),
        longest=max(lengths),
        table=table(COLUMNS, [row(name, of_reward, kinds) for name, of_reward in runs.items()]),
        per_core=answers / workers,
        share=1e6 * own / answers,
        own=own,
        workers=workers,
        total=own + workers / 16,
        low=AUTHORS_SECONDS[0],
        high=AUTHORS_SECONDS[1],
    )
    print(report)
    if options.output:
        options.output.write_text(report)


if __name__ == "__main__":
    main()
