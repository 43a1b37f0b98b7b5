"""Train a causal language model on verifiable rewards with TIC-GRPO or another algorithm of the papers.

By default this trains the package's starter, a 167k-parameter model that learns to add. It needs no GPU or download:

    accelerate launch --config_file accelerate_configs/cpu.yaml -m tic_grpo_trl.scripts.train \
        --config examples/recipes/starter.yaml

The papers' experiment on one H200:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml -m tic_grpo_trl.scripts.train \
        --config examples/recipes/qwen3_1.7b_h200.yaml

To print what a run would do and need, on any machine and without loading a model, add `--dry_run`.

To make a run resumable, add `--save_strategy steps --save_steps 1 --resume_from_checkpoint true`. The first start finds
no checkpoint and begins from scratch. To resume, rerun the same command.

`--dataset_name` takes the named sets of `tic_grpo_trl.data`, mixtures of them (`dapo_math_17k+aime_1983_2022`), or your
own data with a column `prompt` and the columns that your reward functions read. Every field of TrainArguments,
TICGRPOConfig and TRL's ModelConfig is a flag, and a key of the YAML file that `--config` names.
"""

import importlib.util
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.checkpoint.storage import newest_if_any
from tic_grpo_trl.data import drop_long_prompts, prompt_lengths
from tic_grpo_trl.dry_run.plan import GB, Plan, PlannedConfig, load_model_config, plan_for
from tic_grpo_trl.metrics.run_summary import plot_curves, summarize_run
from tic_grpo_trl.safety.credentials import hide_credentials
from tic_grpo_trl.scripts.train_data import TrainArguments, import_rewards, load_data, reward_functions
from tic_grpo_trl.starter import STARTER_MODEL


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


def print_plan(script_args: TrainArguments, training_args: Any, model_args: ModelConfig):
    """Print what the run will do and need (`--dry_run`)."""
    name = model_args.model_name_or_path or STARTER_MODEL
    config, note = load_model_config(name, training_args.trust_remote_code)
    problems: dict[str, Any] = {"longest_prompt": script_args.max_prompt_length}
    lines = []
    try:
        if script_args.dataset_streaming:
            raise OSError("streamed data has no length")
        train_dataset, eval_dataset = load_data(script_args, training_args)
        problems |= {"num_prompts": len(train_dataset), "eval_prompts": eval_dataset and len(eval_dataset)}
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=training_args.trust_remote_code)
        if script_args.max_prompt_length:
            train_dataset = drop_long_prompts(train_dataset, tokenizer, script_args.max_prompt_length)
            problems["num_prompts"] = len(train_dataset)
        else:
            problems["longest_prompt"] = max(prompt_lengths(train_dataset, tokenizer))
    except OSError as error:  # without the hub, the rest of the plan is still useful
        lines.append(("data", f"not read: {str(error).splitlines()[0]}"))
    memory = script_args.gpu_memory
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GB
    dtype = getattr(torch, model_args.dtype or "float32", torch.bfloat16)  # most checkpoints store bfloat16 ("auto")
    plan = Plan(
        training_args, config, note, get_peft_config(model_args), dtype, gpu_memory=memory and memory * GB, **problems
    )
    print("Dry run: no weights were loaded, nothing was computed.")
    for label, text in [*lines, *plan.lines()]:
        print(f"  {label:<17}{text}")


def train(script_args: TrainArguments, training_args: Any, model_args: ModelConfig):
    """Train a model, and write the weights, model card, summary and curves to `output_dir`; or print the dry run."""
    import_rewards(script_args)  # so that a typo fails before any download
    if script_args.dry_run:
        if not isinstance(training_args, PlannedConfig):
            raise ValueError("dry_run does not work in a YAML file: give it as a flag, --dry_run.")
        print_plan(script_args, training_args, model_args)
        return
    check_quantization(model_args)
    sys.argv[1:] = hide_credentials(sys.argv[1:], training_args)  # wandb uploads the command line
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
        write_summary(trainer, training_args)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def write_summary(trainer: TICGRPOTrainer, training_args: Any):
    """Write `summary.json` and `curves.png`, and print the outcome."""
    folder = Path(training_args.output_dir)
    summary = summarize_run(trainer.state.log_history, training_args, trainer.reward_func_names[0])
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_curves(trainer.state.log_history, folder / "curves.png", trainer.reward_func_names[0])
    if summary["accuracy_after"] is not None:
        print(f"held-out accuracy {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}", end=" ")
    print(f"after {summary['updates']} updates in {summary['seconds']:.0f} s; results are in {folder}")


def main():
    """Parse flags and YAML, and train or print the dry run."""
    # TRL uses names that transformers deprecated; a user of this script can do nothing about it.
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
