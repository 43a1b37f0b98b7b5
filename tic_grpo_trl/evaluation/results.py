"""The `results.json` of a run: summarize samples, write and read it."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from .statistics import average_at_k
from .store import write_atomically
from .table import Result, results_table


def summarize(samples: list[dict[str, Any]], k: int) -> dict[str, Any]:
    """Summarize the samples of one set for `results.json`.

    Args:
        samples: each with `problem` and `reward`, and with `tokens` and `truncated` if known. Length statistics include
            the samples of excluded problems.
        k: samples per problem.
    """
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
