"""Define every algorithm as data: the values of its fields, with their source."""

from typing import Any


ALGORITHM_FIELDS = (
    "importance_sampling_level",
    "clip_mode",
    "epsilon",
    "epsilon_high",
    "delta",
    "length_scaled_cap",
    "length_scaled_floor",
    "loss_type",
    "scale_rewards",
    "advantage_baseline",
    "scale_lr_by_ess",
)

# The bounds that each clip mode reads. Other bounds have no effect.
BOUNDS = ("epsilon", "epsilon_high", "delta", "length_scaled_cap", "length_scaled_floor")
_UPPER, _LOWER = {"epsilon_high", "length_scaled_cap"}, {"epsilon", "length_scaled_floor"}
BOUNDS_READ = {
    "up_only": _UPPER | {"delta"},
    "capped": _UPPER | {"delta"},
    "two_sided": _UPPER | _LOWER | {"delta"},
    "dual_clip": _UPPER | _LOWER,
    "truncated": _UPPER | _LOWER,
    "masked": _UPPER | _LOWER,
    "adaptive": set(),
    "none": set(),
}
ANCHORED_LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo")

# TRL's losses with an importance weight of their own, and the bounds that each reads
OTHER_LOSS_TYPES = {
    "cispo": {"epsilon_high"},
    "sapo": set(),
    "luspo": {"epsilon", "epsilon_high", "delta"},
    "vespo": set(),
}
CISPO_CAP = 5.0  # the cap itself, not 1 + epsilon_high (ScaleRL, arXiv 2510.13786)

# Fields that algorithms leave out where they do as TRL does
TRL_UPDATE = {"advantage_baseline": "group_mean", "scale_lr_by_ess": False}

BY_TOKEN = {"importance_sampling_level": "token", "clip_mode": "two_sided"}  # TRL's default importance weight
_DAPO_CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}


def _algorithm(level: str, clip_mode: str, loss_type: str, scale_rewards: str, **others: Any) -> dict[str, Any]:
    weight = {"importance_sampling_level": level, "clip_mode": clip_mode}
    return weight | others | {"loss_type": loss_type, "scale_rewards": scale_rewards}


ALGORITHMS: dict[str, dict[str, Any]] = {
    # v5 Eq. 8 and Table 1
    "tic_grpo": _algorithm("trajectory", "up_only", "dr_grpo", "none", epsilon_high=0.28),
    # the authors' released loss: cap σ√|o_i| for A > 0, dual clip 3.0 for A < 0
    "tic_grpo_released": _algorithm("trajectory", "up_only", "dr_grpo", "group", length_scaled_cap=0.01, delta=3.0),
    # ours: truncated importance sampling, min(w', 1 + ε_high)·A·∇log π_θ for both signs of A
    "tic_grpo_capped": _algorithm("trajectory", "capped", "dr_grpo", "none", epsilon_high=0.28),
    # ours: as tic_grpo_capped for A < 0, with PPO's lower bound; PPO's rule for A > 0
    "tic_grpo_truncated": _algorithm("trajectory", "truncated", "dr_grpo", "none", **_DAPO_CLIP),
    # v2 Eq. 9 and Algorithm 2
    "tic_grpo_v2": _algorithm("trajectory", "up_only", "grpo", "group", epsilon_high=0.28),
    # DAPO's loss (arXiv 2503.14476), the baseline of both papers
    "grpo": _algorithm("token", "two_sided", "dapo", "none", **_DAPO_CLIP),
    # v5 Eq. 14, "GRPO2" in the theory and "GRPO+UB_Clip" in Table 2
    "grpo2": _algorithm("token", "up_only", "dr_grpo", "none", epsilon_high=0.28),
    # v5 Table 2, "GRPO+Traj_IS"
    "grpo_traj_is": _algorithm("trajectory", "two_sided", "dapo", "none", **_DAPO_CLIP),
    # GSPO (arXiv 2507.18071), the baseline of v5
    "gspo": _algorithm("sequence", "two_sided", "grpo", "group", epsilon=3e-4, epsilon_high=4e-4),
    # TRL's losses under their own names: ScaleRL's CISPO, SAPO (arXiv 2511.20347), LUSPO (arXiv 2602.05261, §5.1),
    # VESPO (arXiv 2602.10693)
    "cispo": _algorithm("token", "two_sided", "cispo", "batch", epsilon_high=CISPO_CAP),
    "sapo": _algorithm("token", "two_sided", "sapo", "group"),
    "luspo": _algorithm("sequence", "two_sided", "luspo", "group", epsilon=2e-3, epsilon_high=2.5e-3),
    "vespo": _algorithm("token", "two_sided", "vespo", "group"),
    # no importance sampling: v2 Fig. 1 and v5 Fig. 1
    "grpo_no_is": _algorithm("none", "none", "dapo", "none"),
    # Rules for stale data, with the normaliser and the advantages of tic_grpo, so that only the weight differs.
    # verl's rollout correction in bypass mode: truncated importance sampling with the cap 2
    "seq_tis": _algorithm("trajectory", "capped", "dr_grpo", "none", epsilon_high=1.0),
    # verl's and TRL's sequence_mask with the cap 3, and no lower bound
    "seq_mis": _algorithm("trajectory", "masked", "dr_grpo", "none", epsilon=1.0, epsilon_high=2.0),
    # CTPO (arXiv 2605.07331): the ratio of the tokens so far, with the released code's bounds
    "ctpo": _algorithm("prefix", "dual_clip", "dr_grpo", "none", length_scaled_floor=0.025, length_scaled_cap=0.05),
    # VCPO (arXiv 2602.17616) with the released code's cap of 8
    "vcpo": _algorithm(
        "trajectory",
        "capped",
        "dr_grpo",
        "none",
        epsilon_high=7.0,
        advantage_baseline="minimum_variance",
        scale_lr_by_ess=True,
    ),
    # ours: as tic_grpo_capped, with the cap that each mini-batch's own ratios make best
    "tic_grpo_adaptive": _algorithm("trajectory", "adaptive", "dr_grpo", "none"),
}


def needs_mini_batch(values: dict[str, Any]) -> bool:
    """Return whether an update with these values of the fields depends on the mini-batch as a whole."""
    by_baseline = values.get("advantage_baseline") == "minimum_variance"
    return values["clip_mode"] == "adaptive" or by_baseline or bool(values.get("scale_lr_by_ess"))


# Algorithms made of a level, a clip mode and a length normaliser, in which a response's term depends on no other
# response's ratio; without TRL's other losses and the aliases
FAMILY = [
    name
    for name, algorithm in ALGORITHMS.items()
    if algorithm["loss_type"] in ANCHORED_LOSS_TYPES and not needs_mini_batch(algorithm)
]

ALIASES = {"dapo": "grpo", "grpo_ub_clip": "grpo2"}
ALGORITHMS |= {alias: ALGORITHMS[name] for alias, name in ALIASES.items()}
