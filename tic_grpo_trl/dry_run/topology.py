"""Describe how a run is spread over processes, as accelerate's configuration says."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Topology:
    """Store the number of training processes and what they shard."""

    processes: int = 1  # one per GPU
    name: str = ""  # the file's, or "as launched"
    zero_stage: int = 0  # of DeepSpeed, 0 without it
    fsdp: bool = False  # PyTorch's FSDP2 shards weights, gradients and optimizer states
    offload: bool = False  # DeepSpeed keeps its shards in the machine's memory

    @property
    def kind(self) -> str:
        if self.zero_stage:
            return f"DeepSpeed ZeRO-{self.zero_stage}" + " with offload" * self.offload
        if self.fsdp:
            return "FSDP2"
        return "DDP" if self.processes > 1 else "nothing is sharded"

    @classmethod
    def of(cls, processes: int | str) -> "Topology":
        """Describe processes of which nothing more is known.

        Raises:
            ValueError: if `processes` is not a whole number, 1 or more.
        """
        return cls(_whole(processes))

    @classmethod
    def from_file(cls, path: str | Path, processes: int | str | None = None) -> "Topology":
        """Read a file of `accelerate config`; `processes` overrides its `num_processes`.

        Raises:
            ValueError: if accelerate did not write this file or would start one process where several are wanted, or if
                the number of processes is not a whole number, 1 or more.
        """
        try:
            config: Any = yaml.safe_load(Path(path).read_text())
            kind = str(config["distributed_type"])
        except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
            raise ValueError(
                f"--accelerate_config {path}: not a file of accelerate. Give one of accelerate_configs/*.yaml, or a "
                "file that `accelerate config` wrote."
            ) from error
        own = config.get("num_processes")
        count = _whole(processes if processes is not None else own if own is not None else 1)
        if kind in ("NO", "False") and count > 1:
            raise ValueError(
                f"--accelerate_config {Path(path).stem} starts one process, but num_processes is {count}: choose "
                "one for several GPUs, such as multi_gpu, zero2, zero3 or fsdp2."
            )
        deepspeed = config.get("deepspeed_config") or {} if kind == "DEEPSPEED" else {}
        return cls(
            processes=count,
            name=Path(path).name,
            zero_stage=int(deepspeed.get("zero_stage", 0)),
            fsdp=kind == "FSDP",
            offload=deepspeed.get("offload_param_device", "none") not in ("none", None),
        )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Topology":
        """Read what `accelerate launch` set up for this process; without it, one process."""
        deepspeed = environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        return cls(
            processes=int(environ.get("WORLD_SIZE", "1")),
            name="as launched",
            zero_stage=int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")) if deepspeed else 0,
            fsdp=environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
            offload=deepspeed and environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none",
        )


def _whole(processes: Any) -> int:
    """Return the number of processes as an integer, also of a text, which a flag is."""
    if isinstance(processes, bool) or not str(processes).isdecimal() or int(processes) < 1:
        raise ValueError(f"num_processes {processes}: give a whole number of processes, 1 or more.")
    return int(processes)
