"""Find the recipes and the accelerate config files by name, and list or print them.

    tic-grpo recipes                 list all of them, each with its first line
    tic-grpo recipes starter zero3   print some; `tic-grpo recipes starter > my.yaml` starts a recipe of your own

The files are those of `examples/recipes/` and `accelerate_configs/` in the repository, which the build maps into the
package.
"""

import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..validation.suggestions import did_you_mean


# The package that holds the files of a kind, and what an error calls one
RECIPES = ("tic_grpo_trl.recipes", "recipe")
TOPOLOGIES = ("tic_grpo_trl.accelerate_configs", "accelerate config")


def named_files(package: str) -> dict[str, Path]:
    """Return the YAML files of a package by their names without `.yaml`, in alphabetical order."""
    files = sorted(Path(str(file)) for file in resources.files(package).iterdir())
    return {file.stem: file for file in files if file.suffix == ".yaml"}


def _find(name: str, option: str, package: str, kind: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    files = named_files(package)
    if name.removesuffix(".yaml") in files:
        return files[name.removesuffix(".yaml")]
    hint = did_you_mean(Path(name).stem, files)
    raise ValueError(f"{option} {name}: there is no such file or {kind}.{hint} The names are {', '.join(files)}.")


def recipe_path(name: str) -> Path:
    """Return the file of a recipe, given by name or as a path; a ValueError says what is near."""
    return _find(name, "--config", *RECIPES)


def accelerate_config_path(name: str) -> Path:
    """Return an accelerate config file, given by name or as a path; a ValueError says what is near."""
    return _find(name, "--accelerate_config", *TOPOLOGIES)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file of settings; a ValueError says what is wrong with it."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: this is no valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: this file must have lines of the form `name: value`.")
    return content


def main(argv: Sequence[str] | None = None) -> None:
    """List all files, or print those that are named."""
    wanted = [word.removesuffix(".yaml") for word in (sys.argv[1:] if argv is None else argv)]
    files = {package: named_files(package) for package, _ in (RECIPES, TOPOLOGIES)}
    by_name = {name: file for of_kind in files.values() for name, file in of_kind.items()}
    if wanted and wanted[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    if unknown := [name for name in wanted if name not in by_name]:
        hint = did_you_mean(unknown[0], by_name)
        raise ValueError(f"{unknown[0]}: there is no such recipe or accelerate config.{hint}")
    for name in wanted:
        print(by_name[name].read_text(), end="")
    if wanted:
        return
    width = max(map(len, by_name))
    titles = ("Recipes, for tic-grpo train --config NAME:", "\nAccelerate configs, for --accelerate_config NAME:")
    for title, of_kind in zip(titles, files.values(), strict=True):
        print(title)
        for name, file in of_kind.items():
            print(f"  {name:<{width}}  {_first_sentence(file)}")


def _first_sentence(file: Path) -> str:
    """Return the first sentence of the comment that a file begins with."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# "))
    text = " ".join(lines)
    return text.split(". ")[0].removesuffix(".") + "."
