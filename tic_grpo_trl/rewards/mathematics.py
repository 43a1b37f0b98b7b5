"""The reward for mathematical answers: math-verify in processes that no expression can hang."""

import os
from collections.abc import Callable
from typing import Any

from .answers import completion_text, final_answer, gold_answer
from .math_pool import CRASH, TIMEOUT, MathPool
from .math_worker import FAILED, RIGHT


MAX_WORKERS = 16  # of one training process; a process holds about 70 MB


def default_workers() -> int:
    """Cores that this process may use, divided by the training processes on this host: 1 to `MAX_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_workers(workers: int | None):
    """Refuses a number of workers below 1; `None` stands for `default_workers`."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: pass 1 or more, or None for this process' share of the cores.")


class MathReward:
    r"""
    Rewards completions whose final answer equals the column `solution`, in TRL's reward-function signature.

    The answer is what [`~tic_grpo_trl.rewards.answers.final_answer`] finds at the completion's end; math-verify decides
    whether it equals the solution (the solution first: its comparison is not symmetric). Both are parsed whole, so that
    a list of candidates equals no single number. Every comparison runs in another process and is killed at `timeout`.

    Args:
        timeout: seconds that one comparison may take.
        workers: processes that compare, started at the first call and shared by all later ones; by default this
            process' share of the host's cores, at most 16.

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
        self._parseable: dict[str, bool] = {}  # per gold answer

    def __reduce__(self):
        return MathReward, (self.timeout, self.workers)  # a copy starts its own processes

    def close(self):
        """End the processes, which otherwise end with the interpreter. The next call starts new ones."""
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
            completions: completions, length B; plain text or lists of messages.
            solution: the right answers, length B.
            log_extra, log_metric: as TRL passes them. Logged are the column `extracted_answer` and, as shares of this
                batch, `math_reward/no_answer`, `math_reward/unparseable_solution`, `math_reward/timeout` and
                `math_reward/crash`.
            **kwargs: the other columns and arguments that TRL passes, unused.

        Returns:
            Rewards, length B: 1.0 for a right answer, 0.0 for a wrong one, for none, and for one whose comparison is
            killed or fails; `None` where the solution cannot be parsed (TRL leaves such a sample out).

        Raises:
            ValueError: if the data set has no column `solution`, or its length is another.
            RuntimeError: if math-verify cannot be started.
        """
        if solution is None:
            raise ValueError(
                "math_reward compares with the column `solution`, which the data set does not have: rename the column "
                "of right answers, dataset.rename_column('answer', 'solution')."
            )
        answers = [final_answer(completion_text(completion)) for completion in completions]
        golds = [gold_answer(right) for right in solution]
        self._parse_golds(golds)

        comparable = [self._parseable[gold] for gold in golds]
        pairs = zip(comparable, golds, answers, strict=True)
        verdicts = iter(self._run([(gold, answer) for parseable, gold, answer in pairs if parseable and answer]))
        outcomes = [next(verdicts) if ok and answer else None for ok, answer in zip(comparable, answers, strict=True)]

        if log_extra is not None:
            log_extra("extracted_answer", answers)
        if log_metric is not None:
            size = max(1, len(answers))
            log_metric("math_reward/no_answer", answers.count("") / size)
            log_metric("math_reward/unparseable_solution", comparable.count(False) / size)
            log_metric("math_reward/timeout", outcomes.count(TIMEOUT) / size)
            log_metric("math_reward/crash", (outcomes.count(CRASH) + outcomes.count(FAILED)) / size)
        return [float(outcome == RIGHT) if ok else None for ok, outcome in zip(comparable, outcomes, strict=True)]

    def _parse_golds(self, golds: list[str]):
        """Decide once per solution whether it can be parsed; one that hangs or crashes math-verify cannot."""
        new = [gold for gold in dict.fromkeys(golds) if gold not in self._parseable]
        self._parseable[""] = False
        new = [gold for gold in new if gold]
        outcomes = self._run([(gold, None) for gold in new])
        self._parseable |= {gold: outcome == RIGHT for gold, outcome in zip(new, outcomes, strict=True)}

    def _run(self, jobs: list[tuple[str, str | None]]) -> list[str]:
        if not jobs:
            return []
        if self._pool is None:
            self._pool = MathPool(self.timeout, self.workers or default_workers())
        return self._pool.run(jobs)


math_reward = MathReward()
