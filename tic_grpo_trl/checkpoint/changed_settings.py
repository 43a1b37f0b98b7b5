"""What it means for a resumed run that settings have changed since its checkpoint was written."""

import json
from dataclasses import dataclass
from typing import Any

from ..algorithms import ALGORITHM_FIELDS
from ..config import TICGRPOConfig


# The rest of the rollout and the position in the data don't fit the new batches: a new rollout is generated.
BATCHES = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
)
PROCESSES, PROMPTS = "number of processes", "number of prompts"
# The rest of the rollout has log-probabilities under the old settings: a new rollout is generated.
SCORING = (
    "beta",
    "temperature",
    "use_vllm",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_clip_max",
)
# The rest of the rollout has another algorithm's advantages and ratios: refused unless the user discards it.
ALGORITHM = (*ALGORITHM_FIELDS, "behaviour_policy")
# transformers restores these with the optimizer, so new values have no effect.
OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# New values take effect from the next update or rollout on.
UPDATES = (
    "optim",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
    "max_completion_length",
    "mask_truncated_completions",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "reward_weights",
    "multi_objective_aggregation",
    "partition_by_prompt",
    "use_bias_correction_kl",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
    "entropy_coef",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
)


def settings_to_remember(args: TICGRPOConfig, processes: int, dataset: Any) -> dict[str, Any]:
    """Collect the settings that a checkpoint's manifest keeps, as JSON gives them back.

    Args:
        args: the settings.
        processes: number of training processes.
        dataset: the training data; the number of prompts of a stream is unknown.
    """
    values = args.to_dict()
    names = (*BATCHES, *SCORING, *ALGORITHM, *OPTIMIZER, *UPDATES)
    settings = json.loads(json.dumps({name: values[name] for name in names}, default=str))
    return settings | {PROCESSES: processes, PROMPTS: len(dataset) if hasattr(dataset, "__len__") else None}


@dataclass(frozen=True)
class Changes:
    """The settings that have changed since a checkpoint, by what that means.

    Attributes:
        batches, scoring, algorithm, optimizer, updates: each a text such as "beta = 0.1 (was 0.0)", empty without a
            change.
        processes: whether the number of processes has changed.
    """

    batches: str
    scoring: str
    algorithm: str
    optimizer: str
    updates: str
    processes: bool

    @classmethod
    def between(cls, then: dict[str, Any], now: dict[str, Any]) -> "Changes":
        """Compare the settings of a manifest with today's; settings that the manifest lacks count as unchanged."""
        changed = {name for name in now if then.get(name, now[name]) != now[name]}

        def listed(names: tuple[str, ...]) -> str:
            return ", ".join(f"{name} = {now[name]} (was {then[name]})" for name in names if name in changed)

        return cls(
            batches=listed((*BATCHES, PROCESSES, PROMPTS)),
            scoring=listed(SCORING),
            algorithm=listed(ALGORITHM),
            optimizer=listed(OPTIMIZER),
            updates=listed((*SCORING, *ALGORITHM, *UPDATES)),
            processes=PROCESSES in changed,
        )
