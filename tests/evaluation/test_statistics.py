"""Avg@k against counts by hand, the run folder, the table and the settings: all without a model."""

import json
import math
import random

import pytest

from tic_grpo_trl.evaluation import (
    EvaluationConfig,
    average_at_k,
    paired_difference,
    problem_interval,
    read_results,
    results_table,
)
from tic_grpo_trl.evaluation.config import set_name
from tic_grpo_trl.evaluation.run_folder import SampleStore
from tic_grpo_trl.starter import TASKS


# Avg@k


def test_average_by_hand():
    """Three problems, four samples: 3, 0 and 2 right."""
    average = average_at_k({"a": [1, 0, 1, 1], "b": [0, 0, 0, 0], "c": [1, 1, 0, 0]})
    assert average.means == {"a": 0.75, "b": 0.0, "c": 0.5}
    assert average.value == pytest.approx(5 / 12)
    assert (average.problems, average.excluded) == (3, 0)
    # variances of the samples: 1/4, 0, 1/3; of their means a quarter of that; of the mean of three a ninth of the sum
    assert average.sampling_error == pytest.approx(math.sqrt((1 / 4 + 0 + 1 / 3) / 4 / 9))
    # of the means: 7/48, where single answers would have 5/12 · 7/12 · 3/2; so m = 3 · 2.5 = 7.5 observations
    assert average.interval == pytest.approx((0.15658, 0.73320), abs=2e-5)


def test_greedy_average_is_a_plain_proportion():
    """Wilson's interval from the literature: 5 of 10 is 0.2366 to 0.7634, 0 of 10 is 0 to 0.2775."""
    half = average_at_k({str(i): [i % 2] for i in range(10)})
    assert half.value == 0.5
    assert half.sampling_error is None  # greedy answers have none
    assert half.interval == pytest.approx((0.2366, 0.7634), abs=5e-5)
    none = average_at_k({str(i): [0] for i in range(10)})
    assert none.interval == pytest.approx((0, 0.2775), abs=5e-5)


def test_samples_of_a_problem_are_not_independent():
    """More samples that all agree say nothing of other problems; samples that differ as much as any do."""
    agreeing = average_at_k({str(i): [i % 2] * 32 for i in range(10)})
    assert agreeing.interval == average_at_k({str(i): [i % 2] for i in range(10)}).interval
    assert agreeing.sampling_error == 0
    alike = average_at_k({str(i): [0, 1] * 16 for i in range(10)})
    assert alike.interval == pytest.approx(problem_interval([i % 2 for i in range(320)], 1))


def test_interval_covers():
    """Of problems as hard as AIME's for a model that solves one in ten, most of them never."""
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        chances = [rng.betavariate(0.3, 0.6) for _ in range(30)]
        low, high = problem_interval([sum(rng.random() < chance for _ in range(8)) / 8 for chance in chances], 8)
        covered += low <= 1 / 3 <= high
    assert 0.91 < covered / 400 < 0.98


def test_problems_that_cannot_be_scored_are_left_out():
    average = average_at_k({"a": [1, 1], "b": [None, None], "c": [0, None], "d": [0, 1]})
    assert (average.problems, average.excluded) == (2, 2)
    assert average.value == 0.75
    assert set(average.means) == {"a", "d"}
    with pytest.raises(ValueError, match="none of 1 problems could be scored"):
        average_at_k({"a": [None]})
    with pytest.raises(ValueError, match="different numbers of samples"):
        average_at_k({"a": [1, 1], "b": [1]})
    with pytest.raises(ValueError, match="rewards from 0 to 1"):
        average_at_k({"a": [1.5]})


def test_paired_difference_by_hand():
    """Differences 1/4, -1/4, 1/4: mean 1/12, variance 1/12, standard error 1/6."""
    mean, interval = paired_difference({"a": 0.75, "b": 0, "c": 0.5, "x": 1}, {"a": 0.5, "b": 0.25, "c": 0.25, "y": 1})
    assert mean == pytest.approx(1 / 12)
    assert interval == pytest.approx((1 / 12 - 1.96 / 6, 1 / 12 + 1.96 / 6), abs=1e-4)
    assert paired_difference({"a": 1}, {"a": 0}) == (1, None)
    with pytest.raises(ValueError, match="no problem in common"):
        paired_difference({"a": 1}, {"b": 1})


# The run folder


