"""Training processes that are killed, and comparisons of their results, for test_resume_killed.py and
test_resume_processes.py."""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy
import torch
from launching import ROOT, free_port, launch_command, started
from pyarrow import parquet
from safetensors.torch import load_file


PATIENCE = 240  # seconds
BEFORE_STEPS = ("start", "loading")
NOT_COMPARED = (
    *("training_args.bin", "manifest.json", "summary.json", "README.md", "curves.png"),  # paths and times
    "tokenizer.json",  # says how the process has padded last, if it has
)
# Which entries of a log are measured times
TIMES = ("runtime", "per_second", "step_time")


def even_letters(completions, **kwargs):
    """Reward the share of letters with an even code, which varies even if little is learned."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(ord(letter) % 2 == 0 for letter in text) / max(len(text), 1) for text in texts]


def draw(chance: random.Random, steps: int, save_steps: int, counts: dict[str, int]) -> list["Moment"]:
    """Draw `counts` random moments of every kind, in the order in which a run of `steps` steps meets them."""
    of_kind = {
        "start": range(steps - 1),
        "step": range(steps - 1),
        "update": range(1, steps - 1),
        "saving": range(save_steps, steps - 1, save_steps),
    }
    moments = [
        Moment(chance.choice(of_kind[kind]), kind, chance.random()) for kind, n in counts.items() for _ in range(n)
    ]
    return sorted(moments, key=lambda moment: moment.step)


def is_kind(phase: str, kind: str) -> bool:
    """`update_3` is an `update`."""
    return phase.partition("_")[0] == kind


@dataclass
class Moment:
    """Kill a run when `share` of a phase's time is over: of the first phase of that name after `step` steps. The phase
    `step` is a whole step until the next one, `start` is all before the first."""

    step: int
    phase: str
    share: float

    def has_come(self, step: int, phase: str) -> bool:
        """Check whether the phase has begun, or a later one of that name."""
        named = is_kind(phase, self.phase) or (self.phase == "step" and phase not in BEFORE_STEPS)
        return self.phase == "start" or (step >= self.step and named)

    def delay(self, times: list[tuple[int, str, float]]) -> float:
        """Return the seconds until the kill, given when a whole run entered which phase."""
        if self.phase in ("start", "step"):
            first = {}
            for step, phase, at in times:
                if phase not in BEFORE_STEPS:
                    first.setdefault(step, at)
            began = 0.0 if self.phase == "start" else first[self.step]
            return self.share * (first[0 if self.phase == "start" else self.step + 1] - began)
        spent = [end - at for (_, phase, at), (*_, end) in pairwise(times) if is_kind(phase, self.phase)]
        return self.share * sum(spent) / len(spent)


class Job:
    """A run of the training script in one or more forked processes."""

    def __init__(self, folder: Path, flags: list, processes: int, environment: dict[str, str]):
        self.folder, self.ranks = folder, range(processes)
        folder.mkdir()
        # the launcher's own store holds what the processes before these have left there
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": free_port()}
        (folder / "new.json").write_text(json.dumps({"flags": [*map(str, flags)], "environment": environment}))
        (folder / "new.json").rename(folder / "job.json")
        self.pids = [int(self._read("pid", rank)) for rank in self.ranks]

    def _read(self, name: str, rank: int) -> str:
        """Wait for a file of a process."""
        path, latest = self.folder / f"{name}-{rank}", time.monotonic() + PATIENCE
        while not (path.exists() and (text := path.read_text())):
            assert time.monotonic() < latest, f"{path}\n{self.log()[-5000:]}"
            time.sleep(0.002)
        return text

    def phase(self) -> tuple[int, str]:
        """Return the number of finished steps, and the first process's current or last phase."""
        step, name = self._read("phase", 0).split()
        return int(step), name

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log-*.txt")))

    def running(self) -> bool:
        return not any((self.folder / f"status-{rank}").exists() for rank in self.ranks)

    def wait(self) -> list[int]:
        """Wait for the end of all processes: their statuses as `os.waitpid` gives them."""
        return [int(self._read("status", rank)) for rank in self.ranks]

    def kill(self, moment: Moment, times: list) -> str | None:
        """Kill all processes at a moment, given the times of a whole run.

        Returns:
            The phase of the first one, or `None` if they had ended before.
        """
        latest = time.monotonic() + PATIENCE
        while self.running() and not moment.has_come(*self.phase()):
            assert time.monotonic() < latest, self.log()[-5000:]
            time.sleep(0.001)
        (step, _), latest = self.phase(), time.monotonic() + moment.delay(times)
        # the whole run may have been slower: not beyond the step
        while self.running() and time.monotonic() < latest and self.phase()[0] == step:
            time.sleep(0.001)
        if self.running():  # else the numbers may be other processes'
            for pid in self.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        killed = self.wait() == [signal.SIGKILL for _ in self.ranks]
        assert killed or self.wait() == [0 for _ in self.ranks], self.log()[-5000:]
        return self.phase()[1] if killed else None


