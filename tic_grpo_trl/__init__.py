"""TIC-GRPO for TRL: trajectory-level importance correction, up-only clipping, constant length normalisation."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__, require_tested_trl


if TYPE_CHECKING:
    from .algorithms import ALGORITHMS
    from .config import TICGRPOConfig
    from .trainer import TICGRPOTrainer

__all__ = ["ALGORITHMS", "TICGRPOConfig", "TICGRPOTrainer", "__version__"]

_MODULES = {"ALGORITHMS": "algorithms", "TICGRPOConfig": "config", "TICGRPOTrainer": "trainer"}


def __getattr__(name: str) -> Any:  # imports torch and TRL, which takes seconds, when they are needed
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_tested_trl()
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
