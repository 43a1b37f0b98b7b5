"""Mini-batches, ratio metrics and the table of completions over two real processes (DDP): whole groups, wherever their
rows are, and numbers of all rows, not of one process."""

import json
import math
from collections import Counter

import pytest
import torch
from launching import CONFIGS, ON_CPU, launch


pytestmark = pytest.mark.distributed


def in_two_processes(worker, folder):
    """What a script of tests/workers noted."""
    launch(folder, CONFIGS / "multi_gpu.yaml", worker, folder, flags=ON_CPU)
    result = json.loads((folder / "result.json").read_text())
    assert result["num_processes"] == 2
    # what accelerate makes of MULTI_GPU on CPU: DDP over gloo
    assert result["distributed_type"] == "DistributedType.MULTI_CPU"
    return result


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    result = in_two_processes("ratio_metrics", tmp_path_factory.mktemp("ddp"))
    assert len(result["logged"]) == 4
    return result


def test_partition_by_prompt_over_processes(two_processes):
    prompts = [[p for rank in ranks for p in rank] for ranks in two_processes["prompts"]]  # per mini-batch
    for first, second in (prompts[:2], prompts[2:]):  # the two mini-batches of a rollout
        assert not set(first) & set(second)
        assert len(set(first) | set(second)) == 8
        assert set(Counter(first + second).values()) == {4}


@pytest.fixture(scope="module")
def spanning(tmp_path_factory):
    """Runs in which two rows of a process make half of a group of four in every mini-batch."""
    return in_two_processes("partition", tmp_path_factory.mktemp("partition"))["cases"]


def flat(ranks):
    return [row for rank in ranks for row in rank]


@pytest.mark.parametrize(
    ("case", "mini_batches", "reuse", "rows_of_a_process"),
    [
        ("one micro-batch", 4, 1, 8),
        ("accumulation and reuse", 4, 2, 8),
        ("rollout cut inside a group", 3, 1, 6),
    ],
)
def test_groups_that_span_processes(spanning, case, mini_batches, reuse, rows_of_a_process):
    """No prompt in two mini-batches of a rollout, whole groups over the processes, every row once and unchanged."""
    run = spanning[case]
    windows, rollouts, per_rollout = run["windows"], run["generated"], mini_batches * reuse
    assert run["messages"] == []
    assert len(windows) == len(run["logged"]) == per_rollout * len(rollouts)
    for number, rollout in enumerate(rollouts):
        # the sampler hands the groups out in the order of the processes, where 6 rows are one and a half
        of_all = flat(rollout)
        groups = [[row["prompt"] for row in of_all[i : i + 4]] for i in range(0, len(of_all), 4)]
        assert all(group == [group[0]] * 4 for group in groups)
        assert [len(rank) for rank in rollout] == [rows_of_a_process] * 2

        own = windows[number * per_rollout : (number + 1) * per_rollout]
        used = {row["tag"]: row for row in of_all}
        for first in range(0, per_rollout, mini_batches):
            one_pass = own[first : first + mini_batches]
            assert [[len(rank) for rank in window] for window in one_pass] == [[2, 2]] * mini_batches
            rows = [flat(window) for window in one_pass]
            assert sorted(row["tag"] for window in rows for row in window) == sorted(used)  # every row once
            for window in rows:
                assert len({tuple(row["prompt"]) for row in window}) == 1  # one whole group: four rows
                rewards = [row["completion"].count(1) / 4 for row in window]  # count_a
                mean = sum(rewards) / 4
                assert [row["advantage"] for row in window] == pytest.approx([r - mean for r in rewards], abs=1e-6)
            assert len({tuple(window[0]["prompt"]) for window in rows}) == mini_batches  # disjoint
            for window, first_time in zip(
                rows, own[:mini_batches], strict=True
            ):  # reused with the same ratios' old part
                for row, same in zip(window, flat(first_time), strict=True):
                    assert (row["tag"], row["old"]) == (same["tag"], same["old"])
        for row in (row for window in own for row in flat(window)):
            assert {name: row[name] for name in used[row["tag"]]} == used[row["tag"]]  # what was generated
            assert row["gap"] < 1e-5  # and its old log-probabilities are those of the model that generated it
    for step, entry in enumerate(run["logged"]):
        if step % per_rollout == 0:  # the weights have not moved yet
            assert max(abs(entry["trajectory_ratio/log_min"]), abs(entry["trajectory_ratio/log_max"])) < 1e-5
        else:
            assert entry["trajectory_ratio/log_std"] > 1e-4
    assert run["parameters"][0] == run["parameters"][1]
    assert run["moved"]


