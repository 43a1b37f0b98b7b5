"""How the reports of the benchmarks write numbers."""

from collections.abc import Sequence
from statistics import median


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format the median, and the range of several values."""
    text = f"{median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def met(holds: bool) -> str:
    return "yes" if holds else "**no**"
