"""batching.py: whole groups, every row once, uniformly random."""

from collections import Counter

import pytest
import torch

from tic_grpo_trl.batching import (
    fixed_keys,
    row_kinds,
    rows_of_process,
    rows_of_prompts,
    shuffle_prompts,
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
    order = rows_of_prompts(torch.randperm(size // group), group)
    shares = [
        rows_of_process(order, update_rows, r, processes).view(mini_batches, update_rows) for r in range(processes)
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
    kinds = row_kinds(rows)
    assert fixed_keys([kinds, row_kinds(rows | {"old_per_token_logps": torch.zeros(4, 7)})]) == []
    images = {
        "pixel_values": [torch.zeros(2, 3)] * 4,  # as split_pixel_values_by_grid makes them
        "mm_token_type_ids": torch.zeros(4, 5),  # over prompt and completion
        "image_sizes": torch.zeros(3, 2),
        "num_images": [1, 1, 0, 1],
    }
    assert fixed_keys([row_kinds(rows | images)] * 2) == ["image_sizes", "mm_token_type_ids", "pixel_values"]
    # what one process alone has, or has as another type, would leave the others waiting
    assert fixed_keys([kinds, row_kinds(rows | {"num_images": [1] * 4})]) == ["num_images"]
    assert fixed_keys([row_kinds(rows | {"advantages": torch.zeros(4).double()}), kinds]) == ["advantages"]
