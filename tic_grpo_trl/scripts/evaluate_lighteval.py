"""Evaluate a model on sets that lighteval brings, LiveCodeBench by default, into the same results and table.

lighteval 0.13 wants older packages than this one (latex2sympy2_extended), so it lives in an environment of its own:

    python -m tic_grpo_trl.scripts.evaluate_lighteval --model_name_or_path runs/qwen3 --name TIC-GRPO \
        --lighteval .venv-lighteval/bin/lighteval --tasks livecodebench=lcb:codegeneration_release_v6

Then, with what `tic_grpo_trl/scripts/evaluate.py` found of the same --name, in one row:

    python -m tic_grpo_trl.scripts.evaluate --table runs/evaluation/*/results.json

It runs the programs that the model writes without a sandbox. Every field of LightevalConfig is a flag.
"""

from typing import Any

from trl import TrlParser

from tic_grpo_trl.evaluation import results_table
from tic_grpo_trl.evaluation.lighteval_runs import LightevalConfig, evaluate_by_lighteval


def main():
    """Read flags and YAML, evaluate, and print the table."""
    classes: Any = (LightevalConfig,)
    (config,) = TrlParser(classes).parse_args_and_config()
    print(results_table([evaluate_by_lighteval(config)]), end="")
    print(f"\nEvery sample, results.json and table.md are in {config.output_dir}")


if __name__ == "__main__":
    main()
