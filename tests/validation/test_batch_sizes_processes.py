"""The same batches in one and two processes, in real runs with DDP and with DeepSpeed, which accumulates by itself."""

import importlib.util
import json

import pandas
import pytest
from launching import CONFIGS, ON_CPU, run_script


pytestmark = pytest.mark.distributed

FLAGS = """--use_cpu --bf16 false --gradient_checkpointing false --report_to none --save_strategy no --logging_steps 1
    --log_completions --num_completions_to_print 1 --max_completion_length 12 --num_generations 4 --train_size 24
    --num_train_epochs 1 --per_device_train_batch_size 4 --responses_per_update 16 --updates_per_rollout 2
    --eval_strategy steps --eval_steps 100 --eval_on_start --test_size 8 --num_generations_eval 2
    --responses_per_eval_batch 16""".split()


@pytest.mark.parametrize(("topology", "processes"), [("cpu", 1), ("multi_gpu", 2), ("zero2", 2)])
def test_an_update_has_the_same_responses(topology, processes, tmp_path):
    if topology.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (extra [deepspeed]).")
    flags = ON_CPU if processes == 2 else ()
    done = run_script("--output_dir", tmp_path, *FLAGS, config=CONFIGS / f"{topology}.yaml", flags=flags)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    # 24 prompts are 3 rollouts of 8 prompts = 32 responses, each for 2 updates
    assert state["global_step"] == 6
    assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 3, 5]
    card = (tmp_path / "README.md").read_text()
    assert "| responses per update | 16 |" in card
    assert "| updates per rollout (K) | 2 |" in card
    assert f"| processes | {processes} |" in card
    tables = [pandas.read_parquet(table) for table in (tmp_path / "completions").glob("*.parquet")]
    assert set(map(len, tables)) == {16, 32}  # of an evaluation of 8 problems without repeats, and of rollouts
