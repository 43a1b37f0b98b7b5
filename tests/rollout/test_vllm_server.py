"""The trainer against a real vLLM server, in one process and in two. Needs the environment of `make test-vllm`."""

import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import pytest
import torch
from launching import free_port, started
from workers.vllm_records import (
    WORKERS,
    Record,
    assert_logged,
    assert_old_weights_noticed,
    assert_ratios_of_the_weights,
    assert_weights_arrived,
    log_ratios,
    mismatch,
    own_logps,
    real_rows,
    run,
    sampler_logps,
)

from tic_grpo_trl.starter import STARTER_MODEL


pytestmark = pytest.mark.vllm

ALONE = ["synced", "stale", "sampler", "lora"]
# As a user starts it, but for the precision and the limits that suit a CPU
FLAGS = [
    "--weight-transfer-config",
    '{"backend": "nccl"}',
    "--logprobs-mode",
    "processed_logprobs",
    "--max-logprobs=-1",
]
ON_CPU = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "64"]


def wait_until_up(address: str, process: subprocess.Popen, seconds: int):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=10).close()
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise TimeoutError(f"The server is not up after {seconds} s, or it ended: {process.poll()}.")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a running server; it and all that it started are gone afterwards."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, WORKERS / "vllm_cpu.py", "--model", STARTER_MODEL]
    command += ["--host", "127.0.0.1", "--port", port, *FLAGS, *ON_CPU]
    log = folder / "log.txt"
    # Not the test's folder for temporary files: the path of a socket must be short
    with (
        tempfile.TemporaryDirectory(prefix="vllm-") as scratch,
        started(command, log, cwd=folder, TMPDIR=scratch) as process,
    ):
        try:
            wait_until_up(f"http://127.0.0.1:{port}", process, 300)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{log.read_text()[-5000:]}") from error
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def alone(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run(folder, "vllm_server.py", server, *ALONE)
    return {name: Record(folder / f"{name}-0.pt") for name in ALONE}


@pytest.fixture(scope="module")
def two(server, tmp_path_factory):
    """The records of both processes, by run."""
    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    names = ["both", "both, sampler"]
    run(folder, "vllm_server.py", server, *names, launcher=launcher)
    return {name: [Record(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in names}


def test_the_server_is_as_the_flags_say(server):
    """TRL reads both when it starts; a server that does not know a flag would not have come up."""
    with urllib.request.urlopen(f"{server}/server_info?config_format=json", timeout=60) as answer:
        config = json.load(answer)["vllm_config"]
    assert config["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert config["weight_transfer_config"] is not None


@pytest.mark.parametrize("name", ["synced", "lora"])
def test_weights_reach_the_server_after_they_moved(alone, name):
    record = alone[name]
    assert 0.15 < record.metric("reward")[0] < 0.5
    assert_weights_arrived(record)


def test_a_server_with_old_weights_is_noticed(alone):
    assert_old_weights_noticed(alone["stale"])


@pytest.mark.parametrize("name", ["synced", "lora"])
def test_logged_ratios_are_those_of_the_weights(alone, name):
    assert_ratios_of_the_weights(alone[name])


def test_ratios_to_the_server(alone):
    record = alone["sampler"]
    assert record.forwards == {"scored": 0, "trained": 8}
    for step, log in enumerate(record.logs):
        batch = real_rows(record.batches[step])
        assert_logged(log, (own_logps(batch["weights"], batch) - sampler_logps(batch)).sum(dim=1))
        assert (log["trajectory_ratio/log_std"] < 1e-3) == (step % 4 == 0)


def test_two_processes_share_a_server(two):
    two = two["both"]
    assert [record.num_processes for record in two] == [2, 2]
    for record in two:
        assert len(record.rollouts) == 2
        for rollout in record.rollouts:
            assert mismatch(rollout).abs().max() <= 1e-4
    first, second = (record.rollouts[1] for record in two)
    for name, weights in first["weights"].items():
        assert torch.equal(weights, second["weights"][name]), name
    prompts = [{tuple(ids.tolist()) for ids in rollout["prompt_ids"]} for rollout in (first, second)]
    assert not prompts[0] & prompts[1]
    for step, log in enumerate(two[0].logs):
        assert_logged(log, torch.cat([log_ratios(record, step) for record in two]))
    assert any(log["trajectory_ratio/log_std"] > 1e-2 for log in two[0].logs[5:])


def test_ratios_of_two_processes_to_the_server(two):
    two = two["both, sampler"]
    assert [record.num_processes for record in two] == [2, 2]
    assert [record.forwards for record in two] == [{"scored": 0, "trained": 4}] * 2
    for step, log in enumerate(two[0].logs):
        batches = [real_rows(record.batches[step]) for record in two]
        expected = [(own_logps(b["weights"], b) - sampler_logps(b)).sum(dim=1) for b in batches]
        assert_logged(log, torch.cat(expected))
        assert (log["trajectory_ratio/log_std"] < 1e-3) == (step == 0)
