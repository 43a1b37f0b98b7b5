"""Checkpoints that are complete as soon as they can be seen, and a clear word about those that cannot be resumed."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..algorithms import ALGORITHM_FIELDS
from ..config import TICGRPOConfig
from . import storage


logger = get_logger(__name__)

# Settings that a checkpoint's manifest holds, by what it means for a resumed run that they have changed.
# Neither the rest of the rollout nor the place in the data fits into the new batches: a new rollout.
OF_BATCHES = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
)
# The rest of the rollout has the log-probabilities of the old ones: a new rollout.
OF_SCORING = (
    "beta",
    "temperature",
    "use_vllm",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_clip_max",
)
# The rest of the rollout has advantages and ratios of another algorithm: refused unless the user gives it up.
OF_ALGORITHM = (*ALGORITHM_FIELDS, "behaviour_policy")
# transformers restores them with the optimizer: the new value has no effect.
OF_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# The new value acts from the next update or rollout on.
OF_UPDATES = (
    "optim",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
    "max_completion_length",
    "mask_truncated_completions",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "reward_weights",
    "multi_objective_aggregation",
    "partition_by_prompt",
    "use_bias_correction_kl",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
    "entropy_coef",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
)
REMEMBERED = (OF_BATCHES, OF_SCORING, OF_ALGORITHM, OF_OPTIMIZER, OF_UPDATES)


class CheckpointTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that writes a checkpoint under `.saving` and gives it its name when all processes have written
    their part, and that looks at a checkpoint before it resumes from it.

    `train(resume_from_checkpoint=True)` takes the newest checkpoint that is complete, and warns of those that it passes
    over. A path is taken as it is. The text "true" means `True`, so that it can be a flag.

    Raises (`train`):
        ValueError: if there is no complete checkpoint, or if the one that was named is damaged (a file is missing, cut
            or not readable) or foreign (no training state, weights of another model). The message names it, the file,
            and the complete checkpoint before it. On every process alike, before anything is loaded.
    """

    args: TICGRPOConfig
    model: PreTrainedModel
    _staging = False  # checkpoints are being written where nobody looks for them
    _pushes = False  # the one that is being written goes to the hub

    def _state_name(self) -> str:
        """Of the file with this process's state."""
        return f"tic_grpo_state_{self.accelerator.process_index}.pt"

    def _save_state(self, folder: Path):
        """Add to a checkpoint what only a subclass knows."""

    def _settings(self) -> dict[str, Any]:
        values = self.args.to_dict()
        settings = {name: values[name] for names in REMEMBERED for name in names}
        settings = json.loads(json.dumps(settings, default=str))  # as the manifest gives them back
        dataset: Any = self.train_dataset
        prompts = len(dataset) if hasattr(dataset, "__len__") else None  # unknown of a stream
        return settings | {"number of processes": self.accelerator.num_processes, "number of prompts": prompts}

    # Saving

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, storage.STAGING) if self._staging else folder

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder, target = run_dir / storage.STAGING / name, run_dir / name
        if self.accelerator.is_local_main_process:
            storage.clear(run_dir)
        self.accelerator.wait_for_everyone()
        self._staging, self._pushes = True, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == folder:
            self.state.best_model_checkpoint = os.path.join(self._get_output_dir(trial), name)
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
        if not self.args.save_only_model:
            self._save_state(folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            storage.publish(folder, target, self._settings())
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            storage.rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            storage.clear(run_dir)
        if self._pushes:
            super()._push_from_checkpoint(str(target))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging:  # not before it has its name
            self._pushes = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    # Choosing a checkpoint

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in transformers; what it takes and raises in addition is said at the class."""
        wanted: Any = resume_from_checkpoint
        if isinstance(wanted, str) and wanted.lower() in ("true", "false") and not os.path.isdir(wanted):
            wanted = wanted.lower() == "true"  # as a flag gives it
        if not wanted:
            return super().train(None, *args, **kwargs)
        checkpoint = self._newest_checkpoint() if wanted is True else self._named_checkpoint(Path(wanted))
        misfit = self._of_any(storage.find_mismatch(checkpoint, self.accelerator.unwrap_model(self.model)))
        if misfit:
            raise ValueError(f"Checkpoint {checkpoint} is of another model: {misfit}. {self._before(checkpoint)}")
        return super().train(str(checkpoint), *args, **kwargs)

    def _newest_checkpoint(self) -> Path:
        run_dir = Path(str(self.args.output_dir))
        self._recover(run_dir)
        steps = {storage.step_of(path) for path in storage.checkpoints_in(run_dir)}
        passed_over = []
        for step in sorted(set(gather_object([*steps])), reverse=True):
            path = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            damage = self._of_any(self._damage(path))
            if damage is None:
                return path
            passed_over.append(f"{path} ({damage})")
            logger.warning(f"Checkpoint {path} is passed over: {damage}.")
        found = f"only damaged ones: {', '.join(passed_over)}" if passed_over else "none at all"
        raise ValueError(f"No valid checkpoint found in output directory ({run_dir}), {found}.")

    def _named_checkpoint(self, path: Path) -> Path:
        self._recover(path.parent)
        if damage := self._of_any(self._damage(path)):
            raise ValueError(f"Checkpoint {path} cannot be resumed from: {damage}. {self._before(path)}")
        return path

    def _recover(self, run_dir: Path):
        if self.accelerator.is_local_main_process:
            storage.recover(run_dir)
        self.accelerator.wait_for_everyone()

    def _damage(self, path: Path) -> str | None:
        """What this process sees wrong with a checkpoint, its own state included."""
        if not path.is_dir():
            return "there is no such folder"
        if damage := storage.find_damage(path):
            return damage
        if (path / self._state_name()).exists():
            try:
                storage.load_state(path / self._state_name(), torch.device("cpu"))
            except ValueError as error:
                return str(error)
        return None

    def _before(self, path: Path) -> str:
        """A sentence that names the complete checkpoint before this one."""
        step, model = storage.step_of(path), self.accelerator.unwrap_model(self.model)
        complete = [
            other
            for other in storage.checkpoints_in(path.parent)
            if (storage.step_of(other) < step or step < 0)
            and not self._damage(other)
            and not storage.find_mismatch(other, model)
        ]
        of_all = gather_object([complete])
        usable = [other for other in complete if all(other in of_one for of_one in of_all)]
        if not usable:
            return f"There is no complete checkpoint before it in {path.parent}."
        return f"The complete one before it: resume_from_checkpoint={str(usable[0])!r}."

    def _of_any(self, problem: str | None) -> str | None:
        """The first problem that a process has, the same on all of them."""
        return next((text for text in gather_object([problem]) if text is not None), None)

    # Loading weights that have other names on disk; the parents would find none of them and go on with those they have

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or not storage.is_renamed(Path(resume_from_checkpoint), self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self):
        best, wrapped = str(self.state.best_model_checkpoint), self.is_deepspeed_enabled or self.is_fsdp_enabled
        if wrapped or not storage.is_renamed(Path(best), self.model):
            super()._load_best_model()
        else:
            self._load_renamed(best)

    def _load_renamed(self, checkpoint: str):
        saved: Any = type(self.model).from_pretrained(checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
