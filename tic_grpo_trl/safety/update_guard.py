"""Updates that no bad number reaches: NaN and infinities are left out or the update is skipped, on every process alike.

TRL and transformers hide a NaN loss in the log while the optimizer steps. Here

1. a response with a bad number (log-probabilities, advantage, ratio, a reward model's reward) is *dropped*: blanked, so
   that it contributes exactly zero. What shows only in the training forward pass repeats that pass without it;
2. an update without any response left, or with a non-finite loss or gradient norm, is *skipped*: its gradients are
   discarded, so that weights and optimizer state stay as they were;
3. after `max_non_finite_steps` skipped updates in a row the run ends with a report.

`min_ess` skips updates by the same means. All processes make the same number of passes and the same decisions: they
add up their counts once per forward pass, and a loss that is not finite on one of them becomes NaN, which reaches the
others with the gradients. DeepSpeed steps within the backward pass: it is made to discard NaN gradients, its own way.
"""

import math
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import nn

from ..metrics.ratios import effective_sample_size
from ..rewards.failures import _texts
from ..rollout.batcher import UpdatePhaseTrainer
from ..rollout.micro_batches import active_responses
from ..rollout.responses import response_count
from .non_finite import (
    CheckedNumbers,
    NonFiniteError,
    bad_responses,
    blank_responses,
    check_deepspeed,
    describe_responses,
    groups_without_rewards,
    numbers_of_forward,
    numbers_of_rollout,
    response_text,
)


logger = get_logger(__name__)

LOW_ESS = "an effective sample size below min_ess"
KEPT_REPORTS = 4  # of each process, for the error
ADVICE = (
    "Weights and optimizer state are those before the first of these updates. Look at the rows above; a smaller "
    "learning_rate or max_grad_norm, float32 or bf16 instead of fp16, and a bounded weight (clip_mode) are what helps "
    "most often. max_non_finite_steps sets how many are taken."
)


class _BadRowsError(Exception):
    """Leaves a forward pass before anything is made of its numbers."""


def _nan_like(gradient: torch.Tensor) -> torch.Tensor:
    return torch.full_like(gradient, math.nan)


@dataclass
class _Update:
    """What is known of the update that is being computed; the counts are those of all processes."""

    dropped: int = 0  # responses
    live: int = 0  # responses left that can move the weights
    why: str | None = None  # it is to be skipped
    idle: bool = False  # nothing was computed for it
    losses: list[tuple[torch.Tensor, dict[str, Any]]] = field(default_factory=list)  # here, with their inputs


