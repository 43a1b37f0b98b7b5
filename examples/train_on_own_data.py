"""Train on your own data with your own reward function. Copy this file and change the data, the reward and the model.

python examples/train_on_own_data.py          # all weights; half a minute on a laptop CPU
python examples/train_on_own_data.py --lora   # a LoRA adapter

The command does the same with a data file and a reward function in my_rewards.py:

tic-grpo train --dataset_name my.jsonl --reward_funcs my_rewards.correct --output_dir runs/own_data
"""

import random
import re
import sys

from datasets import Dataset
from peft import LoraConfig

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.starter import STARTER_MODEL


# A column `prompt`, and any columns that the reward function reads. From a file:
# datasets.load_dataset("json", data_files="my.jsonl", split="train")
terms = [random.Random(i).choices(range(10), k=4) for i in range(400)]
prompts = [[{"role": "user", "content": "+".join(map(str, t)) + "=?"}] for t in terms]
dataset = Dataset.from_dict({"prompt": prompts, "answer": [sum(t) for t in terms]})


def correct(completions, answer, **kwargs):
    """Return one reward per completion. TRL passes the columns of the data as lists."""
    boxes = [re.findall(r"\\boxed{(\d+)}", completion[0]["content"]) for completion in completions]
    return [float(found[-1:] == [str(right)]) for found, right in zip(boxes, answer, strict=True)]


lora = "--lora" in sys.argv
args = TICGRPOConfig(
    output_dir="runs/own_data",
    num_generations=8,  # responses per prompt
    responses_per_update=64,  # here 8 prompts
    per_device_train_batch_size=64,  # as many as fit into memory
    updates_per_rollout=4,  # K
    max_completion_length=48,  # tokens
    max_steps=60,
    learning_rate=1e-3 if lora else 2e-4,
    report_to="none",
    use_cpu=True,  # remove these three lines to use a GPU
    bf16=False,
    gradient_checkpointing=False,
)
trainer = TICGRPOTrainer(
    model=STARTER_MODEL,  # a folder or a hub id, such as "Qwen/Qwen3-0.6B"
    reward_funcs=correct,
    args=args,
    train_dataset=dataset,
    peft_config=LoraConfig(r=8, target_modules="all-linear") if lora else None,
)
trainer.train()
trainer.save_model()
