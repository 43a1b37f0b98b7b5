"""A run that was stopped goes on as if it had not been: checkpoints that hold all that TRL and transformers forget.

Kept in addition, for every process: the rollout of which updates are still to come, with its old log-probabilities;
the counters; metrics, losses and completions that were not logged yet; the place in the data. With the weights, the
optimizer and the random states that transformers saves, the resumed run's weights, logs and completions are equal bit
for bit to those of a run that was never stopped, on the same hardware with the same number of processes; times are not.
What lives outside the trainer is not saved: the random state of a vLLM engine, environments, state of reward functions.
"""

import time
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import TrainerCallback
from trl.trainer.utils import strip_images_from_messages

from . import storage
from .manager import OF_ALGORITHM, OF_BATCHES, OF_OPTIMIZER, OF_SCORING, OF_UPDATES, CheckpointTrainer


logger = get_logger(__name__)

# What a checkpoint keeps of a process, wherever the trainer has such an attribute
ROLLOUT = ("_step", "_buffered_inputs", "_filled_at", "_dropped", "_skipped_until")
POSITION = ("_epoch", "_epoch_batches", "_epoch_ended")
RESUMED = (
    *ROLLOUT,
    *POSITION,
    "_samples",
    # not logged yet
    "_metrics",
    "_ratio_steps",
    "_tr_loss",
    "_total_loss_scalar",
    "_loss_from_step",
    "_globalstep_last_logged",
    "_grad_norm",
    "_learning_rate",
    # guards
    "_spoiled_updates",
)


