"""Reward mathematical answers: math-verify compares them in worker processes, so no expression can hang training."""

import os
from collections.abc import Callable
from typing import Any

from .answers import completion_text, final_answer, gold_answer
from .math_pool import CRASH, TIMEOUT, Job, MathPool
from .math_worker import FAILED, RIGHT


MAX_WORKERS = 16  # per training process; a worker holds about 70 MB


def default_workers() -> int:
    """Return this host's available cores divided by its training processes, from 1 to `MAX_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_workers(workers: int | None):
    """Raise `ValueError` for a number of workers below 1. `None` means `default_workers`."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: pass 1 or more, or None for this process's share of the cores.")


class MathReward:
    """Reward completions whose final answer equals the column `solution`, in TRL's reward-function signature.

    [`~tic_grpo_trl.rewards.answers.final_answer`] finds the answer at the end of the completion; math-verify decides
    whether it equals the solution. Each is parsed as one expression, so a list of candidates never equals a single
    number. Every comparison runs in a worker process, which is killed after `timeout`.

    Args:
        timeout: seconds per comparison.
        workers: worker processes, started at the first call and reused. Default: this process's share of the host's
            cores, at most 16.

    Raises:
        ValueError: if `timeout` or `workers` is not positive.
    """

    def __init__(self, timeout: float = 10.0, workers: int | None = None):
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout}: pass the seconds that one comparison may take, such as 10.0.")
        check_workers(workers)
        self.__name__ = "math_reward"
        self.timeout, self.workers = timeout, workers
        self._pool: MathPool | None = None
        self._parseable: dict[str, bool] = {"": False}  # by solution

    def __reduce__(self):
        return MathReward, (self.timeout, self.workers)  # a copy starts its own workers

    def close(self):
        """End the workers, which would otherwise end with the interpreter. The next call starts new ones."""
        if self._pool is not None:
            self._pool.close()

    def __call__(
        self,
        completions: list[Any],
        solution: list[Any] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Score a batch.

        Args:
            completions: (B,) strings or lists of messages.
            solution: (B,) correct answers.
            log_extra, log_metric: TRL's logging functions. They receive the column `extracted_answer` and, as fractions
                of the batch, `math_reward/no_answer`, `math_reward/unparseable_solution`, `math_reward/timeout` and
                `math_reward/crash`.

        Returns:
            (B,) rewards: 1.0 for a correct answer. 0.0 for a wrong or missing one, and for one whose comparison times
            out or fails. `None` if the solution cannot be parsed, which makes TRL skip the completion.

        Raises:
            ValueError: if the data set has no column `solution`, or its length differs from that of `completions`.
            RuntimeError: if a worker cannot be started.
        """
        if solution is None:
            raise ValueError(
                "math_reward needs the column `solution`, which the data set does not have. Rename the column of "
                "correct answers: dataset.rename_column('answer', 'solution')."
            )
        answers = [final_answer(completion_text(completion)) for completion in completions]
        golds = [gold_answer(correct) for correct in solution]
        # Parsed once per solution. One that makes math-verify hang or crash cannot be parsed.
        new: list[Job] = [(gold, None) for gold in dict.fromkeys(golds) if gold not in self._parseable]
        self._parseable |= {gold: outcome == RIGHT for (gold, _), outcome in zip(new, self._run(new), strict=True)}

        parseable = [self._parseable[gold] for gold in golds]
        comparable = [bool(ok and answer) for ok, answer in zip(parseable, answers, strict=True)]
        jobs: list[Job] = [(gold, answer) for ok, gold, answer in zip(comparable, golds, answers, strict=True) if ok]
        replies = iter(self._run(jobs))
        outcomes = [next(replies) if ok else None for ok in comparable]

        if log_extra is not None:
            log_extra("extracted_answer", answers)
        if log_metric is not None:
            size = max(1, len(answers))
            log_metric("math_reward/no_answer", answers.count("") / size)
            log_metric("math_reward/unparseable_solution", parseable.count(False) / size)
            log_metric("math_reward/timeout", outcomes.count(TIMEOUT) / size)
            log_metric("math_reward/crash", (outcomes.count(CRASH) + outcomes.count(FAILED)) / size)
        return [float(outcome == RIGHT) if ok else None for ok, outcome in zip(parseable, outcomes, strict=True)]

    def _run(self, jobs: list[Job]) -> list[str]:
        if not jobs:
            return []
        if self._pool is None or self._pool.owner != os.getpid():
            self._pool = MathPool(self.timeout, self.workers or default_workers())
        return self._pool.run(jobs)


math_reward = MathReward()
