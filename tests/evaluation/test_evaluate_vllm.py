"""Evaluation with a real vLLM engine against transformers: the same greedy answers, the same accuracy within its error.
Needs the environment of `make test-vllm`."""

import json

import pytest
from workers.vllm_records import run

from tic_grpo_trl.evaluation import EvaluationConfig, evaluate


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    run(folder, "vllm_evaluate.py", seconds=500)
    return folder


def samples_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def by_transformers(folder, **settings) -> tuple[dict, list[dict]]:
    result = evaluate(EvaluationConfig(backend="transformers", output_dir=str(folder), **settings))
    return result["sets"]["starter"], samples_of(folder)


def test_greedy_answers_are_those_of_transformers(folder, tmp_path):
    _, expected = by_transformers(tmp_path, limit=60, k=1, temperature=0.0)
    assert samples_of(folder / "greedy") == expected
    assert len({sample["completion"] for sample in expected}) > 10


def test_accuracy_agrees_within_sampling_error(folder, tmp_path):
    one, _ = by_transformers(tmp_path, limit=100, seed=3)
    result = json.loads((folder / "sampled/results.json").read_text())
    other = result["sets"]["starter"]
    error = (one["sampling_error"] ** 2 + other["sampling_error"] ** 2) ** 0.5
    assert 0 < error < 0.05
    assert abs(one["average"] - other["average"]) < 3 * error
    assert abs(one["mean_tokens"] - other["mean_tokens"]) < 1.5
    assert result["settings"]["backend"] == "vllm"


def test_samples_differ_but_not_with_the_batches(folder):
    """Each row has a seed of its own."""
    samples = samples_of(folder / "sampled")
    assert samples == samples_of(folder / "sampled, other batches")
    several = [len({s["completion"] for s in samples[i : i + 4]}) for i in range(0, 400, 4)]
    assert sum(several) / 100 > 2
