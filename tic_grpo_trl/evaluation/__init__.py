"""Evaluate a model: Avg@k with confidence intervals, all samples, and the papers' table (`docs/evaluation.md`)."""

from .config import EvaluationConfig
from .run import evaluate
from .run_folder import read_results
from .statistics import Average, average_at_k, paired_difference, problem_interval
from .table import results_table


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
