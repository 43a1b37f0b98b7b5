"""The starter's task with a long tail: its problems, the distribution of their lengths and its model."""

import math
import random
from collections import Counter
from itertools import product
from statistics import mean, median

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tic_grpo_trl.data import load_problems
from tic_grpo_trl.starter import TASKS, long_tail
from tic_grpo_trl.starter.task import split_of


TASK = TASKS["long_tail"]


def problems(split, size, seed=0):
    examples = TASK.make_dataset(split, size, seed)
    assert examples.column_names == ["prompt", "solution"]
    found = []
    for (message,), solution in zip(examples["prompt"], examples["solution"], strict=True):
        assert message["role"] == "user"
        assert message["content"].endswith("=?")
        found.append(tuple(map(int, message["content"].removesuffix("=?").split("+"))))
        assert solution == str(sum(found[-1]))
    return found


@pytest.mark.parametrize("split", ["train", "test"])
def test_problems_are_right_seeded_and_of_their_split(split):
    found = problems(split, 500)
    assert all(split_of(terms) == split for terms in found)
    assert all(2 <= len(terms) <= 40 and set(terms) <= {*range(10)} for terms in found)
    assert found == problems(split, 500)
    assert found != problems(split, 500, seed=1)


def test_held_out_problems_are_distinct_and_the_next_longer_ones_replace_those_that_run_out():
    expected = Counter(long_tail.sample_num_terms(rng) for rng in [random.Random(0)] for _ in range(1000))
    found = problems("test", 1000)
    assert len(set(found)) == 1000
    counts = Counter(map(len, found))
    assert counts[2] == sum(split_of(terms) == "test" for terms in product(range(10), repeat=2)) == 10
    assert counts[3] == sum(split_of(terms) == "test" for terms in product(range(10), repeat=3)) == 109
    assert counts[2] + counts[3] + counts[4] == expected[2] + expected[3] + expected[4]
    assert all(counts[n] == expected[n] for n in range(5, 41))
    lengths = [len(terms) for terms in problems("test", 200)]
    assert lengths != sorted(lengths)  # in random order, so that a few of them are a sample
    many = Counter(map(len, problems("test", 5000)))
    assert many[4] > 1000  # all there are, and more with five terms
    assert long_tail.count_problems("test", 5) == 5000


def test_number_of_terms_is_log_normal():
    """Against the exact distribution: a rounded log-normal variable, given that it lies from 2 to 40."""

    def below(x):  # of median 4 and log-spread 0.8
        return (1 + math.erf(math.log(x / 4) / (0.8 * math.sqrt(2)))) / 2

    rng = random.Random(0)
    drawn = [long_tail.sample_num_terms(rng) for _ in range(40_000)]
    inside = below(40.5) - below(1.5)
    for low, high in ((2, 2), (3, 3), (4, 5), (6, 9), (10, 20), (21, 40)):
        expected = (below(high + 0.5) - below(low - 0.5)) / inside
        share = mean(low <= n <= high for n in drawn)
        assert abs(share - expected) < 5 * math.sqrt(expected / 40_000)
    assert (min(drawn), max(drawn)) == (2, 40)


def test_chains_have_a_long_tail():
    """As the docstring says: 10 to 374 tokens, mean 42, median 28."""

    def tokens(terms):  # of a chain: a token per character, and three for the box, its brace and the end
        total, count = terms[0], 0
        for term in terms[1:]:
            count += len(f"{total}+{term}={total + term}\n")
            total += term
        return count + len(str(total)) + 3

    lengths = [tokens(terms) for terms in problems("train", 8000)]
    assert tokens((1, 2)) == 10
    assert tokens((9,) * 40) == 374
    assert (min(lengths), median(lengths)) == (10, 28)
    assert max(lengths) > 300
    assert 40 < mean(lengths) < 44


@pytest.mark.parametrize(
    ("split", "size", "says"),
    [("validation", 10, "split is 'validation'; pass one of 'train', 'test'"), ("train", 0, "size is 0; pass a pos")],
)
def test_wrong_arguments(split, size, says):
    with pytest.raises(ValueError, match=says):
        TASK.make_dataset(split, size)


def test_named_set():
    assert load_problems("long_tail", "test", size=20)["solution"] == TASK.make_dataset("test", 20)["solution"]


def test_model_has_room_for_forty_terms():
    """The prompt and the longest response fit into the positions of the model."""
    model = AutoModelForCausalLM.from_pretrained(TASK.model, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(TASK.model, local_files_only=True)
    prompt = [{"role": "user", "content": "+".join("9" * 40) + "=?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert len(ids) + TASK.max_completion_length <= model.config.max_position_embeddings
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.num_parameters() == 167_040
