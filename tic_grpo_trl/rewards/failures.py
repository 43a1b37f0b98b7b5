"""Reward functions that fail: one clear error on every process instead of a run that hangs or learns from garbage.

TRL calls the reward functions and then gathers their rewards; a process whose function raises leaves the others waiting
there. A function wrapped by `checked` therefore never raises: it notes what went wrong and returns infinities, which it
allows no function to return otherwise. They reach every process with the rewards, at no cost while nothing fails, and
every process raises the same error.
"""

import asyncio
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable

from .deadline import Deadline, OutOfTime


SHOWN = 400  # characters of a text in an error
SEARCH_SECONDS = 30.0  # for the sample on which a function raised
LARGEST = torch.finfo(torch.float32).max  # TRL's rewards are float32


class RewardError(RuntimeError):
    """A reward function or model failed; the message names it, the sample and its texts. Raised on every process."""


class CheckedReward:
    """
    A reward function whose failures end the run on every process; see [`raise_failures`].

    Args:
        reward_func: function in TRL's reward-function signature.
        timeout: seconds that a call may take; `None`: no limit.

    Attributes:
        failure: what went wrong in the last call, if anything: a text, and the exception if there was one.
    """

    def __init__(self, reward_func: Callable, timeout: float | None = None):
        self.reward_func = reward_func
        self.timeout = timeout
        self.__name__ = get_callable_name(reward_func)
        self.failure: tuple[str, BaseException | None] | None = None

    def __call__(self, **columns: Any) -> list[float | None]:
        deadline = self._deadline(columns)
        try:
            with deadline:
                output = self._all(self.reward_func(**columns))
        except OutOfTime:
            output = None
        except (Exception, SystemExit) as error:
            return self._raised(error, self._find(type(error), columns), columns)
        return self._hung(deadline.stack, columns) if deadline.passed else self._values(output, columns)

    def _deadline(self, columns: dict[str, Any], raises: bool = True) -> Deadline:
        def describe(stack: str) -> str:
            self._hung(stack, columns)
            assert self.failure
            return f"{self.failure[0]}\nNothing could interrupt it: this process ends."

        return Deadline(self.timeout, describe, raises)

    @staticmethod
    def _all(output: Any) -> Any:
        """A generator has computed nothing yet."""
        return list(output) if isinstance(output, Iterator) else output

    def _find(self, kind: type[BaseException], columns: dict[str, Any]) -> int | None:
        """The sample that raises such an error alone, if there is time to find one."""
        for sample, alone in _one_by_one(columns):
            try:
                with self._deadline(alone):
                    self._all(self.reward_func(**alone))
            except OutOfTime:
                return None
            except (Exception, SystemExit) as error:
                if type(error) is kind:
                    return sample
        return None

    def _values(self, output: Any, columns: dict[str, Any]) -> list[float | None]:
        """What the function returned as Python numbers, or infinities."""
        self.failure = None
        size = _size(columns)
        if isinstance(output, Mapping | Set | str | bytes):
            what = f"returned a {type(output).__name__}, {_shown(output)}, instead of a list of {size} rewards in the "
            return self._fail(what + "order of the completions", None, columns)
        try:
            values = list(output)
        except TypeError:
            what = f"returned {_shown(output)} instead of a list of {size} rewards, one per completion"
            return self._fail(what, None, columns)
        if len(values) != size:
            what = f"returned {len(values)} rewards instead of {size}, one per completion"
            return self._fail(what, None, columns)
        rewards: list[float | None] = []
        for sample, value in enumerate(values):
            try:
                rewards.append(None if value is None else _number(value))
            except (TypeError, ValueError) as error:
                return self._fail(f"returned {_shown(value)}, {error}", sample, columns)
        return rewards

    def _raised(self, error: BaseException, sample: int | None, columns: dict[str, Any]) -> list[float | None]:
        trace = "".join(traceback.format_exception(error)).rstrip()
        return self._fail(f"raised {type(error).__name__}: {error}", sample, columns, trace, error)

    def _hung(self, stack: str, columns: dict[str, Any]) -> list[float | None]:
        what = f"did not return within reward_timeout = {self.timeout:g} s"
        where = f"Where it was then (most recent call last):\n{stack}" if stack else ""
        return self._fail(what, None, columns, where)

    def _fail(self, what, sample, columns, trace: str = "", error: BaseException | None = None) -> list[float | None]:
        texts = _texts(sample, columns["prompts"], columns["completions"]) if "prompts" in columns else ""
        self.failure = "\n".join(filter(None, [f"Reward function {self.__name__!r} {what}.", texts, trace])), error
        return [math.inf] * _size(columns)


