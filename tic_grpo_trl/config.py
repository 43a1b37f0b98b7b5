"""TICGRPOConfig: GRPOConfig with the fields of the algorithm, and their values resolved from its name."""

import dataclasses
import math
import textwrap
import typing
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from trl import GRPOConfig

from .algorithms import ALGORITHM_FIELDS, ALGORITHMS, ANCHORED_LOSS_TYPES, CISPO_CAP, OTHER_LOSS_TYPES, needs_mini_batch
from .objective import CLIP_MODES, LEVELS, Clip
from .safety.credentials import WithoutCredentials
from .safety.third_party import silence_libraries
from .validation.algorithm import is_weight_of_trl, resolve_algorithm
from .validation.batch_sizes import check_batches, derive_batches
from .validation.carry_over import check_carry_over
from .validation.mini_batch import check_mini_batch
from .validation.settings import Range, check_choices, check_combinations, check_ranges, convert_types


def _option(default: Any, description: str) -> Any:
    """A field whose description `--help` and the class docstring show."""
    return dataclasses.field(default=default, metadata={"help": description})


def _document(cls):
    """Add the fields that a class declares to its docstring."""
    hints, entries = typing.get_type_hints(cls), [cls.__doc__.rstrip(), "", "    Parameters:"]
    for name in cls.__annotations__:
        field, hint = cls.__dataclass_fields__[name], hints[name]
        kind = hint.__name__ if isinstance(hint, type) else hint
        entries.append(f"        {name} (`{kind}`, *optional*, defaults to `{field.default!r}`):")
        entries.append(textwrap.indent(textwrap.fill(field.metadata["help"], 107, break_on_hyphens=False), " " * 12))
    cls.__doc__ = "\n".join([*entries, "    "])
    return cls


