"""Partition and micro-batches: complete groups, every response once, uniformly random."""

from collections import Counter

import pytest
import torch

from tic_grpo_trl.rollout.micro_batches import active_responses, take_responses
from tic_grpo_trl.rollout.partition import (
    immovable_keys,
    responses_of_process,
    responses_to_prompts,
    shuffle_prompts,
    value_kinds,
)


def rollout():
    return {
        "completion_ids": torch.arange(12).unsqueeze(1) * torch.ones(1, 3, dtype=torch.long),  # (12, 3)
        "advantages": torch.arange(12.0),
        "pixel_values": [torch.full((i + 1, 2), i) for i in range(12)],  # a tensor of its own size per row
        "num_images": list(range(12)),
        "num_items_in_batch": torch.tensor(36),
        "ref_per_token_logps": None,
    }


def test_rows_move_in_unison_and_groups_stay_whole():
    torch.manual_seed(0)
    shuffled = shuffle_prompts(rollout(), num_generations=3)
    order = shuffled["advantages"].long()
    assert sorted(order.tolist()) == list(range(12))
    assert order.tolist() != list(range(12))
    assert torch.equal(order.view(4, 3), order.view(4, 3)[:, :1] + torch.arange(3))
    assert (order.view(4, 3)[:, 0] % 3 == 0).all()
    assert torch.equal(shuffled["completion_ids"][:, 0], order)
    assert shuffled["num_images"] == order.tolist()
    assert [int(pixels[0, 0]) for pixels in shuffled["pixel_values"]] == order.tolist()
    assert shuffled["num_items_in_batch"] == 36
    assert shuffled["ref_per_token_logps"] is None


def test_rows_of_prompts_are_where_the_prompts_are():
    assert responses_to_prompts(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]
    assert responses_to_prompts(torch.arange(2, device="meta"), 3).device.type == "meta"


def test_every_order_of_prompts_is_equally_likely():
    torch.manual_seed(0)
    rows = {"advantages": torch.arange(6)}
    counts = Counter(tuple(shuffle_prompts(rows, 2)["advantages"].tolist()) for _ in range(6000))
    assert len(counts) == 6  # 3! orders of three groups
    assert all(870 < count < 1130 for count in counts.values())  # 1000 ± 4.5 standard deviations


# Groups of a mini-batch that span processes: the communication itself is tested in real processes (test_examples.py).


