"""Read examples from a local file, a folder or the hub. Code that comes with a data set never runs."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, load_dataset, load_from_disk
from datasets.data_files import FILES_TO_IGNORE, SPLIT_KEYWORDS
from datasets.exceptions import DatasetNotFoundError

from ..validation.suggestions import near_files


BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
KINDS = "a .parquet, .jsonl, .json or .csv file, a folder of such files, or a save_to_disk folder"
PLACES = f"{KINDS}, or a hub id (owner/name)"
# Hub data sets with several configurations and no default
CONFIGS = {"open-r1/DAPO-Math-17k-Processed": "all", "lighteval/code_generation_lite": "release_v6"}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")  # as the hub stores splits


def is_hub_id(location: str) -> bool:
    """Return whether a location that is not a local path can be a hub data set (`owner/name`, no file extension)."""
    return bool(_HUB_ID.fullmatch(location)) and location[0] not in "./~" and Path(location).suffix not in BUILDERS


def read(name: str, location: str, config: str | None, named: bool, streaming: bool = False) -> dict[str, Any]:
    """Read all splits of a file, folder or hub data set, with the examples as they are stored.

    A single file or `Dataset` is the split `train` unless it says otherwise. With `streaming`, a split is an
    `IterableDataset`, except in a `save_to_disk` folder, which is never read into memory.
    """
    path = Path(location).expanduser()
    if path.is_file():
        loaded = _read_file(name, path, streaming)
    elif path.is_dir():
        loaded = _read_folder(name, path, config, streaming)
    elif is_hub_id(location):
        loaded = _read_hub(name, location, config, named, streaming)
    else:
        hint = near_files(location, BUILDERS)
        raise FileNotFoundError(f"{name}: there is no file or folder {location!r}.{hint} Give {PLACES}.")
    if isinstance(loaded, Dataset):
        return {str(loaded.split or "train"): loaded}
    return {str(split): examples for split, examples in loaded.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Leave errors to the exception: `datasets` would log some of them as well."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _read_file(name: str, path: Path, streaming: bool) -> Any:
    ending = path.suffix.lower()
    if ending not in BUILDERS:
        raise ValueError(f"{name}: {path} has an unknown file type; give {KINDS}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{name}: the file is empty; give one record per example.")
    try:
        with quiet():
            return load_dataset(BUILDERS[ending], data_files=str(path), streaming=streaming)
    except Exception as error:  # each format fails in its own way
        reason = (_wrong_line(path) if ending == ".jsonl" else None) or reason_of(error)
        if "corresponds to no data" in reason or "BatchSize must be greater than 0" in reason:  # csv, parquet
            raise ValueError(f"{name}: the file has no examples; give one record per example.") from error
        raise ValueError(
            f"{name}: {path} cannot be read as {ending} ({reason}). Check that it is complete and has one record per "
            "example, with named columns."
        ) from error


def _wrong_line(path: Path) -> str | None:
    """Say which line of a file of JSON lines is the first that is no JSON object, and why."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is no JSON object: {_start(line)}"
            except json.JSONDecodeError as error:
                what = error.msg.removesuffix(" at")
                return f"line {number} is not JSON, {what} at column {error.colno}: {_start(line)}"
            except ValueError as error:  # such as bytes that are no UTF-8
                return f"line {number} is not JSON, {error}: {_start(line)}"
    return None


def _start(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else text[:60] + "…")


def _read_folder(name: str, path: Path, config: str | None, streaming: bool) -> Any:
    path = path.resolve()
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    card = path / "README.md"  # starts with the configurations, if any
    described = config is not None or (card.is_file() and card.read_text(errors="replace").startswith("---"))
    files = {} if saved else _splits_of_folder(path)
    endings = {file.suffix.lower(): str(file.relative_to(path)) for split in files.values() for file in split}
    if not saved and not files:
        raise ValueError(f"{name}: the folder {path} contains no data; give {KINDS}.")
    if len(endings) > 1 and not described:
        raise ValueError(
            f"{name}: the folder {path} has data files of several types, such as {' and '.join(endings.values())}. "
            "Give one file, or several joined by +."
        )
    try:
        with quiet():
            if saved:
                return load_from_disk(path)
            if described:
                return load_dataset(str(path), name=config, streaming=streaming)
            data_files = {split: [str(file) for file in found] for split, found in files.items()}
            return load_dataset(BUILDERS[next(iter(endings))], data_files=data_files, streaming=streaming)
    except Exception as error:
        raise ValueError(
            f"{name}: the folder {path} cannot be read ({reason_of(error)}). It must be a complete save_to_disk folder "
            "or contain data files of one type. If the message lists configurations, pass one as config."
        ) from error


def _splits_of_folder(path: Path) -> dict[str, list[Path]]:
    """Return the data files of each split, which folders or files name as `datasets` knows them; otherwise `train`."""
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in BUILDERS
        and file.is_file()
        and file.name not in FILES_TO_IGNORE
        and not any(part.startswith((".", "__")) for part in file.relative_to(path).parts)  # as `datasets` does
    ]
    for split_of in (_split_by_shard, _split_by_folder, _split_by_file):
        splits: dict[str, list[Path]] = {}
        for file in files:
            if split := split_of(file.relative_to(path)):
                splits.setdefault(split, []).append(file)
        if splits:
            order = dict.fromkeys([*map(str, SPLIT_KEYWORDS), *splits])
            return {split: splits[split] for split in order if split in splits}
    return {"train": files} if files else {}


def _split_by_shard(file: Path) -> str | None:
    match = _SHARD.fullmatch(file.as_posix())
    return match[1] if match else None


def _split_by_folder(file: Path) -> str | None:
    return _split_in(*file.parent.parts)


def _split_by_file(file: Path) -> str | None:
    return _split_in(file.name)


def _split_in(*names: str) -> str | None:
    words = {word for name in names for word in re.split(r"[-._ 0-9]", name)}
    return next((str(split) for split, keywords in SPLIT_KEYWORDS.items() if words & {*keywords}), None)


def _read_hub(name: str, hub_id: str, config: str | None, named: bool, streaming: bool) -> Any:
    advice = f"On a machine with internet access, run: hf download {hub_id} --repo-type dataset --local-dir DIR; then "
    advice += f"give the copy: {name}@DIR" if named else "give the copy: DIR"
    missing = "" if named else f"There is no local file or folder with this name either.{near_files(hub_id, BUILDERS)} "
    try:
        return load_dataset(hub_id, name=config or CONFIGS.get(hub_id), streaming=streaming)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: the hub has no data set {hub_id!r}, or it needs a login (hf auth login) or consent to its terms "
            f"({reason_of(error)}). {missing}{advice}"
        ) from error
    except OSError as error:  # includes ConnectionError and the hub's HTTP errors
        raise ConnectionError(
            f"{name}: cannot get {hub_id!r} from the hub ({reason_of(error)}). {missing}{advice}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{name}: cannot load {hub_id!r} from the hub ({reason_of(error)}). If the message lists configurations, "
            f"pass one as config. {missing}{advice}"
        ) from error


def reason_of(error: BaseException) -> str:
    """Return the first line of the original error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(": ")
