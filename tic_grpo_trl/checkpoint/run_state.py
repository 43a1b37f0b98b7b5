"""The state of a training loop that neither TRL nor transformers save."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback
from trl import GRPOTrainer

from .storage import load_state, restore_containers


logger = get_logger(__name__)


class DataPosition(TrainerCallback):
    """
    Keep track of the position in the training data.

    Args:
        trainer: whose counter of micro-batches, `_step`, is part of the position.
    """

    def __init__(self, trainer: GRPOTrainer):
        self._trainer = trainer
        self.sampler: Any = None
        self.epoch, self.batches, self.ended = 0, 0, False  # number of the epoch, its micro-batches that are over

    def on_substep_end(self, args, state, control, **kwargs):
        self.batches += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.batches += 1

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ended = True

    def begin_epoch(self, epoch: int, resumes: bool):
        """Note the beginning of an epoch, or its continuation after a resume."""
        self.epoch, self.ended = epoch, False
        if not resumes:
            self.batches = 0

    def skip_to(self, epoch: int, batches: int):
        """Go to a position in the data before the state of a checkpoint is restored."""
        self.draw_orders(epoch)
        self.batches, self.ended = batches, True

    def is_at_end(self, batches: int) -> bool:
        """Check whether all updates of the run, or of the epoch with its number of batches, are made."""
        state = self._trainer.state
        return state.global_step >= state.max_steps or self.batches >= batches

    def draw_orders(self, epochs: int):
        """Draw the data's orders of epochs that are over: TRL's sampler draws each after those before it."""
        if self.sampler is not None and self.sampler.shuffle:
            for _ in range(epochs):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self._trainer._step,
            "epoch": self.epoch,
            "batches": self.batches,
            "ended": self.ended,
        }

    def load_state_dict(self, state: dict[str, Any]):
        self._trainer._step = state["step"]
        self.epoch, self.batches, self.ended = state["epoch"], state["batches"], state["ended"]

    def reset(self):
        """Begin with a new rollout."""
        self._trainer._step = 0


class LoopState:
    """
    Keep what TRL and transformers have computed but not logged yet.

    Args:
        trainer: that it belongs to.
    """

    def __init__(self, trainer: GRPOTrainer):
        self._trainer: Any = trainer
        self.loss_from_step = 0  # the step from which on transformers sums the losses of the run
        self.grad_norm: Any = None  # of the last update
        self.learning_rate: float | None = None  # of the last update

    def mean_loss(self) -> float:
        """Return the mean loss of the whole run, where transformers takes the mean since the last resume."""
        trainer = self._trainer
        return trainer._total_loss_scalar / max(trainer.state.global_step - self.loss_from_step, 0.001)

    def finish_epoch(self, position: DataPosition, loop: dict[str, Any]):
        """Finish a resumed epoch whose updates are all made; transformers would make another, or leave this out.

        Args:
            position: in the data.
            loop: arguments of transformers' `_run_epoch`.
        """
        trainer = self._trainer
        trainer._load_rng_state(loop["resume_from_checkpoint"])
        position.draw_orders(1)
        position.epoch = loop["epoch"]
        if not position.ended:
            trainer.control = trainer.callback_handler.on_epoch_end(trainer.args, trainer.state, trainer.control)
            trainer._maybe_log_save_evaluate(
                trainer._tr_loss,
                self.grad_norm,
                loop["model"],
                loop["trial"],
                loop["epoch"],
                loop["ignore_keys_for_eval"],
                loop["start_time"],
                learning_rate=self.learning_rate,
            )
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "metrics": trainer._metrics,
            "loss": trainer._tr_loss,
            "total_loss": trainer._total_loss_scalar,
            "loss_from_step": self.loss_from_step,
            "last_logged": trainer._globalstep_last_logged,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "training": trainer.model.training,  # decides which metrics the next entry of the log shows
        }

    def load_state_dict(self, state: dict[str, Any]):
        trainer = self._trainer
        trainer._metrics = restore_containers(trainer._metrics, state["metrics"])
        trainer._tr_loss, trainer._total_loss_scalar = state["loss"], state["total_loss"]
        trainer._globalstep_last_logged = state["last_logged"]
        self.loss_from_step = state["loss_from_step"]
        self.grad_norm, self.learning_rate = state["grad_norm"], state["learning_rate"]
        trainer.model.train(state["training"])


class ReferenceModel:
    """
    Save and load a reference model that `sync_ref_model` moves, which TRL would load from its origin again.

    Args:
        model: returns the reference model, or `None`.
        process: index of this process.
        shards: whether FSDP distributes the model; ZeRO-3 is recognised by the parameters.
        writes: whether this process saves what all processes have alike.
    """

    def __init__(self, model: Callable[[], Any], process: int, shards: bool, writes: bool):
        self.model, self.process, self.shards, self.writes = model, process, shards, writes

    @classmethod
    def of(cls, trainer: Any) -> "ReferenceModel | None":
        """Return a trainer's, or `None` if it is not moved."""
        if not trainer.args.sync_ref_model or trainer.ref_model is None:
            return None
        process, writes = trainer.accelerator.process_index, trainer.args.should_save
        return cls(lambda: trainer.ref_model, process, trainer.is_fsdp_enabled, writes)

    def _path(self, folder: Path) -> Path:
        return folder / f"tic_grpo_reference_{self.process if self._is_sharded() else 0}.pt"

    def _is_sharded(self) -> bool:
        return self.shards or any(hasattr(parameter, "ds_tensor") for parameter in self.model().parameters())

    def save(self, folder: Path):
        """Write this process's part."""
        if self._is_sharded() or self.writes:
            torch.save([tensor.detach() for tensor in self._local_tensors()], self._path(folder))

    def load(self, folder: Path, device: torch.device):
        """Read this process's part; without a file the model stays as it is, with a warning."""
        path = self._path(folder)
        if not path.exists():
            logger.warning(f"{folder} has no {path.name}: the reference model starts from its initial weights.")
            return
        saved: Any = load_state(path, device)
        for tensor, value in zip(self._local_tensors(), saved, strict=True):
            tensor.data.copy_(value)

    def _local_tensors(self) -> list[torch.Tensor]:
        """Return the parameters, or this process's part of them."""
        parts = [getattr(parameter, "ds_tensor", parameter) for parameter in self.model().parameters()]
        return [part.to_local() if hasattr(part, "to_local") else part for part in parts]
