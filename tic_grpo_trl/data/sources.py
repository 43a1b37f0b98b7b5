"""Read examples from a local file, a folder or the hub. Code that comes with a data set never runs."""

import re
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError


BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
KINDS = "a .parquet, .jsonl, .json or .csv file, a folder of such files, or a save_to_disk folder"
PLACES = f"{KINDS}, or a hub id (owner/name)"
# Hub data sets with several configurations and no default
CONFIGS = {"open-r1/DAPO-Math-17k-Processed": "all", "lighteval/code_generation_lite": "release_v6"}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(location: str) -> bool:
    """Return whether a location that is not a local path can be a hub data set (`owner/name`, no file extension)."""
    return bool(_HUB_ID.fullmatch(location)) and location[0] not in "./~" and Path(location).suffix not in BUILDERS


def read(name: str, location: str, config: str | None, named: bool) -> dict[str, Dataset]:
    """Read all splits of a file, folder or hub data set, with the examples as they are stored.

    A single file or `Dataset` is the split `train` unless it says otherwise.
    """
    path = Path(location).expanduser()
    if path.is_file():
        loaded = _read_file(name, path)
    elif path.is_dir():
        loaded = _read_folder(name, path, config)
    elif is_hub_id(location):
        loaded = _read_hub(name, location, config, named)
    else:
        raise FileNotFoundError(f"{name}: there is no file or folder {location!r}; give {PLACES}.")
    if isinstance(loaded, Dataset):
        return {str(loaded.split or "train"): loaded}
    return {str(split): examples for split, examples in loaded.items()}


def _read_file(name: str, path: Path) -> DatasetDict:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(f"{name}: {path} has an unknown file type; give {KINDS}.")
    try:
        return load_dataset(builder, data_files=str(path))
    except Exception as error:  # each format fails in its own way
        raise ValueError(
            f"{name}: {path} cannot be read as {path.suffix} ({_reason(error)}). Check that it is complete and has one "
            "record per problem, with named columns."
        ) from error


def _read_folder(name: str, path: Path, config: str | None) -> Dataset | DatasetDict:
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if not saved and not any(file.suffix.lower() in BUILDERS for file in path.rglob("*")):
        raise ValueError(f"{name}: the folder {path} contains no data; give {KINDS}.")
    try:
        return load_from_disk(path) if saved else load_dataset(str(path), name=config)
    except Exception as error:
        raise ValueError(
            f"{name}: the folder {path} cannot be read ({_reason(error)}). It must be a complete save_to_disk folder "
            "or contain data files of one type. If the message lists configurations, pass one as config."
        ) from error


def _read_hub(name: str, hub_id: str, config: str | None, named: bool) -> DatasetDict:
    advice = f"On a machine with internet access, run: hf download {hub_id} --repo-type dataset --local-dir DIR; then "
    advice += f"give the copy: {name}@DIR" if named else "give the copy: DIR"
    missing = "" if named else "There is no local file or folder with this name either. "
    try:
        return load_dataset(hub_id, name=config or CONFIGS.get(hub_id))
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: the hub has no data set {hub_id!r}, or it needs a login (hf auth login) or consent to its terms "
            f"({_reason(error)}). {missing}{advice}"
        ) from error
    except OSError as error:  # includes ConnectionError and the hub's HTTP errors
        raise ConnectionError(
            f"{name}: cannot get {hub_id!r} from the hub ({_reason(error)}). {missing}{advice}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{name}: cannot load {hub_id!r} from the hub ({_reason(error)}). If the message lists configurations, "
            f"pass one as config. {missing}{advice}"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the first line of the original error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(": ")
