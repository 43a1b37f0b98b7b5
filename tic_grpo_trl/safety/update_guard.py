"""Protection of weights and optimizer from NaN and infinite numbers, the same on every process.

TRL and transformers hide a NaN loss in the log while the optimizer steps. Here

1. a response with a bad number (log-probability, advantage, ratio, a reward model's reward) is *dropped*: blanked, so
   that it contributes exactly zero. If the bad number first appears in the training forward pass, the pass is repeated
   without the response;
2. an update without any response left, or with a non-finite loss or gradient norm, is *skipped*: its gradients are
   discarded, so weights and optimizer state stay as they were;
3. after `max_non_finite_steps` skipped updates in a row the run ends with a report.

`min_ess` skips updates in the same way. All processes make the same number of passes and the same decisions: they add
up their counts once per forward pass, and a non-finite loss on one process becomes NaN, which reaches the others with
the gradients. DeepSpeed steps within the backward pass, so it has to discard NaN gradients itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from ..config import TICGRPOConfig
from ..forward.packed_forward import ForwardOutput
from ..metrics.ratios import effective_sample_size
from ..rollout.current_rollout import CurrentRollout
from ..rollout.loss_terms import LossTerms
from ..rollout.micro_batches import active_responses
from ..rollout.schedule import Position, RolloutSchedule
from . import non_finite
from .non_finite import NonFiniteError, bad_responses, blank_responses
from .reports import NumberReports


logger = get_logger(__name__)

LOW_ESS = "an effective sample size below min_ess"
ADVICE = (
    "Weights and optimizer state are those before the first of these updates. Look at the responses above. What helps "
    "most often: a smaller learning_rate or max_grad_norm, float32 or bf16 instead of fp16, a clip_mode that bounds "
    "the weight. max_non_finite_steps sets how many skipped updates are tolerated."
)


class BadResponsesError(Exception):
    """End a training forward pass on every process, because one of them has bad responses."""

    def __init__(self, bad: torch.Tensor):  # (B,) bool: the responses to drop on this process, possibly none
        super().__init__()
        self.bad = bad


@dataclass
class _Update:
    """Hold what is known of the current update; counts are those of all processes."""

    dropped: int = 0  # responses
    active: int = 0  # responses left that can move the weights
    why_skipped: str | None = None
    idle: bool = False  # nothing was computed for it
    losses: list[tuple[torch.Tensor, dict[str, Any]]] = field(default_factory=list)  # of this process, with inputs


@dataclass
class UpdateGuard:
    """
    Drop responses and skip updates with bad numbers, as the module's description says.

    Metrics, once per optimizer step and over all processes: `frac_non_finite`, the share of the mini-batch's responses
    that were dropped, and `update/skipped`, 1 if the update was skipped. Skipped steps count for the learning rate. The
    logged loss is that of the passes with a finite loss. `grad_norm` is 0 if an update was skipped for another reason
    than its gradient. With `fp16`, the loss scaler handles non-finite gradients, and they are not counted.
    """

    args: TICGRPOConfig
    schedule: RolloutSchedule
    rollout: CurrentRollout  # its counts of dropped responses and skipped steps are kept up to date
    accelerator: Accelerator
    reports: NumberReports
    pad_token_id: int
    terms: LossTerms

    def __post_init__(self):
        self._update = _Update()
        self._skipped_in_a_row = 0  # because of non-finite numbers
        self._warned_of_low_ess = False
        self._hooks: list[Any] = []  # on the parameters, while DeepSpeed is to discard their gradients
        deepspeed = self.accelerator.state.deepspeed_plugin
        self.uses_deepspeed = deepspeed is not None
        if deepspeed is not None:
            non_finite.check_deepspeed(deepspeed.zero_stage)

    # The rollout

    def drop_from_rollout(self, rollout: dict[str, Any]) -> list[int]:
        """Blank the responses with bad numbers in place, and count them by TRL's micro-batches of this process."""
        return self._drop(rollout).view(self.schedule.steps_per_generation, -1).sum(dim=1).tolist()

    def drop_from_micro_batches(self, micro_batches: list[dict[str, Any] | None], dropped: list[int]) -> list[int]:
        """Blank responses with bad numbers from scoring in place; add their counts to `dropped`, over all processes."""
        scored = [0 if micro_batch is None else int(self._drop(micro_batch).sum()) for micro_batch in micro_batches]
        local = [before + now for before, now in zip(dropped, scored, strict=True)]
        return [sum(of_processes) for of_processes in zip(*gather_object([local]), strict=True)]

    def _drop(self, inputs: dict[str, Any]) -> torch.Tensor:
        numbers = non_finite.numbers_of_rollout(inputs)
        bad = bad_responses(numbers)
        if bad.any():
            self.reports.add_responses(inputs, numbers)
            inputs.update(blank_responses(inputs, bad, self.pad_token_id))
        return bad

    # The loss

    def drop_while_computing(self, inputs: dict[str, Any], compute: Callable[[bool], Any]) -> Any:
        """Return the loss `compute(False)`. If responses turn out to be bad, blank them and return `compute(True)`.

        They are blanked in place, so later iterations over the rollout leave them out too.
        """
        try:
            return compute(False)
        except BadResponsesError as error:  # frees what the first pass kept for its backward pass
            inputs.update(blank_responses(inputs, error.bad, self.pad_token_id))
        return compute(True)

    def check_forward(self, output: ForwardOutput, inputs: dict[str, Any], micro_batch: int, repeated: bool):
        """Raise a BadResponsesError on every process if a training forward pass gives one of them bad numbers.

        If bad responses have already been dropped from a `repeated` pass, skip the update instead.
        """
        args, entropies = self.args, output.entropies if self.terms.reads_entropies else None
        unbounded_level = None if args.is_anchored else str(args.importance_sampling_level)
        numbers = non_finite.numbers_of_forward(output.logps, inputs, unbounded_level, self.terms.beta, entropies)
        bad = bad_responses(numbers)
        active = active_responses(inputs, self.terms.only_advantages) & ~bad
        dropped, left = self.accelerator.reduce(torch.stack([bad.sum(), active.sum()]), reduction="sum").tolist()
        if dropped == 0:
            self._update.active += left
            return
        if bad.any():
            self.reports.add_responses(inputs, numbers)
        if repeated:
            self._update.why_skipped = "responses whose numbers stay bad even without their tokens"
            return
        if self.rollout.dropped is not None:
            self.rollout.dropped[micro_batch] += dropped
        raise BadResponsesError(bad)

    def close_loss(self, loss: torch.Tensor, inputs: dict[str, Any], micro_batch: int, model: Any) -> torch.Tensor:
        """Return the loss, or NaN if it is not finite: an infinite loss may have finite gradients."""
        update = self._update
        update.losses.append((loss.detach(), inputs))
        dropped = update.dropped + self.rollout.count_dropped(micro_batch)
        if self.accelerator.sync_gradients:
            if dropped and not update.active and update.why_skipped is None:
                update.why_skipped = "no response of the mini-batch left"
            if update.why_skipped and self.uses_deepspeed:  # its step follows the backward pass at once
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                self._hooks = [each.register_hook(lambda grad: torch.full_like(grad, math.nan)) for each in trained]
        return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss)

    def close_micro_batch(self, loss: torch.Tensor, micro_batch: int) -> torch.Tensor:
        """Count the dropped responses, and return the loss to log: 0 instead of NaN, for which a mean is logged."""
        self._update.dropped += self.rollout.count_dropped(micro_batch)
        while self._hooks:
            self._hooks.pop().remove()
        return torch.where(loss.isfinite(), loss, 0.0)

    # Skipped updates

    def check_effective_sample_size(self, statistics: torch.Tensor, position: Position):
        """Skip this update and the rest of the rollout if the effective sample size is below `min_ess`.

        `statistics` are the [`~tic_grpo_trl.metrics.ratios.ratio_statistics`] of the mini-batch, from all processes.
        """
        least = self.args.min_ess
        if least is None:
            return
        log_ratios = statistics[statistics[:, 0] > 0, 1]
        if log_ratios.numel() == 0 or (ess := effective_sample_size(log_ratios.double()).item()) >= least:
            return
        if self._update.why_skipped is None:
            self._update.why_skipped = LOW_ESS
        self.rollout.skip_until = self.schedule.end_of_rollout(position.rollout)
        if not self._warned_of_low_ess:
            logger.warning(
                f"The effective sample size of a mini-batch is {ess:.3f}, below min_ess={least}. This update and the "
                "remaining ones of the rollout are skipped. Later skips are not announced; update/skipped counts them. "
                "If there are many, lower the learning rate, max_carry_over or updates_per_rollout."
            )
            self._warned_of_low_ess = True

    def skip_micro_batch(self):
        """Note that nothing is computed for the current update."""
        self._update.idle = True

    @property
    def is_idle(self) -> bool:
        """Tell whether nothing is computed for the current update."""
        return self._update.idle

    def close_update(self, norm: Any, model: Any, metrics: dict[str, list[float]], passes: int) -> Any:
        """Discard the gradients before the optimizer steps if the update is to be skipped; return the norm to log.

        Raise a NonFiniteError on every process after `max_non_finite_steps` updates in a row with non-finite numbers.
        """
        update, self._update = self._update, _Update()
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        if update.why_skipped is not None:
            norm = 0.0
        elif norm is not None and not math.isfinite(norm) and not self.args.fp16:
            update.why_skipped = "a non-finite loss or gradient"
            self.reports.add_losses(update.losses, float(norm))
        skipped = update.idle or update.why_skipped is not None
        responses = self.args.per_device_train_batch_size * passes * self.accelerator.num_processes
        metrics["frac_non_finite"].append(update.dropped / responses)
        metrics["update/skipped"].append(float(skipped))
        if skipped:
            self._discard_gradients(model, update.idle)
        if update.why_skipped not in (None, LOW_ESS):
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= self.args.max_non_finite_steps:
                raise NonFiniteError(
                    f"{self._skipped_in_a_row} updates in a row were skipped because of NaN or infinite numbers, the "
                    f"last one ({update.why_skipped}) at step {self.reports.step() + 1}.\n\n"
                    + "\n\n".join([*self.reports.gather(), ADVICE])
                )
        elif not skipped:
            self._skipped_in_a_row = 0
        return norm

    def _discard_gradients(self, model: Any, idle: bool):
        """Keep the optimizer from doing anything, even by momentum or weight decay."""
        if not self.uses_deepspeed:
            if self.accelerator.scaler is None:  # a scaler skips the step itself
                model.zero_grad(set_to_none=True)
            return
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        # DeepSpeed has already made its step: the NaN in the loss must have made it discard the gradients.
        if not idle and not getattr(engine.optimizer, "overflow", False):
            raise RuntimeError(
                "DeepSpeed made a step with non-finite gradients: leave check_grad_overflow at its default, true, in "
                "the section bf16 of its configuration. The weights are lost: resume from the last checkpoint."
            )
        engine.optimizer.overflow = False  # else the learning rate would not advance, as it does without DeepSpeed
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]):
        self._skipped_in_a_row = state["skipped_in_a_row"]
