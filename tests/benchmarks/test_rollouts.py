"""The benchmark of whole rollouts prescribes lengths, simulates and divides correctly. Times are not tested."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "rollouts.py"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


# Prescribed lengths


def test_each_rollout_has_the_same_tokens_and_one_longest_response():
    from prescribed_lengths import make_workload

    workload = make_workload(rollouts=5, responses=64, mean=37, longest=562, seed=3)
    rollouts = [sum(workload.lengths[start : start + 8], ()) for start in range(0, 40, 8)]
    assert [(len(lengths), sum(lengths), lengths.count(562)) for lengths in rollouts] == [(64, 64 * 37, 1)] * 5
    assert len(set(rollouts)) == 5
    assert len({lengths.index(562) for lengths in rollouts}) > 1
    assert workload == make_workload(5, 64, 37, 562, seed=3) != make_workload(5, 64, 37, 562, seed=4)
    assert {each for lengths in make_workload(2, 64, 37, 37, seed=0).lengths for each in lengths} == {37}


def test_a_request_is_recognised_by_its_tokens():
    from prescribed_lengths import Responses, Workload, prompt_length

    responses = Responses(Workload(1, ((5,) * 8, (3, 4, 6, 7, 9, 9, 9, 9))))
    prompt = [3] * prompt_length(1)  # of prompt 1
    for name, index, length in (("a", 0, 3), ("b", 1, 4), ("c", 2, 6)):
        assert responses.find(prompt) == ((1, index), length)
        responses.begin(name, (1, index))
    responses.write({"a": [10], "b": [11], "c": [10]}, 0.5)
    responses.write({"a": [20], "b": [21]}, 0.25)
    work = responses.end_call()
    assert (work.running, work.seconds, work.prefilled_again) == ([3, 2], [0.5, 0.25], 0)
    # in a later call, in another order
    assert responses.find([*prompt, 11, 21]) == ((1, 1), 2)
    responses.begin("d", (1, 1))
    assert responses.find([*prompt, 10]) == ((1, 2), 5)
    responses.begin("e", (1, 2))
    assert responses.find(prompt) == ((1, 3), 7)
    responses.write({"d": [31]}, 0.5)
    responses.write({"d": [41], "e": [20]}, 0.5)
    assert responses.end_call().prefilled_again == 2 + 1  # when they go on, not with each token
    assert responses.written[1, 1] == [11, 21, 31, 41]
    with pytest.raises(StopIteration):
        responses.find([*prompt, 99])  # nobody wrote that


class FakeEngine:
    """What the benchmark replaces of vLLM's engine."""

    def __init__(self):
        self.added = []
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=2))
        self.engine_core = SimpleNamespace(get_output=lambda: SimpleNamespace(outputs=self.outputs))

    def add_request(self, request_id, prompt, params):
        self.added.append(params)
        return f"{request_id}-inside"


def test_engine_gets_the_length_and_its_steps_are_counted():
    from prescribed_lengths import PrescribedEngine, Responses, Workload

    class Params(SimpleNamespace):
        def clone(self):
            return Params(**vars(self))

    engine = FakeEngine()
    prescribed = PrescribedEngine(engine)
    prescribed.responses = responses = Responses(Workload(1, ((5, 6) * 4,)))
    shared = Params(max_tokens=1000, ignore_eos=False)  # TRL's requests have the same object
    for name in ("0", "1"):
        engine.add_request(name, {"prompt_token_ids": [2] * 8}, shared)
    assert [(params.max_tokens, params.ignore_eos) for params in engine.added] == [(5, True), (6, True)]
    assert (shared.max_tokens, shared.ignore_eos) == (1000, False)
    engine.outputs = []
    engine.engine_core.get_output()  # computes part of a long prompt
    engine.outputs = [
        SimpleNamespace(request_id="0-inside", new_token_ids=[7]),
        SimpleNamespace(request_id="1-inside", new_token_ids=[]),
    ]
    assert engine.engine_core.get_output().outputs is engine.outputs
    assert responses.work.running == [1]
    assert dict(responses.written)[0, 0] == [7]


