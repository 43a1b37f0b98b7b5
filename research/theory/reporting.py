"""What the sections of the report share: an exact claim, and how a number is written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """A worst value over all drifts and policies, next to its target."""

    claim: str
    value: float
    target: float = 1e-12

    @property
    def holds(self) -> bool:
        return self.value <= self.target


def number(value: float) -> str:
    """Write three significant digits, or a dash for nan."""
    if value != value:
        return "–"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}"
