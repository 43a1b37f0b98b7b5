"""Problems to train and evaluate on: named sets, own files, mixtures; columns `prompt`, `solution`, `source`.

The papers' training data from the hub, a named set from a local copy, and a file with columns of its own:

    load_problems("dapo_math_17k+aime_1983_2022")
    load_problems("aime24@copies/aime_2024.parquet")
    load_problems("sums.jsonl", columns={"prompt": "question", "solution": "answer"})
"""

import importlib
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from .lengths import drop_long_prompts, prompt_lengths
from .named_sets import FEATURES, NAMED_SETS, report
from .sources import PLACES, is_hub_id, read
from .text import CODE_INSTRUCTION, DEFAULT, MATH_INSTRUCTION, choose_instruction, normalize_answer
from .user_data import convert_own


GENERATED_SETS = {"starter": "tic_grpo_trl.starter", "few_shot_sums": "examples.smollm2"}
GENERATED_SIZES = {"train": 8000, "test": 1000}
EVALUATION_SETS = tuple(name for name, known in NAMED_SETS.items() if known.evaluation)

__all__ = [
    "CODE_INSTRUCTION",
    "DEFAULT",
    "EVALUATION_SETS",
    "GENERATED_SETS",
    "MATH_INSTRUCTION",
    "NAMED_SETS",
    "drop_long_prompts",
    "load_problems",
    "normalize_answer",
    "prompt_lengths",
]


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
    """Loads one set of problems, or several joined by `+`, in that order.

    Args:
        name: parts joined by `+`. A part is a named set (`dapo_math_17k`, `aime_1983_2022`, `aime24`, `aime25`,
            `math500`, `livecodebench`, `starter`, `few_shot_sums`), a named set from another place with the same
            columns as its hub copy (`NAME@LOCATION`), or a location alone: a local parquet, jsonl, json or csv file,
            a folder of such files, a `save_to_disk` folder, or a hub id.
        split: which split of your own data to use, and which of the two of `starter` and `few_shot_sums`. The
            other named sets have one split, which is for training (`train` alone is accepted) or for evaluation.
        instruction: text around each problem, with `{problem}` where it goes. `"default"`: the papers' for
            mathematics (`MATH_INSTRUCTION`), `CODE_INSTRUCTION` for `livecodebench`. `None` or empty: the bare
            problem. Prompts that are messages already are kept as they are.
        columns: for your own data, its names of `prompt` (text or messages) and `solution`.
        config: configuration of the hub data set or of its copy; for a single part only.
        size: how many problems `starter` and `few_shot_sums` make: 8000 for `train`, 1000 for `test` by default.
        seed: their seed.

    Returns:
        A dataset with exactly the columns `prompt` (messages with `role` and `content`), `solution` (str; JSON with the
        tests for `livecodebench`) and `source` (str, the part without its location).

    Raises:
        ValueError: wrong arguments, a missing column, an empty set, a file that cannot be read, a year that is not
            certain (`aime_1983_2022`), evaluation sets mixed with others.
        FileNotFoundError: a path or hub data set that does not exist.
        ConnectionError: a hub that cannot be reached; the message says how to use a copy.
    """
    choose_instruction(instruction, "{problem}")
    parts = [_parse(part) for part in _split_names(name)]
    _check_arguments([part for part, _ in parts], split, columns, config)
    loaded = []
    for part, location in parts:
        if part in GENERATED_SETS:
            loaded.append(_generate(part, split, size, seed))
        else:
            loaded.append(_load(part, location, split, instruction, columns or {}, config))
    return loaded[0] if len(loaded) == 1 else concatenate_datasets(loaded)


def _split_names(name: str) -> list[str]:
    _, _, location = name.partition("@")
    if any(text and Path(text).expanduser().exists() for text in (name, location)):
        return [name]  # a path may hold a plus sign
    return [part.strip() for part in name.split("+")]


