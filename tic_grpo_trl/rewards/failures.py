"""Turn a failing reward function into one clear error on every process, instead of a hang or bad rewards.

TRL calls the reward functions and then gathers their rewards. If a function raised in one process, the others would
wait. So a function wrapped by `checked` never raises: it records what went wrong and returns infinities, which are not
valid rewards. They reach every process with the gathered rewards, and every process raises the same error.
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


MAX_SHOWN = 400  # characters of a value in an error message
SEARCH_SECONDS = 30.0  # for finding the sample on which a function raised
LARGEST = torch.finfo(torch.float32).max  # TRL's rewards are float32
FAILURES = (Exception, SystemExit, asyncio.CancelledError)


class RewardError(RuntimeError):
    """Raised on every process when a reward function or model fails. Names the function, the prompt and completion."""


class CheckedReward:
    """Call a reward function without ever raising; [`raise_failures`] ends the run later."""

    def __init__(self, reward_func: Callable, timeout: float | None):
        self.reward_func, self.timeout = reward_func, timeout
        self.__name__ = get_callable_name(reward_func)
        # of the last call: a message, and the exception if there was one
        self.failure: tuple[str, BaseException | None] | None = None

    def __call__(self, **columns: Any) -> list[float | None]:
        result = self._call(columns)
        for sample, alone in _single_samples(columns) if isinstance(result, FAILURES) else ():
            if type(self._call(alone)) is type(result):
                return self._finish(result, columns, sample)
        return self._finish(result, columns)

    def _call(self, columns: dict[str, Any]) -> Any:
        """Return the checked rewards, or the exception that was raised."""
        try:
            with self._deadline(columns):
                output = _evaluate(self.reward_func(**columns))
            return self._check(output, columns)
        except (*FAILURES, OutOfTime) as error:
            return error

    def _finish(self, result: Any, columns: dict[str, Any], sample: int | None = None) -> list[float | None]:
        """Return the rewards, or record the exception and the sample that raises it alone."""
        if isinstance(result, OutOfTime):
            return self._fail_in_time(str(result), columns)
        if isinstance(result, FAILURES):
            return self._fail(f"raised {type(result).__name__}: {result}", columns, sample, _format(result), result)
        return result

    def _check(self, output: Any, columns: dict[str, Any]) -> list[float | None]:
        self.failure, size = None, _batch_size(columns)
        try:
            if isinstance(output, Mapping | Set | str | bytes):
                raise TypeError
            values = list(output)
        except TypeError:
            what = f"returned a {type(output).__name__}, {shorten(output)}, instead of a list of {size} rewards in the "
            return self._fail(what + "order of the completions", columns)
        if len(values) != size:
            return self._fail(f"returned {len(values)} rewards instead of {size}, one per completion", columns)
        rewards: list[float | None] = []
        for sample, value in enumerate(values):
            try:
                rewards.append(None if value is None else _to_float(value))
            except (TypeError, ValueError) as error:
                return self._fail(f"returned {shorten(value)}, {error}", columns, sample)
        return rewards

    def _fail(self, what, columns, sample=None, details="", error=None) -> list[float | None]:
        where = describe_sample(sample, columns["prompts"], columns["completions"]) if "prompts" in columns else ""
        self.failure = "\n".join(filter(None, [f"Reward function {self.__name__!r} {what}.", where, details])), error
        return [math.inf] * _batch_size(columns)

    def _fail_in_time(self, stack: str, columns: dict[str, Any]) -> list[float | None]:
        what = f"did not return within reward_timeout = {self.timeout:g} s"
        return self._fail(what, columns, details=stack and f"Its stack at that time (most recent call last):\n{stack}")

    def _deadline(self, columns: dict[str, Any], raises: bool = True) -> Deadline:
        def describe(stack: str) -> str:
            self._fail_in_time(stack, columns)
            message, _ = self.failure or ("", None)
            return f"{message}\nNothing could interrupt it, so this process ends."

        return Deadline(self.timeout, describe, raises)


class AsyncCheckedReward(CheckedReward):
    """Do the same for an `async` function, which stays one."""

    async def __call__(self, **columns: Any) -> list[float | None]:  # type: ignore[override]
        result = await self._call(columns)
        for sample, alone in _single_samples(columns) if isinstance(result, FAILURES) else ():
            if type(await self._call(alone)) is type(result):
                return self._finish(result, columns, sample)
        return self._finish(result, columns)

    async def _call(self, columns: dict[str, Any]) -> Any:
        # An exception raised by a signal would hit whichever coroutine is running, so asyncio limits the time. The
        # deadline ends the process if the event loop is blocked or the function ignores its cancellation.
        limit = asyncio.timeout(self.timeout)
        try:
            with self._deadline(columns, raises=False):
                async with limit:
                    output = _evaluate(await self.reward_func(**columns))
            return self._check(output, columns)
        except OutOfTime as late:
            return late
        except FAILURES as error:
            return OutOfTime(_format(error.__cause__ or error)) if limit.expired() else error


def checked(reward_func: Any, timeout: float | None = None) -> Any:
    """Wrap a reward function so that [`raise_failures`] can end the run on every process.

    A failure is an exception, a call that takes too long, a result that is not one reward per completion, or a reward
    that is neither `None` nor a finite number. A call that nothing can interrupt ends the process (see
    [`~tic_grpo_trl.rewards.deadline`]). To find the sample that raised, the function is called again with one sample at
    a time, without `log_extra` and `log_metric`, for at most 30 s. The run is ending anyway, but the function's own
    side effects can happen twice.

    Args:
        reward_func: function in TRL's reward-function signature, `async` or not, or a reward model.
        timeout: seconds per call of a function; `None` for no limit.

    Returns:
        A callable of the same name and kind that does not raise. A reward model is returned unchanged.
    """
    if isinstance(reward_func, nn.Module | CheckedReward):
        return reward_func
    kind = AsyncCheckedReward if is_async_callable(reward_func) else CheckedReward
    return kind(reward_func, timeout)


def raise_failures(reward_funcs: list, names: list[str], rewards: torch.Tensor, prompts: list, completions: list):
    """Raise one [`RewardError`] on every process if the gathered rewards (processes · B, F) hold an infinity.

    Call it on every process, with its own (B,) prompts and completions. NaN stands for a function's `None`.
    """
    invalid = rewards.isinf()
    if not invalid.any():
        return
    state = PartialState()
    first = state.process_index * len(prompts)
    own = invalid[first : first + len(prompts)].cpu()
    failures: list[tuple[str, BaseException | None]] = []
    for column in own.any(dim=0).nonzero().flatten().tolist():
        failure = getattr(reward_funcs[column], "failure", None)
        if failure is None:
            sample = int(own[:, column].nonzero()[0])
            value = float(rewards[first + sample, column])
            failure = f"{names[column]!r} returned {value}.\n{describe_sample(sample, prompts, completions)}", None
        failures.append(failure)
    messages = [f"On process {state.process_index} of {state.num_processes}: {text}" for text, _ in failures]
    cause = next((error for _, error in failures if error is not None), None)
    raise RewardError("\n\n".join(gather_object(messages))) from cause


def shorten(value: Any) -> str:
    """Return the `repr` of a value, with the middle left out if it is longer than `MAX_SHOWN`."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} … {text[-MAX_SHOWN // 2 :]}"


def describe_sample(index: int | None, prompts: list, completions: list) -> str:
    """Return the lines of an error message that show a sample; `None` stands for the whole batch."""
    shown = index or 0
    where = f"Sample {shown} of {len(prompts)}" + (" (the first of the batch)" if index is None else "")
    prompt, completion = (
        shorten(text[-1].get("content") if isinstance(text, list) and text else text)  # a conversation's last message
        for text in (prompts[shown], completions[shown])
    )
    return f"{where}\n  prompt: {prompt}\n  completion: {completion}"


def _format(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _evaluate(output: Any) -> Any:
    return list(output) if isinstance(output, Iterator) else output


def _to_float(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError("which is a string, not a number")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError("which is not a number") from error
    if not abs(number) <= LARGEST:
        raise ValueError("which is not finite in float32; return None to skip a sample")
    return number


def _batch_size(columns: dict[str, Any]) -> int:
    """Return the number of completions. TRL calls an environment's own reward with the environments alone."""
    return len(columns["prompts"] if "prompts" in columns else columns["environments"])


def _single_samples(columns: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the arguments of a call for each sample alone, for at most `SEARCH_SECONDS`."""
    size = _batch_size(columns)
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
