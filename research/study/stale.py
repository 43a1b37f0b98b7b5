"""Train what the results of the study of stale data lack, and write its report."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from .pool import execute_all
from .runs import Run
from .stale_outcome import Outcome
from .stale_plan import SEEDS, Condition, Part, parts_of
from .stale_report import report_stale
from .stale_results import ResultsFile


class Study:
    """
    Complete the results of a plan, and report them.

    Every run has one thread, so that its numbers don't depend on the number of workers. A run's folder is deleted once
    its line is in the file of results.
    """

    def __init__(self, parts: dict[str, Part], seeds: Sequence[int], file: ResultsFile, output_dir: Path, workers: int):
        self.parts, self.seeds, self.file = parts, seeds, file
        self.output_dir, self.workers = output_dir, workers
        self.failures: list[str] = []

    def train(self) -> list[str]:
        """Measure a run of each task, print the budget, choose the settings, run these on the report seeds, and return
        what failed."""
        unmeasured = {part.regime.task: part for part in self.parts.values() if self._seconds(part) is None}
        self._execute([self._planned(part)[0] for part in unmeasured.values()])
        print(self.budget(), flush=True)
        for part in self.parts.values():
            self._execute(part.selection_runs())
            outcome = Outcome.of(part, self.file, self.seeds)
            self._execute([run for condition in part.conditions for run in outcome.runs(condition, self.seeds)])
        return self.failures

    def budget(self) -> str:
        """Format the missing runs and their time by condition, as far as they are known before settings are chosen."""
        lines, total = ["runs to train, and minutes of all workers together:"], 0.0
        for name, part in self.parts.items():
            outcome = Outcome.of(part, self.file, self.seeds)
            selection = self.file.missing(part.selection_runs())
            rows = [(f"{name}, choice of settings", len(selection), self._minutes(selection))]
            for condition in part.conditions:
                known = outcome.runs(condition, self.seeds)
                example = part.report_runs(condition, part.rules, self.seeds)
                lacking = self.file.missing(known)
                unknown = (len(part.rules) - len(outcome.choice)) * len(self.seeds)  # their settings aren't chosen yet
                minutes = self._minutes(lacking) + unknown * self._minutes(example[:1])
                rows.append((f"{name}: {condition.title}", len(lacking) + unknown, minutes))
            lines += [f"{title:40} {runs:5d} {minutes:7.1f}" for title, runs, minutes in rows if runs]
            total += sum(minutes for *_, minutes in rows)
        return "\n".join([*lines, f"{'all, in minutes':40} {total:13.1f}"])

    def _seconds(self, part: Part) -> float | None:
        return self.file.seconds_per_update(Condition(part.regime.task))

    def _planned(self, part: Part) -> list[Run]:
        rules = part.choose({}, part.rules) if not part.selection else {}
        return part.selection_runs() or part.report_runs(part.conditions[0], rules.values(), self.seeds)

    def _minutes(self, runs: Sequence[Run]) -> float:
        seconds = (self.file.seconds_per_update(Condition.of(run.fields)) or math.nan for run in runs)
        return sum(run.steps * each for run, each in zip(runs, seconds, strict=True)) / self.workers / 60

    def _execute(self, runs: Sequence[Run]) -> None:
        if missing := self.file.missing(runs):
            try:
                execute_all(missing, self.output_dir, self.workers, threads=1, finished=self._keep)
            except RuntimeError as error:  # some runs failed; what doesn't need them goes on
                self.failures.append(str(error))

    def _keep(self, run: Run, folder: Path) -> None:
        self.file.add(run, folder)
        shutil.rmtree(folder)


def study_stale(
    plan: str,
    results: Path,
    report_dir: Path,
    arguments: Sequence[str],
    train: tuple[Path, int] | None = None,
    seeds: Sequence[int] | None = None,
    **selected: Sequence | None,
) -> Path:
    """Train the runs of a plan that have no line in `results`, write the report and return its path.

    Args:
        plan: key of [`~research.study.stale_plan.PLANS`].
        results: file of results.
        report_dir: folder of the report.
        arguments: command-line arguments to quote in the report.
        train: folder of the runs, and number of parallel ones; without them nothing is trained.
        seeds: seeds of the comparison; by default the plan's.
        selected: arguments of [`~research.study.stale_plan.parts_of`].

    Raises:
        ValueError: if the plan doesn't have what is selected.
        RuntimeError: if runs failed, after the report of all others is written.
    """
    seeds, file, parts = seeds or SEEDS[plan], ResultsFile(results), parts_of(plan, **selected)
    failures = Study(parts, seeds, file, *train).train() if train else []
    outcomes = {name: Outcome.of(part, file, seeds) for name, part in parts.items()}
    path = report_stale(outcomes, file, seeds, report_dir, plan, arguments)
    if failures:
        raise RuntimeError(" ".join(failures))
    return path
