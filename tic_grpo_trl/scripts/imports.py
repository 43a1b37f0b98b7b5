"""Functions that are named on a command line."""

import importlib
import os
import sys
from collections.abc import Callable


def import_function(path: str, option: str) -> Callable:
    """The function that an import path such as `package.module.name` names, the working directory included.

    Args:
        path: the import path.
        option: the flag that it was given to, for the message.

    Returns:
        The function.

    Raises:
        ValueError: where there is none.
    """
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {path}: give an import path such as my_package.rewards.my_reward.") from error
