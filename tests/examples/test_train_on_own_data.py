"""The example that readers copy trains as it is, with all weights and with a LoRA adapter."""

import re
import sys

import pytest
from launching import ROOT, run_command


@pytest.mark.parametrize("flags", [[], ["--lora"]], ids=["all weights", "lora"])
def test_reward_rises_and_the_model_is_saved(tmp_path, flags):
    done = run_command([sys.executable, ROOT / "examples/train_on_own_data.py", *flags], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rewards = [float(reward) for reward in re.findall(r"[ ,]reward (\d\.\d+)", done.stderr)]
    assert rewards[-1] > rewards[0] + 0.2
    saved = "adapter_model.safetensors" if flags else "model.safetensors"
    assert (tmp_path / "runs/own_data" / saved).exists()
