"""Compare whole rollouts with and without carry-over, and with TRL's GRPOTrainer, on the same vLLM engine and lengths.

python benchmarks/rollouts.py --output_dir runs/bench   # in .venv-vllm
"""

import argparse
import logging
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/workers"))
from vllm_engine import one_engine_on_cpu  # isort: skip (first, because of its settings)

from cases import Scale
from full_size import full_size
from prescribed_lengths import make_workload
from rollouts_report import Results, draw, report
from timed_rollouts import Bench, Kind


TRL, WAIT = Kind(trl=True), Kind()
CARRIED = [Kind(max_carry_over) for max_carry_over in (1, 2, 3, 4)]
OVERSAMPLING = (1.5, 2.0, 3.0)
SELDOM = {TRL: 4, WAIT: 2}
CHOOSING_SEED = 100  # the default of oversampling is chosen on other lengths than those that are reported
TURNS = 16  # rollouts of a trainer with carry-over in a run
MODEL = {  # the starter's sizes with more layers, so that a step costs as much as about 70 responses in it
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def measure(results: Results, seeds: int, folder: Path):
    """Run all trainers on `seeds` draws of the lengths, and store what they did in `results`."""
    scale = results.scale
    bench = Bench(scale, scale.longest, folder)
    start = time.perf_counter()

    def skewed(seed: int):
        return make_workload(TURNS, scale.responses, scale.mean, scale.longest, seed)

    def done(what: str):
        print(f"{what}: done after {time.perf_counter() - start:.0f} s", file=sys.stderr)

    for seed in range(seeds):
        results.skewed.append(bench.run([TRL, WAIT, *CARRIED], skewed(seed), SELDOM))
        done(f"skewed lengths, seed {seed}")
    for seed in range(seeds):
        equal = make_workload(TURNS // 2, scale.responses, scale.mean, scale.mean, seed)
        results.equal.append(bench.run([WAIT, Kind(2)], equal, {}))
        done(f"equal lengths, seed {seed}")
    kinds = [WAIT, *(Kind(2, oversampling) for oversampling in OVERSAMPLING)]
    results.choosing.append(bench.run(kinds, skewed(CHOOSING_SEED), SELDOM))
    done("oversampling")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line `arguments`."""
    import torch

    warnings.filterwarnings("ignore")
    logging.getLogger("tic_grpo_trl").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(prog="benchmarks/rollouts.py", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="runs/bench", help="folder for rollouts.md and rollouts.png")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the lengths")
    parser.add_argument("--quick", action="store_true", help="smoke test with short responses, in a minute")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    one_engine_on_cpu("float32")
    start = time.perf_counter()
    scale = Scale(MODEL, mean=5, longest=40) if args.quick else Scale(MODEL)
    results = Results(shlex.join(["python", "benchmarks/rollouts.py", *arguments]), scale)
    with tempfile.TemporaryDirectory() as folder:
        measure(results, 1 if args.quick else args.seeds, Path(folder))
    results.load = os.getloadavg()[0]
    results.full_size = full_size(rollouts=2 if args.quick else 24)
    results.seconds = time.perf_counter() - start
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    draw(results, output / "rollouts.png")
    text = report(results)
    (output / "rollouts.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
