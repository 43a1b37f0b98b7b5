"""Instructions around a problem, and the normalization of answers."""

import math
import re


# The instruction in DAPO-Math-17k (https://huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k), with which the
# papers trained
MATH_INSTRUCTION = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
CODE_INSTRUCTION = (
    "Solve the following programming problem. Write your solution as one Python program in a single ```python block."
    "\n\n{problem}"
)
DEFAULT = "default"

_BEFORE, _AFTER = MATH_INSTRUCTION.split("{problem}")
_INTEGER = re.compile(r"([+-]?)0*([0-9]+)")


def choose_instruction(instruction: str | None, default: str) -> str:
    """Return the template for problems: `default` for `"default"`, the bare `{problem}` for `None` or `""`."""
    if instruction == DEFAULT:
        return default
    if not instruction:
        return "{problem}"
    if "{problem}" not in instruction:
        raise ValueError(
            f"instruction has no placeholder {{problem}}: {instruction!r}. Add it, or pass None for the bare "
            "problem or 'default' for the papers' instruction."
        )
    return instruction


def user_message(problem: str, template: str) -> list[dict[str, str]]:
    """Return one user message: `template` with the problem filled in. Other braces, such as LaTeX's, stay."""
    return [{"role": "user", "content": template.replace("{problem}", problem)}]


def strip_math_instruction(text: str) -> str:
    """Remove `MATH_INSTRUCTION` from a prompt, and surrounding whitespace from any prompt."""
    return text.strip().removeprefix(_BEFORE).removesuffix(_AFTER).strip()


def has_math_instruction(text: str) -> bool:
    """Return whether a prompt contains `MATH_INSTRUCTION` word for word."""
    return text.strip().startswith(_BEFORE) and text.strip().endswith(_AFTER)


def normalize_answer(answer: str | int | float) -> str:
    r"""Return an answer as a string, with integers in one form: `"033"` and `33.0` give `"33"`, `"-007"` gives `"-7"`.

    Only integers change: `"0.5"`, `"\frac{1}{2}"` and `"3,140"` (which may be a pair) stay as they are, except for
    surrounding whitespace. Other types are a `TypeError`, empty or non-finite answers a `ValueError`.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise TypeError(f"an answer must be a string or a number, not {type(answer).__name__}: {str(answer)[:80]!r}")
    if isinstance(answer, float):
        if not math.isfinite(answer):
            raise ValueError(f"an answer must be finite, not {answer}")
        answer = int(answer) if answer.is_integer() else repr(answer)
    text = str(answer).strip()
    if not text:
        raise ValueError("the answer is empty")
    if match := _INTEGER.fullmatch(text):
        sign, digits = match.groups()
        return digits if sign != "-" or digits == "0" else f"-{digits}"
    return text
