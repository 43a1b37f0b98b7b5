"""The files of a run folder: settings and samples, from which a run resumes, then `results.json` and `table.md`."""

import json
import os
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from .statistics import average_at_k
from .table import Result, results_table


class SampleStore:
    """Store the samples of a run in `samples.jsonl`, next to the `settings.json` that determine them.

    Only complete batches count. If a run was killed while it wrote a batch, the partial batch is removed. `batches`
    holds the number of samples of each batch, in order.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], batches: list[int]):
        self.path = Path(folder, "samples.jsonl")
        self._check_settings(Path(folder, "settings.json"), settings)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # incomplete
        complete = [end for end in accumulate(batches) if end <= len(lines)]
        kept = lines[: max(complete, default=0)]
        self.batches_done = len(complete)
        self.samples: list[dict[str, Any]] = [json.loads(line) for line in kept]
        if self.path.exists():
            os.truncate(self.path, sum(map(len, kept)))

    def _check_settings(self, path: Path, settings: dict[str, Any]) -> None:
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            before = json.loads(path.read_text())
            if different := differences(before, settings):
                raise ValueError(
                    f"{path.parent} contains a run with other settings ({'; '.join(different)}): give another "
                    "--output_dir, or remove that folder"
                )
        elif self.path.exists():
            raise ValueError(f"{path.parent} contains samples without settings: give another --output_dir")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(settings, indent=2) + "\n")

    def add(self, samples: list[dict[str, Any]]) -> None:
        """Append a complete batch, and return once it is on disk."""
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(sample) + "\n" for sample in samples).encode())
            file.flush()
            os.fsync(file.fileno())
        self.samples += samples
        self.batches_done += 1


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """List the differences of two JSON values, such as `aime24.k: 32, now 16`."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [f"{name}: {before}, now {now}"]
    found: list[str] = []
    for key in before | now:
        found += differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that other processes, or a later run, see either all of it or nothing."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def summarize(samples: list[dict[str, Any]], k: int) -> dict[str, Any]:
    """Summarize the samples of one set, `k` per problem. Length statistics include those of excluded problems."""
    rewards: dict[str, list[float | None]] = {}
    for sample in samples:
        rewards.setdefault(sample["problem"], []).append(sample["reward"])
    average = average_at_k(rewards)
    has_lengths = "tokens" in samples[0]
    return {
        "average": average.value,
        "metric": f"Avg@{k}",
        "interval": list(average.interval),
        "sampling_error": average.sampling_error,
        "problems": average.problems,
        "excluded": average.excluded,
        "k": k,
        "truncated": fmean(sample["truncated"] for sample in samples) if has_lengths else None,
        "mean_tokens": fmean(sample["tokens"] for sample in samples) if has_lengths else None,
        "means": average.means,
    }


def write_results(folder: Path, result: Result) -> None:
    """Write `results.json` and `table.md`."""
    write_atomically(folder / "results.json", json.dumps(result, indent=2) + "\n")
    write_atomically(folder / "table.md", results_table([result]))


def read_results(paths: list[str]) -> list[Result]:
    """Read the results of several runs, and merge those with the same name (sets of one model, evaluated separately).

    Raises:
        ValueError: if a file is not a `results.json`, or two results with the same name share a set.
    """
    results: dict[str, Result] = {}
    for path in paths:
        try:
            result = json.loads(Path(path).read_text())
            name, sets = result["name"], result["sets"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--table {path}: give the results.json of an evaluation ({error!r})") from error
        merged = results.setdefault(name, {"name": name, "sets": {}})
        if shared := merged["sets"].keys() & sets.keys():
            raise ValueError(
                f"--table: two results named {name} have {', '.join(sorted(shared))}: give each run its own --name"
            )
        merged["sets"] |= sets
    return list(results.values())
