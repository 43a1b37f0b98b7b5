"""The trainer against a real vLLM server, in one process and in two. Needs the environment of `make test-vllm`."""

import json
import urllib.request
from collections import Counter

import pytest
import torch
from launching import free_port
from vllm_serving import serving
from workers.vllm_records import (
    GROUP,
    Record,
    assert_carried_ratios,
    assert_each_prompt_once,
    assert_logged,
    assert_old_weights_noticed,
    assert_old_weights_noticed_in_current_tokens,
    assert_ratios_of_the_weights,
    assert_recorded_when_sampled,
    assert_weights_arrived,
    log_ratios,
    mismatch,
    of_several_versions,
    own_logps,
    prompts_of,
    real_rows,
    run,
    sampler_logps,
)


pytestmark = pytest.mark.vllm

ALONE = ["synced", "stale", "sampler", "lora", "carried", "carried, stale"]
TWO = ["both", "both, sampler", "both, carried", "both, spanning"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a running server."""
    with serving(tmp_path_factory.mktemp("server")) as (address, _):
        yield address


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
    run(folder, "vllm_server.py", server, *TWO, launcher=launcher)
    return {name: [Record(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in TWO}


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


def test_carry_over_with_a_server(alone):
    record = alone["carried"]
    assert_recorded_when_sampled(record)
    assert_each_prompt_once([record])
    assert_carried_ratios([record])
    assert of_several_versions(record) > 0
    assert record.forwards == {"scored": 0, "trained": 16}
    waiting = [rollout["waiting"] for rollout in record.rollouts]
    batches = len(record.evaluations) // len(waiting)
    assert [each["waiting"] for each in record.evaluations] == [each for each in waiting for _ in range(batches)]


def test_a_server_with_old_weights_is_noticed_with_carry_over(alone):
    assert_old_weights_noticed_in_current_tokens(alone["carried, stale"])


@pytest.mark.parametrize("name", ["both, carried", "both, spanning"])
def test_carry_over_of_two_processes_on_a_server(two, name):
    """The main process has the pool; each process trains on its part of what that releases."""
    two = two[name]
    assert [record.num_processes for record in two] == [2, 2]
    assert_recorded_when_sampled(*two)
    assert_each_prompt_once(two)
    assert_carried_ratios(two)
    assert [len(record.uses) for record in two] == [len(two[0].rollouts), 0]
    assert sum(map(of_several_versions, two)) > 0
    assert all(rollout["waiting"] == [] for rollout in two[1].rollouts)
    for rollouts in zip(*(record.rollouts for record in two), strict=True):
        first, second = (Counter(prompts_of(rollout)) for rollout in rollouts)
        assert first.total() == second.total()
        if name == "both, spanning":  # three groups, the second of them half and half
            assert first & second == {next(iter(first & second)): GROUP // 2}
        else:
            assert not first & second
        for weights, of_other in zip(*(rollout["weights"].values() for rollout in rollouts), strict=True):
            assert torch.equal(weights, of_other)
    for record in two:
        assert sum(len(real_rows(batch)["prompt_ids"]) > 0 for batch in record.batches) > 8


def test_mini_batches_of_groups_that_span_processes(two):
    """Each is a group, whose responses are on both processes."""
    for batches in zip(*(record.batches for record in two["both, spanning"]), strict=True):
        first, second = (Counter(prompts_of(real_rows(batch))) for batch in batches)
        assert list(first.values()) == list(second.values()) == [GROUP // 2]
        assert first == second