def sample(i):
    return {"set": "s", "problem": str(i), "reward": 1.0}


def test_store_keeps_whole_batches_only(tmp_path):
    store = SampleStore(tmp_path, {"seed": 0}, [2, 2, 1])
    store.add([sample(0), sample(1)])
    store.add([sample(2), sample(3)])
    text = (tmp_path / "samples.jsonl").read_text()
    whole = text.splitlines(keepends=True)
    for kept, left in ((4, text), (2, text[:-1]), (2, "".join(whole[:3])), (0, whole[0]), (0, "")):
        (tmp_path / "samples.jsonl").write_text(left)
        again = SampleStore(tmp_path, {"seed": 0}, [2, 2, 1])
        assert again.samples == [sample(i) for i in range(kept)]
        assert again.batches_done == kept // 2
        assert (tmp_path / "samples.jsonl").read_text() == "".join(whole[:kept])
    again.add([sample(0), sample(1)])
    assert (tmp_path / "samples.jsonl").read_text() == "".join(whole[:2])


def test_store_refuses_other_settings(tmp_path):
    settings = {"seed": 0, "sets": {"aime24": {"k": 32}}}
    SampleStore(tmp_path, settings, [1])
    other = {"seed": 0, "sets": {"aime24": {"k": 16}, "math500": {"k": 1}}}
    with pytest.raises(ValueError, match=r"other settings \(sets.aime24.k: 32, now 16; sets.math500: None, now"):
        SampleStore(tmp_path, other, [1])
    SampleStore(tmp_path, settings, [1])
    (tmp_path / "settings.json").unlink()
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="samples without settings"):
        SampleStore(tmp_path, settings, [1])


# The table


def result(name, **sets):
    return {"name": name, "sets": {key: summary(*value) for key, value in sets.items()}}


def summary(k, *means):
    return {
        "average": sum(means) / len(means),
        "metric": f"Avg@{k}",
        "interval": [0.05, 0.25],
        "sampling_error": 0.01 if k > 1 else None,
        "problems": len(means),
        "excluded": 1,
        "k": k,
        "truncated": 0.125,
        "mean_tokens": 1234.56,
        "means": {str(i): mean for i, mean in enumerate(means)},
    }


def test_table_1():
    table = results_table(
        [
            result("GRPO", aime24=(32, 0.0, 0.1834), math500=(1, 1.0, 0.0, 1.0)),
            result("TIC-GRPO", aime24=(32, 0.0, 0.2354), aime25=(32, 0.0698)),
        ]
    )
    first, second = table.split("\n\n")
    assert first.splitlines() == [
        "| Method | AIME24 | AIME25 | MATH500 | LiveCodeBench |",
        "| --- | --- | --- | --- | --- |",
        "|  | (Avg@32) | (Avg@32) | (Avg@1) | (Avg@1) |",
        "| GRPO | 9.17 | – | 66.67 | – |",
        "| TIC-GRPO | 11.77 (+2.60) | 6.98 | – | – |",
    ]
    rows = [line.strip("| ").split(" | ") for line in second.splitlines()]
    assert rows[0][6] == "Difference from GRPO, paired 95 %"
    assert rows[2][1:] == ["AIME24", "2 × 32", "9.17", "5.00 to 25.00", "1.96", "–", "1", "12.5 %", "1234.6"]
    # differences 0 and 5.2 points: mean 2.6, standard error 2.6
    assert rows[4][6] == "+2.60 (-2.50 to +7.70)"
    assert rows[3][5] == "–"  # greedy
    assert rows[5][6] == "–"  # the baseline has no such set


def test_table_with_other_sets_and_other_k():
    table = results_table([result("m", aime24=(4, 0.5), starter=(4, 0.25))])
    assert table.splitlines()[0] == "| Method | AIME24 | AIME25 | MATH500 | LiveCodeBench | starter |"
    assert table.splitlines()[2] == "|  | (Avg@4) | (Avg@32) | (Avg@1) | (Avg@1) | (Avg@4) |"
    assert table.splitlines()[3] == "| m | 50.00 | – | – | – | 25.00 |"
    both = results_table([result("m", aime24=(32, 0.5)), result("n", aime24=(4, 0.25))])
    assert both.splitlines()[0] == "| Method | AIME24 | AIME24 | AIME25 | MATH500 | LiveCodeBench |"
    assert both.splitlines()[4] == "| n | – | 25.00 | – | – | – |"


