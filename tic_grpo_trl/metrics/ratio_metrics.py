"""Collects the trajectory ratios of a run's responses and logs their metrics."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..config import TICGRPOConfig
from ..rollout.schedule import RolloutSchedule
from ..rollout.scoring import Metrics
from .ratios import default_metrics, mean_sampler_ratio, merge_steps


@dataclass
class RatioMetrics:
    """Collect ratio statistics per update and evaluation batch, and log them."""

    args: TICGRPOConfig
    accelerator: Accelerator
    schedule: RolloutSchedule

    def __post_init__(self):
        self._open: list[torch.Tensor] = []  # of this process's micro-batches in the current update
        self._closed: dict[str, list[tuple[int | None, torch.Tensor]]] = {"train": [], "eval": []}  # of all processes

    def add(self, statistics: torch.Tensor):
        """Add the [`~tic_grpo_trl.metrics.ratios.ratio_statistics`] of a micro-batch."""
        self._open.append(statistics)

    def close(self, mode: str, inner_step: int | None) -> torch.Tensor:
        """End an update or an evaluation batch, and return its (n, 10) statistics from all processes.

        `mode` is `"train"` or `"eval"`; `inner_step` is k = 1 … K, or `None` where a rollout serves one update. Nothing
        is read from the device here.
        """
        statistics = self.accelerator.gather(torch.cat(self._open))
        self._open.clear()
        self._closed[mode].append((inner_step, statistics))
        return statistics

    def log(self, mode: str, metrics: Metrics) -> float | None:
        """Add the metrics since the last log to TRL's, and return the mean of P_old/P_sampler where it is known."""
        steps = self._closed[mode]
        sampler_ratio = mean_sampler_ratio(steps) if steps else None
        if sampler_ratio is not None:
            metrics["sampling/mean_ratio"].append(sampler_ratio)
        logged = merge_steps(steps)
        if not self.args.log_all_ratio_metrics:
            logged = {name: logged[name] for name in default_metrics(logged, math.ceil(self.schedule.updates))}
        for name, value in logged.items():
            metrics[f"trajectory_ratio/{name}"].append(value)
        steps.clear()
        if self.args.is_anchored:  # TRL's would describe weights after the cap
            for name in [name for name in metrics if name.startswith("clip_ratio/")]:
                del metrics[name]
        return sampler_ratio

    def state_dict(self) -> dict[str, Any]:
        return self._closed

    def load_state_dict(self, state: dict[str, Any]):
        # Statistics without an age are of responses that the weights of their rollout wrote.
        self._closed = {
            mode: [(k, nn.functional.pad(rows, (0, 10 - rows.size(1)))) for k, rows in steps]
            for mode, steps in state.items()
        }
