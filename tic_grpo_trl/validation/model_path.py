"""Explain a model that cannot be read, with the command that makes it or a name that is probably meant."""

from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoConfig, PretrainedConfig

from .suggestions import near_files


def missing_model(name: str, command: str | None = None, option: str = "--model_name_or_path") -> str | None:
    """Return why a model cannot be loaded from its folder, or `None` if the folder exists or `name` may be a hub id.

    Args:
        name: `model_name_or_path`.
        command: makes the folder, as a recipe's `model_command` says; `name` is then never a hub id.
        option: flag that gave the name.
    """
    if Path(name).expanduser().exists():
        return None
    if command is not None:
        return f"{option} {name} does not exist. This command makes it: {command}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{option} {name} does not exist.{near_files(name, ())} Give a local folder or a hub id."
    return None


def check_model(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    command: str | None = None,
    option: str = "--model_name_or_path",
) -> PretrainedConfig:
    """Read the configuration of a model's folder or hub id, without its weights.

    Args:
        name: `model_name_or_path`.
        revision: branch, tag or commit on the hub.
        trust_remote_code: allow code that comes with the model to run.
        command: makes the folder, as a recipe's `model_command` says.
        option: flag that gave the name.

    Raises:
        ValueError: if there is no such model, or its `config.json` is missing or wrong.
        ConnectionError: if the hub cannot be reached, and no local folder has a similar name.
    """
    if missing := missing_model(name, command, option):
        raise ValueError(missing)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        kind: type[Exception] = ValueError
        is_folder, hint = Path(name).is_dir(), ""
        if is_folder and not Path(name, "config.json").exists():
            reason = "the folder has none"
        elif isinstance(error, ValueError):  # such as code that is not trusted
            raise ValueError(f"{option} {name}: {_one_line(error)}") from error
        elif isinstance(error.__cause__, RepositoryNotFoundError):
            reason = "the hub has no such model, or it needs a login"
        elif isinstance(error.__cause__, LocalEntryNotFoundError):
            kind = ConnectionError
            reason = "the hub cannot be reached" + ", because HF_HUB_OFFLINE is set" * constants.HF_HUB_OFFLINE
        else:
            reason = _one_line(error)
        if not is_folder and (hint := near_files(name, ())):
            kind = ValueError
        raise kind(
            f"{option} {name}: its config.json cannot be read ({reason}).{hint} Give a local folder or a hub id."
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
