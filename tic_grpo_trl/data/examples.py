"""What all converters share: the columns of an example, checks with clear errors, and one log line per set."""

import logging
import os
from typing import Any

from datasets import Dataset, Features, List, Value

from .text import normalize_answer


logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "solution": Value("string"),
        "source": Value("string"),
    }
)


def make_examples(name: str, prompts: list[list[dict[str, str]]], solutions: list[str]) -> Dataset:
    """Build the data set of N prompts and N solutions, with `name` as their source."""
    columns = {"prompt": prompts, "solution": solutions, "source": [name] * len(prompts)}
    return Dataset.from_dict(columns, features=FEATURES)


def log_once(message: str, level: int = logging.INFO) -> None:
    """Log a message on the first process of a run only."""
    if os.environ.get("RANK", "0") == "0":
        logger.log(level, message)


def require_column(name: str, examples: Dataset, *wanted: str) -> str:
    """Return the first of the wanted columns that exists, ignoring case."""
    found = {column.lower(): column for column in examples.column_names}
    for column in wanted:
        if column.lower() in found:
            return found[column.lower()]
    raise ValueError(
        f"{name}: there is no column {' or '.join(map(repr, wanted))}; the columns are "
        f"{', '.join(map(repr, examples.column_names))}. Give a copy with the set's original columns, or load it as "
        "your own data (the path without NAME@) with columns={'prompt': ..., 'solution': ...}."
    )


def checked_answer(name: str, answer: Any, where: str) -> str:
    """Normalize an answer with `normalize_answer`; an error says where the answer is."""
    try:
        return normalize_answer(answer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {where} has no usable answer ({error}); correct or remove it.") from error
