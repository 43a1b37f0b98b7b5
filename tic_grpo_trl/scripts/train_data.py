"""The flags of the training script, and the data sets and reward functions that they select."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import IntervalStrategy
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments
from trl.rewards import get_soft_overlong_punishment

from ..config import TICGRPOConfig
from ..data import DEFAULT, EVALUATION_SETS, GENERATED_SETS, load_problems
from ..data.examples import log_once
from ..data.mixture import read_mixture
from ..data.names import is_named, naming, split_names
from ..data.user_data import UserData, parse_columns
from ..evaluation.scoring import choose_reward
from ..rewards import math_reward
from ..rewards.importing import import_reward
from ..starter import TASKS
from ..validation.model_path import check_model


ANSWER_FORMS = ("boxed", "Answer:")  # what a prompt for `math_reward` asks for


@dataclass
class TrainArguments(ScriptArguments, DatasetMixtureConfig):
    """Select data, rewards and the dry run. The help text of each field describes it."""

    starter_task: str | None = field(
        default=None,
        metadata={"help": "Task of the starter, with its model, data and longest response.", "choices": list(TASKS)},
    )
    dataset_name: str | None = field(
        default="starter", metadata={"help": "Your own file, folder or hub id, or a named set; joined by +."}
    )
    dataset_columns: list[str] | None = field(
        default=None, metadata={"help": "New names of your own data's columns: prompt=question solution=answer."}
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Data to evaluate on, such as aime24."})
    train_size: int = field(default=8000, metadata={"help": "Training problems of generated sets such as starter."})
    test_size: int = field(default=1000, metadata={"help": "Held-out problems of generated sets such as starter."})
    instruction: str | None = field(
        default=None,
        metadata={"help": "Template with {problem} around string prompts. Default: the papers' for named sets only."},
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "Drop prompts with more tokens than this."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Paths such as my_rewards.correct, first the accuracy. Default: what the solutions ask for."},
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model, a hub id or folder, as the first of the reward functions."}
    )
    model_command: str | None = field(
        default=None, metadata={"help": "Command that makes the folder model_name_or_path, named if it doesn't exist."}
    )
    soft_punish_cache: int | None = field(
        default=None, metadata={"help": "Tokens before max_completion_length where DAPO's soft punishment starts."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print what the run would do and need, and stop."})
    accelerate_config: str | None = field(default=None, metadata={"help": "Accelerate config file of the dry run."})
    num_processes: int | None = field(default=None, metadata={"help": "Number of processes of the dry run."})
    gpu_memory: float | None = field(default=None, metadata={"help": "GB per GPU in the dry run. Default: detected."})

    def __post_init__(self):
        super().__post_init__()
        if self.datasets:
            if self.dataset_name != "starter":  # the default
                raise ValueError(f"--dataset_name {self.dataset_name} and datasets are both given: remove one of them.")
            self.dataset_name, self.dataset_streaming = None, self.streaming
        elif self.streaming:
            raise ValueError("--streaming true is for the key datasets; for --dataset_name, give --dataset_streaming.")
        elif self.test_split_size is not None:
            raise ValueError(
                f"--test_split_size {self.test_split_size} is for the key datasets; for --dataset_name, add "
                "--eval_dataset_name."
            )


def starter_defaults(task: str | None) -> dict[str, Any]:
    """Return the values that `--starter_task` gives to flags that are not given."""
    if task not in TASKS:
        return {}  # none was chosen, or parsing the flags will refuse it
    chosen = TASKS[task]
    return {
        "dataset_name": task,
        "test_size": chosen.test_size,
        "max_completion_length": chosen.max_completion_length,
    }


def model_name(script_args: TrainArguments, model_args: ModelConfig) -> str:
    """Return the model to train: by default that of `--starter_task`.

    Raises:
        ValueError: if no model is given and the data are those of another task of the starter.
    """
    if model_args.model_name_or_path:
        return model_args.model_name_or_path
    task, name = script_args.starter_task or "starter", script_args.dataset_name
    if name in TASKS and name != task:
        raise ValueError(
            f"--dataset_name {name}: the model would be that of the task {task}; set --starter_task {name}, or give "
            "--model_name_or_path."
        )
    return TASKS[task].model


def load_data(script_args: TrainArguments, training_args: TICGRPOConfig) -> tuple[Any, Any]:
    """Load the training data, and the evaluation data if `eval_strategy` is set (otherwise `None`).

    Raises:
        ValueError: if a flag has a wrong value, or a set is unknown, cannot be read, or lacks a column that a reward
            function reads.
        FileNotFoundError: if a path or hub data set does not exist.
        ConnectionError: if the hub cannot be reached.
    """
    check_values(script_args, training_args)
    columns, instruction = parse_columns(script_args.dataset_columns), script_args.instruction
    own: UserData | None
    if script_args.datasets:
        own = UserData("datasets", {"datasets": read_mixture(script_args, training_args.seed)})
        dataset = own.examples(script_args.dataset_train_split, columns, instruction)
    else:
        dataset, own = load_training_data(script_args, training_args.seed, columns)
    if script_args.dataset_name not in GENERATED_SETS and (own is None or instruction):
        show_prompt(dataset)
    eval_dataset = None
    if (strategy := IntervalStrategy(training_args.eval_strategy).value) != "no":
        eval_dataset = load_eval_data(script_args, strategy, own, columns)
    for examples in (dataset, eval_dataset):  # every reward function reads both
        paths: list[str | None] = [*(script_args.reward_funcs or [])]
        if not paths and script_args.reward_model_name_or_path is None:
            paths = [None]  # the default for the data's solutions
        for path in paths if examples is not None else []:
            choose_reward(examples, path, "--reward_funcs")
    return dataset, eval_dataset


def load_training_data(
    script_args: TrainArguments, seed: int, columns: dict[str, str] | None
) -> tuple[Any, UserData | None]:
    """Load the training split of `--dataset_name`; also return own data as a whole, for its held-out split."""
    name = str(script_args.dataset_name)
    if held_out := {part.partition("@")[0] for part in split_names(name)} & {*EVALUATION_SETS}:
        raise ValueError(f"--dataset_name {name}: {', '.join(sorted(held_out))} is for evaluation, not for training.")
    with naming("--dataset_name", name):
        if not is_any_named(name):
            own = read_user_data(name, script_args)
            return own.examples(script_args.dataset_train_split, columns, script_args.instruction), own
        generated = {"size": script_args.train_size, "seed": seed}
        return load_named(name, "train", script_args, columns, config=script_args.dataset_config, **generated), None


def check_values(script_args: TrainArguments, training_args: TICGRPOConfig):
    """Check the flags whose values depend on others."""
    if training_args.eval_on_start and IntervalStrategy(training_args.eval_strategy).value == "no":
        raise ValueError(
            "--eval_on_start true needs held-out data: add --eval_strategy steps, or set --eval_on_start false."
        )
    cache, longest = script_args.soft_punish_cache, training_args.max_completion_length
    if cache is not None and (longest is None or not 0 < cache < longest):
        raise ValueError(
            f"--soft_punish_cache {cache} must be between 0 and max_completion_length {longest}; DAPO uses a fifth of "
            "it."
        )
    if (name := script_args.reward_model_name_or_path) is not None:
        check_model(name, None, training_args.trust_remote_code, option="--reward_model_name_or_path")


def load_eval_data(
    script_args: TrainArguments, strategy: str, own: UserData | None, columns: dict[str, str] | None
) -> Any:
    """Load the data of `--eval_dataset_name`, or else the held-out split of the training data, `own` or generated."""
    name, eval_name, split = script_args.dataset_name, script_args.eval_dataset_name, script_args.dataset_test_split
    if eval_name:
        with naming("--eval_dataset_name", eval_name):
            if is_any_named(eval_name):
                return load_named(eval_name, split, script_args, None, size=script_args.test_size)
            only_one = split == "test"  # the flag's default
            own = read_user_data(eval_name, script_args)
            return own.examples(None if only_one else split, columns, script_args.instruction)
    if own is None and name in GENERATED_SETS:
        return load_problems(name, "test", size=script_args.test_size)
    if own is None:
        raise ValueError(
            f"--eval_strategy {strategy}: {name} has no held-out data; add --eval_dataset_name, such as aime24."
        )
    if split not in own.splits:
        raise ValueError(
            f"--eval_strategy {strategy} needs held-out data, and {own.name} has no split {split!r}, only "
            f"{', '.join(map(repr, own.splits))}: add --eval_dataset_name held_out.jsonl, or set --eval_strategy no."
        )
    return own.examples(split, columns, script_args.instruction)


def is_any_named(name: str) -> bool:
    """Return whether a set, or a part of a mixture, is one that the package knows by name."""
    return any(map(is_named, split_names(name)))


def read_user_data(name: str, script_args: TrainArguments) -> UserData:
    """Read own data, with the configuration and streaming that the flags select."""
    is_training = name == script_args.dataset_name
    return UserData.read(name, script_args.dataset_config if is_training else None, script_args.dataset_streaming)


def load_named(name: str, split: str, script_args: TrainArguments, columns: dict[str, str] | None, **options: Any):
    """Load a named set or a mixture with one, with the papers' instruction unless the flag gives another."""
    instruction = DEFAULT if script_args.instruction is None else script_args.instruction
    return load_problems(name, split, instruction=instruction, columns=columns, **options)


