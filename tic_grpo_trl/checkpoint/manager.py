"""Writing of checkpoints, which are complete as soon as they are visible, and exact resuming from them.

A checkpoint is written to `.saving` and renamed when all processes have written their part. transformers saves weights,
optimizer and random states. This package adds the state of every object that a run needs to continue: the current
rollout with its old log-probabilities, counters, metrics that have not been logged, the position in the data. Weights,
logs and completions of the resumed run are then equal bit for bit to those of a run that was never stopped, on the same
hardware with the same number of processes; times are not. State outside the trainer is not saved: the random state of a
vLLM engine, environments, the state of reward functions.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import TICGRPOConfig
from . import storage
from .changed_settings import Changes
from .output_lock import locked
from .run_state import DataPosition, ReferenceModel


logger = get_logger(__name__)


@dataclass
class Save:
    """Describe a checkpoint that is being written to `folder`, and will be moved to `target`."""

    folder: Path
    target: Path
    pushes: bool = False  # to the hub, when it is complete


@dataclass
class CheckpointManager:
    """Write, choose and read the checkpoints of a run."""

    args: TICGRPOConfig
    accelerator: Accelerator
    model: Callable[[], PreTrainedModel]
    settings: Callable[[], dict[str, Any]]  # for the manifest
    position: DataPosition
    rollout: Any
    others: dict[str, Any]  # the other objects with a state, by name
    reference: ReferenceModel | None  # if it changes

    def __post_init__(self):
        self.objects = {"position": self.position, "rollout": self.rollout} | self.others
        self.save: Save | None = None
        self.saved_step = -1  # of the newest checkpoint that this call of `train()` has written
        self._read: dict[str, Any] = {}  # state of this process by object, between reading and restoring it

    def _state_path(self, folder: Path) -> Path:
        return folder / f"tic_grpo_state_{self.accelerator.process_index}.pt"

    def output_dir(self, run_dir: str) -> str:
        """Return the folder in which transformers should write: `.saving` for a checkpoint, otherwise the run's."""
        return run_dir if self.save is None else os.path.join(run_dir, storage.STAGING)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep other runs out of the output folder in a `with` block around a call of `train()`."""
        self.saved_step = -1
        if (carry_over := self.objects.get("carry_over")) is not None:
            carry_over.reset()  # what an earlier call of `train()` has left
        with locked(Path(str(self.args.output_dir)), self.accelerator):
            yield

    @contextmanager
    def saving(self, run_dir: str, state: TrainerState) -> Iterator[Save]:
        """Write a checkpoint in a `with` block whose body lets transformers write its part."""
        folder, name = Path(run_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.accelerator.is_local_main_process:
            shutil.rmtree(folder / storage.STAGING, ignore_errors=True)  # left by interrupted saves
        self.accelerator.wait_for_everyone()
        self.save = save = Save(folder / storage.STAGING / name, folder / name)
        try:
            yield save
        finally:
            self.save = None
        best = state.best_model_checkpoint
        if best is not None and Path(best) == save.folder:
            state.best_model_checkpoint = os.path.join(run_dir, name)
            if self.args.should_save:
                state.save_to_json(str(save.folder / "trainer_state.json"))
        if not self.args.save_only_model:
            save.folder.mkdir(parents=True, exist_ok=True)
            path = self._state_path(save.folder)
            torch.save({name: storage.to_plain(each.state_dict()) for name, each in self.objects.items()}, path)
            logger.debug(f"Saved resume state ({path.stat().st_size / 1000:.1f} kB).")
            if self.reference is not None:
                self.reference.save(save.folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            storage.publish(save.folder, save.target, self.settings())
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            storage.rotate(folder, self.args.save_total_limit, state.best_model_checkpoint)
            shutil.rmtree(folder / storage.STAGING, ignore_errors=True)
        self.saved_step = state.global_step

    def postpones_push(self) -> bool:
        """Return whether a checkpoint is being written; it is then pushed to the Hub when it is complete."""
        if self.save is not None:
            self.save.pushes = True
        return self.save is not None

    def choose(self, wanted: str | bool | None) -> str | None:
        """Return the path of the checkpoint to resume from, or `None`.

        `wanted` is a path, `True` or "true" for the newest complete checkpoint, or `None`, `False` or "false" for none.
        Raise a ValueError on every process if there is no complete checkpoint, or if the named one is damaged or of
        another model. The message names it, the file, and the last complete checkpoint before it.
        """
        if isinstance(wanted, str) and wanted.lower() in ("true", "false") and not os.path.isdir(wanted):
            wanted = wanted.lower() == "true"  # as a command line gives it
        if not wanted:
            return None
        checkpoint = Path(str(wanted))
        if self.accelerator.is_local_main_process:
            storage.recover(Path(str(self.args.output_dir)) if wanted is True else checkpoint.parent)
        self.accelerator.wait_for_everyone()
        if wanted is True:
            checkpoint = self._newest()
        elif damage := self._first_problem(self._find_damage(checkpoint)):
            raise ValueError(f"Cannot resume from checkpoint {checkpoint}: {damage}. {self._before(checkpoint)}")
        model = self.accelerator.unwrap_model(self.model())
        if mismatch := self._first_problem(storage.find_mismatch(checkpoint, model)):
            raise ValueError(f"Checkpoint {checkpoint} is of another model: {mismatch}. {self._before(checkpoint)}")
        return str(checkpoint)

    def _newest(self) -> Path:
        run_dir, damaged = Path(str(self.args.output_dir)), []
        steps = {storage.step_of(path) for path in storage.checkpoints_in(run_dir)}
        for step in sorted(set(gather_object([*steps])), reverse=True):
            path = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            damage = self._first_problem(self._find_damage(path))
            if damage is None:
                return path
            damaged.append(f"{path} ({damage})")
            logger.warning(f"Skipping checkpoint {path}: {damage}.")
        found = f"only damaged ones: {', '.join(damaged)}" if damaged else "none at all"
        raise ValueError(f"No valid checkpoint found in output directory ({run_dir}), {found}.")

    def _find_damage(self, path: Path) -> str | None:
        """Describe what this process finds wrong with a checkpoint, its own state included."""
        if not path.is_dir():
            return "there is no such folder"
        damage = storage.find_damage(path)
        if damage is None and self._state_path(path).exists():
            try:
                storage.load_state(self._state_path(path), torch.device("cpu"))
            except ValueError as error:
                return str(error)
        return damage

    def _before(self, path: Path) -> str:
        """Name the last complete checkpoint before this one, in a sentence."""
        step, model = storage.step_of(path), self.accelerator.unwrap_model(self.model())
        older = [other for other in storage.checkpoints_in(path.parent) if storage.step_of(other) < step or step < 0]
        complete = [each for each in older if not (self._find_damage(each) or storage.find_mismatch(each, model))]
        of_all = gather_object([complete])
        usable = [other for other in complete if all(other in of_one for of_one in of_all)]
        if not usable:
            return f"There is no complete checkpoint before it in {path.parent}."
        return f"The last complete one before it: resume_from_checkpoint={str(usable[0])!r}."

    def _first_problem(self, problem: str | None) -> str | None:
        """Return the first problem that a process has, the same on all of them."""
        return next((text for text in gather_object([problem]) if text is not None), None)

    def read(self, checkpoint: Path, position: tuple[int, int]) -> tuple[int, int]:
        """Read this process's state, as far as it fits the settings; return the epoch and the batches of it to skip.

        `position` is what transformers would skip; it counts a stream of data as one epoch. Raise a ValueError if the
        checkpoint is inside a rollout of another algorithm, or carries over groups that don't fit the settings or
        aren't in it.
        """
        changes = Changes.between(storage.read_manifest(checkpoint)["settings"], self.settings())
        carried = max(gather_object([changes.carried]))  # a server's pool is known on the main node
        carries = f"{checkpoint} carries over {carried} groups of responses"
        if carried and changes.unfit:
            ends = "" if self.args.max_carry_over else ", or first with oversampling=1 until none is carried over"
            raise ValueError(
                f"{carries}, which don't fit these settings: {changes.unfit}. Resume with the old ones{ends}."
            )
        path = self._state_path(checkpoint)
        state = None
        if not changes.processes and all(gather_object([path.exists()])):
            state = storage.load_state(path, self.accelerator.device)
        optional = {"carry_over"}  # the state of a run that has it on, or had
        if state is not None and state.keys() - optional != self.objects.keys() - optional:
            logger.warning(f"{path} was written by another version of this package and is not used.")
            state = None
        if carried and state is None:
            raise ValueError(
                f"{carries}, but has no {path.name} of this version that holds them: start a new run from its weights, "
                "and train with save_only_model=False to resume."
            )
        inside = state is not None and state["rollout"]["micro_batches"] is not None
        discards = inside and bool(changes.scoring or self.args.discard_rollout_on_resume)
        if changes.algorithm and inside and not (changes.batches or self.args.discard_rollout_on_resume):
            raise ValueError(
                f"{checkpoint} is inside a rollout of another algorithm, with its advantages and ratios: "
                f"{changes.algorithm}. Resume with the old settings or from a checkpoint at the end of a rollout, or "
                "set discard_rollout_on_resume=True to generate a new rollout."
            )
        self._warn(checkpoint, changes, discards, lacks_state=state is None)
        dropped = {"position", "rollout"} if changes.batches or discards else set()
        dropped |= {"carry_over"} if changes.batches else set()
        self._read = {name: value for name, value in (state or {}).items() if name not in dropped}
        if "position" in self._read and not self.args.ignore_data_skip:
            return self._read["position"]["epoch"], self._read["position"]["batches"]
        return position

    def _warn(self, checkpoint: Path, changes: Changes, discards: bool, lacks_state: bool):
        if changes.updates:
            logger.warning(f"Settings changed since {checkpoint} and take effect from here on: {changes.updates}.")
        if changes.optimizer:
            logger.warning(
                f"Settings changed since {checkpoint} without effect, because its optimizer and schedule are restored: "
                f"{changes.optimizer}. To train with new ones, start a new run from the checkpoint's weights."
            )
        new = "The rest of its rollout is generated again, so the run is not the same bit for bit."
        if changes.batches:
            logger.warning(f"Settings changed since {checkpoint}: {changes.batches}. {new}")
        elif discards:
            logger.warning(f"The rollout of {checkpoint} is discarded. {new}")
        if lacks_state and not changes.processes:
            logger.warning(f"{checkpoint} has no {self._state_path(checkpoint).name}. {new}")

    def restore(self, checkpoint: Path):
        """Give every object the state that was read, after transformers has set its own counters."""
        state, self._read = self._read, {}
        if "position" not in state:
            self.position.reset()
            self.rollout.reset()
        for name, each in self.objects.items():
            if name in state:
                each.load_state_dict(state[name])
        if "rollout" not in state and "carry_over" in state and "carry_over" in self.objects:
            self.objects["carry_over"].put_back()
        if self.reference is not None:
            self.reference.load(checkpoint, self.accelerator.device)
