"""Start training through accelerate: `tic-grpo train`.

    tic-grpo train --config starter
    tic-grpo train --config my.yaml --accelerate_config zero3 --num_processes 8 --learning_rate 2e-6

`--accelerate_config` names a topology (`tic-grpo recipes` lists them) or a file. Without it, the recipe's key
`accelerate_config` counts, then the file of `accelerate config`, and then what this machine has: all its GPUs, or the
CPU. SIGTERM and Ctrl-C reach the training processes, and this command waits until they have saved a checkpoint.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file
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
REPORTED = (1, 2, 130, 143)  # exit statuses of processes that have said why: errors and signals


@dataclass(frozen=True)
class Launch:
    """Describe how a run is started."""

    config: Path  # accelerate's
    flags: dict[str, str]  # of `accelerate launch`, by name
    training: list[str]  # the words for the training script
    recipe: dict[str, Any]  # contents of the file of `--config`

    @classmethod
    def of(cls, words: Sequence[str]) -> "Launch":
        """Read a command line: flags win over the recipe's keys, and these over what the machine has.

        Raises:
            ValueError: if a recipe or topology does not exist, or if the topology cannot have so many processes.
        """
        training, flags = split_flags(words, "config", "accelerate_config", *LAUNCH_FLAGS)
        recipe: dict[str, Any] = {}
        if (name := flags.pop("config", None)) is not None:
            recipe, training = read_yaml(recipe_path(name)), ["--config", name, *training]
        keys = {name: recipe[name] for name in ("accelerate_config", *LAUNCH_FLAGS) if name in recipe}
        flags = {name: "no" if value is False else str(value) for name, value in keys.items()} | flags
        processes = flags.get("num_processes")
        topology = flags.pop("accelerate_config", None)
        if topology is None:
            topology, found = _topology_of_machine(processes)
            flags = found | flags
        path = accelerate_config_path(topology)
        Topology.from_file(str(path), processes)  # refuses what cannot be
        return cls(path, flags, training, recipe)

    def words(self) -> list[str]:
        """Return the words for `accelerate launch`."""
        flags = [word for name, value in self.flags.items() for word in (f"--{name}", value)]
        return ["--config_file", str(self.config), *flags]


def _topology_of_machine(processes: str | None) -> tuple[str, dict[str, str]]:
    """Choose what `accelerate config` has set up here, or one process per GPU; with the flags that complete it."""
    if Path(default_config_file).is_file():
        return default_config_file, {}
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    wanted = Topology.of(max(devices, 1) if processes is None else processes).processes
    if wanted == 1:
        return ("single_gpu" if devices else "cpu"), {}
    return "multi_gpu", {"num_processes": str(wanted)} | ({} if devices else {"mixed_precision": "no"})


def run(launch: Callable[[], None]) -> int:
    """Launch processes, pass SIGTERM and SIGINT on to them, wait, and return their exit status."""

    def forward(signum: int, frame: Any):
        children = psutil.Process().children()
        if not children:  # none was started yet
            sys.exit(128 + signum)
        for child in children:
            child.send_signal(signum)

    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in heard}
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


def refuse(message: str):
    """Report what argparse finds wrong, without the usage of accelerate's hundred flags."""
    raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> None:
    """Launch the training processes, and exit with their status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help", "--help-all", "--dry_run", "--dry-run"} & {*words}:  # needs no other process
        from . import train

        train.main(words)
        return
    with short_errors():
        command = Launch.of(words)
        parser = launch_command_parser()
        parser.error = refuse
        arguments = parser.parse_args([*command.words(), "-m", TRAINING, *command.training])
        print(
            f"tic-grpo: accelerate launch {' '.join(command.words())} -m {TRAINING} ...", flush=True
        )  # no flags: one may be a token
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
