"""Load a data set, or several joined by `+`, from its name."""

from datasets import Dataset

from .examples import log_once, make_examples
from .named_sets import NAMED_SETS
from .names import EVALUATION_SETS, GENERATED_SETS, parse, split_names
from .sources import read
from .text import DEFAULT, choose_instruction
from .user_data import convert_user_data, join, pick_split


GENERATED_SIZES = {"train": 8000, "test": 1000}


def load_problems(
    name: str,
    split: str = "train",
    *,
    instruction: str | None = DEFAULT,
    columns: dict[str, str] | None = None,
    config: str | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load one data set, or several joined by `+`, in that order.

    Args:
        name: parts joined by `+`. A part is a named set (`dapo_math_17k`, `aime_1983_2022`, `aime24`, `aime25`,
            `math500`, `livecodebench`, `starter`, `long_tail`, `few_shot_sums`), a named set read from a copy with the
            same columns (`NAME@LOCATION`), or a location: a parquet, jsonl, json or csv file, a folder of such files,
            a `save_to_disk` folder, or a hub id.
        split: split of your own data or of a generated set (the last three of these names). The other named sets have a
            single split, which is for training (only `"train"` is accepted) or for evaluation.
        instruction: template for each problem, with `{problem}` in it. `"default"` selects the papers' instruction for
            mathematics (`MATH_INSTRUCTION`) and `CODE_INSTRUCTION` for `livecodebench`. `None` or an empty string
            leaves the bare problem. Prompts that are already lists of messages are not changed.
        columns: new names of columns in your own data, as `{"prompt": "question", "solution": "answer"}`. It needs a
            column `prompt` (strings or messages) and a column `solution`.
        config: configuration of a hub data set or of a copy; only with a single part.
        size: number of problems of a generated set; by default 8000 for `train`, 1000 for `test`.
        seed: random seed of the generated problems.

    Returns:
        A dataset with the columns `prompt` (messages with `role` and `content`), `solution` (str; JSON with the tests
        for `livecodebench`) and `source` (str, the part without its location). Your own data keeps its other columns;
        examples of other parts have `None` there.

    Raises:
        ValueError: if an argument is wrong, a column is missing, a set is empty, a file cannot be read, an
            `aime_1983_2022` example has no reliable year, or an evaluation set is mixed with others.
        FileNotFoundError: if a path or hub data set does not exist.
        ConnectionError: if the hub cannot be reached; the message says how to use a copy.
    """
    choose_instruction(instruction, "{problem}")
    parts = [parse(part) for part in split_names(name)]
    _check_arguments([part for part, _ in parts], split, columns, config)
    loaded = [
        _generate(part, split, size, seed)
        if part in GENERATED_SETS
        else _load(part, location, split, instruction, columns or {}, config)
        for part, location in parts
    ]
    return join(name, loaded)


def _check_arguments(names: list[str], split: str, columns: dict[str, str] | None, config: str | None) -> None:
    for name in names:
        if name in NAMED_SETS and not NAMED_SETS[name].evaluation and split != "train":
            raise ValueError(
                f"{name} is for training and has no split {split!r}; evaluate on {', '.join(EVALUATION_SETS)} or on "
                "your own data."
            )
    others = [name for name in names if name not in EVALUATION_SETS]
    if 0 < len(others) < len(names):
        evaluation = ", ".join(name for name in names if name in EVALUATION_SETS)
        raise ValueError(f"{evaluation} cannot be mixed with {', '.join(others)}: it is for evaluation. Load it alone.")
    if columns is not None and all(name in NAMED_SETS or name in GENERATED_SETS for name in names):
        raise ValueError(f"columns is for your own data, and {', '.join(names)} has fixed columns. Remove columns.")
    if config is not None and (len(names) > 1 or names[0] in GENERATED_SETS):
        raise ValueError(f"config={config!r} needs a single data set from the hub or a copy, not {'+'.join(names)}.")


def _load(
    name: str, location: str | None, split: str, instruction: str | None, columns: dict[str, str], config: str | None
) -> Dataset:
    named = NAMED_SETS.get(name)
    place = location or (named.hub_id if named else name)
    splits = read(name, place, config, named is not None)
    if named:  # the copy of a named set may store its only split under another name
        split = next(iter(splits)) if len(splits) == 1 else named.split
    examples = pick_split(name, splits, split)
    if named:
        converted = named.convert(name, examples, instruction)
    else:
        converted = convert_user_data(name, examples, instruction, columns)
    if len(converted) == 0:
        raise ValueError(f"{name}: no problem is left of the {len(examples):,} examples in {place}; is the path right?")
    return converted


def _generate(name: str, split: str, size: int | None, seed: int) -> Dataset:
    made = GENERATED_SETS[name](split, GENERATED_SIZES.get(split, 1) if size is None else size, seed)
    log_once(f"{name}: {len(made):,} problems generated")
    return make_examples(name, made["prompt"][:], made["solution"][:])
