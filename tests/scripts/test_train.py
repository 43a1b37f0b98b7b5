"""The training script end to end through `accelerate launch`, as a user starts it."""

import json
import re

import pytest
import torch
from launching import QUICK, ROOT, run_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tic_grpo_trl.starter import STARTER_MODEL


def train(output_dir, *arguments, **kwargs):
    recipe = ROOT / "examples/recipes/starter.yaml"
    done = run_script("--config", recipe, "--output_dir", output_dir, *arguments, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starter")
    return folder, train(folder, *QUICK)


def test_run_folder_holds_what_the_readme_says(run):
    folder, done = run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 8
    assert 0 < summary["accuracy_before"] < 1
    assert 0 < summary["accuracy_after"] < 1
    assert summary["seconds"] > 0
    assert (summary["algorithm"], summary["clip_mode"], summary["seed"]) == ("tic_grpo", "up_only", 0)
    assert set(summary["versions"]) == {"tic-grpo-trl", "trl", "transformers", "torch", "accelerate"}
    assert (folder / "curves.png").stat().st_size > 20_000
    assert "tic-grpo" in (folder / "README.md").read_text()
    shown = f"held-out accuracy {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f} after 8 updates"
    assert shown in done.stdout

    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "trajectory_ratio/inner_4/ess" in entry]
    assert len(last) == 2  # K = 4: two rollouts
    assert [entry["step"] for entry in history if "reward" in entry] == [1, 5]


def test_progress_bar_shows_reward_and_effective_sample_size(run):
    _, done = run
    final = done.stderr.replace("\r", "\n")
    assert re.search(r"8/8 \[[^\n]*, reward \d\.\d{3}, ess \d\.\d{3}", final)
    assert "FutureWarning" not in done.stderr
    assert done.stdout.count("settings in force") == 1


def test_saved_model_is_the_trained_one(run):
    folder, _ = run
    trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    start = AutoModelForCausalLM.from_pretrained(STARTER_MODEL).state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in trained.items())
    assert all(value.isfinite().all() for value in trained.values())


def test_own_model_data_reward_and_lora(tmp_path):
    """What a user with another model and data set does, by flags alone."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{a}+{b}+1=?"}], "parity": a % 2} for a in range(8) for b in (2, 3)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_rewards.py").write_text(
        "def parity_reward(completions, parity, **kwargs):\n"
        "    return [float(sum(map(ord, c[0]['content'])) % 2 == p) for c, p in zip(completions, parity)]\n"
    )
    train(
        tmp_path / "out",
        *"--per_device_train_batch_size 8 --num_generations 4 --max_steps 3".split(),
        *"--eval_strategy no --eval_on_start false".split(),
        *"--reward_funcs my_rewards.parity_reward --algorithm grpo_traj_is --epsilon 0.1 --epsilon_high 0.1".split(),
        *"--use_peft --lora_r 4 --lora_target_modules q_proj v_proj --learning_rate 1e-2".split(),
        *("--model_name_or_path", STARTER_MODEL, "--dataset_name", tmp_path / "data"),
        cwd=tmp_path,
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["accuracy_after"] is None
    assert (summary["algorithm"], summary["epsilon"], summary["updates"]) == ("grpo_traj_is", 0.1, 3)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(adapter) == 12  # A and B of two projections in three layers
    assert any(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert "rewards/parity_reward/mean" in history[0]


def test_mistakes_end_before_any_training(tmp_path):
    recipe = ("--config", ROOT / "examples/recipes/starter.yaml", "--output_dir", tmp_path / "out")
    wrong_reward = run_script(*recipe, "--reward_funcs", "my_rewards.nothing")
    assert wrong_reward.returncode != 0
    assert "--reward_funcs my_rewards.nothing: there is no module 'my_rewards'" in wrong_reward.stderr
    wrong_option = run_script(*recipe, "--epsilon_high", "-1")
    assert wrong_option.returncode != 0
    assert "epsilon_high=-1.0 must be in (0, inf)" in wrong_option.stderr
    assert not (tmp_path / "out").exists()


def test_recipe_resumes(tmp_path):
    saving = ["--save_strategy", "steps", "--save_steps", "4"]
    train(tmp_path, *QUICK, *saving)
    whole = load_file(tmp_path / "model.safetensors")
    train(tmp_path, *QUICK, *saving, "--resume_from_checkpoint", tmp_path / "checkpoint-4")
    resumed = load_file(tmp_path / "model.safetensors")
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "reward" in entry] == [1, 5]
    for name, value in resumed.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)


def test_a_run_that_fails_has_no_summary_of_an_earlier_one(tmp_path):
    folder = tmp_path / "run"
    train(folder, *QUICK)
    (tmp_path / "rewards.py").write_text("def broken(completions, **kwargs):\n    return 1 / len([])\n")
    flags = ["--output_dir", folder, *QUICK, "--reward_funcs", "rewards.broken", "--eval_on_start", "false"]
    done = run_script("--config", "starter", *flags, cwd=tmp_path)
    assert done.returncode != 0
    assert not (folder / "summary.json").exists()
    assert not (folder / "curves.png").exists()
