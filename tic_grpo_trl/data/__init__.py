"""Problems to train and evaluate on: named sets, your own data and mixtures of them (`docs/data.md`)."""

from .lengths import drop_long_prompts, prompt_lengths
from .loading import load_problems
from .named_sets import NAMED_SETS
from .names import EVALUATION_SETS, GENERATED_SETS
from .text import CODE_INSTRUCTION, DEFAULT, MATH_INSTRUCTION, normalize_answer


__all__ = [
    "CODE_INSTRUCTION",
    "DEFAULT",
    "EVALUATION_SETS",
    "GENERATED_SETS",
    "MATH_INSTRUCTION",
    "NAMED_SETS",
    "drop_long_prompts",
    "load_problems",
    "normalize_answer",
    "prompt_lengths",
]
