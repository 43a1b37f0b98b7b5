"""TRL's loss with the algorithm's weight, without responses that have bad numbers, and with its metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..forward.packed_forward import ForwardOutput, PackedForward
from ..forward.responses import loss_mask
from ..metrics.completions import CompletionsTable
from ..metrics.ratio_metrics import RatioMetrics
from ..metrics.ratios import ratio_statistics
from ..metrics.update_metrics import UpdateMetrics
from ..objective import token_log_ratio
from ..rollout.loss_terms import LossTerms
from ..rollout.micro_batches import size_correction
from ..rollout.schedule import Position, RolloutSchedule
from ..rollout.scoring import Metrics, Scorer
from ..safety.update_guard import UpdateGuard
from .importance_weight import ImportanceWeight, LossPass
from .mini_batch import Decision, MiniBatch


@dataclass
class Attempt:
    """An attempt to train on a micro-batch."""

    repeated: bool = False  # it follows one in which responses had bad numbers
    logps: torch.Tensor | None = None  # (B, T) of the policy, without gradient


@dataclass
class WeightedLoss:
    """
    Compute TRL's loss with another weight.

    TRL's loss makes a forward pass and then reads the old log-probabilities. In between, this class checks the pass,
    anchors the old log-probabilities and collects the ratios.
    """

    schedule: RolloutSchedule
    accelerator: Accelerator
    forward: PackedForward
    scorer: Scorer
    guard: UpdateGuard
    ratios: RatioMetrics
    update_metrics: UpdateMetrics
    table: CompletionsTable
    terms: LossTerms
    mini_batch: MiniBatch

    def __post_init__(self):
        self.weight = ImportanceWeight(self.terms)
        self._attempt = Attempt()  # to train on the current micro-batch
        self._pass: LossPass | None = None  # the loss that is being computed

    def train(self, compute: Callable[[], torch.Tensor], micro_batch: dict[str, Any], step: int) -> torch.Tensor:
        """Compute the loss of a micro-batch by calling `compute`, again if responses have bad numbers.

        Bad responses are blanked in the micro-batch, and the log-probabilities of an on-policy pass are kept in it, for
        later iterations over the rollout. The loss is NaN if it is not finite.
        """

        def attempt(repeated: bool) -> torch.Tensor:
            self._attempt = Attempt(repeated)
            return compute()

        loss = self.guard.drop_while_computing(micro_batch, attempt)
        if self.schedule.has_old_policy and self.schedule.num_iterations > 1:
            # Not scored before means on-policy: the next iteration over the rollout compares with this pass.
            micro_batch.setdefault("old_per_token_logps", self._attempt.logps)
        self._attempt = Attempt()
        return self.guard.close_loss(loss, micro_batch, self.schedule.at(step).micro_batch, self.terms.trainer.model)

    def compute(
        self,
        loss_of_trl: Callable,
        inputs: dict[str, Any],
        step: int | None = None,
        metrics: Metrics | None = None,
        passes: int = 1,
    ) -> torch.Tensor:
        """Compute TRL's loss of `inputs` with the algorithm's weight, and count what it trained on.

        `step` is that of the micro-batch, `None` in an evaluation, and `passes` the number of micro-batches of the
        update.
        """
        position = None if step is None else self.schedule.at(step)
        self._pass = loss_pass = self.weight.loss_pass(inputs, position)
        try:
            with self.weight.trl_settings(loss_pass):
                loss = loss_of_trl(loss_pass.inputs)
        finally:
            self._pass = None
        if position is None or metrics is None:
            return loss
        self.update_metrics.count_trl_passes(1)
        self.update_metrics.add(inputs)
        if self.accelerator.sync_gradients:
            by_response = loss_pass.level == "sequence" and inputs["advantages"].dim() == 1
            self.update_metrics.close(metrics, passes, "left_out" in inputs, by_response)
            self.mini_batch.close(metrics)
        size = self.schedule.per_device_train_batch_size
        return loss * size_correction(inputs, self.terms.trainer.loss_type, size)

    def forward_pass(self, *args: Any, **kwargs: Any) -> ForwardOutput:
        """Make the forward pass that TRL's loss asks for, and prepare the inputs that it reads next."""
        self.forward.choose_layout()
        output = self.forward(*args, **kwargs)
        loss_pass = self._pass
        if loss_pass is None:  # not called by TRL's loss
            return output
        inputs, position = loss_pass.inputs, loss_pass.position
        sampler_log_ratio = None
        if position is not None:
            self.guard.check_forward(output, inputs, position.micro_batch, self._attempt.repeated)
            self.update_metrics.count(output)
            self._attempt.logps = output.logps.detach()
            sampler_log_ratio = self.scorer.sampler_log_ratio(self._attempt.logps, inputs, position)
        self._weight(output.logps, inputs, position, sampler_log_ratio)
        return output

    def _weight(
        self,
        logps: torch.Tensor,  # (B, T)
        inputs: dict[str, Any],
        position: Position | None,
        sampler_log_ratio: torch.Tensor | None,  # (B, T)
    ):
        """Give TRL's loss the weight, and collect the ratios.

        Only the rules for whole mini-batches and `min_ess` read from the device here.
        """
        mask = loss_mask(inputs)
        log_ratio = token_log_ratio(logps, inputs.get("old_per_token_logps"), mask)
        decision = Decision() if position is None else self.mini_batch.decide_from_pass(inputs, log_ratio, position)
        if position is not None and position.micro_batch in decision.shifts:
            inputs["advantages"] = inputs["advantages"] + decision.shifts[position.micro_batch]
        clipped = self.weight.apply(logps, log_ratio, inputs, decision.log_cap)
        age = inputs.get("token_age")
        self.ratios.add(ratio_statistics(log_ratio, clipped, inputs["advantages"], mask, sampler_log_ratio, age))
        self.table.add_ratios(inputs, log_ratio.sum(dim=1))
        if position is None or self.accelerator.sync_gradients:
            self._close_ratios(position)

    def _close_ratios(self, position: Position | None):
        """End an update or an evaluation batch."""
        inner_step = position.update + 1 if position is not None and self.schedule.has_inner_steps else None
        statistics = self.ratios.close("eval" if position is None else "train", inner_step)
        self.table.close_update()
        if position is not None:
            self.guard.check_effective_sample_size(statistics, position)
