r"""Check how answers are found in completions, and the format reward."""

import time

import pytest

from tic_grpo_trl.rewards import answer_format_reward
from tic_grpo_trl.rewards.answers import TAIL, completion_text, final_answer, gold_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So it is \boxed{24}.", "24"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"$\boxed{\{1, 2\}}$", r"\{1, 2\}"),
        (r"\boxed{\boxed{24}}", "24"),
        ("Reasoning.\nAnswer: 24", "24"),
        ("**Answer:** $24$.", "24"),
        ("### Final answer: **24**", "24"),
        ("Answer:\n24\n", "24"),
        ("answer: \\(x = 24\\)", "x = 24"),
        ("Answer: 24.\nThat was all.", "24"),
        ("The final answer is 24.", "24"),
        ("The answer is: $0.5$", "0.5"),
        (r"Answer: \$18.90", r"\$18.90"),
        # what comes last counts
        (r"First \boxed{5}, so \boxed{24}", "24"),
        ("With \\boxed{5} apples:\nAnswer: 24", "24"),
        ("Answer: 5\nNo: \\boxed{24}", "24"),
        ("Answer: 5\nAnswer: 24", "24"),
        ("<think>\\boxed{5}</think> It is \\boxed{24}", "24"),
        # several together form one answer
        (r"\boxed{24} \boxed{25}", "24,25"),
        (r"$\boxed{24}$ and $\boxed{25}$", "24,25"),
        (r"\boxed{24}" + "\n" + r"\boxed{24}", "24"),
        ("Answer: 24 or 25", "24 or 25"),
        ("Answer: $24$, maybe $25$", "24, maybe 25"),
        ("The answer is 24 or 25.", "24 or 25"),
        # no answer
        ("", ""),
        ("It may be 24.", ""),
        (r"\boxed{5} and then \boxed{2", ""),
        (r"</think>", ""),
        (r"<think> \boxed{24} and", ""),
        (r"<think>a</think> <think> \boxed{24}", ""),
        (r"I am thinking, \boxed{24}</think> about it", ""),
        ("The answer is 24.\nOr is it?", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_only_the_tail_is_looked_at():
    filler = "word " * (TAIL // 5)
    assert final_answer(r"\boxed{24} " + filler[: TAIL - 11]) == "24"
    assert final_answer(r"\boxed{24} " + filler) == ""
    assert final_answer(filler * 20 + r"\boxed{24}") == "24"


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\n", " ", "*", "Answer:", "Answer: \\boxed{2} ", "\\boxed{1} ", "{", "answer is "]
)
def test_no_text_takes_long(piece):
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    final_answer(text)
    answer_format_reward([text])
    assert time.process_time() - start < 0.1


def test_text_of_a_completion():
    assert completion_text("plain") == "plain"
    assert completion_text([{"content": "alone"}]) == "alone"
    call = {"role": "assistant", "content": None, "tool_calls": [{}]}
    result = {"role": "tool", "content": r"\boxed{24}"}
    assert completion_text([call, result, {"role": "assistant", "content": "last"}]) == "last"
    assert completion_text([call, result]) == ""
    assert completion_text([call]) == ""
    assert completion_text([]) == ""
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "ab"


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("033", "033"),
        (33, "33"),
        (r"$\frac{1}{2}$", r"\frac{1}{2}"),
        (r"We get 12 so \boxed{24}.", "24"),
        (None, ""),
        (" ", ""),
        ('{"tests": [], "function": null}', ""),
    ],
)
def test_gold_answer(solution, gold):
    assert gold_answer(solution) == gold


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Reasoning.\nAnswer: 24", 1.0),
        ("Reasoning.\n**Answer:** $24$\n\n", 1.0),
        (r"So it is \boxed{24}.", 1.0),
        ("So\n\\[\n\\boxed{24}\n\\]\n", 1.0),
        ("<think>a</think>\n$\\boxed{24}$", 1.0),
        ("Answer: 24\nThat was all.", 0.0),
        (r"\boxed{24} it is", 0.0),
        (r"\boxed{24", 0.0),
        (r"\boxed{}", 0.0),
        ("Answer:", 0.0),
        ("The answer is 24.", 0.0),
        (r"<think> \boxed{24}", 0.0),
        ("", 0.0),
    ],
)
def test_answer_format(text, reward):
    assert answer_format_reward(prompts=["?"], completions=[[{"role": "assistant", "content": text}]]) == [reward]
