"""What carry-over needs of whatever samples responses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .pool import Group, Response


@dataclass
class EngineUse:
    """Count what a generation call cost."""

    steps: int = 0  # forward passes that sample a token of every running response; 0 where the engine doesn't say
    slots: int = 0  # responses that a step has room for; 0 where the engine doesn't say
    sampled: int = 0  # tokens
    prefilled_again: int = 0  # tokens of responses whose keys and values had to be computed again


class Engine(Protocol):
    """Samples responses with the current weights."""

    def prepare(self) -> None:
        """Load the current weights; called on every process, before `run`."""
        ...

    def run(self, unfinished: list[tuple[Group, Response]], enough: Callable[[], bool]) -> EngineUse:
        """Go on with responses, in this order, until `enough()`; then stop, and keep nothing of them in the engine.

        New tokens go to [`Response.write`], a response that ends is marked as `finished`. `enough` is asked whenever a
        response has finished; it holds at the latest when all of them have.
        """
        ...
