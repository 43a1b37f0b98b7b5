"""The flags of the evaluation script, and each data set's settings in the papers."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ..data.sources import BUILDERS
from ..starter import STARTER_MODEL
from .sampling import Sampling


@dataclass(frozen=True)
class Protocol:
    """How a set is evaluated: k samples of each problem, at a temperature (0: greedily) and top-p."""

    k: int
    sampling: Sampling


GREEDY = (1, 0.0, 1.0)
# v5, appendix C.1: k, temperature, top-p; responses of at most 18,000 tokens, as in training
PAPER = {"aime24": (32, 1.0, 1.0), "aime25": (32, 1.0, 1.0), "math500": GREEDY, "livecodebench": GREEDY}
PAPER_LENGTH = 18_000
ARITHMETIC = (4, 1.0, 1.0)
OWN = {"starter": ARITHMETIC, "few_shot_sums": ARITHMETIC}
OWN_LENGTH = 48


@dataclass
class EvaluationConfig:
    """Settings of an evaluation.

    Args:
        model_name_or_path (`str`): model folder, hub id, or folder of a LoRA adapter.
        datasets (`list[str]`): sets of `load_problems`, NAME or NAME@LOCATION, or data of your own.
        name (`str`): the row's name in the table; the model's by default.
        k, temperature, top_p, max_completion_length (*optional*): of all sets, instead of each set's own.
        split (`str`, *optional*): of your own data; `test` by default, and a lone file's only one.
        limit (`int`, *optional*): only the first so many problems of each set; the starter makes as many as asked for.
        reward_func (`str`, *optional*): import path of a reward function from 0 to 1, instead of each set's own.
        backend (`str`): `vllm`, `transformers`, or `auto`: vLLM where it is installed and there is a GPU.
        batch_size (`int`): samples between two writes to disk; 0 for 64, with vLLM 1024.
        seed (`int`): decides all samples.
        dtype (`str`): of the weights; `auto` for the checkpoint's.
        trust_remote_code (`bool`): whether code that comes with the model may run.
        enable_thinking (`bool`, *optional*): passed on to the chat template, where it knows it (Qwen3).
        output_dir (`str`): run folder; `runs/evaluation/NAME` by default.
        vllm_gpu_memory_utilization, vllm_tensor_parallel_size, vllm_max_model_len: of the engine.
    """

    model_name_or_path: str = field(default=STARTER_MODEL, metadata={"help": "Model folder, hub id or LoRA adapter."})
    datasets: list[str] = field(
        default_factory=lambda: ["starter"],
        metadata={"help": "Sets such as aime24 math500@copies/math500.parquet starter, or files of your own."},
    )
    name: str = field(default="", metadata={"help": "The row's name in the table. Default: the model's."})
    k: int | None = field(default=None, metadata={"help": "Samples per problem. Default: each set's own."})
    temperature: float | None = field(default=None, metadata={"help": "0 is greedy. Default: each set's own."})
    top_p: float | None = field(default=None, metadata={"help": "Default: each set's own."})
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Longest answer in tokens. Default: each set's own."}
    )
    split: str | None = field(default=None, metadata={"help": "Of your own data. Default: test; a lone file's own."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many problems of each set."})
    reward_func: str | None = field(
        default=None, metadata={"help": "Import path of a reward function. Default: each set's own."}
    )
    backend: Literal["auto", "vllm", "transformers"] = field(
        default="auto", metadata={"help": "auto: vllm where it is installed and there is a GPU."}
    )
    batch_size: int = field(default=0, metadata={"help": "Samples between two writes to disk. 0: 64, with vllm 1024."})
    seed: int = field(default=0, metadata={"help": "Decides all samples."})
    dtype: str = field(default="auto", metadata={"help": "bfloat16, float32, ... auto: the checkpoint's."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    enable_thinking: bool | None = field(
        default=None, metadata={"help": "Passed to the chat template, for models such as Qwen3."}
    )
    output_dir: str = field(default="", metadata={"help": "Run folder. Default: runs/evaluation/NAME."})
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of a GPU's memory for vLLM."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that vLLM spreads the model over."})
    vllm_max_model_len: int | None = field(
        default=None, metadata={"help": "Longest prompt and answer for vLLM. Default: the model's positions."}
    )

    def __post_init__(self):
        if self.backend == "auto":
            here = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()
            self.backend = "vllm" if here else "transformers"
        if not self.batch_size:
            self.batch_size = 1024 if self.backend == "vllm" else 64
        if not self.name:
            path = Path(self.model_name_or_path)
            self.name = "starter" if self.model_name_or_path == STARTER_MODEL else path.name or str(path)
        if not self.output_dir:
            self.output_dir = str(Path("runs/evaluation", self.name))
        for option in ("k", "limit", "batch_size", "max_completion_length"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"--{option} {value}: give at least 1")
        if not self.datasets or len(set(map(set_name, self.datasets))) < len(self.datasets):
            raise ValueError(f"--datasets {' '.join(self.datasets)}: give each set once, and at least one")
        for name in self.datasets:
            self.protocol(set_name(name))

    def protocol(self, name: str) -> Protocol:
        """How a set is evaluated: as in the papers, but for what the flags say.

        Raises:
            ValueError: for several greedy samples, which would be equal, and values out of range.
        """
        k, temperature, top_p = PAPER.get(name) or OWN.get(name) or GREEDY
        if self.temperature is not None:
            temperature = self.temperature
        k = self.k or k
        top_p = top_p if self.top_p is None else self.top_p
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"--temperature {temperature} --top_p {top_p}: give 0 or more, and more than 0 to 1")
        if temperature == 0 and k > 1:
            raise ValueError(
                f"{name}: k = {k} greedy samples (temperature 0) are all the same: give --temperature 1, or --k 1"
            )
        if temperature == 0 and self.top_p not in (None, 1):
            raise ValueError(f"{name}: --top_p {self.top_p} means nothing at temperature 0: leave it out")
        length = self.max_completion_length or (OWN_LENGTH if name in OWN else PAPER_LENGTH)
        return Protocol(k, Sampling(temperature, top_p, length))


def set_name(dataset: str) -> str:
    """The name that a set goes by in the results: what is before `@`, or a file's or folder's own name."""
    name, at, _ = dataset.partition("@")
    path = Path(dataset)
    return name if at else path.stem if path.suffix in BUILDERS else path.name
