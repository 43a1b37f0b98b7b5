"""The flags of the training script, and the data sets and reward functions that they select."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset
from trl import ScriptArguments
from trl.rewards import get_soft_overlong_punishment

from ..config import TICGRPOConfig
from ..data import DEFAULT, EVALUATION_SETS, GENERATED_SETS, NAMED_SETS, load_problems
from ..evaluation.scoring import choose_reward, import_reward


@dataclass
class TrainArguments(ScriptArguments):
    """Select data, rewards and the dry run. The help text of each field describes it."""

    dataset_name: str = field(default="starter", metadata={"help": "Named sets joined by +, or your own data."})
    dataset_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of your own data: prompt=question solution=answer. Drops all others."}
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Data to evaluate on, such as aime24."})
    train_size: int = field(default=8000, metadata={"help": "Training problems of starter and few_shot_sums."})
    test_size: int = field(default=1000, metadata={"help": "Held-out problems of starter and few_shot_sums."})
    instruction: str = field(default=DEFAULT, metadata={"help": "Template of each problem, with {problem} in it."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Drop prompts with more tokens than this."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Import paths; the first is the accuracy. Default: exact match, code_reward or math_reward."},
    )
    soft_punish_cache: int | None = field(
        default=None, metadata={"help": "Tokens before max_completion_length where DAPO's soft punishment starts."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print what the run would do and need, and stop."})
    accelerate_config: str | None = field(default=None, metadata={"help": "Accelerate config file of the dry run."})
    num_processes: int | None = field(default=None, metadata={"help": "Number of processes of the dry run."})
    gpu_memory: float | None = field(default=None, metadata={"help": "GB per GPU in the dry run. Default: detected."})


def load_data(script_args: TrainArguments, training_args: TICGRPOConfig) -> tuple[Any, Any]:
    """Load the training data, and the evaluation data if `eval_strategy` is set (otherwise `None`)."""
    name = script_args.dataset_name
    sets = [part.partition("@")[0].strip() for part in name.split("+")]
    if held_out := [part for part in sets if part in EVALUATION_SETS]:
        raise ValueError(f"--dataset_name {name}: {', '.join(held_out)} is for evaluation, not for training.")
    is_generated = name in GENERATED_SETS
    is_named = is_generated or any(part in NAMED_SETS for part in sets)
    pairs = [column.partition("=") for column in script_args.dataset_columns or []]
    columns = {ours: theirs for ours, _, theirs in pairs} or None
    instruction, test_split = script_args.instruction, script_args.dataset_test_split
    needs_eval = training_args.eval_strategy != "no"
    eval_dataset: Any = None
    if needs_eval and (eval_name := script_args.eval_dataset_name):
        split = "train" if Path(eval_name).is_file() else test_split
        is_known = eval_name.partition("@")[0] in (*EVALUATION_SETS, *GENERATED_SETS)
        options: dict[str, Any] = {"columns": None if is_known else columns, "size": script_args.test_size}
        eval_dataset = load_problems(eval_name, split, instruction=instruction, **options)
    elif needs_eval and is_generated:
        eval_dataset = load_problems(name, "test", size=script_args.test_size)
    elif needs_eval and is_named:
        raise ValueError(f"--eval_strategy: {name} has no held-out data; add --eval_dataset_name, such as aime24.")

    if is_named or columns:
        options = {"instruction": instruction, "columns": columns, "config": script_args.dataset_config}
        if needs_eval and eval_dataset is None:
            eval_dataset = load_problems(name, test_split, **options)
        split = "train" if is_named else script_args.dataset_train_split
        dataset = load_problems(name, split, size=script_args.train_size, seed=training_args.seed, **options)
        return dataset, eval_dataset

    # As in TRL's scripts, all columns reach the reward functions.
    splits = load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    if needs_eval and eval_dataset is None:
        eval_dataset = splits[test_split]
    return splits[script_args.dataset_train_split], eval_dataset


def import_rewards(script_args: TrainArguments) -> list[Callable]:
    """Import the functions of `--reward_funcs`."""
    return [import_reward(path, "--reward_funcs") for path in script_args.reward_funcs or []]


def reward_functions(script_args: TrainArguments, training_args: Any, train_dataset: Any) -> list[Callable]:
    """Return the reward functions that the flags name, or the default for the data's solutions."""
    functions = import_rewards(script_args)
    if not functions:
        if "solution" not in (train_dataset.column_names or []):
            raise ValueError("--reward_funcs: the data has no column `solution`; name your own reward function.")
        functions = [choose_reward(train_dataset)]
    cache = script_args.soft_punish_cache
    if cache is not None:
        if not 0 < cache < training_args.max_completion_length:
            raise ValueError(
                f"--soft_punish_cache {cache} must be between 0 and max_completion_length "
                f"{training_args.max_completion_length}; DAPO uses a fifth of it."
            )
        functions.append(get_soft_overlong_punishment(training_args.max_completion_length, cache))
    return functions
