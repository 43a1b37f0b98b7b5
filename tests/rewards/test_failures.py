"""Check that errors of failing reward functions name the function, the prompt and the completion."""

import asyncio
import functools

import conftest
import numpy as np
import pytest
import torch
from conftest import CPU, TINY_PROMPTS, count_a, make_trainer, tiny_model, tiny_tokenizer
from torch import nn
from transformers import Qwen3ForSequenceClassification
from trl.trainer.utils import get_callable_name, is_async_callable

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.rewards import RewardError, checked
from tic_grpo_trl.rewards.failures import raise_failures
from tic_grpo_trl.safety.non_finite import NonFiniteError


def batch(size: int = 3) -> dict:
    return {
        "prompts": [f"prompt {i}" for i in range(size)],
        "completions": [[{"role": "assistant", "content": f"completion {i}"}] for i in range(size)],
        "completion_ids": [[i] for i in range(size)],
        "solution": [str(i) for i in range(size)],
        "trainer_state": object(),
    }


def score(reward_func, columns):
    """Do what the trainer does: call the function, gather, raise failures."""
    function = checked(reward_func)
    call = functools.partial(function, **columns)
    values = asyncio.run(call()) if is_async_callable(function) else call()
    rewards = torch.tensor([[torch.nan if value is None else value] for value in values])
    raise_failures([function], [function.__name__], rewards, columns["prompts"], columns["completions"])
    return values


def returning(output):
    def my_reward(**kwargs):
        return output

    return my_reward


@pytest.mark.parametrize(
    "output",
    [
        [0.5, None, -1],
        (True, np.float32(0.5), None),
        torch.tensor([0.5, 1.0, 2.0]),
        [torch.tensor(0.5), torch.tensor([1.0]), 2],
        (value for value in [1.0, 2.0, 3.0]),
        [None, None, None],
    ],
)
def test_rewards_pass(output):
    expected = [0.5, None, -1] if isinstance(output, list) and output[-1] == -1 else None
    values = score(returning(output), batch())
    assert all(value is None or type(value) is float for value in values)
    assert len(values) == 3
    assert expected is None or values == expected


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "output",
    [{0: 0.25, 1: 0.5, 2: 1.0}, {0.25, 0.5, 1.0}, frozenset({1, 2, 3}), {1: 2, 3: 4, 5: 6}.keys(), b"abc", "123"],
)
def test_collections_without_the_order_of_the_completions(output, is_async):
    """A dict would give its keys as rewards, and a set has no order."""

    async def later(**kwargs):
        return output

    later.__name__ = "my_reward"
    with pytest.raises(
        RewardError, match=r"'my_reward' returned a \w+, .*, instead of a list of 3 rewards in the order"
    ):
        score(later if is_async else returning(output), batch())


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_that_is_given_environments_alone(is_async):
    """TRL calls an environment's own reward with the environments only."""

    async def later(environments, **kwargs):
        return [float(environment) for environment in environments]

    def now(environments, **kwargs):
        return [float(environment) for environment in environments]

    function = checked(later if is_async else now)
    values = asyncio.run(function(environments=[1, 2])) if is_async else function(environments=[1, 2])
    assert values == [1.0, 2.0]
    function = checked(returning([1.0]))
    assert function(environments=[1, 2]) == [float("inf")] * 2
    assert "returned 1 rewards instead of 2" in function.failure[0]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([1.0, 1.0, float("nan")], "returned nan, which is not finite in float32; return None"),
        ([1.0, 1.0, float("inf")], "returned inf, which is not finite"),
        ([1.0, 1.0, -np.float64(1e39)], "1e\\+39.*, which is not finite in float32"),
        ([1.0, 1.0, torch.tensor(float("nan"))], "nan.*which is not finite"),
        ([1.0, 1.0, "0.5"], "returned '0.5', which is a string, not a number"),
        ([1.0, 1.0, [0.5]], r"returned \[0.5\], which is not a number"),
        ([1.0, 1.0, torch.ones(2)], "which is not a number"),
        ([1.0, 1.0, 10**400], "which is not a number"),
    ],
)
def test_values_that_are_no_rewards(output, message):
    with pytest.raises(RewardError, match=message) as caught:
        score(returning(output), batch())
    text = str(caught.value)
    assert "Reward function 'my_reward'" in text
    assert "Sample 2 of 3\n  prompt: 'prompt 2'\n  completion: 'completion 2'" in text


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([1.0, 1.0], "returned 2 rewards instead of 3"),
        ([1.0] * 4, "returned 4 rewards instead of 3"),
        (0.5, "returned a float, 0.5, instead of a list of 3 rewards"),
        (None, "returned a NoneType, None, instead of a list"),
    ],
)
def test_another_number_of_rewards(output, message):
    with pytest.raises(RewardError, match=message) as caught:
        score(returning(output), batch())
    assert "Sample 0 of 3 (the first of the batch)\n  prompt: 'prompt 0'" in str(caught.value)


def test_the_sample_of_an_exception_is_found():
    logged = []

    def my_reward(completions, solution, log_extra, trainer_state, **kwargs):
        assert trainer_state is columns["trainer_state"]
        log_extra("column", [1] * len(completions))
        return [1 / (int(right) - 1) for right in solution]

    columns = batch() | {"log_extra": lambda name, values: logged.append(values)}
    with pytest.raises(RewardError, match="'my_reward' raised ZeroDivisionError: division by zero") as caught:
        score(my_reward, columns)
    text = str(caught.value)
    assert "Sample 1 of 3\n  prompt: 'prompt 1'\n  completion: 'completion 1'" in text
    assert "return [1 / (int(right) - 1) for right in solution]" in text  # the traceback
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert logged == [[1, 1, 1]]


