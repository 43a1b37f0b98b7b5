"""The LoRA recipe on the starter, started as a user does: what it trains, saves, resumes and refuses."""

import json
import re

import pytest
import torch
import yaml
from conftest import relative_error
from launching import CONFIGS, ROOT, run_script
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser

from tic_grpo_trl import TICGRPOConfig
from tic_grpo_trl.scripts import train as train_script
from tic_grpo_trl.starter import STARTER_MODEL, make_dataset


RECIPE = ROOT / "examples/recipes/qwen3_1.7b_lora_24gb.yaml"
# what a CPU and a tiny model need otherwise; everything else is the recipe's
ON_CPU = "--use_cpu --bf16 false --gradient_checkpointing false --use_vllm false --max_completion_length 32".split()
SMALL = "--responses_per_update 32 --max_steps 8 --learning_rate 5e-4".split()


def train(folder, *arguments):
    done = run_script(
        *("--config", RECIPE, "--model_name_or_path", STARTER_MODEL, "--dataset_name", folder / "data"),
        *("--output_dir", folder / "out", *ON_CPU, *SMALL, *arguments),
        config=CONFIGS / "single_gpu.yaml",
        flags="--num_processes 1 --mixed_precision no".split(),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((folder / "out/trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two rollouts with a checkpoint between them, and what the same run logs and saves when it goes on from there."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "data").mkdir()
    make_dataset("train", 64, seed=0).to_json(folder / "data/train.jsonl")
    logs = train(folder, "--save_steps", 4)
    whole = load_file(folder / "out/adapter_model.safetensors")
    resumed = train(folder, "--save_steps", 4, "--resume_from_checkpoint", folder / "out/checkpoint-4")
    return folder, logs, whole, resumed


def log_probs(model, texts):
    tokenizer = AutoTokenizer.from_pretrained(STARTER_MODEL)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**batch).logits.log_softmax(-1)[batch["attention_mask"].bool()]


def test_adapter_loads_in_peft_and_merges_to_the_same_log_probs(run):
    folder, _, _, _ = run
    base = AutoModelForCausalLM.from_pretrained(STARTER_MODEL)
    texts = ["3+8+5+9=?", "1+2+3=?"]
    before = log_probs(base, texts)
    adapted = PeftModel.from_pretrained(base, folder / "out")
    config = adapted.peft_config["default"]
    recipe = yaml.safe_load(RECIPE.read_text())
    assert (config.r, config.lora_alpha, config.lora_dropout) == (recipe["lora_r"], recipe["lora_alpha"], 0.0)
    assert {name.split("_")[-1] for name in config.target_modules} == {"proj"}
    assert len(config.target_modules) == 7  # every linear layer but the head
    moved = log_probs(adapted, texts)
    assert (moved - before).abs().max() > 1e-2
    with adapted.disable_adapter():  # the reference policy
        torch.testing.assert_close(log_probs(adapted, texts), before, rtol=0, atol=0)
    torch.testing.assert_close(log_probs(adapted.merge_and_unload(), texts), moved, rtol=1e-5, atol=1e-5)


def test_only_the_adapter_is_saved_and_trained(run):
    folder, logs, whole, _ = run
    assert not (folder / "out/model.safetensors").exists()
    assert all("lora_" in name for name in whole)
    assert all(value.abs().sum() > 0 for value in whole.values())  # B started at zero
    ratios = [log["trajectory_ratio/log_std"] for log in logs]
    assert ratios[0] == ratios[4] == 0.0  # the first of a rollout's four updates: lora_dropout would be noise here
    assert all(ratios[k] > 1e-3 for k in (1, 2, 3, 5, 6, 7))


def test_a_run_that_goes_on_from_a_checkpoint_ends_the_same(run):
    folder, logs, whole, resumed = run
    assert [entry["step"] for entry in resumed] == [entry["step"] for entry in logs] == list(range(1, 9))
    for entry, other in zip(resumed, logs, strict=True):
        assert entry["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert entry["trajectory_ratio/ess"] == pytest.approx(other["trajectory_ratio/ess"], rel=1e-4)
    assert relative_error(load_file(folder / "out/adapter_model.safetensors"), whole) < 1e-5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_in_4bit"], r"--load_in_4bit (QLoRA) needs a GPU, and none is visible"),
        (["--load_in_8bit"], r"--load_in_8bit (QLoRA) needs a GPU, and none is visible"),
        (["--load_in_4bit", "--use_peft", "false"], "--load_in_4bit without --use_peft: quantised weights cannot be"),
    ],
)
def test_quantisation_is_refused_where_it_cannot_work(tmp_path, monkeypatch, flags, message):
    """In the script's own `main`, before the data set is looked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = TrlParser((train_script.TrainArguments, TICGRPOConfig, ModelConfig))
    arguments = parser.parse_args_and_config(["--config", str(RECIPE), *ON_CPU, *flags])
    with pytest.raises(ValueError, match=re.escape(message)):
        train_script.build_trainer(*arguments)
    assert not any(tmp_path.iterdir())
