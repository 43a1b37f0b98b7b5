"""The command `tic-grpo`, also `python -m tic_grpo_trl`."""

import signal
import sys
from typing import NoReturn

from .scripts import recipes
from .version import __version__, require_tested_trl


USAGE = """\
usage: tic-grpo COMMAND [FLAG VALUE ...]

  train      train a model, on one or several GPUs:      tic-grpo train --config starter
  evaluate   measure a model's accuracy:                 tic-grpo evaluate --model_name_or_path runs/starter
  dry-run    print what a run would do and need:         tic-grpo dry-run --config qwen3_1.7b_h200
  recipes    list the recipes and topologies, or print:  tic-grpo recipes starter
  check      tell what this machine has, and what that means

`tic-grpo COMMAND --help` shows a command's flags, `tic-grpo --version` the version.
"""


def main() -> None:
    """Run one of the commands. Each imports what it needs: torch and TRL take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process
    command, words = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return
    if command == "--version":
        print(f"tic-grpo-trl {__version__}")
        return
    try:
        if command == "recipes":
            recipes.main(words)
            return
        if command == "check":
            from .scripts import check

            check.main(words)
            return
        require_tested_trl()
    except (ValueError, ImportError) as error:
        refuse(str(error))
    if command in ("train", "dry-run"):
        from .scripts import launch

        launch.main(words if command == "train" else ["--dry_run", *words])
    elif command == "evaluate":
        from .scripts import evaluate

        evaluate.main(words)
    else:
        refuse(f"there is no command {command!r}; the commands are train, evaluate, dry-run, recipes and check.")


def refuse(message: str) -> NoReturn:
    """Print an error in one line, and exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
