r"""The starter's task with a long tail: sums of 2 to 40 one-digit numbers, most of them short and a few very long.

The number of terms is log-normal. Written out as a chain of additions, an answer has 10 to 374 tokens, with a mean of
42 and a median of 28. Reasoning models have such a spread; the answers of the task `starter` all have about the same
length.
"""

import math
import random
from collections import Counter
from itertools import product

from datasets import Dataset

from .task import SPLIT_SHARE, Split, check_split, make_prompt, sample_problem, split_of


TERM_RANGE = (2, 40)
MEDIAN_TERMS, LOG_SPREAD = 4, 0.8  # of the log-normal distribution, before numbers outside the range are drawn again
MAX_COMPLETION_LENGTH = 416  # tokens; a chain of forty nines has 374


def sample_num_terms(rng: random.Random) -> int:
    """Draw a number of terms: log-normal, rounded, and within `TERM_RANGE`."""
    while True:
        num_terms = round(rng.lognormvariate(math.log(MEDIAN_TERMS), LOG_SPREAD))
        if TERM_RANGE[0] <= num_terms <= TERM_RANGE[1]:
            return num_terms


def count_problems(split: Split, num_terms: int) -> int:
    """Count the distinct problems of a number of terms; above four terms, return half of their expected number."""
    if num_terms > 4:
        return round(SPLIT_SHARE[split] * 10**num_terms) // 2
    return sum(split_of(terms) == split for terms in product(range(10), repeat=num_terms))


def sample_distinct_problems(rng: random.Random, split: Split, size: int) -> list[tuple[int, ...]]:
    """Draw distinct problems. Where a number of terms has too few, problems with one more term take their place."""
    drawn = Counter(sample_num_terms(rng) for _ in range(size))
    problems: dict[tuple[int, ...], None] = {}  # an ordered set
    missing = 0
    for num_terms in range(TERM_RANGE[0], TERM_RANGE[1] + 1):
        wanted = drawn[num_terms] + missing
        taken = min(wanted, count_problems(split, num_terms)) if wanted else 0
        missing, goal = wanted - taken, len(problems) + taken
        while len(problems) < goal:
            problems[sample_problem(rng, split, num_terms)] = None
    return rng.sample(list(problems), size)


def make_dataset(split: Split, size: int, seed: int = 0) -> Dataset:
    """Draw problems of one split in random order.

    Training problems are independent, so a short sum can occur more than once. Test problems are distinct. Only 10 of
    them have two terms, and 109 have three. Where the log-normal distribution asks for more, problems with one more
    term take their place: of 200 test problems, 1 in 20 has two terms, instead of 1 in 5.

    Returns:
        A dataset with the columns `prompt` (one user message, `3+8+5+9=?`) and `solution` (str, `25`).

    Raises:
        ValueError: if `split` is unknown or `size` is not positive.
    """
    check_split(split)
    if size < 1:
        raise ValueError(f"size is {size}; pass a positive number of problems")
    rng = random.Random(seed)
    if split == "test":
        problems = sample_distinct_problems(rng, split, size)
    else:
        problems = [sample_problem(rng, split, sample_num_terms(rng)) for _ in range(size)]
    return Dataset.from_dict(
        {"prompt": [make_prompt(terms) for terms in problems], "solution": [str(sum(terms)) for terms in problems]}
    )
