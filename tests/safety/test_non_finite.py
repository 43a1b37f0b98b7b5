"""Which numbers count as bad, what a blanked response looks like, and which groups lose their rewards."""

import math

import pytest
import torch
from conftest import WORDS, tiny_tokenizer

from tic_grpo_trl.safety.non_finite import (
    bad_responses,
    blank_responses,
    check_deepspeed,
    describe_responses,
    groups_without_rewards,
    numbers_of_forward,
    numbers_of_rollout,
)


NAN, INF = math.nan, math.inf
BAD = [NAN, INF, -INF]


def rollout(responses=4, width=3, **more):
    """Every prompt `a b`, every completion `c d <eos>`."""
    ids = torch.tensor([WORDS.index(word) for word in ("c", "d", "<eos>")])[:width].expand(responses, -1)
    prompts = torch.tensor([1, 2]).expand(responses, -1)
    inputs = {
        "prompt_ids": prompts.clone(),
        "prompt_mask": torch.ones(responses, 2, dtype=torch.long),
        "completion_ids": ids.clone(),
        "completion_mask": torch.ones(responses, width, dtype=torch.long),
        "advantages": torch.linspace(-1, 1, responses),
        "old_per_token_logps": -torch.ones(responses, width),
        "ref_per_token_logps": -torch.ones(responses, width),
        "sampling_per_token_logps": -torch.ones(responses, width),
        "importance_sampling_ratio": torch.ones(responses, 1),
        "num_items_in_batch": torch.tensor(responses * width),
    }
    return inputs | more


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "name", ["advantages", "old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio"]
)
def test_a_bad_number_of_a_rollout_marks_its_response(name, bad):
    inputs = rollout()
    assert not bad_responses(numbers_of_rollout(inputs)).any()
    inputs[name][2, ...] = bad
    assert bad_responses(numbers_of_rollout(inputs)).tolist() == [False, False, True, False]


def test_a_sampler_may_leave_out_a_log_probability_but_not_give_an_infinite_one():
    inputs = rollout()
    inputs["sampling_per_token_logps"][0, 1] = NAN
    inputs["sampling_per_token_logps"][1, 1] = -INF
    inputs["sampling_per_token_logps"][3, 2] = INF
    inputs["completion_mask"][3, 2] = 0  # padding
    assert bad_responses(numbers_of_rollout(inputs)).tolist() == [False, True, False, False]


def test_advantages_per_token_and_a_rollout_without_the_rest():
    inputs = {name: value for name, value in rollout().items() if "logps" not in name and "ratio" not in name}
    inputs["advantages"] = torch.zeros(4, 3)
    inputs["advantages"][1, 2] = NAN
    assert bad_responses(numbers_of_rollout(inputs)).tolist() == [False, True, False, False]


@pytest.mark.parametrize("bad", BAD)
def test_log_probabilities_of_the_policy(bad):
    logps = -torch.ones(4, 3)
    logps[1, 2] = bad
    assert bad_responses(numbers_of_forward(logps, rollout(), None, 0.0)).tolist() == [False, True, False, False]


def test_entropies_count_where_the_loss_contains_them():
    logps, entropies = -torch.ones(4, 3), torch.ones(4, 3)
    entropies[3, 0] = NAN
    assert not bad_responses(numbers_of_forward(logps, rollout(), None, 0.0)).any()
    assert bad_responses(numbers_of_forward(logps, rollout(), None, 0.0, entropies)).tolist() == [False] * 3 + [True]


@pytest.mark.parametrize(("drift", "overflows"), [(88.0, False), (89.0, True)])
def test_a_ratio_that_overflows(drift, overflows):
    """e^88.7 is float32's largest number: token by token, as the mean of a response, and in the KL term."""
    logps = -torch.ones(2, 3)
    inputs = rollout(2)
    inputs["old_per_token_logps"][1, 0] -= drift
    assert bad_responses(numbers_of_forward(logps, inputs, "token", 0.0)).tolist() == [False, overflows]
    assert not bad_responses(numbers_of_forward(logps, inputs, "sequence", 0.0)).any()  # a third of it
    assert not bad_responses(numbers_of_forward(logps, inputs, None, 0.0)).any()  # the algorithm bounds it in log space
    inputs["old_per_token_logps"][1] = -1 - drift
    assert bad_responses(numbers_of_forward(logps, inputs, "sequence", 0.0)).tolist() == [False, overflows]

    inputs = rollout(2)
    inputs["ref_per_token_logps"][1, 0] += drift
    assert not bad_responses(numbers_of_forward(logps, inputs, "token", 0.0)).any()
    assert bad_responses(numbers_of_forward(logps, inputs, "token", 0.1)).tolist() == [False, overflows]


