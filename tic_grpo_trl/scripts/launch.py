"""Start training through accelerate: `tic-grpo train`.

    tic-grpo train --config starter
    tic-grpo train --config my.yaml --accelerate_config zero3 --num_processes 8 --learning_rate 2e-6

`--accelerate_config` names a topology (`tic-grpo recipes` lists them) or a file. Without it, the recipe's key
`accelerate_config` counts, and then what this machine has: all its GPUs, or the CPU. SIGTERM and Ctrl-C reach the
training processes, and this command waits until they have saved a checkpoint.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..dry_run.topology import Topology
from .command_line import short_errors, split_flags
from .recipes import accelerate_config_path, read_yaml, recipe_path


TRAINING = "tic_grpo_trl.scripts.train"
# Flags of `accelerate launch` that depend on the machine; all others belong into an accelerate config file
LAUNCH_FLAGS = (
    "num_processes num_machines machine_rank main_process_ip main_process_port mixed_precision gpu_ids".split()
)
REPORTED = (2, 130, 143)  # exit statuses of processes that have said why: an error in the settings, or a signal


def split_command(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words after `tic-grpo train` into those for `accelerate launch` and those for the training script.

    Raises:
        ValueError: if a recipe or topology does not exist, or the topology has a single process and more are asked for.
    """
    rest, launch = split_flags(words, "config", "accelerate_config", *LAUNCH_FLAGS)
    config, topology = launch.pop("config", None), launch.pop("accelerate_config", None)
    recipe = read_yaml(recipe_path(config)) if config is not None else {}
    if topology is None:  # the recipe's own counts, with its number of processes
        topology = recipe.get("accelerate_config")
        launch = {"num_processes": str(recipe["num_processes"])} | launch if "num_processes" in recipe else launch
    processes = launch.get("num_processes")
    if processes is not None and not (processes.isdigit() and int(processes)):
        raise ValueError(f"--num_processes {processes}: give a whole number of processes, 1 or more.")
    topology, found = (topology, {}) if topology is not None else _topology_of_machine(processes)
    path = accelerate_config_path(topology)
    Topology.from_file(str(path), int(processes) if processes else None)  # refuses what cannot be
    flags = [word for name, value in (found | launch).items() for word in (f"--{name}", value)]
    return ["--config_file", str(path), *flags], [*(["--config", config] if config is not None else []), *rest]


def _topology_of_machine(processes: str | None) -> tuple[str, dict[str, str]]:
    """Choose a topology for so many processes, by default one per GPU, and the flags that complete it."""
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    wanted = int(processes or max(devices, 1))
    if wanted == 1:
        return ("single_gpu" if devices else "cpu"), {}
    return "multi_gpu", {"num_processes": str(wanted)} | ({} if devices else {"mixed_precision": "no"})


def run(launch: Callable[[], None]) -> int:
    """Launch processes, pass SIGTERM and SIGINT on to them, wait, and return their exit status."""

    def forward(signum: int, frame: Any):
        for child in psutil.Process().children():
            child.send_signal(signum)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        launch()
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def plan(words: Sequence[str]) -> None:
    """Print what the run would do and need, with the topology that it would have."""
    from . import train

    with short_errors():
        (_, path, *flags), rest = split_command(words)
        _, known = split_flags(flags, "num_processes")
    processes = ["--num_processes", known["num_processes"]] if known else []
    train.main(["--dry_run", "--accelerate_config", path, *processes, *rest])


def refuse(message: str):
    """Report what argparse finds wrong, without the usage of accelerate's hundred flags."""
    raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> None:
    """Launch the training processes, and exit with their status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help", "--help-all"} & {*words}:
        from . import train

        train.main(words)
        return
    if {"--dry_run", "--dry-run"} & {*words}:
        plan([word for word in words if word not in ("--dry_run", "--dry-run")])
        return
    with short_errors():
        launch_words, training_words = split_command(words)
        print(f"tic-grpo: accelerate launch {' '.join(launch_words)} -m {TRAINING} ...")  # the rest may hold a token
        parser = launch_command_parser()
        parser.error = refuse
        arguments = parser.parse_args([*launch_words, "-m", TRAINING, *training_words])
    arguments.signals_to_handle = "SIGHUP"  # torchrun would kill its workers 30 seconds after a signal
    # They repeat in 40 lines what the processes have said, and name defaults that are meant
    for name in ("torch.distributed", "accelerate.commands.launch"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if int(arguments.num_processes or 1) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, of which it warns
    status = run(lambda: launch_command(arguments))
    if status < 0:  # ended by a signal
        status = 128 - status
    if status not in (0, *REPORTED):
        by = f", which means {signal.Signals(status - 128).name}" if status > 128 else ""
        hint = " (often: out of memory)" if status == 128 + signal.SIGKILL else ""
        print(f"tic-grpo: training failed with the exit status {status}{by}{hint}.", file=sys.stderr)
    sys.exit(status)
