"""batching.py: whole groups, every row once, uniformly random."""

from collections import Counter

import torch

from tic_grpo_trl.batching import shuffle_prompts


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
