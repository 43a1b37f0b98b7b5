"""Settings of an evaluation, and the papers' protocol for each data set."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ..data import GENERATED_SETS
from ..data.sources import BUILDERS
from ..starter import TASKS
from .sampling import Sampling


@dataclass(frozen=True)
class Protocol:
    """How to evaluate a set: `k` samples of each problem, drawn as `sampling` says."""

    k: int
    sampling: Sampling


# v5, appendix C.1: k, temperature, top-p; responses of at most 18,000 tokens, as in training
GREEDY = (1, 0.0, 1.0)
PAPER = {"aime24": (32, 1.0, 1.0), "aime25": (32, 1.0, 1.0), "math500": GREEDY, "livecodebench": GREEDY}
PAPER_LENGTH = 18_000
GENERATED = (4, 1.0, 1.0)
LENGTHS = {"few_shot_sums": 48} | {name: task.max_completion_length for name, task in TASKS.items()}


@dataclass
class EvaluationConfig:
    """Configure an evaluation. The help text of each field describes it."""

    model_name_or_path: str = field(
        default="", metadata={"help": "Model folder, hub id or LoRA adapter. Default: the starter's for the sets."}
    )
    datasets: list[str] = field(
        default_factory=lambda: ["starter"],
        metadata={"help": "Sets of load_problems: aime24, math500@copies/math500.parquet, or your own files."},
    )
    name: str = field(default="", metadata={"help": "Name of the row in the table. Default: the model's name."})
    k: int | None = field(default=None, metadata={"help": "Samples per problem. Default: the set's protocol."})
    temperature: float | None = field(default=None, metadata={"help": "0 is greedy. Default: the set's protocol."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus threshold. Default: the set's protocol."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Longest answer in tokens."})
    split: str | None = field(
        default=None, metadata={"help": "Split of your own data. Default: test, or the only one."}
    )
    dataset_columns: list[str] | None = field(
        default=None, metadata={"help": "New names of your own data's columns: prompt=question solution=answer."}
    )
    instruction: str | None = field(
        default=None,
        metadata={"help": "Template with {problem} around string prompts. Default: the papers' for named sets only."},
    )
    limit: int | None = field(default=None, metadata={"help": "Use only this many problems of each set."})
    reward_func: str | None = field(default=None, metadata={"help": "Import path of a reward function from 0 to 1."})
    backend: Literal["auto", "vllm", "transformers"] = field(
        default="auto", metadata={"help": "auto uses vLLM if it is installed and a GPU is available."}
    )
    batch_size: int = field(default=0, metadata={"help": "Samples per saved batch. Default: 64, with vLLM 1024."})
    seed: int = field(default=0, metadata={"help": "Random seed of all samples."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights. auto: as in the checkpoint."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code that comes with the model to run."})
    enable_thinking: bool | None = field(default=None, metadata={"help": "Argument of chat templates such as Qwen3's."})
    output_dir: str = field(default="", metadata={"help": "Run folder. Default: runs/evaluation/NAME."})
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of GPU memory for vLLM."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "Number of GPUs that share the model."})
    vllm_max_model_len: int | None = field(default=None, metadata={"help": "Longest prompt plus answer, in tokens."})

    def __post_init__(self):
        if self.backend == "auto":
            has_vllm = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()
            self.backend = "vllm" if has_vllm else "transformers"
        self.batch_size = self.batch_size or (1024 if self.backend == "vllm" else 64)
        self.model_name_or_path = self.model_name_or_path or default_model(self.datasets)
        if not self.name:
            path = Path(self.model_name_or_path)
            tasks = {known.model: task for task, known in TASKS.items()}
            self.name = tasks.get(self.model_name_or_path) or path.name or str(path)
        self.output_dir = self.output_dir or str(Path("runs/evaluation", self.name))
        for name in ("k", "limit", "batch_size", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: give at least 1")
        if not self.datasets or len(set(map(set_name, self.datasets))) < len(self.datasets):
            raise ValueError(f"--datasets {' '.join(self.datasets)}: give at least one set, and each set once")
        for name in self.datasets:
            self.protocol(set_name(name))

    def protocol(self, name: str) -> Protocol:
        """Return the protocol of a set: the papers', unless a flag overrides it."""
        k, temperature, top_p = GENERATED if name in GENERATED_SETS else PAPER.get(name, GREEDY)
        temperature = temperature if self.temperature is None else self.temperature
        k = self.k or k
        top_p = top_p if self.top_p is None else self.top_p
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"--temperature {temperature} --top_p {top_p}: temperature must be 0 or more, top_p in (0, 1]"
            )
        if temperature == 0 and k > 1:
            raise ValueError(
                f"{name}: k = {k} greedy samples (temperature 0) are all the same: give --temperature 1, or --k 1"
            )
        if temperature == 0 and self.top_p not in (None, 1):
            raise ValueError(f"{name}: --top_p {self.top_p} has no effect at temperature 0: remove it")
        length = self.max_completion_length or LENGTHS.get(name, PAPER_LENGTH)
        return Protocol(k, Sampling(temperature, top_p, length))


def default_model(datasets: Sequence[str]) -> str:
    """Return the starter's model for the task among the sets, or that for `starter` if there is none.

    Raises:
        ValueError: if the sets are of more than one task.
    """
    tasks = [*dict.fromkeys(name for name in datasets if name in TASKS)]
    if len(tasks) > 1:
        raise ValueError(
            f"--datasets {' '.join(datasets)}: {' and '.join(tasks)} have a model each; give only one of them, or "
            "--model_name_or_path."
        )
    return TASKS[tasks[0] if tasks else "starter"].model


def set_name(dataset: str) -> str:
    """Return the name of a set in the results: the part before `@`, or the name of a file or folder."""
    name, at, _ = dataset.partition("@")
    path = Path(dataset)
    return name if at else path.stem if path.suffix in BUILDERS else path.name
