"""The training runs of the study, and how to execute one.

Every run has its own folder and starts from the same weights. Runs with the same seed see the same prompts in the same
order, so only the algorithm and its settings differ. A finished run is not repeated; a killed one resumes from its last
checkpoint.
"""

import argparse
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback

from tic_grpo_trl.config import TICGRPOConfig
from tic_grpo_trl.metrics.run_summary import summarize_run
from tic_grpo_trl.starter import STARTER_MODEL, exact_match_reward, make_dataset
from tic_grpo_trl.starter import TASKS as STARTER_TASKS
from tic_grpo_trl.starter.long_tail import TERM_RANGE
from tic_grpo_trl.trainer import TICGRPOTrainer

from ..starter.build import build
from .lagged_engine import LaggedEngine


# Shared by all runs unless a flag overrides it. One rollout is K mini-batches of 32 responses (4 prompts x 8).
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.99,
    "logging_steps": 1,
    "log_all_ratio_metrics": True,
    "per_device_eval_batch_size": 500,
    "num_generations_eval": 1,
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


@dataclass(frozen=True)
class Task:
    """A task of the study: sums of `term_counts` digits, with at most `max_completion_length` tokens per answer."""

    term_counts: tuple[int, ...]  # every number of digits that occurs, in increasing order
    max_completion_length: int
    make_dataset: Callable[..., Dataset]  # of split, size and seed


# fields of the configuration that have their own flag in the study
RUN_DECIDES = {
    "algorithm": "--algorithms",
    "seed": "--seeds",
    "max_steps": "--steps",
    "steps_per_generation": "--k",
    "max_completion_length": "--task",
    "output_dir": "--output_dir of the study",
}


def _task(name: str, *term_counts: int) -> Task:
    """Return a task of the package."""
    return Task(term_counts, STARTER_TASKS[name].max_completion_length, STARTER_TASKS[name].make_dataset)