def test_an_output_that_raises_when_it_is_read():
    class Lazy:
        def __iter__(self):
            raise ValueError("no judge")

    with pytest.raises(RewardError, match="'my_reward' raised ValueError: no judge"):
        score(returning(Lazy()), batch())


def test_an_exception_of_the_batch_alone_and_a_search_without_time(monkeypatch):
    def my_reward(completions, **kwargs):
        if len(completions) > 1:
            raise KeyError("answer")
        return [1.0]

    with pytest.raises(RewardError, match="raised KeyError: 'answer'") as caught:
        score(my_reward, batch())
    assert "Sample 0 of 3 (the first of the batch)" in str(caught.value)

    calls = []

    def slow(completions, **kwargs):
        calls.append(len(completions))
        raise KeyError

    monkeypatch.setattr("tic_grpo_trl.rewards.failures.SEARCH_SECONDS", -1)
    with pytest.raises(RewardError):
        score(slow, batch())
    assert calls == [3]


def test_long_texts_are_shortened():
    columns = batch() | {"completions": ["a" * 10_000 + "b", "", ""]}
    with pytest.raises(RewardError) as caught:
        score(returning([float("nan")] * 3), columns)
    assert len(str(caught.value)) < 1000
    assert "aaa … aaa" in str(caught.value)
    assert "ab'" in str(caught.value)


class Judge:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [float(completion[-1]["content"] != "completion 1") or self.missing for completion in completions]


def test_names_and_kinds_stay():
    async def my_reward(**kwargs):
        return [1.0, None, 3.0]

    assert is_async_callable(checked(my_reward))
    assert is_async_callable(checked(Judge()))
    assert not is_async_callable(checked(count_a))
    for function in (my_reward, Judge(), count_a, functools.partial(count_a)):
        assert get_callable_name(checked(function)) == get_callable_name(function)
    assert score(my_reward, batch()) == [1.0, None, 3.0]
    with pytest.raises(RewardError, match="'Judge' raised AttributeError") as caught:
        score(Judge(), batch())
    assert "Sample 1 of 3" in str(caught.value)

    model = nn.Linear(1, 1)
    assert checked(model) is model
    once = checked(count_a)
    assert checked(once) is once


def test_a_failure_is_forgotten_with_the_next_call():
    outputs = iter([[float("nan")] * 3, [1.0] * 3])
    function = checked(lambda **kwargs: next(outputs))
    function(**batch())
    assert function.failure is not None
    assert function(**batch()) == [1.0] * 3
    assert function.failure is None


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_training_ends_with_the_error(tmp_path, monkeypatch, kind):
    calls = []

    def fragile(prompts, completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 3:
            return [0.0] * 5 + [float("nan")] * 3
        return count_a(completions)

    async def fragile_async(**kwargs):
        return fragile(**kwargs)

    function = fragile if kind == "sync" else fragile_async
    monkeypatch.setattr(conftest, "count_a", function)
    trainer = make_trainer(tmp_path)
    with pytest.raises(RewardError, match=f"On process 0 of 1: Reward function '{function.__name__}' returned nan"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert f"rewards/{function.__name__}/mean" in trainer.state.log_history[0]
    assert calls == [8, 8, 8]


def test_rewards_are_those_of_the_function_itself(tmp_path, monkeypatch):
    """Rewards do not change as long as nothing fails, including `None`."""

    def with_gaps(completions, log_metric, **kwargs):
        log_metric("own", 7.0)
        return [None, *count_a(completions)[1:]]

    monkeypatch.setattr(conftest, "count_a", with_gaps)
    logs = []
    for trl in (False, True):
        options = {} if trl else {"algorithm": "grpo"}
        trainer = make_trainer(tmp_path, trl=trl, max_steps=2, **options)
        trainer.train()
        logs.append(
            [{k: v for k, v in entry.items() if "reward" in k or k == "own"} for entry in trainer.state.log_history]
        )
    assert logs[0][0]["rewards/with_gaps/mean"] == logs[1][0]["rewards/with_gaps/mean"]
    assert logs[0][0] == logs[1][0]
    assert logs[0][0]["own"] == 7.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_model_that_gives_nan(tmp_path, value):
    tokenizer = tiny_tokenizer()
    model = Qwen3ForSequenceClassification(tiny_model().config)
    model.config.num_labels, model.config._name_or_path = 1, "own/judge"
    model.score = nn.Linear(16, 1)
    args = TICGRPOConfig(
        str(tmp_path), **CPU, per_device_train_batch_size=4, num_generations=4, max_completion_length=4
    )
    trainer = TICGRPOTrainer(
        tiny_model(),
        [count_a, model],
        args,
        train_dataset=TINY_PROMPTS,
        processing_class=tokenizer,
        reward_processing_classes=[None, tokenizer],
    )
    trainer.reward_funcs[1].score.bias.data.fill_(value)
    with pytest.raises(
        NonFiniteError, match=rf"reward of 'judge' {value}: its group is dropped\.\nSample 0 of 4\n  prompt"
    ):
        trainer.train()
