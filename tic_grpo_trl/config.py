"""TICGRPOConfig: GRPOConfig plus the three axes of the family, and the named algorithms that set them."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import GRPOConfig

from .algorithms import ALGORITHM_FIELDS, ALGORITHMS, BOUNDS, BOUNDS_READ, BY_TOKEN, CISPO_CAP, OTHER_LOSS_TYPES
from .objective import CLIP_MODES, CORRECTION_MODES, Clip
from .safety.credentials import WithoutCredentials
from .validation.batch_sizes import check_batches
from .validation.settings import check_bounds, check_guards, check_ranges, check_weight, convert_types


def _is_of_trl(level: str | None, clip_mode: str | None) -> bool:
    """Whether TRL's own losses compute such a weight."""
    return level in ("token", "sequence") and clip_mode == "two_sided"


@dataclass(repr=False)
class TICGRPOConfig(WithoutCredentials, GRPOConfig):
    r"""
    Configuration class for the [`TICGRPOTrainer`].

    It inherits every parameter of [`~trl.GRPOConfig`]. The fields below are new, or have `None` as their default, which
    means "from the algorithm". An explicit value always wins over the algorithm's, from Python, YAML and the command
    line alike.

    Parameters:
        algorithm (`str`, *optional*, defaults to `"tic_grpo"`):
            Named settings of the papers' algorithms: `tic_grpo`, `tic_grpo_released`, `tic_grpo_capped`,
            `tic_grpo_truncated`, `tic_grpo_v2`, `grpo`, `grpo2` (= `grpo_ub_clip`), `grpo_traj_is`, `gspo`,
            `grpo_no_is`; and TRL's losses `cispo`, `sapo`, `luspo`, `vespo`.
        importance_sampling_level (`str`, *optional*):
            `"token"` and `"sequence"` as in TRL; `"trajectory"`: one weight per response, the *product* of its token
            ratios, P_θ/P_old; `"none"`: weight 1 and gradient A·∇log π_θ.
        clip_mode (`str`, *optional*):
            `"up_only"`: above `1 + epsilon_high` the gradient is 0 for either sign of the advantage, no lower bound;
            `"capped"`: the weight is held at `1 + epsilon_high` with its gradient kept, for either sign;
            `"two_sided"`: PPO's rule, with TRL's optional `delta`; `"truncated"`: PPO's rule, except that for A < 0 the
            weight is held at `1 + epsilon_high` with its gradient kept; `"none"`: only with level `"none"`.
        epsilon (`float`, *optional*):
            Lower bound `1 - epsilon` of the weight. 0.2 in the modes that have a lower bound.
        epsilon_high (`float`, *optional*):
            Upper bound `1 + epsilon_high` of the weight, 0.28 (DAPO's value; the script that the papers' authors
            released uses 0.03). With `loss_type="cispo"` the bound itself, 5.0.
        delta (`float`, *optional*):
            Upper bound for A < 0 where it differs from `1 + epsilon_high`; `inf` removes an algorithm's.
        length_scaled_cap (`float`, *optional*):
            σ of the length-scaled upper bound exp(σ·√|o_i|), which then replaces `1 + epsilon_high` (0.01 in the
            authors' released code). 0 turns an algorithm's off. Trajectory level only.
        loss_type (`str`, *optional*):
            Length normalisation, see [`~trl.GRPOConfig`]: `"grpo"` (1/|o_i|), `"dr_grpo"` (1/T, constant), `"dapo"`,
            `"bnpo"`. TRL's `"cispo"`, `"sapo"`, `"luspo"` and `"vespo"` have a weight of their own, which replaces the
            algorithm's level and clip mode.
        scale_rewards (`str` or `bool`, *optional*):
            `"none"` (reward − group mean, v5), `"group"` (divided by the group's std, v2) or `"batch"`.
        partition_by_prompt (`bool`, *optional*, defaults to `True`):
            Cut a rollout into mini-batches of whole groups, uniformly at random (v5 §2.2), where the batch sizes allow
            it: `per_device_train_batch_size * gradient_accumulation_steps * number of processes` must be a multiple of
            `num_generations`, and `steps_per_generation` one of `gradient_accumulation_steps`. Where the groups of a
            mini-batch have to span processes, these exchange rows once per rollout; rollouts with images cannot. Where
            it is not possible, a message says why and responses are shuffled across mini-batches, as TRL does and as
            `False` asks for.
        padding_free (`bool`, *optional*, defaults to `True`):
            Forward real tokens only: responses share rows where the model keeps them apart (found out by a test at the
            start), else each has a row of its own. A mini-batch is then made of as few forward passes as fit in
            `per_device_train_batch_size` rows of its longest response. Rollouts with images, and models whose
            log-probabilities depend on padding, stay as they are in TRL.
        skip_zero_advantage (`bool`, *optional*, defaults to `True`):
            Leave out responses that cannot move the weights: without any token that counts, or with an advantage of
            exactly 0 while `beta` is 0. They still count in every normaliser.
        skip_on_policy_logps (`bool`, *optional*, defaults to `True`):
            Do not score what the first update of a rollout trains on: the policy is still the one that sampled it, so
            every ratio is exactly 1. `False` measures the noise of the numerics there.
        behaviour_policy (`str`, *optional*, defaults to `"trainer"`):
            The policy in the denominator of the ratios: `"trainer"`, the trained model's weights before the first
            update of a rollout, or `"sampler"`, whose log-probabilities vLLM (or a `rollout_func`) returns with the
            samples. With `"sampler"` the trajectory ratio is that of what was really sampled, no old policy is scored
            (but for responses that lack a log-probability), and TRL's vLLM correction is off because the ratio contains
            it.
        min_ess (`float`, *optional*):
            Effective sample size, as a share of a mini-batch's responses, below which its update and the remaining ones
            of the rollout are skipped, and counted. Off by default.
        max_non_finite_steps (`int`, *optional*, defaults to `3`):
            Training stops when so many updates in a row had to be skipped because of NaN or infinite numbers.
        reward_timeout (`float`, *optional*):
            Seconds that one call of a reward function may take; a run whose reward function takes longer ends on every
            process. No limit by default.
        discard_rollout_on_resume (`bool`, *optional*, defaults to `False`):
            Resume from a checkpoint inside a rollout by generating a new rollout. Needed where the algorithm has
            changed since, which is refused otherwise: the rest of the old rollout has its advantages and ratios.
        completions_total_limit (`int`, *optional*):
            Keep the newest so many tables of `log_completions` (`completions/*.parquet`, one per entry of the log), as
            `save_total_limit` does with checkpoints. All by default.
        vllm_importance_sampling_correction (`bool`, *optional*):
            As in TRL `True` where unset, but `False` with `behaviour_policy="sampler"`. At level `"trajectory"` only
            the sequence modes of `vllm_importance_sampling_mode` are taken: the weight of a response is then the
            algorithm's bounded P_θ/P_old times P_old/P_sampler, truncated or masked at
            `vllm_importance_sampling_clip_max`.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Differs from TRL: active dropout (LoRA's too) makes R a sum of noise that grows with √T.
        bf16 (`bool`, *optional*):
            As in TRL `True` where unset, but `False` on a machine without an accelerator.

    Loss types and terms that depend on which responses share a micro-batch (`loss_type="bnpo"` and `"vespo"`, an
    entropy bonus, `top_entropy_quantile` < 1, a router loss) keep TRL's micro-batches and their dead rows, without
    padding.

    With `use_bias_correction_kl=True` (TRL's default) the KL term is multiplied by the *clipped* weight of the
    algorithm.
    """

    algorithm: str = field(
        default="tic_grpo",
        metadata={"help": "Named settings of the papers' algorithms: " + ", ".join(ALGORITHMS) + "."},
    )
    importance_sampling_level: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "'trajectory' (product of the token ratios), 'token', 'sequence' (their mean) or 'none'. Default: "
            "from the algorithm."
        },
    )
    clip_mode: str | None = field(
        default=None,
        metadata={
            "help": "'up_only' (gradient 0 above the cap, for either sign of the advantage), 'capped' (gradient kept), "
            "'two_sided' (PPO), 'truncated' or 'none'. Default: from the algorithm."
        },
    )
    epsilon: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Lower bound 1 - epsilon of the weight, where the clip mode has one. Default: from the algorithm."
        },
    )
    epsilon_high: float | None = field(
        default=None,
        metadata={"help": "Upper bound 1 + epsilon_high of the weight. Default: from the algorithm."},
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "Upper bound of the weight for negative advantages, if different. Default: from the algorithm."
        },
    )
    length_scaled_cap: float | None = field(
        default=None,
        metadata={
            "help": "Sigma of the upper bound exp(sigma * sqrt(response length)), instead of 1 + epsilon_high; 0: off. "
            "Default: from the algorithm."
        },
    )
    loss_type: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Length normalisation: 'grpo', 'dr_grpo', 'dapo' or 'bnpo'. Default: from the algorithm."},
    )
    scale_rewards: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "'none', 'group' or 'batch'. Default: from the algorithm."},
    )
    partition_by_prompt: bool = field(
        default=True,
        metadata={"help": "Mini-batches of whole groups, no prompt in two of them. False: shuffle responses, as TRL."},
    )
    padding_free: bool = field(
        default=True,
        metadata={"help": "Forward real tokens only: no padding, as few forward passes as fit in TRL's memory."},
    )
    skip_zero_advantage: bool = field(
        default=True,
        metadata={"help": "Leave out responses that cannot move the weights (advantage exactly 0, or no tokens)."},
    )
    skip_on_policy_logps: bool = field(
        default=True,
        metadata={"help": "Do not score what the first update of a rollout trains on: its ratios are exactly 1."},
    )
    behaviour_policy: str = field(
        default="trainer",
        metadata={
            "help": "Denominator of the ratios: 'trainer' (old log-probabilities of the trained model) or 'sampler' "
            "(those that vLLM or a rollout_func returned)."
        },
    )
    min_ess: float | None = field(
        default=None,
        metadata={
            "help": "Skip the rest of a rollout's updates when the effective sample size (0 to 1) is below this."
        },
    )
    max_non_finite_steps: int = field(
        default=3,
        metadata={"help": "Stop when so many updates in a row were skipped because of NaN or infinite numbers."},
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that one call of a reward function may take. Default: no limit."}
    )
    discard_rollout_on_resume: bool = field(
        default=False,
        metadata={"help": "Resume inside a rollout by generating a new one, as another algorithm needs."},
    )
    completions_total_limit: int | None = field(
        default=None, metadata={"help": "Keep the newest so many tables of log_completions. Default: all."}
    )
    vllm_importance_sampling_correction: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "TRL's correction of the vLLM mismatch. Default: True, False with behaviour_policy 'sampler'."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Disable dropout (LoRA's too), which would make the trajectory ratio noise."},
    )

    def __post_init__(self):
        convert_types(self)
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False
        self._resolve_algorithm()
        check_weight(self)
        check_bounds(self)
        check_guards(self)
        check_ranges(self)
        self._resolve_behaviour_policy()
        # A saved config holds both of these, which TRL refuses although one follows from the other.
        generation_batch_size = self.generation_batch_size
        if self.steps_per_generation is not None:
            self.generation_batch_size = None
        try:
            super().__post_init__()
        except ValueError as error:
            if "divisible by" in str(error):  # of sizes that may follow from others
                check_batches(self, self.world_size)
            raise
        if generation_batch_size not in (None, self.generation_batch_size):
            raise ValueError(
                f"generation_batch_size={generation_batch_size} contradicts steps_per_generation="
                f"{self.steps_per_generation}, which makes {self.generation_batch_size}: remove one of them."
            )

    @property
    def resolved_algorithm(self) -> dict[str, Any]:
        """The algorithm's name and the value of each of its fields that is in force."""
        return {"algorithm": self.algorithm} | {name: getattr(self, name) for name in ALGORITHM_FIELDS}

    @property
    def clip(self) -> Clip:
        """The clip rule for [`~tic_grpo_trl.objective.clip_log_weight`]."""
        return Clip(
            str(self.clip_mode),
            epsilon_low=1.0 if self.epsilon is None else self.epsilon,
            epsilon_high=math.inf if self.epsilon_high is None else self.epsilon_high,
            delta=self.delta,
            length_scale=self.length_scaled_cap or 0.0,
        )

    @property
    def is_anchored(self) -> bool:
        """Whether the weight is not one that TRL's own loss computes."""
        return not _is_of_trl(self.importance_sampling_level, self.clip_mode)

    def _resolve_algorithm(self):
        """Fill what the user left unset from the algorithm, then from the loss type and the clip mode."""
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"Unknown algorithm {self.algorithm!r}: choose one of {', '.join(ALGORITHMS)}.")
        algorithm = dict(ALGORITHMS[self.algorithm])
        explicit = {name for name in ALGORITHM_FIELDS if getattr(self, name) is not None}
        self.notes = []
        if self.loss_type != algorithm["loss_type"] and {self.loss_type, algorithm["loss_type"]} & set(
            OTHER_LOSS_TYPES
        ):
            self._follow_loss_type(algorithm, explicit)
        for name in ALGORITHM_FIELDS:
            if name not in explicit:
                setattr(self, name, algorithm.get(name))

        # The level and the clip mode "none" belong together: whichever the user set decides, unless both are set.
        if self.importance_sampling_level == "none" and "clip_mode" not in explicit:
            self.clip_mode = "none"
        elif self.clip_mode == "none" and "clip_mode" not in explicit:
            self.clip_mode = "up_only" if self.importance_sampling_level == "trajectory" else "two_sided"
        if self.clip_mode not in CLIP_MODES:
            raise ValueError(f"Unknown clip_mode {self.clip_mode!r}: choose one of {', '.join(CLIP_MODES)}.")
        self._resolve_bounds(explicit)

        # Flags and YAML may give TRL's booleans as text
        self.scale_rewards = {"true": "group", "false": "none"}.get(str(self.scale_rewards).lower(), self.scale_rewards)

    def _follow_loss_type(self, algorithm: dict[str, Any], explicit: set[str]):
        """Let the algorithm's weight give way to the one that a loss type brings along, or that goes with it."""
        if self.loss_type is None:
            return
        fits = _is_of_trl(algorithm["importance_sampling_level"], algorithm["clip_mode"])
        if not (fits and self.loss_type == "luspo" and algorithm["loss_type"] not in OTHER_LOSS_TYPES):
            for name in BOUNDS:
                algorithm.pop(name, None)
        if self.loss_type == "cispo":
            algorithm["epsilon_high"] = CISPO_CAP
        if fits or self.loss_type not in OTHER_LOSS_TYPES:
            return
        algorithm |= BY_TOKEN
        if followed := [f"{name}={value!r}" for name, value in BY_TOKEN.items() if name not in explicit]:
            self.notes.append(
                f"loss_type={self.loss_type!r} brings its own weight: {', '.join(followed)} instead of the algorithm's."
            )

    def _resolve_bounds(self, explicit: set[str]):
        """Keep the bounds that the loss reads, and say which of those that the user set it does not."""
        of_loss_type = self.loss_type in OTHER_LOSS_TYPES
        read = OTHER_LOSS_TYPES[str(self.loss_type)] if of_loss_type else BOUNDS_READ[str(self.clip_mode)]
        for name in BOUNDS:
            if name in read:
                continue
            if name in explicit:
                reader = f"loss_type={self.loss_type!r}" if of_loss_type else f"clip_mode={self.clip_mode!r}"
                unused = f"{name}={getattr(self, name)} has no effect with {reader}"
                if name == "length_scaled_cap" and self.length_scaled_cap:
                    raise ValueError(f"{unused}: remove {name}.")
                self.notes.append(f"{unused}.")
            setattr(self, name, None)
        if self.length_scaled_cap and self.epsilon_high is not None:
            if {"length_scaled_cap", "epsilon_high"} <= explicit:
                raise ValueError(
                    f"epsilon_high={self.epsilon_high} and length_scaled_cap={self.length_scaled_cap} both set the "
                    "upper bound of the weight: remove one of them."
                )
            setattr(self, "length_scaled_cap" if "epsilon_high" in explicit else "epsilon_high", None)
        if self.importance_sampling_level != "trajectory" and "length_scaled_cap" not in explicit:
            self.length_scaled_cap = None
        if self.epsilon_high is None and not self.length_scaled_cap and "epsilon_high" in read:
            self.epsilon_high = 0.28
        if self.epsilon is None and "epsilon" in read:
            self.epsilon = 0.2
        if "epsilon" in explicit & read and "epsilon_high" not in explicit and not self.length_scaled_cap:
            self.notes.append(
                f"epsilon={self.epsilon} is the lower bound; the upper one is epsilon_high={self.epsilon_high}, where "
                "TRL takes epsilon for both."
            )
        if self.loss_type == "cispo" and self.epsilon_high is not None and self.epsilon_high < 1:
            warnings.warn(
                f"With loss_type='cispo' the cap is epsilon_high={self.epsilon_high} itself, not 1 + epsilon_high: it "
                f"holds nearly every weight at {self.epsilon_high}. Set epsilon_high={CISPO_CAP}.",
                UserWarning,
                stacklevel=5,
            )

    def _resolve_behaviour_policy(self):
        if self.behaviour_policy not in ("trainer", "sampler"):
            raise ValueError(f"Unknown behaviour_policy {self.behaviour_policy!r}: choose 'trainer' or 'sampler'.")
        sampler = self.behaviour_policy == "sampler"
        if self.vllm_importance_sampling_correction is None:
            self.vllm_importance_sampling_correction = not sampler
        if sampler and self.vllm_importance_sampling_correction:
            raise ValueError(
                "behaviour_policy='sampler' puts the sampler's log-probabilities into the ratio, which "
                "vllm_importance_sampling_correction=True would correct for once more: remove one of them."
            )
        mode, corrects = self.vllm_importance_sampling_mode, self.vllm_importance_sampling_correction
        if mode not in CORRECTION_MODES:
            raise ValueError(
                f"Unknown vllm_importance_sampling_mode {mode!r}: choose one of {', '.join(CORRECTION_MODES)}."
            )
        if self.use_vllm and corrects and mode.startswith("token_") and self.importance_sampling_level == "trajectory":
            raise ValueError(
                f"vllm_importance_sampling_mode={mode!r} gives every token its own factor, which does not go with one "
                "weight per trajectory: their product is no ratio of trajectories. Choose 'sequence_mask' or "
                "'sequence_truncate', behaviour_policy='sampler', or importance_sampling_level='token'."
            )

    @property
    def changed_sampling(self) -> dict[str, Any]:
        """Settings, by name, that make the sampler another policy than the one whose log-probabilities are computed."""
        sampler = {name: getattr(self, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
        neutral = {"top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "repetition_penalty": (1.0,)}
        kwargs = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        sampler |= {name: value for name, value in kwargs.items() if name in neutral}
        return {name: value for name, value in sampler.items() if value is not None and value not in neutral[name]}
