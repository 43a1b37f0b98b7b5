"""Sample answers with transformers or vLLM, from the same token ids and settings."""

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
    """How to draw answers: from the distribution at a temperature, or greedily at temperature 0."""

    temperature: float
    top_p: float
    max_completion_length: int


@dataclass(frozen=True)
class Answer:
    """One answer: `text` without special tokens, `tokens` including the end token, `truncated` if it has none."""

    text: str
    tokens: int
    truncated: bool


# Takes prompts as token ids and their seeds, both of length B, and returns B answers
Sampler = Callable[[Sequence[list[int]], Sequence[int], Sampling], list[Answer]]


def adapter_base(model: str) -> str | None:
    """Return the base model of a LoRA adapter's folder; `None` for any other model."""
    path = Path(model, "adapter_config.json")
    return json.loads(path.read_text())["base_model_name_or_path"] if path.is_file() else None


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model with left padding; for an adapter without one, its base's."""
    source = model if Path(model, "tokenizer_config.json").is_file() else adapter_base(model) or model
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=trust_remote_code)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(model: str, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a model, on GPUs if there are any, and merge an adapter into its base."""
    base, device_map = adapter_base(model), "auto" if torch.cuda.is_available() else None
    policy = AutoModelForCausalLM.from_pretrained(
        base or model, dtype=dtype, trust_remote_code=trust_remote_code, device_map=device_map
    ).eval()
    return PeftModel.from_pretrained(policy, model).merge_and_unload() if base else policy


def text_config(model: str, trust_remote_code: bool = False) -> Any:
    """Load the text configuration of a model or of an adapter's base, which has the number of positions."""
    base = adapter_base(model) or model
    return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).get_text_config()


def end_tokens(model: str, tokenizer: Any) -> list[int]:
    """Collect the tokens that end an answer: the tokenizer's and those of the model's generation configuration."""
    try:
        ends = GenerationConfig.from_pretrained(adapter_base(model) or model).eos_token_id
    except OSError:  # the model has no generation configuration
        ends = None
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None})


def to_answer(ids: list[int], tokenizer: Any, ends: list[int]) -> Answer:
    """Make an answer of token ids, ignoring the padding after its end token."""
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:length], skip_special_tokens=True)
    return Answer(text, len(ids) if length is None else length, truncated=length is None)


def transformers_sampler(model: str, tokenizer: Any, dtype: str = "auto", trust_remote_code: bool = False) -> Sampler:
    """Return a sampler that uses transformers' `generate`.

    A batch uses only the seed of its first prompt, so the answers depend on how prompts are grouped into batches.
    """
    policy: Any = load_model(model, dtype, trust_remote_code)
    ends = end_tokens(model, tokenizer)
    # The model's own configuration would set what is not passed, such as Qwen3's top_k = 20.
    policy.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)

    @torch.no_grad()
    def sample(prompts, seeds, sampling):
        inputs = tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(policy.device)
        distribution = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        torch.manual_seed(seeds[0])
        output = policy.generate(
            **inputs,  # input_ids and attention_mask, (B, T)
            max_new_tokens=sampling.max_completion_length,
            **(distribution if sampling.temperature else {"do_sample": False}),
        )
        answers = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [to_answer(ids, tokenizer, ends) for ids in answers]

    return sample


def vllm_sampler(
    model: str, tokenizer: Any, dtype: str = "auto", trust_remote_code: bool = False, **engine: Any
) -> Sampler:
    """Return a sampler that uses a vLLM engine in this process.

    Each prompt has its own seed, so batches do not matter. An adapter is merged into a temporary copy of its base.
    `engine` holds further arguments of `vllm.LLM`.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ValueError("--backend vllm: vLLM is not installed; pip install 'tic-grpo-trl[vllm]'") from error

    if dtype == "auto":  # vLLM's "auto" would turn float32 into float16
        dtype = str(text_config(model, trust_remote_code).dtype or "bfloat16").removeprefix("torch.")
    ends = end_tokens(model, tokenizer)
    with tempfile.TemporaryDirectory(prefix="merged-") as merged:
        folder = model
        if adapter_base(model):
            folder = merged
            load_model(model, dtype, trust_remote_code).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            torch.cuda.empty_cache()  # for the engine
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
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [output.outputs[0] for output in llm.generate(inputs, params, use_tqdm=False)]
        return [to_answer(list(output.token_ids), tokenizer, ends) for output in outputs]

    return sample
