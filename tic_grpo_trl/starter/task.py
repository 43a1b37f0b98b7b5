r"""The starter's task: sums of three to six one-digit numbers, such as `3+8+5+9=?`, answered in a `\boxed{}`.

A checksum of a problem's text decides its split, so no size or seed can leak a held-out problem into training.
"""

import random
import zlib
from typing import Any, Literal

from datasets import Dataset


Split = Literal["train", "test"]
Message = dict[str, str]

SPLIT_SHARE = {"train": 0.9, "test": 0.1}  # of all problems
TERM_COUNTS = (3, 4, 5, 6)
BOX = r"\boxed{"


def make_prompt(terms: tuple[int, ...]) -> list[Message]:
    """Return the conversational prompt of a problem: one user message such as `3+8+5=?`."""
    return [{"role": "user", "content": f"{'+'.join(map(str, terms))}=?"}]


def split_of(terms: tuple[int, ...]) -> Split:
    """Return the split of a problem. The CRC-32 of its text holds out about 1 problem in 10."""
    return "test" if zlib.crc32("+".join(map(str, terms)).encode()) % 10 == 0 else "train"


def check_split(split: str) -> None:
    """Raise a `ValueError` unless `split` is `"train"` or `"test"`."""
    if split not in SPLIT_SHARE:
        raise ValueError(f"split is {split!r}; pass one of {', '.join(map(repr, SPLIT_SHARE))}")


def sample_problem(rng: random.Random, split: Split, num_terms: int) -> tuple[int, ...]:
    """Draw one problem of `num_terms` digits uniformly from `split`."""
    while True:
        terms = tuple(rng.choices(range(10), k=num_terms))
        if split_of(terms) == split:
            return terms


def make_dataset(split: Split, size: int, seed: int = 0, term_counts: tuple[int, ...] = TERM_COUNTS) -> Dataset:
    """Make distinct problems of one split, in random order.

    Each number of terms gets an equal share, but at most half of its distinct problems (450 with three terms in
    `train`). Longer sums fill the rest.

    Args:
        size: number of problems, at most 499,950 for `train` and 55,550 for `test` with three to six terms.
        term_counts: numbers of terms, in increasing order.

    Returns:
        A dataset with the columns `prompt` (one user message, `3+8+5+9=?`) and `solution` (str, `25`).

    Raises:
        ValueError: if `split` is unknown or `size` is out of range.
    """
    check_split(split)
    most = {n: round(SPLIT_SHARE[split] * 10**n) // 2 for n in term_counts}
    if not 1 <= size <= sum(most.values()):
        raise ValueError(f"size is {size}; for split={split!r} pass a size from 1 to {sum(most.values())}")
    rng = random.Random(seed)
    problems: dict[tuple[int, ...], None] = {}  # an ordered set
    for i, num_terms in enumerate(term_counts):
        fair_share = -(-(size - len(problems)) // (len(term_counts) - i))  # rounded up
        wanted = len(problems) + min(fair_share, most[num_terms])
        while len(problems) < wanted:
            problems[sample_problem(rng, split, num_terms)] = None
    shuffled = rng.sample(list(problems), size)
    return Dataset.from_dict(
        {"prompt": [make_prompt(terms) for terms in shuffled], "solution": [str(sum(terms)) for terms in shuffled]}
    )


def exact_match_reward(completions: list[list[Message]] | list[str], solution: list[str], **kwargs: Any) -> list[float]:
    r"""Reward a completion whose last `\boxed{}` holds the solution.

    Completions are strings, or conversations whose last message counts.

    Returns:
        Rewards, length B: 1.0 if the content of the last `\boxed{}` equals the solution, ignoring surrounding
        whitespace; otherwise 0.0, also if there is no box or the last one is not closed.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    rewards = []
    for text, right in zip(texts, solution, strict=True):
        _, box, rest = text.rpartition(BOX)
        answer, brace, _ = rest.partition("}")
        rewards.append(float(bool(box and brace) and answer.strip() == str(right).strip()))
    return rewards
