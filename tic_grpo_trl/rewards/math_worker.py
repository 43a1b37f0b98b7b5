"""A process that compares answers with math-verify: a line of JSON in, one letter out.

[`~tic_grpo_trl.rewards.math_pool.MathPool`] runs this file as a script, so that the process holds sympy and nothing of
the training, and kills it where a comparison takes too long: math-verify's own timeouts are off here, because a signal
handler cannot interrupt the arithmetic of long integers.
"""

import json
import os
import resource
import signal
import sys
import traceback
from functools import lru_cache


READY, RIGHT, WRONG, NO_GOLD, FAILED = "+10g!"


def make_judge():
    """A function of (gold, answer) that returns one of the letters above."""
    import logging

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    rules = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    extraction = [
        LatexExtractionConfig(boxed_match_priority=0, normalization_config=rules, try_extract_without_anchor=False)
    ]

    def parsed(text: str) -> list:
        # In a box the whole text is one expression; math-verify would look for a number in plain text.
        return parse(
            rf"\boxed{{{text}}}", extraction_config=extraction, extraction_mode="first_match", parsing_timeout=None
        )

    @lru_cache(maxsize=1024)
    def parsed_gold(text: str) -> list:
        found = parsed(text)
        return [] if not found or isinstance(found[0], str) else found  # a string is what could not be parsed

    def judge(gold: str, answer: str | None) -> str:
        expected = parsed_gold(gold)
        if not expected:
            return NO_GOLD
        # gold first: verify is not symmetric
        right = answer is None or verify(expected, parsed(answer), timeout_seconds=None)
        return RIGHT if right else WRONG

    return judge


def main(memory: int, seconds: int):
    """Serve until the other end closes.

    Args:
        memory: address space of this process in bytes.
        seconds: a comparison that takes longer ends this process, even where no one is left to kill it.
    """
    # What the libraries print must not get between the replies.
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that owns this one
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        judge = make_judge()
        judge("1", "1")  # what the first comparison loads
    except Exception:
        os.write(replies, (FAILED + traceback.format_exc()).encode())
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    os.write(replies, READY.encode())
    for line in sys.stdin.buffer:
        signal.alarm(seconds)
        try:
            reply = judge(*json.loads(line))
        except Exception:
            reply = FAILED
        signal.alarm(0)
        os.write(replies, reply.encode())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