def test_a_blanked_response_holds_one_harmless_token_and_nothing_else():
    inputs = rollout(tool_mask=torch.ones(4, 3, dtype=torch.long))
    inputs["prompt_ids"][:, -1] = torch.tensor([5, 3, 4, 1])
    inputs["advantages"][0] = NAN
    before = {name: value.clone() for name, value in inputs.items()}
    bad = torch.tensor([True, False, True, False])
    blanked = blank_responses(inputs, bad, pad_token_id=0)
    for name, value in inputs.items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name  # the input is unchanged
        if value.dim():
            assert torch.equal(blanked[name][~bad], value[~bad]), name
    assert set(blanked["prompt_ids"][bad].flatten().tolist()) == {3}  # a response that stays has it
    assert set(blanked["completion_ids"][bad].flatten().tolist()) == {3}
    assert blanked["prompt_mask"][bad].tolist() == [[0, 1], [0, 1]]
    rest = set(inputs) - {"prompt_ids", "prompt_mask", "completion_ids", "num_items_in_batch"}
    assert all(blanked[name][bad].eq(0).all() for name in rest)
    assert blanked["num_items_in_batch"] == 12


def test_without_any_response_left_the_pad_token_is_used():
    blanked = blank_responses(rollout(), torch.ones(4, dtype=torch.bool), pad_token_id=4)
    assert set(blanked["prompt_ids"].flatten().tolist()) == {4}
    assert blanked["prompt_mask"].sum() == 4


def test_prompts_with_images_keep_their_tokens():
    inputs = rollout(num_images=[1, 1, 1, 1], pixel_values=torch.ones(8, 5))
    blanked = blank_responses(inputs, torch.tensor([True, False, False, False]), pad_token_id=0)
    for name in ("prompt_ids", "prompt_mask", "pixel_values"):
        assert torch.equal(blanked[name], inputs[name])
    assert blanked["completion_mask"][0].sum() == 0


@pytest.mark.parametrize("bad", BAD)
def test_a_reward_models_bad_reward_drops_its_group(bad):
    rewards = torch.tensor([[0.0, 1.0], [1.0, 2.0], [NAN, 3.0], [1.0, 4.0]])  # NaN: the function's None
    weights = torch.ones(2)
    groups, own = groups_without_rewards(rewards, weights, [1], num_generations=2)
    assert not groups.any()
    assert not own.any()
    rewards[3, 1] = bad
    groups, own = groups_without_rewards(rewards, weights, [1], num_generations=2)
    assert groups.tolist() == [False, False, True, True]
    assert own.tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("rewards", "weight", "dropped"),
    [
        ([1e18, 0.0], 1.0, False),
        ([1e20, 0.0], 1.0, True),  # its square overflows, so the deviation would
        ([1e18, 0.0], 1e3, True),
        ([3e38, 3e38], 10.0, True),
        ([1.5e19, 1.5e19], 1.0, True),  # only the sum of the squares does
    ],
)
def test_rewards_that_overflow_drop_their_group(rewards, weight, dropped):
    rewards = torch.tensor([[1.0], [0.0], *[[reward] for reward in rewards]])
    groups, _ = groups_without_rewards(rewards, torch.tensor([weight]), [], num_generations=2)
    assert groups.tolist() == [False, False, dropped, dropped]


def test_a_report_names_numbers_tokens_and_completions_and_counts_the_rest():
    inputs = rollout(6)
    inputs["old_per_token_logps"][1:, 1] = -INF
    inputs["advantages"][1] = NAN
    texts = describe_responses(inputs, numbers_of_rollout(inputs), tiny_tokenizer())
    assert texts[0] == (
        "advantage nan, old log-probability -inf at token 1 ('d')\n  prompt: 'a b'\n  completion: 'c d <eos>'"
    )
    assert texts[1].startswith("old log-probability -inf at token 1 ('d')\n")
    assert len(texts) == 4
    assert texts[3] == "and 2 more of 6 responses"


def test_a_deepspeed_that_steps_with_nan_is_refused(monkeypatch):
    for installed, stage, message in [("0.19.7", 3, "deepspeed>=0.19.8"), ("0.19.8", 0, "zero_stage")]:
        monkeypatch.setattr("tic_grpo_trl.safety.non_finite.version", lambda name, installed=installed: installed)
        with pytest.raises(ValueError, match=message):
            check_deepspeed(stage)
    check_deepspeed(1)
