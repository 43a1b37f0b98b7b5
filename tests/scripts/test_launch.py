"""`tic-grpo train`: what it hands to accelerate, the processes that it starts, and signals."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from launching import CONFIGS, QUICK, environment_of_script, hear_ctrl_c, stop

from tic_grpo_trl.scripts import launch, train


EIGHT = ["--config", "qwen3_1.7b_8gpus"]
TWO = "--accelerate_config multi_gpu --num_processes 2 --mixed_precision no --main_process_port 0".split()
CPU_ONLY = not torch.accelerator.is_available()


def pairs(words: list[str]) -> dict[str, str]:
    return dict(zip(words[::2], words[1::2], strict=True))


def config_and_flags(words: str) -> tuple[str, list[str], list[str]]:
    command = launch.Launch.of(words.split())
    return command.config.name, command.words()[2:], command.training


@pytest.mark.skipif(not CPU_ONLY, reason="the choice depends on the machine's GPUs")
@pytest.mark.parametrize(
    ("words", "config", "flags", "training"),
    [
        ("--seed 1", "cpu.yaml", [], ["--seed", "1"]),
        ("--num_processes 2", "multi_gpu.yaml", ["--num_processes", "2", "--mixed_precision", "no"], []),
        ("--config starter", "cpu.yaml", [], ["--config", "starter"]),
        ("--config starter --accelerate_config zero3", "zero3.yaml", [], ["--config", "starter"]),
        (
            "--accelerate_config=zero2 --num-processes 4 --main_process_ip 10.0.0.1 --machine_rank 1 --seed 1",
            "zero2.yaml",
            ["--num_processes", "4", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"],
            ["--seed", "1"],
        ),
        ("--config qwen3_1.7b_8gpus", "zero2.yaml", ["--num_processes", "8"], EIGHT),
        ("--config qwen3_1.7b_8gpus --num_processes 4", "zero2.yaml", ["--num_processes", "4"], EIGHT),
    ],
)
def test_topology_of_a_command(words, config, flags, training):
    found, found_flags, rest = config_and_flags(words)
    assert (found, rest) == (config, training)
    assert pairs(found_flags) == pairs(flags)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--config startr", "Did you mean 'starter'?"),
        ("--accelerate_config zero9", "Did you mean 'zero3'?"),
        ("--num_processes 0", "1 or more"),
        ("--num_processes two", "1 or more"),
        ("--accelerate_config cpu --num_processes 2", "starts one process"),
        ("--mixed_precision fp12", "invalid choice"),
    ],
)
def test_what_cannot_be_launched_is_refused_in_one_line(words, wanted, capsys):
    with pytest.raises(SystemExit) as exit_:
        launch.main(words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert wanted in line


def test_keys_of_a_file_for_the_launcher(tmp_path):
    """As in TRL's command: what is for `accelerate launch` may stand in the file, and a flag wins over it."""
    path = tmp_path / "my.yaml"
    path.write_text("accelerate_config: zero3\nnum_processes: 4\nmixed_precision: no\nmax_steps: 3\nmachine_rank: 0\n")
    config, flags, training = config_and_flags(f"--config {path} --accelerate_config zero2 --machine_rank 1")
    assert config == "zero2.yaml"
    assert pairs(flags) == {"--num_processes": "4", "--mixed_precision": "no", "--machine_rank": "1"}
    _, training_args, _ = train.parse([*training, "--use_cpu", "--output_dir", "unused"], train.TICGRPOConfig)
    assert training_args.max_steps == 3


def test_without_a_topology_the_file_of_accelerate_config_counts(tmp_path, monkeypatch):
    path = tmp_path / "default_config.yaml"
    path.write_text(CONFIGS.joinpath("zero2.yaml").read_text())
    monkeypatch.setattr(launch, "default_config_file", str(path))
    assert launch.Launch.of(["--seed", "1"]).config == path
    assert launch.Launch.of(["--config", "starter"]).config.name == "cpu.yaml"


def start(folder, *words) -> subprocess.Popen:
    command = [sys.executable, "-m", "tic_grpo_trl", "train", "--config", "starter", "--output_dir", folder]
    command = [*map(str, command), *QUICK, *words]
    with (folder.parent / "log.txt").open("w") as log:
        how = {"stdout": log, "stderr": subprocess.STDOUT, "preexec_fn": hear_ctrl_c}
        return subprocess.Popen(command, env=environment_of_script(), cwd=folder.parent, **how)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_waited_for(processes, number, tmp_path):
    folder = tmp_path / "run"
    several = TWO if processes == 2 else []
    process = start(folder, *several, "--max_steps", "400", "--eval_strategy", "no", "--eval_on_start", "false")
    try:
        deadline = time.monotonic() + 120
        while "reward 0." not in (tmp_path / "log.txt").read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == processes
        process.send_signal(number)
        status = process.wait(60)
    finally:
        stop(process)
    log = (tmp_path / "log.txt").read_text()
    assert status == 128 + number, log[-3000:]
    assert not any(worker.is_running() for worker in workers)
    (checkpoint,) = folder.glob("checkpoint-*")
    assert (checkpoint / "manifest.json").exists()
    assert len(list(checkpoint.glob("tic_grpo_state_*.pt"))) == processes
    assert not (folder / "summary.json").exists()
    assert "Traceback" not in log, log[-3000:]


@pytest.mark.distributed
def test_two_processes_share_the_responses_of_an_update(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, *TWO)
    try:
        assert process.wait(200) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    finally:
        stop(process)
    assert "| processes | 2 |" in (folder / "README.md").read_text()
    assert json.loads((folder / "summary.json").read_text())["updates"] == 8


@pytest.mark.distributed
def test_an_error_of_two_processes_is_one_line(tmp_path):
    process = start(tmp_path / "run", *TWO, "--algorithm", "tic_grop")
    try:
        assert process.wait(200) == 2
    finally:
        stop(process)
    printed = (tmp_path / "log.txt").read_text().splitlines()
    command, *lines = [line for line in printed if "WANDB offline mode" not in line]  # as the tests set it
    assert command.startswith("tic-grpo: accelerate launch")
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: Unknown algorithm 'tic_grop'")


def test_every_topology_is_found_by_its_name():
    for path in CONFIGS.glob("*.yaml"):
        assert launch.accelerate_config_path(path.stem).samefile(path)
