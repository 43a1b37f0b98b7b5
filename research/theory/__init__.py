"""The papers' theory on policies small enough to be exact. `python -m research.theory` writes the report."""

from .ascent import Setting, ascend, theorem_algorithms
from .decomposition import IDENTITIES, decompose
from .estimators import expected_group_update, expected_update, listed, package_algorithm
from .martingale import second_moments
from .minibatch import second_step_bias
from .policy import Responses, Task, chain_task, enumerate_responses, expected_reward, policy_gradient, tree_task


__all__ = [
    "IDENTITIES",
    "Responses",
    "Setting",
    "Task",
    "ascend",
    "chain_task",
    "decompose",
    "enumerate_responses",
    "expected_group_update",
    "expected_reward",
    "expected_update",
    "listed",
    "package_algorithm",
    "policy_gradient",
    "second_moments",
    "second_step_bias",
    "theorem_algorithms",
    "tree_task",
]
