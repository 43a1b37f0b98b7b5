"""Plan a run for `tic-grpo dry-run`: batches, updates and memory from the settings alone, before anything is loaded."""

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from ..config import TICGRPOConfig
from ..rollout.schedule import RolloutSchedule
from ..validation.batch_sizes import check_batches, check_length, check_prompts, counted, derive_batches
from ..validation.model_path import check_model, missing_model
from .memory import ModelSize, activation_bytes, model_size, state_bytes
from .topology import Topology


GB = 1e9


class PlannedConfig(TICGRPOConfig):
    """Read the settings of a run on other machines: no process group, no GPU, the number of processes as planned."""

    topology = Topology()
    recipe_batches: ClassVar[RolloutSchedule | None] = None  # what the recipe says, on its own topology

    def __post_init__(self):
        self.planned_bf16 = self.bf16 if self.bf16 is not None else not self.fp16
        self.use_cpu, self.bf16 = True, False
        super().__post_init__()

    @property
    def world_size(self) -> int:
        return self.topology.processes


def plan_for(
    accelerate_config: str | None,
    num_processes: int | None,
    environ: MutableMapping[str, str],
    recipe: Mapping[str, Any] | None = None,
) -> type[PlannedConfig] | None:
    """Return the config class that reads the settings of a dry run, or `None` in all processes but the first.

    Args:
        accelerate_config: file that the flag names.
        num_processes: of the flag.
        environ: where `accelerate launch` describes the topology, which counts unless a flag names another. The
            description is removed, so that nothing is started.
        recipe: contents of the file of `--config`. Its `accelerate_config`, as a path, and `num_processes` count if
            neither a flag nor the launcher says otherwise.

    Raises:
        ValueError: if a topology's file is not one of accelerate, or starts only one of several processes, or if a
            number of processes is not a whole number, 1 or more.
    """
    recipe = recipe or {}
    own_file, own_processes = recipe.get("accelerate_config"), recipe.get("num_processes")
    wanted = own_processes if num_processes is None else num_processes
    own = None
    if accelerate_config:
        topology = Topology.from_file(accelerate_config, num_processes)
    elif "WORLD_SIZE" in environ or "ACCELERATE_MIXED_PRECISION" in environ:
        topology = Topology.from_environment(environ)
        if num_processes is not None:
            topology = replace(topology, processes=Topology.of(num_processes).processes)
    elif own_file:
        topology = Topology.from_file(own_file, wanted)
    else:
        topology = Topology.of(1 if wanted is None else wanted)
    if own_file:
        own = Topology.from_file(own_file, own_processes)
    elif own_processes is not None:
        own = Topology.of(own_processes)
    is_first = environ.get("RANK", "0") == "0"
    for name in list(environ):
        if name.startswith("ACCELERATE_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del environ[name]
    members = {"topology": topology, "recipe_batches": _recipe_batches(recipe, (own or topology).processes)}
    return type("PlannedTopology", (PlannedConfig,), members) if is_first else None


def _recipe_batches(recipe: Mapping[str, Any], processes: int) -> RolloutSchedule | None:
    """Return the batches of a recipe without flags; without a recipe, or if it needs a flag, `None`."""
    if not recipe:
        return None
    settings = SimpleNamespace(**{field.name: field.default for field in fields(TICGRPOConfig)} | dict(recipe))
    settings.world_size = processes
    try:
        derive_batches(settings)
        return RolloutSchedule.of(settings, processes)
    except (ValueError, TypeError):
        return None


def load_model_config(
    name: str, trust_remote_code: bool = False, command: str | None = None, revision: str | None = None
) -> tuple[PretrainedConfig | None, str]:
    """Load the configuration of a folder or hub id, or return `None` and why the plan goes without it.

    The plan goes without it if `command`, the recipe's `model_command`, makes the folder first, or if the hub cannot be
    reached.

    Raises:
        ValueError: if there is no such model, or its `config.json` is missing or wrong.
    """
    if command is not None and (missing := missing_model(name, command)):
        return None, f"memory not estimated: {missing}"
    try:
        return check_model(name, revision, trust_remote_code), ""
    except ConnectionError as error:
        return None, f"memory not estimated: {error}"


@dataclass(frozen=True)
class Plan:
    """Describe a run that has not started, or refuse it if data or memory don't suffice."""

    args: Any  # read by the class that `plan_for` returns
    model: Any  # the model's configuration; without it, memory is not estimated
    note: str = ""  # why there is no configuration
    peft_config: Any = None
    weight_dtype: torch.dtype = torch.float32  # of the loaded weights
    num_prompts: int | None = None  # in the training data
    longest_prompt: int | None = None  # tokens
    eval_prompts: int | None = None  # of an evaluation
    gpu_memory: float | None = None  # bytes of each GPU

    def __post_init__(self):
        check_length(self.args, self.longest_prompt)
        if self.num_prompts is not None:
            check_prompts(self.args, self.batches, self.num_prompts)
        if self.model is not None and self.gpu_memory:
            if self._has_engine:
                self._check_engine(self.gpu_memory)
            self._check_memory(self.gpu_memory)

    @cached_property
    def batches(self) -> RolloutSchedule:
        return check_batches(self.args, self.args.topology.processes)

    @cached_property
    def size(self) -> ModelSize:
        """The model's sizes, in the precision of the forward pass."""
        dtype = torch.bfloat16 if self.args.planned_bf16 and self._is_sharded else self.weight_dtype
        return model_size(self.model, dtype, self.autocast, self.peft_config)

    @property
    def autocast(self) -> bool:
        """Whether mixed precision computes in bfloat16 on float32 weights; DeepSpeed and FSDP2 have bf16 weights."""
        return bool(self.args.planned_bf16 and not self._is_sharded and self.weight_dtype == torch.float32)

    @property
    def longest_response(self) -> int:
        """Tokens of the longest prompt and a completion of full length."""
        return (self.longest_prompt or 0) + self.args.max_completion_length

    @property
    def _is_sharded(self) -> bool:
        return bool(self.args.topology.zero_stage or self.args.topology.fsdp)

    @property
    def _has_engine(self) -> bool:
        """Whether vLLM runs in the training processes."""
        return bool(self.args.use_vllm) and self.args.vllm_mode == "colocate"

    @property
    def _states(self) -> dict[str, float]:
        """Bytes of one process for weights, gradients and Adam's states; with offload in the machine's memory."""
        args = self.args
        reference = bool(args.beta) and self.peft_config is None
        return state_bytes(self.size, args.topology, self.weight_dtype.itemsize, args.planned_bf16, reference)

    def memory(self, batch_size: int | None = None) -> dict[str, float]:
        """Estimate the GPU memory of one process during an update: bytes by purpose."""
        args = self.args
        tokens = (batch_size or self.batches.per_device_train_batch_size) * self.longest_response
        parts = {} if args.topology.offload else self._states
        parts["activations"] = activation_bytes(self.size, tokens, bool(args.gradient_checkpointing), self.autocast)
        if self._has_engine and self.gpu_memory and not args.vllm_enable_sleep_mode:
            parts["vLLM"] = args.vllm_gpu_memory_utilization * self.gpu_memory
        return parts

    def _check_memory(self, gpu_memory: float):
        needed, b = self.memory(), self.batches
        if sum(needed.values()) <= gpu_memory:
            return
        size = b.per_device_train_batch_size
        smaller = [n for n in range(size - 1, 0, -1) if size % n == 0]
        if fits := next((n for n in smaller if sum(self.memory(n).values()) <= gpu_memory), None):
            window, steps = (n * size // fits for n in (b.gradient_accumulation_steps, b.steps_per_generation))
            follow = []
            if self.args.responses_per_update is None:
                follow.append(f"gradient_accumulation_steps {window}")
            if self.args.updates_per_rollout is None:
                follow.append(f"steps_per_generation {steps}")
            nearest = f"per_device_train_batch_size {fits}"
            if follow:
                nearest += f" with {' and '.join(follow)}"
        else:
            last = "LoRA" if self.peft_config is None else "a smaller max_completion_length"
            nearest = "a topology that shards more (see accelerate_configs/), a smaller vllm_gpu_memory_utilization, "
            nearest += f"or {last}"
        parts = ", ".join(f"{name} {value / GB:.1f}" for name, value in needed.items())
        raise ValueError(
            f"The run needs {sum(needed.values()) / GB:.1f} GB of each GPU, which has {gpu_memory / GB:.0f}: {parts}. "
            f"Nearest: {nearest}."
        )

    def _engine_cache(self, gpu_memory: float) -> tuple[float, int, float]:
        """Return the bytes of vLLM's bf16 weights, the tokens that fit beside them, and the bytes of a token."""
        args, size = self.args, self.size
        weights = 2 * (size.trained + size.frozen) / args.vllm_tensor_parallel_size
        token = 2 * size.cache / args.vllm_tensor_parallel_size
        return weights, max(0, int((args.vllm_gpu_memory_utilization * gpu_memory - weights) / token)), token

    def _check_engine(self, gpu_memory: float):
        weights, tokens, token = self._engine_cache(gpu_memory)
        if tokens < self.longest_response:
            least = math.ceil(100 * (weights + token * self.longest_response) / gpu_memory) / 100
            raise ValueError(
                f"vllm_gpu_memory_utilization {self.args.vllm_gpu_memory_utilization:g} of {gpu_memory / GB:.0f} GB "
                f"holds the weights, {weights / GB:.1f} GB, and {tokens:,} tokens, but a response of full length has "
                f"{self.longest_response:,}. Nearest: vllm_gpu_memory_utilization {least:g}."
            )

    def lines(self) -> list[tuple[str, str]]:
        """Describe the plan as labels and texts, which `tic-grpo dry-run` prints."""
        args, b, topology = self.args, self.batches, self.args.topology
        model, remark = self.note, ""
        if self.model is not None:
            trained, both, layers = self.size.trained, self.size.trained + self.size.frozen, self.size.layers
            of_all = f"of {_count(both)} parameters are trained" if both > trained else "parameters"
            model = f"{_count(trained)} {of_all}, {layers} layers"
        if b.updates % 1:
            remark = ": some span two rollouts; make steps_per_generation a multiple of gradient_accumulation_steps"
        elif b.update_responses % b.num_generations:
            remark = ": groups are split between them"
        elif b.updates == 1 and args.behaviour_policy == "trainer" and not args.max_carry_over:
            remark = ": on-policy, every ratio is 1"
        passes = counted(b.gradient_accumulation_steps, "pass")
        prompts = counted(b.update_responses / b.num_generations, "prompt")
        processes = f"{counted(b.processes, 'process')}, {topology.kind}"
        length = f"{self.longest_prompt or 0:,} + {args.max_completion_length:,}"
        update, rollout = (_count(n * self.longest_response) for n in (b.update_responses, b.responses))
        lines = [
            ("topology", f"{topology.name}: {processes}" if topology.name else processes),
            ("model", model),
            ("rollout", f"{counted(b.prompts, 'prompt')} x {b.num_generations} responses = {b.responses:,} responses"),
            (
                "updates",
                f"K = {b.updates:g} of {b.update_responses:,} responses ({prompts}){remark}, each in at most {passes} "
                f"of {b.per_device_train_batch_size} responses of full length on each process",
            ),
            ("run", self._run_line()),
            ("tokens", f"at most {b.update_responses:,} x ({length}) = {update} an update, {rollout} a rollout"),
        ]
        if args.max_carry_over:
            most = f"at most {counted(int(args.oversampling * b.prompts), 'prompt')} x {b.num_generations} responses, "
            late = f"each at most {counted(args.max_carry_over, 'rollout')} late"
            lines.insert(3, ("in flight", f"{most}{late}; the behaviour policy is the {args.behaviour_policy}"))
        if changed := self._batch_line():
            lines.insert(-2, ("batch", changed))
        if self.eval_prompts:
            lines.append(("evaluation", self._evaluation_line(self.eval_prompts)))
        return lines + (self._memory_lines() if self.model is not None else [])

    def _batch_line(self) -> str:
        """Describe where the batches differ from those of the recipe on its own topology."""
        ours, recipe, texts = self.batches, self.args.recipe_batches, []
        if recipe is None:
            return ""
        if ours.update_responses != recipe.update_responses:
            times, rest = divmod(ours.update_responses, recipe.update_responses)
            compared = " instead of" if rest else f", {times:,} times"
            texts.append(
                f"{ours.update_responses:,} responses per update{compared} the recipe's {recipe.update_responses:,}"
            )
        if ours.updates != recipe.updates:
            texts.append(f"K = {ours.updates:g} instead of the recipe's {recipe.updates:g}")
        return "; ".join(texts)

    def _evaluation_line(self, prompts: int) -> str:
        """Count the responses of an evaluation; several processes complete their last batches with repeated prompts."""
        args, b = self.args, self.batches
        group = args.num_generations_eval or b.num_generations
        responses, a_round = prompts * group, args.per_device_eval_batch_size * b.processes
        text = f"{counted(prompts, 'prompt')} x {group} = {responses:,} responses"
        generated = math.ceil(responses / a_round) * a_round
        if b.processes > 1 and generated > responses:
            text += f"; {generated:,} are generated, because the batches of {b.processes} processes x "
            text += f"{args.per_device_eval_batch_size} are filled up with repeats"
            if responses % math.lcm(b.processes, group) == 0 and a_round > responses:
                by_device = args.responses_per_eval_batch is None
                text += ". Set per_device_eval_batch_size to" if by_device else ". Set responses_per_eval_batch to"
                text += f" {responses // b.processes if by_device else responses}"
        return text

    def _run_line(self) -> str:
        args, b = self.args, self.batches
        if self.num_prompts is None:
            total = f"{counted(args.max_steps, 'update')}, " if args.max_steps > 0 else ""
            return total + "the length of an epoch is unknown without the data"
        (rollouts, left), updates = divmod(self.num_prompts, b.prompts), b.updates_in(self.num_prompts)
        total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
        epoch = f"an epoch of {counted(self.num_prompts, 'prompt')} is {counted(rollouts, 'rollout')}"
        epoch += f" = {counted(updates, 'update')}" + (f", {counted(left, 'prompt')} left over" if left else "")
        return f"{counted(total, 'update')}; {epoch}"

    def _memory_lines(self) -> list[tuple[str, str]]:
        args, b, parts = self.args, self.batches, self.memory()
        checkpointing = "gradient checkpointing" if args.gradient_checkpointing else "no gradient checkpointing"
        a_pass = f"a pass of {b.per_device_train_batch_size} x {self.longest_response:,} tokens, {checkpointing}"
        engine = ""
        if self._has_engine and self.gpu_memory:
            weights, tokens, _ = self._engine_cache(self.gpu_memory)
            engine = f"bf16 weights {weights / GB:.1f}, cache for {_count(tokens)} tokens "
            engine += f"({tokens // self.longest_response} responses of full length)"
        details = {"activations": a_pass, "vLLM": engine}
        of_gpu = f"  of {self.gpu_memory / GB:.0f} GB" if self.gpu_memory else ""
        lines = [
            ("memory", "of each process, without the context and buffers of CUDA, NCCL and DeepSpeed"),
            *((name, f"{_bytes(value)}  {details.get(name, '')}".rstrip()) for name, value in parts.items()),
            ("sum", _bytes(sum(parts.values())) + of_gpu),
        ]
        if self._has_engine and "vLLM" not in parts:
            when = " while it generates" if args.vllm_enable_sleep_mode else ""
            lines.append(("vLLM", f"{args.vllm_gpu_memory_utilization:g} of the GPU{when}  {engine}".rstrip()))
        if args.topology.offload:
            lines.append(("machine", f"{_bytes(sum(self._states.values()))}  of the machine's memory for each process"))
        return lines


def _bytes(value: float) -> str:
    unit, name = next(((n, name) for n, name in ((GB, "GB"), (1e6, "MB")) if value >= 0.05 * n), (1e3, "kB"))
    return f"{value / unit:6.1f} {name}"


def _count(value: float) -> str:
    unit, name = next(((n, name) for n, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if value >= n), (1, ""))
    return f"{value / unit:.3g}{name}"
