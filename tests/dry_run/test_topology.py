"""Test how a topology is read from a file and from the environment."""

import json

import pytest
from launching import CONFIGS

from tic_grpo_trl.dry_run.topology import Topology


@pytest.mark.parametrize(
    ("name", "processes", "kind"),
    [
        ("cpu", 1, "nothing is sharded"),
        ("single_gpu", 1, "nothing is sharded"),
        ("multi_gpu", 8, "DDP"),
        ("zero2", 8, "DeepSpeed ZeRO-2"),
        ("zero3", 8, "DeepSpeed ZeRO-3"),
        ("zero3_offload", 4, "DeepSpeed ZeRO-3 with offload"),
        ("zero3_two_nodes", 16, "DeepSpeed ZeRO-3"),
        ("fsdp2", 8, "FSDP2"),
    ],
)
def test_files_are_read_as_accelerate_reads_them(name, processes, kind):
    topology = Topology.from_file(CONFIGS / f"{name}.yaml")
    assert (topology.processes, topology.kind, topology.name) == (processes, kind, f"{name}.yaml")


def test_number_of_processes_can_be_given():
    assert Topology.from_file(CONFIGS / "zero2.yaml", 4).processes == 4
    assert Topology.from_file(CONFIGS / "zero2.yaml", "4") == Topology.from_file(CONFIGS / "zero2.yaml", 4)
    assert Topology.of(4).processes == 4


@pytest.mark.parametrize("processes", [0, -2, 1.5, "0", "two", "", True])
def test_no_other_number_of_processes_is_accepted(tmp_path, processes):
    says = rf"^num_processes {processes}: give a whole number of processes, 1 or more\.$"
    with pytest.raises(ValueError, match=says):
        Topology.of(processes)
    with pytest.raises(ValueError, match=says):
        Topology.from_file(CONFIGS / "zero2.yaml", processes)
    written = tmp_path / "written.yaml"
    written.write_text(json.dumps({"distributed_type": "MULTI_GPU", "num_processes": processes}))
    with pytest.raises(ValueError, match=says):
        Topology.from_file(written)
    assert Topology.from_file(written, 2).processes == 2


@pytest.mark.parametrize("text", [None, "- a list", "distributed: yes", "a: [unclosed"])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    if text:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"--accelerate_config .*config.yaml: not a file of accelerate. Give one of"):
        Topology.from_file(path)


def test_environment_of_accelerate_launch():
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "WORLD_SIZE": "4"}
    assert Topology.from_environment(deepspeed) == Topology(4, "as launched", zero_stage=3)
    fsdp = {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}
    assert Topology.from_environment(fsdp) == Topology(2, "as launched", fsdp=True)
    assert Topology.from_environment({}).kind == "nothing is sharded"


@pytest.mark.parametrize("name", ["cpu", "single_gpu"])
def test_a_file_for_one_process_starts_no_more(name):
    assert Topology.from_file(CONFIGS / f"{name}.yaml", 1).processes == 1
    with pytest.raises(
        ValueError, match=rf"--accelerate_config {name} starts one process, but num_processes is 8: .*zero2"
    ):
        Topology.from_file(CONFIGS / f"{name}.yaml", 8)
