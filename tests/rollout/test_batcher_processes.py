"""The update phase in two real processes whose responses differ much in length: no process waits for another in vain,
and what is saved changes neither losses nor gradients, under DDP, DeepSpeed ZeRO-3 and FSDP2."""

import importlib.util
import json
from itertools import pairwise

import pytest
import torch
from conftest import relative_error
from launching import CONFIGS, ON_CPU, launch


pytestmark = pytest.mark.distributed

ALONE = ["tic_grpo", "mean over rows", "zero-advantage rank", "spanning groups", "reference", "masked rank"]
ONE_MICRO_BATCH = ["one micro-batch", "one micro-batch, reference"]
SAMPLED = ["sampler", "corrected", "corrected zero-advantage rank"]
ZERO3_CASES = ["tic_grpo", "grpo", "zero-advantage rank", "reference"]
FSDP2_CASES = ["zero-advantage rank", "reference"]
PROBES = 9  # forward passes that find out whether the model keeps responses apart, and lets them share a prompt
HEAD_PROBES = 2  # that find out whether TRL's head is the model's own, which DeepSpeed goes without

# What says how much was computed
OF_UPDATES = ("real_token_share", "shared_token_share", "responses_skipped", "forwards_saved")
WORK = {"step_time", *(f"update/{name}" for name in OF_UPDATES)}
# TRL's means of a mini-batch weigh its micro-batches, the extremes are averaged over them: other ones, other numbers
BY_MICRO_BATCH = {"entropy", "kl"} | {
    f"clip_ratio/{name}" for name in "low_mean high_mean region_mean high_max".split()
}


def of_active_responses(name):
    """Check whether a metric describes only the responses that were forwarded, not those left out."""
    by_row = name.startswith("trajectory_ratio/") and "/clip_" not in name  # a clip share is of A > 0 or A < 0
    return by_row or name in ("entropy", "clip_ratio/low_min")


class Runs:
    """What the worker left behind in one topology."""

    def __init__(self, folder, cases, topology):
        """`topology`: the configuration that users get, with two processes on the CPU."""
        self.folder = folder
        launch(folder, CONFIGS / f"{topology}.yaml", "unequal_lengths", folder, *cases, flags=ON_CPU)
        self.results = json.loads((folder / "result.json").read_text())

    def logged(self, run):
        return self.results[run]["logged"]

    def passes(self, run):
        """Per rank and step: passes by kind, of this step alone."""
        none = dict.fromkeys(self.results[run]["passes"][0][0], 0)
        return [
            [{kind: now[kind] - before[kind] for kind in now} for before, now in pairwise([none, *rank])]
            for rank in self.results[run]["passes"]
        ]

    def total(self, run):
        """Forward passes of one rank: training, scoring and reference."""
        last = self.results[run]["passes"][0][-1]
        return last["trained"] + last["scored"] + last["reference"]

    def weights(self, run):
        return torch.load(self.folder / f"{run}.pt")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    runs = Runs(folder, [*ALONE, "grpo", *ONE_MICRO_BATCH, *SAMPLED], "multi_gpu")
    for name, result in runs.results.items():
        assert result["num_processes"] == 2
        # what accelerate makes of MULTI_GPU on CPU: DDP over gloo
        assert result["distributed_type"] == "DistributedType.MULTI_CPU", name
        assert result["sums"][0] == result["sums"][1], name  # the ranks hold the same weights
        assert relative_error(runs.weights(name), torch.load(folder / "start.pt")) > 1e-4, name  # which moved
    return runs


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (extra [deepspeed]).")
    runs = Runs(tmp_path_factory.mktemp("zero3"), ZERO3_CASES, "zero3")
    for result in runs.results.values():
        assert result["num_processes"] == 2
        assert (result["distributed_type"], result["zero_stage"]) == ("DistributedType.DEEPSPEED", 3)
        assert result["whole"] == [[], []]  # every parameter is split and gathered in each pass
    return runs


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("fsdp2"), FSDP2_CASES, "fsdp2")
    for result in runs.results.values():
        assert result["num_processes"] == 2
        assert (result["distributed_type"], result["parameters"]) == ("DistributedType.FSDP", ["DTensor"])
    return runs