# The simulation at full size


def test_simulated_engine_is_the_theory_s():
    from full_size import Engine, simulate
    from prescribed_lengths import make_workload

    from research.theory import generation_steps

    for carried, oversampling in ((0, 2.0), (1, 1.0), (1, 2.0), (2, 2.0), (3, 1.5), (4, 3.0)):
        lengths = make_workload(rollouts=12, responses=64, mean=37, longest=562, seed=carried).lengths
        engine = Engine(lengths, 8, 48, carried, oversampling, prompt=10)
        ours = [(work.steps, work.sampled) for (work,) in simulate([engine], 12)]
        theirs = generation_steps.simulate(lengths, 48, 8, carried, oversampling)
        assert ours == [(each.steps, each.sampled) for each in theirs]


def test_latency_by_hand():
    from full_size import Engine, Latency, Work, mean_seconds, simulate, with_waiting_time

    # One prompt per rollout with two responses, prompts of 10 tokens, 2 slots
    engine = Engine([[2, 5], [1, 1]], prompts=1, slots=2, max_carry_over=0, oversampling=2.0, prompt=10)
    calls = simulate([engine], 2)
    read = (10 + 11) + (10 + 11 + 12 + 13 + 14)  # before each new token: the prompt and the tokens so far
    assert calls == [[Work(5, 7, read, 20)], [Work(1, 2, 20, 20)]]
    latency = Latency(step=1.0, response=0.1, cached=0.01, prefill=0.001)
    seconds = [5 + 0.7 + 0.81 + 0.02, 1 + 0.2 + 0.2 + 0.02]
    assert [work.seconds(latency) for (work,) in calls] == pytest.approx(seconds)
    assert mean_seconds(calls, latency) == pytest.approx(sum(seconds) / 2)
    longer = with_waiting_time(latency, calls, 10.0)
    assert longer.step == pytest.approx(1 + (20 - sum(seconds)) / 6)
    assert (longer.response, longer.cached, longer.prefill) == (0.1, 0.01, 0.001)


def test_interrupted_response_is_prefilled_again_and_its_cache_is_read():
    from full_size import Engine, Work, simulate

    # The second group is begun early, and the first call ends after 2 steps with the third token of its longer response
    engine = Engine([[9], [2], [4]], prompts=1, slots=3, max_carry_over=1, oversampling=3.0, prompt=10)
    first, second, third = (work for (work,) in simulate([engine], 3))
    assert first == Work(2, 6, 3 * (10 + 11), 30)
    # the first group is due: 7 more tokens; the third ends after 2
    assert second == Work(7, 9, sum(range(12, 19)) + 12 + 13, 2 * 12)
    assert third == Work(0, 0, 0, 0)


def test_engines_that_go_on_together_stop_with_the_last():
    from full_size import Engine, simulate

    def engines():
        lengths = [[[1], [8], [3]], [[6], [1], [1]]]
        return [Engine(each, 1, 2, 2, 2.0, prompt=10) for each in lengths]

    alone = simulate(engines(), 3)
    together = simulate(engines(), 3, together=True)
    assert [[work.steps for work in call] for call in alone] == [[1, 1], [3, 1], [4, 4]]
    # while the first engine is busy, the second one's long response goes on; nothing is left of it after two more steps
    assert [[work.steps for work in call] for call in together] == [[1, 1], [3, 3], [4, 2]]
    assert sum(work.sampled for call in alone for work in call) == sum(w.sampled for c in together for w in c) == 20


# The report


def timed(steps: int, generation: float, whole: float, tokens: int = 64, again: int = 0):
    from prescribed_lengths import EngineWork
    from timed_rollouts import Timed

    work = EngineWork([1] * (steps - 1) + [2], [1e-3] * (steps - 1) + [2e-3], again)
    return Timed(work, 2 * generation, 2 * whole, generation, whole, tokens)


