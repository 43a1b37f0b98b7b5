"""Import a reward function from the path or name that a flag gives, and check that the data has what it reads."""

import importlib
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType

from trl import rewards as trl_rewards

from ..validation.suggestions import did_you_mean
from .mathematics import MathReward
from .programs import CodeReward


PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# What TRL's own script calls by a short name
SHORT_NAMES: dict[str, Callable[[], Callable]] = {
    "accuracy_reward": lambda: trl_rewards.accuracy_reward,
    "reasoning_accuracy_reward": lambda: trl_rewards.reasoning_accuracy_reward,
    "think_format_reward": lambda: trl_rewards.think_format_reward,
    "get_soft_overlong_punishment": lambda: trl_rewards.get_soft_overlong_punishment(1280, 256),
}


def import_reward(path: str, option: str) -> Callable:
    """Import a reward function, also from the working directory.

    Args:
        path: import path such as `my_rewards.correct`, or a short name of TRL's script such as `accuracy_reward`.
        option: flag that gave the path, for the error.

    Raises:
        ValueError: if there is no such module or function, if importing the module fails, or if the path names
            something that cannot be called.
    """
    if path in SHORT_NAMES:
        return SHORT_NAMES[path]()
    if path.endswith(".py") or ":" in path or os.sep in path:
        raise ValueError(f"{option} {path}: {_instead_of_file(path, option)}")
    module_name, dot, name = path.rpartition(".")
    if not dot:
        raise ValueError(
            f"{option} {path}: give MODULE.FUNCTION, such as my_rewards.correct for the function correct in "
            f"my_rewards.py, or one of TRL's {', '.join(SHORT_NAMES)}.{did_you_mean(path, SHORT_NAMES)}"
        )
    module = _import_module(module_name, f"{option} {path}")
    if not hasattr(module, name):
        functions = _functions(module)
        raise ValueError(
            f"{option} {path}: the module {module_name} has no function {name!r}; it has "
            f"{', '.join(functions) or 'none'}.{did_you_mean(name, functions)}"
        )
    function = getattr(module, name)
    if inspect.isclass(function) or not callable(function):
        what = "a class" if inspect.isclass(function) else f"a value of type {type(function).__name__}"
        raise ValueError(f"{option} {path}: {name} is {what}; give a function, or an object that can be called.")
    if function is trl_rewards.get_soft_overlong_punishment:
        raise ValueError(f"{option} {path}: {name} makes a reward function; give --soft_punish_cache instead.")
    return function


def _instead_of_file(path: str, option: str) -> str:
    """Say what to give instead of the path of a file, or of `module:function`."""
    file, _, function = path.partition(":")
    relative = os.path.relpath(os.path.expanduser(file.removesuffix(".py")))
    _, outside, module = relative.rpartition(os.pardir + os.sep)
    if not file.endswith(".py") and not function:  # such as ./my_rewards.correct
        module, _, function = module.rpartition(".")
    module = module.replace(os.sep, ".")
    names = [function] if function else []
    if not names and not outside and os.path.isfile(file):
        names = _functions(_import_module(module, f"{option} {path}"))
    advice = " or ".join(f"{module}.{name}" for name in names) or "MODULE.FUNCTION, such as my_rewards.correct"
    where = os.path.dirname(os.path.abspath(os.path.expanduser(file)))
    return f"give an import path: {advice}." + f" Add {where} to PYTHONPATH." * bool(outside)


def _import_module(name: str, where: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever the user's module does
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise ValueError(f"{where}: {_missing_module(missing)}") from error
        line = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, SyntaxError) else f" ({os.path.basename(line.filename)}, line {line.lineno})"
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{where}: importing {name} failed with {type(error).__name__}: {reason}{place}. Correct the module."
        ) from error


def _missing_module(name: str) -> str:
    parent, _, last = name.rpartition(".")
    if parent:
        folders = getattr(sys.modules.get(parent), "__path__", None)
        if folders is None:
            return f"there is no module {name}: {parent} is a file with functions, not a package. Give MODULE.FUNCTION."
        beside = [module.name for module in pkgutil.iter_modules(folders)]
        return f"there is no module {last!r} in the package {parent}.{did_you_mean(last, beside)}"
    beside = [module.name for module in pkgutil.iter_modules([os.getcwd()])]
    return (
        f"there is no module {name!r} in the working directory {os.getcwd()} or among the installed packages."
        f"{did_you_mean(name, [*beside, 'tic_grpo_trl', 'trl'])}"
    )


def _functions(module: ModuleType) -> list[str]:
    """Return the names of a module's own public functions, and of what it exports."""
    exported = getattr(module, "__all__", ())
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not inspect.isclass(value)
        and not name.startswith("_")
        and (name in exported or getattr(value, "__module__", None) == module.__name__)
    ]


def check_columns(reward: Callable, columns: Sequence[str], where: str) -> None:
    """Check that a reward function can be called with a data set's columns, as TRL does.

    Args:
        reward: reward function.
        columns: columns of the data.
        where: the flag and its value, for the error.

    Raises:
        ValueError: if the function reads a column that the data lacks, or does not accept all that TRL passes.
    """
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY and p.default is p.empty:
            raise ValueError(
                f"{where} takes {p.name!r} by position only, but TRL passes every argument by name: remove the / from "
                "its parameters."
            )
    passed = {*PASSED, *columns} - {"prompt"}
    needed = {
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    if isinstance(reward, MathReward | CodeReward):
        needed.add("solution")
    for name in sorted(needed - passed):
        listed = ", ".join(map(repr, columns))
        raise ValueError(
            f"{where} reads the column {name!r}, which the data does not have; the columns are {listed}. Rename one "
            f"with --dataset_columns {name}=COLUMN, or give the parameter a default."
        )
    if all(p.kind is not p.VAR_KEYWORD for p in parameters) and (unread := passed - {p.name for p in parameters}):
        raise ValueError(
            f"{where} does not accept {', '.join(sorted(unread))}, which TRL passes to every reward function: add "
            "**kwargs to its parameters."
        )
