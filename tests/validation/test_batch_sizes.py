"""Compare batches with hand-counted numbers, and check that every error proposes settings that work."""

import re
from types import SimpleNamespace

import pytest

from tic_grpo_trl.rollout.schedule import RolloutSchedule
from tic_grpo_trl.validation.batch_sizes import (
    check_batches,
    check_length,
    check_prompts,
    counted,
    derive_batches,
    nearest_divisors,
    nearest_multiples,
)


def settings(**changes):
    values = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 8,
        "steps_per_generation": 32,
        "generation_batch_size": None,
        "responses_per_update": None,
        "updates_per_rollout": None,
        "responses_per_eval_batch": None,
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


def derived(processes, **changes):
    """Settings of which the batches are still to be derived, and then are."""
    unset = dict.fromkeys(("gradient_accumulation_steps", "steps_per_generation", "per_device_eval_batch_size"))
    args = settings(**unset | {"per_device_train_batch_size": 4} | changes, world_size=processes)
    derive_batches(args)
    return args


@pytest.mark.parametrize(
    ("processes", "window", "evaluated"), [(1, 128, 960), (2, 64, 480), (4, 32, 240), (8, 16, 120), (16, 8, 60)]
)
def test_the_papers_batches_on_any_number_of_processes(processes, window, evaluated):
    args = derived(processes, responses_per_update=512, updates_per_rollout=4, responses_per_eval_batch=960)
    assert (args.gradient_accumulation_steps, args.steps_per_generation) == (window, 4 * window)
    assert args.per_device_eval_batch_size == evaluated
    batches = check_batches(args, processes)
    assert (batches.update_responses, batches.prompts, batches.updates) == (512, 128, 4)


PAPERS = {"responses_per_update": 512, "updates_per_rollout": 4, "responses_per_eval_batch": 960}


def saved(processes, **changes):
    """The settings that a config of a run on so many processes holds."""
    args = derived(processes, **changes)
    rollout = args.per_device_train_batch_size * processes * args.steps_per_generation
    return vars(args) | {"generation_batch_size": rollout}


@pytest.mark.parametrize("processes", [1, 4, 16])
def test_a_saved_config_is_derived_again_for_other_processes(processes):
    again = SimpleNamespace(**saved(8, **PAPERS) | {"world_size": processes})
    derive_batches(again)
    assert vars(again) == vars(derived(processes, **PAPERS))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("gradient_accumulation_steps", 8, "8 contradicts responses_per_update 512"),
        ("steps_per_generation", 32, "32 contradicts updates_per_rollout 4"),
        ("per_device_eval_batch_size", 60, "60 contradicts responses_per_eval_batch 960"),
    ],
)
def test_what_was_changed_in_a_saved_config_is_not_overwritten(name, value, says):
    with pytest.raises(ValueError, match=f"^{name} {says}"):
        derive_batches(SimpleNamespace(**saved(8, **PAPERS) | {name: value}))


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(1, "prompt", "1 prompt"), (1.0, "process", "1 process"), (0, "prompt", "0 prompts"), (2, "pass", "2 passes")],
)
def test_numbers_with_nouns(count, noun, text):
    assert counted(count, noun) == text
    assert counted(1_234_567, "response") == "1,234,567 responses"
    assert counted(12.5, "prompt") == "12.5 prompts"


@pytest.mark.parametrize(
    ("changes", "processes", "nearest"),
    [
        ({"responses_per_update": 512, "updates_per_rollout": 4}, 3, "responses_per_update 504 or 516."),
        (
            {"responses_per_update": 64, "per_device_train_batch_size": 64},
            2,
            "responses_per_update 128; or per_device_train_batch_size 32.",
        ),
        # 4 x 3 = 12 responses a step: with K = 1, an update is also a rollout of complete groups of 16
        ({"responses_per_update": 50}, 3, "responses_per_update 48 or 96."),
        ({"responses_per_eval_batch": 900, "num_generations_eval": 32}, 8, "responses_per_eval_batch 896 or 928."),
    ],
)
def test_responses_that_the_processes_cannot_share(changes, processes, nearest):
    with pytest.raises(ValueError, match="is not divisible by") as refused:
        derived(processes, **changes)
    message = str(refused.value)
    assert message.partition("Nearest: ")[2] == nearest
    for proposal in applied(SimpleNamespace(**changes), message):
        check_batches(derived(processes, **vars(proposal)), processes)


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        (
            {"responses_per_update": 100},
            "responses_per_update 96 or 112; or steps_per_generation 100; or num_generations 10 or 20.",
        ),
        (
            {"responses_per_update": 100, "updates_per_rollout": 3},
            "responses_per_update 96 or 112; or updates_per_rollout 4; or num_generations 15 or 20.",
        ),
        (
            {"gradient_accumulation_steps": 5, "updates_per_rollout": 3},
            "per_device_train_batch_size 16; or updates_per_rollout 4; or num_generations 15 or 20.",
        ),
        (
            {"responses_per_update": 64, "responses_per_eval_batch": 50, "eval_strategy": "steps"},
            "responses_per_eval_batch 48 or 64; or num_generations_eval 10 or 25.",
        ),
    ],
)
def test_proposals_are_settings_that_were_given(changes, nearest):
    with pytest.raises(ValueError, match="Nearest") as refused:
        check_batches(derived(1, **changes), 1)
    assert str(refused.value).partition("Nearest: ")[2] == nearest
    for proposal in applied(SimpleNamespace(**changes), str(refused.value)):
        check_batches(derived(1, **vars(proposal)), 1)


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
    args = settings()
    batches = check_batches(args, 8)
    check_prompts(args, batches, 128)
    with pytest.raises(ValueError, match=r"takes 128 prompts, .* has only 127.*steps_per_generation 24") as refused:
        check_prompts(args, batches, 127)
    (fitting,) = applied(args, str(refused.value))
    assert check_batches(fitting, 8).prompts == 96
    with pytest.raises(ValueError, match="smaller per_device_train_batch_size"):
        check_prompts(args, batches, 2)
    args = derived(8, responses_per_update=512, updates_per_rollout=4)
    with pytest.raises(ValueError, match=r"has only 127.*Nearest: updates_per_rollout 3\."):
        check_prompts(args, check_batches(args, 8), 127)
    with pytest.raises(ValueError, match="smaller responses_per_update"):
        check_prompts(args, check_batches(args, 8), 31)