class ResumableTrainer(CheckpointTrainer):
    """
    [`~trl.GRPOTrainer`] whose checkpoints hold everything: a run that is killed at any moment and goes on with
    `train(resume_from_checkpoint=True)` ends with the weights, the optimizer state and the logs of one that was not.

    A checkpoint without our state, such as one of TRL's own trainer or with `save_only_model`, is loaded with a
    warning: what was left of its rollout is generated anew, as a whole rollout with all of its updates. The same where
    a setting that shapes a rollout has changed.
    """

    _buffered_inputs: Any

    def __init__(self, model, reward_funcs=None, args: Any = None, *positional, **kwargs):
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self._resumed: dict[str, Any] | None = None  # the state that is to be restored
        self._train_sampler: Any = None
        self._epoch, self._epoch_batches, self._epoch_ended = 0, 0, False  # its number, micro-batches that are over
        self._loss_from_step = 0  # the step from which on `_total_loss_scalar` sums losses
        self._grad_norm: Any = None  # of the last update, as its learning rate
        self._learning_rate: float | None = None
        self.add_callback(_Position(self))

    # Saving

    def _save_state(self, folder: Path):
        start = time.perf_counter()
        state = {name: storage.to_plain(getattr(self, name)) for name in RESUMED if hasattr(self, name)}
        if self._step % (int(self.args.steps_per_generation or 1) * self.num_iterations) == 0:
            state["_buffered_inputs"] = None  # all of its updates are made
        if self.log_completions and self.accelerator.is_main_process:
            state["_logs"] = self._completions()
        state["training"] = self.model.training
        path = folder / self._state_name()
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        if self._moves_reference and (self._shards_reference or self.args.should_save):
            tensors = [tensor.detach() for tensor in _local_tensors(self.ref_model)]
            torch.save(tensors, folder / self._reference_name())
        seconds = time.perf_counter() - start
        logger.info(f"State of the run beside weights and optimizer: {path.stat().st_size:,} bytes, {seconds:.3f} s")

    def _completions(self) -> dict[str, Any]:
        """The table of `log_completions`, without images."""
        logs: dict[str, Any] = dict(self._logs)
        for column in ("prompt", "completion"):
            logs[column] = [strip_images_from_messages(messages) for messages in logs[column]]
        return storage.to_plain(logs | {"images": [None] * len(logs["images"])})

    # `sync_ref_model` moves the reference model, which the parents load anew

    @property
    def _moves_reference(self) -> bool:
        return self.args.sync_ref_model and self.ref_model is not None

    @property
    def _shards_reference(self) -> bool:
        reference: Any = self.ref_model
        return self.is_fsdp_enabled or any(hasattr(p, "ds_tensor") for p in reference.parameters())

    def _reference_name(self) -> str:
        return f"tic_grpo_reference_{self.accelerator.process_index if self._shards_reference else 0}.pt"

    # Resuming

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in transformers; what it takes and raises is said at `CheckpointTrainer`."""
        self._resumed = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        self._loss_from_step = self.state.global_step
        if checkpoint is None:
            return position
        self._resumed = self._read_state(Path(checkpoint))
        if "_epoch" in self._resumed and not self.args.ignore_data_skip:
            # The parent takes a stream of data for one epoch, however often it starts again.
            return self._resumed["_epoch"], self._resumed["_epoch_batches"]
        return position

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        """What the checkpoint keeps of this process, as far as it suits the settings."""
        then, now = storage.read_manifest(checkpoint)["settings"], self._settings()
        changed = {name for name in now if then.get(name, now[name]) != now[name]}
        path = checkpoint / self._state_name()
        state = None
        if "number of processes" not in changed and all(gather_object([path.exists()])):
            state = storage.load_state(path, self.accelerator.device)

        def differences(names) -> str:
            return ", ".join(f"{name} = {now[name]} (was {then[name]})" for name in names if name in changed)

        inside = state is not None and state.get("_buffered_inputs") is not None
        batches = differences((*OF_BATCHES, "number of processes", "number of prompts"))
        scoring, algorithm = differences(OF_SCORING), differences(OF_ALGORITHM)
        discards = inside and (scoring or self.args.discard_rollout_on_resume)
        if algorithm and inside and not (batches or self.args.discard_rollout_on_resume):
            raise ValueError(
                f"{checkpoint} lies inside a rollout of another algorithm, whose rest has its advantages and ratios: "
                f"{algorithm}. Resume with the old settings or from a checkpoint at the end of a rollout, or set "
                "discard_rollout_on_resume=True, which generates a new rollout."
            )
        if others := differences((*OF_SCORING, *OF_ALGORITHM, *OF_UPDATES)):
            logger.warning(f"Settings have changed since {checkpoint} and act from here on: {others}.")
        if ignored := differences(OF_OPTIMIZER):
            logger.warning(
                f"Settings have changed since {checkpoint} without effect, as its optimizer and schedule go on with "
                f"their own: {ignored}. To train with new ones, start a run from the checkpoint's weights."
            )
        anew = "What was left of its rollout is generated anew, and the run is not the same bit for bit."
        if batches:
            logger.warning(f"Settings have changed since {checkpoint}: {batches}. {anew}")
        elif discards:
            logger.warning(f"The rollout of {checkpoint} is discarded. {anew}")
        if state is None:
            if "number of processes" not in changed:
                logger.warning(f"{checkpoint} has no {path.name}. {anew}")
            return {}
        left_out = ROLLOUT + POSITION if batches or discards else ()
        return {name: value for name, value in state.items() if name not in left_out}

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _draw_orders(self, epochs: int):
        """Draw the data's orders of epochs that are over: TRL's sampler draws each after those before."""
        sampler = self._train_sampler
        if sampler is not None and sampler.shuffle:
            for _ in range(epochs):
                torch.randperm(sampler.num_samples, generator=sampler.generator)

    def _run_epoch(self, **loop):  # type: ignore[override]  # the parent names all arguments
        epoch = loop["epoch"]
        if loop["resume_from_checkpoint"] is None or epoch != loop["epochs_trained"]:
            self._epoch_batches = 0
        else:
            self._draw_orders(epoch)
            self._epoch_batches, self._epoch_ended = loop["steps_trained_in_current_epoch"], True
            self._restore(Path(loop["resume_from_checkpoint"]))
            if self.state.global_step >= self.state.max_steps or self._epoch_batches >= loop["steps_in_epoch"]:
                self._finish_epoch(loop)
                return
        self._epoch, self._epoch_ended = epoch, False
        super()._run_epoch(**loop)

    def _finish_epoch(self, loop: dict[str, Any]):
        """What is left of an epoch whose updates are all made; the parent would make another one, or leave it out."""
        self._load_rng_state(loop["resume_from_checkpoint"])
        self._draw_orders(1)
        self._epoch = loop["epoch"]
        if not self._epoch_ended:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(
                self._tr_loss,
                self._grad_norm,
                loop["model"],
                loop["trial"],
                self._epoch,
                loop["ignore_keys_for_eval"],
                loop["start_time"],
                learning_rate=self._learning_rate,
            )
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True

    def _restore(self, checkpoint: Path):
        """Put what was read into its place, now that the parent's loop has set its own counters."""
        state, self._resumed = self._resumed or {}, None
        if "_step" not in state:  # a new rollout, of which all updates follow
            self._step, self._buffered_inputs = 0, None
        for name in (*RESUMED, "_logs"):
            if name in state:
                setattr(self, name, storage.restore_containers(getattr(self, name, None), state[name]))
        if "training" in state:  # decides which metrics the next entry of the log shows
            self.model.train(state["training"])
        if self._moves_reference:
            path = checkpoint / self._reference_name()
            if path.exists():
                saved: Any = storage.load_state(path, self.accelerator.device)
                for tensor, value in zip(_local_tensors(self.ref_model), saved, strict=True):
                    tensor.data.copy_(value)
            else:
                logger.warning(f"{checkpoint} has no {path.name}: the reference model starts from the initial one.")

    # The loop

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        if skip_scheduler and self.state.global_step > 0:
            return {}  # `eval_on_start` in a run that has started before
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys, start, learning_rate=None):
        self._grad_norm, self._learning_rate = grad_norm, learning_rate
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, ignore_keys, start, learning_rate)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # of the whole run, not of this call
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._loss_from_step, 0.001)
        super().log(logs, start_time)

    def _finalize_training(self, trial, num_train_samples, start_time):
        output = super()._finalize_training(trial, num_train_samples, start_time)
        return output._replace(training_loss=output.metrics["train_loss"])


class _Position(TrainerCallback):
    """Keeps count of the micro-batches of an epoch."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_substep_end(self, args, state, control, **kwargs):
        self.trainer._epoch_batches += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._epoch_batches += 1

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer._epoch_ended = True


def _local_tensors(model: Any) -> list[torch.Tensor]:
    """The parameters, or this process's part of them where ZeRO-3 or FSDP distributes them."""
    parts = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    return [part.to_local() if hasattr(part, "to_local") else part for part in parts]
