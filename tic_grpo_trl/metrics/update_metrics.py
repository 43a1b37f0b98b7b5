"""What each update computed, and TRL's metrics corrected for micro-batches of unequal size."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..forward.packed_forward import ForwardOutput
from ..forward.responses import loss_mask
from ..rollout.schedule import RolloutSchedule
from ..rollout.scoring import Metrics


# TRL's metrics that are means over tokens. A zero-advantage response that was left out is never clipped, so it counts
# in the first group with 0; its KL and entropy are unknown.
MEAN_OVER_ALL = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")
MEAN_OVER_ACTIVE = ("kl", "entropy")
EXTREMES = {"clip_ratio/low_min": min, "clip_ratio/high_max": max}


@dataclass
class UpdateMetrics:
    """
    Log what each update computed, once per optimizer step and over all processes.

    `update/real_token_share` is the share of real tokens in what was computed, `update/shared_token_share` the share of
    the real tokens that were not computed because other responses have the same prompt, `update/responses_skipped` the
    share of the mini-batch's responses that were left out, and `update/forwards_saved` the number of forward passes,
    scoring included, that TRL would have made in addition.
    """

    accelerator: Accelerator
    schedule: RolloutSchedule

    def __post_init__(self):
        self._start()

    def _start(self):
        self._tokens = self._shared_tokens = self._slots = self._passes = self._trl_passes = 0
        self._counts: list[torch.Tensor] = []  # by micro-batch

    def count(self, output: ForwardOutput):
        """Count the cost of a forward pass."""
        self._tokens += output.tokens
        self._shared_tokens += output.shared_tokens
        self._slots += output.slots
        self._passes += output.passes

    def count_trl_passes(self, passes: int):
        """Count forward passes that TRL would have made."""
        self._trl_passes += passes

    def add(self, micro_batch: dict[str, Any]):
        """Count the tokens and responses that a micro-batch trained on, and those that it left out."""
        tokens = loss_mask(micro_batch).sum()
        none = torch.zeros(2, dtype=tokens.dtype, device=tokens.device)
        trained = torch.stack([tokens, tokens.new_tensor(micro_batch["completion_ids"].size(0))])
        self._counts.append(torch.cat([trained, micro_batch.get("left_out", none)]))

    def close(self, metrics: Metrics, passes: int, regrouped: bool, by_response: bool):
        """Log one update.

        `passes` is the number of micro-batches of this update in TRL. If ours are `regrouped`, TRL's metrics, which
        have one value for each, are replaced by what they would be with TRL's own. `by_response` says that TRL's clip
        ratios have one value per response.
        """
        processes, steps = self.accelerator.num_processes, len(self._counts)
        cost = torch.tensor([self._tokens, self._shared_tokens, self._slots], device=self.accelerator.device)
        local = torch.cat([cost, torch.stack(self._counts).flatten()])
        of_all = self.accelerator.gather(local).view(processes, -1).sum(dim=0)
        real, shared, slots = of_all[:3].tolist()
        tokens, responses, skipped_tokens, skipped_responses = of_all[3:].view(steps, 4).T.tolist()
        all_responses = self.schedule.per_device_train_batch_size * passes * processes
        metrics["update/real_token_share"].append(real / max(slots, 1))
        metrics["update/shared_token_share"].append(shared / max(real + shared, 1))
        metrics["update/responses_skipped"].append(sum(skipped_responses) / all_responses)
        metrics["update/forwards_saved"].append(self._trl_passes - self._passes)
        self._start()
        if not regrouped:
            return
        for name in metrics:
            values = metrics[name][-steps:]
            if name in MEAN_OVER_ACTIVE + MEAN_OVER_ALL:
                per_response = by_response and name.startswith("clip_ratio/")
                weights = responses if per_response else tokens
                skipped = sum(skipped_tokens) if name in MEAN_OVER_ALL else 0
                total = all_responses if per_response else sum(weights) + skipped
                metrics[name][-steps:] = [sum(v * w for v, w in zip(values, weights, strict=True)) / max(total, 1)]
            elif name in EXTREMES:
                known = [value for value in values if value == value] + [0.0] * any(skipped_responses)
                metrics[name][-steps:] = [EXTREMES[name](known, default=float("nan"))]
