"""`--dry_run`: what a run will do and need, from its settings alone, before anything is loaded or computed."""

import argparse
import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, Qwen3Config

from ..config import TICGRPOConfig
from ..rollout.schedule import RolloutSchedule
from ..validation.batch_sizes import check_batches, check_length, check_prompts
from .memory import ModelSize, activation_bytes, model_size, state_bytes
from .topology import Topology


GB = 1e9
# Of the recipes' models, for machines that reach no hub (from their config.json)
_QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960}
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    name: {**_QWEN3, **dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers"), sizes, strict=True)), **rest}
    for name, sizes, rest in (
        ("Qwen/Qwen3-0.6B", (1024, 3072, 28), {"num_attention_heads": 16, "tie_word_embeddings": True}),
        ("Qwen/Qwen3-1.7B", (2048, 6144, 28), {"num_attention_heads": 16, "tie_word_embeddings": True}),
        ("Qwen/Qwen3-4B", (2560, 9728, 36), {"num_attention_heads": 32, "tie_word_embeddings": True}),
        ("Qwen/Qwen3-8B", (4096, 12288, 36), {"num_attention_heads": 32, "tie_word_embeddings": False}),
    )
}


class PlannedConfig(TICGRPOConfig):
    """Settings of a run on machines that need not be here: no process group, no GPU, as many processes as planned."""

    topology = Topology()

    def __post_init__(self):
        check_batches(self, self.topology.processes)
        self.planned_bf16 = self.bf16 if self.bf16 is not None else not self.fp16
        self.use_cpu, self.bf16 = True, False
        super().__post_init__()

    @property
    def world_size(self) -> int:
        return self.topology.processes


def plan_for(argv: Sequence[str], environ: MutableMapping[str, str]) -> type[PlannedConfig] | None:
    """What `--dry_run` reads its settings with.

    Args:
        argv: the script's flags; `--accelerate_config FILE` and `--num_processes N` name a topology, otherwise it is
            the one that `accelerate launch` set up.
        environ: the environment. What `accelerate launch` put there is taken out, so that nothing is started.

    Returns:
        The config class; `None` in all processes but the first.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--num_processes", type=int)
    flags, _ = parser.parse_known_args(argv)
    if flags.accelerate_config:
        topology = Topology.from_file(flags.accelerate_config, flags.num_processes)
    else:
        topology = Topology.from_environment(environ)
        if flags.num_processes:
            topology = Topology(flags.num_processes, f"{flags.num_processes} processes")
    speaks = environ.get("RANK", "0") == "0"
    for name in [name for name in environ if name.startswith("ACCELERATE_")]:
        del environ[name]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        environ.pop(name, None)
    return type("PlannedTopology", (PlannedConfig,), {"topology": topology}) if speaks else None


def load_model_config(name: str, trust_remote_code: bool = False) -> tuple[PretrainedConfig, str]:
    """A model's configuration, and where it is from.

    Args:
        name: folder or hub id.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: if there is no such model, it needs code that may not run, or no hub can be reached and it is none
            of `KNOWN_MODELS`.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code), ""
    except OSError as error:
        if name not in KNOWN_MODELS:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"model_name_or_path {name}: its config.json cannot be read ({reason}). Give a local folder; without a "
                f"hub only the sizes of {', '.join(KNOWN_MODELS)} are known."
            ) from error
        return Qwen3Config(**KNOWN_MODELS[name]), "the hub cannot be reached: sizes as published"


