"""Limit the wall-clock time of a call, whatever it is stuck in.

Three mechanisms are needed, because each covers cases that the others cannot:

1. In the main thread, where a trainer calls reward functions, a signal handler raises an exception. It ends sleeps,
   socket reads, locks and endless loops. A thread sends the signal. A timer of the kernel sends it too, for code that
   never releases the interpreter, such as a regular expression.
2. A call that no signal interrupts (C code that does not return, a blocked event loop) ends the process with a message
   after `GRACE` more seconds. The launcher then ends the other processes.
3. If the call holds the interpreter lock too, `faulthandler` ends the process. It prints the stack but no message.
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


GRACE = 30.0  # seconds from the limit to the end of the process, and again until `faulthandler` ends it
AGAIN = 1.0  # seconds between signals, because the call may swallow the exception
SIGNAL = signal.SIGVTALRM  # many reward functions use SIGALRM themselves, math-verify's timeouts among them

_active: list["Deadline"] = []


class OutOfTime(BaseException):
    """Raised at the limit. Holds the stack as text. Not an `Exception`, because functions catch those and continue."""


class Deadline:
    """Limit the seconds spent inside this context, and leave it with [`OutOfTime`] if it took longer."""

    def __init__(self, seconds: float | None, describe: Callable[[str], str], raises: bool = True):
        self.seconds = seconds
        self.describe = describe  # makes the message printed before the process is ended, from the call's stack
        # interrupt the call at the limit, which works only in the main thread, where signal handlers run
        self.raises = raises and threading.current_thread() is threading.main_thread()
        self.stack = ""
        self._done = threading.Event()

    def __enter__(self) -> "Deadline":
        if self.seconds is None:
            return self
        self.at = time.monotonic() + self.seconds
        self._thread = threading.get_ident()
        self._caller: FrameType | None = sys._getframe(1)
        _active.append(self)
        _arm_last_resort()
        if self.raises:
            signal.signal(SIGNAL, raise_out_of_time)  # stays installed: by default a late signal ends the process
            signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds, AGAIN)  # counts processor time
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any):
        if self.seconds is None:
            return
        _active.remove(self)  # from here on the signal handler does nothing
        self._done.set()
        if self.raises:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _arm_last_resort()
        self._caller = None
        if time.monotonic() >= self.at and kind in (None, OutOfTime):
            raise OutOfTime(self.stack) from None

    def record_stack(self, frame: FrameType | None):
        """Store the stack below the function that entered the context, unless one is stored already."""
        inner = itertools.takewhile(lambda entry: entry[0] is not self._caller, traceback.walk_stack(frame))
        handler = raise_out_of_time.__code__  # interrupted by another signal
        frames = traceback.StackSummary.extract(entry for entry in inner if entry[0].f_code is not handler)
        self.stack = self.stack or "".join(reversed(frames.format())).rstrip()

    def _watch(self):
        wait = self.at - time.monotonic()
        while not self._done.wait(wait):
            if time.monotonic() >= self.at + GRACE:
                self.record_stack(sys._current_frames().get(self._thread))
                if sys.__stderr__ is not None:
                    print(self.describe(self.stack), file=sys.__stderr__, flush=True)
                os._exit(1)
            if self.raises:
                signal.pthread_kill(self._thread, SIGNAL)
            wait = min(AGAIN, GRACE)


def raise_out_of_time(number: int, frame: FrameType | None):
    """Handle the signal: raise in the call whose time is up."""
    for deadline in _active:
        if deadline.raises and time.monotonic() >= deadline.at:
            deadline.record_stack(frame)
            raise OutOfTime


def _arm_last_resort():
    if sys.__stderr__ is None:
        return
    faulthandler.cancel_dump_traceback_later()
    if _active:
        seconds = min(deadline.at for deadline in _active) + 2 * GRACE - time.monotonic()
        faulthandler.dump_traceback_later(max(seconds, 0.001), exit=True, file=sys.__stderr__)
