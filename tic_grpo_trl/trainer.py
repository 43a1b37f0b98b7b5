"""TICGRPOTrainer: GRPOTrainer with trajectory-level importance correction.

Rewards, advantages, the loss and its normalisers, metrics and saving are TRL's. Before the loss the old
log-probabilities are *anchored*, so that TRL's ratio of every token has the value and the gradient of the algorithm's
weight (`objective.anchored_old_logps`). Every changed method of TRL or transformers is overridden here, once.
"""

import inspect
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id, split_pixel_values_by_grid

from .carry_over.carry_over import CarryOver
from .carry_over.transformers_engine import TransformersEngine
from .checkpoint.changed_settings import settings_to_remember
from .checkpoint.interruption import Interruption
from .checkpoint.manager import CheckpointManager
from .checkpoint.run_state import DataPosition, LoopState, ReferenceModel
from .checkpoint.storage import load_renamed, without_tied
from .config import TICGRPOConfig
from .data.sources import is_hub_id
from .forward.packed_forward import PackedForward
from .loss.importance_weight import overridden
from .loss.mini_batch import MiniBatch
from .loss.weighted_loss import WeightedLoss
from .metrics.completions import CompletionsTable
from .metrics.model_card import CITATION, complete_file
from .metrics.progress import SettingsCallback, replace_displays
from .metrics.ratio_metrics import RatioMetrics
from .metrics.update_metrics import UpdateMetrics
from .rewards.failures import checked, raise_failures
from .rollout.batcher import Batcher
from .rollout.current_rollout import CurrentRollout
from .rollout.loss_terms import LossTerms
from .rollout.schedule import RolloutSchedule
from .rollout.scoring import Scorer, check_behaviour_policy
from .safety.ratio_probe import RatioProbe
from .safety.reports import NumberReports
from .safety.reward_guard import RewardGuard
from .safety.update_guard import UpdateGuard
from .validation import inputs as validation


