"""Few-shot sums: correct prompts and worked examples, and no held-out problem among the training problems."""

import re

import pytest

from tic_grpo_trl.starter import exact_match_reward, few_shot_sums
from tic_grpo_trl.starter.task import split_of


def numbers(question: str) -> tuple[int, ...]:
    return tuple(map(int, re.fullmatch(r"What is (\d(?: \+ \d)+)\?", question)[1].split(" + ")))


@pytest.mark.parametrize("split", ["train", "test"])
def test_examples_are_right(split):
    examples = few_shot_sums.make_dataset(split, 300, seed=1)
    assert examples.column_names == ["prompt", "solution"]
    assert len(examples) == 300
    for example in examples:
        roles = [message["role"] for message in example["prompt"]]
        assert roles == ["user", "assistant"] * few_shot_sums.NUM_EXAMPLES + ["user"]
        *shown, asked = [numbers(message["content"]) for message in example["prompt"][::2]]
        assert example["solution"] == str(sum(asked))
        assert split_of(asked) == split
        assert len({asked, *shown}) == 1 + len(shown)  # neither the asked sum nor an example twice
        assert all(split_of(terms) == "train" for terms in shown)  # no held-out problem is shown
        answers = [message["content"] for message in example["prompt"][1::2]]
        assert exact_match_reward(answers, [str(sum(terms)) for terms in shown]) == [1.0] * len(shown)
        for line in "\n".join(answers).splitlines():
            assert re.fullmatch(r"\\boxed\{\d+\}|\d+ \+ \d = \d+", line)
            if "=" in line:
                left, right = line.split(" = ")
                assert sum(map(int, left.split(" + "))) == int(right)
    assert examples.to_list() == few_shot_sums.make_dataset(split, 300, seed=1).to_list()
    assert examples.to_list() != few_shot_sums.make_dataset(split, 300, seed=2).to_list()


def test_a_worked_answer():
    assert few_shot_sums.question((4, 7, 3)) == {"role": "user", "content": "What is 4 + 7 + 3?"}
    assert few_shot_sums.worked_answer((4, 7, 3)) == {
        "role": "assistant",
        "content": "4 + 7 = 11\n11 + 3 = 14\n\\boxed{14}",
    }


@pytest.mark.parametrize(
    ("split", "size", "says"),
    [("validation", 10, "split is 'validation'; pass one of 'train', 'test'"), ("train", 0, "size is 0; pass a pos")],
)
def test_wrong_arguments(split, size, says):
    with pytest.raises(ValueError, match=says):
        few_shot_sums.make_dataset(split, size)
