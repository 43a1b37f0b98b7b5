r"""Train a causal language model on verifiable rewards with TIC-GRPO or another algorithm of the papers.

By default this trains the package's starter, a 167k-parameter model that learns to add. It needs no GPU or download:

    tic-grpo train --config starter

Your own data and reward function:

    tic-grpo train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name my.jsonl \
        --reward_funcs my_rewards.correct --output_dir runs/mine

`tic-grpo recipes` lists what is prepared, `tic-grpo dry-run` prints what a run would do and need, without loading a
model. To make a run resumable, add `--save_strategy steps --save_steps 1 --resume_from_checkpoint true`. To resume,
rerun the same command. `--config` takes a recipe's name, or a YAML file whose keys are flags. `accelerate launch -m
tic_grpo_trl.scripts.train` takes the same flags as `tic-grpo train`.
"""

import importlib.util
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, ends the process

import torch
from datasets import IterableDataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.integrations import is_wandb_available
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.import_utils import is_vllm_available

from tic_grpo_trl import ALGORITHMS, TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.checkpoint.storage import newest_if_any
from tic_grpo_trl.data import drop_long_prompts, prompt_lengths
from tic_grpo_trl.dry_run.plan import GB, Plan, load_model_config, plan_for
from tic_grpo_trl.metrics.run_summary import plot_curves, summarize_run
from tic_grpo_trl.safety.credentials import hide_credentials
from tic_grpo_trl.scripts.command_line import CommandLine, short_errors, split_flags
from tic_grpo_trl.scripts.launch import LAUNCH_FLAGS, Launch
from tic_grpo_trl.scripts.recipes import accelerate_config_path, read_yaml, recipe_path
from tic_grpo_trl.scripts.train_data import (
    TrainArguments,
    import_rewards,
    load_data,
    model_name,
    reward_functions,
    starter_defaults,
)
from tic_grpo_trl.validation.model_path import check_model


def check_quantization(model_args: ModelConfig):
    """Check that QLoRA has an adapter to train, a GPU and bitsandbytes, before anything is loaded."""
    bits = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit" if model_args.load_in_8bit else None
    if bits is None:
        return
    if not model_args.use_peft:
        raise ValueError(
            f"--{bits} without --use_peft: quantised weights cannot be trained; add --use_peft to train an adapter."
        )
    if not torch.cuda.is_available():
        raise ValueError(f"--{bits} (QLoRA) needs a GPU, and none is visible; remove it to train plain LoRA on a CPU.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"--{bits} needs bitsandbytes, which is not installed: pip install bitsandbytes")


def check_libraries(training_args: TICGRPOConfig):
    """Check that vLLM and wandb are installed, if the run needs them."""
    if training_args.use_vllm and not is_vllm_available():
        raise ValueError("--use_vllm true needs vLLM: pip install 'tic-grpo-trl[vllm]', or set --use_vllm false.")
    if "wandb" in (training_args.report_to or []) and not is_wandb_available():
        raise ValueError("--report_to wandb needs wandb: pip install 'tic-grpo-trl[wandb]', or --report_to none.")


def measure_data(script_args: TrainArguments, training_args: Any, model: str | None) -> tuple[dict[str, Any], str]:
    """Count the prompts of a run and, if there is a model, their tokens: arguments for [`Plan`], and why some lack."""
    measured: dict[str, Any] = {"longest_prompt": script_args.max_prompt_length}
    try:
        train_dataset, eval_dataset = load_data(script_args, training_args)
        if isinstance(train_dataset, IterableDataset):
            return measured, "streamed data has no length"
        measured |= {"num_prompts": len(train_dataset), "eval_prompts": eval_dataset and len(eval_dataset)}
    except ConnectionError as error:  # without the hub, the rest of the plan is still useful
        return measured, str(error)
    if model is None:
        return measured, ""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=training_args.trust_remote_code)
    if script_args.max_prompt_length:
        measured["num_prompts"] = len(drop_long_prompts(train_dataset, tokenizer, script_args.max_prompt_length))
    else:
        measured["longest_prompt"] = max(prompt_lengths(train_dataset, tokenizer))
    return measured, ""


def print_plan(script_args: TrainArguments, training_args: Any, model_args: ModelConfig):
    """Print what the run will do and need, for `tic-grpo dry-run`."""
    name = model_name(script_args, model_args)
    config, note = load_model_config(
        name, training_args.trust_remote_code, script_args.model_command, model_args.model_revision
    )
    measured, missing = measure_data(script_args, training_args, name if config is not None else None)
    memory = script_args.gpu_memory
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GB
    dtype = getattr(torch, model_args.dtype or "float32", torch.bfloat16)  # most checkpoints store bfloat16 ("auto")
    peft_config, gpu_memory = get_peft_config(model_args), memory and memory * GB
    plan = Plan(training_args, config, note, peft_config, dtype, gpu_memory=gpu_memory, **measured)
    print("Dry run: no weights were loaded, nothing was computed.")
    for label, text in [*([("data", f"not measured: {missing}")] if missing else []), *plan.lines()]:
        print(f"  {label:<17}{text}")


