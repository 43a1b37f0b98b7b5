"""The user's own data: any columns, plain or conversational prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Value, concatenate_datasets

from ..validation.suggestions import did_you_mean
from .examples import checked_answer, log_once, make_examples
from .names import parse, split_names
from .sources import read
from .text import MATH_INSTRUCTION, choose_instruction, user_message


USUAL = {"prompt": ("question", "problem"), "solution": ("answer",)}  # what others call these columns


class UserData:
    """Own data as TRL's scripts take it: every column stays as it is, and so do prompts, strings or messages.

    Args:
        name: what errors call it.
        parts: the splits of each part, which are joined in order.
    """

    def __init__(self, name: str, parts: dict[str, dict[str, Any]]):
        self.name, self._parts = name, parts

    @classmethod
    def read(cls, name: str, config: str | None = None, streaming: bool = False) -> "UserData":
        """Read a file, folder or hub id, or several joined by `+`.

        Args:
            name: the location, or several joined by `+`.
            config: configuration of a hub data set or folder.
            streaming: read the examples one by one, as `datasets.IterableDataset`.

        Raises:
            ValueError: if a file cannot be read.
            FileNotFoundError: if a path or hub data set does not exist.
            ConnectionError: if the hub cannot be reached.
        """
        locations = [part for part, _ in map(parse, split_names(name))]
        return cls(name, {part: read(part, part, config, False, streaming) for part in locations})

    @property
    def splits(self) -> list[str]:
        """Return the names of the splits that all parts have."""
        first, *others = self._parts.values()
        return [split for split in first if all(split in other for other in others)]

    def examples(self, split: str | None, columns: dict[str, str] | None = None, instruction: str | None = None) -> Any:
        """Return the examples of a split, a `Dataset` or `IterableDataset` with a column `prompt`.

        Args:
            split: name of the split. `None` selects `test`, or the only one.
            columns: new names of columns, as `{"prompt": "question"}`. All others keep theirs.
            instruction: template with `{problem}` in it. It turns string prompts into a user message with the
                instruction; `None` leaves them as they are.

        Raises:
            ValueError: if there is no such split, no column `prompt`, or no example.
        """
        wanted = split or ("test" if "test" in self.splits or len(self.splits) != 1 else self.splits[0])
        loaded = [
            self._prepare(part, pick_split(part, splits, wanted), columns or {}, instruction)
            for part, splits in self._parts.items()
        ]
        return join(self.name, loaded)

    def _prepare(self, part: str, examples: Any, columns: dict[str, str], instruction: str | None) -> Any:
        first = next(iter(examples), None)
        if first is None:
            raise ValueError(f"{part}: the data has no examples.")
        examples = rename(part, examples, columns)
        require_columns(part, column_names(examples), "prompt")
        size = f"{len(examples):,} examples" if isinstance(examples, Dataset) else "a stream of examples"
        log_once(f"{part}: {size} with the columns {', '.join(column_names(examples))}")
        if not isinstance(first[columns.get("prompt", "prompt")], str):
            return examples
        if instruction is None:
            log_once(
                f"{part}: prompts and responses are strings, without a chat template. For a chat model, add "
                "--instruction '{problem}', or write the prompts as messages."
            )
            return examples
        template = choose_instruction(instruction, MATH_INSTRUCTION)
        if not isinstance(examples, Dataset):
            return examples.map(lambda example: {"prompt": _with_instruction(example["prompt"], template)})
        prompts = [_with_instruction(prompt, template) for prompt in examples["prompt"]]
        return _beside(Dataset.from_dict({"prompt": prompts}), examples)


def _with_instruction(prompt: Any, template: str) -> Any:
    return user_message(prompt.strip(), template) if isinstance(prompt, str) else prompt


def _beside(made: Dataset, examples: Dataset) -> Dataset:
    """Return the columns of `made`, and beside them the other columns of `examples`."""
    others = [column for column in examples.column_names if column not in made.column_names]
    return concatenate_datasets([made, examples.select_columns(others)], axis=1) if others else made


def column_names(examples: Any) -> list[str]:
    """Return the columns of a data set; a stream that does not know them is asked for its first example."""
    return examples.column_names or list(next(iter(examples), {}))


def pick_split(name: str, splits: Mapping[str, Any], split: str) -> Any:
    """Return a split, or raise an error that lists those there are."""
    if split not in splits:
        raise ValueError(f"{name}: there is no split {split!r}; the splits are {', '.join(map(repr, splits))}.")
    return splits[split]


def parse_columns(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """Return the new names of `--dataset_columns`, as `{"prompt": "question"}` for `prompt=question`."""
    columns = {}
    for pair in pairs or []:
        ours, _, theirs = pair.partition("=")
        if not (ours and theirs):
            raise ValueError(f"--dataset_columns {pair}: give NEW=OLD, such as prompt=question.")
        columns[ours] = theirs
    return columns or None


def rename(name: str, examples: Any, columns: dict[str, str]) -> Any:
    """Rename columns, as `{"prompt": "question"}`. A column that already has a new name makes way for it."""
    names = column_names(examples)
    for ours, theirs in columns.items():
        if theirs not in names:
            hint = f" The new name comes first: {theirs}={ours}." if ours in names else did_you_mean(theirs, names)
            raise ValueError(
                f"{name}: there is no column {theirs!r} to rename to {ours!r}; the columns are {_listed(names)}.{hint}"
            )
    replaced = [ours for ours in columns if ours in names and ours not in columns.values()]
    if replaced:
        log_once(f"{name}: the columns renamed to {', '.join(replaced)} replace those of the same name")
    changed = {theirs: ours for ours, theirs in columns.items() if theirs != ours}
    return examples.remove_columns(replaced).rename_columns(changed)


def require_columns(name: str, names: Sequence[str], *wanted: str) -> None:
    """Raise an error that lists the columns, and says how to rename one, if a wanted column is missing."""
    for column in wanted:
        if column not in names:
            usual = [known for known in USUAL.get(column, ()) if known in names]
            example = [*usual, *names, "..."][0]
            raise ValueError(
                f"{name}: there is no column {column!r}; the columns are {_listed(names)}. Name it with "
                f"--dataset_columns {column}={example}, or in Python columns={{{column!r}: {example!r}}}."
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def join(name: str, parts: list[Any]) -> Any:
    """Join data sets in order. Where one has a column that others lack, theirs is `None`."""
    if len(parts) == 1:
        return parts[0]
    try:
        return concatenate_datasets([_with_short_strings(part) for part in parts])
    except ValueError as error:
        raise ValueError(
            f"{name}: the parts cannot be joined ({error}): columns of the same name must have the same type."
        ) from error


def _with_short_strings(examples: Any) -> Any:
    """Cast the long strings of csv files, since other files have Arrow's usual ones."""
    for column, feature in (examples.features or {}).items():
        if feature == Value("large_string"):
            examples = examples.cast_column(column, Value("string"))
    return examples


