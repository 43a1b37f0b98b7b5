"""The rollout that is being trained on."""

from dataclasses import dataclass
from typing import Any

from .schedule import Position


@dataclass
class CurrentRollout:
    """The rollout that is being trained on, part of every checkpoint."""

    # Inputs of TRL's loss; an entry is `None` if there is nothing to compute. The list is `None` before the first
    # generation and after the last update.
    micro_batches: list[dict[str, Any] | None] | None = None
    dropped: list[int] | None = None  # responses with bad numbers, by micro-batch, over all processes
    skip_until: int = 0  # the step before which `min_ess` skips every micro-batch

    def start(self, micro_batches: list[dict[str, Any] | None], dropped: list[int]):
        """Replace the rollout by a new one."""
        self.micro_batches, self.dropped = micro_batches, dropped

    def at(self, position: Position) -> dict[str, Any] | None:
        """Return the micro-batch at a position."""
        assert self.micro_batches is not None
        return self.micro_batches[position.micro_batch]

    def count_dropped(self, micro_batch: int) -> int:
        """Return how many responses of a micro-batch have been dropped."""
        return self.dropped[micro_batch] if self.dropped else 0

    def state_dict(self) -> dict[str, Any]:
        return {"micro_batches": self.micro_batches, "dropped": self.dropped, "skip_until": self.skip_until}

    def load_state_dict(self, state: dict[str, Any]):
        self.micro_batches, self.dropped = state["micro_batches"], state["dropped"]
        self.skip_until = state["skip_until"]

    def reset(self):
        """Forget the rollout, so that the next step generates one."""
        self.micro_batches, self.dropped, self.skip_until = None, None, 0
