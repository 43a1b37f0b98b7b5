"""Fill the fields of the algorithm that the user left unset."""

from typing import Any

from ..algorithms import (
    ALGORITHM_FIELDS,
    ALGORITHMS,
    BOUNDS,
    BOUNDS_READ,
    BY_TOKEN,
    CISPO_CAP,
    OTHER_LOSS_TYPES,
    TRL_UPDATE,
)
from ..objective import PRODUCT_LEVELS


DEFAULT_BOUNDS = {"epsilon": 0.2, "epsilon_high": 0.28}
LENGTH_SCALED = {"length_scaled_floor": "epsilon", "length_scaled_cap": "epsilon_high"}  # and what each replaces


def is_weight_of_trl(level: str | None, clip_mode: str | None) -> bool:
    """Return whether TRL's default loss computes this importance weight."""
    return level in ("token", "sequence") and clip_mode == "two_sided"


def resolve_algorithm(config: Any):
    """Fill the fields that are unset from the algorithm, the loss type and the clip mode.

    What the user should know goes to `config.notes`, which are printed when training starts.

    Raises:
        ValueError: if two bounds contradict each other, or a length-scaled bound has no effect.
    """
    config.notes = []
    algorithm = TRL_UPDATE | ALGORITHMS[config.algorithm]
    explicit = {name for name in ALGORITHM_FIELDS if getattr(config, name) is not None}
    if config.loss_type not in (None, algorithm["loss_type"]):
        _follow_loss_type(config, algorithm, explicit)
    for name in ALGORITHM_FIELDS:
        if name not in explicit:
            setattr(config, name, algorithm.get(name))
    # Level and clip mode "none" go together; one of them that was set decides.
    if "clip_mode" not in explicit and "none" in (config.importance_sampling_level, config.clip_mode):
        default = {"none": "none", "trajectory": "up_only", "prefix": "dual_clip"}
        config.clip_mode = default.get(str(config.importance_sampling_level), "two_sided")
    _resolve_bounds(config, explicit)


def _follow_loss_type(config: Any, algorithm: dict[str, Any], explicit: set[str]):
    """Replace the algorithm's weight and bounds where an explicit loss type comes with its own."""
    has_own_weight, had_own_weight = (name in OTHER_LOSS_TYPES for name in (config.loss_type, algorithm["loss_type"]))
    if not (has_own_weight or had_own_weight):
        return
    fits = is_weight_of_trl(algorithm["importance_sampling_level"], algorithm["clip_mode"])
    if had_own_weight or config.loss_type != "luspo" or not fits:
        for name in BOUNDS:
            algorithm.pop(name, None)
    if config.loss_type == "cispo":
        algorithm["epsilon_high"] = CISPO_CAP
    if has_own_weight and not fits:
        algorithm |= BY_TOKEN
        if used := ", ".join(f"{name}={value!r}" for name, value in BY_TOKEN.items() if name not in explicit):
            own = f"loss_type={config.loss_type!r} defines its own weight"
            config.notes.append(f"{own}: using {used} instead of the algorithm's.")
        others = {name: algorithm[name] for name in TRL_UPDATE if name not in explicit}
        if kept := " and ".join(f"{name}={value!r}" for name, value in others.items() if value != TRL_UPDATE[name]):
            config.notes.append(f"loss_type={config.loss_type!r} keeps {kept} of algorithm={config.algorithm!r}.")


def _resolve_bounds(config: Any, explicit: set[str]):
    """Drop the bounds that the loss does not read, and fill those that it does."""
    if config.loss_type in OTHER_LOSS_TYPES:
        read, reader = OTHER_LOSS_TYPES[str(config.loss_type)], f"loss_type={config.loss_type!r}"
    else:
        read, reader = BOUNDS_READ[str(config.clip_mode)], f"clip_mode={config.clip_mode!r}"
    for name in [name for name in BOUNDS if name not in read]:
        if name in explicit:
            unused = f"{name}={getattr(config, name)} has no effect with {reader}"
            if name in LENGTH_SCALED and getattr(config, name):
                raise ValueError(f"{unused}: remove {name}.")
            config.notes.append(f"{unused}.")
        setattr(config, name, None)
    for scaled, constant in LENGTH_SCALED.items():
        if getattr(config, scaled) and getattr(config, constant) is not None:
            if {scaled, constant} <= explicit:
                raise ValueError(
                    f"{constant}={getattr(config, constant)} and {scaled}={getattr(config, scaled)} both set the "
                    f"{'upper' if constant == 'epsilon_high' else 'lower'} bound of the weight: remove one of them."
                )
            setattr(config, scaled if constant in explicit else constant, None)
        if config.importance_sampling_level not in PRODUCT_LEVELS and scaled not in explicit:
            setattr(config, scaled, None)
        if constant in read and getattr(config, constant) is None and not getattr(config, scaled):
            setattr(config, constant, DEFAULT_BOUNDS[constant])
    if "epsilon" in explicit & read and "epsilon_high" not in explicit and not config.length_scaled_cap:
        config.notes.append(
            f"epsilon={config.epsilon} sets only the lower bound here, unlike in TRL; the upper bound is "
            f"epsilon_high={config.epsilon_high}."
        )
