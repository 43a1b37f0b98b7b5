"""Answers of a model, by transformers or by vLLM. Both get the same token ids and the same settings."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: from the whole distribution at a temperature, or greedily at temperature 0."""

    temperature: float
    top_p: float
    max_completion_length: int


@dataclass(frozen=True)
class Answer:
    """One sampled answer: `text` without special tokens, `tokens` with its end, `truncated` where it has no end."""

    text: str
    tokens: int
    truncated: bool


# One answer for each row: prompts as token ids, seeds as numbers, both of length B
Sampler = Callable[[Sequence[list[int]], Sequence[int], Sampling], list[Answer]]


def adapter_base(model: str) -> str | None:
    """The base model of a LoRA adapter's folder; `None` for any other model."""
    path = Path(model, "adapter_config.json")
    return json.loads(path.read_text())["base_model_name_or_path"] if path.is_file() else None


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, of an adapter (its base's where the folder has none), padding on the left.

    Raises:
        ValueError: where it has no chat template, which the prompts need, or needs code that may not run.
    """
    base = adapter_base(model)
    own = base is None or Path(model, "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(
        model if own else base, padding_side="left", trust_remote_code=trust_remote_code
    )
    if tokenizer.chat_template is None:
        raise ValueError(f"{model} has no chat template: save one with its tokenizer (tokenizer.chat_template = ...)")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(model: str, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model with its weights; an adapter is merged into its base. On the GPUs where there are any."""
    settings: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    settings["device_map"] = "auto" if torch.cuda.is_available() else None
    base = adapter_base(model)
    if base is None:
        return AutoModelForCausalLM.from_pretrained(model, **settings).eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **settings), model).merge_and_unload()


def text_config(model: str, trust_remote_code: bool = False) -> Any:
    """The configuration of the model (of an adapter's base) that knows its number of positions."""
    config = AutoConfig.from_pretrained(adapter_base(model) or model, trust_remote_code=trust_remote_code)
    return config.get_text_config()


def end_tokens(model: str, tokenizer: Any) -> list[int]:
    """All tokens that end an answer: the tokenizer's own and those of the model's generation configuration."""
    try:
        ends = GenerationConfig.from_pretrained(adapter_base(model) or model).eos_token_id
    except OSError:  # it has none
        ends = None
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None})


def to_answer(ids: list[int], tokenizer: Any, ends: list[int]) -> Answer:
    """An answer from its token ids, of which those after its end are padding."""
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:length], skip_special_tokens=True)
    return Answer(text, len(ids) if length is None else length, truncated=length is None)


def transformers_sampler(model: str, tokenizer: Any, dtype: str = "auto", trust_remote_code: bool = False) -> Sampler:
    """Answers by `generate`, in batches padded on the left.

    A batch is drawn from one seed, its first row's: the answers depend on how rows are put into batches.

    Args:
        model: folder, hub id or adapter folder.
        tokenizer: of `load_tokenizer`.
        dtype: of the weights; `auto` for the checkpoint's.
        trust_remote_code: whether code that comes with the model may run.
    """
    policy: Any = load_model(model, dtype, trust_remote_code)
    ends = end_tokens(model, tokenizer)
    # The model's own would fill in what is not given, such as Qwen3's top_k = 20.
    policy.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)

    @torch.no_grad()
    def sample(prompts, seeds, sampling):
        inputs = tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(policy.device)
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        torch.manual_seed(seeds[0])
        output = policy.generate(
            input_ids=inputs["input_ids"],  # (B, T)
            attention_mask=inputs["attention_mask"],
            max_new_tokens=sampling.max_completion_length,
            **(drawn if sampling.temperature else {"do_sample": False}),
        )
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [to_answer(row, tokenizer, ends) for row in rows]

    return sample


def vllm_sampler(
    model: str, tokenizer: Any, dtype: str = "auto", trust_remote_code: bool = False, **engine: Any
) -> Sampler:
    """Answers by a vLLM engine in this process. Each row is drawn from its own seed, whatever else is in the batch.

    Args:
        model: folder, hub id or adapter folder (merged into a temporary copy of its base).
        tokenizer: of `load_tokenizer`.
        dtype: of the weights; `auto` for the checkpoint's.
        trust_remote_code: whether code that comes with the model may run.
        engine: settings of `vllm.LLM`.

    Raises:
        ValueError: where vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ValueError("--backend vllm: vLLM is not installed: pip install 'tic-grpo-trl[vllm]'") from error

    if dtype == "auto":  # vLLM's own "auto" would halve float32
        dtype = str(text_config(model, trust_remote_code).dtype or "bfloat16").removeprefix("torch.")
    ends = end_tokens(model, tokenizer)
    with tempfile.TemporaryDirectory(prefix="merged-") as merged:
        folder = model
        if adapter_base(model):
            folder = merged
            load_model(model, dtype, trust_remote_code).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            torch.cuda.empty_cache()  # the engine wants the memory
        llm = LLM(model=folder, dtype=dtype, generation_config="vllm", trust_remote_code=trust_remote_code, **engine)

    def sample(prompts, seeds, sampling):
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_completion_length,
                stop_token_ids=ends,
                seed=seed,
                detokenize=False,
            )
            for seed in seeds
        ]
        rows = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [output.outputs[0] for output in llm.generate(rows, params, use_tqdm=False)]
        return [to_answer(list(output.token_ids), tokenizer, ends) for output in outputs]

    return sample
