"""Find the name that a mistyped one probably means."""

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like `word`, ignoring case, or `None` if none is like it."""
    by_lower_case = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` with the known name that is most like `word`, or `""` if none is."""
    found = nearest(word, known)
    return f" Did you mean {found!r}?" if found else ""


def near_files(location: str, endings: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` with the folder or file, of these endings, most like `location`, or `""`."""
    path = Path(location)
    try:
        beside = list(path.expanduser().parent.iterdir())
    except OSError:
        return ""
    names = [file.name for file in beside if file.is_dir() or file.suffix.lower() in endings]
    stem = nearest(path.stem, [Path(name).stem for name in names])  # the endings make any two files alike
    alike = [name for name in names if Path(name).stem == stem]
    found = nearest(path.name, alike, 0) if alike else nearest(path.name, names, 0.8)
    return f" Did you mean {str(path.parent / found)!r}?" if found else ""
