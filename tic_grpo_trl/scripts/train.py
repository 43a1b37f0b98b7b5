"""Train any causal language model on verifiable rewards with TIC-GRPO, or with any of the papers' other algorithms.

Without arguments about model and data it trains the package's starter (a 167k-parameter model that learns to reason its
way through sums), which needs no GPU and no download:

    accelerate launch --config_file accelerate_configs/cpu.yaml -m tic_grpo_trl.scripts.train \
        --config examples/recipes/starter.yaml

The papers' experiment, on one H200:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml -m tic_grpo_trl.scripts.train \
        --config examples/recipes/qwen3_1.7b_h200.yaml

What a run will do and need, before anything is loaded, on any machine:

    python -m tic_grpo_trl.scripts.train --config examples/recipes/qwen3_1.7b_h200.yaml \
        --dry_run --accelerate_config accelerate_configs/zero2.yaml --num_processes 8

A run that may be killed at any time: the same command with `--save_strategy steps --save_steps 1` and
`--resume_from_checkpoint true`, again and again until it ends. It starts where there is no checkpoint yet.

`--dataset_name` takes the named sets of `tic_grpo_trl.data` and mixtures of them (`dapo_math_17k+aime_1983_2022`), or
data of your own: columns `prompt` and whatever your reward functions read. Every field of TICGRPOConfig and of TRL's
ModelConfig is a flag and a key of the YAML that `--config` names.
"""

import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.rewards import get_soft_overlong_punishment

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.checkpoint.storage import newest_if_any
from tic_grpo_trl.data import (
    DEFAULT,
    EVALUATION_SETS,
    GENERATED_SETS,
    NAMED_SETS,
    drop_long_prompts,
    load_problems,
    prompt_lengths,
)
from tic_grpo_trl.dry_run.plan import GB, Plan, PlannedConfig, load_model_config, plan_for
from tic_grpo_trl.evaluation.scoring import choose_reward
from tic_grpo_trl.metrics.run_summary import plot_curves, summarize_run
from tic_grpo_trl.safety.credentials import hide_credentials
from tic_grpo_trl.scripts.imports import import_function
from tic_grpo_trl.starter import STARTER_MODEL


