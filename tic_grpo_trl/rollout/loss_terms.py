"""The terms of TRL's loss, which decide what has to be computed for it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LossTerms:
    """Read the terms of TRL's loss from the trainer at every call, since users may change them between steps."""

    trainer: Any

    @property
    def beta(self) -> float:
        return self.trainer.beta

    @property
    def only_advantages(self) -> bool:
        """Whether every term of the loss is multiplied by the advantage."""
        return self.beta == 0.0 and not self.trainer._entropy_bonus_enabled and not self.trainer.aux_loss_enabled

    @property
    def reads_entropies(self) -> bool:
        return self.trainer._entropy_bonus_enabled or self.trainer.top_entropy_quantile < 1.0

    @property
    def corrects_sampler(self) -> bool:
        return self.trainer.use_vllm and bool(self.trainer.vllm_importance_sampling_correction)

    def fixed_micro_batches(self) -> str:
        """List the options that make the loss, or a metric of TRL's, depend on which responses share a micro-batch."""
        trainer = self.trainer
        reasons = {
            f"loss_type={trainer.loss_type!r}": trainer.loss_type in ("bnpo", "vespo"),
            "the entropy bonus": trainer._entropy_bonus_enabled,
            f"top_entropy_quantile={trainer.top_entropy_quantile}": trainer.top_entropy_quantile < 1.0,
            "the router's auxiliary loss": trainer.aux_loss_enabled,
        }
        return ", ".join(reason for reason, holds in reasons.items() if holds)
