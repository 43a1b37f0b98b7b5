r"""Few-shot sums, a task within reach of a small pretrained model: each prompt shows two worked examples.

What is 4 + 7 + 3?
4 + 7 = 11
11 + 3 = 14
\boxed{14}
"""

import random
from itertools import accumulate

from datasets import Dataset

from .task import BOX, Message, Split, check_split, sample_problem


TERM_COUNTS = (2, 3)
NUM_EXAMPLES = 2


def question(terms: tuple[int, ...]) -> Message:
    """Return the user's message: `(4, 7, 3)` gives `What is 4 + 7 + 3?`."""
    return {"role": "user", "content": f"What is {' + '.join(map(str, terms))}?"}


def worked_answer(terms: tuple[int, ...]) -> Message:
    """Return the assistant's message of a worked example: one addition per line, then the sum in a box."""
    sums = list(accumulate(terms))
    steps = [f"{total - term} + {term} = {total}" for total, term in zip(sums[1:], terms[1:], strict=True)]
    return {"role": "assistant", "content": "\n".join([*steps, f"{BOX}{sums[-1]}}}"])}


def make_dataset(split: Split, size: int, seed: int = 0) -> Dataset:
    """Make sums of two or three one-digit numbers, each with two worked examples as earlier turns.

    The worked examples always come from `train` and never contain the sum that is asked, so nothing of `test` appears
    in `train`. There are only 981 different sums to ask in `train` and 119 in `test`; larger datasets repeat them with
    other worked examples.

    Returns:
        A dataset with the columns `prompt` (five messages) and `solution` (str, `14`).

    Raises:
        ValueError: if `split` is unknown or `size` is not positive.
    """
    check_split(split)
    if size < 1:
        raise ValueError(f"size is {size}; pass a positive number of prompts")
    rng = random.Random(seed)
    prompts: list[list[Message]] = []
    solutions: list[str] = []
    for _ in range(size):
        asked = sample_problem(rng, split, rng.choice(TERM_COUNTS))
        shown: dict[tuple[int, ...], None] = {}  # an ordered set
        while len(shown) < NUM_EXAMPLES:
            example = sample_problem(rng, "train", rng.choice(TERM_COUNTS))
            if example != asked:
                shown[example] = None
        turns = [turn for terms in shown for turn in (question(terms), worked_answer(terms))]
        prompts.append([*turns, question(asked)])
        solutions.append(str(sum(asked)))
    return Dataset.from_dict({"prompt": prompts, "solution": solutions})
