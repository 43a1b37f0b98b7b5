"""Compare all algorithms on the embedded task: `python -m research.study`."""

from .pool import execute_all
from .runs import TASKS, Run, execute
from .tables import Result, Results, bootstrap_interval, comparison_table, load, paired_differences


__all__ = [
    "TASKS",
    "Result",
    "Results",
    "Run",
    "bootstrap_interval",
    "comparison_table",
    "execute",
    "execute_all",
    "load",
    "paired_differences",
]
