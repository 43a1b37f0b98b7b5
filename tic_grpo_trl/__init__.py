"""TIC-GRPO for TRL: trajectory-level importance correction, up-only clipping, constant length normalisation."""

from .config import ALGORITHMS, TICGRPOConfig
from .trainer import TICGRPOTrainer
from .version import __version__


__all__ = ["ALGORITHMS", "TICGRPOConfig", "TICGRPOTrainer", "__version__"]