TASKS = {
    "starter": _task("starter", 3, 4, 5, 6),  # responses of 18 tokens at the start, 32 after training
    # responses about twice as long; its start weights are trained on first use
    "long": Task((7, 8, 9), 72, functools.partial(make_dataset, term_counts=(7, 8, 9))),
    # most responses short, a few of hundreds of tokens
    "long_tail": _task("long_tail", *range(TERM_RANGE[0], TERM_RANGE[1] + 1)),
}


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        algorithm: name of an algorithm, with optional settings after a colon: `tic_grpo:epsilon_high=1.0,delta=3`.
        seed: random seed of prompts, their order and sampling.
        steps: number of updates.
        k: updates per rollout, K.
        task: key of [`TASKS`].
        test_size: held-out problems per evaluation.
        eval_steps: updates between evaluations; if it equals `steps`, the run is evaluated only at its end.
        settings: other fields of the configuration, as sorted pairs.
        lag: sample with the weights of so many rollouts ago, and take ratios to these. Above 0 no checkpoints are
            saved, because the earlier weights are not in them: a killed run starts again.
    """

    algorithm: str
    seed: int
    steps: int = 128
    k: int = 4
    task: str = "starter"
    test_size: int = 500
    eval_steps: int = 32
    settings: tuple[tuple[str, Any], ...] = ()
    lag: int = 0

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields; without a lag of 0, which keeps the names of runs from before there was one."""
        return {name: value for name, value in asdict(self).items() if name != "lag" or value}

    @property
    def name(self) -> str:
        """Return a readable folder name that is unique for the settings."""
        digest = hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.algorithm.split(':')[0]}-seed{self.seed}-{digest}"

    @property
    def named_settings(self) -> dict[str, Any]:
        """Return the fields of the configuration that the run names, in `settings` or with its algorithm."""
        own = self.algorithm.partition(":")[2]
        return dict(self.settings) | parse_settings([f"--{pair}" for pair in own.split(",") if pair])

    def config(self, output_dir: str | Path) -> TICGRPOConfig:
        """Return the configuration of the run.

        Raises:
            ValueError: if the algorithm is unknown or its settings are invalid.
        """
        for name in self.named_settings:
            if name in RUN_DECIDES:
                raise ValueError(f"{name} cannot be a setting here: use {RUN_DECIDES[name]}.")
        values: dict[str, Any] = SETTINGS | {
            "steps_per_generation": self.k,
            "max_steps": self.steps,
            "max_completion_length": TASKS[self.task].max_completion_length,
            "eval_strategy": "steps",
            "eval_steps": self.eval_steps,
            "eval_on_start": self.eval_steps < self.steps,
            "save_steps": self.k
            * max(1, 40 // self.k),  # complete rollouts, so that a resumed run gives the same result
            "seed": self.seed,
        }
        if self.lag:
            values |= {"behaviour_policy": "sampler", "save_strategy": "no"}
        values |= self.named_settings
        return TICGRPOConfig(output_dir=str(output_dir), algorithm=self.algorithm.partition(":")[0], **values)


@functools.cache  # building some 200 flags takes a while
def _settings_parser() -> HfArgumentParser:
    parser = HfArgumentParser(TICGRPOConfig)  # type: ignore[arg-type]
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return parser


def parse_settings(flags: list[str]) -> dict[str, Any]:
    """The fields of TICGRPOConfig that the flags name, and nothing else: `["--delta=3"]` gives `{"delta": 3.0}`.

    Raises:
        ValueError: for a flag that is no field of TICGRPOConfig, or a value of the wrong kind.
    """
    settings, unknown = _settings_parser().parse_known_args(flags)
    if unknown:
        raise ValueError(f"{' '.join(unknown)}: no field of TICGRPOConfig has this name.")
    return vars(settings)


def start_model(task: str, output_dir: Path) -> str:
    """Return the folder of a task's start weights; train them if they are not in the package.

    The start weights of the longer task continue from the starter's, with longer chains and then mostly direct answers.
    """
    if task in STARTER_TASKS:
        return STARTER_TASKS[task].model
    folder = output_dir / f"{task}-start"
    with FileLock(f"{folder}.lock"):
        if not (folder / "starter_card.json").exists():
            print(f"Training the start weights of the task {task!r} in {folder} (two minutes)", flush=True)
            spec, threads = TASKS[task], torch.get_num_threads()
            torch.set_num_threads(1)  # for bit-identical weights
            build(
                folder,
                chain_steps=300,
                remix_steps=60,
                held_out=500,
                term_counts=spec.term_counts,
                max_new_tokens=spec.max_completion_length,
                start=STARTER_MODEL,
            )
            torch.set_num_threads(threads)
    return str(folder)


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint of a killed run. An incomplete one lacks the file that is saved last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            continue
    return None


class _Count(TrainerCallback):
    """Call `count` after every update."""

    def __init__(self, count: Callable[[int], None]):
        self.count = count

    def on_step_end(self, *args, **kwargs):
        self.count(1)


def execute(run: Run, output_dir: Path, count: Callable[[int], None] = lambda updates: None) -> Path:
    """Train one run, from its last checkpoint if there is one, unless it is already finished.

    Args:
        run: run to train.
        output_dir: folder of the study.
        count: called with the number of new updates, including those of earlier attempts.

    Returns:
        The run's folder with `run.json`, `log_history.json` and `summary.json`, which is written last.
    """
    folder = output_dir / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # a worker of a killed study may still be running
        if (folder / "summary.json").exists():
            count(run.steps)
            return folder
        (folder / "run.json").write_text(json.dumps(run.fields, indent=2) + "\n")
        args = run.config(folder)
        # A lagged run that a signal stopped has a checkpoint too, but without the earlier weights.
        checkpoint = None if run.lag else last_checkpoint(folder)
        if checkpoint:
            args.eval_on_start = False  # already in the checkpoint's history
            count(int(checkpoint.rpartition("-")[2]))
        spec = TASKS[run.task]
        trainer = TICGRPOTrainer(
            model=start_model(run.task, output_dir),
            reward_funcs=exact_match_reward,
            args=args,
            train_dataset=spec.make_dataset("train", 8000, seed=args.seed),
            eval_dataset=spec.make_dataset("test", run.test_size),
        )
        if run.lag:
            trainer.recorder = LaggedEngine(trainer, run.lag)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Count(count))
        trainer.train(resume_from_checkpoint=checkpoint)
        history = trainer.state.log_history
        (folder / "log_history.json").write_text(json.dumps(history) + "\n")
        summary = summarize_run(history, args, exact_match_reward.__name__)
        partial = folder / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        partial.replace(folder / "summary.json")
    return folder