def differences(logs, others, leave_out=lambda name: False):
    """Where two runs logged different numbers: step, name and both values."""
    assert len(logs) == len(others) > 0
    found = []
    for step, (log, other) in enumerate(zip(logs, others, strict=True), start=1):
        for name in sorted({*log, *other} - WORK):
            if leave_out(name):
                continue
            ours, theirs = log.get(name, "missing"), other.get(name, "missing")
            if all(isinstance(value, float | int) for value in (ours, theirs)):
                # means of ratios' logarithms come from terms that cancel
                absolute = 1e-5 if name.startswith("trajectory_ratio/") else 1e-6
                equal = ours == pytest.approx(theirs, rel=1e-4, abs=absolute)
            else:
                equal = ours == theirs
            if not equal:
                found.append((step, name, ours, theirs))
    return found


def assert_same_training(runs, run, others, other, leave_out=lambda name: False):
    assert differences(runs.logged(run), others.logged(other), leave_out) == []
    assert relative_error(runs.weights(run), others.weights(other)) < 1e-5


@pytest.mark.parametrize("case", [*ALONE, "grpo", *ONE_MICRO_BATCH])
def test_savings_change_nothing(ddp, case):
    """Switches on and off on the same rollouts: every loss, gradient norm and metric, and the weights at the end."""
    on, off = f"{case}, on", f"{case}, off"
    skips = any(log["update/responses_skipped"] > 0 for log in ddp.logged(on))
    assert skips == (case not in ("reference", "one micro-batch, reference"))

    def leave_out(name):
        return (skips and of_active_responses(name)) or (case not in ONE_MICRO_BATCH and name in BY_MICRO_BATCH)

    assert_same_training(ddp, on, ddp, off, leave_out)
    first = ddp.logged(on)[0]
    assert first["completions/min_length"] == 1
    assert first["completions/max_length"] == 40
    assert ddp.logged(off)[0]["update/real_token_share"] < 0.8 * first["update/real_token_share"]
    assert max(log["update/shared_token_share"] for log in ddp.logged(on)) > 0


@pytest.mark.parametrize("case", ["tic_grpo", "grpo"])
def test_the_clip_rule_had_something_to_do(ddp, case):
    assert max(log.get("trajectory_ratio/clip_high_pos", 0) for log in ddp.logged(f"{case}, on")) > 0


@pytest.mark.parametrize("variant", ["on", "off"])
def test_grpo_trains_as_trl_does(ddp, variant):
    def leave_out(name):
        ours = name.startswith(("trajectory_ratio/", "update/", "frac_non_finite"))
        return ours or (variant == "on" and (of_active_responses(name) or name in BY_MICRO_BATCH))

    assert_same_training(ddp, f"grpo, {variant}", ddp, "grpo, trl", leave_out)


@pytest.mark.parametrize("case", [*ALONE, "grpo", *ONE_MICRO_BATCH])
def test_ranks_make_the_same_passes_and_fewer(ddp, case):
    on, off = f"{case}, on", f"{case}, off"
    first, second = ddp.passes(on)
    assert first == second
    assert all(step["backward"] == step["trained"] > 0 for step in first)
    saved = sum(log["update/forwards_saved"] for log in ddp.logged(on))
    assert saved == ddp.total(off) - ddp.total(on) + PROBES
    assert saved > 0
    assert all(log["update/forwards_saved"] == 0 for log in ddp.logged(off))


@pytest.mark.parametrize(("case", "rollouts"), [("zero-advantage rank", 2), ("spanning groups", 1), ("masked rank", 1)])
def test_a_mini_batch_without_advantage_on_both_ranks_costs_one_pass(ddp, case, rollouts):
    logs, passes = ddp.logged(f"{case}, on"), ddp.passes(f"{case}, on")
    skipped = [step for step, log in enumerate(logs) if log["update/responses_skipped"] == 1]
    assert len(skipped) == rollouts
    for step in skipped:
        assert logs[step]["loss"] == logs[step]["grad_norm"] == 0
        assert [rank[step]["trained"] for rank in passes] == [1, 1]


