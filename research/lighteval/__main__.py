"""Evaluate a model with lighteval, on LiveCodeBench by default, with the same results and table.

lighteval 0.13 needs an older latex2sympy2_extended than this package, so install it in its own environment:

    python -m research.lighteval --model_name_or_path runs/qwen3 --name TIC-GRPO \
        --lighteval .venv-lighteval/bin/lighteval --tasks livecodebench=lcb:codegeneration_release_v6

Then print the results in one row with those of `tic_grpo_trl.scripts.evaluate` that have the same --name:

    python -m tic_grpo_trl.scripts.evaluate --table runs/evaluation/*/results.json

lighteval runs the model's programs without a sandbox. Every field of LightevalConfig is a flag.
"""

from typing import Any

from trl import TrlParser

from tic_grpo_trl.evaluation import results_table

from .runs import LightevalConfig, evaluate_by_lighteval


def main():
    """Parse flags and YAML, evaluate, and print the table."""
    classes: Any = (LightevalConfig,)
    (config,) = TrlParser(classes).parse_args_and_config()
    print(results_table([evaluate_by_lighteval(config)]), end="")
    print(f"\nSamples, results.json and table.md are in {config.output_dir}")


if __name__ == "__main__":
    main()