class AsyncCheckedReward(CheckedReward):
    """The same for an `async` function, which stays one."""

    async def __call__(self, **columns: Any) -> list[float | None]:  # type: ignore[override]
        # An exception at the limit would hit whichever coroutine is running, so the time-out is asyncio's; the deadline
        # ends the process if its event loop is blocked, or the function goes on when it is cancelled.
        deadline = self._deadline(columns, raises=False)
        try:
            with deadline:
                async with asyncio.timeout(self.timeout) as limit:
                    output = self._all(await self.reward_func(**columns))
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            if limit.expired():
                stack = "".join(traceback.format_exception(error.__cause__ or error)).rstrip()
                return self._hung(stack, columns)
            return self._raised(error, await self._find(type(error), columns), columns)
        return self._hung(deadline.stack, columns) if deadline.passed else self._values(output, columns)

    async def _find(self, kind: type[BaseException], columns: dict[str, Any]) -> int | None:  # type: ignore[override]
        for sample, alone in _one_by_one(columns):
            try:
                with self._deadline(alone, raises=False):
                    async with asyncio.timeout(self.timeout):
                        self._all(await self.reward_func(**alone))
            except (Exception, SystemExit, asyncio.CancelledError) as error:
                if type(error) is kind:
                    return sample
        return None


def checked(reward_func: Any, timeout: float | None = None) -> Any:
    """Wrap a reward function so that [`raise_failures`] can end the run on every process.

    A failure is an exception, a call that takes too long, a result that is not one reward per completion, or a reward
    that is neither `None` nor a finite number. A call that nothing can interrupt ends the process (see
    [`~tic_grpo_trl.rewards.deadline`]). Which sample an exception belongs to is found by calling the function again,
    with one sample at a time, without `log_extra` and `log_metric`, and for 30 s at most: the run is ending, and only
    side effects of the function's own happen twice.

    Args:
        reward_func: function in TRL's reward-function signature, `async` or not, or a reward model.
        timeout: seconds that a call of a function may take; `None`: no limit.

    Returns:
        A callable of the same name and kind, which does not raise; a reward model as it is.
    """
    if isinstance(reward_func, nn.Module | CheckedReward):
        return reward_func
    kind = AsyncCheckedReward if is_async_callable(reward_func) else CheckedReward
    return kind(reward_func, timeout)


def raise_failures(reward_funcs: list, names: list[str], rewards: torch.Tensor, prompts: list, completions: list):
    """Raise on every process what went wrong on any; called on all of them, with the same rewards.

    Args:
        reward_funcs: the functions, `checked`, and reward models; length F.
        names: what TRL calls them, length F.
        rewards: gathered from all processes in their order, (processes · B, F). NaN stands for a function's `None`.
        prompts, completions: of this process, length B.

    Raises:
        RewardError: naming the function, the sample and its texts, and the process.
    """
    wrong = rewards.isinf()
    if not wrong.any():
        return
    state = PartialState()
    first = state.process_index * len(prompts)
    own = wrong[first : first + len(prompts)].cpu()
    failures: list[tuple[str, BaseException | None]] = []
    for column in own.any(dim=0).nonzero().flatten().tolist():
        failure = getattr(reward_funcs[column], "failure", None)
        if failure is None:
            sample = int(own[:, column].nonzero()[0])
            value = float(rewards[first + sample, column])
            failure = f"{names[column]!r} gave {value}.\n{_texts(sample, prompts, completions)}", None
        failures.append(failure)
    messages = [f"On process {state.process_index} of {state.num_processes}: {text}" for text, _ in failures]
    cause = next((error for _, error in failures if error is not None), None)
    raise RewardError("\n\n".join(gather_object(messages))) from cause


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError("which is a text, not a number")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError("which is not a number") from error
    if not abs(number) <= LARGEST:
        raise ValueError("which is not finite in float32; return None to leave a sample out")
    return number


def _size(columns: dict[str, Any]) -> int:
    """How many completions a call is about; an environment's own reward may be given the environments alone."""
    return len(columns["prompts"] if "prompts" in columns else columns["environments"])


def _one_by_one(columns: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The arguments of a call for each sample alone, until the time is up."""
    size = _size(columns)
    silent = {name: lambda *ignored: None for name in ("log_extra", "log_metric") if name in columns}
    until = time.monotonic() + SEARCH_SECONDS
    for sample in range(size):
        if time.monotonic() > until:
            return
        alone = {
            name: [column[sample]] if isinstance(column, list) and len(column) == size else column
            for name, column in columns.items()
        }
        yield sample, alone | silent


def _texts(sample: int | None, prompts: list, completions: list) -> str:
    shown = sample or 0
    where = f"Sample {shown} of {len(prompts)}" + (", the batch's first" if sample is None else "")
    return f"{where}\n  prompt: {_shown(_text(prompts[shown]))}\n  completion: {_shown(_text(completions[shown]))}"


def _text(messages: Any) -> Any:
    """Of a conversation, the last message's content."""
    return messages[-1].get("content") if isinstance(messages, list) and messages else messages


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
