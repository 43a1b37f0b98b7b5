"""Bad numbers on one of two processes: both act alike, with DDP and with DeepSpeed ZeRO-3."""

import importlib.util
import json
import math

import pytest
from launching import CONFIGS, ON_CPU, launch


pytestmark = pytest.mark.distributed

PER_UPDATE = 8  # responses of a mini-batch, over both processes
BOTH = ["policy", "policy, checkpointing", "all of one", "all of both", "infinite loss", "gradient", "stop", "min_ess"]
DDP = [*BOTH, "policy, zeroed", "policy, padded", "loss", "infinite gradient", "reward model"]


def results(folder, topology, cases):
    launch(folder, CONFIGS / f"{topology}.yaml", "non_finite", folder, *cases, flags=ON_CPU, seconds=500)
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    cases = results(tmp_path_factory.mktemp("ddp"), "multi_gpu", DDP)
    for case in cases.values():
        assert case["num_processes"] == 2
        assert case["distributed_type"] == "DistributedType.MULTI_CPU"
    return cases


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (extra [deepspeed]).")
    cases = results(tmp_path_factory.mktemp("zero3"), "zero3", BOTH)
    for case in cases.values():
        assert case["num_processes"] == 2
        assert (case["distributed_type"], case["zero_stage"]) == ("DistributedType.DEEPSPEED", 3)
        assert case["whole"] == [[], []]  # every parameter is split
    return cases


def on_both(cases, case):
    """Return what both processes did in a case; what is logged is the same for both."""
    first, second = cases[case]["ranks"]
    for name in ("moved", "rates", "frac_non_finite", "update/skipped", "error"):
        assert first[name] == second[name], name
    assert first["finite"]
    assert second["finite"]
    assert all(map(math.isfinite, first["loss"]))
    return first


def of_both(*cases):
    """Parametrize over cases with DDP, and over those of them that also run with ZeRO-3."""
    pairs = [("ddp", case) for case in cases] + [("zero3", case) for case in cases if case in BOTH]
    return pytest.mark.parametrize(("topology", "case"), pairs)


# Responses dropped in each of two rollouts of two updates
DROPPED = {"policy": 3, "policy, padded": 3, "policy, checkpointing": 3, "all of one": 8, "reward model": 6}


@of_both(*DROPPED)
def test_responses_of_one_process_are_dropped_and_the_update_is_made(request, topology, case):
    ran = on_both(request.getfixturevalue(topology), case)
    shares = ran["frac_non_finite"]
    assert sum(shares[:2]) * PER_UPDATE == sum(shares[2:]) * PER_UPDATE == DROPPED[case]
    assert ran["update/skipped"] == [0] * 4
    assert ran["moved"] == [True] * 4
    assert sum(norm > 0 for norm in ran["grad_norm"]) >= 3  # the cap may stop all remaining responses


@of_both("all of both", "loss", "infinite loss", "gradient", "infinite gradient")
def test_a_spoiled_update_is_skipped_on_both(request, topology, case):
    """Weights and optimizer state are bit-identical before and after it; the learning rate advances."""
    ran = on_both(request.getfixturevalue(topology), case)
    assert ran["moved"] == [True, False, True, True]
    assert ran["update/skipped"] == [0, 1, 0, 0]
    assert ran["frac_non_finite"] == [0, float(case == "all of both"), 0, 0]
    assert ran["rates"] == pytest.approx([0.0075, 0.005, 0.0025, 0])
    assert all(math.isfinite(ran["grad_norm"][i]) for i in (0, 2, 3))
    assert math.isfinite(ran["grad_norm"][1]) == (case == "all of both")


@of_both("stop")
def test_both_end_with_one_report(request, topology, case):
    ran = on_both(request.getfixturevalue(topology), case)
    assert ran["moved"] == [True, False]
    assert "2 updates in a row were skipped" in ran["error"]
    assert "On process 1 of 2, step 2: Non-finite numbers: loss nan" in ran["error"]
    assert "On process 1 of 2, step 3: Non-finite numbers: loss nan" in ran["error"]
    assert "  completion: '" in ran["error"]


@of_both("min_ess")
def test_min_ess_skips_the_rest_of_a_rollout(request, topology, case):
    ran = on_both(request.getfixturevalue(topology), case)
    assert ran["moved"] == [True, False, False, False] * 2
    assert ran["update/skipped"] == [0, 1, 1, 1] * 2
    assert ran["grad_norm"][1:4] == [0, 0, 0]
    assert ran["grad_norm"][4] > 0
    assert ran["rates"] == pytest.approx([0.3 * (7 - step) / 8 for step in range(8)])


def test_dropped_responses_contribute_nothing(ddp):
    """Losses, gradients and weights of four updates are those with advantages of 0."""
    dropped, zeroed = on_both(ddp, "policy"), on_both(ddp, "policy, zeroed")
    for name in ("loss", "grad_norm"):
        assert dropped[name] == pytest.approx(zeroed[name], rel=1e-4, abs=1e-6)
    assert dropped["weights"] == pytest.approx(zeroed["weights"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("case", BOTH)
def test_zero3_equals_ddp(ddp, zero3, case):
    mine, theirs = on_both(zero3, case), on_both(ddp, case)
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-5)
    assert mine["weights"].keys() == theirs["weights"].keys()
    assert mine["weights"] == pytest.approx(theirs["weights"], rel=1e-3, abs=1e-3)