def test_without_a_set_of_table_1_there_are_no_columns_for_them():
    table = results_table([result("m", starter=(4, 0.25)), result("n", starter=(4, 0.5), mine=(1, 1.0))])
    assert table.split("\n\n")[0].splitlines() == [
        "| Method | starter | mine |",
        "| --- | --- | --- |",
        "|  | (Avg@4) | (Avg@1) |",
        "| m | 25.00 | – |",
        "| n | 50.00 (+25.00) | 100.00 |",
    ]
    assert results_table([result("m")]).startswith("| Method |\n")


def test_results_of_one_name_are_one_row(tmp_path):
    for i, one in enumerate((result("a", aime24=(32, 0.5)), result("a", livecodebench=(1, 1.0)), result("b"))):
        (tmp_path / f"{i}.json").write_text(json.dumps(one))
    merged = read_results([str(tmp_path / f"{i}.json") for i in range(3)])
    assert [(one["name"], list(one["sets"])) for one in merged] == [("a", ["aime24", "livecodebench"]), ("b", [])]
    with pytest.raises(ValueError, match="two results named a have aime24"):
        read_results([str(tmp_path / "0.json")] * 2)
    with pytest.raises(ValueError, match=r"--table .*nothing.json: give the results.json"):
        read_results([str(tmp_path / "nothing.json")])


# Settings


def test_the_papers_protocol():
    config = EvaluationConfig(datasets=["aime24@copy.parquet", "aime25", "math500", "livecodebench", "starter"])
    protocols = [config.protocol(set_name(dataset)) for dataset in config.datasets]
    assert [p.k for p in protocols] == [32, 32, 1, 1, 4]
    assert [p.sampling.temperature for p in protocols] == [1, 1, 0, 0, 1]
    assert {p.sampling.top_p for p in protocols} == {1}
    assert {p.sampling.max_completion_length for p in protocols[:4]} == {18_000}
    asked = EvaluationConfig(datasets=["math500"], k=4, temperature=0.6, top_p=0.95, max_completion_length=100)
    protocol = asked.protocol("math500")
    assert (protocol.k, *vars(protocol.sampling).values()) == (4, 0.6, 0.95, 100)


def test_names():
    assert [set_name(name) for name in ("aime24@copies/a.parquet", "data/sums.jsonl", "owner/my.set", "math500")] == [
        "aime24",
        "sums",
        "my.set",
        "math500",
    ]
    config = EvaluationConfig(model_name_or_path="runs/qwen3/")
    assert (config.name, config.output_dir) == ("qwen3", "runs/evaluation/qwen3")
    assert EvaluationConfig().name == "starter"


@pytest.mark.parametrize(
    ("datasets", "task"),
    [(["starter"], "starter"), (["long_tail"], "long_tail"), (["few_shot_sums"], "starter"), (["math500"], "starter")],
)
def test_the_default_model_is_that_of_the_task(datasets, task):
    config = EvaluationConfig(datasets=datasets)
    assert (config.model_name_or_path, config.name) == (TASKS[task].model, task)
    assert EvaluationConfig("runs/qwen3", datasets).model_name_or_path == "runs/qwen3"
    assert EvaluationConfig(datasets=["data/long_tail.jsonl"]).model_name_or_path == TASKS["starter"].model


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"datasets": ["aime24"], "temperature": 0}, "aime24: k = 32 greedy samples .* all the same"),
        ({"datasets": ["math500"], "k": 8}, "math500: k = 8 greedy samples .* give --temperature 1, or --k 1"),
        ({"datasets": ["math500"], "top_p": 0.9}, "--top_p 0.9 has no effect at temperature 0"),
        ({"temperature": -1}, "--temperature -1"),
        ({"top_p": 0}, "--top_p 0"),
        ({"k": 0}, "--k 0: give at least 1"),
        ({"limit": -3}, "--limit -3"),
        ({"datasets": []}, "--datasets : give at least one set"),
        (
            {"datasets": ["starter", "long_tail"]},
            "--datasets starter long_tail: .* give only one of them",
        ),
        ({"datasets": ["aime24", "aime24@copy.parquet"]}, "each set once"),
    ],
)
def test_settings_that_make_no_sense(settings, says):
    with pytest.raises(ValueError, match=says):
        EvaluationConfig(**settings)