@pytest.mark.parametrize(
    ("processes", "update_rows", "group", "mini_batches"),
    [
        (2, 2, 4, 2),
        (2, 2, 4, 3),  # the 6 rows of a process are not whole groups
        (4, 3, 6, 5),
        (8, 1, 4, 4),  # two groups a mini-batch, each over four processes
        (2, 6, 4, 3),  # groups inside a process and one across
        (1, 4, 4, 2),
    ],
)
def test_the_shares_of_all_processes_make_mini_batches_of_whole_groups(processes, update_rows, group, mini_batches):
    size = processes * update_rows * mini_batches
    torch.manual_seed(0)
    order = responses_to_prompts(torch.randperm(size // group), group)
    shares = [
        responses_of_process(order, update_rows, r, processes).view(mini_batches, update_rows) for r in range(processes)
    ]
    assert sorted(torch.cat(shares).flatten().tolist()) == list(range(size))  # every row once
    prompts = [Counter((torch.cat([share[k] for share in shares]) // group).tolist()) for k in range(mini_batches)]
    assert all(count == group for of_batch in prompts for count in of_batch.values())
    assert len(set().union(*prompts)) == sum(map(len, prompts)) == size // group


def test_keys_that_cannot_be_exchanged_are_found():
    rows = {
        "prompt_ids": torch.zeros(4, 3, dtype=torch.long),
        "old_per_token_logps": torch.zeros(4, 2),
        "advantages": torch.zeros(4),
        "num_items_in_batch": torch.tensor(8),
        "tags": ["a"] * 4,
        "ref_per_token_logps": None,
    }
    kinds = value_kinds(rows)
    assert immovable_keys([kinds, value_kinds(rows | {"old_per_token_logps": torch.zeros(4, 7)})]) == []
    images = {
        "pixel_values": [torch.zeros(2, 3)] * 4,  # as split_pixel_values_by_grid makes them
        "mm_token_type_ids": torch.zeros(4, 5),  # over prompt and completion
        "image_sizes": torch.zeros(3, 2),
        "num_images": [1, 1, 0, 1],
    }
    assert immovable_keys([value_kinds(rows | images)] * 2) == ["image_sizes", "mm_token_type_ids", "pixel_values"]
    # what one process alone has, or has as another type, would leave the others waiting
    assert immovable_keys([kinds, value_kinds(rows | {"num_images": [1] * 4})]) == ["num_images"]
    assert immovable_keys([value_kinds(rows | {"advantages": torch.zeros(4).double()}), kinds]) == ["advantages"]


def test_kinds_of_values_by_hand():
    """Processes compare these words, so that every difference has to show."""
    rows = {
        "prompt_ids": torch.zeros(4, 3, dtype=torch.long),
        "advantages": torch.zeros(4),
        "pixel_values": torch.zeros(4, 3),
        "tags": ["a"] * 4,
        "num_items_in_batch": torch.tensor(8),
        "temperature": 0.5,
        "ref_per_token_logps": None,
    }
    assert value_kinds(rows) == {
        "prompt_ids": "torch.int64 2",
        "advantages": "torch.float32 1",
        "pixel_values": "",
        "tags": "list",
        "num_items_in_batch": "torch.int64",
        "temperature": "float",
        "ref_per_token_logps": "NoneType",
    }


def padded_rollout():
    """Three responses; no row uses the first prompt column or the last completion column."""
    prompt_mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]])
    completion_mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    per_token = torch.arange(15.0).view(3, 5) + 1
    return {
        "prompt_ids": torch.arange(12).view(3, 4),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.arange(100, 115).view(3, 5),
        "completion_mask": completion_mask,
        "tool_mask": torch.ones(3, 5, dtype=torch.long),
        "advantages": torch.tensor([0.5, -0.5, 1.0]),
        "old_per_token_logps": -per_token,
        "importance_sampling_ratio": torch.tensor([[0.5], [0.6], [0.7]]),
        "tags": ["a", "b", "c"],
        "num_items_in_batch": torch.tensor(7),
        "ref_per_token_logps": None,
    }


def test_taken_rows_keep_their_values_and_lose_unused_columns():
    rollout = padded_rollout()
    taken = take_responses(rollout, [2, 0], blanks=0, trim=True)
    assert taken["prompt_ids"].tolist() == [[10, 11], [2, 3]]  # the last columns: prompts are padded on the left
    assert taken["prompt_mask"].tolist() == [[0, 1], [1, 1]]
    assert taken["completion_ids"].tolist() == [[110, 111], [100, 101]]
    assert taken["completion_mask"].tolist() == [[1, 0], [1, 1]]
    assert taken["tool_mask"].shape == (2, 2)
    assert taken["old_per_token_logps"].tolist() == [[-11.0, -12.0], [-1.0, -2.0]]
    assert taken["advantages"].tolist() == [1.0, 0.5]
    assert taken["tags"] == ["c", "a"]
    assert taken["num_items_in_batch"] == 7
    assert taken["ref_per_token_logps"] is None
    # the rollout that the rows were taken from is left alone
    for name, value in padded_rollout().items():
        assert torch.equal(rollout[name], value) if torch.is_tensor(value) else rollout[name] == value

    whole = take_responses(rollout, [2, 0], blanks=0, trim=False)
    assert whole["prompt_ids"].shape == (2, 4)
    assert whole["completion_ids"].tolist() == [list(range(110, 115)), list(range(100, 105))]


def test_one_value_per_response_is_no_column_to_drop():
    """Also where the completions have been trimmed to fewer columns, or the only response is one token long."""
    for rows in ([0, 1, 2], [2]):
        taken = take_responses(padded_rollout(), rows, blanks=0, trim=True)
        assert torch.equal(taken["importance_sampling_ratio"], padded_rollout()["importance_sampling_ratio"][rows])
        # TRL takes one column of a per-token tensor for one value per response
        assert taken["completion_ids"].size(1) == taken["old_per_token_logps"].size(1) >= 2


@pytest.mark.parametrize("rows", [[], [2]])
@pytest.mark.parametrize("trim", [False, True])
def test_blank_rows_hold_one_token_and_nothing_that_counts(rows, trim):
    rollout = padded_rollout()
    rollout["sampling_per_token_logps"] = torch.full((3, 5), torch.nan)  # what the sampler left out
    taken = take_responses(rollout, rows, blanks=2, trim=trim)
    assert {len(value) for value in taken.values() if isinstance(value, list) or getattr(value, "ndim", 0)} == {
        len(rows) + 2
    }
    blank = slice(len(rows), None)
    assert taken["prompt_mask"][blank].sum(1).tolist() == [1, 1]
    assert taken["prompt_mask"][blank, -1].tolist() == [1, 1]
    for name in ("completion_mask", "tool_mask", "advantages", "old_per_token_logps", "sampling_per_token_logps"):
        assert not taken[name][blank].any(), name
    assert not taken["importance_sampling_ratio"][blank].any()
    if rows:  # which are as they would be without the blanks
        for name, value in take_responses(rollout, rows, blanks=0, trim=trim).items():
            if torch.is_tensor(value) and value.dim():
                assert torch.equal(taken[name][: len(rows)].nan_to_num(), value.nan_to_num()), name
    assert torch.equal(rollout["completion_mask"], padded_rollout()["completion_mask"])


def test_rows_that_can_move_the_weights():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    rollout = {"completion_mask": mask, "advantages": torch.tensor([0.5, 0.0, 1.0, -1e-30])}
    assert active_responses(rollout, only_advantages=True).tolist() == [True, False, False, True]
    # a KL term moves the weights whatever the advantage
    assert active_responses(rollout, only_advantages=False).tolist() == [True, True, False, True]
    # what a tool wrote does not count
    tools = rollout | {"tool_mask": torch.tensor([[0, 0, 1], [1, 1, 1], [1, 1, 1], [0, 0, 1]])}
    assert active_responses(tools, only_advantages=True).tolist() == [False, False, False, True]
    assert active_responses(tools, only_advantages=False).tolist() == [False, True, False, True]
    # advantages per token: those of masked tokens do not count
    advantages = torch.tensor([[0.0, 0.0, 3.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, -2.0]])
    per_token = {"completion_mask": mask, "advantages": advantages}
    assert active_responses(per_token, only_advantages=True).tolist() == [False, True, False, True]
    written = per_token | {"tool_mask": tools["tool_mask"].flip(1)}
    assert active_responses(written, only_advantages=True).tolist() == [False, True, False, False]
    assert active_responses(per_token, only_advantages=False).tolist() == [True, True, False, True]