def build_trainer(script_args: TrainArguments, training_args: Any, model_args: ModelConfig) -> TICGRPOTrainer:
    """Load data, reward functions and model, and build the trainer."""
    import_rewards(script_args)  # so that a typo fails before any download
    check_quantization(model_args)
    check_libraries(training_args)
    sys.argv[1:] = hide_credentials(sys.argv[1:], training_args)  # wandb uploads the command line
    model = model_name(script_args, model_args)
    check_model(model, model_args.model_revision, training_args.trust_remote_code, script_args.model_command)
    train_dataset, eval_dataset = load_data(script_args, training_args)
    reward_funcs = reward_functions(script_args, training_args, train_dataset)
    if script_args.max_prompt_length:
        tokenizer = AutoTokenizer.from_pretrained(
            model, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
        train_dataset = drop_long_prompts(train_dataset, tokenizer, script_args.max_prompt_length)

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    try:
        Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output_dir {training_args.output_dir}: it cannot be a folder ({error.strerror})."
        ) from error
    return TICGRPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


class WithoutSummary(TrainerCallback):
    """Remove the summary and figure of an earlier run when training starts, so that a stopped run has none."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for name in ("summary.json", "curves.png"):
                Path(args.output_dir, name).unlink(missing_ok=True)


def train(trainer: TICGRPOTrainer, data: str | None):
    """Train, and write the weights, model card, summary and curves to `output_dir`; `data` names the training data."""
    folder = Path(str(trainer.args.output_dir))
    trainer.add_callback(WithoutSummary)
    trainer.train(newest_if_any(trainer.args.resume_from_checkpoint, folder))
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(dataset_name=data)
    if trainer.accelerator.is_main_process:
        write_summary(trainer, folder)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=data)


def write_summary(trainer: TICGRPOTrainer, folder: Path):
    """Write `summary.json` and `curves.png`, and print the outcome."""
    summary = summarize_run(trainer.state.log_history, trainer.args, trainer.reward_func_names[0])
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_curves(trainer.state.log_history, folder / "curves.png", trainer.reward_func_names[0])
    if summary["accuracy_after"] is not None:
        print(f"held-out accuracy {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}", end=" ")
    print(f"after {summary['updates']} updates in {summary['seconds']:.0f} s; results are in {folder}")


# What `--help` shows
SECTIONS = {
    "the run": {
        "output_dir": "folder for the weights, model card, log and figure",
        "resume_from_checkpoint": "true for the newest checkpoint in output_dir, if any; or a folder",
        "report_to": "wandb, trackio, tensorboard or none",
        "accelerate_config": "topology, by name (`tic-grpo recipes`) or as a file. Default: all GPUs, or the CPU",
        "num_processes": "processes, one per GPU",
    },
    "model": {
        "model_name_or_path": "hub id or folder. Default: the starter",
        "starter_task": "task of the starter: starter or long_tail",
        "use_peft": "train a LoRA adapter; also --lora_r, --lora_alpha, --lora_target_modules",
        "use_vllm": "generate with vLLM",
    },
    "data and reward": {
        "dataset_name": "file, folder or hub id with your own data, or named sets joined by +",
        "dataset_columns": "rename columns of your own data: prompt=question solution=answer",
        "reward_funcs": "import paths of reward functions, such as my_rewards.correct",
    },
    "algorithm": {
        "algorithm": f"one of {', '.join(ALGORITHMS)}",
        "learning_rate": "learning rate of AdamW",
        "num_generations": "responses to each prompt",
        "max_completion_length": "longest response, in tokens",
        "max_steps": "number of updates; or --num_train_epochs",
    },
}


def parse(words: list[str], config_class: Any) -> Any:
    """Parse a command line and the file of `--config`."""
    classes = (TrainArguments, config_class, ModelConfig)
    command_line = CommandLine(classes, str(__doc__), SECTIONS, of_launcher=LAUNCH_FLAGS)
    _, flags = split_flags(words, "config", "starter_task")
    recipe = read_yaml(recipe_path(flags["config"])) if "config" in flags else {}
    command_line.set_defaults(**starter_defaults(flags.get("starter_task", recipe.get("starter_task"))))
    return command_line.parse(words)


def dry_run(words: list[str]):
    """Print what the run would do and need, or refuse it with the same errors as the run."""
    _, flags = split_flags(words, "accelerate_config", "num_processes")
    launch = Launch.of(words)
    topology: str | None
    if flags or not {"ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"} & os.environ.keys():
        topology, processes = str(launch.config), launch.flags.get("num_processes")
    else:  # as launched
        topology = processes = None
    recipe = dict(launch.recipe)
    if "accelerate_config" in recipe:
        recipe["accelerate_config"] = str(accelerate_config_path(recipe["accelerate_config"]))
    config_class = plan_for(topology, int(processes) if processes else None, os.environ, recipe)
    if config_class is not None:
        script_args, training_args, model_args = parse(launch.training, config_class)
        import_rewards(script_args)
        print_plan(script_args, training_args, model_args)


def main(argv: Sequence[str] | None = None):
    """Parse flags and YAML, and train or print the dry run."""
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")  # the first process gives the same ones
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tic_grpo_trl").setLevel(logging.INFO)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with short_errors():
            if {"--dry_run", "--dry-run"} & {*words}:
                dry_run([word for word in words if word not in ("--dry_run", "--dry-run")])
                return
            _, flags = split_flags(words, "accelerate_config", "num_processes")
            if flags:
                raise ValueError(
                    f"--{next(iter(flags))} is for `tic-grpo train`; here it would have no effect: remove it."
                )
            script_args, training_args, model_args = parse(words, TICGRPOConfig)
            if script_args.dry_run:
                raise ValueError("dry_run does not work in a YAML file: give it as a flag, --dry_run.")
            trainer = build_trainer(script_args, training_args, model_args)
        with short_errors(lambda: trainer.state.global_step == 0):  # such as a checkpoint that does not exist
            train(trainer, script_args.dataset_name)
        trainer.accelerator.end_training()  # trackers and process group
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
