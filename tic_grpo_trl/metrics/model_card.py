"""Complete TRL's model card with the run's settings, data and results."""

from pathlib import Path
from typing import Any

from trl.trainer.utils import get_config_model_id

from ..rollout.schedule import RolloutSchedule
from ..starter import TASKS
from ..version import __version__
from .run_summary import LogHistory, accuracy_name, series, table


CITATION = """\
@article{pang2025ticgrpo,
  title = {{TIC-GRPO: Provable and Efficient Optimization for Reinforcement Learning from Human Feedback}},
  author = {Lei Pang and Ruinan Jin},
  year = 2025,
  eprint = {arXiv:2508.02833},
}"""
SHOWN = "learning_rate lr_scheduler_type optim beta temperature num_generations max_completion_length seed".split()


def complete_card(
    card: str,  # what TRL wrote
    args: Any,
    log_history: LogHistory,
    processes: int,
    reward_names: list[str],  # the first one is the accuracy
    data: str | None,  # name of the training data
    base_model: str,  # hub id or folder
    model: str,  # name of the trained model, for the usage example
) -> str:
    """Add the run's settings and results to a model card in Markdown."""
    batches = RolloutSchedule.of(args, processes)
    rows = {name: value for name, value in args.resolved_algorithm.items() if value is not None}
    rows |= {name: getattr(getattr(args, name), "value", getattr(args, name)) for name in SHOWN}  # enums have a value
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
    card = card.replace("[None](https://huggingface.co/None)", _in_words(base_model))
    return card.replace('model="None"', f'model="{model}"')


def complete_file(path: Path, trainer: Any, data: str | None):
    """Complete the model card that TRL wrote to a file, for a trainer's run on the named data."""
    run = trainer.args, trainer.state.log_history, trainer.accelerator.num_processes, trainer.reward_func_names
    base = get_config_model_id(trainer.model.config)
    path.write_text(complete_card(path.read_text(), *run, data, base_model=base, model=path.parent.name))


def _in_words(folder: str) -> str:
    if folder in {task.model for task in TASKS.values()}:
        return "the starter, a 167k-parameter model included in tic-grpo-trl"
    return f"the model in the local folder `{Path(folder).name}`" if folder else "a model without a name"
