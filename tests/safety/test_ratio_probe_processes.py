"""Two real processes: both make the same passes, one warns, the figure is of both's responses."""

import importlib.util
import json
import re

import pytest
from launching import CONFIGS, ON_CPU, launch


pytestmark = pytest.mark.distributed

EXPECTED = {
    # what accelerate makes of MULTI_GPU on CPU: DDP over gloo
    "multi_gpu": ("DistributedType.MULTI_CPU", None, ["sampling", "dropout", "precision"]),
    "zero3": ("DistributedType.DEEPSPEED", 3, ["sampling", "dropout"]),
}
FIGURE = {
    "sampling": r"On (\d+) tokens of the first rollout it gives a token (\S+) times",
    "dropout": r"is (\S+) nats \(rms\) over (\d+) responses",
    "precision": r"it is (\S+) nats \(rms\) over (\d+) responses",
}


@pytest.mark.parametrize("topology", EXPECTED)
def test_both_processes_measure_and_one_warns(tmp_path, topology):
    if topology == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (extra [deepspeed]).")
    kind, stage, cases = EXPECTED[topology]
    launch(tmp_path, CONFIGS / f"{topology}.yaml", "ratio_probe", tmp_path, *cases, flags=ON_CPU)
    results = json.loads((tmp_path / "result.json").read_text())
    for case in cases:
        result, plain = results[case], results[f"{case}, not measured"]
        for each in (result, plain):
            assert (each["num_processes"], each["distributed_type"], each["zero_stage"]) == (2, kind, stage)
            assert stage is None or each["whole"] == [[], []]
        assert [len(messages) for messages in result["warned"]] == [1, 0]
        first, second = re.search(FIGURE[case], result["warned"][0][0]).groups()
        lengths = result["lengths"]
        assert lengths[0] != lengths[1]
        if case == "sampling":  # every other one of 16 responses
            assert int(first) == sum(sum(of_rank[::2]) for of_rank in lengths)
            assert float(second) > 1.05
        else:
            assert int(second) == 32
            assert float(first) > 0.05
        if case == "precision":
            assert result["noise"][0] == result["noise"][1] == pytest.approx(float(first), rel=0.1)
        # what follows is the same run
        assert plain["warned"] == [[], []]
        assert plain["lengths"] == lengths
        if topology != "zero3" or case != "dropout":
            assert result["sum"] == pytest.approx(plain["sum"], rel=1e-12)