def test_a_rank_without_anything_to_do_follows_the_other(ddp):
    logs, passes = ddp.logged("zero-advantage rank, on"), ddp.passes("zero-advantage rank, on")
    assert all(log["update/responses_skipped"] >= 0.5 for log in logs)  # rank 0's half
    assert sum(log["grad_norm"] > 0 for log in logs) > 3
    assert max(step["trained"] for step in passes[0]) > 1


@pytest.mark.parametrize("case", ["reference", "masked rank", "one micro-batch, reference"])
def test_reference_passes(ddp, case):
    on, off = (ddp.results[f"{case}, {variant}"]["passes"] for variant in ("on", "off"))
    assert on[0][-1]["reference"] == on[1][-1]["reference"]
    assert 0 < on[0][-1]["reference"] <= off[0][-1]["reference"]
    # a micro-batch is scored in one pass, as it is trained on
    assert (on[0][-1]["reference"] < off[0][-1]["reference"]) == (case not in ONE_MICRO_BATCH)


def by_sampler(name):
    """Whether a metric is about the responses that are trained on and their sampler."""
    return name.startswith("sampling/") and name != "sampling/responses_without_logps"


def test_a_log_probability_that_lacks_on_one_rank(ddp):
    """Both ranks score then, and every loss, gradient norm and metric is that of TRL's passes."""
    on, off = "sampler, on", "sampler, off"
    assert_same_training(ddp, on, ddp, off, lambda name: of_active_responses(name) or by_sampler(name))
    assert ddp.passes(on)[0] == ddp.passes(on)[1]
    assert ddp.logged(on)[0]["sampling/responses_without_logps"] == 1 / 32
    assert sum(step["scored"] for step in ddp.passes(on)[0]) == PROBES + HEAD_PROBES + 1


def test_the_correction_for_the_sampler_is_trl_s(ddp):
    """Over both ranks, metrics included."""

    def leave_out(name):
        ours = name.startswith(("trajectory_ratio/", "update/", "frac_non_finite", "sampling/mean_ratio"))
        return ours or of_active_responses(name) or name in BY_MICRO_BATCH

    assert_same_training(ddp, "corrected, on", ddp, "corrected, trl", leave_out)
    assert any(log.get("sampling/importance_sampling_ratio/min", 1) < 0.9 for log in ddp.logged("corrected, trl"))


def test_a_rank_that_trains_on_nothing_has_no_correction(ddp):
    """And counts for none in its metrics."""
    logs = [
        log
        for log in ddp.logged("corrected zero-advantage rank, on")
        if "sampling/importance_sampling_ratio/min" in log
    ]
    assert len(logs) == 1
    assert all(log["sampling/importance_sampling_ratio/min"] > 0 for log in logs)
    assert all(log["sampling/sampling_logp_difference/mean"] > 1e-3 for log in logs)
    assert ddp.passes("corrected zero-advantage rank, on")[0] == ddp.passes("corrected zero-advantage rank, on")[1]


def assert_same_as_ddp(runs, ddp, case, probes=0):
    run = f"{case}, on"
    assert_same_training(runs, run, ddp, run)
    expected = [[step | {"scored": step["scored"] - probes} for step in rank] for rank in ddp.results[run]["passes"]]
    assert runs.results[run]["passes"] == expected


@pytest.mark.parametrize("case", ZERO3_CASES)
def test_zero3_equals_ddp(ddp, zero3, case):
    """Micro-batches that are left out do not disturb how DeepSpeed accumulates gradients either."""
    assert_same_as_ddp(zero3, ddp, case, HEAD_PROBES)


@pytest.mark.parametrize("case", FSDP2_CASES)
def test_fsdp2_equals_ddp(ddp, fsdp2, case):
    assert_same_as_ddp(fsdp2, ddp, case)
