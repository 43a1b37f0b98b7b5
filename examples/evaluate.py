"""Evaluate a model: Avg@k with intervals, every sample, and a table in the form of the papers' Table 1.

Without arguments it evaluates the package's starter on held-out sums, which needs no GPU and no download:

    python examples/evaluate.py

The papers' four sets, AIME by 32 samples at temperature 1, the others greedily; a run that was stopped goes on when the
same command is given again:

    python examples/evaluate.py --model_name_or_path runs/qwen3 --name TIC-GRPO --dtype bfloat16 \
        --datasets aime24 aime25 math500 livecodebench --output_dir runs/evaluation/tic_grpo

Several runs in one table, differences from the first:

    python examples/evaluate.py --table runs/evaluation/grpo/results.json runs/evaluation/tic_grpo/results.json

Every field of EvaluationConfig is a flag and a key of the YAML that `--config` names.
"""

import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from tic_grpo_trl.evaluation import EvaluationConfig, evaluate, read_results, results_table


@dataclass
class TableArguments:
    """What to do with results that are there already."""

    table: list[str] = field(
        default_factory=list, metadata={"help": "Evaluate nothing; print these results.json as one table."}
    )


def main(table_args: TableArguments, config: EvaluationConfig):
    if table_args.table:
        print(results_table(read_results(table_args.table)), end="")
        return
    result = evaluate(config)
    print(results_table([result]), end="")
    print(f"\nEvery sample, results.json and table.md are in {Path(config.output_dir)}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tic_grpo_trl").setLevel(logging.INFO)
    main(*TrlParser((TableArguments, EvaluationConfig)).parse_args_and_config())
