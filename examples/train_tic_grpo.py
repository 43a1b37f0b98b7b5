"""Train any causal language model on verifiable rewards with TIC-GRPO, or with any of the papers' other arms.

Without arguments about model and data it trains the package's starter (a 167k-parameter model that learns to reason its
way through sums), which needs no GPU and no download:

    accelerate launch --config_file accelerate_configs/cpu.yaml examples/train_tic_grpo.py \
        --config examples/recipes/starter.yaml

A model and a data set of yours (columns `prompt` and whatever your reward functions read), on GPUs:

    accelerate launch --config_file accelerate_configs/zero3.yaml examples/train_tic_grpo.py \
        --model_name_or_path Qwen/Qwen3-1.7B --dtype bfloat16 --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs trl.rewards.accuracy_reward --output_dir runs/qwen3 --use_vllm --arm tic_grpo

Every field of TICGRPOConfig and of TRL's ModelConfig is a flag and a key of the YAML that `--config` names.
"""

import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.report import plot_curves, summarize_run
from tic_grpo_trl.starter import STARTER_MODEL, make_dataset


@dataclass
class TrainArguments(ScriptArguments):
    """Script arguments: data and rewards.

    Args:
        reward_funcs (`list[str]`, *optional*): import paths of reward functions in TRL's signature. The first one is
            reported as the accuracy.
        starter_train_size, starter_test_size (`int`): problems of the starter task, where no `dataset_name` is given.
    """

    reward_funcs: list[str] = field(
        default_factory=lambda: ["trl.rewards.accuracy_reward"],
        metadata={"help": "Import paths of reward functions, such as my_package.rewards.my_reward."},
    )
    starter_train_size: int = field(default=8000, metadata={"help": "Problems to train on without --dataset_name."})
    starter_test_size: int = field(default=1000, metadata={"help": "Held-out problems without --dataset_name."})


def import_function(path: str) -> Callable:
    """The object that an import path such as `package.module.name` names, the working directory included."""
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--reward_funcs {path}: give an import path such as my_package.rewards.my_reward.") from error


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


def main(script_args: TrainArguments, training_args: TICGRPOConfig, model_args: ModelConfig):
    check_quantization(model_args)
    reward_funcs = [import_function(path) for path in script_args.reward_funcs]
    if script_args.dataset_name:
        dataset = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
        train_dataset = dataset[script_args.dataset_train_split]
        eval_dataset = dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None
    else:
        train_dataset = make_dataset("train", script_args.starter_train_size, seed=training_args.seed)
        eval_dataset = make_dataset("test", script_args.starter_test_size)

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    trainer = TICGRPOTrainer(
        model=model_args.model_name_or_path or STARTER_MODEL,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

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


if __name__ == "__main__":
    # TRL still uses names that transformers renamed; nothing a user of this script could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tic_grpo_trl").setLevel(logging.INFO)
    main(*TrlParser((TrainArguments, TICGRPOConfig, ModelConfig)).parse_args_and_config())
