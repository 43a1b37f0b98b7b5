"""Check reward_timeout: a hanging reward function ends the run whatever it is stuck in; others are unaffected."""

import asyncio
import contextlib
import ctypes
import faulthandler
import functools
import itertools
import multiprocessing
import os
import re
import signal
import threading
import time

import conftest
import pytest
from conftest import count_a, make_trainer
from test_failures import batch, score
from trl.trainer.utils import is_async_callable

from tic_grpo_trl.rewards import RewardError, checked, deadline


LIMIT = 0.3  # seconds
END = 120.0  # everything ends before this, even on a busy machine


def sleeps(**kwargs):
    time.sleep(END)


def loops(**kwargs):
    for _ in itertools.count():
        pass


def waits_for_a_lock(**kwargs):
    threading.Event().wait(END)


def backtracks(**kwargs):
    re.match(r"(a+)+$", "a" * 60 + "b")  # never releases the interpreter lock


def catches_everything(**kwargs):
    try:
        time.sleep(END)
    except BaseException:
        return [1.0] * 3


def catches_exceptions(**kwargs):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(END)


def hangs_in_a_generator(completions, **kwargs):
    return (time.sleep(END) for _ in completions)


async def waits(**kwargs):
    async def for_a_judge():
        await asyncio.sleep(END)

    await for_a_judge()


async def turns_its_cancellation_into_an_error(**kwargs):
    try:
        await asyncio.sleep(END)
    except asyncio.CancelledError:
        raise KeyError("answer") from None


HANGS = {
    sleeps: "time.sleep(END)",
    loops: "in loops",
    waits_for_a_lock: "threading.Event().wait(END)",
    backtracks: 're.match(r"(a+)+$"',
    catches_everything: "time.sleep(END)",
    catches_exceptions: "time.sleep(END)",
    hangs_in_a_generator: "time.sleep(END) for _ in completions",
    waits: "await asyncio.sleep(END)",
}


def call(function, columns):
    """Return the rewards, the failure and the seconds taken."""
    limited = checked(function, LIMIT)
    start = time.monotonic()
    one = functools.partial(limited, **columns)
    values = asyncio.run(one()) if is_async_callable(function) else one()
    return values, limited.failure, time.monotonic() - start


@pytest.mark.parametrize("function", HANGS)
def test_a_function_that_hangs_is_interrupted(function):
    values, failure, seconds = call(function, batch())
    assert values == [float("inf")] * 3
    message, error = failure
    assert error is None
    assert message.startswith(
        f"Reward function '{function.__name__}' did not return within reward_timeout = 0.3 s.\n"
        "Sample 0 of 3 (the first of the batch)\n  prompt: 'prompt 0'\n  completion: 'completion 0'\n"
        "Its stack at that time (most recent call last):\n"
    )
    assert HANGS[function] in message
    assert "in raise_out_of_time" not in message
    assert LIMIT <= seconds < END / 2


def test_nothing_is_left_in_force():
    call(sleeps, batch())
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert not deadline._active
    signal.raise_signal(deadline.SIGNAL)  # a late one
    for _ in range(100):  # the watcher threads end with their calls
        if not any("_watch" in thread.name for thread in threading.enumerate()):
            break
        time.sleep(0.1)
    assert not any("_watch" in thread.name for thread in threading.enumerate())


def test_a_function_in_time_is_unaffected():
    before = threading.active_count()
    assert score_in_time(count_a, None) == score_in_time(count_a, END)
    assert threading.active_count() <= before + 1

    async def judge(completions, **kwargs):
        await asyncio.sleep(0)
        return count_a(completions)

    assert score_in_time(judge, END) == score_in_time(count_a, None)


def score_in_time(function, limit):
    columns = batch() | {"completions": ["a b", "a a", "c"]}
    return score(checked(function, limit), columns)


def test_a_function_with_an_alarm_of_its_own():
    """Reward functions may use SIGALRM, as math-verify's timeouts do."""
    rang = []

    def alarmed(completions, **kwargs):
        before = signal.signal(signal.SIGALRM, lambda *ignored: rang.append(True))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.2)
        signal.signal(signal.SIGALRM, before)
        return [1.0] * len(completions)

    assert score(checked(alarmed, END), batch()) == [1.0] * 3
    assert rang == [True]