@dataclass
class TrainArguments(ScriptArguments):
    """Script arguments: data, rewards and the dry run.

    Args:
        dataset_name (`str`): named sets, joined by `+`, each as NAME or NAME@LOCATION; or your own data, a folder, file
            or hub id.
        dataset_columns (`list[str]`, *optional*): where your own data has `prompt` and `solution`, such as
            `prompt=question solution=answer`; other columns are then left out.
        eval_dataset_name (`str`, *optional*): what to evaluate on where `eval_strategy` is on.
        train_size, test_size (`int`): problems of the sets that are made on the spot (`starter`, `few_shot_sums`).
        instruction (`str`, *optional*): text around each problem of a named set, with `{problem}` where it goes.
        max_prompt_length (`int`, *optional*): longer prompts are left out, in tokens.
        reward_funcs (`list[str]`, *optional*): import paths of reward functions in TRL's signature. The first one is
            reported as the accuracy. Left out: exact match for sums, the sandbox for programs, `math_reward` otherwise.
        soft_punish_cache (`int`, *optional*): adds DAPO's soft overlong punishment over the last so many tokens.
        dry_run (`bool`): print what would happen, and stop.
        accelerate_config (`str`, *optional*), num_processes (`int`, *optional*): for the dry run, a topology other than
            that of this process.
        gpu_memory (`float`, *optional*): GB of each GPU, for the dry run; that of the first one here if left out.
    """

    dataset_name: str = field(
        default="starter", metadata={"help": "Named sets joined by +, each NAME or NAME@LOCATION; or your own data."}
    )
    dataset_columns: list[str] | None = field(
        default=None, metadata={"help": "Your own data's columns: prompt=question solution=answer."}
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Data to evaluate on, such as aime24."})
    train_size: int = field(default=8000, metadata={"help": "Problems of starter and few_shot_sums to train on."})
    test_size: int = field(default=1000, metadata={"help": "Held-out problems of starter and few_shot_sums."})
    instruction: str = field(default=DEFAULT, metadata={"help": "Text around each problem, with {problem} in it."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Leave out longer prompts, in tokens."})
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Import paths such as my_package.rewards.my_reward. Default: the data's own."}
    )
    soft_punish_cache: int | None = field(
        default=None, metadata={"help": "Tokens before max_completion_length over which DAPO's punishment sets in."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print what would happen, and stop."})
    accelerate_config: str | None = field(default=None, metadata={"help": "Topology of the dry run."})
    num_processes: int | None = field(default=None, metadata={"help": "Number of processes of the dry run."})
    gpu_memory: float | None = field(default=None, metadata={"help": "GB of each GPU, for the dry run."})


def check_quantization(model_args: ModelConfig):
    """Refuse QLoRA where it cannot work, before anything is loaded."""
    bits = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit" if model_args.load_in_8bit else None
    if bits is None:
        return
    if not model_args.use_peft:
        raise ValueError(
            f"--{bits} without --use_peft: quantised weights cannot be trained, only an adapter on them can."
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"--{bits} (QLoRA) needs a GPU, and none is visible: remove it; --use_peft alone runs anywhere."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"--{bits} needs bitsandbytes, which is not installed: pip install bitsandbytes")


def reward_functions(script_args: TrainArguments, training_args: Any, train_dataset: Any) -> list[Callable]:
    """The reward functions that the flags name, or the one that the data's solutions ask for."""
    functions = [import_function(path, "--reward_funcs") for path in script_args.reward_funcs or []]
    if not functions:
        if "solution" not in (train_dataset.column_names or []):
            raise ValueError("--reward_funcs: the data has no column `solution`; name a reward function of yours.")
        functions = [choose_reward(train_dataset)]
    cache = script_args.soft_punish_cache
    if cache is not None:
        if not 0 < cache < training_args.max_completion_length:
            raise ValueError(
                f"--soft_punish_cache {cache} must lie between 0 and max_completion_length "
                f"{training_args.max_completion_length}; DAPO's is a fifth of it."
            )
        functions.append(get_soft_overlong_punishment(training_args.max_completion_length, cache))
    return functions


def load_data(script_args: TrainArguments, training_args: TICGRPOConfig) -> tuple[Any, Any]:
    """The training data, and the evaluation data where `eval_strategy` is on."""
    name, evaluates = script_args.dataset_name, training_args.eval_strategy != "no"
    sets = [part.partition("@")[0].strip() for part in name.split("+")]
    if held_out := [part for part in sets if part in EVALUATION_SETS]:
        raise ValueError(f"--dataset_name {name}: {', '.join(held_out)} is for evaluation, not for training.")
    made = name in GENERATED_SETS
    named = made or any(part in NAMED_SETS for part in sets)
    pairs = [column.partition("=") for column in script_args.dataset_columns or []]
    columns = {ours: theirs for ours, _, theirs in pairs} or None

    eval_dataset, held_out_name = None, script_args.eval_dataset_name
    if evaluates and held_out_name:
        known = held_out_name.partition("@")[0] in (*EVALUATION_SETS, *GENERATED_SETS)
        eval_dataset = load_problems(
            held_out_name,
            "train" if Path(held_out_name).is_file() else script_args.dataset_test_split,
            instruction=script_args.instruction,
            columns=None if known else columns,
            size=script_args.test_size,
        )
    elif evaluates and made:
        eval_dataset = load_problems(name, "test", size=script_args.test_size)
    elif evaluates and named:
        raise ValueError(f"--eval_strategy: {name} has nothing held out; add --eval_dataset_name, such as aime24.")

    if named or columns:
        problems = partial(
            load_problems,
            name,
            instruction=script_args.instruction,
            columns=columns,
            config=script_args.dataset_config,
        )
        if evaluates and eval_dataset is None:
            eval_dataset = problems(script_args.dataset_test_split)
        split = "train" if named else script_args.dataset_train_split
        return problems(split, size=script_args.train_size, seed=training_args.seed), eval_dataset

    # As in TRL's scripts: every column reaches the reward functions.
    dataset = load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    if evaluates and eval_dataset is None:
        eval_dataset = dataset[script_args.dataset_test_split]
    return dataset[script_args.dataset_train_split], eval_dataset


def print_plan(script_args: TrainArguments, training_args: Any, model_args: ModelConfig):
    """`--dry_run`: what the run will do and need."""
    name = model_args.model_name_or_path or STARTER_MODEL
    config, note = load_model_config(name, training_args.trust_remote_code)
    problems: dict[str, Any] = {"longest_prompt": script_args.max_prompt_length}
    shown = []
    try:
        if script_args.dataset_streaming:
            raise OSError("it is streamed, and has no length")
        train_dataset, eval_dataset = load_data(script_args, training_args)
        problems |= {"num_prompts": len(train_dataset), "eval_prompts": eval_dataset and len(eval_dataset)}
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=training_args.trust_remote_code)
        if script_args.max_prompt_length:
            train_dataset = drop_long_prompts(train_dataset, tokenizer, script_args.max_prompt_length)
            problems["num_prompts"] = len(train_dataset)
        else:
            problems["longest_prompt"] = max(prompt_lengths(train_dataset, tokenizer))
    except OSError as error:  # no hub: the rest can still be said
        shown.append(("data", f"not read: {str(error).splitlines()[0]}"))
    memory = script_args.gpu_memory
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GB
    dtype = getattr(torch, model_args.dtype or "float32", torch.bfloat16)  # "auto" is bfloat16 in today's checkpoints
    plan = Plan(
        training_args, config, note, get_peft_config(model_args), dtype, gpu_memory=memory and memory * GB, **problems
    )
    print("Dry run: no weights were loaded, nothing was computed.")
    for label, text in [*shown, *plan.lines()]:
        print(f"  {label:<17}{text}")


def train(script_args: TrainArguments, training_args: Any, model_args: ModelConfig):
    for path in script_args.reward_funcs or []:
        import_function(path, "--reward_funcs")  # a mistake shows before anything is fetched
    if script_args.dry_run:
        if not isinstance(training_args, PlannedConfig):
            raise ValueError("dry_run in a YAML comes too late: give it as a flag, --dry_run.")
        print_plan(script_args, training_args, model_args)
        return
    check_quantization(model_args)
    sys.argv[1:] = hide_credentials(sys.argv[1:], training_args)  # wandb keeps the command line
    model_name = model_args.model_name_or_path or STARTER_MODEL
    train_dataset, eval_dataset = load_data(script_args, training_args)
    reward_funcs = reward_functions(script_args, training_args, train_dataset)
    if script_args.max_prompt_length:
        tokenizer = AutoTokenizer.from_pretrained(
            model_name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
        train_dataset = drop_long_prompts(train_dataset, tokenizer, script_args.max_prompt_length)

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    trainer = TICGRPOTrainer(
        model=model_name,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(newest_if_any(training_args.resume_from_checkpoint, Path(training_args.output_dir)))

    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    if trainer.accelerator.is_main_process:
        folder = Path(training_args.output_dir)
        summary = summarize_run(trainer.state.log_history, training_args, trainer.reward_func_names[0])
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        plot_curves(trainer.state.log_history, folder / "curves.png", trainer.reward_func_names[0])
        if summary["accuracy_after"] is not None:
            print(f"held-out accuracy {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}", end=" ")
        print(f"after {summary['updates']} updates in {summary['seconds']:.0f} s; everything is in {folder}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def main():
    """Read flags and YAML, and train or print what a run would do."""
    # TRL still uses names that transformers renamed; nothing a user of this script could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tic_grpo_trl").setLevel(logging.INFO)
    if "--dry_run" not in sys.argv:
        classes: Any = (TrainArguments, TICGRPOConfig, ModelConfig)
        train(*TrlParser(classes).parse_args_and_config())
    elif (config_class := plan_for(sys.argv[1:], os.environ)) is not None:
        try:
            classes = (TrainArguments, config_class, ModelConfig)
            train(*TrlParser(classes).parse_args_and_config())
        except ValueError as error:
            sys.exit(f"Dry run: refused. {error}")


if __name__ == "__main__":
    main()
