"""Invariants of partition and micro-batches, searched by hypothesis."""

import copy
from itertools import chain
from types import SimpleNamespace
from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st
from searching import searched, tensors

from tic_grpo_trl.forward.responses import PADDED_SIDE, is_per_response, loss_mask, response_count, select_responses
from tic_grpo_trl.rollout import partition
from tic_grpo_trl.rollout.micro_batches import active_responses, take_responses
from tic_grpo_trl.rollout.partition import (
    exchange_prompts,
    immovable_keys,
    responses_of_process,
    responses_to_prompts,
    shuffle_prompts,
    value_kinds,
)


PAD = 99
LEFT = ("prompt_ids", "prompt_mask")


OPTIONS = st.sets(
    st.sampled_from(["tool mask", "log-probabilities", "ratio", "token ratio", "token advantages", "token age"])
)


@st.composite
def rollouts(draw, size: int | None = None, first: int = 0, options: set[str] | None = None) -> dict:
    """A rollout as TRL makes it. Numbers tell their row, `first` + i, and their token, so that no mix-up is unseen."""
    size = size or draw(st.integers(1, 8))
    options = draw(OPTIONS) if options is None else options
    prompts = draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
    completions = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    wide = max(prompts) + draw(st.integers(0, 2))
    long = max(2 if "token ratio" in options else 1, *completions) + draw(st.integers(0, 2))
    row = torch.arange(first, first + size).unsqueeze(1)
    prompt_mask = (torch.arange(wide, 0, -1) <= torch.tensor(prompts).unsqueeze(1)).long()
    completion_mask = (torch.arange(1, long + 1) <= torch.tensor(completions).unsqueeze(1)).long()
    # counted from the end of the prompt and from the start of the completion
    prompt_number, number = 100 * (row + 2) - torch.arange(wide, 0, -1), 100 * (row + 2) + torch.arange(long)
    of_tokens = (number + 0.5) * completion_mask
    rollout = {
        "prompt_ids": torch.where(prompt_mask.bool(), prompt_number, PAD),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.where(completion_mask.bool(), number, PAD),
        "completion_mask": completion_mask,
        "advantages": of_tokens.clone() if "token advantages" in options else row.squeeze(1) + 0.5,
        "num_items_in_batch": torch.tensor(17),
        "ref_per_token_logps": None,
        "tags": [f"row {i}" for i in row.squeeze(1).tolist()],
    }
    if "tool mask" in options:
        rollout["tool_mask"] = draw(tensors((size, long), st.integers(0, 1), int))
    if "token age" in options:
        rollout["token_age"] = number * completion_mask
    if "log-probabilities" in options:
        for factor, name in enumerate(("old", "ref", "sampling"), start=1):
            rollout[f"{name}_per_token_logps"] = -factor * of_tokens
    if options & {"ratio", "token ratio"}:
        rollout["importance_sampling_ratio"] = of_tokens.clone() if "token ratio" in options else row + 0.25
    return rollout


def contents(rollout: dict, i: int) -> dict:
    """Row i without padding, in Python's numbers."""
    found = {}
    for name, value in rollout.items():
        if torch.is_tensor(value) and value.dim() == 2 and (value.size(1) > 1 or name != "importance_sampling_ratio"):
            found[name] = value[i][rollout["prompt_mask" if name in LEFT else "completion_mask"][i].bool()].tolist()
        elif is_per_response(value):
            found[name] = value[i].tolist() if torch.is_tensor(value) else value[i]
    return found


def numbers(rollout: dict) -> list[int]:
    """Which rows of the first rollout these are."""
    return [int(tag.split()[1]) for tag in rollout["tags"]]


@searched(60)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_shuffled_rows_are_the_same_rows_in_whole_groups(prompts, group, data):
    rollout = data.draw(rollouts(prompts * group))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    shuffled = shuffle_prompts(rollout, group)
    order = numbers(shuffled)
    assert list(shuffled) == list(rollout)
    assert sorted(order) == list(range(prompts * group))
    assert [contents(shuffled, place) for place in range(len(order))] == [contents(rollout, i) for i in order]
    for start in range(0, len(order), group):  # one prompt after the other, each in its order
        assert order[start] % group == 0
        assert order[start : start + group] == list(range(order[start], order[start] + group))
    assert shuffled["num_items_in_batch"] is rollout["num_items_in_batch"]


