"""Run every measurement of the theory and write figures and `theory.md`.

python -m research.theory --output_dir runs/theory
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from .experiments import QUICK, Scale, measure
from .figures import FIGURES
from .report import theory_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; `arguments` as on the command line."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # TRL uses names it renamed
    parser = argparse.ArgumentParser(prog="python -m research.theory", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="runs/theory", help="folder for the figures and theory.md")
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds: tiny sizes, numbers mean little")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # tensors are small: more threads only wait for one another
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = measure(QUICK if args.quick else Scale())
    for name, draw in FIGURES.items():
        draw(results, folder / name)
    (folder / "theory.md").write_text(theory_report(results))
    broken = [check.claim for check in results.checks if not check.holds]
    print(f"{folder / 'theory.md'}: {len(results.checks) - len(broken)} of {len(results.checks)} exact claims hold")
    if broken:
        raise SystemExit("Not within the target: " + "; ".join(broken))


if __name__ == "__main__":
    main()
