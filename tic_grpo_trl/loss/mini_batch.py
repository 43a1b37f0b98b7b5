"""What depends on a whole mini-batch, decided before its first backward pass.

The decisions need the ratios of every response of the update, on all processes. Where the update is one forward pass,
they come from that pass. Otherwise its micro-batches are scored first.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from ..config import TICGRPOConfig
from ..forward.packed_forward import ForwardOutput, PackedForward
from ..forward.responses import loss_mask
from ..metrics.ratios import effective_sample_size
from ..objective import log_importance_weight, token_log_ratio
from ..rollout.current_rollout import CurrentRollout
from ..rollout.micro_batches import active_responses
from ..rollout.schedule import Position, RolloutSchedule
from ..rollout.scoring import Metrics
from .gradient_norms import check_weights_are_whole, logps_and_squared_norms
from .learning_rate import LearningRateFactor
from .mini_batch_rules import adaptive_cap, minimum_variance_advantages


@dataclass
class Decision:
    """What was chosen for an update."""

    log_cap: torch.Tensor | None = None  # 0-dimensional, in nats; `None` for no cap
    shifts: dict[int, torch.Tensor] = field(default_factory=dict)  # (B,) to add to the advantages, by micro-batch
    metrics: dict[str, Any] = field(default_factory=dict)  # floats or 0-dimensional tensors


@dataclass
class MiniBatch:
    """
    Decide what depends on the whole mini-batch of an update: the cap of `clip_mode="adaptive"`, the advantages of
    `advantage_baseline="minimum_variance"` and the learning rate of `scale_lr_by_ess`.

    Only active responses with finite log-ratios and norms count; the training pass drops those with bad log-ratios. All
    processes make the same decisions, from the numbers of all.
    """

    args: TICGRPOConfig
    schedule: RolloutSchedule
    accelerator: Accelerator
    rollout: CurrentRollout
    forward: PackedForward
    count: Callable[[ForwardOutput], None]  # called with each forward pass that only serves a decision
    optimizer: Callable[[], Any]

    def __post_init__(self):
        self.learning_rate = LearningRateFactor(self.optimizer)
        self._has_baseline = self.args.advantage_baseline == "minimum_variance"
        self._exact_norms = self._has_baseline and self.args.baseline_norms == "gradients"
        if self._exact_norms:
            check_weights_are_whole(self.accelerator)
        self._decision: Decision | None = None  # for the current update

    def begin(self, position: Position):
        """Decide for the update that begins at a position, unless its only forward pass will."""
        window = self.schedule.gradient_accumulation_steps
        if not self.args.uses_mini_batch or position.micro_batch % window:
            return
        assert self.rollout.micro_batches is not None
        update = range(position.micro_batch, position.micro_batch + window)
        micro_batches = {i: each for i in update if (each := self.rollout.micro_batches[i]) is not None}
        self._decision = None
        if len(micro_batches) > 1 or self._exact_norms:
            scored = zip(*(self._score(each) for each in micro_batches.values()), strict=True)
            self._decision = self._decide(micro_batches, *map(list, scored))

    def decide_from_pass(self, inputs: dict[str, Any], log_ratio: torch.Tensor, position: Position) -> Decision:
        """Return the decision for the current update; without one so far, this pass is the update's only one.

        `log_ratio` are the (B, T) log-ratios of the pass.
        """
        if self._decision is None:
            only, lengths = {position.micro_batch: inputs}, loss_mask(inputs).sum(dim=1)
            self._decision = self._decide(only, [log_ratio], [lengths]) if self.args.uses_mini_batch else Decision()
        return self._decision

    def close(self, metrics: Metrics):
        """End an update, and log what was decided for it."""
        decision, self._decision = self._decision or Decision(), None
        for name, value in decision.metrics.items():
            metrics[name].append(float(value))

    def _score(self, micro_batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a micro-batch's (B, T) log-ratios and (B,) squared norms; lengths stand for norms that aren't exact.

        No pass is made where the policy is still the old one, unless exact norms need it.
        """
        mask, old_logps = loss_mask(micro_batch), micro_batch.get("old_per_token_logps")
        logps, norms = torch.zeros_like(mask, dtype=torch.float32), mask.sum(dim=1)
        if self._exact_norms:
            logps, norms = logps_and_squared_norms(self.forward, micro_batch, self.count)
        elif old_logps is not None:
            output = self.forward.score(micro_batch)
            self.count(output)
            logps = output.logps
        return token_log_ratio(logps, old_logps, mask), norms

    def _decide(
        self,
        micro_batches: dict[int, dict[str, Any]],
        log_ratios: list[torch.Tensor],  # (B, T) each
        squared_norms: list[torch.Tensor],  # (B,) each
    ) -> Decision:
        """Decide from the micro-batches of an update on this process."""
        inputs, decision = list(micro_batches.values()), Decision()
        active = [active_responses(each, only_advantages=True) for each in inputs]
        numbers = zip(log_ratios, squared_norms, strict=True)
        finite = [log_ratio.isfinite().all(dim=1) & norm.isfinite() for log_ratio, norm in numbers]
        counted = self._gather([a & f for a, f in zip(active, finite, strict=True)])  # (n,)
        masks = [loss_mask(each) for each in inputs]
        totals = self._gather([log_ratio.sum(dim=1) for log_ratio in log_ratios])  # (n,) R
        advantages = self._gather([each["advantages"] for each in inputs])  # (n,) or (n, T)
        if self.args.scale_lr_by_ess and counted.any():
            factor = float(effective_sample_size(totals[counted].double()).sqrt())
            self.learning_rate.apply(factor)
            decision.metrics["update/learning_rate_factor"] = factor
        if self._has_baseline:
            _check_per_response(advantages)
            groups = self._gather([each["group"] for each in inputs])
            norms = self._gather(squared_norms)
            new = advantages.clone()
            values = (each[counted] for each in (advantages, totals, norms, groups))
            new[counted] = minimum_variance_advantages(*values)
            own = (new - advantages).view(self.accelerator.num_processes, -1)[self.accelerator.process_index]
            decision.shifts = dict(zip(micro_batches, own.split([len(mask) for mask in masks]), strict=True))
            advantages = new
        if self.args.clip_mode == "adaptive":
            level, pairs = str(self.args.importance_sampling_level), zip(log_ratios, masks, strict=True)
            log_weight = self._gather([log_importance_weight(log_ratio, mask, level) for log_ratio, mask in pairs])
            mask = self._gather(masks)
            counted &= (mask * (advantages if advantages.dim() == 2 else advantages.unsqueeze(1))).ne(0).any(dim=1)
            if counted.any():
                kept = log_weight[counted], advantages[counted], mask[counted]
                decision.log_cap = adaptive_cap(*kept, self.args.gradient_noise_scale)
                decision.metrics["update/cap"] = decision.log_cap.exp()
        return decision

    def _gather(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return the values of all processes, (n,) or (n, T), from those of this process's micro-batches.

        Every process has micro-batches of the same sizes; columns are added where T differs.
        """
        if parts[0].dim() == 2:
            width = max(part.size(1) for part in parts)
            parts = [torch.nn.functional.pad(part, (0, width - part.size(1))) for part in parts]
            local = self.accelerator.pad_across_processes(torch.cat(parts), dim=1)
        else:
            local = torch.cat(parts)
        return self.accelerator.gather(local)


def _check_per_response(advantages: torch.Tensor):
    if advantages.dim() != 1:
        raise ValueError(
            "advantage_baseline='minimum_variance' needs one advantage per response, but the rollout has one per "
            "token: set advantage_baseline='group_mean'."
        )
