"""Silence what libraries warn of on every run and a user can do nothing about."""

import os
import warnings

import torch


def silence_libraries():
    """Ignore the old names that TRL uses for transformers' activation checkpointing, and DeepSpeed's lack of a GPU."""
    warnings.filterwarnings("ignore", r".*gradient_checkpointing.* is deprecated", FutureWarning)
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for another one, and warn