def test_an_error_before_the_limit_is_that_error():
    async def cancelled(**kwargs):
        raise asyncio.CancelledError

    async def own_limit(**kwargs):
        await asyncio.wait_for(asyncio.sleep(END), 0.01)

    def leaves(**kwargs):
        raise SystemExit(0)

    for function, name in ((cancelled, "CancelledError"), (own_limit, "TimeoutError"), (leaves, "SystemExit: 0")):
        with pytest.raises(RewardError, match=f"'{function.__name__}' raised {name}") as caught:
            score(checked(function, END), batch())
        assert "Sample 0 of 3\n" in str(caught.value)
    message = call(turns_its_cancellation_into_an_error, batch())[1][0]
    assert "raised KeyError" in message or "did not return" in message


def test_the_search_for_the_sample_that_raised_has_the_limit_too():
    def hangs_alone(completions, **kwargs):
        if len(completions) > 1:
            raise KeyError("answer")
        time.sleep(END)

    values, failure, seconds = call(hangs_alone, batch())
    assert values == [float("inf")] * 3
    assert "raised KeyError: 'answer'" in failure[0]
    assert "the first of the batch" in failure[0]
    assert seconds < END / 2


# Calls that only the end of the process stops


def blocked_in_c(library):
    """Return a function that blocks in C, where no signal interrupts it, by locking a mutex twice."""

    def my_reward(**kwargs):
        lock = ctypes.create_string_buffer(128)
        library(None).pthread_mutex_lock(lock)
        library(None).pthread_mutex_lock(lock)

    return my_reward


async def blocks_its_event_loop(**kwargs):
    time.sleep(END)


async def does_not_let_itself_be_cancelled(**kwargs):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(END)


def swallows_for_ever(**kwargs):
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(END)


UNSTOPPABLE = {
    "in C": (blocked_in_c(ctypes.CDLL), "pthread_mutex_lock(lock)"),
    "event loop": (blocks_its_event_loop, "time.sleep(END)"),
    "cancellation": (does_not_let_itself_be_cancelled, "in _run_once"),
    "swallows": (swallows_for_ever, "time.sleep(END)"),
}


def ended(function, log) -> int:
    """Call the function in another process that prints to `log`; return its exit code."""

    def run():
        with open(log, "w") as output:
            os.dup2(output.fileno(), 2)
        deadline.GRACE = deadline.AGAIN = 0.3
        call(function, batch())
        os._exit(17)  # it came back

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(END)
    process.kill()
    return process.exitcode


@pytest.mark.parametrize("kind", UNSTOPPABLE)
def test_what_nothing_interrupts_ends_the_process(kind, tmp_path):
    function, where = UNSTOPPABLE[kind]
    assert ended(function, tmp_path / "log.txt") == 1
    log = (tmp_path / "log.txt").read_text()
    assert f"Reward function '{function.__name__}' did not return within reward_timeout = 0.3 s." in log
    assert "  prompt: 'prompt 0'\n  completion: 'completion 0'\n" in log
    assert where in log
    assert log.endswith("Nothing could interrupt it, so this process ends.\n")


def test_what_holds_the_interpreter_lock_ends_the_process_with_its_stack(tmp_path):
    was_on = faulthandler.is_enabled()
    assert ended(blocked_in_c(ctypes.PyDLL), tmp_path / "log.txt") == 1
    log = (tmp_path / "log.txt").read_text()
    assert "Timeout (0:00:00" in log
    assert "in my_reward" in log
    assert faulthandler.is_enabled() == was_on


# In training


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_training_ends_with_the_error(tmp_path, monkeypatch, kind):
    calls = []

    def slow(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 3:
            time.sleep(END)
        return count_a(completions)

    async def slow_judge(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 3:
            await asyncio.sleep(END)
        return count_a(completions)

    function = slow if kind == "sync" else slow_judge
    monkeypatch.setattr(conftest, "count_a", function)
    trainer = make_trainer(tmp_path, reward_timeout=2.0)
    with pytest.raises(
        RewardError, match=f"'{function.__name__}' did not return within reward_timeout = 2 s"
    ) as caught:
        trainer.train()
    assert "sleep(END)" in str(caught.value)
    assert trainer.state.global_step == 2
    assert calls == [8, 8, 8]
