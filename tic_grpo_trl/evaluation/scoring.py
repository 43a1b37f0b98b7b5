"""Choose the reward function of a set, and score a batch of answers with it."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence

from datasets import Dataset

from ..data import GENERATED_SETS
from ..rewards import code_reward, math_reward
from ..starter import exact_match_reward


def import_reward(path: str, option: str) -> Callable:
    """Import the reward function that a flag names, also from the working directory."""
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {path}: give an import path such as my_package.rewards.my_reward.") from error


def choose_reward(problems: Dataset, reward_func: str | None = None) -> Callable:
    """Return the reward function `reward_func`, or the default for the set's solutions.

    The default is `code_reward` for solutions that are tests, exact match for generated sums (for a symbolic check,
    the unevaluated sum would be correct too), and `math_reward` for everything else.
    """
    if reward_func is not None:
        return import_reward(reward_func, "--reward_func")
    if is_tests(problems[0]["solution"]):
        return code_reward
    return exact_match_reward if problems[0].get("source") in GENERATED_SETS else math_reward


def is_tests(solution: str) -> bool:
    """Return whether a solution is the JSON of a program's tests."""
    try:
        return solution.startswith("{") and "tests" in json.loads(solution)
    except ValueError:
        return False


def score(
    reward: Callable, prompts: Sequence[list[dict[str, str]]], texts: Sequence[str], columns: dict[str, list]
) -> tuple[list[float | None], dict[str, list]]:
    """Call a reward function as the trainer does, with B prompts, answers and values of each other column.

    Returns the rewards, and the values that the function logged per sample, such as the extracted answer.
    """
    logged: dict[str, list] = {}
    rewards = reward(
        prompts=list(prompts),
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        **columns,
        log_extra=lambda name, values: logged.__setitem__(name, list(values)),
        log_metric=lambda name, value: None,
    )
    return [None if value is None else float(value) for value in rewards], logged
