"""Keep credentials out of what a run writes: `training_args.bin`, trackers, printed settings.

transformers masks `hub_token` for trackers only. `training_args.bin`, which is pushed to the hub with the model, would
contain it in plain text, and nothing masks a token in `model_init_kwargs`. wandb also saves the command line.
"""

from collections.abc import Sequence
from typing import Any


NAMES = frozenset({"token", "hub_token", "hf_token", "auth_token", "access_token", "api_key", "password", "secret"})


def without_credentials(value: Any) -> Any:
    """Copy nested dicts and lists, replacing every value whose key is in `NAMES` by `None`."""
    if type(value) is dict:
        return {key: None if key in NAMES else without_credentials(inner) for key, inner in value.items()}
    return [without_credentials(inner) for inner in value] if type(value) is list else value


def credentials_in(value: Any) -> set[str]:
    """Return the strings that `without_credentials` removes."""
    if type(value) is dict:
        found = {inner for key, inner in value.items() if key in NAMES and isinstance(inner, str) and inner}
        return found.union(*map(credentials_in, value.values()))
    return set().union(*map(credentials_in, value)) if type(value) is list else set()


def hide_credentials(arguments: Sequence[str], config: Any) -> list[str]:
    """Replace the credentials of a configuration in a command line by `<hidden>`."""
    for credential in credentials_in(vars(config)):
        arguments = [argument.replace(credential, "<hidden>") for argument in arguments]
    return list(arguments)


class WithoutCredentials:
    """Make training arguments hide their credentials: their dict, string, pickle and deep copy have `None` instead."""

    def to_dict(self) -> dict[str, Any]:
        return without_credentials(super().to_dict())  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return without_credentials(self.__dict__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    __str__ = __repr__
