"""Compare answers with math-verify: read one line of JSON, write one letter.

`math_pool` runs this file as a script, so the process loads sympy but not torch, and kills it when a comparison takes
too long. math-verify's own timeouts are off: a signal handler cannot interrupt arithmetic on long integers.
"""

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache


READY, RIGHT, WRONG, NO_GOLD, FAILED = "+10g!"


def make_compare() -> Callable[[str, str | None], str]:
    """Return a function of (solution, answer) that returns `RIGHT`, `WRONG`, or `NO_GOLD` for an unusable solution."""
    import logging

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    rules = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    boxes = LatexExtractionConfig(boxed_match_priority=0, normalization_config=rules, try_extract_without_anchor=False)

    def parse_all(text: str) -> list:
        # In a box the whole text is one expression. In plain text math-verify would look for any number.
        return parse(rf"\boxed{{{text}}}", [boxes], extraction_mode="first_match", parsing_timeout=None)

    @lru_cache(maxsize=1024)
    def parse_gold(text: str) -> list:
        found = parse_all(text)
        return [] if not found or isinstance(found[0], str) else found  # a string is what could not be parsed

    def compare(gold: str, answer: str | None) -> str:
        expected = parse_gold(gold)
        if not expected:
            return NO_GOLD
        # the solution goes first: verify is not symmetric
        right = answer is None or verify(expected, parse_all(answer), timeout_seconds=None)
        return RIGHT if right else WRONG

    return compare


def main(memory: int, seconds: int):
    """Serve comparisons in `memory` bytes of address space until the other end closes the connection."""
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # keep what libraries print out of the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        compare = make_compare()
        compare("1", "1")  # load what the first comparison would load
    except Exception:
        os.write(replies, (FAILED + traceback.format_exc()).encode())
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    os.write(replies, READY.encode())
    for line in sys.stdin.buffer:
        signal.alarm(seconds)  # ends this process, even if no parent is left to kill it
        try:
            reply = compare(*json.loads(line))
        except Exception:
            reply = FAILED
        signal.alarm(0)
        os.write(replies, reply.encode())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
