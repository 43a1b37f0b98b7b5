"""Gives TRL's loss the algorithm's importance weight, by anchored old log-probabilities."""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..forward.responses import loss_mask
from ..objective import (
    ClippedWeight,
    anchored_old_logps,
    clip_log_weight,
    log_importance_weight,
)
from ..rollout.loss_terms import LossTerms
from ..rollout.schedule import Position


@dataclass(frozen=True)
class LossPass:
    """One computation of TRL's loss."""

    inputs: dict[str, Any]  # the copy of the micro-batch that TRL's loss reads after its forward pass
    level: str  # TRL's `importance_sampling_level`
    position: Position | None  # `None` in an evaluation


@contextmanager
def overridden(target: Any, **values: Any):
    """Give attributes of an object other values for the duration of a `with` block."""
    with ExitStack() as stack:
        for name, value in values.items():
            if name in vars(target):
                stack.callback(setattr, target, name, vars(target)[name])
            else:  # an attribute of the class, such as a method
                stack.callback(delattr, target, name)
            setattr(target, name, value)
        yield


class ImportanceWeight:
    """Computes the algorithm's weight, and makes TRL's loss use it."""

    def __init__(self, terms: LossTerms):
        self.terms, args = terms, terms.trainer.args
        self.level, self.clip, self.is_anchored = str(args.importance_sampling_level), args.clip, args.is_anchored

    def loss_pass(self, inputs: dict[str, Any], position: Position | None) -> LossPass:
        """Describe a computation of TRL's loss.

        At TRL's sequence level, one weight per response gives the same loss and gradient more cheaply, as long as
        nothing else in the loss differs between the tokens of a response.
        """
        if not self.is_anchored:
            return LossPass(dict(inputs), self.level, position)
        correction = inputs.get("importance_sampling_ratio")  # (B, 1) or (B, T)
        per_response = (
            self.level not in ("token", "prefix")
            and inputs["advantages"].dim() == 1
            and self.terms.beta == 0.0
            and self.terms.trainer.top_entropy_quantile == 1.0
            and (correction is None or correction.size(1) == 1)
        )
        return LossPass(dict(inputs), "sequence" if per_response else "token", position)

    @contextmanager
    def trl_settings(self, loss_pass: LossPass):
        """Set TRL's options so that an anchored weight, which is already bounded, is not bounded again."""
        if not self.is_anchored:
            yield
            return
        options = {"importance_sampling_level": loss_pass.level, "epsilon_low": 1.0, "epsilon_high": math.inf}
        trainer = self.terms.trainer
        with overridden(trainer, **options), overridden(trainer.args, delta=None):
            yield
        if "anchored" not in loss_pass.inputs:
            raise RuntimeError("This TRL version computes its loss in another way: install trl>=1.16,<1.17.")

    def apply(
        self,
        logps: torch.Tensor,  # (B, T) of the policy, with their gradient
        log_ratio: torch.Tensor,  # (B, T)
        inputs: dict[str, Any],
        log_cap: torch.Tensor | None = None,  # 0-dimensional
    ) -> ClippedWeight:
        """Return the clipped weight, and anchor the old log-probabilities in `inputs`."""
        mask = loss_mask(inputs)
        log_weight = log_importance_weight(log_ratio, mask, self.level)  # (B, 1) or (B, T)
        clipped = clip_log_weight(log_weight, inputs["advantages"], mask, self.clip, log_cap)
        if self.is_anchored:
            old_logps = inputs.get("old_per_token_logps")  # `None` on-policy
            # TRL's off-policy mask measures the drift from the behaviour policy, not from the anchor.
            inputs.setdefault("sampling_per_token_logps", logps.detach() if old_logps is None else old_logps)
            inputs["old_per_token_logps"] = anchored_old_logps(logps, clipped)
            inputs["anchored"] = True
        return clipped
