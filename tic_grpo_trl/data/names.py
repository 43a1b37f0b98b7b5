"""What a data set's name means: a named set, or the place of the user's own data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset

from ..starter import TASKS, few_shot_sums
from ..validation.suggestions import did_you_mean, near_files
from .named_sets import NAMED_SETS
from .sources import BUILDERS, PLACES, is_hub_id


GENERATED_SETS: dict[str, Callable[..., Dataset]] = {
    **{name: task.make_dataset for name, task in TASKS.items()},
    "few_shot_sums": few_shot_sums.make_dataset,
}
EVALUATION_SETS = tuple(name for name, known in NAMED_SETS.items() if known.evaluation)
KNOWN_NAMES = ", ".join([*NAMED_SETS, *GENERATED_SETS])


def split_names(name: str) -> list[str]:
    """Return the parts of a name that are joined by `+`. A path that exists is one part."""
    _, _, location = name.partition("@")
    if any(text and Path(text).expanduser().exists() for text in (name, location)):
        return [name]  # a path may contain a plus sign
    return [part.strip() for part in name.split("+")]


@contextmanager
def naming(flag: str, name: str) -> Iterator[None]:
    """Begin the errors about a data set with the flag that names it."""
    try:
        yield
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        kind = next(k for k in (FileNotFoundError, ConnectionError, ValueError) if isinstance(error, k))
        parts = [name, *(part.partition("@")[0] for part in split_names(name))]
        begins = str(error).startswith(tuple(f"{part}:" for part in parts))
        raise kind(f"{flag} {error}" if begins else f"{flag} {name}: {error}") from error


def is_named(part: str) -> bool:
    """Return whether a part is a named set, with or without a location, and not the user's own data."""
    name = part.partition("@")[0]
    return name in NAMED_SETS or name in GENERATED_SETS


def parse(part: str) -> tuple[str, str | None]:
    """Return the name of a set and its location, `None` for the set's default; for your own data, the path twice.

    Raises:
        ValueError: if the part is no named set, and cannot be a path or hub id.
        FileNotFoundError: if it is the path of a file or folder that does not exist.
    """
    name, at, location = part.partition("@")
    if not part:
        raise ValueError(f"a data set's name is empty; the named sets are {KNOWN_NAMES}. For other data give {PLACES}.")
    if name in GENERATED_SETS and at:
        raise ValueError(f"{part}: {name} is generated and has no location; remove @{location}.")
    if name in NAMED_SETS and at and not location:
        raise ValueError(f"{part}: give a location after @: {PLACES}.")
    if is_named(part):
        return name, location or None
    if Path(part).expanduser().exists() or is_hub_id(part):
        return part, part
    if at:
        hint = did_you_mean(name, [*NAMED_SETS])
        raise ValueError(f"{part!r}: only named sets accept @LOCATION, and {name!r} is not one of {KNOWN_NAMES}.{hint}")
    if "/" in part or Path(part).suffix:
        raise FileNotFoundError(f"there is no file or folder {part!r}.{near_files(part, BUILDERS)} Give {PLACES}.")
    hint = did_you_mean(part, [*NAMED_SETS, *GENERATED_SETS]) or near_files(part, BUILDERS)
    raise ValueError(
        f"there is no data set {part!r}.{hint} The named sets are {KNOWN_NAMES}. For other data give {PLACES}."
    )
