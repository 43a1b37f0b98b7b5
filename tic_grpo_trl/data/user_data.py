"""Convert the user's own data: any column names, plain or conversational prompts."""

from typing import Any

from datasets import Dataset

from .examples import checked_answer, log_once, make_examples
from .text import MATH_INSTRUCTION, choose_instruction, user_message


def convert_user_data(name: str, examples: Dataset, instruction: str | None, columns: dict[str, str]) -> Dataset:
    """Convert the user's own data, keeping every example in order, with the instruction around plain prompts."""
    prompt, solution = (columns.get(key, key) for key in ("prompt", "solution"))
    for key, column in (("prompt", prompt), ("solution", solution)):
        if column not in examples.column_names:
            raise ValueError(
                f"{name}: there is no column {column!r}; the columns are {', '.join(map(repr, examples.column_names))}."
                f" Name the {key} column, such as columns={{{key!r}: {(examples.column_names or ['...'])[0]!r}}}."
            )
    template = choose_instruction(instruction, MATH_INSTRUCTION)
    prompts = [_messages(name, value, template, f"example {i}") for i, value in enumerate(examples[prompt])]
    solutions = [checked_answer(name, value, f"example {i}") for i, value in enumerate(examples[solution])]
    log_once(f"{name}: {len(examples):,} examples read, all kept")
    return make_examples(name, prompts, solutions)


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
