"""What a plain script prints besides its own output."""

import sys

from launching import run_command


SCRIPT = """
from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.starter import STARTER_MODEL, exact_match_reward, make_dataset

args = TICGRPOConfig(
    "run", per_device_train_batch_size=16, steps_per_generation=2, max_completion_length=16, max_steps=2, save_steps=1
)
TICGRPOTrainer(STARTER_MODEL, exact_match_reward, args, train_dataset=make_dataset("train", 16)).train()
"""


def test_a_plain_script_shows_no_warning_of_a_library(tmp_path):
    """With gradient checkpointing, DeepSpeed installed and a checkpoint, which all used to warn."""
    done = run_command([sys.executable, "-c", SCRIPT], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/checkpoint-2").exists()
    warned = [line for line in done.stderr.replace("\r", "\n").splitlines() if "warn" in line.lower()]
    assert warned == []