class SafeUpdateTrainer(UpdatePhaseTrainer):
    """
    [`~trl.GRPOTrainer`] whose weights and optimizer never see a NaN or infinite number; see the module's top, and
    `min_ess` and `max_non_finite_steps` of [`~tic_grpo_trl.TICGRPOConfig`].

    Metrics, once per optimizer step and over all processes: `frac_non_finite`, the share of the mini-batch's responses
    that were dropped, and `update/skipped`, 1 where the update was skipped. The learning rate follows the number of
    steps, skipped ones included. The logged loss is that of the passes whose loss was finite, and `grad_norm` is 0 for
    an update that was skipped for another reason than its gradient.

    With `fp16` non-finite gradients are the loss scaler's business and not counted.

    Raises:
        ValueError: if `min_ess` is set together with `fp16`, or DeepSpeed would make steps of NaN gradients.
        NonFiniteError: on every process, after `max_non_finite_steps` updates in a row that non-finite numbers spoiled.
    """

    def __init__(self, model, reward_funcs=None, args: Any = None, *positional, **kwargs):
        if args is not None and args.min_ess is not None and args.fp16:
            raise ValueError(
                f"min_ess={args.min_ess} skips updates, which the loss scaler of fp16=True does not allow: set "
                "fp16=False (and bf16=True), or remove min_ess."
            )
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        if self.is_deepspeed_enabled:
            check_deepspeed(self.accelerator.state.deepspeed_plugin.zero_stage)
        self._dropped = [0] * self._micro_batches  # responses of the rollout by TRL's micro-batch, of all processes
        self._skipped_until = 0  # micro-batch (in the sense of `_step`) with which updates go on after min_ess
        self._spoiled_updates = 0  # in a row, by non-finite numbers
        self._update = _Update()
        self._checked: dict[str, Any] | None = None  # the micro-batch whose forward pass is to be checked
        self._bad: torch.Tensor | None = None  # its rows that have to be dropped, (B,) bool
        self._unrewarded: torch.Tensor | None = None  # rows of the newest rollout whose reward is unknown, (B,) bool
        self._reports: deque[str] = deque(maxlen=KEPT_REPORTS)
        self._warnings = 0
        self._said_low_ess = False
        self._spoilers: list[Any] = []  # hooks on the parameters, while DeepSpeed is to discard their gradients

    # What is known when the rollout is there

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        models = [column for column, function in enumerate(self.reward_funcs) if isinstance(function, nn.Module)]
        functions = [column for column in range(len(self.reward_funcs)) if column not in models]
        if rewards[:, functions].isinf().any():
            return rewards  # a function failed: the run is about to end
        generations: Any = self.num_generations if self.model.training else self.num_generations_eval
        groups, own = groups_without_rewards(rewards, self.reward_weights, models, generations)
        if not groups.any():
            return rewards
        first = self.accelerator.process_index * len(prompts)
        self._unrewarded = groups[first : first + len(prompts)]
        for row in own[first : first + len(prompts)].nonzero().flatten().tolist()[:1]:
            values = zip(self.reward_func_names, rewards[first + row].tolist(), strict=True)
            numbers = ", ".join(f"reward of {name!r} {value:g}" for name, value in values)
            self._report(f"{numbers}: its group is dropped.\n{_texts(row, prompts, completions)}")
        # Every reward unknown: TRL leaves such rows out of every mean and deviation.
        return rewards.masked_fill(groups.unsqueeze(1), math.nan)

    def _generate_and_score_completions(self, inputs):
        self._unrewarded = None
        rollout = super()._generate_and_score_completions(inputs)
        if self._unrewarded is not None and self.model.training:  # TRL has made their advantages 0
            rollout["advantages"] = rollout["advantages"].clone()
            rollout["advantages"][self._unrewarded] = math.nan
        return rollout

    def _cut(self, rollout):
        rows = response_count(rollout) // self._micro_batches
        bad = self._drop_known(rollout := dict(rollout))
        micro_batches = super()._cut(rollout)
        dropped = bad.view(self._micro_batches, rows).sum(dim=1).tolist()
        for index, micro_batch in enumerate(micro_batches):
            if micro_batch is not None:  # scored meanwhile
                dropped[index] += int(self._drop_known(micro_batch).sum())
        self._dropped = self._of_all(dropped).sum(dim=0).tolist()
        return micro_batches

    def _drop_known(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Blank, in place, the responses that have a bad number before they are trained on; (n,) bool."""
        places = numbers_of_rollout(inputs)
        bad = bad_responses(places)
        if bad.any():
            self._report_rows(inputs, places)
            inputs.update(blank_responses(inputs, bad, self._tokenizer.pad_token_id))
        return bad

    # What shows in the training forward pass

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        work = dict(self._work)
        self._checked, self._bad, loss = inputs, None, None
        try:
            with suppress(_BadRowsError):  # with it goes what the first pass has kept for its backward pass
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if loss is None:
                assert self._bad is not None
                self._work = work
                # in the buffered rollout too: a response that was dropped once stays so
                inputs.update(blank_responses(inputs, self._bad, self._tokenizer.pad_token_id))
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._checked = None
        return self._spoiled_if_skipped(loss, inputs)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        outputs = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._checked is not None:
            self._check_forward(outputs[0], outputs[1], self._checked)
        return outputs

    def _check_forward(self, logps: torch.Tensor, entropies: torch.Tensor | None, inputs: dict[str, Any]):
        counts_entropies = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0
        level = None if self.args.is_anchored else self.importance_sampling_level
        places = numbers_of_forward(logps, inputs, level, self.beta, entropies if counts_entropies else None)
        bad = bad_responses(places)
        all_terms = self.beta != 0.0 or self._entropy_bonus_enabled or self.aux_loss_enabled
        live = active_responses(inputs, only_advantages=not all_terms) & ~bad
        dropped, left = self.accelerator.reduce(torch.stack([bad.sum(), live.sum()]), reduction="sum").tolist()
        if dropped == 0:
            self._update.live += left
            return
        if bad.any():
            self._report_rows(inputs, places)
        if self._bad is not None:  # they were dropped, and still there is one
            self._update.why = "responses whose numbers stay bad even without their tokens"
            return
        self._dropped[self._step % self._micro_batches] += dropped
        self._bad = bad
        raise _BadRowsError

    def _spoiled_if_skipped(self, loss: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss, or NaN if it is not finite: an infinite one may have finite gradients."""
        update = self._update
        update.losses.append((loss.detach(), inputs))
        dropped = update.dropped + self._dropped[self._step % self._micro_batches]
        if self.accelerator.sync_gradients:
            if dropped and not update.live and update.why is None:
                update.why = "no response of the mini-batch left"
            if update.why and self.is_deepspeed_enabled:  # its step follows the backward pass at once
                parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
                self._spoilers = [parameter.register_hook(_nan_like) for parameter in parameters]
        return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss)

    # min_ess

    def _heed_ess(self, rows: torch.Tensor):
        """Skip this update and the remaining ones of the rollout if the effective sample size is below `min_ess`.

        Args:
            rows: [`~tic_grpo_trl.metrics.ratios.ratio_statistics`] of the mini-batch, of all processes.
        """
        least = self.args.min_ess
        if least is None:
            return
        log_ratios = rows[rows[:, 0] > 0, 1]
        if log_ratios.numel() == 0 or (ess := effective_sample_size(log_ratios.double()).item()) >= least:
            return
        if self._update.why is None:
            self._update.why = LOW_ESS
        end = (self._step // self._rollout_steps + 1) * self._rollout_steps
        self._skipped_until = end - end % self.args.gradient_accumulation_steps
        if not self._said_low_ess:
            logger.warning(
                f"The effective sample size of a mini-batch is {ess:.3f}, below min_ess={least}: this "
                "update and the remaining ones of the rollout are skipped, as they will be from now on without another "
                "message (update/skipped counts them). If it happens often, lower the learning rate or make fewer "
                "updates per rollout."
            )
            self._said_low_ess = True

    # Steps

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._step < self._skipped_until:
            model.train()  # which the log reads
            self._update.idle = True
            self._step += 1
            if self._step % self.current_gradient_accumulation_steps == 0:
                self._metrics["train"]["step_time"].append(self._current_train_step_time)
                self._current_train_step_time = 0.0
            return torch.zeros((), device=self.accelerator.device)
        index = self._step % self._micro_batches
        loss = super().training_step(model, inputs, num_items_in_batch)
        while self._spoilers:
            self._spoilers.pop().remove()
        self._update.dropped += self._dropped[index]
        return torch.where(loss.isfinite(), loss, 0.0)  # transformers would log an average in its place

    def _clip_grad_norm(self, model):
        return torch.zeros(()) if self._update.idle else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        """Called between the gradients and the optimizer step: what is to be skipped is discarded here."""
        update, self._update = self._update, _Update()
        norm = 0.0 if update.idle else super()._get_grad_norm(model, grad_norm)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        if update.why is None and norm is not None and not math.isfinite(norm) and not self.args.fp16:
            update.why = "a non-finite loss or gradient"
            self._report_losses(update, float(norm))
        elif update.why is not None:
            norm = 0.0
        skipped = update.idle or update.why is not None
        rows = self.args.per_device_train_batch_size * self.current_gradient_accumulation_steps
        metrics = self._metrics["train"]
        metrics["frac_non_finite"].append(update.dropped / (rows * self.accelerator.num_processes))
        metrics["update/skipped"].append(float(skipped))
        if skipped:
            self._discard_gradients(model, update.idle)
        if update.why not in (None, LOW_ESS):
            self._count_spoiled(str(update.why))
        elif not skipped:
            self._spoiled_updates = 0
        return norm

    def _discard_gradients(self, model, idle: bool):
        """Let the optimizer do nothing: no momentum, no weight decay."""
        if not self.is_deepspeed_enabled:
            if self.accelerator.scaler is None:  # which skips the step itself
                model.zero_grad(set_to_none=True)
            return
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        # DeepSpeed's step is behind us: the NaN in the loss must have made it discard the gradients
        if not idle and not getattr(engine.optimizer, "overflow", False):
            raise RuntimeError(
                "DeepSpeed has made a step with non-finite gradients: leave check_grad_overflow at its default, true, "
                "in the section bf16 of its configuration. The weights are lost: go on from the last checkpoint."
            )
        engine.optimizer.overflow = False  # or else the learning rate would wait, as it does not without DeepSpeed
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.step()

    # Reports

    def _report_rows(self, inputs: dict[str, Any], places: list[CheckedNumbers]):
        self._report("Non-finite numbers: " + "\n".join(describe_responses(inputs, places, self._tokenizer)))

    def _report_losses(self, update: _Update, norm: float):
        """Say which pass of this process had the bad loss, if any."""
        for index, (loss, inputs) in enumerate(update.losses):
            if not loss.isfinite():
                row = int(inputs["advantages"].abs().reshape(response_count(inputs), -1).amax(dim=1).argmax())
                text = response_text(inputs, row, self._tokenizer)
                where = f"pass {index + 1} of {len(update.losses)}, whose largest advantage is that of"
                self._report(f"Non-finite numbers: loss {float(loss):g} in {where}\n{text}")
                return
        if self.accelerator.is_main_process:
            self._report(f"Non-finite numbers: gradient norm {norm:g}.")

    def _report(self, text: str):
        """Keep a report for the error; of all warnings the 1st, 2nd, 4th, 8th … is shown, on the process concerned."""
        who = f"process {self.accelerator.process_index} of {self.accelerator.num_processes}"
        self._reports.append(f"On {who}, step {self.state.global_step + 1}: {text}")
        self._warnings += 1
        if self._warnings & (self._warnings - 1) == 0:
            logger.warning(self._reports[-1], main_process_only=False)

    def _count_spoiled(self, why: str):
        self._spoiled_updates += 1
        if self._spoiled_updates < self.args.max_non_finite_steps:
            return
        reports = gather_object(list(self._reports))
        raise NonFiniteError(
            f"{self._spoiled_updates} updates in a row were skipped because of NaN or infinite numbers, the last one "
            f"({why}) at step {self.state.global_step + 1}.\n\n" + "\n\n".join([*reports, ADVICE])
        )