def gathered(values: list[torch.Tensor], dim: int, pad_index: int, pad_first: bool) -> torch.Tensor:
    """What every process has after accelerate's `pad_across_processes` and `gather`."""
    if values[0].dim() <= dim:
        return torch.cat(values)
    width = max(value.size(dim) for value in values)
    missing = [width - value.size(dim) for value in values]
    pads = [(n, 0) if pad_first else (0, n) for n in missing]
    return torch.cat([torch.nn.functional.pad(v, p, value=pad_index) for v, p in zip(values, pads, strict=True)])


@searched(60)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), OPTIONS, st.data())
def test_exchanged_rows_are_the_same_rows_in_mini_batches_of_whole_groups(
    processes, update_rows, k, group, options, data
):
    if processes * update_rows % group:
        update_rows *= group
    size = update_rows * k
    before = [data.draw(rollouts(size, process * size, options)) for process in range(processes)]
    order = torch.tensor(data.draw(st.permutations(range(processes * size // group))))

    def randperm(n: int):
        assert isinstance(n, int)
        assert n == len(order)
        return SimpleNamespace(to={"cpu": order}.get)  # where the processes communicate

    after = []
    for process, rollout in enumerate(before):

        def of_all(value, rollout=rollout) -> list:
            name = next(name for name in rollout if rollout[name] is value)
            return [other[name] for other in before]

        accelerator = SimpleNamespace(
            num_processes=processes,
            process_index=process,
            device="cpu",
            pad_across_processes=lambda value, **how: (of_all(value), how),
            gather=lambda padded: gathered(padded[0], **padded[1]),
        )
        with (
            patch.object(torch, "randperm", randperm),
            patch.object(partition, "broadcast", lambda mine: mine),
            patch.object(partition, "gather_object", lambda value: list(chain(*of_all(value)))),
        ):
            after.append(exchange_prompts(rollout, group, update_rows, PAD, accelerator))
        assert list(after[-1]) == list(rollout)

    everything = {i: contents(r, place) for r in before for place, i in enumerate(numbers(r))}
    for rollout in after:
        assert response_count(rollout) == size
        assert rollout["num_items_in_batch"] == 17
        for place, i in enumerate(numbers(rollout)):
            assert contents(rollout, place) == everything[i]
        # what pads is what TRL pads with
        assert (rollout["prompt_ids"][rollout["prompt_mask"] == 0] == PAD).all()
        assert (rollout["completion_ids"][rollout["completion_mask"] == 0] == PAD).all()
        assert (rollout["prompt_mask"][:, -1] == 1).all()
    # in the order drawn, mini-batch after mini-batch, process after process
    cut = [numbers(rollout)[step * update_rows : (step + 1) * update_rows] for step in range(k) for rollout in after]
    together = [i for rows in cut for i in rows]
    assert sorted(together) == list(range(processes * size))
    assert [i // group for i in together] == order.repeat_interleave(group).tolist()


@searched(60)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.data())
def test_shares_of_the_processes_are_the_order_cut_up(processes, update_rows, k, data):
    order = torch.tensor(data.draw(st.permutations(range(processes * update_rows * k))))
    shares = [responses_of_process(order, update_rows, process, processes) for process in range(processes)]
    assert torch.cat([share.view(k, update_rows) for share in shares], dim=1).flatten().tolist() == order.tolist()
    group = data.draw(st.integers(1, 4))
    assert responses_to_prompts(order, group).tolist() == [p * group + g for p in order.tolist() for g in range(group)]


@searched(120)
@given(rollouts(), st.integers(0, 3), st.booleans(), st.data())
def test_taken_rows_keep_their_tokens_and_blanks_count_for_nothing(rollout, blanks, trim, data):
    rows = data.draw(st.lists(st.integers(0, response_count(rollout) - 1), min_size=0 if blanks else 1, max_size=6))
    before = copy.deepcopy(rollout)
    taken = take_responses(rollout, rows, blanks, trim)
    assert list(taken) == list(rollout)
    assert all(len(value) == len(rows) + blanks for value in taken.values() if is_per_response(value))
    assert [contents(taken, place) for place in range(len(rows))] == [contents(rollout, i) for i in rows]
    for name, value in before.items():  # the rollout itself is left alone
        assert torch.equal(rollout[name], value) if torch.is_tensor(value) else rollout[name] == value

    blank = slice(len(rows), None)
    assert (taken["prompt_mask"][blank].sum(1) == 1).all()
    assert (taken["prompt_mask"][blank, -1] == 1).all()
    assert not loss_mask(taken)[blank].any()
    assert not active_responses(taken, only_advantages=False)[blank].any()
    for name, value in taken.items():
        if torch.is_tensor(value) and (value.is_floating_point() or name == "token_age"):
            assert not value[blank].any()

    widths = [rollout[name].size(1) for name in ("prompt_mask", "completion_mask")]
    new_widths = [taken[name].size(1) for name in ("prompt_mask", "completion_mask")]
    if not trim:
        assert new_widths == widths
    else:  # some row uses the outermost column
        assert taken["prompt_mask"][:, 0].any()
        assert taken["completion_mask"][:, -1].any() or new_widths[1] <= 2
    for name in PADDED_SIDE:  # all columns of a side are cut alike
        value = taken.get(name)
        if torch.is_tensor(value) and value.dim() == 2 and rollout[name].size(1) == widths[name not in LEFT]:
            assert value.size(1) == new_widths[name not in LEFT], name


@searched(120)
@given(rollouts(), st.booleans(), st.data())
def test_rows_that_do_not_move_the_weights_contribute_nothing(rollout, per_token, data):
    mask = loss_mask(rollout)
    values = st.sampled_from([0.0, -0.0, 1.0, -2.0, 5e-324])
    advantages = data.draw(tensors(mask.shape if per_token else mask.shape[:1], values))
    rollout["advantages"] = advantages
    terms = (advantages if per_token else advantages.unsqueeze(1)) * mask  # of the policy gradient, times a weight
    assert active_responses(rollout, only_advantages=True).tolist() == terms.ne(0).any(dim=1).tolist()
    assert active_responses(rollout, only_advantages=False).tolist() == mask.ne(0).any(dim=1).tolist()


@searched(60)
@given(rollouts(), st.data())
def test_rows_are_selected_in_every_kind_of_value_that_has_them(rollout, data):
    rows = torch.tensor(data.draw(st.lists(st.integers(0, response_count(rollout) - 1), max_size=5)), dtype=torch.long)
    elsewhere = SimpleNamespace(to={torch.device("cpu"): rows}.get, tolist=rows.tolist)  # on another device
    for value in rollout.values():
        selected = select_responses(value, elsewhere)
        if value is None or (torch.is_tensor(value) and value.dim() == 0):
            assert selected is value
        else:
            assert len(selected) == len(rows)
            assert all(
                torch.equal(a, value[i]) if torch.is_tensor(a) else a == value[i]
                for a, i in zip(selected, rows.tolist(), strict=True)
            )


@searched(60)
@given(rollouts(), st.integers(0, 2), st.data())
def test_keys_stay_where_processes_differ_or_rows_cannot_be_told_apart(rollout, others, data):
    kinds = value_kinds(rollout)
    assert immovable_keys([kinds] * (1 + others)) == []
    name = data.draw(st.sampled_from(sorted(rollout)))
    value = rollout[name]
    changed = [
        {n: v for n, v in rollout.items() if n != name},
        rollout | {name: [torch.zeros(1)] * response_count(rollout)},
        rollout | {name: value.double() if torch.is_tensor(value) and value.dtype != torch.float64 else 0.5},
    ]
    if is_per_response(value) and torch.is_tensor(value):
        changed += [rollout | {name: torch.cat([value, value])}, rollout | {name: torch.stack([value, value], dim=1)}]
    other = data.draw(st.sampled_from(changed))
    if response_count(other) != response_count(rollout):
        return
    assert immovable_keys([kinds, value_kinds(other)]) == [name]
