"""Stop on SIGTERM or Ctrl-C: finish the update, save a checkpoint and exit with an error code.

transformers' `enable_jit_checkpoint` saves in the middle of an update and then lets `train()` return as if training had
finished, so it is replaced.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NoReturn

import torch
from tqdm.auto import tqdm
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# accelerate or torchrun has started this process. Read early: some versions of transformers set one of them themselves.
IS_LAUNCHED = not os.environ.keys().isdisjoint(("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
SAME_SIGNAL = 2.0  # seconds in which a signal may arrive twice, from the launcher and from the terminal


class Cause(IntEnum):
    """Name why a run stops. Where processes disagree, the largest counts."""

    NONE = 0
    CTRL_C = signal.SIGINT
    SIGTERM = signal.SIGTERM
    LAUNCHER = 64  # it has ended, and nobody waits for this process any more


REASONS = {Cause.CTRL_C: "by Ctrl-C", Cause.SIGTERM: "by SIGTERM", Cause.LAUNCHER: "because the launcher has ended"}
NOTICES = {
    Cause.CTRL_C: "Ctrl-C: stopping after this update and saving; press again to stop at once without saving.",
    Cause.SIGTERM: "SIGTERM: stopping after this update and saving.",
}


class Interruption:
    """Turn a signal into a checkpoint and an exception that no script mistakes for the end of training.

    `accelerate launch` with one process dies of a SIGTERM without passing it on, so a launched process also stops when
    its parent has changed.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._process, self._parent = os.getpid(), os.getppid()
        self._cause, self._since = Cause.NONE, 0.0
        self._previous: dict[int, Any] = {}  # handlers by signal, while ours are installed
        if (theirs := trainer.pop_callback(JITCheckpointCallback)) is not None:
            theirs.on_train_end(trainer.args, trainer.state, trainer.control)  # restores its signal handler
            trainer.args.notes.append("enable_jit_checkpoint is not needed: SIGTERM and Ctrl-C always save.")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note signals instead of acting on them, in a `with` block that calls [`act`] after every update.

        Other threads than the main one can't handle signals, and ignored signals stay ignored.
        """
        self._process, self._cause = os.getpid(), Cause.NONE
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            self._restore_handlers()
        if self._cause in (Cause.CTRL_C, Cause.SIGTERM):  # it came after the last update
            signal.raise_signal(self._cause)

    def _restore_handlers(self):
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, frame: Any):
        if os.getpid() != self._process:  # a fork, such as a data loader's worker; its parent decides about Ctrl-C
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        elif self._cause is Cause.NONE:
            self._cause, self._since = Cause(number), time.monotonic()
            if self._trainer.is_world_process_zero():
                os.write(2, f"\n{NOTICES[self._cause]}\n".encode())  # `print` fails inside another `print`
        elif number == signal.SIGINT and (not IS_LAUNCHED or time.monotonic() - self._since > SAME_SIGNAL):
            self._restore_handlers()
            signal.raise_signal(number)

    def _agreed(self) -> Cause:
        """Return the cause that any process has, the same on all of them."""
        accelerator = self._trainer.accelerator
        orphaned = IS_LAUNCHED and os.getppid() != self._parent
        own = self._cause or (Cause.LAUNCHER if orphaned else Cause.NONE)
        if accelerator.num_processes == 1:
            return own
        return Cause(int(accelerator.gather(torch.tensor([own], device=accelerator.device)).max()))

    def act(self, model: Any, trial: Any):
        """Save a checkpoint and raise, if a process was told to stop; called by all processes after an update.

        Raise:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: with code 143 after a SIGTERM, or if the launcher has ended.
        """
        trainer = self._trainer
        if (cause := self._agreed()) is Cause.NONE:
            return
        if trainer.checkpoints.saved_step != trainer.state.global_step:
            trainer._save_checkpoint(model, trial)
            trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        trainer.accelerator.wait_for_everyone()  # torchrun kills the others when the first one exits
        if trainer.accelerator.num_processes > 1:
            trainer.accelerator.end_training()  # communication ends in order before the processes do
        self._stop(cause, trainer._get_output_dir(trial))

    def _stop(self, cause: Cause, run_dir: str) -> NoReturn:
        state, args = self._trainer.state, self._trainer.args
        if state.is_world_process_zero:
            resume = "continue with --resume_from_checkpoint true (or trainer.train(resume_from_checkpoint=True))"
            if args.save_only_model:
                resume = "it has no optimizer state (save_only_model=True), so the run can't be continued exactly"
            saved = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            done = f"after update {state.global_step} of {state.max_steps}"
            tqdm.write(f"Stopped {REASONS[cause]} {done}. Saved {saved}; {resume}.", file=sys.stderr)
        if cause is Cause.CTRL_C:
            raise KeyboardInterrupt
        sys.exit(128 + signal.SIGTERM)  # not `raise SystemExit`: wandb notes the code of sys.exit