def first_prompt(dataset: Any) -> str:
    """Return the text of a data set's first prompt."""
    prompt = next(iter(dataset))["prompt"]
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def show_prompt(dataset: Any):
    """Log the first prompt as a whole, so that its instruction is seen before any compute."""
    log_once("The first prompt:\n" + textwrap.indent(first_prompt(dataset), "  | ", lambda line: True))


def import_rewards(script_args: TrainArguments) -> list[Callable | str]:
    """Import the functions of `--reward_funcs`, after the name of the reward model, if any, as in TRL's script."""
    model = script_args.reward_model_name_or_path
    functions = [import_reward(path, "--reward_funcs") for path in script_args.reward_funcs or []]
    return [*functions] if model is None else [model, *functions]


def reward_functions(script_args: TrainArguments, training_args: Any, train_dataset: Any) -> list[Callable | str]:
    """Return the reward functions and model that the flags name, or the default for the data's solutions."""
    functions = import_rewards(script_args)
    if not functions:
        functions = [choose_reward(train_dataset, None, "--reward_funcs")]
        if functions == [math_reward] and not any(form in first_prompt(train_dataset) for form in ANSWER_FORMS):
            log_once(
                "math_reward looks for \\boxed{…} or a line `Answer: …` at the end of a response, and the first prompt "
                "asks for neither. To ask for one, add --instruction default, or change your prompts."
            )
    cache = script_args.soft_punish_cache
    if cache is not None:
        functions.append(get_soft_overlong_punishment(training_args.max_completion_length, cache))
    return functions
