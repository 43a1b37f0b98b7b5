"""Explain a model folder that does not exist, with the command that makes it."""

from pathlib import Path


def missing_model(name: str, command: str | None = None) -> str | None:
    """Return why a model cannot be loaded from its folder, or `None` if the folder exists or `name` may be a hub id.

    Args:
        name: `model_name_or_path`.
        command: makes the folder, as a recipe's `model_command` says; `name` is then never a hub id.
    """
    if Path(name).expanduser().exists():
        return None
    if command is not None:
        return f"model_name_or_path {name} does not exist. This command makes it: {command}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return (
            f"model_name_or_path {name} does not exist. Give a folder with a model, or an id of the hub (owner/name)."
        )
    return None
