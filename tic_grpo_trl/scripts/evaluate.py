"""Evaluate a model: Avg@k with confidence intervals, all samples, and a table like the papers' Table 1.

By default this evaluates the package's starter on held-out sums. It needs no GPU or download:

    python -m tic_grpo_trl.scripts.evaluate

The papers' four sets: 32 samples per AIME problem at temperature 1, greedy answers otherwise. To resume, rerun the same
command:

    python -m tic_grpo_trl.scripts.evaluate --model_name_or_path runs/qwen3 --name TIC-GRPO --dtype bfloat16 \
        --datasets aime24 aime25 math500 livecodebench --output_dir runs/evaluation/tic_grpo

Print several runs in one table, with differences from the first:

    python -m tic_grpo_trl.scripts.evaluate --table runs/evaluation/*/results.json

Every field of EvaluationConfig is a flag, and a key of the YAML file that `--config` names.
"""

import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from tic_grpo_trl.evaluation import EvaluationConfig, evaluate, read_results, results_table


@dataclass
class TableArguments:
    """Select finished runs to print."""

    table: list[str] = field(default_factory=list, metadata={"help": "Only print these results.json files in a table."})


def main():
    """Parse flags and YAML, and evaluate or print a table."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tic_grpo_trl").setLevel(logging.INFO)
    classes: Any = (TableArguments, EvaluationConfig)
    table_args, config = TrlParser(classes).parse_args_and_config()
    if table_args.table:
        print(results_table(read_results(table_args.table)), end="")
        return
    print(results_table([evaluate(config)]), end="")
    print(f"\nSamples, results.json and table.md are in {Path(config.output_dir)}")


if __name__ == "__main__":
    main()