def convert_user_data(name: str, examples: Dataset, instruction: str | None, columns: dict[str, str]) -> Dataset:
    """Convert own data to problems, keeping every example in order, with the instruction around string prompts."""
    examples = rename(name, examples, columns)
    require_columns(name, examples.column_names, "prompt", "solution")
    template = choose_instruction(instruction, MATH_INSTRUCTION)
    prompts = [_messages(name, value, template, f"example {i}") for i, value in enumerate(examples["prompt"])]
    solutions = [checked_answer(name, value, f"example {i}") for i, value in enumerate(examples["solution"])]
    log_once(f"{name}: {len(examples):,} examples read, all kept")
    return _beside(make_examples(name, prompts, solutions), examples)


def _messages(name: str, prompt: Any, template: str, where: str) -> list[dict[str, str]]:
    if isinstance(prompt, str) and prompt.strip():
        return user_message(prompt.strip(), template)
    try:
        messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    except (TypeError, AttributeError):
        messages = []
    if not messages or any(
        set(message) != {"role", "content"} or not isinstance(message["content"], str) for message in messages
    ):
        raise ValueError(
            f"{name}: {where} has no usable prompt ({str(prompt)[:80]!r}); a prompt must be a string or a list of "
            "messages with a role and a string content. Correct or remove it, or choose another column with columns."
        )
    return messages
