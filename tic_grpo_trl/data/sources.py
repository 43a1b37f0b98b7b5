"""Where rows come from: a local file, a folder or the hub. Code that a data set brings is never run."""

import re
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError


BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
KINDS = "a .parquet, .jsonl, .json or .csv file, a folder of such files, or a save_to_disk folder"
PLACES = f"{KINDS}, or a hub id (owner/name)"
# Hub data sets with several configurations and no default of their own
CONFIGS = {"open-r1/DAPO-Math-17k-Processed": "all", "lighteval/code_generation_lite": "release_v6"}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(location: str) -> bool:
    """Whether a location that is no local path can be a data set on the hub (`owner/name`, no file ending)."""
    return bool(_HUB_ID.fullmatch(location)) and location[0] not in "./~" and Path(location).suffix not in BUILDERS


def read(name: str, location: str, config: str | None = None, named: bool = True) -> dict[str, Dataset]:
    """All splits of a data set, rows as they are stored.

    Args:
        name: the set's name, for errors.
        location: local file or folder, or hub id.
        config: configuration of a hub data set or of a folder copied from the hub.
        named: whether it is a named set, whose copies are given as `NAME@LOCATION`.

    Returns:
        Splits by name. A lone file or `Dataset` is `train`, unless it says otherwise.

    Raises:
        FileNotFoundError: if a path does not exist, or the hub has no such data set.
        ConnectionError: if the hub cannot be reached.
        ValueError: if what is there cannot be read as rows.
    """
    path = Path(location).expanduser()
    if path.is_file():
        return _read_file(name, path)
    if path.is_dir():
        return _read_folder(name, path, config)
    if is_hub_id(location):
        return _read_hub(name, location, config, named)
    raise FileNotFoundError(f"{name}: there is no file or folder {location!r}; give {PLACES}.")


def _splits(loaded: Dataset | DatasetDict) -> dict[str, Dataset]:
    if isinstance(loaded, Dataset):
        return {str(loaded.split or "train"): loaded}
    return {str(split): rows for split, rows in loaded.items()}


def _read_file(name: str, path: Path) -> dict[str, Dataset]:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(f"{name}: {path} is none of the kinds that can be read; give {KINDS}.")
    try:
        return _splits(load_dataset(builder, data_files=str(path)))
    except Exception as error:  # each format fails in its own way
        raise ValueError(
            f"{name}: {path} cannot be read as rows of {path.suffix} ({_reason(error)}); is it complete and "
            "of that kind? One row per problem is needed, each with named columns."
        ) from error


def _read_folder(name: str, path: Path, config: str | None) -> dict[str, Dataset]:
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if not saved and not any(file.suffix.lower() in BUILDERS for file in path.rglob("*")):
        raise ValueError(f"{name}: the folder {path} holds no data; give {KINDS}.")
    try:
        return _splits(load_from_disk(path) if saved else load_dataset(str(path), name=config))
    except Exception as error:
        raise ValueError(
            f"{name}: the folder {path} cannot be read ({_reason(error)}). It must be a whole save_to_disk folder or "
            "hold data files of one kind; where a choice of configurations is listed, pass one as config."
        ) from error


def _read_hub(name: str, hub_id: str, config: str | None, named: bool) -> dict[str, Dataset]:
    copy = f"{name}@DIR" if named else "DIR"
    advice = (
        ("" if named else "There is no local file or folder of that name either. ")
        + f"On a machine with internet access: hf download {hub_id} --repo-type dataset --local-dir DIR; "
        f"then give the copy: {copy}"
    )
    try:
        return _splits(load_dataset(hub_id, name=config or CONFIGS.get(hub_id)))
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: the hub has no data set {hub_id!r}, or one that needs a login (hf auth login) or consent to its "
            f"terms ({_reason(error)}). {advice}"
        ) from error
    except OSError as error:  # ConnectionError and the hub's HTTP errors among them
        raise ConnectionError(f"{name}: cannot get {hub_id!r} from the hub ({_reason(error)}). {advice}") from error
    except Exception as error:
        raise ValueError(
            f"{name}: cannot load {hub_id!r} from the hub ({_reason(error)}). Where a choice of configurations is "
            f"listed, pass one as config. {advice}"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of the error that started it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(": ")
