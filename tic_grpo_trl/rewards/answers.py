r"""Find the final answer in a completion, and reward giving one.

Two forms count: LaTeX's `\boxed{24}`, which most models write, and a line `Answer: 24`, which DAPO's prompt asks for.
The whole answer is taken: `Answer: 24 or 25` means "24 or 25", never 24.
"""

import re
from typing import Any


TAIL = 4096  # characters searched at the end of the text, where a short answer stands
BOX = r"\boxed{"

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# Allowed between boxes that form one answer, as in `\boxed{2} and \boxed{3}`
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;]|\\[()\[\],;]|and|or)*")
_ANSWER_LINE = re.compile(r"^[ \t*_#>]*(?:final[ \t]+)?answer[ \t*_]*:[ \t*_]*(.*)$", re.IGNORECASE | re.MULTILINE)
_ANSWER_IS = re.compile(r"\banswer\s+is\b\s*:?", re.IGNORECASE)
_MATH_DELIMITER = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
_AFTER_THE_BOX = re.compile(r"(?:[\s$.*]|\\[)\]])*$")


def completion_text(completion: Any) -> str:
    """Return the last message's text, or an empty string if the model did not write that message (a tool's result)."""
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {}
    if last.get("role", "assistant") != "assistant":
        return ""
    content = last.get("content") or ""  # a string, or a list of parts
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text")


def final_part(text: str) -> str:
    """Return the last `TAIL` characters after `</think>`, or an empty string if a `<think>` is still open."""
    visible = text.rpartition("</think>")[2]
    return "" if "<think>" in visible else visible[-TAIL:]


def final_answer(text: str) -> str:
    r"""Return the answer in the [`final_part`] of a completion, as LaTeX or plain text.

    The last `\boxed{}` (with the boxes right before it) or line "Answer:" counts, otherwise what follows "answer is" in
    the last line. The answer is empty if there is none, or if the text ends inside its last box.
    """
    text = final_part(text)
    box = text.rfind(BOX)
    line = max(_ANSWER_LINE.finditer(text), key=re.Match.start, default=None)
    if box >= 0 and (line is None or box > line.start()):
        return _boxed(text, box)
    if line is not None:
        return _clean(line[1] or text[line.end() :].strip().partition("\n")[0])
    _, *after = _ANSWER_IS.split(_last_line(text))
    return _clean(after[-1]) if after else ""


def gold_answer(solution: Any) -> str:
    r"""Return the correct answer in a `solution` column: the content of its last `\boxed{}`, or else all of it."""
    text = "" if solution is None else str(solution)
    if text.lstrip().startswith('{"'):  # a programming problem
        return ""
    box = text.rfind(BOX)
    return _boxed(text, box) if box >= 0 else _clean(text)


def answer_format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    r"""Reward completions that end in an answer, correct or not, in TRL's reward-function signature.

    Args:
        completions: (B,) strings or lists of messages.

    Returns:
        (B,) rewards: 1.0 if the last non-empty line reads "Answer: …" or the text ends in a closed `\boxed{…}` (only
        `$`, `\)`, `\]`, `*` and full stops may follow), and the answer is not empty. 0.0 otherwise.
    """
    return [float(_ends_in_answer(final_part(completion_text(completion)))) for completion in completions]


def _ends_in_answer(text: str) -> bool:
    if _ANSWER_LINE.fullmatch(_last_line(text)):
        return bool(final_answer(text))
    box = text.rfind(BOX)
    end = _closing_brace(text, box + len(BOX)) if box >= 0 else None
    return end is not None and bool(_boxed(text, box)) and _AFTER_THE_BOX.match(text, end + 1) is not None


def _closing_brace(text: str, start: int) -> int | None:
    r"""Return the position of the brace that closes the group opened right before `start`. Skip `\{` and `\}`."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def _boxed(text: str, box: int) -> str:
    """Return the contents of the box at `box` and of those right before it, without duplicates, joined by commas."""
    found: list[str] = []
    following = None  # where the box after this one starts
    while box >= 0:
        start = box + len(BOX)
        end = _closing_brace(text[:following], start)
        if end is None or (following is not None and not _BETWEEN_BOXES.fullmatch(text, end + 1, following)):
            break
        found.insert(0, _clean(text[start:end]))
        following, box = box, text.rfind(BOX, 0, box)
    return ",".join(dict.fromkeys(found))


def _clean(text: str) -> str:
    text = _MATH_DELIMITER.sub("", text).strip().rstrip(".").strip("`")
    return text.removeprefix("**").removesuffix("**").rstrip(".").strip()


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
