"""Two processes decide for a mini-batch what a single one would that has the responses of both, also where one of them
has nothing to compute."""

import functools
import importlib.util
import math

import pytest
import torch
from launching import CONFIGS, ON_CPU, launch
from topologies import EXPECTED, SPLITS_WEIGHTS

from tic_grpo_trl.loss.mini_batch_rules import adaptive_cap, minimum_variance_advantages
from tic_grpo_trl.metrics.ratios import effective_sample_size


pytestmark = pytest.mark.distributed

CASES = ("adaptive", "prefix", "vcpo")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    @functools.cache
    def run(name):
        if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed (extra [deepspeed]).")
        folder = tmp_path_factory.mktemp(name)
        launch(folder, CONFIGS / f"{name}.yaml", "mini_batch", folder, flags=ON_CPU)
        results = torch.load(folder / "result.pt", weights_only=False)
        assert sorted(results) == sorted(CASES)
        for result in results.values():
            assert result["num_processes"] == 2
            assert {key: result[key] for key in EXPECTED[name]} == EXPECTED[name]
            assert result["whole"] == [[], []] if name in SPLITS_WEIGHTS else all(result["whole"])
        return results

    return run


@pytest.fixture(params=["multi_gpu", "zero3"])
def topology(request, run_of):
    return run_of(request.param)


def responses_of(ranks):
    """The responses of all processes that have tokens: token log-ratios, advantage, group and shift."""
    every = [response for rank in ranks for response in rank["responses"]]
    return [(ratio[mask.bool()].double(), *(float(x) for x in rest)) for ratio, mask, *rest in every if mask.any()]


@pytest.mark.parametrize("case", ["adaptive", "prefix"])
def test_the_cap_is_that_of_the_responses_of_both(topology, case):
    result, differs, idle = topology[case], 0, 0
    assert len(result["decided"]) == len(result["logged"]) == (4 if case == "prefix" else 8)
    for ranks, log in zip(result["decided"], result["logged"], strict=True):
        active = [(ratio, advantage) for ratio, advantage, *_ in responses_of(ranks) if advantage]
        if not active:
            assert "update/cap" not in log
            continue
        lengths = torch.tensor([len(ratio) for ratio, _ in active]).unsqueeze(1)
        mask = torch.arange(int(lengths.max())) < lengths
        sums = [ratio.cumsum(0) if case == "prefix" else ratio.sum().view(1) for ratio, _ in active]
        weights = torch.nn.utils.rnn.pad_sequence(sums, batch_first=True)
        cap = adaptive_cap(weights, torch.tensor([advantage for _, advantage in active]), mask, 20.0)
        for rank in ranks:
            assert float(rank["log_cap"]) == pytest.approx(float(cap), abs=1e-5)
        assert log["update/cap"] == pytest.approx(math.exp(cap), rel=1e-4)
        alone = [[a for _, a, *_ in responses_of([rank]) if a] for rank in ranks]
        idle += not all(alone)
        differs += float(weights.max()) > float(cap) + 1e-6
    assert differs
    assert idle or case == "prefix"
    assert any(ranks[0]["passes"] > 1 for ranks in result["decided"])


def test_baseline_and_learning_rate_are_those_of_the_responses_of_both(topology):
    result, factors = topology["vcpo"], []
    for ranks, log in zip(result["decided"], result["logged"], strict=True):
        counted = [response for response in responses_of(ranks) if response[2] >= 0]
        if not counted:
            assert "update/learning_rate_factor" not in log
            continue
        ratios, advantages, groups, shifts = zip(*counted, strict=True)
        assert len(set(groups)) == 1
        assert len(groups) == 8
        totals = torch.stack([ratio.sum() for ratio in ratios])
        lengths = torch.tensor([len(ratio) for ratio in ratios])
        values = torch.tensor(advantages), totals, lengths, torch.tensor(groups)
        expected = minimum_variance_advantages(*values) - values[0]
        torch.testing.assert_close(torch.tensor(shifts), expected, rtol=1e-4, atol=1e-5)
        factors.append(log["update/learning_rate_factor"])
        assert factors[-1] == pytest.approx(float(effective_sample_size(totals).sqrt()), rel=1e-5)
    assert min(factors) < 0.99


@pytest.mark.parametrize("case", CASES)
def test_the_schedule_goes_on_unscaled(topology, case):
    for rates in topology[case]["rates"]:
        for step, groups in enumerate(rates):
            assert groups == pytest.approx([0.2 * (1 - step / len(rates))] * len(groups))


@pytest.mark.parametrize("case", CASES)
def test_all_topologies_end_with_the_same_weights(topology, run_of, case):
    """DeepSpeed steps within the backward pass, the others after it."""
    expected = run_of("multi_gpu")[case]["weights"]
    assert expected
    assert topology[case]["weights"].keys() == expected.keys()
    for name, value in topology[case]["weights"].items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)
