"""Compare batches with hand-counted numbers, and check that every error proposes settings that work."""

import re
from types import SimpleNamespace

import pytest

from tic_grpo_trl.rollout.schedule import RolloutSchedule
from tic_grpo_trl.validation.batch_sizes import (
    check_batches,
    check_length,
    check_prompts,
    nearest_divisors,
    nearest_multiples,
)


def settings(**changes):
    values = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 8,
        "steps_per_generation": 32,
        "generation_batch_size": None,
        "num_generations": 16,
        "num_iterations": 1,
        "num_generations_eval": None,
        "per_device_eval_batch_size": 8,
        "eval_strategy": "no",
        "use_vllm": False,
        "vllm_mode": "colocate",
        "vllm_tensor_parallel_size": 1,
        "vllm_max_model_length": None,
        "max_completion_length": 100,
    }
    return SimpleNamespace(**values | changes)


def test_the_papers_rollout():
    batches = check_batches(settings(), processes=8)
    assert (batches.responses, batches.prompts, batches.update_responses, batches.updates) == (2048, 128, 512, 4)
    assert batches.updates_in(17_900) == 139 * 4  # 139 x 128 = 17,792: the other 108 prompts fill no rollout


def test_reuse_multiplies_updates():
    batches = check_batches(settings(num_iterations=3), processes=8)
    assert (batches.prompts, batches.updates, batches.updates_in(256)) == (128, 12, 24)


def test_generation_batch_size_in_place_of_steps():
    batches = RolloutSchedule.of(settings(steps_per_generation=None, generation_batch_size=256), processes=4)
    assert batches.steps_per_generation == 8
    assert (
        RolloutSchedule.of(settings(steps_per_generation=None), processes=4).steps_per_generation == 8
    )  # accumulation


def test_nearest_numbers():
    assert nearest_multiples(6, 4) == [4, 8]
    assert nearest_multiples(8, 4) == [8]
    assert nearest_multiples(3, 4) == [4]
    assert nearest_divisors(16, 24) == [12, 24]
    assert nearest_divisors(5, 7) == [7]


def applied(args, message):
    """The settings with each of the error's proposals in turn."""
    for names, values in re.findall(r"(\w+) ([\d,]+(?: or [\d,]+)*)", message.partition("Nearest:")[2]):
        for value in values.split(" or "):
            yield SimpleNamespace(**vars(args) | {names: int(value.replace(",", ""))})


@pytest.mark.parametrize(
    ("changes", "processes", "says"),
    [
        ({"per_device_train_batch_size": 6, "steps_per_generation": 4, "gradient_accumulation_steps": 2}, 1, "24 resp"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 3}, 5, "num_generations 16"),
        ({"generation_batch_size": 100, "steps_per_generation": None}, 4, "generation_batch_size 100"),
        ({"num_generations": 1}, 4, "num_generations 1"),
        ({"eval_strategy": "steps", "per_device_eval_batch_size": 6}, 4, "num_generations_eval 16"),
        ({"eval_strategy": "steps", "num_generations_eval": 32}, 2, "per_device_eval_batch_size 8"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 3}, 8, "vllm_tensor_parallel_size 3"),
    ],
)
def test_every_proposal_works(changes, processes, says):
    args = settings(**changes)
    with pytest.raises(ValueError, match=says) as refused:
        check_batches(args, processes)
    proposals = list(applied(args, str(refused.value)))
    assert proposals
    for proposal in proposals:
        check_batches(proposal, processes)


def test_proposals_are_the_nearest():
    args = settings(per_device_train_batch_size=6, steps_per_generation=4, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="Nearest") as refused:
        check_batches(args, 1)
    # 6 x 4 = 24 responses in groups of 16
    assert str(refused.value).endswith(
        "Nearest: per_device_train_batch_size 4 or 8; or steps_per_generation 8; or num_generations 12 or 24."
    )


def test_evaluation_counts_only_where_it_is_on():
    check_batches(settings(per_device_eval_batch_size=6), 1)


def test_responses_must_fit_the_engine():
    args = settings(use_vllm=True, vllm_max_model_length=120)
    check_length(args, 20)
    with pytest.raises(ValueError, match=r"Nearest: vllm_max_model_length 121\."):
        check_length(args, 21)


def test_data_must_fill_a_rollout():
    batches = check_batches(settings(), 8)
    check_prompts(batches, 128)
    with pytest.raises(ValueError, match=r"takes 128 prompts, .* has only 127.*steps_per_generation 24") as refused:
        check_prompts(batches, 127)
    (fitting,) = applied(settings(), str(refused.value))
    assert check_batches(fitting, 8).prompts == 96
    with pytest.raises(ValueError, match="smaller per_device_train_batch_size"):
        check_prompts(batches, 2)