@_document
@dataclass(repr=False)
class TICGRPOConfig(WithoutCredentials, GRPOConfig):
    r"""
    Configuration class for the [`TICGRPOTrainer`].

    It inherits every parameter of [`~trl.GRPOConfig`]. The parameters below are new or have another default. Those of
    the algorithm take their value from `algorithm`, unless they are set, in Python, YAML or on the command line. `bf16`
    defaults to `False` on a machine without an accelerator.

    Some settings depend on which responses share a micro-batch: `loss_type="bnpo"` and `"vespo"`, an entropy bonus,
    `top_entropy_quantile` < 1 and a router loss. They keep TRL's micro-batches, including zero-advantage responses,
    but still without padding.

    With `use_bias_correction_kl=True` (TRL's default) the KL term is multiplied by the *clipped* weight.
    """

    algorithm: Annotated[str, tuple(ALGORITHMS)] = _option(
        "tic_grpo",
        f"Name of the algorithm, which sets the parameters from importance_sampling_level to scale_lr_by_ess. One of "
        f"{', '.join(ALGORITHMS)}. dapo is an alias of grpo, grpo_ub_clip of grpo2.",
    )
    importance_sampling_level: Annotated[str | None, LEVELS] = _option(  # type: ignore[assignment]
        None,
        "Importance weight: 'token' and 'sequence' as in TRL; 'trajectory' for one weight per response, the product "
        "P_θ/P_old of its token ratios; 'prefix' for the product of the ratios up to each token; 'none' for weight 1 "
        "and the gradient A·∇log π_θ.",
    )
    clip_mode: Annotated[str | None, CLIP_MODES] = _option(
        None,
        "How the weight is bounded. 'up_only': above 1 + epsilon_high the gradient is 0 for both signs of the "
        "advantage, and there is no lower bound. 'capped': the weight is capped at 1 + epsilon_high and keeps its "
        "gradient, for both signs. 'two_sided': PPO's rule, with TRL's optional delta. 'truncated': PPO's rule, but "
        "for A < 0 the weight is capped at 1 + epsilon_high and keeps its gradient. 'dual_clip': PPO's rule, and above "
        "1 + epsilon_high the gradient is 0 for A < 0 too. 'masked': outside the bounds the weight and its gradient "
        "are 0, for both signs. 'adaptive': as 'capped', at the cap that the mini-batch's own ratios make best. "
        "'none': only with level 'none'.",
    )
    epsilon: Annotated[float | None, Range("(0, 1]", 0.2)] = _option(  # type: ignore[assignment]
        None, "Lower bound 1 - epsilon of the weight, for the clip modes that have one (0.2 by default)."
    )
    epsilon_high: Annotated[float | None, Range("(0, inf)", 0.28)] = _option(
        None,
        "Upper bound 1 + epsilon_high of the weight. Most algorithms use 0.28, DAPO's value; the authors' released "
        "script uses 0.03. With loss_type='cispo' it is the bound itself, 5.0 by default.",
    )
    delta: float | None = _option(
        None,
        "Upper bound of the weight for A < 0, where it differs from 1 + epsilon_high. Infinity removes an algorithm's.",
    )
    length_scaled_cap: Annotated[float | None, Range("[0, inf)", 0.01)] = _option(
        None,
        "σ of the upper bound exp(σ·√|o_i|) for a response of |o_i| tokens, which replaces 1 + epsilon_high. The "
        "authors' released code uses 0.01. 0 turns an algorithm's off. Only with the levels 'trajectory' and 'prefix'; "
        "with 'prefix', |o_i| counts the tokens so far.",
    )
    length_scaled_floor: Annotated[float | None, Range("[0, inf)", 0.025)] = _option(
        None,
        "σ of the lower bound exp(-σ·√|o_i|), which replaces 1 - epsilon in the clip modes that have a lower bound. "
        "Otherwise as length_scaled_cap.",
    )
    loss_type: Annotated[str | None, (*ANCHORED_LOSS_TYPES, *OTHER_LOSS_TYPES)] = _option(  # type: ignore[assignment]
        None,
        "Length normalisation as in TRL: 'grpo' (1/|o_i|), 'dr_grpo' (1/T with the constant T = "
        "max_completion_length), 'dapo' or 'bnpo'. TRL's 'cispo', 'sapo', 'luspo' and 'vespo' define a weight of "
        "their own, which replaces the algorithm's level and clip mode.",
    )
    scale_rewards: Annotated[str | None, ("none", "group", "batch")] = _option(  # type: ignore[assignment]
        None,
        "Advantage: 'none' for the reward minus the group mean (v5), 'group' to divide it by the group's standard "
        "deviation (v2), 'batch' to divide it by the batch's. True means 'group', False means 'none'.",
    )
    advantage_baseline: Annotated[str | None, ("group_mean", "minimum_variance")] = _option(
        None,
        "What the advantage subtracts from the reward: 'group_mean' as in TRL, or 'minimum_variance' for VCPO's mean "
        "over the other responses of the group, each weighted by w²·‖g‖², its squared ratio to the behaviour policy "
        "times the squared norm of its gradient. Only with scale_rewards 'none' and mini-batches of complete groups.",
    )
    scale_lr_by_ess: bool | None = _option(
        None,
        "Multiply the learning rate of an update by √(ESS/n): ESS is the effective sample size of the mini-batch's "
        "trajectory ratios before any bound, n the number of its responses that can move the weights (VCPO).",
    )
    baseline_norms: Annotated[str, ("tokens", "gradients")] = _option(
        "tokens",
        "The ‖g‖² of advantage_baseline 'minimum_variance': 'tokens' takes it as proportional to the length of a "
        "response, 'gradients' computes it by a backward pass for each response, which takes longer than the update "
        "itself and is not possible with ZeRO-3 and FSDP.",
    )
    gradient_noise_scale: Annotated[float, Range("(0, inf)", 20.0)] = _option(
        20.0,
        "κ of clip_mode 'adaptive': the gradient noise scale, in responses, that the choice of the cap assumes (the "
        "variance of one response's gradient over the squared norm of its mean, arXiv 1812.06162). The larger it is, "
        "the lower the cap.",
    )
    responses_per_update: Annotated[int | None, Range("[1, inf)", 512)] = _option(
        None,
        "Responses of an update on all processes together, whatever their number. gradient_accumulation_steps follows "
        "from it: responses_per_update / (per_device_train_batch_size * number of processes).",
    )
    updates_per_rollout: Annotated[int | None, Range("[1, inf)", 4)] = _option(
        None,
        "K, the updates of a rollout. steps_per_generation follows from it: K * gradient_accumulation_steps. "
        "num_iterations repeats these updates.",
    )
    responses_per_eval_batch: Annotated[int | None, Range("[1, inf)", 960)] = _option(
        None,
        "Responses of an evaluation batch on all processes together. per_device_eval_batch_size follows from it.",
    )
    gradient_accumulation_steps: int | None = _option(  # type: ignore[assignment]
        None, "Micro-batches of an update on each process. 1 by default, or what responses_per_update makes it."
    )
    per_device_eval_batch_size: int | None = _option(  # type: ignore[assignment]
        None,
        "Responses of an evaluation batch on each process. 8 by default, or what responses_per_eval_batch makes it.",
    )
    partition_by_prompt: bool = _option(
        True,
        "Split a rollout into mini-batches of complete groups, uniformly at random (v5 §2.2). This needs "
        "per_device_train_batch_size * gradient_accumulation_steps * number of processes to be a multiple of "
        "num_generations, and steps_per_generation of gradient_accumulation_steps. Where the split is impossible, a "
        "warning says why, and responses are shuffled across mini-batches, as in TRL and with False.",
    )
    padding_free: bool = _option(
        True,
        "Forward real tokens only, in as few passes as fit into the memory of per_device_train_batch_size responses of "
        "the longest length. Responses share packed rows if a test at the start shows that the model keeps them apart. "
        "Rollouts with images, and models whose log-probabilities depend on padding, keep TRL's passes.",
    )
    share_prompts: bool = _option(
        True,
        "Compute the prompt of a group once in each forward pass, and let all its responses in the pass attend to it. "
        "This needs padding_free, and a model in which only attention, by PyTorch's scaled_dot_product_attention or "
        "FlashAttention, lets a token see others; a test at the start shows whether log-probabilities stay the same.",
    )
    skip_zero_advantage: bool = _option(
        True,
        "Leave out responses that cannot move the weights: those without tokens in the loss, and those with an "
        "advantage of exactly 0 while beta is 0. Every normaliser still counts them.",
    )
    skip_on_policy_logps: bool = _option(
        True,
        "With behaviour_policy='trainer': skip scoring the responses of a rollout's first update, where every ratio is "
        "1 because the policy is the old one. False measures the numerical noise of these ratios.",
    )
    behaviour_policy: Annotated[str | None, ("trainer", "sampler")] = _option(
        None,
        "The policy in the denominator of the ratios: 'trainer' for the trained model's weights before a rollout's "
        "first update, or 'sampler' for the log-probabilities that were recorded when the responses were sampled. "
        "With 'sampler' the old policy is scored only for responses that lack a log-probability, and TRL's vLLM "
        "correction is off, because the ratio already contains it. 'sampler' by default with max_carry_over, else "
        "'trainer'.",
    )
    max_carry_over: Annotated[int, Range("[0, inf)", 2)] = _option(
        0,
        "Don't wait for the longest response of a rollout: train on the prompts whose responses are complete, and go "
        "on with the others in the next generation call, at most so many rollouts after the one that a prompt would be "
        "in otherwise. 0 waits for all.",
    )
    oversampling: Annotated[float, Range("[1, inf)", 2.0)] = _option(
        2.0,
        "With max_carry_over: prompts that have been begun and not trained on, in rollouts. 1 waits for all.",
    )
    min_ess: Annotated[float | None, Range("[0, 1]", 0.1)] = _option(
        None,
        "Skip an update and the rest of its rollout, and count them, when the effective sample size is below this "
        "share of the mini-batch's responses. Off by default, and not possible with fp16.",
    )
    max_non_finite_steps: Annotated[int, Range("[1, inf)", 3)] = _option(
        3, "Stop training when this many updates in a row were skipped because of NaN or infinite numbers."
    )
    reward_timeout: Annotated[float | None, Range("(0, inf)", 60.0)] = _option(
        None,
        "Seconds that a call of a reward function may take before the run ends on every process. No limit by default.",
    )
    discard_rollout_on_resume: bool = _option(
        False,
        "When resuming from a checkpoint inside a rollout, generate a new rollout instead of finishing the saved one. "
        "Needed after a change of the algorithm, because the saved rollout has the old algorithm's advantages.",
    )
    completions_total_limit: Annotated[int | None, Range("[1, inf)", 10)] = _option(
        None,
        "Keep only this many of the newest log_completions tables of training, and of each evaluation. All by default.",
    )
    log_all_ratio_metrics: bool = _option(
        False,
        "Log all twelve trajectory_ratio/ metrics, overall and for each inner step k = 1 … K: 12·(K + 1) in all. By "
        "default eight are logged overall, and only spread and effective sample size at the first and last inner step.",
    )
    vllm_importance_sampling_correction: bool | None = _option(  # type: ignore[assignment]
        None,
        "TRL's correction for the mismatch between vLLM and the trained model. True by default, False with "
        "behaviour_policy='sampler'. At levels 'trajectory' and 'prefix' it needs a sequence mode of "
        "vllm_importance_sampling_mode: a response's weight is then the bounded P_θ/P_old times the truncated or "
        "masked P_old/P_sampler.",
    )
    disable_dropout: bool = _option(
        True,
        "Disable dropout, including LoRA's. Unlike in TRL this is the default, because dropout turns the "
        "log-ratio of a response into a sum of noise that grows with the square root of its length.",
    )

    def __post_init__(self):
        # Flags and YAML may give TRL's booleans as strings
        self.scale_rewards = {"true": "group", "false": "none"}.get(str(self.scale_rewards).lower(), self.scale_rewards)
        convert_types(self)
        check_choices(self)
        silence_libraries()
        if self.use_cpu or not torch.accelerator.is_available():
            self.bf16 = bool(self.bf16)
            self.dataloader_pin_memory = False  # which is for copies to a GPU; torch warns of it
        if self.behaviour_policy is None:
            self.behaviour_policy = "sampler" if self.max_carry_over else "trainer"
        if self.vllm_importance_sampling_correction is None:
            self.vllm_importance_sampling_correction = self.behaviour_policy != "sampler"
        resolve_algorithm(self)
        check_ranges(self)
        check_combinations(self)
        if self.loss_type == "cispo" and (self.epsilon_high or CISPO_CAP) < 1:
            warnings.warn(
                f"With loss_type='cispo' the cap is epsilon_high={self.epsilon_high} itself, not 1 + epsilon_high, so "
                f"it reduces nearly every weight to {self.epsilon_high}. Set epsilon_high={CISPO_CAP}.",
                UserWarning,
                stacklevel=3,
            )
        if self.responses_per_update or self.responses_per_eval_batch:
            _ = self.device  # sets up the processes, so that world_size is known
        derive_batches(self)
        generation_batch_size = self.generation_batch_size
        if self.steps_per_generation is not None:  # a saved config has both, which TRL refuses
            self.generation_batch_size = None
        try:
            super().__post_init__()
        except ValueError as error:
            if "divisible by" in str(error):  # our error has the nearest valid batch sizes
                check_batches(self, self.world_size)
            raise
        check_carry_over(self)
        check_mini_batch(self)
        if generation_batch_size not in (None, self.generation_batch_size):
            by = "steps_per_generation" if self.updates_per_rollout is None else "updates_per_rollout"
            raise ValueError(
                f"generation_batch_size={generation_batch_size} contradicts {by}={getattr(self, by)}, which makes it "
                f"{self.generation_batch_size}: remove one of them (in a copied config, generation_batch_size=None)."
            )

    @property
    def resolved_algorithm(self) -> dict[str, Any]:
        """The algorithm's name and the values of its fields, as resolved."""
        return {"algorithm": self.algorithm} | {name: getattr(self, name) for name in ALGORITHM_FIELDS}

    @property
    def clip(self) -> Clip:
        """The clip rule for [`~tic_grpo_trl.objective.clip_log_weight`]."""
        low = 1.0 if self.epsilon is None else self.epsilon
        high = math.inf if self.epsilon_high is None else self.epsilon_high
        scales = self.length_scaled_cap or 0.0, self.length_scaled_floor or 0.0
        return Clip(str(self.clip_mode), low, high, self.delta, *scales)

    @property
    def is_anchored(self) -> bool:
        """Whether this package computes the importance weight, because TRL's loss cannot."""
        return not is_weight_of_trl(self.importance_sampling_level, self.clip_mode)

    @property
    def uses_mini_batch(self) -> bool:
        """Whether an update depends on its mini-batch as a whole, whose ratios are then computed first."""
        return needs_mini_batch(self.resolved_algorithm)

    @property
    def changed_sampling(self) -> dict[str, Any]:
        """Sampling settings, by name, that make the sampler differ from the policy that is scored."""
        neutral = {"top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "repetition_penalty": (1.0,)}
        kwargs = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        sampler = {name: kwargs.get(name, getattr(self, name)) for name in neutral}
        return {name: value for name, value in sampler.items() if value is not None and value not in neutral[name]}
