"""The named sets: their hub ids, and how their stored examples become problems and answers."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Value

from . import programs
from .examples import FEATURES, checked_answer, log_once, make_examples, require_column
from .text import (
    CODE_INSTRUCTION,
    MATH_INSTRUCTION,
    choose_instruction,
    has_math_instruction,
    strip_math_instruction,
    user_message,
)


LAST_TRAINING_YEAR = 2022  # the papers train on AIME 1983 to 2022; later contests are for evaluation

Pair = tuple[str, Any]  # a problem's text, and its answer as stored


@dataclass(frozen=True)
class NamedSet:
    """A data set that this package knows by name."""

    hub_id: str
    split: str  # the only one on the hub
    evaluation: bool  # if so, it is never mixed with training data
    convert: Callable[[str, Dataset, str | None], Dataset]  # name, stored examples, instruction -> columns of FEATURES


def distinct_problems(name: str, pairs: Iterator[Pair], num_read: int, too_late: int = 0) -> list[tuple[str, str]]:
    """Keep each problem once, in order of first appearance, and drop problems with several different answers.

    Problems that differ only in whitespace count as one, as do answers that `normalize_answer` makes equal. The log
    counts the `num_read` stored examples, of which `pairs` omits `too_late` because of their year.
    """
    problems: dict[str, tuple[str, set[str]]] = {}
    for problem, answer in pairs:
        if not problem:
            raise ValueError(f"{name}: an example has no problem; remove it.")
        normalized = checked_answer(name, answer, f"the problem {problem[:60]!r}")
        _, answers = problems.setdefault(" ".join(problem.split()), (problem, set()))
        answers.add(normalized)
    kept = [(problem, answers.pop()) for problem, answers in problems.values() if len(answers) == 1]
    conflicting = len(problems) - len(kept)
    log_once(
        f"{name}: {num_read:,} examples read, "
        f"{f'{too_late:,} after {LAST_TRAINING_YEAR} dropped, ' if too_late else ''}"
        f"{num_read - too_late - len(problems):,} duplicates dropped, "
        f"{conflicting:,} problems with conflicting answers dropped, {len(kept):,} kept"
    )
    return kept


def math_examples(name: str, problems: list[tuple[str, str]], instruction: str | None) -> Dataset:
    """Build the examples of N pairs (problem, answer)."""
    template = choose_instruction(instruction, MATH_INSTRUCTION)
    prompts = [user_message(problem, template) for problem, _ in problems]
    return make_examples(name, prompts, [answer for _, answer in problems])


def stored_pairs(name: str, examples: Dataset, problem: str, answer: str) -> Iterator[Pair]:
    """Yield the stripped problem and the stored answer of every example."""
    for i, (text, value) in enumerate(zip(examples[problem], examples[answer], strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: example {i} has no string in column {problem!r}; correct or remove it.")
        yield text.strip(), value


def convert_dapo(name: str, examples: Dataset, instruction: str | None) -> Dataset:
    """Convert DAPO-Math-17k from its original schema (messages with the instruction) or its processed one (strings)."""
    prompt = require_column(name, examples, "prompt")
    if examples.features[prompt] == Value("string"):
        pairs = stored_pairs(name, examples, prompt, require_column(name, examples, "solution"))
        return math_examples(name, distinct_problems(name, pairs, len(examples)), instruction)

    unique = dict.fromkeys(_original_dapo_pairs(name, examples, prompt, require_column(name, examples, "reward_model")))
    foreign = sum(not has_math_instruction(text) for text, _ in unique)
    if foreign:
        log_once(
            f"{name}: {foreign:,} prompts do not contain DAPO's instruction word for word; they are kept unchanged",
            logging.WARNING,
        )
    bare = ((strip_math_instruction(text), answer) for text, answer in unique)
    return math_examples(name, distinct_problems(name, bare, len(examples)), instruction)


def _original_dapo_pairs(name: str, examples: Dataset, prompt: str, reward_model: str) -> Iterator[Pair]:
    """Yield (prompt with its instruction, answer) of every example; in Arrow, because there are 1.79 million."""
    wrong = f"{name}: not DAPO's schema: {prompt!r} must be one message with content, {reward_model!r} a ground_truth"
    try:
        plain = isinstance(examples.features[reward_model]["ground_truth"], Value)
        plain = plain and examples.features[prompt].feature["content"] == Value("string")
    except (TypeError, KeyError, AttributeError):
        plain = False
    if not plain:
        raise ValueError(f"{wrong}; found {examples.features[prompt]} and {examples.features[reward_model]}.")
    for table in examples.select_columns([prompt, reward_model]).with_format("arrow").iter(batch_size=10_000):
        messages = table[prompt].combine_chunks()
        if pc.any(pc.not_equal(pc.fill_null(pc.list_value_length(messages), 0), 1)).as_py():
            raise ValueError(f"{wrong}; an example has several messages or none.")
        contents = pc.struct_field(pc.list_flatten(messages), "content").to_pylist()
        if None in contents:
            raise ValueError(f"{wrong}; a message has no content.")
        yield from zip(contents, pc.struct_field(table[reward_model], "ground_truth").to_pylist(), strict=True)


def convert_aime_training(name: str, examples: Dataset, instruction: str | None) -> Dataset:
    """Convert the AIME problems up to `LAST_TRAINING_YEAR`."""
    years = aime_years(name, examples)
    early = examples.select([i for i, year in enumerate(years) if year <= LAST_TRAINING_YEAR])
    problem, answer = require_column(name, examples, "Question", "problem"), require_column(name, examples, "Answer")
    pairs = stored_pairs(name, early, problem, answer)
    problems = distinct_problems(name, pairs, len(examples), too_late=len(examples) - len(early))
    return math_examples(name, problems, instruction)


def aime_years(name: str, examples: Dataset) -> list[int]:
    """Read the year of every example from the column `Year`, from an `ID` such as `1983-1`, or from both.

    A year that is unreadable or contradictory is an error: it could be a problem of the evaluation sets.
    """
    require_column(name, examples, "Year", "ID")
    found = {column.lower(): column for column in examples.column_names}
    columns = [found[key] for key in ("year", "id") if key in found]
    years = []
    for i, example in enumerate(examples.select_columns(columns)):
        by_id = re.match(r"\s*([0-9]{4})-", str(example.get(found.get("id"))))
        stated = {int(by_id[1])} if by_id else set()
        if "year" in found:
            by_year = re.fullmatch(r"([0-9]{4})(\.0)?", str(example[found["year"]]).strip())
            stated.add(int(by_year[1]) if by_year else 0)
        if len(stated) != 1 or not 1983 <= min(stated) <= 2099:
            raise ValueError(
                f"{name}: the year of example {i} is uncertain ({example}), and training may use only problems up to "
                f"{LAST_TRAINING_YEAR}. Give each example a year from 1983 on, in a column 'Year' or an 'ID' such as "
                "'1983-1'. If both exist, they must agree. Correct or remove the example."
            )
        years.append(stated.pop())
    return years


def convert_math_evaluation(name: str, examples: Dataset, instruction: str | None) -> Dataset:
    """Convert an evaluation set with the columns `problem` and `answer`, keeping every example in order."""
    problem, answer = require_column(name, examples, "problem", "Question"), require_column(name, examples, "answer")
    problems = [
        (text, checked_answer(name, value, f"example {i}"))
        for i, (text, value) in enumerate(stored_pairs(name, examples, problem, answer))
    ]
    log_once(f"{name}: {len(examples):,} examples read, all kept")
    return math_examples(name, problems, instruction)


def convert_code(name: str, examples: Dataset, instruction: str | None) -> Dataset:
    """Convert LiveCodeBench, keeping every example in order, with its tests decoded into `solution`."""
    columns = [require_column(name, examples, column) for column in programs.COLUMNS]
    template = choose_instruction(instruction, CODE_INSTRUCTION)

    def convert(example: dict[str, Any], index: int) -> dict[str, Any]:
        content, starter, public, private, metadata = (example[column] for column in columns)
        try:
            return {
                "prompt": user_message(programs.problem_text(content, starter), template),
                "solution": programs.solution_text(public, private, metadata),
                "source": name,
            }
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{name}: example {index} cannot be used: {error}") from error

    converted = examples.select_columns(columns).map(
        convert,
        with_indices=True,
        remove_columns=columns,
        features=FEATURES,
        writer_batch_size=16,  # the tests of one problem can be megabytes
        load_from_cache_file=False,  # the cache would not notice changes to this code
        desc=f"{name}: decoding tests",
    )
    log_once(f"{name}: {len(examples):,} examples read, all kept")
    return converted


NAMED_SETS = {
    "dapo_math_17k": NamedSet("BytedTsinghua-SIA/DAPO-Math-17k", "train", False, convert_dapo),
    "aime_1983_2022": NamedSet("gneubig/aime-1983-2024", "train", False, convert_aime_training),
    "aime24": NamedSet("HuggingFaceH4/aime_2024", "train", True, convert_math_evaluation),
    "aime25": NamedSet("yentinglin/aime_2025", "train", True, convert_math_evaluation),
    "math500": NamedSet("HuggingFaceH4/MATH-500", "test", True, convert_math_evaluation),
    "livecodebench": NamedSet("lighteval/code_generation_lite", "test", True, convert_code),
}
