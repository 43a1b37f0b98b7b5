"""The example script on the starter's model in two processes, with the accelerate files that users get: DDP, ZeRO-2,
ZeRO-3 and FSDP2 generate the same responses, log the same numbers, resume exactly and save what others can load."""

import functools
import importlib.util
import json
from collections import Counter

import pytest
import torch
from conftest import logps
from launching import CONFIGS, ON_CPU, launch
from peft import PeftModel
from topologies import EXPECTED, SPLITS_WEIGHTS, assert_same_run, assert_same_steps
from transformers import AutoModelForCausalLM

from tic_grpo_trl.starter import STARTER_MODEL


pytestmark = pytest.mark.distributed

CASES = ["full", "lora"]
REFERENCES = ["full-reference", "lora-reference"]
GROUP = {"full": 16, "lora": 8}
UPDATES = 4  # per rollout


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The folder and the notes by case of a topology, all of whose cases run in one launch, when first asked for."""

    @functools.cache
    def run(name):
        if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed (extra [deepspeed]).")
        folder = tmp_path_factory.mktemp(name)
        references = REFERENCES if name in ("multi_gpu", "zero3") else []
        cases = [*CASES, *(f"{case}-resumed" for case in CASES), *references]
        launch(folder, CONFIGS / f"{name}.yaml", "topology", folder, ",".join(cases), flags=ON_CPU)
        results = json.loads((folder / "result.json").read_text())
        assert sorted(results) == sorted(cases)
        for case, result in results.items():
            assert result["num_processes"] == 2, case
            assert {key: result[key] for key in EXPECTED[name]} == EXPECTED[name], case
            assert result["whole"] == [[], []] if name in SPLITS_WEIGHTS else all(result["whole"]), case
        return folder, results

    return run


@pytest.fixture(params=list(EXPECTED))
def topology(request, run_of):
    return run_of(request.param)


@pytest.fixture
def ddp(run_of):
    return run_of("multi_gpu")


def flat(ranks):
    return [row for rank in ranks for row in rank]


def saved(topology, case):
    return torch.load(topology[0] / case / "result.pt")


@pytest.mark.parametrize("case", CASES)
def test_same_responses_and_numbers_as_ddp(ddp, topology, case):
    result = topology[1][case]
    assert [log["step"] for log in result["logged"]] == list(range(1, 9))
    assert len(result["rollouts"]) == 2
    assert len({tuple(row) for row in flat(result["rollouts"][0])}) > 8  # sampled, not one a prompt
    for log in result["logged"]:
        off_policy = (log["step"] - 1) % UPDATES > 0
        assert log["trajectory_ratio/log_std"] > 1e-3 if off_policy else log["trajectory_ratio/log_std"] == 0
    assert_same_run(result, ddp[1][case])


@pytest.mark.parametrize("case", REFERENCES)
def test_reference_under_zero3_equals_ddp(ddp, run_of, case):
    """β > 0 with a second model, under gradient checkpointing, and with the adapter switched off."""
    result = run_of("zero3")[1][case]
    assert all(log["kl"] > 0 for log in result["logged"] if log["step"] % UPDATES != 1)
    assert result["logged"][0]["kl"] == pytest.approx(0, abs=1e-6)  # it is the model that training starts from
    assert_same_run(result, ddp[1][case])


@pytest.mark.parametrize("case", CASES)
def test_mini_batches_hold_whole_groups_over_the_processes(topology, case):
    result = topology[1][case]
    for number, (rollout, ranks) in enumerate(zip(result["rollouts"], result["partitions"], strict=True)):
        # every generated response is in one mini-batch
        assert Counter(map(tuple, flat(rollout))) == Counter(tuple(row[1]) for row in flat(ranks))
        prompts = []
        for k in range(UPDATES):
            rows = [rank[8 * k : 8 * (k + 1)] for rank in ranks]
            assert [len(rank) for rank in rows] == [8, 8]
            groups = Counter(tuple(row[0]) for row in flat(rows))
            assert list(groups.values()) == [GROUP[case]] * (16 // GROUP[case])
            shared = {tuple(row[0]) for row in rows[0]} & {tuple(row[0]) for row in rows[1]}
            assert len(shared) == (1 if case == "full" else 0)  # a group of 16 is on both processes
            prompts += groups
            # the loss saw these rows, but for those that move no weight
            for rank, trained in zip(rows, result["trained"][number * UPDATES + k], strict=True):
                active = [[row[0], row[1]] for row in rank if row[2] != 0]
                assert sorted(trained) == sorted(active)
        assert len(set(prompts)) == len(prompts)  # no prompt in two mini-batches


@pytest.mark.parametrize("case", CASES)
def test_ratio_metrics_describe_the_rows_of_all_processes(topology, case):
    result = topology[1][case]
    step = 3  # k = 4
    logged, ranks = result["logged"][step], result["ratios"][step]
    log_ratios = [torch.tensor([row[1] for row in rank if row[0]], dtype=torch.float64) for rank in ranks]
    of_all = torch.cat(log_ratios)
    w = of_all.exp()
    expected = {
        "ess": w.sum() ** 2 / (len(w) * w.square().sum()),
        "log_mean": of_all.mean(),
        "log_std": of_all.std(correction=0),
        "log_min": of_all.min(),
        "log_max": of_all.max(),
    }
    for prefix in ("trajectory_ratio", f"trajectory_ratio/inner_{UPDATES}"):
        assert {name: logged[f"{prefix}/{name}"] for name in expected} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, rel=1e-5, abs=1e-7
        )
    for rank in log_ratios:  # one process's own would be another number
        assert abs(rank.mean() - of_all.mean()) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_takes_the_same_steps(topology, case):
    whole, resumed = topology[1][case], topology[1][f"{case}-resumed"]
    assert resumed["rollouts"] == whole["rollouts"][1:]
    assert len(resumed["trained"]) == 4  # steps 5 to 8
    assert_same_steps(resumed["logged"], whole["logged"])
    weights, expected = saved(topology, f"{case}-resumed")["weights"], saved(topology, case)["weights"]
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def loaded(folder, case):
    start = AutoModelForCausalLM.from_pretrained(STARTER_MODEL, dtype=torch.float32)
    if case == "full":
        return AutoModelForCausalLM.from_pretrained(folder / case, dtype=torch.float32), start
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(STARTER_MODEL), folder / case), start


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_saved_folder_is_the_trained_model(topology, case):
    """In plain transformers and peft: the log-probabilities that the processes had together."""
    model, start = loaded(topology[0], case)
    result = saved(topology, case)
    mask = result["batch"]["completion_mask"].bool()
    expected = result["logps"][mask]

    def scored(model):
        return logps(model, result["batch"])[mask]

    assert (scored(start) - expected).abs().max() > 1e-2  # not what training started from
    if case == "full":
        torch.testing.assert_close(scored(model), expected, rtol=0, atol=1e-5)
        return
    torch.testing.assert_close(scored(model.get_base_model()), expected, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(scored(merged), expected, rtol=0, atol=1e-5)


def test_only_the_adapter_moved(topology):
    start = AutoModelForCausalLM.from_pretrained(STARTER_MODEL, dtype=torch.float32).state_dict()
    weights = saved(topology, "lora")["weights"]
    adapters = {name: value for name, value in weights.items() if "lora_" in name}
    assert len(adapters) == 2 * 7 * 3  # A and B of seven projections in three layers
    assert all(value.abs().max() > 0 for name, value in adapters.items() if "lora_B" in name)
    frozen = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): name for name in weights.keys() - adapters
    }
    assert start.keys() <= frozen.keys()
    for name, value in start.items():
        assert torch.equal(weights[frozen[name]], value), name
