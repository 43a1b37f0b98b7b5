r"""The starter's task: sums of three to six one-digit numbers, `3+8+5+9=?`.

Everything here is a pure function of its arguments. A problem is a tuple of digits, in order; its text, `3+8+5+9`,
decides by a checksum which split it belongs to, so no choice of sizes or seeds can leak a held-out problem into
training. The three answer styles are what the warm start in `build.py` learns from:

    direct   The sum is \boxed{25}
    chain    3+8=11\n11+5=16\n16+9=25\n\boxed{25}
    terse    11,16,25\n\boxed{25}
"""

import random
import zlib
from typing import Any, Literal

from datasets import Dataset


Split = Literal["train", "test"]
Style = Literal["direct", "chain", "terse"]
Message = dict[str, str]

SPLIT_SHARE = {"train": 0.9, "test": 0.1}  # share of all problems that the checksum gives to each split
TERM_COUNTS = (3, 4, 5, 6)
STYLES: tuple[Style, ...] = ("direct", "chain", "terse")
BOX = r"\boxed{"


def problem_text(terms: tuple[int, ...]) -> str:
    """The problem without its question mark: `(3, 8, 5)` gives `"3+8+5"`."""
    return "+".join(map(str, terms))


def make_prompt(terms: tuple[int, ...]) -> list[Message]:
    """The conversational prompt of a problem: one user message such as `3+8+5=?`."""
    return [{"role": "user", "content": f"{problem_text(terms)}=?"}]


def split_of(terms: tuple[int, ...]) -> Split:
    """The one split a problem belongs to: about 1 problem in 10 is held out, decided by the CRC-32 of its text."""
    return "test" if zlib.crc32(problem_text(terms).encode()) % 10 == 0 else "train"


def sample_problem(rng: random.Random, split: Split, num_terms: int) -> tuple[int, ...]:
    """Draws one problem of `num_terms` digits (0 to 9) uniformly from `split`.

    Args:
        rng: source of randomness, advanced in place.
        split: `"train"` or `"test"`.
        num_terms: how many digits to add.

    Returns:
        The digits, length `num_terms`.
    """
    while True:
        terms = tuple(rng.choices(range(10), k=num_terms))
        if split_of(terms) == split:
            return terms


def make_dataset(split: Split, size: int, seed: int = 0, term_counts: tuple[int, ...] = TERM_COUNTS) -> Dataset:
    """Distinct problems of one split, in random order.

    The splits are disjoint by construction (see `split_of`). The number of terms is uniform over `term_counts` as far
    as distinct problems allow: no length gives more than half of its problems (450 of three terms in `train`, 50 in
    `test`), and what a short length cannot give the longer ones share.

    Args:
        split: `"train"` or `"test"`.
        size: number of rows, at most 499,950 for `train` and 55,550 for `test` with three to six terms.
        seed: the same seed gives the same rows.
        term_counts: numbers of terms, in increasing order.

    Returns:
        A dataset with the columns `prompt` (one user message, `3+8+5+9=?`) and `solution` (str, `25`).

    Raises:
        ValueError: if `split` is unknown or `size` is out of range.
    """
    if split not in SPLIT_SHARE:
        raise ValueError(f"split is {split!r}; pass one of {', '.join(map(repr, SPLIT_SHARE))}")
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


def running_sums(terms: tuple[int, ...], rng: random.Random | None = None, wrong_step_rate: float = 0.0) -> list[int]:
    """Partial sums from the second term on, each step wrong by one with probability `wrong_step_rate`.

    A wrong step is carried on, as a model that slips carries its slip on.

    Args:
        terms: the digits, length N.
        rng: needed only for a `wrong_step_rate` above 0, advanced in place.
        wrong_step_rate: probability that a step is wrong.

    Returns:
        The partial sums, length N - 1, never negative: `(3, 8, 5)` gives `[11, 16]`.
    """
    sums, total = [], terms[0]
    for term in terms[1:]:
        total += term
        if rng is not None and rng.random() < wrong_step_rate:
            total = max(0, total + rng.choice((-1, 1)))
        sums.append(total)
    return sums


def format_answer(terms: tuple[int, ...], style: Style, sums: list[int] | None = None) -> str:
    r"""Writes an answer in one of the three styles.

    Args:
        terms: the digits, length N.
        style: `"direct"`, `"chain"` or `"terse"`.
        sums: partial sums to show, length N - 1; the right ones when left out. `direct` shows only the last.

    Returns:
        The answer, ending in `\boxed{}` around the last partial sum.

    Raises:
        ValueError: if `style` is unknown.
    """
    sums = running_sums(terms) if sums is None else sums
    boxed = BOX + f"{sums[-1]}}}"
    if style == "direct":
        return f"The sum is {boxed}"
    if style == "chain":
        steps = zip([terms[0], *sums], terms[1:], sums, strict=False)  # (before, term, after) of each addition
        return "".join(f"{before}+{term}={after}\n" for before, term, after in steps) + boxed
    if style == "terse":
        return ",".join(map(str, sums)) + f"\n{boxed}"
    raise ValueError(f"style is {style!r}; pass one of {', '.join(map(repr, STYLES))}")


def style_of(answer: str) -> Style | Literal["other"]:
    """The style an answer is written in, by how its text before the last box looks; `"other"` for none of them."""
    shown = answer.rpartition(BOX)[0]
    if shown == "The sum is ":
        return "direct"
    if "=" in shown:
        return "chain"
    return "terse" if shown.rstrip("\n").replace(",", "").isdecimal() else "other"


def exact_match_reward(completions: list[list[Message]] | list[str], solution: list[str], **kwargs: Any) -> list[float]:
    r"""Rewards a completion whose last `\boxed{}` holds the solution, in TRL's reward-function signature.

    Args:
        completions: completions, length B; conversational (the last message counts) or plain strings.
        solution: the right answers, length B.
        **kwargs: the other columns and arguments TRL passes, unused.

    Returns:
        Rewards, length B: 1.0 when the content of the last `\boxed{}` equals the solution, surrounding whitespace
        apart; 0.0 otherwise, also when there is no box or the last one is not closed.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    rewards = []
    for text, right in zip(texts, solution, strict=True):
        _, box, rest = text.rpartition(BOX)
        answer, brace, _ = rest.partition("}")
        rewards.append(float(bool(box and brace) and answer.strip() == right.strip()))
    return rewards
