"""TRL's loss with the algorithm's weight, without responses that have bad numbers, and with its metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..config import TICGRPOConfig
from ..forward.packed_forward import ForwardOutput, PackedForward
from ..forward.responses import loss_mask
from ..metrics.completions import CompletionsTable
from ..metrics.ratio_metrics import RatioMetrics
from ..metrics.ratios import ratio_statistics
from ..metrics.update_metrics import UpdateMetrics
from ..rollout.micro_batches import size_correction
from ..rollout.schedule import Position, RolloutSchedule
from ..rollout.scoring import Metrics, Scorer
from ..safety.update_guard import UpdateGuard
from .importance_weight import ImportanceWeight, LossPass


@dataclass
class WeightedLoss:
    """
    Compute TRL's loss with another weight.

    TRL's loss makes a forward pass and then reads the old log-probabilities. In between, this class checks the pass,
    anchors the old log-probabilities and collects the ratios.
    """

    args: TICGRPOConfig
    schedule: RolloutSchedule
    accelerator: Accelerator
    forward: PackedForward
    scorer: Scorer
    guard: UpdateGuard
    ratios: RatioMetrics
    update_metrics: UpdateMetrics
    table: CompletionsTable

    def __post_init__(self):
        self.weight = ImportanceWeight(self.args)
        self._pass: LossPass | None = None  # the loss that is being computed

    def evaluate(self, trainer: Any, loss_of_trl: Callable, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute the loss of an evaluation batch; `loss_of_trl` maps inputs to TRL's loss."""
        loss, _ = self._compute(trainer, loss_of_trl, self.weight.loss_pass(inputs, position=None))
        return loss

    def train(
        self, trainer: Any, loss_of_trl: Callable, inputs: dict[str, Any], step: int, metrics: Metrics, window: int
    ) -> torch.Tensor:
        """Compute the loss of a micro-batch, NaN if it is not finite.

        A bad response is blanked in `inputs`, and the log-probabilities of an on-policy pass are kept there for later
        iterations. `window` is the number of micro-batches of the update.
        """
        position = self.schedule.at(step)

        def compute(repeated: bool) -> tuple[torch.Tensor, LossPass]:
            return self._compute(trainer, loss_of_trl, self.weight.loss_pass(inputs, position, repeated))

        loss, loss_pass = self.guard.drop_while_computing(inputs, compute)
        self.update_metrics.count_trl_passes(1)
        self.update_metrics.add(inputs)
        if self.accelerator.sync_gradients:
            by_response = loss_pass.level == "sequence" and inputs["advantages"].dim() == 1
            self.update_metrics.close(metrics, window, "left_out" in inputs, by_response)
        if self.schedule.has_old_policy and self.schedule.num_iterations > 1:
            # Not scored before means on-policy: the next iteration over the rollout compares with this pass.
            inputs.setdefault("old_per_token_logps", loss_pass.logps)
        loss = loss * size_correction(inputs, self.args.loss_type, self.args.per_device_train_batch_size)
        return self.guard.close_loss(loss, inputs, position.micro_batch, trainer.model)

    def _compute(self, trainer: Any, loss_of_trl: Callable, loss_pass: LossPass) -> tuple[torch.Tensor, LossPass]:
        self._pass = loss_pass
        try:
            with self.weight.trl_settings(trainer, loss_pass):
                return loss_of_trl(loss_pass.inputs), loss_pass
        finally:
            self._pass = None

    def forward_pass(self, *args: Any, **kwargs: Any) -> ForwardOutput:
        """Make the forward pass that TRL's loss asks for, and prepare the inputs that it reads next."""
        self.forward.choose_layout()
        output = self.forward(*args, **kwargs)
        loss_pass = self._pass
        if loss_pass is None:  # not called by TRL's loss
            return output
        inputs, position = loss_pass.inputs, loss_pass.position
        loss_pass.logps, sampler_log_ratio = output.logps.detach(), None
        if position is not None:
            self.guard.check_forward(output, inputs, position.micro_batch, loss_pass.repeated)
            self.update_metrics.count(output)
            sampler_log_ratio = self.scorer.sampler_log_ratio(loss_pass.logps, inputs, position)
        self._weight(output.logps, inputs, position, sampler_log_ratio)
        return output

    def _weight(
        self,
        logps: torch.Tensor,  # (B, T)
        inputs: dict[str, Any],
        position: Position | None,
        sampler_log_ratio: torch.Tensor | None,  # (B, T)
    ):
        """Give TRL's loss the weight, and collect the ratios; nothing is read from the device here."""
        mask = loss_mask(inputs)
        log_ratio, clipped = self.weight.apply(logps, inputs)
        self.ratios.add(ratio_statistics(log_ratio, clipped, inputs["advantages"], mask, sampler_log_ratio))
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