@pytest.fixture
def results():
    """Made-up results of two draws: the start and the end of each run differ from what is between."""
    from cases import Scale
    from rollouts_report import TRL, WAIT, Results
    from timed_rollouts import Kind

    odd = timed(1, 100.0, 100.0)
    skewed = []
    for slower in (1.0, 1.5):
        run = {TRL: [odd, timed(500, 4.0, 12.0)], WAIT: [odd, timed(500, 4.0, 5.0)]}
        for carried, steps, seconds in ((1, 200, 1.0), (2, 125, 0.8), (3, 150, 1.0), (4, 100, 0.5)):
            steady = [timed(steps, seconds * slower, (seconds + 0.2) * slower, again=16)] * (16 - carried - 3)
            run[Kind(carried)] = [odd] * (carried + 2) + steady + [odd]
        skewed.append(run)
    equal = [{WAIT: [odd] + [timed(37, 0.5, 0.9)] * 7, Kind(2): [odd] * 4 + [timed(37, 0.625, 1.0)] * 3 + [odd]}]
    return Results("made up", Scale({"num_hidden_layers": 1, "hidden_size": 1}), skewed, equal)


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


def test_targets_compare_steady_states(results):
    from rollouts_report import targets

    assert [row[1:4] for row in rows(targets(results))] == [
        ["≤ 0.45", "0.40 (0.40–0.40)", "yes"],
        ["≤ 0.28", "0.25 (0.25–0.25)", "yes"],
        ["≤ 0.24", "0.30 (0.30–0.30)", "**no**"],
        ["≥ 2.5", "3.33 (2.67–4.00)", "yes"],
        ["≥ 4", "4.17 (3.33–5.00)", "yes"],
        ["≥ 4.5", "3.33 (2.67–4.00)", "**no**"],
        ["≥ 6", "10.00 (8.00–12.00)", "yes"],
        ["≥ 0.95", "0.80", "**no**"],
    ]


def test_whole_runs_have_their_start_and_end(results):
    from rollouts_report import by_kind

    steady, whole = ({row[0]: row[1:] for row in rows(by_kind(results, steady))} for steady in (True, False))
    assert steady["S = 2"][:3] == ["125", "2%", "0.25"]
    assert steady["S = 2"][3:5] == ["1.00", "1.25"]
    assert whole["S = 2"][0] == f"{(11 * 125 + 5) / 16:.0f}"
    assert whole["S = 2"][3] == f"{(11 * 1.0 + 5 * 100) / 16:.2f}"
    assert steady["TRL's trainer"][-1] == "1.00 (1.00–1.00)"


def test_steady_state_is_whole_periods():
    from timed_rollouts import Kind

    run = list(range(16))
    assert Kind().steady(run) == Kind(trl=True).steady(run) == run[1:]
    assert Kind(1).steady(run) == run[3:15]
    assert Kind(2).steady(run) == run[7:15]
    assert Kind(3).steady(run) == run[5:15]
    assert Kind(2, 1.5).steady(run) == run[7:15]
    assert Kind(2, 3.0).steady(run) == run[9:14]
    assert Kind(2).steady(run[:8]) == run[4:7]  # less than a period


def test_mean_step():
    from rollouts_report import mean_running, step_milliseconds

    rollouts = [timed(1, 1.0, 1.0), timed(3, 1.0, 1.0)]  # steps of (responses, ms): (2, 2); (1, 1), (1, 1), (2, 2)
    assert (mean_running(rollouts), step_milliseconds(rollouts)) == (1.5, pytest.approx(1.5))


# The benchmark itself


@pytest.mark.vllm
def test_all_trainers_generate_and_train_on_the_prescribed_lengths(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--output_dir", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]  # it checks all lengths itself
    text = (tmp_path / "rollouts.md").read_text()
    assert text in done.stdout
    assert "nan" not in text
    assert (tmp_path / "rollouts.png").stat().st_size > 10_000
    steps = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in text.splitlines())}
    assert steps["TRL's trainer"][0] == steps["S = 0"][0] == "40"  # both wait for the longest
