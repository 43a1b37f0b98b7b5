"""The state of a training loop that neither TRL nor transformers save."""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

from .storage import load_state, restore_containers


logger = get_logger(__name__)


class DataPosition(TrainerCallback):
    """Keep track of the position in the training data; TRL's counter of micro-batches, `_step`, is part of it."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.sampler: Any = None
        self.epoch, self.batches, self.ended = 0, 0, False  # number of the epoch, and of its finished micro-batches

    def on_step_end(self, args, state, control, **kwargs):
        self.batches += 1

    on_substep_end = on_step_end

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ended = True

    def begin_epoch(self, epoch: int, resumes: bool):
        """Note the beginning of an epoch, or its continuation after a resume."""
        self.epoch, self.ended = epoch, False
        if not resumes:
            self.batches = 0

    def skip_to(self, epoch: int, batches: int):
        """Go to a position in the data, before the state of a checkpoint is restored."""
        self.draw_orders(epoch)
        self.batches, self.ended = batches, True

    def is_at_end(self, batches: int) -> bool:
        """Check whether all updates of the run, or of its current epoch of so many batches, are made."""
        state = self._trainer.state
        return state.global_step >= state.max_steps or self.batches >= batches

    def draw_orders(self, epochs: int):
        """Draw the random orders of past epochs again, since the sampler's generator continues from one to the next."""
        if self.sampler is not None and self.sampler.shuffle:
            for _ in range(epochs):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._trainer._step, "epoch": self.epoch, "batches": self.batches, "ended": self.ended}

    def load_state_dict(self, state: dict[str, Any]):
        self._trainer._step = state["step"]
        self.epoch, self.batches, self.ended = state["epoch"], state["batches"], state["ended"]

    def reset(self):
        """Begin with a new rollout."""
        self._trainer._step = 0


class LoopState:
    """Keep what TRL and transformers have computed but not logged yet."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.loss_from_step = 0  # the step from which on transformers sums the losses of the run
        self.grad_norm: Any = None  # of the last update
        self.learning_rate: float | None = None  # of the last update

    def mean_loss(self) -> float:
        """Return the mean loss of the whole run; transformers takes the mean since the last resume."""
        trainer = self._trainer
        return trainer._total_loss_scalar / max(trainer.state.global_step - self.loss_from_step, 0.001)

    def finish_epoch(self, position: DataPosition, loop: dict[str, Any]):
        """Finish a resumed epoch without another update; `loop` are the arguments of transformers' `_run_epoch`."""
        trainer = self._trainer
        trainer._load_rng_state(loop["resume_from_checkpoint"])
        position.draw_orders(1)
        position.epoch = loop["epoch"]
        if not position.ended:
            trainer.control = trainer.callback_handler.on_epoch_end(trainer.args, trainer.state, trainer.control)
            names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
            trainer._maybe_log_save_evaluate(
                trainer._tr_loss, self.grad_norm, *(loop[name] for name in names), learning_rate=self.learning_rate
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
            "training": trainer.model.training,  # decides which metrics the next log entry shows
        }

    def load_state_dict(self, state: dict[str, Any]):
        trainer = self._trainer
        trainer._metrics = restore_containers(trainer._metrics, state["metrics"])
        trainer._tr_loss, trainer._total_loss_scalar = state["loss"], state["total_loss"]
        trainer._globalstep_last_logged, self.loss_from_step = state["last_logged"], state["loss_from_step"]
        self.grad_norm, self.learning_rate = state["grad_norm"], state["learning_rate"]
        trainer.model.train(state["training"])


class ReferenceModel:
    """Save and load a reference model that `sync_ref_model` changes; TRL would load its initial weights again."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    @classmethod
    def of(cls, trainer: Any) -> "ReferenceModel | None":
        """Return a trainer's, or `None` if it does not change."""
        return cls(trainer) if trainer.args.sync_ref_model and trainer.ref_model is not None else None

    def _is_sharded(self) -> bool:
        parameters = self._trainer.ref_model.parameters()
        return self._trainer.is_fsdp_enabled or any(hasattr(parameter, "ds_tensor") for parameter in parameters)

    def _path(self, folder: Path) -> Path:
        return folder / f"tic_grpo_reference_{self._trainer.accelerator.process_index if self._is_sharded() else 0}.pt"

    def _local_tensors(self) -> list[torch.Tensor]:
        """Return the parameters, or this process's shards of them."""
        parts = [getattr(parameter, "ds_tensor", parameter) for parameter in self._trainer.ref_model.parameters()]
        return [part.to_local() if hasattr(part, "to_local") else part for part in parts]

    def save(self, folder: Path):
        """Write this process's shards, or the whole model on the process that saves."""
        if self._is_sharded() or self._trainer.args.should_save:
            torch.save([tensor.detach() for tensor in self._local_tensors()], self._path(folder))

    def load(self, folder: Path, device: torch.device):
        """Read what this process needs. Without a file, warn and leave the model as it is."""
        path = self._path(folder)
        if not path.exists():
            logger.warning(f"{folder} has no {path.name}: the reference model starts from its initial weights.")
            return
        saved: Any = load_state(path, device)
        for tensor, value in zip(self._local_tensors(), saved, strict=True):
            tensor.data.copy_(value)
