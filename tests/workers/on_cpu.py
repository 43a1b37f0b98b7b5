"""What workers of several tests need: GPU topologies on the CPU, and values of all processes."""

import importlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


DEEPSPEED, FSDP = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("DEEPSPEED", "FSDP"))


def of_all_ranks(value):
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def without_compiler():
    """DeepSpeed would compile an operator that only its inference uses."""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def fsdp_on_cpu():
    """accelerate takes FSDP for more than one GPU only, and runs DDP on CPU without a word."""
    start = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None or hasattr(self, "fsdp_plugin"):  # later instances share the first one's state
            self.fsdp_plugin = fsdp_plugin or self.fsdp_plugin
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def end_when_waiting_in_vain():
    """transformers heeds --ddp_timeout on accelerators only, and DeepSpeed's own groups never do."""
    seconds = int(os.environ.get("GROUP_TIMEOUT", "60"))
    torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=seconds)


def prepare():
    """To be called before any training arguments are made."""
    end_when_waiting_in_vain()
    if DEEPSPEED:
        without_compiler()
    if FSDP:
        fsdp_on_cpu()


def split_every_parameter(args):
    """ZeRO-3 keeps small parameters whole on every process: in a small model all of them, and nothing is gathered."""
    if args.deepspeed_plugin is not None:
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def whole(parameter) -> bool:
    """Whether this process holds all of a parameter."""
    if hasattr(parameter, "to_local"):  # FSDP2
        return parameter.to_local().numel() == parameter.numel()
    return getattr(parameter, "ds_persist", True)  # ZeRO-3 marks what it splits with False


def describe(trainer) -> dict:
    """How this trainer is distributed."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "zero_stage": plugin.zero_stage if plugin else None,
        "whole": of_all_ranks([name for name, parameter in trainer.model.named_parameters() if whole(parameter)]),
        "parameters": sorted({type(parameter).__name__ for parameter in trainer.model.parameters()}),
    }
