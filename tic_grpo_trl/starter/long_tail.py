r"""The starter's task with a long tail: sums of 2 to 40 one-digit numbers, most of them short and a few very long.

The number of terms is log-normal. Written out as a chain of additions, an answer has 10 to 374 tokens, with a mean of
42 and a median of 28. Reasoning models have such a spread; the answers of the task `starter` all have about the same
length.
"""

import math
import random

from datasets import Dataset

from .task import Split, check_split, make_prompt, sample_problem


TERM_RANGE = (2, 40)
MEDIAN_TERMS, LOG_SPREAD = 4, 0.8  # of the log-normal distribution, before numbers outside the range are drawn again
MAX_COMPLETION_LENGTH = 416  # tokens; a chain of forty nines has 374


def sample_num_terms(rng: random.Random) -> int:
    """Draw a number of terms: log-normal, rounded, and within `TERM_RANGE`."""
    while True:
        num_terms = round(rng.lognormvariate(math.log(MEDIAN_TERMS), LOG_SPREAD))
        if TERM_RANGE[0] <= num_terms <= TERM_RANGE[1]:
            return num_terms


def make_dataset(split: Split, size: int, seed: int = 0) -> Dataset:
    """Draw problems of one split independently, so that a short sum can occur more than once.

    Returns:
        A dataset with the columns `prompt` (one user message, `3+8+5+9=?`) and `solution` (str, `25`).

    Raises:
        ValueError: if `split` is unknown or `size` is not positive.
    """
    check_split(split)
    if size < 1:
        raise ValueError(f"size is {size}; pass a positive number of problems")
    rng = random.Random(seed)
    problems = [sample_problem(rng, split, sample_num_terms(rng)) for _ in range(size)]
    return Dataset.from_dict(
        {"prompt": [make_prompt(terms) for terms in problems], "solution": [str(sum(terms)) for terms in problems]}
    )
