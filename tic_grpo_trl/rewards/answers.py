r"""The final answer in a text, and a reward for giving one.

Two forms count: LaTeX's `\boxed{24}`, which most models write, and a line `Answer: 24`, which the papers' prompt
(DAPO's) asks for. An answer is taken whole and strictly: `Answer: 24 or 25` is "24 or 25", never 24.
"""

import re
from typing import Any


# Of the text after </think>, the characters at the end that are looked at: an answer is short and stands last
TAIL = 4096
BOX = r"\boxed{"

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# What may stand between boxes that are one answer, as in `\boxed{2} and \boxed{3}`
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;]|\\[()\[\],;]|and|or)*")
_ANSWER_LINE = re.compile(r"^[ \t*_#>]*(?:final[ \t]+)?answer[ \t*_]*:[ \t*_]*(.*)$", re.IGNORECASE | re.MULTILINE)
_ANSWER_IS = re.compile(r"\banswer\s+is\b\s*:?", re.IGNORECASE)
_MATH_DELIMITER = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
_AFTER_THE_BOX = re.compile(r"(?:[\s$.*]|\\[)\]])*$")


def completion_text(completion: Any) -> str:
    """What the model itself said last.

    Args:
        completion: plain text, or a list of messages with `content` as text or as parts of `type` "text".

    Returns:
        The last message's text; empty where that is not the model's own (a tool's result) or holds no text.
    """
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {}
    if last.get("role", "assistant") != "assistant":
        return ""
    content = last.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text")


def final_part(text: str) -> str:
    """The last `TAIL` characters of what follows `</think>`; empty while a `<think>` is still open."""
    spoken = text.rpartition("</think>")[2]
    return "" if "<think>" in spoken else spoken[-TAIL:]


def final_answer(text: str) -> str:
    r"""The answer that a completion commits to, as LaTeX or text.

    Looked at is [`final_part`] alone. What comes last counts: the last `\boxed{}` (together with boxes right before it,
    as in `\boxed{2} and \boxed{3}`, which are a set) or the last line that starts with "Answer:" (the line after it,
    if nothing else is on it). Failing both, what follows "answer is" in the last line.

    Args:
        text: the completion's text.

    Returns:
        The answer without `$`, Markdown emphasis and a full stop at its end; empty where there is none, or where the
        text ends inside its last box.
    """
    text = final_part(text)
    box = text.rfind(BOX)
    line = max(_ANSWER_LINE.finditer(text), key=re.Match.start, default=None)
    if box >= 0 and (line is None or box > line.start()):
        return _boxed(text, box)
    if line is not None:
        return _clean(line[1] or _first_line(text[line.end() :]))
    _, *after = _ANSWER_IS.split(_last_line(text))
    return _clean(after[-1]) if after else ""


def gold_answer(solution: Any) -> str:
    r"""The right answer in a `solution` column: what its last `\boxed{}` holds, or all of it where there is none.

    Empty where there is no mathematical answer: for `None`, and for the JSON that a programming problem has instead.
    """
    text = "" if solution is None else str(solution)
    if text.lstrip().startswith('{"'):
        return ""
    box = text.rfind(BOX)
    return _boxed(text, box) if box >= 0 else _clean(text)


def answer_format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    r"""Rewards a completion that ends in an answer, right or wrong, in TRL's reward-function signature.

    Args:
        completions: completions, length B; plain text or lists of messages.
        **kwargs: the other columns and arguments that TRL passes, unused.

    Returns:
        Rewards, length B: 1.0 where the last line that is not empty reads "Answer: …", or where the text ends in a
        closed `\boxed{…}` (only `$`, `\)`, `\]`, `*` and full stops may follow) and the answer is not empty; 0.0
        otherwise.
    """
    return [float(_ends_in_answer(final_part(completion_text(completion)))) for completion in completions]


def _ends_in_answer(text: str) -> bool:
    line = _ANSWER_LINE.fullmatch(_last_line(text))
    if line is not None:
        return bool(final_answer(text))
    box = text.rfind(BOX)
    end = _closing_brace(text, box + len(BOX)) if box >= 0 else None
    return end is not None and bool(_boxed(text, box)) and _AFTER_THE_BOX.match(text, end + 1) is not None


def _closing_brace(text: str, start: int) -> int | None:
    r"""Where the group that was opened right before `start` ends; `\{` and `\}` are LaTeX's printed braces."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def _boxed(text: str, box: int) -> str:
    """The content of the box at `box` and of those right before it, each once, joined by commas."""
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


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