def test_exchanged_prompts_are_in_random_order_and_rows_padded(spanning):
    runs = [spanning[case] for case in ("one micro-batch", "accumulation and reuse", "rollout cut inside a group")]
    order = [min(row["tag"] for row in flat(window)) for window in runs[0]["windows"]]
    assert order[:4] != sorted(order[:4])
    assert [tag[1:] for tag in order[:4]] != [tag[1:] for tag in order[4:]]
    # the processes did hold rows of different widths; ids are padded with the pad token
    assert any(a != b for run in runs for a, b in zip(*run["widths"], strict=True))
    assert all(padding == [5] for run in runs for padding in run["padding"])


def test_a_run_resumed_inside_a_rollout_goes_on_with_its_mini_batches(spanning):
    run, whole = spanning["resumed"], spanning["one micro-batch"]
    assert run["generated"] == []
    assert len(run["windows"]) == 2  # of the 8 updates, 6 were done
    for window, expected in zip(run["windows"], whole["windows"][6:], strict=True):
        for mine, theirs in zip(flat(window), flat(expected), strict=True):
            assert {**mine, "gap": 0} == {**theirs, "gap": 0}
    assert run["parameters"] == whole["parameters"]
    assert run["parameters"][0] == run["parameters"][1]


def test_rows_that_cannot_be_exchanged_are_named_and_responses_shuffled(spanning):
    """Only one process holds the obstacle; both take the other path."""
    run = spanning["rows that stay"]
    (message,) = run["messages"]
    assert "pictures cannot be exchanged between processes" in message
    assert "Make per_device_train_batch_size * gradient_accumulation_steps divisible by num_generations" in message
    (rollout,) = run["generated"]
    for rank in range(2):
        stayed = sorted(row["tag"] for window in run["windows"] for row in window[rank])
        assert stayed == sorted(row["tag"] for row in rollout[rank])
    assert any(len({tuple(row["prompt"]) for row in flat(window)}) > 1 for window in run["windows"])
    assert run["parameters"][0] == run["parameters"][1]


def test_ratio_metrics_are_global_over_processes(two_processes):
    """What rank 0 logs is computed from the rows of both."""
    result = two_processes
    for step, (logged, rows) in enumerate(zip(result["logged"], result["rows"], strict=True)):
        assert len(rows) == 2
        log_ratio = torch.tensor([row[1] for rank in rows for row in rank], dtype=torch.float64)
        assert len(log_ratio) == 16
        w = log_ratio.exp()
        assert logged["trajectory_ratio/ess"] == pytest.approx(
            (w.sum() ** 2 / (16 * w.square().sum())).item(), rel=1e-6
        )
        assert logged["trajectory_ratio/log_max"] == pytest.approx(log_ratio.max().item(), rel=1e-6)
        k = step % 2 + 1
        assert logged[f"trajectory_ratio/inner_{k}/log_std"] == pytest.approx(
            log_ratio.std(correction=0).item(), rel=1e-6, abs=1e-12
        )
        if k == 2:  # the ranks hold different rows, so one rank's figure would be wrong
            assert [row[1] for row in rows[0]] != [row[1] for row in rows[1]]


@pytest.mark.parametrize("case", ["groups on a process", "groups on both"])
def test_table_of_completions_shows_every_sample_its_own_ratio(two_processes, case):
    """Wherever its row was trained on: a text's ratio is that of its tokens."""
    run = two_processes["cases"][case]
    assert len(run["tables"]) == len(run["rows"]) == 4
    for step, table in enumerate(run["tables"]):
        assert len(table) == 32
        first = step - step % 2  # of the rollout
        ratios = {}
        for k in range(first, step + 1):
            columns = (flat(run[name][k]) for name in ("prompts", "completions", "rows"))
            ratios |= {(prompt, text): math.exp(row[1]) for prompt, text, row in zip(*columns, strict=True)}
        shown = {(prompt, text): ratio for prompt, text, ratio in table if not math.isnan(ratio)}
        assert shown == pytest.approx(ratios, rel=1e-3)
        assert sum(not math.isnan(ratio) for *_, ratio in table) == 16 * (step - first + 1)
        if step > first:
            assert len(set(shown.values())) > 4