class Launched:
    """Processes that a launcher has started and that fork those which train."""

    def __init__(self, folder: Path, processes: int):
        self.folder, self.processes, self.count = folder, processes, 0

    def start(self, *flags, **environment: str) -> Job:
        job = Job(self.folder / f"job-{self.count}", list(flags), self.processes, environment)
        self.count += 1
        return job

    def run(self, *flags) -> dict:
        """Run a job to its end, and return what its first process noted."""
        job = self.start(*flags)
        assert job.wait() == [0] * self.processes, job.log()[-5000:]
        return json.loads((job.folder / "ended.json").read_text())


def resuming(folder: Path, *flags) -> list:
    """Return the flags of a run in a folder, which resumes if there is a checkpoint."""
    resume = ["--resume_from_checkpoint", "true"] if list(folder.glob("checkpoint-*")) else []
    return [*flags, "--output_dir", folder, *resume]


def fresh_chance() -> random.Random:
    """Return a generator with a seed that a failed test shows, or with the one in KILLED_SEED."""
    seed = int(os.environ.get("KILLED_SEED", time.time_ns() % 10**6))
    print(f"KILLED_SEED={seed}")
    return random.Random(seed)


def kill_again_and_again(jobs: Launched, folder: Path, flags: list, moments: list[Moment], times: list) -> Counter:
    """Start and kill a run in `folder` once for every moment, and count the kills in each phase."""
    kills: Counter = Counter()
    for moment in moments:
        job = jobs.start(*resuming(folder, *flags))
        phase = job.kill(moment, times)
        assert phase is not None, f"{moment} came too late for\n{job.log()[-5000:]}"
        print(f"{moment} -> {phase} after {job.phase()[0]} steps")
        kills[phase] += 1
    return kills


@contextmanager
def launched(folder: Path, config: Path, processes: int = 1, flags=()):
    """Start `train_killed.py` with an accelerate file."""
    folder.mkdir(exist_ok=True)
    command = launch_command(config, *flags, "--main_process_port", free_port())
    with started([*command, ROOT / "tests/workers/train_killed.py", folder], folder / "log.txt") as process:
        jobs = Launched(folder, processes)
        yield jobs
        (folder / f"job-{jobs.count}").mkdir()
        (folder / f"job-{jobs.count}/job.json").write_text("null")
        with suppress(subprocess.TimeoutExpired):  # after a test that failed
            process.wait(20)


def without_times(value):
    """Return a log, or other content of a JSON file, without measured times."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not any(name in str(key) for name in TIMES)}
        return {key: without_times(item) for key, item in kept.items()}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def content(path: Path, run: Path):
    """Return the content of a run's file in a form that can be compared with another run's."""
    match path.suffix:
        case ".safetensors":
            return load_file(path)
        case ".pt" | ".pth" | ".bin":
            return without_times(torch.load(path, map_location="cpu", weights_only=False))
        case ".json":
            return without_times(json.loads(path.read_text().replace(str(run), "run")))
        case ".parquet":
            return parquet.read_table(path).to_pylist()
    return path.read_bytes()


def assert_same_run(run: Path, expected: Path):
    """Check that two runs have the same files with the same content, bit for bit: weights, optimizers, random states,
    logs and completions, of the end and of every checkpoint."""
    names, wanted = (sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (run, expected))
    assert names == wanted
    found = []
    for name in names:
        if name.name not in NOT_COMPARED:
            values = (content(folder / name, folder) for folder in (run, expected))
            found += differences(*values, str(name))
    assert not found, "\n".join(found[:20])


def differences(value, expected, place: str) -> list[str]:
    """List where two values differ in any bit or type; tuples count as lists, because FSDP turns lists into tuples."""
    value, expected = (list(one) if isinstance(one, tuple) else one for one in (value, expected))
    if type(value) is not type(expected):
        return [f"{place}: {type(value).__name__}, not {type(expected).__name__}"]
    if hasattr(value, "__dict__"):
        value, expected = vars(value), vars(expected)
    if isinstance(value, dict):
        found = [f"{place}: only one has {key}" for key in sorted(map(str, value.keys() ^ expected.keys()))]
        pairs = [(key, value[key], expected[key]) for key in value if key in expected]
    elif isinstance(value, list):
        found = [f"{place}: {len(value)} values, not {len(expected)}"] if len(value) != len(expected) else []
        pairs = list(zip(range(len(value)), value, expected, strict=False))
    else:
        return [] if same(value, expected) else [f"{place}: {value!r:.80}, not {expected!r:.80}"]
    return found + [difference for key, *two in pairs for difference in differences(*two, f"{place}/{key}")]


def same(value, expected) -> bool:
    if isinstance(value, torch.Tensor):
        value, expected = value.detach().numpy(), expected.detach().numpy()
    if isinstance(value, numpy.ndarray):
        shapes = (value.dtype, value.shape) == (expected.dtype, expected.shape)
        return shapes and value.tobytes() == expected.tobytes()
    return value == expected or (value != value and expected != expected)
