r"""Evaluate a model: Avg@k with confidence intervals, all samples, and a table like the papers' Table 1.

By default this evaluates the package's starter on held-out sums. It needs no GPU or download:

    tic-grpo evaluate

The papers' four sets: 32 samples per AIME problem at temperature 1, greedy answers otherwise. To resume, rerun the same
command:

    tic-grpo evaluate --model_name_or_path runs/qwen3 --name TIC-GRPO --dtype bfloat16 \
        --datasets aime24 aime25 math500 livecodebench --output_dir runs/evaluation/tic_grpo

Print several runs in one table, with differences from the first:

    tic-grpo evaluate --table runs/evaluation/*/results.json

`--config` takes a YAML file whose keys are flags.
"""

import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tic_grpo_trl.evaluation import EvaluationConfig, evaluate, read_results, results_table
from tic_grpo_trl.scripts.command_line import CommandLine, short_errors


@dataclass
class TableArguments:
    """Select finished runs to print."""

    table: list[str] = field(default_factory=list, metadata={"help": "Only print these results.json files in a table."})


# What `--help` shows
SECTIONS = {
    "what to evaluate": {
        "model_name_or_path": "hub id, folder or LoRA adapter. Default: the starter",
        "datasets": "aime24 aime25 math500 livecodebench, or your own files",
        "reward_func": "import path of a reward function with values from 0 to 1. Default: the set's own",
        "output_dir": "folder for samples and results. Default: runs/evaluation/NAME",
        "name": "name of the row in the table",
        "table": "only print these results.json files in one table",
    },
    "how": {
        "k": "samples per problem. Default: the papers' for each set",
        "temperature": "0 is greedy. Default: the papers' for each set",
        "max_completion_length": "longest answer, in tokens",
        "limit": "use only so many problems of each set",
        "backend": "vllm, transformers or auto",
        "batch_size": "samples per saved batch",
        "dtype": "data type of the weights",
        "seed": "random seed of all samples",
    },
}


def main(argv: Sequence[str] | None = None):
    """Parse flags and YAML, and evaluate or print a table."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tic_grpo_trl").setLevel(logging.INFO)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    words = sys.argv[1:] if argv is None else argv
    with short_errors():
        table_args, config = CommandLine((TableArguments, EvaluationConfig), str(__doc__), SECTIONS).parse(words)
        if table_args.table:
            print(results_table(read_results(table_args.table)), end="")
            return
        result = evaluate(config)
    print(results_table([result]), end="")
    print(f"\nSamples, results.json and table.md are in {Path(config.output_dir)}")


if __name__ == "__main__":
    main()
