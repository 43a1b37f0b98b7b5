"""The benchmark of the update phase compares equal updates and counts correctly. Times are not tested."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "update_phase.py"


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--output_dir", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def rows(report: str, start: str) -> list[list[str]]:
    """Cells of the table rows whose first cell starts with `start`."""
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("|")]
    return [cells for cells in lines if cells[0].startswith(start)]


def test_report_holds_every_case(quick):
    folder, done = quick
    report = (folder / "update_phase.md").read_text()
    assert report in done.stdout
    assert (folder / "growth.png").stat().st_size > 10_000
    for start, count in {
        "authors' lengths / 32": 1,
        "the same, no zero-advantage group": 1,
        "equal lengths": 1,
        "the first case with LoRA": 1,
        "loss without the model": 4,
        "held by autograd": 1,
        "resident memory": 1,
        "the limit": 1,
        "everything else": 1,
        "real tokens": 2,
        "responses of a rollout": 2,
    }.items():
        assert len(rows(report, start)) == count, start
    assert "nan" not in report


def test_report_on_shared_prompts(quick):
    folder, done = quick
    report = (folder / "shared_prompts.md").read_text()
    assert report in done.stdout
    assert (folder / "shared_prompts.png").stat().st_size > 10_000
    (cells,) = rows(report, "16 / 6")
    trl, off, on = (int(number.replace(",", "")) for number in cells[4].split(" / "))
    assert on < off < trl
    trl, off, on = map(int, cells[6].split(" / "))
    assert on <= off < trl
    assert float(re.search(r"to those with sharing: (\S+)\.", report)[1]) <= 1e-4


def test_limit_of_whole_groups_counts_a_prompt_once():
    from cases import QUICK, make_rollout

    rollout = make_rollout(QUICK, [3] * 64, 0)
    batches = rollout.shared_minibatches(seed=0)
    assert [count for count, _ in batches] == [16] * 4
    prompts = sum(len(rollout.prompt_ids[i]) - 1 for i in range(0, 64, 8))
    assert sum(tokens for _, tokens in batches) == prompts + 64 * (3 + 1)


def test_trainers_made_the_same_updates_with_fewer_forwards(quick):
    report = (quick[0] / "update_phase.md").read_text()
    assert "the trainers made the same updates" in report
    for start in ("authors' lengths", "the same, no", "equal lengths", "the first case with LoRA"):
        (cells,) = rows(report, start)
        forwards, positions, difference = cells[-3:]
        trl, ours = map(int, forwards.split(" / "))
        assert ours < trl == 16  # of TRL's, 8 learn and 8 score
        trl, ours = (int(number.replace(",", "")) for number in positions.split(" / "))
        assert ours < trl
        assert float(difference) <= 1e-4
    (cells,) = rows(report, "held by autograd")
    assert float(re.sub(",", "", cells[5])) < float(re.sub(",", "", cells[4]))


@pytest.mark.parametrize(("mean", "longest"), [(37, 562), (6, 60), (2156, 16_384)])
def test_skewed_lengths_are_exact(mean, longest):
    from cases import skewed_lengths

    lengths = skewed_lengths(64, mean, longest)
    assert len(lengths) == 64
    assert sum(lengths) == 64 * mean
    assert sorted(lengths)[-2] < sorted(lengths)[-1] == longest
    assert min(lengths) >= 2
    assert lengths == skewed_lengths(64, mean, longest)


def test_rollout_has_its_zero_advantage_groups():
    from cases import QUICK, make_rollout, skewed_lengths

    rollout = make_rollout(QUICK, skewed_lengths(64, 6, 60), zero_advantage_groups=3)
    rewards = torch.tensor(rollout.rewards).view(8, 8)
    assert (rewards - rewards.mean(1, keepdim=True)).abs().amin(1).tolist() == [0.5] * 5 + [0.0] * 3
    assert max(map(len, rollout.completion_ids[:40])) == 60  # the longest is in an active group
    batches = rollout.active_minibatches(seed=1)
    assert sum(count for count, _ in batches) == 40
    assert sum(tokens for _, tokens in batches) == sum(
        len(rollout.prompt_ids[i]) + len(rollout.completion_ids[i]) for i in range(40)
    )


def test_saved_bytes_counts_each_storage_once_and_forgets_it():
    from measure import SavedBytes

    weight = torch.ones(100, requires_grad=True)
    counter = SavedBytes([weight])
    with counter.counting():
        a = (weight * 2).exp()  # saves its result
        loss = (a.view(10, 10) * a.view(10, 10)).sum()  # saves two views of it
    assert counter.alive == counter.peak == 400
    loss.backward()
    assert counter.alive == 0
