"""Read flags and YAML files, with help that fits on a screen and errors of one line."""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trl import TrlParser

from ..rewards.failures import RewardError
from ..safety.non_finite import NonFiniteError
from ..validation.suggestions import did_you_mean
from .recipes import read_yaml, recipe_path


SHOW_TRACEBACK = "TIC_GRPO_TRACEBACK"  # environment variable
# Where an error about a setting, a path or a model is raised; anywhere else it is a defect, and needs its traceback
SPEAKERS = ("tic_grpo_trl", "trl", "transformers", "accelerate", "peft", "datasets", "huggingface_hub")


class CommandLine(TrlParser):
    """Parse flags and the YAML file or recipe of `--config` into dataclasses.

    Args:
        classes: the dataclasses, whose fields are the flags.
        description: printed by `--help`.
        sections: the flags that `--help` shows, by heading, each with its help; `--help-all` shows all of them.
        of_launcher: keys of the file that are for `tic-grpo train` alone, and are passed over here.

    Raises:
        ValueError: for an unknown flag or key, with the nearest known one, or for a value of the wrong type.
    """

    def __init__(
        self,
        classes: Sequence[Any],
        description: str,
        sections: dict[str, dict[str, str]],
        of_launcher: Sequence[str] = (),
    ):
        super().__init__(classes, allow_abbrev=False, add_help=False)
        self.description, self.sections, self.of_launcher = description, sections, of_launcher
        self.dict_fields = {name for each in classes for name in getattr(each, "_VALID_DICT_FIELDS", ())}
        self.prog = "tic-grpo"

    def parse(self, words: Sequence[str]) -> Any:
        """Return one object of each class; or print the help and exit."""
        if {"-h", "--help", "--help-all"} & {*words}:
            print(self.format_help() if "--help-all" in words else self.format_short_help(), end="")
            sys.exit()
        words, found = split_flags(words, "config")
        if "config" in found:
            path = recipe_path(found["config"])
            read_yaml(path)  # whose errors are shorter
            words += ["--config", str(path)]
        return self.parse_args_and_config(words)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            if not word.startswith("-"):
                raise ValueError(f"{word!r} is not a flag. Write --NAME VALUE; --help lists the flags.")
            known = [option for option in self._option_string_actions if "-" not in option[2:]]
            near = did_you_mean("--" + word.lstrip("-").replace("-", "_"), known)
            raise ValueError(f"Unknown flag {word}.{near} --help lists the common flags, --help-all all of them.")
        for name in self.dict_fields:
            text = getattr(namespace, name, None)
            if isinstance(text, str) and text.startswith("{"):
                try:
                    json.loads(text)
                except ValueError as error:
                    raise ValueError(f"--{name} {text}: this is no valid JSON ({error}).") from None
        return namespace, unknown

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        known = {action.dest for action in self._actions}
        values = {name: value for name, value in values.items() if name in known or name not in self.of_launcher}
        for name in values:
            if name not in known:
                raise ValueError(f"Unknown key {name!r} in the file of --config.{did_you_mean(name, known)}")
        return super().set_defaults_with_config(**values)

    def error(self, message: str):  # argparse would print the usage of 250 flags
        raise ValueError(message)

    def format_short_help(self) -> str:
        """Format the help of the common flags."""
        by_name = {action.dest: action for action in self._actions}
        formatter = argparse.HelpFormatter(self.prog, max_help_position=34, width=min(120, _columns()))
        lines = [str(self.description).strip(), ""]
        for heading, flags in self.sections.items():
            formatter.start_section(heading)
            for name, text in flags.items():
                placeholder = _placeholder(by_name[name])
                formatter.add_argument(argparse.Action([f"--{name}"], name, metavar=placeholder, help=text))
            formatter.end_section()
        others = len({action.dest for action in self._actions})
        end = f"--help-all shows all {others} flags. Every flag is also a key of the YAML file of --config.\n"
        end += f"With {SHOW_TRACEBACK}=1 in the environment, errors come with their traceback.\n"
        return "\n".join([*lines, formatter.format_help(), end])


def _columns() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 120


def _placeholder(action: argparse.Action) -> str:
    kind = getattr(action.type, "__name__", "")
    placeholder = {"int": "N", "float": "X", "string_to_bool": "true|false"}.get(kind, "VALUE")
    return placeholder + " ..." * (action.nargs == "+")


def split_flags(words: Sequence[str], *names: str) -> tuple[list[str], dict[str, str]]:
    """Take some flags out of a command line: return the other words, and the value of each flag that was given."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    for name in names:
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), dest=name)
    try:
        found, others = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    return others, vars(found)


@contextmanager
def short_errors(is_starting: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Print an error about the settings as one line without a traceback, and exit with the status 2.

    This is for errors of known libraries while `is_starting()`; others keep their traceback. An error that says all by
    itself, of a reward function or of NaN updates, is printed at any time, with the status 1. All errors have their
    traceback if `TIC_GRPO_TRACEBACK` is set. In a run of several processes all fail in the same way. The first one
    prints the error and its launcher ends the others, which wait for that.
    """
    try:
        yield
    except (RewardError, NonFiniteError) as error:
        _end(str(error), 1)
    except Exception as error:
        speaker = _speaker(error)
        is_known = isinstance(error, ValueError | TypeError | OSError | ImportError) and speaker in SPEAKERS
        if not is_starting() or not (is_known or type(error).__module__.startswith("wandb.errors")):
            raise
        message = " ".join(str(error).split())
        _end(message if speaker == "tic_grpo_trl" else f"{message} ({speaker}; {SHOW_TRACEBACK}=1 shows where)", 2)


def _end(message: str, status: int):
    """Print the error that is being handled, and exit."""
    if os.environ.get(SHOW_TRACEBACK):
        raise
    if os.environ.get("RANK", "0") != "0":
        time.sleep(30)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _speaker(error: BaseException) -> str:
    """Return the package that raised an error, or that called the standard library to do so."""
    names = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        spec = frame.f_globals.get("__spec__")  # of a module that runs with `python -m`, the name is in its spec alone
        names.append((spec.name if spec is not None else frame.f_globals.get("__name__", "")).partition(".")[0])
    return next((name for name in reversed(names) if name not in sys.stdlib_module_names), "")
