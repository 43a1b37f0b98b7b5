"""Started in two processes by test_topologies.py and test_two_nodes.py: runs the example script's own `main` on the
starter's model, once per case, and notes what every process generated, trained on and logged, and the weights.

Arguments: a folder for the results, the names of the cases with commas between them (`NAME-resumed` goes on from that
case's checkpoint at step 4), and flags for all of them."""

import gc
import json
import os
import socket
import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from launching import ROOT
from on_cpu import describe, of_all_ranks, prepare, split_every_parameter
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser
from trl.trainer.utils import pad

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.scripts import train as train_script
from tic_grpo_trl.starter import STARTER_MODEL


# A mini-batch of 16 responses is one group, half of it on either process; a rollout is four prompts.
FULL = "--learning_rate 2e-4 --num_generations 16"
# every process has whole groups
LORA = "--learning_rate 2e-3 --num_generations 8 --use_peft --lora_r 4 --lora_alpha 8 --lora_target_modules all-linear"
REFERENCE = "--beta 0.1"
CASES = {
    "full": FULL,
    "lora": LORA,
    "full-reference": f"{FULL} {REFERENCE} --gradient_checkpointing true",
    "lora-reference": f"{LORA} {REFERENCE}",
}
COMMON = """--per_device_train_batch_size 8 --max_completion_length 32 --max_steps 8 --train_size 64
    --eval_strategy no --eval_on_start false
    --lr_scheduler_type constant --save_strategy steps --save_steps 4 --disable_tqdm true
    --log_all_ratio_metrics true"""


def masked(ids, mask):
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


class NotingTrainer(TICGRPOTrainer):
    """Notes what passes through; `last` is the one that `main` has made."""

    last: "NotingTrainer"

    def __init__(self, *args, **kwargs):
        NotingTrainer.last = self
        self.rollouts, self.partitions, self.trained, self.ratio_rows = [], [], [], []
        super().__init__(*args, **kwargs)
        self.batcher.partition = self._noted_partition(self.batcher.partition)
        self.ratios.close = self._noted_ratios(self.ratios.close)

    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        self.rollouts.append(masked(rollout["completion_ids"], rollout["completion_mask"]))
        return rollout

    def _noted_partition(self, partition):
        def noted(rollout):
            rows = partition(rollout)
            prompts = masked(rows["prompt_ids"], rows["prompt_mask"])
            completions = masked(rows["completion_ids"], rows["completion_mask"])
            self.partitions.append(list(zip(prompts, completions, rows["advantages"].tolist(), strict=True)))
            return rows

        return noted

    def _compute_loss(self, model, inputs):
        prompts = masked(inputs["prompt_ids"], inputs["prompt_mask"])
        rows = zip(prompts, masked(inputs["completion_ids"], inputs["completion_mask"]), strict=True)
        self.trained.append([row for row in rows if row[1]])  # blank rows have no completion
        return super()._compute_loss(model, inputs)

    def _noted_ratios(self, close):
        def noted(*args):
            self.ratio_rows.append([row for rows in self.ratios._open for row in rows.tolist()])
            return close(*args)

        return noted


def fixed_batch():
    """Answers right and wrong to a few problems; the same in every process."""
    tokenizer = AutoTokenizer.from_pretrained(STARTER_MODEL)
    problems = ["3+8+5=?", "1+1+1+1=?", "9+9+9+9+9+9=?"]
    chats = [[{"role": "user", "content": problem}] for problem in problems]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    completions = [tokenizer(text)["input_ids"] for text in ["3+8=11\n11+5=16\n", "The sum is \\boxed{4}", "9+9=17"]]

    batch = {}
    for kind, rows, side in (("prompt", prompts, "left"), ("completion", completions, "right")):
        ids = [torch.tensor(row) for row in rows]
        batch[f"{kind}_ids"] = pad(ids, padding_value=0, padding_side=side)
        batch[f"{kind}_mask"] = pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side=side)
    return batch


def run(name, flags):
    output = folder / name
    common = ["--config", str(ROOT / "examples/recipes/starter.yaml"), "--output_dir", str(output), *COMMON.split()]
    parsed = TrlParser((train_script.TrainArguments, TICGRPOConfig, ModelConfig)).parse_args_and_config(
        [*common, *flags]
    )
    split_every_parameter(parsed[1])
    train_script.train(train_script.build_trainer(*parsed), parsed[0].dataset_name)
    trainer = NotingTrainer.last
    trainer.model.eval()
    batch = fixed_batch()
    logps = trainer.packed_forward.score(batch).logps
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if dist.get_rank() == 0:
        weights = {key.removeprefix("module."): value.cpu() for key, value in weights.items()}
        torch.save({"weights": weights, "batch": batch, "logps": logps.cpu()}, output / "result.pt")
    of_every_step = {
        "rollouts": trainer.rollouts,
        "partitions": trainer.partitions,
        "trained": trainer.trained,
        "ratios": trainer.ratio_rows,
    }
    return describe(trainer) | {
        "logged": [entry for entry in trainer.state.log_history if "loss" in entry],
        **{key: list(zip(*of_all_ranks(value), strict=True)) for key, value in of_every_step.items()},
        "addresses": of_all_ranks(addresses()),
    }


def addresses():
    """The network addresses that this process can see."""
    interfaces = psutil.net_if_addrs().values()
    return sorted(a.address for own in interfaces for a in own if a.family == socket.AF_INET)


folder, cases, *more = sys.argv[1:]
folder = Path(folder)
prepare()

train_script.TICGRPOTrainer = NotingTrainer
results = {}
gc.freeze()  # every trainer collects garbage: spare it what was imported
for case in cases.split(","):
    kind = case.removesuffix("-resumed")
    resume = ["--resume_from_checkpoint", str(folder / kind / "checkpoint-4")] if case != kind else []
    results[case] = run(case, [*CASES[kind].split(), *resume, *more])
if os.environ["RANK"] == "0":
    (folder / "result.json").write_text(json.dumps(results))
dist.barrier()
dist.destroy_process_group()
