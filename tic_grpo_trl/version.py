"""This package's version, and the check that the installed TRL is one that it was tested with."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


__version__ = "0.1.0"


def requirements(extra: str = "") -> dict[str, Requirement]:
    """Return by name what the installed metadata requires, of an extra or of the package itself.

    The result is empty if the package is not installed but lies on the path.
    """
    try:
        of_all = [Requirement(text) for text in requires("tic-grpo-trl") or []]
    except PackageNotFoundError:
        return {}
    of_extra = [each for each in of_all if each.marker is not None and each.marker.evaluate({"extra": extra})]
    return {each.name: each for each in (of_extra if extra else of_all) if extra or each.marker is None}


def require_tested_trl() -> None:
    """Raise an ImportError if the installed TRL is missing or outside the versions that this package allows."""
    wanted = requirements().get("trl")
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = None
    if wanted is not None and (found is None or not wanted.specifier.contains(found, prereleases=True)):
        has = f"TRL {found} is installed" if found else "TRL is not installed"
        raise ImportError(
            f"tic-grpo-trl {__version__} overrides methods of TRL and needs {wanted}, but {has}: pip install '{wanted}'"
        )
