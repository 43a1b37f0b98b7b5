"""ZeRO-3 over two machines, each of which is a network namespace of this one: the run equals that of one machine, ends
when the other is lost, and goes on from its last checkpoint."""

import importlib.util
import json
import re
import shutil
import subprocess
import time
from contextlib import ExitStack, contextmanager
from os import getpid

import pytest
import torch
from launching import CONFIGS, ON_CPU, ROOT, finish, kill, launch, launch_command, started
from topologies import EXPECTED, assert_same_run, assert_same_steps


pytestmark = pytest.mark.distributed

ADDRESSES = ("10.200.0.1", "10.200.0.2")
TIMEOUT = 30  # seconds until a process gives up waiting for another


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes():
    """Names of two namespaces that see each other through a pair of virtual cards, and nothing else."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (extra [deepspeed]).")
    if shutil.which("ip") is None:
        pytest.skip("Network namespaces need the program ip (package iproute2).")
    names = [f"tic{getpid()}-{rank}" for rank in range(2)]
    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
                ip("netns", "exec", name, "true")
            ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"Network namespaces are not permitted here: {error.stderr.strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                ip("-n", name, "link", "set", interface, "up")
        yield names


def log_of(folder, rank):
    return folder / f"node{rank}.txt"


@contextmanager
def running(nodes, folder, case, *flags):
    """The same launch on both machines, as the comment in the file says."""
    with ExitStack() as stack:
        processes = []
        for rank, name in enumerate(nodes):
            where = f"--machine_rank {rank} --main_process_ip {ADDRESSES[0]} --main_process_port 29500".split()
            launcher = launch_command(CONFIGS / "zero3_two_nodes.yaml", *where, *ON_CPU)
            worker = [ROOT / "tests/workers/topology.py", folder, case, *flags]
            command = ["ip", "netns", "exec", name, *launcher, *worker]
            environment = {"GLOO_SOCKET_IFNAME": "eth0", "GROUP_TIMEOUT": str(TIMEOUT)}
            processes.append(stack.enter_context(started(command, log_of(folder, rank), **environment)))
        yield processes


def result_of(nodes, folder, case):
    with running(nodes, folder, case) as processes:
        for rank, process in enumerate(processes):
            finish(process, log_of(folder, rank), 240)
    result = json.loads((folder / "result.json").read_text())[case]
    assert result["num_processes"] == 2
    assert {key: result[key] for key in EXPECTED["zero3"]} == EXPECTED["zero3"]
    assert result["whole"] == [[], []]
    # every process has one machine's address and no other's
    assert result["addresses"] == [[address, "127.0.0.1"] for address in ADDRESSES]
    return result


@pytest.fixture(scope="module")
def one_node(nodes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_node")
    launch(folder, CONFIGS / "zero3.yaml", "topology", folder, "full", flags=ON_CPU)
    return folder, json.loads((folder / "result.json").read_text())["full"]


def assert_same_weights(folder, case, one_node):
    weights, expected = (torch.load(path / "result.pt")["weights"] for path in (folder / case, one_node[0] / "full"))
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_two_machines_train_as_one(nodes, one_node, tmp_path):
    assert_same_run(result_of(nodes, tmp_path, "full"), one_node[1])
    assert_same_weights(tmp_path, "full", one_node)


def lose_power(nodes, processes):
    """All processes of machine 1 are gone at once."""
    kill(processes[1])
    return "Connection (reset|closed) by peer"


def cut_the_cable(nodes, processes):
    """Nothing arrives any more, and no machine is told. Of two exchanges that wait, gloo ends one because its time is
    over, and the other because this has closed the connection; either may be the one that is waited for."""
    ip("-n", nodes[1], "link", "set", "eth0", "down")
    return f"Timed out waiting {TIMEOUT}000ms|Application timeout caused pair closure"


@pytest.mark.parametrize("accident", [lose_power, cut_the_cable])
def test_a_lost_machine_ends_the_run_which_then_resumes(nodes, one_node, tmp_path, accident):
    with running(nodes, tmp_path, "full", "--max_steps", "4000") as processes:
        latest = time.monotonic() + 240
        while not (tmp_path / "full/checkpoint-8/trainer_state.json").exists():  # then checkpoint-4 is whole
            assert [process.poll() for process in processes] == [None, None], log_of(tmp_path, 0).read_text()[-3000:]
            assert time.monotonic() < latest
            time.sleep(0.1)
        message = accident(nodes, processes)
        status = processes[0].wait(TIMEOUT + 60)  # subprocess.TimeoutExpired: it hangs
        assert status not in (0, None)
        assert re.search(message, log_of(tmp_path, 0).read_text()), log_of(tmp_path, 0).read_text()[-3000:]
    ip("-n", nodes[1], "link", "set", "eth0", "up")

    resumed = result_of(nodes, tmp_path, "full-resumed")
    assert resumed["rollouts"] == one_node[1]["rollouts"][1:]
    assert_same_steps(resumed["logged"], one_node[1]["logged"])
    assert_same_weights(tmp_path, "full-resumed", one_node)
