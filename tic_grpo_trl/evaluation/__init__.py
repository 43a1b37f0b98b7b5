"""Avg@k of a model on sets of problems, with intervals, every sample and the papers' table (`docs/evaluation.md`)."""

from .config import EvaluationConfig
from .run import evaluate
from .statistics import Average, average_at_k, paired_difference, problem_interval
from .table import read_results, results_table


__all__ = [
    "Average",
    "EvaluationConfig",
    "average_at_k",
    "evaluate",
    "paired_difference",
    "problem_interval",
    "read_results",
    "results_table",
]
