"""Results of the study of stale data: one line of JSON per finished run, in a file of the repository."""

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tic_grpo_trl.config import TICGRPOConfig
from tic_grpo_trl.metrics.ratios import BY_AGE
from tic_grpo_trl.metrics.run_summary import LogHistory, series

from .runs import Run
from .stale_plan import STEPS, Condition
from .tables import ACCURACY, RATIO_METRICS, Result, Results


LAST_ROLLOUTS = 6  # window of the reward at the end, and of curves of the reward
DIGITS = 4  # significant ones of every number
ENGINE_STEPS = "engine_steps"
# Resolved settings that decide on the result and are in no field of a run
RESOLVED = ("learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "num_generations", "adam_beta2")
# Options that decide on it only under a condition. They are compared unless the run names them.
OPTIONS: dict[str, Callable[[TICGRPOConfig], bool]] = {
    "gradient_noise_scale": lambda config: config.clip_mode == "adaptive",
    "baseline_norms": lambda config: config.advantage_baseline == "minimum_variance",
    "oversampling": lambda config: config.max_carry_over > 0,
}
PREFILLED_AGAIN = "carry_over/prefilled_again_per_token"
OTHER_METRICS = (
    "update/cap",
    "update/learning_rate_factor",
    "carry_over/mean_age",
    "carry_over/slot_occupancy",
    PREFILLED_AGAIN,
)


@functools.cache  # a configuration takes a while to build
def settings_of(run: Run) -> dict[str, Any]:
    """Return the settings that a run resolves to, as JSON has them: a line of others is no result of this run."""
    config = run.config("unused")
    values = {name: getattr(config, name) for name in RESOLVED}
    values |= {"max_completion_length": config.max_completion_length} | config.resolved_algorithm
    acting = (name for name, acts in OPTIONS.items() if acts(config) and name not in run.named_settings)
    values |= {name: getattr(config, name) for name in acting}
    return json.loads(json.dumps({name: value for name, value in values.items() if value is not None}, default=str))


def line_of(run: Run, folder: Path) -> dict[str, Any]:
    """Condense a finished run's folder."""
    history = json.loads((folder / "log_history.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    longest = series(history, "completions/max_length")[1]
    # a rollout that the pool already holds takes no steps, and logs none
    used = [entry.get("carry_over/engine_steps", 0) for entry in history if "carry_over/pool_groups" in entry]
    steps, accuracy = series(history, ACCURACY)
    names = {name: f"trajectory_ratio/{name}" for name in RATIO_METRICS} | {name: name for name in OTHER_METRICS}
    return {
        "run": run.fields,
        "settings": settings_of(run),
        "versions": summary["versions"],
        "seconds": round(summary["seconds"], 1),
        "reward": _rounded(series(history, "reward")[1]),
        ENGINE_STEPS: [int(steps) for steps in used or longest],
        "accuracy": list(zip(steps, _rounded(accuracy), strict=True)),
        "ratios": _means(history, names),
        "by_age": _by_age(history, run),
    }


def _by_age(history: LogHistory, run: Run) -> dict[str, dict[str, float]]:
    """Average the ratio metrics of each age, in rollouts. Without carry-over a rollout's responses have one age."""
    if Condition.of(run.fields).carry_over:
        ages = {name.split("/")[1] for entry in history for name in entry if name.startswith("trajectory_ratio/age_")}
        found = {
            age.removeprefix("age_"): _means(history, {name: f"trajectory_ratio/{age}/{name}" for name in BY_AGE})
            for age in ages
        }
    else:
        by_age = defaultdict(list)
        for entry in history:
            by_age[min((entry["step"] - 1) // run.k, run.lag)].append(entry)
        names = {name: f"trajectory_ratio/{name}" for name in BY_AGE}
        found = {str(age): _means(entries, names) for age, entries in by_age.items()}
    return {age: found[age] for age in sorted(found, key=int) if found[age]}


def _means(history: LogHistory, names: Mapping[str, str]) -> dict[str, float]:
    values = {short: series(history, name)[1] for short, name in names.items()}
    kept = {short: fmean(found) for short, found in values.items() if found}
    return dict(zip(kept, _rounded(kept.values()), strict=True))


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


@dataclass(frozen=True)
class StaleResult(Result):
    """A finished run, read from its line. Its history has what the tables and figures of the study read."""

    line: dict[str, Any]

    @classmethod
    def of(cls, line: dict[str, Any]) -> "StaleResult":
        run, accuracy = line["run"], line["accuracy"]
        history: LogHistory = [{"step": step, ACCURACY: value} for step, value in accuracy]
        history += [{"step": 1 + run["k"] * i, "reward": reward} for i, reward in enumerate(line["reward"])]
        history += [{"step": run["steps"]} | {f"trajectory_ratio/{name}": v for name, v in line["ratios"].items()}]
        return cls(run["algorithm"], run["seed"], run, {"accuracy_after": accuracy[-1][1]}, history, line)

    @property
    def condition(self) -> Condition:
        """Return how old the run's data are."""
        return Condition.of(self.run)

    def measure(self, name: str) -> float:
        """Return a measure of the run's first updates, of which all conditions of its task have as many.

        `reward` and `final_reward` are means of the training reward, over the run and its last six rollouts, `accuracy`
        the held-out one at the end, and `engine_steps` the decoding steps of the engine per update.
        """
        steps = min(STEPS[self.run["task"]], self.run["steps"])
        rollouts = steps // self.run["k"]
        if name == ENGINE_STEPS:
            return sum(self.line[ENGINE_STEPS][:rollouts]) / steps
        if name == "accuracy":
            return [value for step, value in self.line["accuracy"] if step <= steps][-1]
        return fmean(self.line["reward"][0 if name == "reward" else max(0, rollouts - LAST_ROLLOUTS) : rollouts])


class ResultsFile:
    """
    Finished runs, one line of JSON each.

    Lines are only added. A line whose settings are not those that the run would have now is not used; delete a line to
    train its run again.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}  # by the name of the run
        for text in path.read_text().splitlines() if path.exists() else ():
            self._keep(json.loads(text))

    def _keep(self, line: dict[str, Any]) -> None:
        fields = dict(line["run"])
        fields["settings"] = tuple((name, value) for name, value in fields["settings"])
        self._lines[Run(**fields).name] = line

    def get(self, run: Run) -> StaleResult | None:
        """Return a run's result, or `None`."""
        line = self._lines.get(run.name)
        return StaleResult.of(line) if line is not None and line["settings"] == settings_of(run) else None

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Return those of the runs that have no result yet, each once."""
        return [run for run in dict.fromkeys(runs) if self.get(run) is None]

    def results(self, runs: Iterable[Run]) -> Results:
        """Return the results of those of the runs that have one, by specification, in the order of their seeds."""
        results: Results = defaultdict(list)
        for run in dict.fromkeys(runs):
            if (result := self.get(run)) is not None:
                results[run.algorithm].append(result)
        return {algorithm: sorted(found, key=lambda result: result.seed) for algorithm, found in results.items()}

    def add(self, run: Run, folder: Path) -> None:
        """Append the line of a finished run."""
        line = line_of(run, folder)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._keep(line)

    def seconds_per_update(self, condition: Condition) -> float | None:
        """Return the mean time of an update, of runs in a condition, or else of the same task. `None` without any."""
        lines = [each for each in self._lines.values() if each["run"]["task"] == condition.task]
        same = [each for each in lines if Condition.of(each["run"]) == condition]
        times = [each["seconds"] / each["run"]["steps"] for each in same or lines]
        return fmean(times) if times else None

    def versions(self) -> list[str]:
        """Return the versions of packages that the runs used."""
        return sorted({", ".join(f"{k} {v}" for k, v in line["versions"].items()) for line in self._lines.values()})
