"""Data of the user's own: any columns, plain or conversational prompts."""

from typing import Any

from datasets import Dataset

from .named_sets import FEATURES, answer_text, report
from .text import MATH_INSTRUCTION, choose_instruction, user_message


def convert_own(name: str, rows: Dataset, columns: dict[str, str], instruction: str | None) -> Dataset:
    """The output rows of own data, in order.

    Args:
        name: where they come from, which becomes `source`.
        rows: as stored, length N.
        columns: own names of `prompt` and `solution`, where they differ.
        instruction: as in `load_problems`; for prompts that are plain text.

    Returns:
        Rows with `prompt`, `solution`, `source`, length N.

    Raises:
        ValueError: if a column is missing, or a row has no usable prompt or solution.
    """
    prompt, solution = (columns.get(key, key) for key in ("prompt", "solution"))
    for key, column in (("prompt", prompt), ("solution", solution)):
        if column not in rows.column_names:
            raise ValueError(
                f"{name}: there is no column {column!r}; the columns are {', '.join(map(repr, rows.column_names))}. "
                f"Say which one is the {key}, such as columns={{{key!r}: {(rows.column_names or ['...'])[0]!r}}}."
            )
    template = choose_instruction(instruction, MATH_INSTRUCTION)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {
            "prompt": _messages(name, row[prompt], template, f"row {index}"),
            "solution": answer_text(name, row[solution], f"row {index}"),
            "source": name,
        }

    converted = rows.select_columns(list(dict.fromkeys((prompt, solution)))).map(
        convert,
        with_indices=True,
        remove_columns=list(dict.fromkeys((prompt, solution))),
        features=FEATURES,
        load_from_cache_file=False,  # a cache would outlive changes of this code
        desc=name,
    )
    report(f"{name}: {len(rows):,} rows read, all kept")
    return converted


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
            f"{name}: {where} has no usable prompt ({str(prompt)[:80]!r}); a prompt is text or a list of messages, "
            "each with a role and a text as content. Correct or remove it, or name another column with columns."
        )
    return messages
