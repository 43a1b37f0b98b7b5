"""Choose the reward function of a set, and score a batch of answers with it."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from ..data import GENERATED_SETS
from ..data.user_data import column_names
from ..rewards import code_reward, math_reward
from ..rewards.importing import check_columns, import_reward
from ..starter import exact_match_reward


def choose_reward(problems: Any, reward_func: str | None = None, option: str = "--reward_func") -> Callable:
    """Return the reward function `reward_func`, or the default for the set's solutions.

    The default is `code_reward` for solutions that are tests, exact match for generated sums (for a symbolic check,
    the unevaluated sum would be correct too), and `math_reward` for everything else.

    Raises:
        ValueError: if the path is wrong, or the data lacks a column that the function reads. `option` is the flag.
    """
    columns = column_names(problems)
    if reward_func is not None:
        function = import_reward(reward_func, option)
        check_columns(function, columns, f"{option} {reward_func}")
        return function
    if "solution" not in columns:
        raise ValueError(
            f"{option}: the data has no column `solution`; name your own reward function, such as {option} "
            "my_rewards.correct, or name the column of correct answers, such as --dataset_columns solution=answer. The "
            f"columns are {', '.join(columns)}."
        )
    first = next(iter(problems))
    if is_tests(first["solution"]):
        return code_reward
    return exact_match_reward if first.get("source") in GENERATED_SETS else math_reward


def is_tests(solution: Any) -> bool:
    """Return whether a solution is the JSON of a program's tests."""
    try:
        return isinstance(solution, str) and solution.startswith("{") and "tests" in json.loads(solution)
    except ValueError:
        return False


def score(
    reward: Callable, prompts: Sequence[Any], texts: Sequence[str], columns: dict[str, list]
) -> tuple[list[float | None], dict[str, list]]:
    """Call a reward function as the trainer does, with B prompts, answers and values of each other column.

    The answers to conversations are messages, those to strings are strings.

    Returns the rewards, and the values that the function logged per sample, such as the extracted answer.
    """
    logged: dict[str, list] = {}
    rewards = reward(
        prompts=list(prompts),
        completions=[
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ],
        **columns,
        log_extra=lambda name, values: logged.__setitem__(name, list(values)),
        log_metric=lambda name, value: None,
    )
    return [None if value is None else float(value) for value in rewards], logged
