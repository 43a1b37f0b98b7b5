"""planning.py: every response in one pass, in the fewest passes that are no larger than TRL's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from searching import searched

from tic_grpo_trl.forward.packing import SharedPrompts, first_fit
from tic_grpo_trl.forward.planning import ResponseLengths


def plan_passes(lengths: list[int], rows_per_pass: int, packs: bool) -> list[list[int]]:
    """Of responses that share nothing."""
    planned = ResponseLengths(lengths, SharedPrompts.none(len(lengths)))
    return planned.plan(range(len(lengths)), rows_per_pass, packs)


def test_passes_by_hand():
    lengths = [10, 1, 1, 1, 1, 1, 1, 1]
    assert plan_passes(lengths, 2, packs=False) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert plan_passes(lengths, 2, packs=True) == [list(range(8))]  # two rows of 10: [10], [7·1]
    assert plan_passes([2, 9, 5, 4], 1, packs=True) == [[1], [2, 3], [0]]
    for packs in (False, True):  # nothing fits beside a response of full length
        assert plan_passes([7] * 8, 4, packs) == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert plan_passes([], 4, packs) == []
        # five rows are shared out evenly
        assert sorted(map(len, plan_passes([7] * 5, 4, packs))) == [2, 3]


@searched(150)
@given(st.lists(st.integers(1, 30), max_size=16), st.integers(1, 6), st.booleans())
def test_a_plan_holds_every_row_once_in_no_more_and_no_larger_passes_than_trls(lengths, rows, packs):
    plan = plan_passes(lengths, rows, packs)
    assert sorted(i for of_pass in plan for i in of_pass) == list(range(len(lengths)))
    assert all(plan)
    assert len(plan) <= -(-len(lengths) // rows)
    laid_out = [1] * len(lengths) if not packs else first_fit(lengths, max(lengths, default=0))
    assert len(plan) == -(-len(laid_out) // rows)  # the fewest
    for of_pass in plan:
        of_lengths = [lengths[i] for i in of_pass]
        assert sum(of_lengths) <= rows * max(lengths)
        if packs:  # which fit in so many rows, laid out anew
            assert len(first_fit(of_lengths, max(lengths))) <= rows
        else:
            assert len(of_pass) <= rows
    if not packs and plan:
        assert max(map(len, plan)) - min(map(len, plan)) <= 1
        assert [lengths[i] for of_pass in plan for i in of_pass] == sorted(lengths, reverse=True)


# Shared prompts


@pytest.mark.parametrize(
    ("rows", "plan"),
    [
        (1, [[0, 1], [2, 3], [4], [5]]),  # 10 tokens: 6 + 2 + 2, and 7 + 3
        (2, [[0, 1, 2, 3], [4, 5]]),  # 20 tokens: 14 and 13
        (3, [[0, 1, 2, 3, 4, 5]]),  # 30 tokens
    ],
)
def test_shared_passes_by_hand(rows, plan):
    """Four responses of 6 + 2 tokens, and two of 7 + 3, of which the first 6 and 7 are shared."""
    planned = ResponseLengths([8, 8, 8, 8, 10, 10], SharedPrompts([1, 1, 1, 1, 0, 0], [6, 6, 6, 6, 7, 7]))
    assert [planned.cost(range(n)) for n in range(1, 7)] == [8, 10, 12, 14, 24, 27]
    assert planned.plan(range(6), rows, packs=True) == plan


def test_a_group_is_split_to_save_a_pass():
    """Three groups of 14 tokens into passes of 24: two together don't fit, but one and a half do."""
    planned = ResponseLengths([8] * 12, SharedPrompts([0] * 4 + [1] * 4 + [2] * 4, [6] * 12))
    assert planned.plan(range(12), 3, packs=True) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


@st.composite
def shared(draw):
    """Lengths of responses, with prompts that some of them have in common."""
    prompts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=16))
    tokens = {prompt: draw(st.integers(0, 20)) for prompt in sorted(set(prompts))}
    lengths = [tokens[prompt] + draw(st.integers(1, 20)) for prompt in prompts]
    return ResponseLengths(lengths, SharedPrompts(prompts, [tokens[prompt] for prompt in prompts]))


@searched(200)
@given(shared(), st.integers(1, 6))
def test_a_shared_plan_counts_every_prompt_once_a_pass_and_splits_a_group_only_to_save_one(lengths, rows):
    members = list(range(len(lengths.tokens)))
    plan = lengths.plan(members, rows, packs=True)
    assert sorted(i for of_pass in plan for i in of_pass) == members
    assert all(plan)
    limit = rows * max(lengths.tokens)
    for of_pass in plan:
        prompts = {lengths.sharing.prompts[i] for i in of_pass}
        first = [next(i for i in of_pass if lengths.sharing.prompts[i] == prompt) for prompt in prompts]
        unique = sum(lengths.tokens[i] - (lengths.sharing.tokens[i] if i not in first else 0) for i in of_pass)
        assert lengths.cost(of_pass) == unique <= limit
    assert len(plan) <= len(plan_passes(lengths.tokens, rows, packs=True))
    groups = [[i for i in members if lengths.sharing.prompts[i] == p] for p in set(lengths.sharing.prompts)]
    whole = [lengths.cost(group) for group in groups]
    if any(lengths.sharing.tokens) and max(whole) <= limit and len(first_fit(whole, limit)) <= len(plan):
        assert all(any(set(group) <= set(of_pass) for of_pass in plan) for group in groups)


def test_only_some_of_the_responses_are_planned():
    lengths = ResponseLengths([9, 9, 9, 9], SharedPrompts([0, 0, 1, 1], [7, 7, 7, 7]))
    assert lengths.plan([1, 2, 3], 3, packs=True) == [[1, 2, 3]]


def test_lengths_of_a_padded_batch():
    ids = torch.tensor([[0, 4, 5, 1, 2], [0, 4, 5, 3, 0], [6, 4, 5, 1, 0], [0, 4, 5, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    lengths = ResponseLengths.of(ids, mask, 2, shares=True)
    assert lengths.tokens == [4, 3, 4, 0]
    assert lengths.sharing.tokens == [1, 1, 0, 0]  # 4 of [4, 5]; no other has [6, 4, 5]
    assert lengths.sharing.prompts[0] == lengths.sharing.prompts[1] != lengths.sharing.prompts[2]
    assert not any(ResponseLengths.of(ids, mask, 2, shares=False).sharing.tokens)


def test_padding_of_a_prompt_is_no_part_of_it():
    """Its mask is 0, whatever the ids there are."""
    ids, mask = torch.tensor([[7, 4, 5, 1], [8, 4, 5, 1]]), torch.tensor([[0, 1, 1, 1]] * 2)
    assert SharedPrompts.of(ids, mask, 1).tokens == [1, 1]
    assert SharedPrompts.of(ids, torch.ones_like(mask), 1).tokens == [0, 0]
