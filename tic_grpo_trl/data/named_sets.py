"""The named sets: their hub ids, and how each one's rows become problems and answers."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from . import programs as code
from .text import (
    CODE_INSTRUCTION,
    MATH_INSTRUCTION,
    choose_instruction,
    has_math_instruction,
    normalize_answer,
    strip_math_instruction,
    user_message,
)


logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "solution": Value("string"),
        "source": Value("string"),
    }
)
LAST_TRAINING_YEAR = 2022  # the papers': AIME 1983 to 2022; later contests are for evaluation
BATCH_ROWS = 10_000

Pair = tuple[str, Any]  # a problem's text, and its answer as stored


@dataclass(frozen=True)
class NamedSet:
    """A data set this package knows by name.

    Args:
        hub_id: where it comes from by default.
        split: its one split on the hub.
        evaluation: whether it is for evaluation, and so never mixed with training data.
        convert: makes the output rows of (name, rows as stored, instruction).
    """

    hub_id: str
    split: str
    evaluation: bool
    convert: Callable[[str, Dataset, str | None], Dataset]


def report(message: str, level: int = logging.INFO) -> None:
    """Log once per run, also when many processes load."""
    if os.environ.get("RANK", "0") == "0":
        logger.log(level, message)


def require_column(name: str, rows: Dataset, *wanted: str) -> str:
    """The first of the wanted columns that is there, capital letters apart.

    Raises:
        ValueError: if none is, with the columns found.
    """
    found = {column.lower(): column for column in rows.column_names}
    for column in wanted:
        if column.lower() in found:
            return found[column.lower()]
    raise ValueError(
        f"{name}: there is no column {' or '.join(map(repr, wanted))}; the columns are "
        f"{', '.join(map(repr, rows.column_names))}. Give a copy with the set's own columns, or load it as your own "
        "data (the path without NAME@) with columns={'prompt': ..., 'solution': ...}."
    )


def answer_text(name: str, answer: Any, where: str) -> str:
    """`normalize_answer` with an error that says where the answer is."""
    try:
        return normalize_answer(answer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {where} has no usable answer ({error}); correct or remove it.") from error


def distinct_problems(name: str, pairs: Iterator[Pair], rows: int, too_late: int = 0) -> list[tuple[str, str]]:
    """Each problem once, in order of first appearance; problems with several different answers are dropped.

    Two texts are one problem if they differ in white space alone, two answers are one if `normalize_answer` says so.

    Args:
        name: the set's name.
        pairs: (problem, answer as stored); repeats are welcome.
        rows: how many rows were read, for the log.
        too_late: how many of them are not in `pairs` because of their year, for the log.

    Returns:
        (problem, normalised answer), length N.
    """
    problems: dict[str, tuple[str, set[str]]] = {}
    for problem, answer in pairs:
        if not problem:
            raise ValueError(f"{name}: there is a row without a problem; remove it.")
        normalized = answer_text(name, answer, f"the problem {problem[:60]!r}")
        _, answers = problems.setdefault(" ".join(problem.split()), (problem, set()))
        answers.add(normalized)
    kept = [(problem, answers.pop()) for problem, answers in problems.values() if len(answers) == 1]
    conflicting = len(problems) - len(kept)
    report(
        f"{name}: {rows:,} rows read, {f'{too_late:,} after {LAST_TRAINING_YEAR} left out, ' if too_late else ''}"
        f"{rows - too_late - len(problems):,} duplicates dropped, "
        f"{conflicting:,} problems with conflicting answers dropped, {len(kept):,} kept"
    )
    return kept


def math_rows(name: str, problems: list[tuple[str, str]], instruction: str | None) -> Dataset:
    """The output rows of (problem, answer), length N."""
    template = choose_instruction(instruction, MATH_INSTRUCTION)
    return Dataset.from_dict(
        {
            "prompt": [user_message(problem, template) for problem, _ in problems],
            "solution": [answer for _, answer in problems],
            "source": [name] * len(problems),
        },
        features=FEATURES,
    )


def stored_pairs(name: str, rows: Dataset, problem: str, answer: str) -> Iterator[Pair]:
    """(problem, answer) of every row, stripped.

    Raises:
        ValueError: if a problem is missing or empty.
    """
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        for i, (text, value) in enumerate(zip(batch[problem], batch[answer], strict=True), start):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{name}: row {i} has no text in column {problem!r}; correct or remove it.")
            yield text.strip(), value


def convert_dapo(name: str, rows: Dataset, instruction: str | None) -> Dataset:
    """DAPO-Math-17k, in the original schema (messages that carry the instruction) or the processed one (bare text)."""
    prompt = require_column(name, rows, "prompt")
    if rows.features[prompt] == Value("string"):
        pairs = stored_pairs(name, rows, prompt, require_column(name, rows, "solution"))
        return math_rows(name, distinct_problems(name, pairs, len(rows)), instruction)

    unique = dict.fromkeys(_original_dapo_pairs(name, rows, prompt, require_column(name, rows, "reward_model")))
    foreign = sum(not has_math_instruction(text) for text, _ in unique)
    if foreign:
        report(
            f"{name}: {foreign:,} prompts do not carry DAPO's instruction in the wording known: used as they are",
            logging.WARNING,
        )
    bare = ((strip_math_instruction(text), answer) for text, answer in unique)
    return math_rows(name, distinct_problems(name, bare, len(rows)), instruction)


def _original_dapo_pairs(name: str, rows: Dataset, prompt: str, reward_model: str) -> Iterator[Pair]:
    """(prompt with its instruction, answer) of every row; in Arrow, because there are 1.79 million of them."""
    wrong = f"{name}: not DAPO's schema: {prompt!r} must be one message with a content, {reward_model!r} a ground_truth"
    try:
        plain = isinstance(rows.features[reward_model]["ground_truth"], Value)
        plain = plain and rows.features[prompt].feature["content"] == Value("string")
    except (TypeError, KeyError, AttributeError):
        plain = False
    if not plain:
        raise ValueError(f"{wrong}; found {rows.features[prompt]} and {rows.features[reward_model]}.")
    for table in rows.select_columns([prompt, reward_model]).with_format("arrow").iter(batch_size=BATCH_ROWS):
        messages = table[prompt].combine_chunks()
        if pc.any(pc.not_equal(pc.fill_null(pc.list_value_length(messages), 0), 1)).as_py():
            raise ValueError(f"{wrong}; there is a row with several messages or none.")
        contents = pc.struct_field(pc.list_flatten(messages), "content").to_pylist()
        if None in contents:
            raise ValueError(f"{wrong}; there is a message without a content.")
        yield from zip(contents, pc.struct_field(table[reward_model], "ground_truth").to_pylist(), strict=True)


def convert_aime_training(name: str, rows: Dataset, instruction: str | None) -> Dataset:
    """AIME problems up to `LAST_TRAINING_YEAR`; a row whose year is not certain stops everything."""
    years = aime_years(name, rows)
    early = rows.select([i for i, year in enumerate(years) if year <= LAST_TRAINING_YEAR])
    problem, answer = require_column(name, rows, "Question", "problem"), require_column(name, rows, "Answer")
    pairs = stored_pairs(name, early, problem, answer)
    problems = distinct_problems(name, pairs, len(rows), too_late=len(rows) - len(early))
    return math_rows(name, problems, instruction)


def aime_years(name: str, rows: Dataset) -> list[int]:
    """The year of every row, from the column `Year`, from an `ID` such as `1983-1`, or from both, which must agree.

    Raises:
        ValueError: if a row has no year or an unreadable one, or the two disagree: such a row may be a problem of the
            evaluation sets.
    """
    found = {column.lower(): column for column in rows.column_names}
    columns = [found[key] for key in ("year", "id") if key in found]
    if not columns:
        require_column(name, rows, "Year", "ID")
    years = []
    for i, row in enumerate(rows.select_columns(columns)):
        by_id = re.match(r"\s*([0-9]{4})-", str(row.get(found.get("id"))))
        told = {int(by_id[1])} if by_id else set()
        if "year" in found:
            told.add(_year(row[found["year"]]))
        if len(told) != 1 or not 1983 <= min(told) <= 2099:
            raise ValueError(
                f"{name}: the year of row {i} is not certain ({row}), and only problems up to {LAST_TRAINING_YEAR} "
                "may be trained on. Each row needs a year from 1983 on, in a column 'Year' or in an 'ID' such as "
                "'1983-1', and where there are both they must agree: correct or remove the row."
            )
        years.append(told.pop())
    return years


def _year(value: Any) -> int:
    """A year as stored (1983, 1983.0, "1983"), 0 if it is none."""
    text = str(value).strip().removesuffix(".0")
    return int(text) if re.fullmatch(r"[0-9]{4}", text) else 0


def convert_math_evaluation(name: str, rows: Dataset, instruction: str | None) -> Dataset:
    """An evaluation set: every row, in order, from `problem` and `answer`."""
    problem, answer = require_column(name, rows, "problem", "Question"), require_column(name, rows, "answer")
    problems = [
        (text, answer_text(name, value, f"row {i}"))
        for i, (text, value) in enumerate(stored_pairs(name, rows, problem, answer))
    ]
    report(f"{name}: {len(rows):,} rows read, all kept")
    return math_rows(name, problems, instruction)


def convert_code(name: str, rows: Dataset, instruction: str | None) -> Dataset:
    """LiveCodeBench: every row, in order, its tests decoded into `solution`."""
    columns = {column: require_column(name, rows, column) for column in code.COLUMNS}
    template = choose_instruction(instruction, CODE_INSTRUCTION)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        content, starter, public, private, metadata = (row[column] for column in columns.values())
        try:
            return {
                "prompt": user_message(code.problem_text(content, starter), template),
                "solution": code.solution_text(public, private, metadata),
                "source": name,
            }
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{name}: row {index} cannot be used: {error}") from error

    converted = rows.select_columns(list(columns.values())).map(
        convert,
        with_indices=True,
        remove_columns=list(columns.values()),
        features=FEATURES,
        writer_batch_size=16,  # the tests of one problem can be megabytes
        load_from_cache_file=False,  # a cache would outlive changes of this code
        desc=f"{name}: decoding tests",
    )
    report(f"{name}: {len(rows):,} rows read, all kept")
    return converted


NAMED_SETS = {
    "dapo_math_17k": NamedSet("BytedTsinghua-SIA/DAPO-Math-17k", "train", False, convert_dapo),
    "aime_1983_2022": NamedSet("gneubig/aime-1983-2024", "train", False, convert_aime_training),
    "aime24": NamedSet("HuggingFaceH4/aime_2024", "train", True, convert_math_evaluation),
    "aime25": NamedSet("yentinglin/aime_2025", "train", True, convert_math_evaluation),
    "math500": NamedSet("HuggingFaceH4/MATH-500", "test", True, convert_math_evaluation),
    "livecodebench": NamedSet("lighteval/code_generation_lite", "test", True, convert_code),
}
