"""In a long run memory and step time stay flat, nothing accumulates, and the disk holds the requested checkpoints."""

import json
import math
import sys
from itertools import pairwise
from statistics import fmean, median

import pytest
from launching import ROOT, finish, started


STEPS = 2000
# Bytes of memory per step, beyond what was logged: 1 KiB is 10 MB in a run of 10,000 updates.
MEMORY_PER_STEP = 1024

pytestmark = pytest.mark.slow


def by(name):
    return lambda sample: sample[name]


def slope(samples, value) -> tuple[float, float]:
    """Fit a value's change per step by least squares, with its standard error."""
    steps, values = [sample["step"] for sample in samples], [value(sample) for sample in samples]
    mean_step, mean = fmean(steps), fmean(values)
    spread = sum((step - mean_step) ** 2 for step in steps)
    rise = sum((step - mean_step) * (v - mean) for step, v in zip(steps, values, strict=True)) / spread
    rest = sum((v - mean - rise * (step - mean_step)) ** 2 for step, v in zip(steps, values, strict=True))
    return rise, math.sqrt(rest / (len(steps) - 2) / spread)


@pytest.fixture(scope="module")
def soak(tmp_path_factory):
    """K = 4, two responses per update; the first half warms up caches and the allocator."""
    folder = tmp_path_factory.mktemp("soak")
    (folder / "tmp").mkdir()
    # One arena, and a fixed size from which blocks are mapped on their own. Otherwise that size grows, and large blocks
    # fragment the heap, by an amount that depends on the paths of the environment. Python's own allocator takes memory
    # by the megabyte, which is a slope of 1,000 bytes per step if it happens once more.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONMALLOC": "malloc"}
    environment = {"TMPDIR": str(folder / "tmp"), **allocator}
    command = [sys.executable, ROOT / "tests/workers/soak.py", folder, STEPS]
    with started(command, folder / "log.txt", **environment) as process:
        finish(process, folder / "log.txt", seconds=1500)
    noted = json.loads((folder / "soak.json").read_text())
    logged = 0
    for sample in noted["samples"]:
        logged += sample["logged"]
        sample["all_logged"] = logged
    return noted


@pytest.fixture
def second_half(soak):
    return [sample for sample in soak["samples"] if sample["step"] > STEPS // 2]


def test_every_update_was_made_and_logged(soak):
    assert soak["updates"] == list(range(1, STEPS + 1))
    assert soak["rollouts"] == list(range(1, STEPS + 1, 4))
    assert max(soak["metrics"][-100:]) == max(soak["metrics"])  # the last updates had as much to do as the first


def test_memory_is_flat(second_half):
    """Beyond `log_history`, which transformers keeps: its bytes are known."""
    per_step, error = slope(second_half, lambda sample: sample["memory"] - sample["all_logged"])
    logged, _ = slope(second_half, by("all_logged"))
    print(f"memory: {per_step:.0f} ± {error:.0f} bytes per step beyond {logged:.0f} logged")
    assert per_step - 2 * error < MEMORY_PER_STEP


def test_peak_memory_is_flat(soak):
    """With what the allocator keeps: the text of all that was logged, which every save writes, makes the peaks."""
    samples = soak["samples"]
    quarter = len(samples) // 4
    before, after = (
        max(sample["all_memory"] for sample in part) for part in (samples[quarter : 2 * quarter], samples[-quarter:])
    )
    print(f"peak memory: {before / 1e6:.0f} MB in the second quarter, {after / 1e6:.0f} MB in the last")
    assert after < 1.05 * before


def test_nothing_is_kept(second_half):
    """Count the living objects, which shows leaks such as one small tensor per step better than memory does."""
    counted = [sample for sample in second_half if "objects" in sample]
    assert len(counted) >= 5
    for kind in ("tensors", "objects"):
        per_step, error = slope(counted, by(kind))
        print(f"{kind}: {per_step:.4f} ± {error:.4f} per step")
        assert per_step - 2 * error < 0.125, kind  # half an object per rollout
    assert second_half[-1]["files"] <= second_half[0]["files"]


def test_step_time_is_flat(soak):
    """Processor time, not the clock: another process on the machine changes the clock."""
    samples = soak["samples"]
    times = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(samples)]
    quarter = len(times) // 4
    before, after = median(times[quarter : 2 * quarter]), median(times[-quarter:])
    print(f"step: {1000 * before:.1f} ms in the second quarter, {1000 * after:.1f} ms in the last")
    assert after < 1.5 * before


def test_disk_holds_two_checkpoints_of_one_size(soak):
    every = STEPS // 10 - 2
    for index, save in enumerate(soak["saves"]):
        newest = [f"checkpoint-{min(every * (index + 1 - back), STEPS)}" for back in (1, 0) if index >= back]
        assert save["checkpoints"] == newest
    early, late = soak["saves"][: len(soak["saves"]) // 2], soak["saves"][len(soak["saves"]) // 2 :]
    assert max(size for save in late for size in save["state"]) <= 1.1 * max(
        size for save in early for size in save["state"]
    )


def test_logs_grow_by_what_is_logged_and_no_other_file_does(soak):
    first, middle, last = (soak["saves"][index] for index in (0, len(soak["saves"]) // 2, -1))
    assert first["rest"] == last["rest"] == ["README.md", "_training.lock", "completions", "runs"]
    assert last["temporary"] <= first["temporary"]
    for name in ("tables", "events", "history"):
        early, late = ((b[name] - a[name]) / (b["step"] - a["step"]) for a, b in ((first, middle), (middle, last)))
        print(f"{name}: {late:.0f} bytes per step")
        assert late < 1.1 * early, name
