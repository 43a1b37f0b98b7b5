"""The embedded starter: tiny models that can add a little, and the tasks that they learn. It needs no download."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from . import long_tail
from .task import exact_match_reward, make_dataset


@dataclass(frozen=True)
class Task:
    """Hold what a run on a task needs: its model, its problems, the longest response and how much to evaluate."""

    model: str  # folder
    make_dataset: Callable[..., Dataset]  # of split ("train" or "test"), size and seed
    max_completion_length: int  # tokens
    test_size: int  # held-out problems of an evaluation during training


FOLDER = Path(__file__).resolve().parent
STARTER_MODEL = str(FOLDER / "model")
# By the name of the data set. `exact_match_reward` is the reward of every task.
TASKS = {
    "starter": Task(STARTER_MODEL, make_dataset, 48, 1000),
    "long_tail": Task(str(FOLDER / "long_tail_model"), long_tail.make_dataset, long_tail.MAX_COMPLETION_LENGTH, 300),
}

__all__ = ["STARTER_MODEL", "TASKS", "Task", "exact_match_reward", "make_dataset"]
