"""Compare time and memory of the update phase of TICGRPOTrainer and TRL's GRPOTrainer on the same rollouts.

python benchmarks/update_phase.py --output_dir runs/bench
"""

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # for TRL's experimental rollout_func

import torch
from cases import FULL, GROUP, QUICK, Rollout, Scale, make_model, make_rollout, skewed_lengths
from measure import Limit, LossAlone, loss_lengths, peak_memory, train
from results import Case, Results, growth_figure, report, report_prompts
from shared_prompts import SharedPrompts, prompt_figure


NAMES = ("authors", "active", "equal", "lora", "loss", "limit", "memory", "growth", "prompts")


class Benchmark:
    """Run the measurements of one scale, and store them in `results`."""

    def __init__(self, scale: Scale, results: Results, repeats: int | None, arguments: list[str]):
        self.scale, self.results, self.repeats, self.arguments = scale, results, repeats, arguments
        self.model = make_model(scale)
        self.lengths = skewed_lengths(scale.responses, scale.mean, scale.longest)
        groups = scale.responses // GROUP
        self.zero_advantage = 3 * groups // 8
        skewed = f"{scale.responses} responses of log-normal length, mean {scale.mean}, longest {scale.longest}"
        self.skewed = make_rollout(scale, self.lengths, self.zero_advantage)
        self.compared: dict[str, tuple[str, float, Rollout, bool]] = {
            "authors": (
                f"authors' lengths / 32: {skewed}; {self.zero_advantage} of {groups} groups have zero advantages",
                10,
                self.skewed,
                False,
            ),
            "active": ("the same, no zero-advantage group", 7, make_rollout(scale, self.lengths, 0), False),
            "equal": (
                f"equal lengths: {scale.responses} responses of {scale.mean}, no zero-advantage group",
                0.97,
                make_rollout(scale, [scale.mean] * scale.responses, 0),
                False,
            ),
            "lora": ("the first case with LoRA, r = 16, all linear layers", 8, self.skewed, True),
        }

    def measure(self, name: str) -> None:
        """Run the case with this name."""
        if name in self.compared:
            self._compare(name, *self.compared[name])
        else:
            getattr(self, f"_{name}")()

    def _compare(self, name: str, title: str, target: float, rollout: Rollout, lora: bool):
        case = self.results.cases[name] = Case(title, target)
        for seed in range(self.repeats or (self.scale.equal_pairs if name == "equal" else self.scale.pairs)):
            trl, ours = (train(kind, self.scale, self.model, rollout, seed, lora) for kind in ("trl", "ours"))
            case.pairs.append((trl, ours))

    def _loss(self):
        for label, lengths in loss_lengths(self.scale).items():
            title = f"{len(lengths)} responses, {label}, longest {max(lengths):,}"
            losses = {k: LossAlone(k, self.scale, self.model, lengths) for k in ("trl", "grpo", "tic_grpo")}
            for loss in losses.values():
                loss.run()
            runs = [{k: loss.run() for k, loss in losses.items()} for _ in range(self.scale.loss_runs)]
            for kind in ("grpo", "tic_grpo"):
                self.results.losses[kind, title] = [(run["trl"], run[kind]) for run in runs]

    def _limit(self):
        limit = Limit(self.scale, self.model, self.skewed)
        limit.run(0)
        for seed in range(self.scale.limit_runs):
            ours, default = (train(k, self.scale, self.model, self.skewed, seed) for k in ("ours", "tic_grpo"))
            self.results.limits.append((ours, default, limit.run(seed)))

    def _memory(self):
        # in parallel with one thread each, because sizes are measured, not times
        command = [sys.executable, __file__, *self.arguments, "--threads", "1", "--memory_of"]
        others = [subprocess.Popen([*command, kind], stdout=subprocess.PIPE, text=True) for kind in ("trl", "ours")]
        peaks = [json.loads(process.communicate()[0].splitlines()[-1]) for process in others]
        self.results.saved, self.results.resident = ((peaks[0][i], peaks[1][i]) for i in (0, 1))

    def _prompts(self):
        self.results.prompts = SharedPrompts.measure(self.scale, self.model, self.lengths, self.repeats)

    def _growth_runs(self, factor: int) -> int:
        return max(1, self.scale.growth_runs // factor)

    def _growth(self):
        scale = self.scale
        rollouts = {
            f"real tokens of a rollout of {scale.responses} responses": {
                factor: make_rollout(scale, [factor * length for length in self.lengths], self.zero_advantage)
                for factor in scale.factors
            },
            "responses of a rollout with unchanged lengths": {
                factor: make_rollout(scale, self.lengths * factor, self.zero_advantage * factor)
                for factor in scale.factors
            },
        }
        for panel, (label, by_factor) in enumerate(rollouts.items()):
            points = self.results.growth[label] = {"ours": [], "trl": []}
            for factor, rollout in by_factor.items():
                x = rollout.tokens if panel == 0 else len(rollout.rewards)
                runs = [train("ours", scale, self.model, rollout, seed) for seed in range(self._growth_runs(factor))]
                points["ours"].append((x, median(run.seconds for run in runs)))
                if factor == 1 and "authors" in self.results.cases:
                    trl = median(run.seconds for run, _ in self.results.cases["authors"].pairs)
                    points["trl"].append((x, trl))
                elif factor in scale.trl_factors:
                    points["trl"].append((x, train("trl", scale, self.model, rollout).seconds))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line `arguments`."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # TRL uses deprecated names
    logging.getLogger("tic_grpo_trl").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(prog="benchmarks/update_phase.py", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="runs/bench", help="folder for the reports and their figures")
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=NAMES, help="cases to measure (default: all)")
    parser.add_argument("--repeats", type=int, help="pairs of runs per compared case")
    parser.add_argument("--threads", type=int, default=2, help="number of torch threads")
    parser.add_argument("--quick", action="store_true", help="smoke test with tiny sizes, in seconds")
    parser.add_argument("--memory_of", choices=("trl", "ours"), help="only print the memory of this trainer, in bytes")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    scale = QUICK if args.quick else FULL
    results = Results(shlex.join(["python", "benchmarks/update_phase.py", *arguments]), args.threads)
    benchmark = Benchmark(scale, results, args.repeats, arguments)
    if args.memory_of:
        print(json.dumps(peak_memory(args.memory_of, scale, benchmark.model, benchmark.skewed)))
        return
    start = time.perf_counter()
    for name in NAMES:
        if name in args.cases:
            benchmark.measure(name)
            print(f"{name}: done after {time.perf_counter() - start:.0f} s", file=sys.stderr)
    results.seconds = time.perf_counter() - start
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if results.growth:
        growth_figure(results, folder / "growth.png")
    if results.prompts:
        prompt_figure(results.prompts, folder / "shared_prompts.png")
    pages = {"shared_prompts.md": report_prompts(results)} if results.prompts else {}
    if set(args.cases) != {"prompts"}:
        pages["update_phase.md"] = report(results)
    for name, text in pages.items():
        (folder / name).write_text(text)
        print(text)
    if not results.comparable:
        raise SystemExit("The two trainers made different updates, so their times cannot be compared.")


if __name__ == "__main__":
    main()
