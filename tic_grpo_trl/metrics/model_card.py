"""Complete TRL's model card with the run's settings, data and results."""

from typing import Any

from ..rollout.schedule import RolloutSchedule
from ..version import __version__
from .run_summary import LogHistory, accuracy_name, series, table


SHOWN = (
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "beta",
    "temperature",
    "num_generations",
    "max_completion_length",
    "seed",
)


def complete_card(
    card: str,
    args: Any,
    log_history: LogHistory,
    processes: int,
    reward_names: list[str],
    data: str | None,
    base_model: str,
    model: str,
) -> str:
    """Add the run's settings and results to TRL's model card.

    Args:
        card: what TRL wrote.
        args: the run's `TICGRPOConfig`.
        log_history: of the trainer's state.
        processes: number of training processes.
        reward_names: of the reward functions; the first one is the accuracy.
        data: name of the training data, if known.
        base_model: name of the model before training.
        model: name of the trained model, for the usage example.

    Returns:
        The card, as Markdown.
    """
    batches = RolloutSchedule.of(args, processes)
    rows = {name: value for name, value in args.resolved_algorithm.items() if value is not None}
    values = {name: getattr(args, name) for name in SHOWN}
    rows |= {name: getattr(value, "value", value) for name, value in values.items()}  # of enums
    rows |= {
        "updates per rollout (K)": f"{batches.updates:g}",
        "responses per update": batches.update_responses,
        "updates": log_history[-1]["step"] if log_history else 0,
        "processes": processes,
        "reward functions": ", ".join(reward_names),
    }
    if data is not None:
        rows["training data"] = data
    _, accuracy = series(log_history, accuracy_name(reward_names[0]))
    if accuracy:
        rows[f"held-out {reward_names[0]}, before and after"] = f"{accuracy[0]:.3f}, {accuracy[-1]:.3f}"
    settings = table(["setting", "value"], [[f"`{k}`" if hasattr(args, k) else k, str(v)] for k, v in rows.items()])
    heading = "### Framework versions\n\n"
    card = card.replace(heading, f"{settings}\n\n{heading}- tic-grpo-trl: {__version__}\n")
    # TRL writes "None" for a base model in a local folder, and for a model that is not on the hub.
    card = card.replace("[None](https://huggingface.co/None)", f"`{base_model}`")
    return card.replace('model="None"', f'model="{model}"')
