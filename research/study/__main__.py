"""Train all algorithms on the embedded task and report the results.

    python -m research.study                        # all algorithms on three seeds
    python -m research.study --plan quick           # the same in minutes
    python -m research.study --plan tuned           # every algorithm at its best settings, in two regimes
    python -m research.study --plan stale           # rules for stale data, each at its best settings
    python -m research.study --algorithms tic_grpo tic_grpo:epsilon_high=1.0 grpo --seeds 0 1 --learning_rate 1e-4

Every field of TICGRPOConfig is also a flag, for all runs. Finished runs are not repeated, so adding algorithms or seeds
costs only the new runs.
"""

import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from tic_grpo_trl.algorithms import ALGORITHMS

from ..compared import COMPARED
from .pool import execute_all
from .report import report_comparison, report_tuned
from .runs import TASKS, Run, parse_settings
from .stale import study_stale
from .stale_plan import PLANS as STALE_PLANS
from .tables import load
from .tuning import CAPS, REGIMES, REPORT_SEEDS, SELECTION_SEEDS, candidates, choose, make_runs


@dataclass
class StudyArguments:
    """Select the runs and the folders. Values that are not given come from the plan."""

    plan: str = field(
        default="full",
        metadata={
            "help": "full, quick: algorithms x seeds, same settings; tuned: each at its best settings of a grid; "
            "stale, stale_quick: rules for stale data.",
            "choices": ["full", "quick", "tuned", *STALE_PLANS],
        },
    )
    algorithms: list[str] | None = field(
        default=None,
        metadata={"help": "Algorithms, each with optional settings after a colon: tic_grpo:epsilon_high=1.0,delta=3"},
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Random seeds of prompts, their order and sampling."}
    )
    steps: int | None = field(default=None, metadata={"help": "Updates per run."})
    k: int = field(default=4, metadata={"help": "Updates per rollout, K."})
    eps_high: float | None = field(default=None, metadata={"help": "epsilon_high of every algorithm that clips."})
    task: str = field(default="starter", metadata={"help": "Task of a full or quick plan.", "choices": list(TASKS)})
    test_size: int = field(default=500, metadata={"help": "Held-out problems per evaluation."})
    name: str | None = field(default=None, metadata={"help": "Name of the report. Default: name of the plan."})
    output_dir: str = field(default="runs/study", metadata={"help": "Folder of the runs."})
    report_dir: str | None = field(default=None, metadata={"help": "Folder of the report. Default: output_dir."})
    workers: int = field(default_factory=lambda: os.cpu_count() or 1, metadata={"help": "Number of parallel runs."})
    parts: list[str] | None = field(default=None, metadata={"help": "Parts of a stale plan. Default: all."})
    lags: list[int] | None = field(default=None, metadata={"help": "Lags of a stale plan. Default: all."})
    carry_overs: list[int] | None = field(
        default=None, metadata={"help": "Values of max_carry_over of a stale plan; 0 is none above 0. Default: all."}
    )
    results: str | None = field(
        default=None,
        metadata={"help": "File with a stale plan's results. Default: <plan>_results.jsonl beside the report."},
    )
    report_only: bool = field(default=False, metadata={"help": "Write a stale plan's report from its results alone."})


@dataclass(frozen=True)
class Plan:
    """Seeds, updates and evaluations per run of a comparison with the same settings."""

    seeds: tuple[int, ...]
    steps: int
    evaluations: int


PLANS = {"full": Plan((0, 1, 2), 128, 4), "quick": Plan((0, 1), 64, 2)}


def compare(args: StudyArguments, settings: dict) -> str:
    """Run algorithms x seeds with the same settings, write the report and return its path."""
    plan = PLANS[args.plan]
    steps = args.steps or plan.steps
    eval_steps = max(1, steps // plan.evaluations)
    runs = []
    for seed in args.seeds or plan.seeds:
        for algorithm in args.algorithms or COMPARED:
            run_settings = dict(settings)
            if args.eps_high is not None and ALGORITHMS.get(algorithm.split(":")[0], {}).get("clip_mode") != "none":
                run_settings["epsilon_high"] = args.eps_high
            pairs = tuple(sorted(run_settings.items()))
            runs.append(Run(algorithm, seed, steps, args.k, args.task, args.test_size, eval_steps, pairs))
    results = load(execute_all(runs, args.output_dir, args.workers))
    return str(report_comparison(results, args.report_dir or args.output_dir, args.name or args.plan, sys.argv[1:]))


def tune(args: StudyArguments) -> str:
    """Choose each algorithm's settings on the selection seeds, compare on the others, and return the report's path."""
    algorithms = args.algorithms or list(CAPS)
    unknown = [algorithm for algorithm in algorithms if algorithm not in CAPS]
    if unknown:
        raise ValueError(f"--algorithms {' '.join(unknown)}: choose from {', '.join(CAPS)}.")
    grids, finals = {}, {}
    for name, regime in REGIMES.items():
        specs = [candidate for algorithm in algorithms for candidate in candidates(algorithm, regime)]
        runs = make_runs(specs, SELECTION_SEEDS, regime, args.k, test_size=100)  # accuracy is not used
        grids[name] = load(execute_all(runs, args.output_dir, args.workers))
        best = choose(grids[name], algorithms, regime)
        runs = make_runs(best.values(), args.seeds or REPORT_SEEDS, regime, args.k, args.test_size)
        finals[name] = load(execute_all(runs, args.output_dir, args.workers))
    folder, name = args.report_dir or args.output_dir, args.name or "tuned"
    return str(report_tuned(grids, finals, algorithms, folder, name, sys.argv[1:]))


def weigh_stale_data(args: StudyArguments) -> str:
    """Complete the results of a stale plan, write its report and return its path."""
    folder = Path(args.report_dir or args.output_dir)
    selected = {"names": args.parts, "rules": args.algorithms, "lags": args.lags, "carry_overs": args.carry_overs}
    results = Path(args.results or folder / f"{args.plan}_results.jsonl")
    train = None if args.report_only else (Path(args.output_dir), args.workers)
    return str(study_stale(args.plan, results, folder, sys.argv[1:], train, args.seeds, **selected))


def main() -> None:
    # TRL uses names that transformers deprecated; a user of this command can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    parser = HfArgumentParser(
        StudyArguments,  # type: ignore[arg-type]
        description="Train all algorithms on the embedded task and report the results.",
        epilog="Every field of TICGRPOConfig is also a flag, for all runs of a full or quick plan.",
    )
    args, rest = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    settings = parse_settings(rest)
    if args.plan in PLANS:
        path = compare(args, settings)
    elif settings or args.steps or args.eps_high is not None:
        flags = " ".join(rest) or "--steps and --eps-high"
        raise ValueError(f"--plan {args.plan} has its own grid of settings: remove {flags}.")
    else:
        path = tune(args) if args.plan == "tuned" else weigh_stale_data(args)
    print(f"Report: {path}")


if __name__ == "__main__":
    main()
