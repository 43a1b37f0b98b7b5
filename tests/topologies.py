"""What the tests of several processes expect of each topology, and how they compare runs."""

import pytest


COMPARED = ("loss", "grad_norm", "learning_rate", "kl", "entropy", "reward", "trajectory_ratio/", "update/")
EXPECTED = {
    # what accelerate makes of MULTI_GPU on CPU: DDP over gloo
    "multi_gpu": {"distributed_type": "DistributedType.MULTI_CPU", "zero_stage": None, "parameters": ["Parameter"]},
    "zero2": {"distributed_type": "DistributedType.DEEPSPEED", "zero_stage": 2, "parameters": ["Parameter"]},
    "zero3": {"distributed_type": "DistributedType.DEEPSPEED", "zero_stage": 3, "parameters": ["Parameter"]},
    "fsdp2": {"distributed_type": "DistributedType.FSDP", "zero_stage": None, "parameters": ["DTensor"]},
}
SPLITS_WEIGHTS = ("zero3", "fsdp2")


def assert_same_steps(logged, expected):
    assert [log["step"] for log in logged] == [log["step"] for log in expected]
    for log, other in zip(logged, expected, strict=True):
        names = {name for name in {*log, *other} if name.startswith(COMPARED)}
        assert {"loss", "grad_norm", "trajectory_ratio/ess", "update/responses_skipped"} <= names
        assert {name: log[name] for name in names} == pytest.approx({name: other[name] for name in names}, abs=1e-4)


def assert_same_run(result, expected):
    assert result["rollouts"] == expected["rollouts"]
    assert_same_steps(result["logged"], expected["logged"])
