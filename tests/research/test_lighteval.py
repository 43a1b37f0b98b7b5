"""Evaluation by lighteval: its command, what is read from its files, and, where it is installed, a real run."""

import json
import os
from pathlib import Path

import pytest
from launching import ROOT

from research.lighteval.runs import LightevalConfig, evaluate_by_lighteval
from tic_grpo_trl.evaluation import EvaluationConfig, evaluate
from tic_grpo_trl.starter import STARTER_MODEL, exact_match_reward, make_dataset


LIGHTEVAL = Path(os.environ.get("LIGHTEVAL", ROOT / ".venv-lighteval/bin/lighteval"))


def test_command(tmp_path):
    config = LightevalConfig(
        "org/qwen3", tasks=["livecodebench=lcb:codegeneration_release_v6", "gpqa=gpqa:diamond"], limit=5
    )
    kept = f"cache_dir={tmp_path}/cache"
    answers = "generation_parameters={temperature:0,max_new_tokens:18000}"
    assert config.command(tmp_path) == [
        "lighteval",
        "accelerate",
        f"model_name=org/qwen3,dtype=bfloat16,{kept},batch_size=1,{answers}",
        "lcb:codegeneration_release_v6|0,gpqa:diamond|0",
        *f"--output-dir {Path.cwd()}/runs/evaluation/qwen3-lighteval --save-details --max-samples 5".split(),
    ]
    by_vllm = LightevalConfig(STARTER_MODEL, backend="vllm", max_length=20_000).command(tmp_path)
    assert by_vllm[1:3] == ["vllm", f"model_name=model,dtype=bfloat16,{kept},max_model_length=20000,{answers}"]
    assert (tmp_path / "model").resolve() == Path(STARTER_MODEL)


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="--tasks aime24: give SET=TASK"):
        LightevalConfig("m", tasks=["aime24"])
    for program, says in (("no-such-lighteval", "no such program"), ("false", "exited with status 1")):
        with pytest.raises(ValueError, match=says):
            evaluate_by_lighteval(LightevalConfig("m", lighteval=program, output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="lighteval wrote 0 details files"):
        evaluate_by_lighteval(LightevalConfig("m", lighteval="true", output_dir=str(tmp_path)))
    assert not (tmp_path / "results.json").exists()


@pytest.mark.skipif(not LIGHTEVAL.exists(), reason="needs lighteval's own environment")
def test_lighteval_and_transformers_agree_on_greedy_answers(tmp_path, monkeypatch):
    problems = make_dataset("test", 30)
    rows = [{"problem": row["prompt"][0]["content"], "answer": row["solution"]} for row in problems]
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums/test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("SUMS", str(tmp_path / "sums"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = LightevalConfig(
        STARTER_MODEL,
        tasks=["starter=sums"],
        name="starter",
        lighteval=str(LIGHTEVAL),
        dtype="float32",
        max_completion_length=48,
        max_length=256,
        batch_size=30,
        custom_tasks=str(ROOT / "tests/workers/lighteval_sums.py"),
        output_dir=str(tmp_path / "lighteval"),
    )
    files = set(Path(STARTER_MODEL).rglob("*"))
    result = evaluate_by_lighteval(config)
    assert set(Path(STARTER_MODEL).rglob("*")) == files  # answers kept there would outlive the weights
    own = EvaluationConfig(limit=30, k=1, temperature=0, output_dir=str(tmp_path / "own"))
    expected = evaluate(own)["sets"]["starter"]

    def samples(folder):
        return [json.loads(line) for line in (tmp_path / folder / "samples.jsonl").read_text().splitlines()]

    theirs, ours = samples("lighteval"), samples("own")
    assert [s["completion"] for s in theirs] == [s["completion"] for s in ours]
    assert [s["prompt"] for s in theirs] == [s["prompt"][0]["content"] for s in ours]
    right = exact_match_reward([s["completion"] for s in theirs], list(problems["solution"]))
    assert [s["reward"] for s in theirs] == right
    one = result["sets"]["starter"]
    assert 0 < one["average"] < 1
    for name in ("average", "interval", "metric", "problems", "k"):
        assert one[name] == expected[name], name
    assert f"{100 * one['average']:.2f}" in (tmp_path / "lighteval/table.md").read_text()