@dataclass(frozen=True)
class Plan:
    """A run that has not begun.

    Attributes:
        args: its settings, read by the class that `plan_for` returns.
        model: the model's configuration, `note` where it is from.
        peft_config: the adapter to train, `None` for all weights.
        weight_dtype: in which weights are loaded.
        num_prompts: prompts of the training data, `None` where it could not be read.
        longest_prompt: in tokens, `None` where it is not known.
        eval_prompts: prompts of an evaluation, `None` without one.
        gpu_memory: bytes of each GPU, `None` where it is not known.
    """

    args: Any
    model: PretrainedConfig
    note: str = ""
    peft_config: Any = None
    weight_dtype: torch.dtype = torch.float32
    num_prompts: int | None = None
    longest_prompt: int | None = None
    eval_prompts: int | None = None
    gpu_memory: float | None = None

    def __post_init__(self):
        args = self.args
        check_length(args, self.longest_prompt)
        if self.num_prompts is not None:
            check_prompts(self.batches, self.num_prompts)
        self.check_engine()
        self.check_memory()

    @cached_property
    def batches(self) -> RolloutSchedule:
        """How many responses go where."""
        return check_batches(self.args, self.args.topology.processes)

    @cached_property
    def size(self) -> ModelSize:
        """Sizes of the model as it is computed with."""
        topology, bf16 = self.args.topology, self.args.planned_bf16
        if bf16 and (topology.zero_stage or topology.fsdp):  # weights are bf16 where they are computed with
            return model_size(self.model, torch.bfloat16, False, self.peft_config)
        return model_size(self.model, self.weight_dtype, self.autocast, self.peft_config)

    @property
    def autocast(self) -> bool:
        """Whether bfloat16 is computed on float32 weights, which neither DeepSpeed nor FSDP2 do."""
        topology = self.args.topology
        split = topology.zero_stage or topology.fsdp
        return bool(self.args.planned_bf16 and not split and self.weight_dtype == torch.float32)

    @property
    def longest_row(self) -> int:
        """Tokens of a prompt and a response of full length."""
        return (self.longest_prompt or 0) + self.args.max_completion_length

    @property
    def states(self) -> dict[str, float]:
        """Bytes of weights, gradients and Adam's states of one process: on its GPU, or with offload beside it."""
        args = self.args
        reference = bool(args.beta) and self.peft_config is None
        return state_bytes(self.size, args.topology, self.weight_dtype.itemsize, args.planned_bf16, reference)

    def memory(self, rows: int | None = None) -> dict[str, float]:
        """Bytes of one process while it updates, by what they are for.

        Args:
            rows: `per_device_train_batch_size`, the setting's where it is left out.
        """
        args = self.args
        tokens = (rows or self.batches.per_device_train_batch_size) * self.longest_row
        parts = {} if args.topology.offload else self.states
        checkpointing = bool(args.gradient_checkpointing)
        parts["activations"] = float(activation_bytes(self.size, tokens, checkpointing, self.autocast))
        if self.has_engine and self.gpu_memory and not args.vllm_enable_sleep_mode:
            parts["vLLM"] = args.vllm_gpu_memory_utilization * self.gpu_memory
        return parts

    @property
    def has_engine(self) -> bool:
        """Whether vLLM runs in the training processes."""
        return bool(self.args.use_vllm) and self.args.vllm_mode == "colocate"

    def check_memory(self):
        """Refuses what does not fit into a GPU.

        Raises:
            ValueError: with the nearest `per_device_train_batch_size` that fits at the same batches.
        """
        if self.gpu_memory is None or sum(self.memory().values()) <= self.gpu_memory:
            return
        batches = self.batches
        parts = ", ".join(f"{name} {value / GB:.1f}" for name, value in self.memory().items())
        rows = batches.per_device_train_batch_size
        fitting = [
            n for n in range(rows - 1, 0, -1) if rows % n == 0 and sum(self.memory(n).values()) <= self.gpu_memory
        ]
        if fitting:
            factor = rows // fitting[0]
            nearest = (
                f"per_device_train_batch_size {fitting[0]} with gradient_accumulation_steps "
                f"{batches.gradient_accumulation_steps * factor} and steps_per_generation "
                f"{batches.steps_per_generation * factor}"
            )
        else:
            nearest = "a topology that splits more (see accelerate_configs/), a smaller vllm_gpu_memory_utilization"
            nearest += ", or LoRA" if self.peft_config is None else ", or shorter rows"
        raise ValueError(
            f"The run needs {sum(self.memory().values()) / GB:.1f} GB of each GPU, which has "
            f"{self.gpu_memory / GB:.0f}: {parts}. Nearest: {nearest}."
        )

    def lines(self) -> list[tuple[str, str]]:
        """What `--dry_run` prints: names and texts."""
        args, b, topology = self.args, self.batches, self.args.topology
        whole = b.updates.is_integer()
        prompts = b.update_responses / b.num_generations
        updates = f"K = {b.updates:g} of {b.update_responses:,} responses ({prompts:g} prompts)"
        if not whole:
            updates += ": some span two rollouts; make steps_per_generation a multiple of gradient_accumulation_steps"
        elif b.update_responses % b.num_generations:
            updates += ": groups are split between them"
        elif b.updates == 1:
            updates += ": on-policy, every ratio is 1"
        shown = [
            ("topology", f"{topology.name}: {b.processes} process{'es' * (b.processes > 1)}, {topology.kind}"),
            ("model", self._model_line()),
            ("rollout", f"{b.prompts:,} prompts x {b.num_generations} responses = {b.responses:,} responses"),
            (
                "updates",
                f"{updates}, each in at most {b.gradient_accumulation_steps} passes of "
                f"{b.per_device_train_batch_size} full rows on each process",
            ),
        ]
        row = f"{self.longest_prompt or 0:,} + {args.max_completion_length:,}"
        update, rollout = (_count(n * self.longest_row) for n in (b.update_responses, b.responses))
        shown += [
            ("run", self._run_line()),
            ("tokens", f"at most {b.update_responses:,} x ({row}) = {update} an update, {rollout} a rollout"),
        ]
        if self.eval_prompts:
            group = args.num_generations_eval or b.num_generations
            responses = self.eval_prompts * group
            shown.append(("evaluation", f"{self.eval_prompts:,} prompts x {group} = {responses:,} responses"))
        return shown + self._memory_lines()

    def _model_line(self) -> str:
        size = self.size
        trained = f"{_count(size.trained)} parameters"
        if size.frozen:
            trained = f"{_count(size.trained)} of {_count(size.trained + size.frozen)} parameters are trained"
        return f"{trained}, {size.layers} layers" + (f" ({self.note})" if self.note else "")

    def _run_line(self) -> str:
        args, b = self.args, self.batches
        if self.num_prompts is None:
            epoch = "the epoch's length is not known without the data"
            total = f"{args.max_steps:,} updates, " if args.max_steps > 0 else ""
            return total + epoch
        rollouts, updates = self.num_prompts // b.prompts, b.updates_in(self.num_prompts)
        left = self.num_prompts - rollouts * b.prompts
        epoch = f"an epoch of {self.num_prompts:,} prompts is {rollouts:,} rollouts = {updates:,} updates"
        epoch += f", {left:,} prompts left over" if left else ""
        total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
        return f"{total:,} updates; {epoch}"

    def _memory_lines(self) -> list[tuple[str, str]]:
        args, b = self.args, self.batches
        checkpointing = "gradient checkpointing" if args.gradient_checkpointing else "no gradient checkpointing"
        details = {
            "activations": f"a pass of {b.per_device_train_batch_size} x {self.longest_row:,} tokens, {checkpointing}",
            "vLLM": self._engine_line(),
        }
        parts = self.memory()
        lines = [(name, f"{_gb(value)}  {details.get(name, '')}".rstrip()) for name, value in parts.items()]
        total = _gb(sum(parts.values())) + (f"  of {self.gpu_memory / GB:.0f} GB" if self.gpu_memory else "")
        shown = [("memory", "of each process, beside the context and buffers of CUDA, NCCL and DeepSpeed"), *lines]
        shown += [("sum", total)]
        if self.has_engine and "vLLM" not in parts:
            when = " while it generates" if args.vllm_enable_sleep_mode else ""
            engine = f"{args.vllm_gpu_memory_utilization:g} of the GPU{when}  {self._engine_line()}".rstrip()
            shown.append(("vLLM", engine))
        if args.topology.offload:
            shown.append(("machine", f"{_gb(sum(self.states.values()))}  of the machine's memory for each process"))
        return shown

    def _cache_tokens(self) -> tuple[float, int, float]:
        """Bytes of the engine's weights, tokens that its cache holds beside them, bytes of one of these."""
        args, size = self.args, self.size
        weights = 2 * (size.trained + size.frozen) / args.vllm_tensor_parallel_size
        token = 2 * size.cache / args.vllm_tensor_parallel_size
        share = args.vllm_gpu_memory_utilization * (self.gpu_memory or 0)
        return weights, max(0, int((share - weights) / token)), token

    def check_engine(self):
        """Refuses a share of the GPU in which vLLM cannot generate one full row.

        Raises:
            ValueError: with the nearest `vllm_gpu_memory_utilization`.
        """
        if not self.has_engine or not self.gpu_memory:
            return
        weights, tokens, token = self._cache_tokens()
        if tokens < self.longest_row:
            share = self.args.vllm_gpu_memory_utilization
            least = math.ceil(100 * (weights + token * self.longest_row) / self.gpu_memory) / 100
            raise ValueError(
                f"vllm_gpu_memory_utilization {share:g} of {self.gpu_memory / GB:.0f} GB "
                f"holds weights of {weights / GB:.1f} GB and {tokens:,} tokens, a full row has {self.longest_row:,}. "
                f"Nearest: vllm_gpu_memory_utilization {least:g}."
            )

    def _engine_line(self) -> str:
        if not self.gpu_memory:
            return ""
        weights, tokens, _ = self._cache_tokens()
        rows = tokens // self.longest_row
        return f"bf16 weights {weights / GB:.1f}, cache for {_count(tokens)} tokens ({rows} full rows)"


def _gb(value: float) -> str:
    for unit, name in ((GB, "GB"), (1e6, "MB")):
        if value >= 0.05 * unit:
            return f"{value / unit:6.1f} {name}"
    return f"{value / 1e3:6.1f} kB"


def _count(value: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"