class TICGRPOTrainer(GRPOTrainer):
    """
    Train with TIC-GRPO (arXiv 2508.02833) or one of the papers' baselines and ablations; a drop-in for
    [`~trl.GRPOTrainer`].

    Args:
        model, reward_funcs, *positional, **kwargs:
            As in [`~trl.GRPOTrainer`].
        args ([`TICGRPOConfig`], *optional*): Configuration. By default one with the model's name.

    Metrics of the trajectory ratio w' = P_θ/P_old, before any cap and over all processes, are logged under
    `trajectory_ratio/`; see [`~tic_grpo_trl.metrics.ratios.ratio_metrics`]. TRL's `clip_ratio/*` are logged only for
    algorithms whose weight TRL computes itself.

    Raises:
        TypeError: if `args` is not a [`TICGRPOConfig`].
        ValueError: naming the option and the fix, if settings, data, model or tokenizer can't be trained with.
        RewardError, NonFiniteError: on every process, while training: if a reward function fails, or after
            `max_non_finite_steps` updates in a row with NaN or infinite numbers.
    """

    model: PreTrainedModel
    args: TICGRPOConfig

    _tag_names = ["trl", "grpo", "tic-grpo"]
    _name = "TIC-GRPO"
    _paper = {
        "title": "TIC-GRPO: Provable and Efficient Optimization for Reinforcement Learning from Human Feedback",
        "id": "2508.02833",
        "citation": CITATION,
    }

    def __init__(self, model, reward_funcs=None, args: TICGRPOConfig | None = None, *positional, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TICGRPOConfig(f"{model_name.split('/')[-1]}-TIC-GRPO")
        elif not isinstance(args, TICGRPOConfig):
            raise TypeError(
                f"args must be a TICGRPOConfig, got {type(args).__name__}: replace GRPOConfig(...) by "
                "TICGRPOConfig(...); it takes the same fields."
            )
        given = inspect.signature(GRPOTrainer).bind(model, reward_funcs, args, *positional, **kwargs).arguments
        validation.check_inputs(**given)
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        validation.check_loaded(self)
        check_behaviour_policy(self)
        self._build()
        self.rollout_func = validation.checked_rollout(self.rollout_func)
        self.reward_funcs = [checked(function, args.reward_timeout) for function in self.reward_funcs]
        replace_displays(self)
        for callback in (SettingsCallback(), self.position, self.mini_batch.learning_rate):
            self.add_callback(callback)

    def _build(self):
        """Build the collaborators, each with what it needs of this trainer."""
        args, accelerator, pad = self.args, self.accelerator, self._tokenizer.pad_token_id
        multiple_of: Any = self.pad_to_multiple_of

        def policy() -> PreTrainedModel:
            return self.model

        self.schedule = schedule = RolloutSchedule.of(args, accelerator.num_processes)
        self.current_rollout = rollout = CurrentRollout()
        forward_of_trl, checks_head = super()._get_per_token_logps_and_entropies, not self.is_deepspeed_enabled
        self.packed_forward = forward = PackedForward(
            args, accelerator, policy, pad, self.temperature, multiple_of, forward_of_trl, checks_head
        )
        terms = LossTerms(self)
        self.batcher = Batcher(schedule, args, accelerator, pad, forward, terms)
        self.scorer = scorer = Scorer(args, schedule, accelerator, forward, policy, lambda: self.ref_model, terms)

        reports = NumberReports(accelerator, self._tokenizer, lambda: self.state.global_step)
        self.reward_guard = RewardGuard.of(self, reports)
        self.guard = guard = UpdateGuard(args, schedule, rollout, accelerator, reports, pad, terms)
        compares = schedule.has_old_policy or args.behaviour_policy == "sampler"
        self.probe = RatioProbe(args, accelerator, policy, forward, pad, self.temperature, compares)

        self.ratios = ratios = RatioMetrics(args, accelerator, schedule)
        self.completions_table = table = CompletionsTable(args, accelerator, lambda: self._logs)
        self.update_metrics = updates = UpdateMetrics(accelerator, schedule)
        count, optimizer = updates.count, lambda: self.optimizer
        self.mini_batch = MiniBatch(args, schedule, accelerator, rollout, forward, count, optimizer)
        wings: Any = forward, scorer, guard, ratios, updates, table, terms, self.mini_batch
        self.weighted_loss = WeightedLoss(schedule, accelerator, *wings)

        self.position, self.loop_state, self.interruption = DataPosition(self), LoopState(self), Interruption(self)
        self.carry_over = CarryOver.of(self)
        self.recorder = TransformersEngine.of(self)
        kept: dict[str, Any] = {"loop": self.loop_state, "guard": guard, "ratios": ratios, "completions": table}
        kept |= {"carry_over": self.carry_over} if self.carry_over else {}
        reference, settings = ReferenceModel.of(self), partial(settings_to_remember, self)
        self.checkpoints = CheckpointManager(
            args, accelerator, policy, settings, self.position, rollout, kept, reference
        )

    # The rollout

    def _tokenize_prompts(self, prompts):
        validation.check_kinds("a batch", prompts)
        alone = [] if self.environment_factories else prompts  # environments take whole batches only
        with validation.naming_refused_prompt(super()._tokenize_prompts, alone):
            tokenized = super()._tokenize_prompts(prompts)
        validation.check_ids(self, tokenized[0], prompts.__getitem__)
        return tokenized

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        generate: Any = super()._generate_single_turn if self.recorder is None else self.recorder.generate
        if self.carry_over and self.model.training:
            generate = self.carry_over.take
        completion_ids, logps = generate(prompt_ids, *args, **kwargs)
        validation.check_ids(self, completion_ids, lambda index: self._tokenizer.decode(prompt_ids[index]), "response")
        return completion_ids, logps

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        generations: Any = self.num_generations if self.model.training else self.num_generations_eval
        rewards = self.reward_guard.check(rewards, generations, prompts, completions)
        raise_failures(self.reward_funcs, self.reward_func_names, rewards, prompts, completions)
        return rewards  # (B of all processes, functions)

    def _generate_and_score_completions(self, inputs):
        self.packed_forward.choose_layout()
        no_scores = {"_get_per_token_logps_and_entropies": lambda *args, **kwargs: (None, None, None)}
        with overridden(self, **no_scores, vllm_importance_sampling_correction=False):
            rollout = super()._generate_and_score_completions(inputs)  # the micro-batches that train are scored instead
        metrics = self._metrics["train" if self.model.training else "eval"]
        self.scorer.check_sampler_logps(rollout, metrics)
        if self.model.training:
            if self.carry_over:
                self.carry_over.mark(rollout)
            self.reward_guard.mark(rollout)
            self.batcher.mark(rollout, self.reward_guard.has_reward)
            self.probe.check_rollout(rollout, metrics, is_new=self.state.global_step == 0)
            self.completions_table.add_responses(rollout, len(inputs))
        else:
            self.scorer.score([rollout], metrics)
        return rollout

    def _prepare_inputs(self, generation_batch):
        if isinstance(generation_batch, dict):  # a micro-batch, which `training_step` has prepared
            return generation_batch
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        position = self.schedule.at(self._step)
        if position.first or self.current_rollout.micro_batches is None:
            self._start_rollout(generation_batch)
        return self.current_rollout.at(position)

    def _start_rollout(self, generation_batch):
        """Generate a rollout, and prepare the micro-batches of all its updates."""
        if self.carry_over:
            generation_batch = self.carry_over.collect(self._metrics["train"])
        generated = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
        rollout = self.batcher.partition(generated)
        dropped = self.guard.drop_from_rollout(rollout)
        micro_batches = self.batcher.cut(rollout)
        self.scorer.score(micro_batches, self._metrics["train"], self.update_metrics.count)
        self.current_rollout.start(micro_batches, self.guard.drop_from_micro_batches(micro_batches, dropped))
        self.update_metrics.count_trl_passes(self.scorer.passes_of_trl())

    # Steps

    def training_step(self, model, inputs, num_items_in_batch=None):
        position = self.schedule.at(self._step)
        model.train()
        if self._step < self.current_rollout.skip_until:
            self.guard.skip_micro_batch()
            loss = self._advance_without_loss()
        else:
            start = time.perf_counter()
            micro_batch = self._prepare_inputs(inputs)
            self.mini_batch.begin(position)
            self._current_train_step_time += time.perf_counter() - start
            if micro_batch is None:  # nothing to compute on any process; never the last micro-batch of an update
                self.update_metrics.count_trl_passes(1)
                loss = self._advance_without_loss()
            else:
                loss = super().training_step(model, micro_batch, num_items_in_batch)
            loss = self.guard.close_micro_batch(loss, position.micro_batch)
        if position.last:
            self.current_rollout.micro_batches = None
        return loss

    def _advance_without_loss(self) -> torch.Tensor:
        self._step += 1
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return torch.zeros((), device=self.accelerator.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        compute = partial(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)
        return self.weighted_loss.train(compute, inputs, self._step) if self.model.training else compute()

    def _compute_loss(self, model, inputs):
        loss_of_trl = partial(super()._compute_loss, model)
        if not self.model.training:
            return self.weighted_loss.compute(loss_of_trl, inputs)
        metrics, window = self._metrics["train"], self.current_gradient_accumulation_steps
        return self.weighted_loss.compute(loss_of_trl, inputs, self._step, metrics, window)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        output = self.weighted_loss.forward_pass(model, *args, **kwargs)
        return output.logps, output.entropies, output.aux_loss

    def _clip_grad_norm(self, model):
        return torch.zeros(()) if self.guard.is_idle else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = 0.0 if self.guard.is_idle else super()._get_grad_norm(model, grad_norm)
        return self.guard.close_update(norm, model, self._metrics["train"], self.current_gradient_accumulation_steps)

    # What is logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self.probe.check_sampler(self.ratios.log(mode, self._metrics[mode]))
        if "train_loss" in logs:
            logs["train_loss"] = self.loop_state.mean_loss()
        self.log_completions = self.completions_table.is_due(self.state.global_step)
        super().log(logs, start_time)
        self.completions_table.rotate(self.state.global_step)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        with self.completions_table.of_evaluation(metric_key_prefix, self.state.global_step):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, **kwargs) -> None:  # type: ignore[override]
        folder = Path(str(self.args.output_dir))
        on_hub = dataset_name if dataset_name and is_hub_id(dataset_name) else None
        super().create_model_card(model_name or folder.name, on_hub, **kwargs)
        if self.is_world_process_zero():
            complete_file(folder / "README.md", self, dataset_name)

    # Checkpoints

    def _get_output_dir(self, trial) -> str:
        return self.checkpoints.output_dir(super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial):
        with self.checkpoints.saving(self._get_output_dir(trial), self.state) as save:
            super()._save_checkpoint(model, trial)
        if save.pushes:
            self._push_from_checkpoint(str(save.target))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.checkpoints.postpones_push():
            super()._push_from_checkpoint(checkpoint_folder)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train as transformers does. [`~tic_grpo_trl.checkpoint.manager.CheckpointManager.choose`] explains
        `resume_from_checkpoint`, [`~tic_grpo_trl.checkpoint.interruption.Interruption.act`] how signals end a run."""
        with self.checkpoints.running():
            return super().train(self.checkpoints.choose(resume_from_checkpoint), *args, **kwargs)

    def _init_training_state(self, max_steps, updates_per_epoch, epochs, checkpoint, trial):
        position = super()._init_training_state(max_steps, updates_per_epoch, epochs, checkpoint, trial)
        self.loop_state.loss_from_step = self.state.global_step
        return position if checkpoint is None else self.checkpoints.read(Path(checkpoint), position)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not load_renamed(Path(resume_from_checkpoint), self):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not load_renamed(Path(str(self.state.best_model_checkpoint)), self):
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result):
        super()._issue_warnings_after_load(without_tied(load_result, self.model))

    def _get_train_sampler(self, dataset=None):
        self.position.sampler = super()._get_train_sampler(dataset)
        return self.position.sampler

    def _run_epoch(self, **loop):  # type: ignore[override]  # transformers names all arguments
        self.packed_forward.choose_layout()
        resumes = loop["resume_from_checkpoint"] is not None and loop["epoch"] == loop["epochs_trained"]
        if resumes:
            self.position.skip_to(loop["epoch"], loop["steps_trained_in_current_epoch"])
            self.checkpoints.restore(Path(loop["resume_from_checkpoint"]))
        if resumes and self.position.is_at_end(loop["steps_in_epoch"]):
            self.loop_state.finish_epoch(self.position, loop)
        else:
            self.position.begin_epoch(loop["epoch"], resumes)
            with self.interruption.watching():
                super()._run_epoch(**loop)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        if skip_scheduler and self.state.global_step > 0:
            return {}  # `eval_on_start` of a resumed run
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys, start, learning_rate=None):
        self.loop_state.grad_norm, self.loop_state.learning_rate = grad_norm, learning_rate
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, ignore_keys, start, learning_rate)
        self.interruption.act(model, trial)

    def _finalize_training(self, trial, num_train_samples, start_time):
        output = super()._finalize_training(trial, num_train_samples, start_time)
        return output._replace(training_loss=output.metrics["train_loss"])
