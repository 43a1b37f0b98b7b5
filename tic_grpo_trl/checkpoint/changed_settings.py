"""Settings that have changed since a checkpoint, and what a resumed run does about them."""

import json
from dataclasses import dataclass
from typing import Any

from ..algorithms import ALGORITHM_FIELDS


# The remaining rollout and the position in the data don't fit the new batches: a new rollout is generated.
ROLLOUTS = ("steps_per_generation", "num_iterations", "num_generations")
BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps", *ROLLOUTS)
PROCESSES, PROMPTS = "number of processes", "number of prompts"
# The remaining rollout has log-probabilities under the old settings: a new rollout is generated.
VLLM = ("use_vllm", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode")
VLLM_CLIP = ("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max")
SCORING = ("beta", "temperature", *VLLM, *VLLM_CLIP)
# The remaining rollout has another algorithm's advantages and ratios: an error unless the user discards it.
ALGORITHM = (*ALGORITHM_FIELDS, "behaviour_policy")
# transformers restores these with the optimizer, so new values have no effect.
OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# New values take effect from the next update or rollout on.
SCHEDULE = ("optim", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm")
SAMPLING = ("max_completion_length", "mask_truncated_completions", "top_p", "top_k", "min_p", "repetition_penalty")
REWARDS = ("reward_weights", "multi_objective_aggregation", "partition_by_prompt")
LOSS = (
    "baseline_norms",
    "gradient_noise_scale",
    "use_bias_correction_kl",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
    "entropy_coef",
)
SAPO = ("sapo_temperature_neg", "sapo_temperature_pos")
VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
CARRY_OVER = ("max_carry_over", "oversampling")
UPDATES = (*SCHEDULE, *SAMPLING, *CARRY_OVER, *REWARDS, *LOSS, *SAPO, *VESPO)
# With groups that are carried over: an error. The order of the prompts that follow them would be another one.
ORDER = ("seed", "shuffle_dataset")
POOLS = "number of pools"  # of unfinished responses: one per engine
CARRIED = "groups that are carried over"


def settings_to_remember(trainer: Any) -> dict[str, Any]:
    """Collect the settings that a checkpoint's manifest keeps, as they read back from JSON."""
    values, dataset, processes = trainer.args.to_dict(), trainer.train_dataset, trainer.accelerator.num_processes
    names = (*BATCHES, *SCORING, *ALGORITHM, *OPTIMIZER, *UPDATES, *ORDER)
    settings = json.loads(json.dumps({name: values[name] for name in names}, default=str))
    carried = len(trainer.carry_over.pool.groups) if trainer.carry_over else 0
    prompts = len(dataset) if hasattr(dataset, "__len__") else None
    pools = processes
    if trainer.args.use_vllm:
        pools = 1 if trainer.args.vllm_mode == "server" else processes // trainer.args.vllm_tensor_parallel_size
    return settings | {PROCESSES: processes, PROMPTS: prompts, POOLS: pools, CARRIED: carried}


@dataclass(frozen=True)
class Changes:
    """List the changed settings by their effect, such as "beta = 0.1 (was 0.0)"; empty strings without a change."""

    batches: str
    scoring: str
    algorithm: str
    optimizer: str
    updates: str
    processes: bool
    carried: int  # groups that the checkpoint carries over, on its main process
    unfit: str  # what has changed that these groups depend on

    @classmethod
    def between(cls, then: dict[str, Any], now: dict[str, Any]) -> "Changes":
        """Compare the settings of a manifest with the current ones; those that it lacks count as unchanged."""
        changed = {name for name in now if then.get(name, now[name]) != now[name]}

        def listed(names: tuple[str, ...]) -> str:
            return ", ".join(f"{name} = {now[name]} (was {then[name]})" for name in names if name in changed)

        ends = ("max_carry_over",) if not now["max_carry_over"] else ()
        return cls(
            batches=listed((*BATCHES, PROCESSES, PROMPTS)),
            scoring=listed(SCORING),
            algorithm=listed(ALGORITHM),
            optimizer=listed(OPTIMIZER),
            updates=listed((*SCORING, *ALGORITHM, *UPDATES)),
            processes=PROCESSES in changed,
            carried=then.get(CARRIED, 0),
            unfit=listed((*BATCHES, PROCESSES, PROMPTS, POOLS, *ORDER, *ends)),
        )