def _parse(part: str) -> tuple[str, str | None]:
    """The set's name and its location, `None` for the set's own; own data has its location as its name."""
    known = ", ".join([*NAMED_SETS, *GENERATED_SETS])
    name, at, location = part.partition("@")
    if not part:
        raise ValueError(f"a data set's name is empty; the named sets are {known}. For other data give {PLACES}.")
    if name in GENERATED_SETS and at:
        raise ValueError(f"{part}: {name} is made on the spot and has no other place; leave @{location} out.")
    if name in NAMED_SETS and at and not location:
        raise ValueError(f"{part}: give a location after @: {PLACES}.")
    if name in NAMED_SETS or name in GENERATED_SETS:
        return name, location or None
    if Path(part).expanduser().exists() or is_hub_id(part):
        return part, part
    if at:
        raise ValueError(f"{part!r}: only named sets take @LOCATION, and {name!r} is none of {known}.")
    if "/" in part or Path(part).suffix:
        raise FileNotFoundError(f"there is no file or folder {part!r}; give {PLACES}.")
    raise ValueError(f"there is no data set {part!r}; the named sets are {known}. For other data give {PLACES}.")


def _check_arguments(names: list[str], split: str, columns: dict[str, str] | None, config: str | None) -> None:
    known = [*NAMED_SETS, *GENERATED_SETS]
    for name in names:
        if name in NAMED_SETS and not NAMED_SETS[name].evaluation and split != "train":
            raise ValueError(
                f"{name} is for training and has no split {split!r}; evaluate on {', '.join(EVALUATION_SETS)} or on "
                "data of your own."
            )
    others = [name for name in names if name not in EVALUATION_SETS]
    if 0 < len(others) < len(names):
        evaluation = ", ".join(name for name in names if name in EVALUATION_SETS)
        raise ValueError(f"{evaluation} cannot be mixed with {', '.join(others)}: it is for evaluation. Load it alone.")
    if columns is not None:
        if unknown := set(columns) - {"prompt", "solution"}:
            raise ValueError(
                f"columns has the keys {sorted(unknown)}; it maps 'prompt' and 'solution' to your names for them."
            )
        if all(name in known for name in names):
            raise ValueError(f"columns is for your own data; {', '.join(names)} has its own columns. Leave it out.")
    if config is not None and (len(names) > 1 or names[0] in GENERATED_SETS):
        raise ValueError(f"config={config!r} needs a single data set from the hub or a copy, not {'+'.join(names)}.")


def _load(
    name: str,
    location: str | None,
    split: str,
    instruction: str | None,
    columns: dict[str, str],
    config: str | None,
) -> Dataset:
    named = NAMED_SETS.get(name)
    if named is None:
        place = location or name
        rows = _choose_split(name, read(name, place, config, named=False), split)
        converted = convert_own(name, rows, columns, instruction)
    else:
        place = location or named.hub_id
        splits = read(name, place, config)
        rows = next(iter(splits.values())) if len(splits) == 1 else _choose_split(name, splits, named.split)
        converted = named.convert(name, rows, instruction)
    if len(converted) == 0:
        raise ValueError(f"{name}: no problem is left of the {len(rows):,} rows in {place}; is it the right data?")
    return converted


def _choose_split(name: str, splits: dict[str, Dataset], split: str) -> Dataset:
    if split not in splits:
        raise ValueError(f"{name}: there is no split {split!r}; the splits are {', '.join(map(repr, splits))}.")
    return splits[split]


def _generate(name: str, split: str, size: int | None, seed: int) -> Dataset:
    module = importlib.import_module(GENERATED_SETS[name])  # only when asked for: it may bring a model's libraries
    made = module.make_dataset(split, GENERATED_SIZES.get(split, 1) if size is None else size, seed)
    report(f"{name}: {len(made):,} problems made")
    columns = {"prompt": made["prompt"][:], "solution": made["solution"][:], "source": [name] * len(made)}
    return Dataset.from_dict(columns, features=FEATURES)
