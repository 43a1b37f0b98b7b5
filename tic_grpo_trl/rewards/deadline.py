"""A limit in wall-clock time for a call, whatever it is stuck in.

Three means, because each has cases which the others cannot reach:

1. In the main thread, where a trainer calls reward functions, a signal whose handler raises: it ends sleeps, reads from
   sockets, locks and endless loops. A thread sends it; a timer of the kernel's does while the call computes without
   releasing the interpreter, as a regular expression does. The signal is SIGVTALRM, since many reward functions use
   SIGALRM themselves.
2. What no signal ends (a call into C that does not come back, an event loop that is blocked) ends the process, with a
   message, once some more time has passed: a launcher then ends the other processes.
3. If not even that thread runs, because the call holds the interpreter, `faulthandler` ends the process: it can print
   the stack, but no message.
"""

import faulthandler
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any


GRACE = 30.0  # seconds from the limit to the end of the process; the same again until `faulthandler` ends it
AGAIN = 1.0  # seconds between two signals: code may swallow what the handler raises
SIGNAL = signal.SIGVTALRM

_deadlines: list["Deadline"] = []  # in force


class OutOfTime(BaseException):
    """Raised inside a call at its limit. No `Exception`: functions catch those and go on."""


class Deadline:
    """
    Context in which a call may take so many seconds.

    Args:
        seconds: the limit; `None` for none, at no cost.
        describe: what to print before the process is ended, given the stack as text.
        raises: raise [`OutOfTime`] at the limit; only in the main thread, where handlers of signals run.

    Attributes:
        passed: after the context, whether it took longer than the limit.
        stack: where the call was at its limit, from the function that entered the context on; empty before.
    """

    def __init__(self, seconds: float | None, describe: Callable[[str], str], raises: bool = True):
        self.seconds = seconds
        self.passed = False
        self.stack = ""
        self._describe = describe
        self._thread = threading.get_ident()
        self.raises = raises and threading.current_thread() is threading.main_thread()
        self._done = threading.Event()

    def __enter__(self) -> "Deadline":
        if self.seconds is None:
            return self
        self.at = time.monotonic() + self.seconds
        self._caller: FrameType | None = sys._getframe(1)
        _deadlines.append(self)
        _set_last_resort()
        if self.raises:
            signal.signal(SIGNAL, handle)  # left in place: without one a signal that comes late ends the process
            signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds, AGAIN)  # of the time that the process computes
        threading.Thread(target=self._watch, args=(self.seconds,), daemon=True).start()
        return self

    def __exit__(self, *error: Any):
        if self.seconds is None:
            return
        _deadlines.remove(self)  # from here on the handler raises nothing
        self._done.set()
        if self.raises:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _set_last_resort()
        self.passed = time.monotonic() >= self.at
        self._caller = None

    def note(self, frame: FrameType | None):
        """Keep where the call is, if that is not known yet."""
        inner = itertools.takewhile(lambda entry: entry[0] is not self._caller, traceback.walk_stack(frame))
        own = handle.__code__  # of a signal that came while another was being handled
        frames = traceback.StackSummary.extract(entry for entry in inner if entry[0].f_code is not own)
        frames.reverse()  # innermost last, as in a traceback
        self.stack = self.stack or "".join(frames.format()).rstrip()

    def _watch(self, seconds: float):
        if self._done.wait(seconds):
            return
        while time.monotonic() < self.at + GRACE:
            if self.raises:
                signal.pthread_kill(self._thread, SIGNAL)
            if self._done.wait(min(AGAIN, GRACE)):
                return
        self.note(sys._current_frames().get(self._thread))
        if sys.__stderr__ is not None:
            print(self._describe(self.stack), file=sys.__stderr__, flush=True)
        os._exit(1)


def handle(number: int, frame: FrameType | None):
    """The signal's handler: end the call whose time is up."""
    for deadline in _deadlines:
        if deadline.raises and time.monotonic() >= deadline.at:
            deadline.note(frame)
            raise OutOfTime


def _set_last_resort():
    if sys.__stderr__ is None:
        return
    faulthandler.cancel_dump_traceback_later()
    if _deadlines:
        seconds = min(deadline.at for deadline in _deadlines) + 2 * GRACE - time.monotonic()
        faulthandler.dump_traceback_later(max(seconds, 0.001), exit=True, file=sys.__stderr__)
