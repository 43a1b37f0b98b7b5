"""A run of two processes, killed at random moments and resumed from its checkpoints, ends like an undisturbed run, bit
for bit: DDP, ZeRO-3 (also with LoRA) and FSDP2.

The moments differ every time; KILLED_SEED=<number> repeats those of a failed test."""

import importlib.util
import json

import pytest
from killing import assert_same_run, draw, fresh_chance, kill_again_and_again, launched, resuming
from launching import CONFIGS, ON_CPU, ROOT
from topologies import EXPECTED, SPLITS_WEIGHTS


pytestmark = pytest.mark.distributed

STEPS = 8
COMMON = f"""--config {ROOT}/examples/recipes/starter.yaml --reward_funcs killing.even_letters
    --per_device_train_batch_size 4 --max_completion_length 12 --temperature 3 --max_steps {STEPS} --learning_rate 3e-4
    --eval_strategy no --eval_on_start false --save_strategy steps --logging_steps 2 --log_completions true
    --num_completions_to_print 1 --train_size 4 --disable_tqdm true""".split()
CASES = {
    # two epochs of one rollout, with two passes of K = 2; a save after every update
    "full": "--updates_per_rollout 2 --num_iterations 2 --num_generations 4 --save_steps 1",
    # K = 4; a group of eight is on both processes; saves inside a rollout
    "lora": """--num_generations 8 --save_steps 3
        --use_peft --lora_r 4 --lora_target_modules all-linear""",
}
RUNS = [("multi_gpu", "full"), ("zero3", "full"), ("zero3", "lora"), ("fsdp2", "full")]
SAVES = {"full": 1, "lora": 3}
KINDS = {"update": 1, "saving": 1}  # how many moments of each


@pytest.fixture(scope="module")
def topology(request, tmp_path_factory):
    """Return the name of an accelerate file and two processes started with it."""
    if request.param.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (extra [deepspeed]).")
    folder = tmp_path_factory.mktemp(request.param)
    with launched(folder, CONFIGS / f"{request.param}.yaml", 2, ON_CPU) as jobs:
        yield request.param, jobs


@pytest.mark.parametrize(("topology", "case"), RUNS, indirect=["topology"])
def test_killed_processes_end_as_if_undisturbed(topology, tmp_path, case):
    name, jobs = topology
    flags, whole, run = [*COMMON, *CASES[case].split()], tmp_path / "whole", tmp_path / "run"
    ended = jobs.run(*resuming(whole, *flags))
    assert ended["num_processes"] == 2
    assert {key: ended[key] for key in EXPECTED[name]} == EXPECTED[name]
    assert ended["whole"] == [[], []] if name in SPLITS_WEIGHTS else all(ended["whole"])

    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    assert all(entry["grad_norm"] > 0 for entry in history if "loss" in entry)
    moments = draw(fresh_chance(), STEPS, SAVES[case], KINDS)
    kill_again_and_again(jobs, run, flags, moments, ended["times"])
    jobs.run(*resuming(run, *flags))
    assert_same_run(run, whole)
