"""Evaluate a model: Avg@k with intervals, every sample, and a table in the form of the papers' Table 1.

Without arguments it evaluates the package's starter on held-out sums, which needs no GPU and no download:

    python -m tic_grpo_trl.scripts.evaluate

The papers' four sets, AIME by 32 samples at temperature 1, the others greedily; a run that was stopped goes on when the
same command is given again:

    python -m tic_grpo_trl.scripts.evaluate --model_name_or_path runs/qwen3 --name TIC-GRPO --dtype bfloat16 \
        --datasets aime24 aime25 math500 livecodebench --output_dir runs/evaluation/tic_grpo

Several runs in one table, differences from the first:

    python -m tic_grpo_trl.scripts.evaluate --table runs/evaluation/*/results.json

Every field of EvaluationConfig is a flag and a key of the YAML that `--config` names.
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
    """What to do with results that are there already."""

    table: list[str] = field(
        default_factory=list, metadata={"help": "Evaluate nothing; print these results.json as one table."}
    )


def main():
    """Read flags and YAML, and evaluate or print a table."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tic_grpo_trl").setLevel(logging.INFO)
    classes: Any = (TableArguments, EvaluationConfig)
    table_args, config = TrlParser(classes).parse_args_and_config()
    if table_args.table:
        print(results_table(read_results(table_args.table)), end="")
        return
    result = evaluate(config)
    print(results_table([result]), end="")
    print(f"\nEvery sample, results.json and table.md are in {Path(config.output_dir)}")


if __name__ == "__main__":
    main()
