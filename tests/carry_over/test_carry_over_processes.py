"""Carry-over in two real processes, one with short responses and one with long ones, in every topology: a pool per
process, every prompt trained on once, and no process waits for the other in vain."""

import functools
import importlib.util
import json
from collections import Counter

import pytest
from launching import CONFIGS, ON_CPU, launch
from topologies import EXPECTED, SPLITS_WEIGHTS


pytestmark = pytest.mark.distributed

CASES = {
    "multi_gpu": ["full", "two late, three times", "spanning groups"],
    "zero2": ["full"],
    "zero3": ["gathered", "split", "lora"],
    "fsdp2": ["full", "lora", "recording alone", "spanning groups"],
}
WITH_POOL = [
    (name, case)
    for name, cases in CASES.items()
    for case in cases
    if case not in ("recording alone", "spanning groups")
]
RECORDING = [(name, "recording alone") for name, cases in CASES.items() if "recording alone" in cases]
ROLLOUTS, PROMPTS, GROUP = 5, 4, 4  # prompts of one process in a rollout
BOUNDS = {"two late, three times": (2, 3)}  # S and oversampling; otherwise 1 and 2


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The notes by case of a topology, all of whose cases run in one launch, when first asked for."""

    @functools.cache
    def run(name):
        if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed (extra [deepspeed]).")
        folder = tmp_path_factory.mktemp(name)
        launch(folder, CONFIGS / f"{name}.yaml", "carry_over", folder, *CASES[name], flags=ON_CPU)
        results = json.loads((folder / "result.json").read_text())
        assert list(results) == CASES[name]
        for case, result in results.items():
            if case == "spanning groups":
                continue
            assert result["num_processes"] == 2, case
            assert {key: result[key] for key in EXPECTED[name]} == EXPECTED[name], case
            assert result["whole"] == [[], []] if name in SPLITS_WEIGHTS else all(result["whole"]), case
        return results

    return run


@pytest.mark.parametrize(("name", "case"), WITH_POOL)
def test_each_prompt_is_trained_on_once_by_its_own_process(run_of, name, case):
    """In whole groups, and the last rollout leaves nothing behind."""
    result, (late, times) = run_of(name)[case], BOUNDS.get(case, (1, 2))
    assert result["left"] == [0, 0]
    seen = Counter()
    for process, rollouts in enumerate(result["rollouts"]):
        assert len(rollouts) == ROLLOUTS
        for call, rollout in enumerate(rollouts):
            groups = [rollout["numbers"][start : start + GROUP] for start in range(0, GROUP * PROMPTS, GROUP)]
            assert len(rollout["numbers"]) == GROUP * PROMPTS
            assert all(len(set(group)) == 1 for group in groups)
            for number, *_ in groups:
                seen[number] += 1
                own_rollout, of_rollout = divmod(number, 2 * PROMPTS)
                assert of_rollout // PROMPTS == process
                assert -(times - 1) <= call - own_rollout <= late
            assert rollout["age"] <= late + times - 1
    assert seen == dict.fromkeys(range(2 * PROMPTS * ROLLOUTS), 1)


@pytest.mark.parametrize(("name", "case"), WITH_POOL)
def test_processes_progress_at_their_own_pace(run_of, name, case):
    result, (_, times) = run_of(name)[case], BOUNDS.get(case, (1, 2))
    short, long = ([length for rollout in rollouts for length in rollout["lengths"]] for rollouts in result["rollouts"])
    assert sum(long) > 4 * sum(short)
    for calls in result["calls"]:
        for call, noted in enumerate(calls):
            assert noted["begun"] <= min(times, ROLLOUTS - call) * PROMPTS
            assert set(noted["sizes"]) <= {GROUP}
    assert sum(rollout["carried"] for rollout in result["rollouts"][1]) > 100
    pairs = list(zip(*result["calls"], strict=True))
    if name not in SPLITS_WEIGHTS:  # a process goes on to the update when it has enough
        assert sum(one["passes"] for one, _ in pairs) < 0.5 * sum(other["passes"] for _, other in pairs)
        return
    # with split weights it generates ahead, and when nothing is left it follows the other's passes
    assert all(one["passes"] == other["passes"] > 0 for one, other in pairs)
    assert any(one["unfinished"] == 0 and one["steps"] < other["steps"] for one, other in pairs)
    assert any(one["sampled"] == 0 < other["sampled"] for one, other in pairs)


@pytest.mark.parametrize(("name", "case"), WITH_POOL)
def test_every_update_is_made(run_of, name, case):
    result = run_of(name)[case]
    assert [log["step"] for log in result["logged"]] == list(range(1, 2 * ROLLOUTS + 1))


@pytest.mark.parametrize(("name", "case"), WITH_POOL)
def test_log_probabilities_are_the_weights_that_sampled(run_of, name, case):
    """Those of tokens that the current weights sampled; the earlier ones' are others."""
    rollouts = [rollout for of_process in run_of(name)[case]["rollouts"] for rollout in of_process]
    assert max(rollout["current"] for rollout in rollouts) < 1e-4
    assert max(rollout["earlier"] for rollout in rollouts) > 1e-3
    logged = run_of(name)[case]["logged"]
    assert any(log["trajectory_ratio/log_std"] > 1e-3 for log in logged[2::2])  # also in a rollout's first update


@pytest.mark.parametrize(("name", "case"), RECORDING)
def test_recording_without_carry_over(run_of, name, case):
    result = run_of(name)[case]
    rollouts = [rollout for of_process in result["rollouts"] for rollout in of_process]
    assert len(rollouts) == 2 * ROLLOUTS
    assert max(rollout["current"] for rollout in rollouts) < 1e-4
    short, long = ([length for rollout in rollouts for length in rollout["lengths"]] for rollouts in result["rollouts"])
    assert sum(long) > 4 * sum(short)


@pytest.mark.parametrize("name", [name for name, cases in CASES.items() if "spanning groups" in cases])
def test_groups_that_span_processes_are_refused_on_both(run_of, name):
    for message in run_of(name)["spanning groups"]["refused"]:
        assert message == (
            "max_carry_over=1 needs whole groups on every process, but per_device_train_batch_size * "
            "steps_per_generation = 4 is not divisible by num_generations = 8: make it divisible, set "
            "vllm_mode='server', or max_carry_over=0."
        )
