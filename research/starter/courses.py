"""What supervised training teaches for each task of the starter: problems, their answers and the number of steps."""

import random
from dataclasses import dataclass

import datasets

from tic_grpo_trl.starter import TASKS, long_tail
from tic_grpo_trl.starter.task import TERM_COUNTS, make_dataset


@dataclass(frozen=True)
class Course:
    """Teach the task `starter`: sums whose number of terms is any of `term_counts` with equal probability.

    A mix holds the shares of direct, chain and terse answers.
    """

    term_counts: tuple[int, ...] = TERM_COUNTS
    max_new_tokens: int = TASKS["starter"].max_completion_length  # longest answer when measuring
    num_positions: int = 256
    chain_steps: int = 1300
    chain_mix: tuple[float, float, float] = (0.15, 0.70, 0.15)
    remix_steps: int = 100
    remix: tuple[float, float, float] = (0.80, 0.12, 0.08)
    wrong_step_rate: float = 0.02  # share of wrong steps in chain and terse answers
    micro_batches: int = 1  # of equal size, by length; they leave the gradient as it is and save padding
    held_out: int = 2000  # problems on which the model is measured after each phase

    def sample_num_terms(self, rng: random.Random) -> int:
        """Draw the number of terms of a training problem."""
        return rng.choice(self.term_counts)

    def held_out_problems(self) -> datasets.Dataset:
        """Return the held-out problems."""
        return make_dataset("test", self.held_out, term_counts=self.term_counts)


@dataclass(frozen=True)
class LongTailCourse(Course):
    """Teach the task `long_tail`, whose number of terms is log-normal. Half the wrong steps: its chains are longer."""

    term_counts: tuple[int, ...] = ()  # not used
    max_new_tokens: int = long_tail.MAX_COMPLETION_LENGTH
    num_positions: int = 512
    chain_steps: int = 1500
    chain_mix: tuple[float, float, float] = (0.20, 0.70, 0.10)
    remix_steps: int = 120
    wrong_step_rate: float = 0.01
    micro_batches: int = 8
    held_out: int = 1000

    def sample_num_terms(self, rng: random.Random) -> int:
        """Draw the number of terms of a training problem."""
        return long_tail.sample_num_terms(rng)

    def held_out_problems(self) -> datasets.Dataset:
        """Return the held-out problems, the shortest first, so that few are sampled along with the longest."""
        problems = long_tail.make_dataset("test", self.held_out)
        lengths = [len(prompt[0]["content"]) for prompt in problems["prompt"]]
        return problems.select(sorted(range(self.held_out), key=lengths.__getitem__))


COURSES: dict[str, Course] = {"starter": Course(), "long_tail": LongTailCourse()}
