"""Started by killing.py with a folder: imports everything once, then forks a training process, which is there to be
killed, for every job that it finds in that folder. A job is the example script's flags."""

import itertools
import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from on_cpu import describe, prepare, split_every_parameter
from tqdm import auto, tqdm
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.carry_over.pool import Response
from tic_grpo_trl.scripts import train as train_script
from tic_grpo_trl.starter import STARTER_MODEL


RANK = int(os.environ.get("RANK", "0"))


class WatchedTrainer(TICGRPOTrainer):
    """Keeps a small file that says what it is doing: `STEP PHASE`, with the optimizer steps that are over; `last` is
    the one that `main` has made."""

    last: "WatchedTrainer"

    def __init__(self, *args, **kwargs):
        WatchedTrainer.last = self
        self.times = []  # (steps that are over, phase, seconds since the process was forked)
        self._phases = ["start"]
        super().__init__(*args, **kwargs)

    @contextmanager
    def _phase(self, name):
        self._phases.append(name)
        self._show()
        try:
            yield
        finally:
            self._phases.pop()
            self._show()

    def _show(self):
        step, name = self.state.global_step, self._phases[-1]
        self.times.append((step, name, time.monotonic() - forked))
        os.pwrite(phase_file, f"{step} {name:<20}".encode(), 0)

    @property
    def is_saving(self) -> bool:
        return self._phases[-1] == "saving"

    @property
    def is_generating(self) -> bool:
        return self._phases[-1] == "generation"

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._phases[0] = "between"
        with self._phase(f"update_{self.schedule.at(self._step).update + 1}"):
            return super().training_step(model, inputs, num_items_in_batch)

    def _start_rollout(self, generation_batch):
        with self._phase("generation"):
            super()._start_rollout(generation_batch)

    def _evaluate(self, *args, **kwargs):
        with self._phase("evaluation"):
            return super()._evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        with self._phase("saving"):
            super()._save_checkpoint(*args, **kwargs)

    def train(self, *args, **kwargs):
        self._phases[0] = "loading"
        self._show()
        output = super().train(*args, **kwargs)
        described = describe(self) if dist.is_initialized() else {}
        if RANK == 0:
            (job / "ended.json").write_text(json.dumps(described | {"times": self.times}))
        return output


def die_at_rename(number):
    """Before the so-many-th time that a save gives a file or folder another name."""
    names = itertools.count(1)

    def watch(event, args):
        if event == "os.rename" and WatchedTrainer.last.is_saving and next(names) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def die_at_call(owner, name, number):
    """Before a method of a class runs for the so-many-th time in the generation of a rollout."""
    method, calls = getattr(owner, name), itertools.count(1)

    def watched(*args, **kwargs):
        if WatchedTrainer.last.is_generating and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    setattr(owner, name, watched)


def use_own_lock(bars, lock):
    """Let a kind of progress bars and all made of it have another lock than their own, which is one semaphore for all
    processes that were forked from one: whoever is killed while holding it keeps it for ever."""
    bars.set_lock(lock)
    for kind in bars.__subclasses__():
        use_own_lock(kind, lock)


def train(flags):
    """What a training process does, from its first line on."""
    log = os.open(job / f"log-{RANK}.txt", os.O_WRONLY | os.O_CREAT)
    for output in (1, 2):
        os.dup2(log, output)
    use_own_lock(tqdm, threading.RLock())
    if "DIE_WITH_LOCK" in os.environ:
        auto.tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    prepare()
    train_script.TICGRPOTrainer = WatchedTrainer
    parser = TrlParser((train_script.TrainArguments, TICGRPOConfig, ModelConfig))
    parsed = parser.parse_args_and_config(flags)
    split_every_parameter(parsed[1])
    if "DIE_AT_RENAME" in os.environ:
        die_at_rename(int(os.environ["DIE_AT_RENAME"]))
    trainer = train_script.build_trainer(*parsed)
    if "DIE_AT_TOKEN" in os.environ:
        die_at_call(type(trainer.model), "prepare_inputs_for_generation", int(os.environ["DIE_AT_TOKEN"]))
    if "DIE_AT_WRITE" in os.environ:
        die_at_call(Response, "write", int(os.environ["DIE_AT_WRITE"]))
    train_script.train(trainer, parsed[0].dataset_name)


folder = Path(sys.argv[1])
AutoModelForCausalLM.from_pretrained(STARTER_MODEL)  # what every process would otherwise read and look up first
for job in (folder / f"job-{number}" for number in itertools.count()):
    while not (job / "job.json").exists():
        time.sleep(0.01)
    wanted = json.loads((job / "job.json").read_text())
    if wanted is None:
        break
    forked = time.monotonic()
    phase_file = os.open(job / f"phase-{RANK}", os.O_WRONLY | os.O_CREAT)
    os.pwrite(phase_file, b"0 start", 0)
    child = os.fork()
    if child == 0:
        os.environ |= wanted["environment"]
        train(wanted["flags"])
        sys.exit()
    os.close(phase_file)
    (job / f"pid-{RANK}").write_text(str(child))
    _, status = os.waitpid(child, 0)
    (job / f"status-{RANK}").write_text(str(status))
