r"""The three styles in which the starter learns to answer, for 3+8+5+9:

direct   The sum is \boxed{25}
chain    3+8=11\n11+5=16\n16+9=25\n\boxed{25}
terse    11,16,25\n\boxed{25}
"""

import random
from typing import Literal

from tic_grpo_trl.starter.task import BOX


Style = Literal["direct", "chain", "terse"]

STYLES: tuple[Style, ...] = ("direct", "chain", "terse")


def running_sums(terms: tuple[int, ...], rng: random.Random | None = None, wrong_step_rate: float = 0.0) -> list[int]:
    """Return the partial sums from the second term on, with occasional mistakes.

    A mistake is off by one and carries over into the later sums, as a model's mistake would.

    Args:
        terms: the digits, length N.
        rng: source of randomness, advanced in place; needed only if `wrong_step_rate` is above 0.
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
    r"""Write an answer in one of the three styles.

    Args:
        terms: the digits, length N.
        style: `"direct"`, `"chain"` or `"terse"`.
        sums: partial sums to show, length N - 1; the correct ones if `None`. `direct` shows only the last.

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
    """Recognize the style of an answer by its text before the last box; `"other"` if it is none of the three."""
    shown = answer.rpartition(BOX)[0]
    if shown == "The sum is ":
        return "direct"
    if "=" in shown:
        return "chain"
    return "terse" if shown.rstrip("\n").replace(",", "").isdecimal() else "other"
