"""Execute runs of the study in a pool of processes."""

import logging
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .runs import Run, execute, start_model


_updates: Any = None  # shared counter of updates, in a worker


def _start_worker(log_file: str, threads: int, updates: Any) -> None:
    """Start a worker with `threads` threads that writes its output to `log_file` and counts updates in `updates`."""
    global _updates
    _updates = updates
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    torch.set_num_threads(threads)
    threading.Thread(target=_follow_parent, daemon=True).start()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.basicConfig(format="%(message)s")


def _follow_parent() -> None:
    """Exit when the parent process dies, because a pool's worker would then wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _execute_in_worker(run: Run, output_dir: Path) -> Path:
    def count(updates: int) -> None:
        with _updates.get_lock():
            _updates.value += updates

    return execute(run, output_dir, count)


def execute_all(
    runs: Iterable[Run],
    output_dir: str | Path,
    workers: int = 2,
    threads: int | None = None,
    finished: Callable[[Run, Path], None] = lambda run, folder: None,
) -> list[Path]:
    """Execute the runs, `workers` at a time, with a progress bar.

    All configurations are checked before the first run starts. A failed run does not stop the others.

    Args:
        runs: runs to execute.
        output_dir: folder of the study.
        workers: number of parallel runs.
        threads: threads of each; by default the workers share all cores.
        finished: called in this process with each run that is finished and its folder.

    Returns:
        Folders of the runs, in order.

    Raises:
        ValueError: if the settings of a run are invalid, or `workers` is below 1.
        RuntimeError: if some runs failed, after all others are finished.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}: give a number of parallel runs of at least 1.")
    output_dir, runs = Path(output_dir), list(dict.fromkeys(runs))
    for run in runs:
        run.config(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for task in dict.fromkeys(run.task for run in runs):
        start_model(task, output_dir)
    log_file = output_dir / "workers.log"
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    failed: list[str] = []
    context = multiprocessing.get_context("spawn")
    updates = context.Value("q", 0)
    with (
        ProcessPoolExecutor(workers, context, _start_worker, (str(log_file), threads, updates)) as pool,
        tqdm(total=sum(run.steps for run in runs), desc="study", unit="update", dynamic_ncols=True) as bar,
    ):
        futures = {pool.submit(_execute_in_worker, run, output_dir): run for run in runs}
        left = set(futures)
        while left:
            done, left = wait(left, timeout=1)
            for future in done:
                if error := future.exception():
                    failed.append(f"{futures[future].name} ({type(error).__name__}: {error})")
                else:
                    finished(futures[future], future.result())
            bar.set_postfix_str(f"{len(runs) - len(left)}/{len(runs)} runs")
            bar.update(updates.value - bar.n)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(runs)} runs failed, see {log_file}: " + "; ".join(failed))
    return [output_dir / "runs" / run.name for run in runs]
