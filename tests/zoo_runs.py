"""What our trainer does with a model of the zoo, beside TRL's on the same rollouts, and the page that tells it.

python tests/zoo_runs.py docs/models.md
"""

import argparse
import copy
import gc
import logging
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from conftest import WORDS
from rollouts import TOKEN, count_forwards, train, with_reference
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.utils import pad
from zoo import NotBuiltError, architectures, in_one_line, rope_variants, tiny_model

from tic_grpo_trl.forward.packing import PACKED


# Two groups of four. The longest response crosses the original length of the zoo's rotary embeddings, 32 tokens, and a
# prompt is longer than the zoo's sliding windows, 8 tokens.
COMPLETIONS = [54, 3, 17, 1, 9, 2, 30, 5]
PROMPTS = [10] * 4 + [5] * 4
REWARDS = [1.0, 0.0, 0.25, 0.5, 0.0, 1.0, 0.75, 0.25]
# Two rollouts of K = 2 updates, each of one group in two of TRL's passes
SETTINGS = TOKEN | {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "max_steps": 4,
    "max_completion_length": max(COMPLETIONS),
    "learning_rate": 0.005,
    "max_grad_norm": 1.0,
    "router_aux_loss_coef": 0.0,  # with it a mixture of experts is not packed while it trains
}
LIMIT = 1e-4  # of differences, relative, and of log-ratios in nats where no weight has moved
KL_LIMIT = 1e-8  # of equal weights; quadratic in the differences
ATTENTIONS = ("sdpa", "eager")
TABLE = """| model type | sdpa | eager | `padded` with RoPE | remarks |
|---|---|---|---|---|
"""


class TRLFailsError(Exception):
    """Say in one line why TRL's own trainer cannot run a model."""


def rollouts(prompts: list[int]):
    """Make rollouts in turn, every second one a third as long; a `rollout_func` and a reward function."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, len(WORDS), (len(prompts), 80), generator=generator).tolist()
    calls = []

    def rollout(texts, trainer):
        calls.append(len(texts))
        lengths = [n if len(calls) % 2 else -(-n // 3) for n in COMPLETIONS]
        pairs = list(zip(ids, prompts, lengths, strict=True))
        return {
            "prompt_ids": [pairs[i - i % 4][0][:p] for i, (_, p, _) in enumerate(pairs)],
            "completion_ids": [[*row[p : p + n - 1], 0] for row, p, n in pairs],
            "logprobs": None,
        }

    return rollout, lambda completions, **kwargs: REWARDS


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Compute the log-probabilities of one response without any other and without padding, by TRL's head."""
    ids = torch.tensor([prompt + completion])
    log_probs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True).log_probs
    return log_probs[0, -len(completion) :]


def padded(output: dict) -> dict[str, torch.Tensor]:
    """Pad a rollout as TRL does."""
    inputs = {}
    for part, side in (("prompt", "left"), ("completion", "right")):
        ids = [torch.tensor(row) for row in output[f"{part}_ids"]]
        inputs[f"{part}_ids"] = pad(ids, padding_value=0, padding_side=side)
        inputs[f"{part}_mask"] = pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side=side)
    return inputs


def difference_to_alone(model: PreTrainedModel, logps: torch.Tensor, output: dict) -> float:
    """Compute the largest difference of log-probabilities (B, T) to those of each response alone, relative to these."""
    pairs = zip(output["prompt_ids"], output["completion_ids"], logps, strict=True)
    own = [(alone(model, prompt, completion), row[: len(completion)]) for prompt, completion, row in pairs]
    return max(float((row - mine).abs().max()) for mine, row in own) / max(float(mine.abs().max()) for mine, _ in own)


def largest_ratio(log: dict[str, float]) -> float:
    """Read the largest log-ratio of a response in an entry of the log, in nats."""
    return max(abs(log["trajectory_ratio/log_min"]), abs(log["trajectory_ratio/log_max"]))


def draws_random_numbers(model: PreTrainedModel) -> bool:
    """Find out whether a model's forward pass draws random numbers while it trains."""
    ids = torch.ones(1, 4, dtype=torch.long)
    before = torch.get_rng_state()
    copy.deepcopy(model).train()(input_ids=ids, attention_mask=ids)
    return not torch.equal(before, torch.get_rng_state())


@torch.no_grad()
def remembers(model: PreTrainedModel) -> bool:
    """Find out whether a second forward pass differs from the first, as with frequencies that keep earlier lengths."""
    model, ids = copy.deepcopy(model).eval(), torch.ones(1, max(COMPLETIONS) + max(PROMPTS) + 2, dtype=torch.long)
    first, second = (model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for _ in range(2))
    return bool((first - second).abs().max() > LIMIT)


@dataclass
class Measured:
    """What was measured of one model.

    Attributes:
        layout: of [`~tic_grpo_trl.forward.packing`].
        shares: whether the prompt of a group is computed once.
        shared: the largest share of an update's tokens that was not computed because of that.
        counts_padding: whether padding before a prompt moves TRL's log-probabilities.
        random: whether a pass draws random numbers, so that no two trainers agree.
        remembers: whether a pass depends on earlier ones, so that not even two passes agree.
        alone: largest relative difference of our log-probabilities to those of each response alone.
        updates: largest relative difference of an update's gradient, or of its norm before it is clipped, to TRL's.
        kl: largest KL to equal weights.
        ratio: largest log-ratio of a response where no weight has moved, in nats.
        drift: the same at the second of two updates, where they have.
        warnings: what the trainer said.
    """

    layout: str
    shares: bool
    shared: float
    counts_padding: bool
    random: bool
    remembers: bool
    alone: float
    updates: float
    kl: float
    ratio: float
    drift: float
    warnings: list[str] = field(repr=False)

    @property
    def wrong(self) -> list[str]:
        """The limits that are not kept; TRL's own layout need not be what a response has alone."""
        kept = {
            "alone": self.layout == "padded" or self.alone <= LIMIT,
            "updates": self.random or self.remembers or self.updates <= LIMIT,
            "kl": self.remembers or self.kl <= KL_LIMIT,
            "ratio": self.remembers or self.ratio <= LIMIT,
            "shared": (self.shared > 0) == self.shares,
            "drift": self.drift >= LIMIT,  # or else the second update would show nothing of the ratios
            "warnings": any("padding_free" in text for text in self.warnings) == (self.layout not in PACKED),
        }
        return [name for name, is_kept in kept.items() if not is_kept]

    @property
    def cell(self) -> str:
        return f"{self.layout}, shared" if self.shares else self.layout

    @property
    def remarks(self) -> set[str]:
        found = {
            "padding": self.counts_padding and self.layout != "padded",
            "random": self.random,
            "head": any("TRL's fused head" in text for text in self.warnings),
        }
        return {name for name, holds in found.items() if holds}


def measure(model: PreTrainedModel, folder: Path) -> Measured:
    """Train a model by both trainers and compare.

    Raises:
        TRLFailsError: where TRL's trainer cannot run the model.
    """
    output = rollouts(PROMPTS)[0]([""] * len(PROMPTS), None)
    found, settings = SimpleNamespace(warnings=[]), SETTINGS | {"model": model}

    def trained_by_trl(prompts):
        return train(folder / "trl", trl=True, prepare=with_reference, rollouts=rollouts(prompts), **settings)

    def prepare(trainer):
        """Look at the log-probabilities of both before anything is trained."""
        count_forwards(trainer)
        found.layout = trainer.packed_forward.choose_layout()
        found.shares = trainer.packed_forward.shares_prompts
        inputs = padded(output)
        found.alone = difference_to_alone(trainer.model, trainer.packed_forward.score(inputs, 2).logps, output)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with torch.no_grad():
            theirs = GRPOTrainer._get_per_token_logps_and_entropies
            logps = theirs(trainer, trainer.model, ids, mask, max(COMPLETIONS))[0]
        found.counts_padding = difference_to_alone(trainer.model, logps, output) > LIMIT / 10
        with_reference(trainer)

    try:
        reference = trained_by_trl(PROMPTS)
    except Exception as error:
        raise TRLFailsError(in_one_line(error)) from error
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.warnings.append(record.getMessage())
    logger = logging.getLogger("tic_grpo_trl")
    logger.addHandler(handler)
    try:
        still = settings | {"learning_rate": 0.0, "skip_on_policy_logps": False, "algorithm": "grpo"}
        logs = train(folder / "still", prepare=prepare, rollouts=rollouts(PROMPTS), **still).logs
    finally:
        logger.removeHandler(handler)
    prompts = PROMPTS
    if found.counts_padding and found.layout != "padded":  # we do not, so that only prompts of one length compare
        prompts = [max(PROMPTS)] * len(PROMPTS)
        reference = trained_by_trl(prompts)
    as_trl = {"algorithm": "grpo", "partition_by_prompt": False, "leader": reference, "prepare": with_reference}
    ours = train(folder / "ours", rollouts=rollouts(prompts), **as_trl, **settings)

    pairs = list(zip(ours.gradients, reference.gradients, strict=True))
    norms = [(mine["grad_norm"], theirs["grad_norm"]) for mine, theirs in zip(ours.logs, reference.logs, strict=True)]
    assert len(pairs) == len(norms) == SETTINGS["max_steps"]
    assert all(theirs > 0 for _, theirs in norms)
    return Measured(
        found.layout,
        found.shares,
        max(log["update/shared_token_share"] for log in logs + ours.logs),
        found.counts_padding,
        draws_random_numbers(model),
        remembers(model),
        found.alone,
        max(
            *(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs),
            *(abs(mine - theirs) / theirs for mine, theirs in norms),
        ),
        max(abs(log["kl"]) for log in logs),
        max(map(largest_ratio, logs)),
        min(map(largest_ratio, ours.logs[1::2])),
        found.warnings,
    )


@dataclass
class Architecture:
    """What was found out about one architecture.

    Attributes:
        name: its model type.
        measured: by attention implementation.
        failures: why there is none, by attention implementation.
        trl_fails: whether TRL's trainer is the reason.
        variants: with a rotary embedding that follows the longest position, by kind.
    """

    name: str
    measured: dict[str, Measured]
    failures: dict[str, str]
    trl_fails: bool
    variants: dict[str, Measured]

    def row(self) -> str:
        """Write the table's line."""
        layouts = [self.measured[a].cell if a in self.measured else "–" for a in ATTENTIONS]
        remarks = sorted(set().union(*(measured.remarks for measured in self.measured.values())))
        return f"| `{self.name}` | {' | '.join(layouts)} | {', '.join(sorted(self.variants))} | {', '.join(remarks)} |"


def look_at(name: str, folder: Path) -> Architecture:
    """Measure an architecture with each attention implementation that it has."""
    found = Architecture(name, {}, {}, False, {})
    for attention in ATTENTIONS:
        try:
            found.measured[attention] = measure(tiny_model(name, attention), folder / attention)
        except (NotBuiltError, TRLFailsError) as error:
            found.failures[attention] = str(error)
            found.trl_fails |= isinstance(error, TRLFailsError)
    if found.measured:
        attention = next(iter(found.measured))
        for kind, overrides in rope_variants(name).items():
            found.variants[kind] = measure(tiny_model(name, attention, **overrides), folder / kind)
    return found


PAGE = """# Which models are packed

Every causal language model of transformers {transformers} of which a tiny one can be built, trained for two rollouts of
K = 2 updates by this trainer and by TRL {trl}'s, on CPU in float32. This page is made by `make models`, and
`make test-slow` measures each line of it again.

{architectures} model types: {counts}. {unmeasured}

| | limit | worst |
|---|---|---|
| gradients of updates to TRL's, relative | {limit} | {updates:.1e} |
| log-probabilities of unequal responses to those of each alone, relative (TRL's layout aside) | {limit} | {alone:.1e} |
| KL to equal weights | {kl_limit} | {kl:.1e} |
| log-ratio of a response before any weight has moved, in nats | {limit} | {ratio:.1e} |

The layouts, best first. A model's own is found at the start of a run and, where it is not packed, told in a warning.

- `segments`, `rows`: **packed**, several responses in each row, without padding. (`varlen`, FlashAttention's, needs a
  GPU.)
- *shared*: in addition, a pass computes the prompt of a group once, and all its responses in the pass attend to it.
- `sorted`: each response has a row of its own, and those of like length share a pass.
- `padded`: as TRL does, because the log-probabilities depend on the padding.

The tiny models have a sliding window wherever their architecture knows one, shorter than the longest prompt.

The remarks:

- padding: padding before a prompt changes TRL's log-probabilities, ours are those of the response alone, which are also
  those that generation samples from. The gradients were compared on prompts of one length.
- head: TRL's language model head leaves out a step of the model, so that log-probabilities are not those of the model's
  logits, in TRL's trainer and in ours. A warning says so.
- random: the model draws random numbers while it trains, so that its gradients were not compared.

With a rotary embedding of the kinds `dynamic` and `longrope` the frequencies follow the longest position of a pass, and
every model is `padded`, whatever the table says. {variants} of these were trained, too, with a response that crosses
the original length; the fourth column has them. In {remembering} of these, equal passes differ, because the
frequencies keep what earlier passes made of them; such numbers were not compared.

{table}
## Not measured

{reasons}"""


def page(found: list[Architecture]) -> str:
    """Write the page."""
    every = [m for one in found for m in (*one.measured.values(), *one.variants.values())]
    layouts = Counter(next(iter(one.measured.values())).layout for one in found if one.measured)
    packed = sum(layouts[layout] for layout in PACKED)
    shared = sum(next(iter(one.measured.values())).shares for one in found if one.measured)
    trl_fails = [one for one in found if not one.measured and one.trl_fails]
    not_built = [one for one in found if not one.measured and not one.trl_fails]
    reasons = [f"- `{one.name}`: {one.failures['eager']}" for one in (*trl_fails, *not_built)]
    return PAGE.format(
        transformers=transformers.__version__,
        trl=trl.__version__,
        architectures=len(found),
        counts=f"{packed} packed ({layouts['segments']} in `segments`, {layouts['rows']} in `rows`), of which {shared} "
        f"share prompts, {layouts['sorted']} sorted, {layouts['padded']} padded",
        unmeasured=f"{len(trl_fails)} cannot be run by TRL, {len(not_built)} were not built.",
        limit=LIMIT,
        kl_limit=KL_LIMIT,
        updates=max(m.updates for m in every if not (m.random or m.remembers)),
        alone=max(m.alone for m in every if m.layout != "padded"),
        kl=max(m.kl for m in every if not m.remembers),
        ratio=max(m.ratio for m in every if not m.remembers),
        variants=sum(len(one.variants) for one in found),
        remembering=sum(m.remembers for m in every),
        table=TABLE + "".join(f"{one.row()}\n" for one in found if one.measured),
        reasons="\n".join(reasons) + "\n",
    )


def main():
    parser = argparse.ArgumentParser(description="Write the page about all models.")
    parser.add_argument("path", type=Path)
    parser.add_argument("names", nargs="*", help="model types; all of them by default")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    gc.collect()
    gc.freeze()
    found = []
    for name in arguments.names or architectures():
        with tempfile.TemporaryDirectory() as folder:
            found.append(look_at(name, Path(folder)))
        for kind, measured in (found[-1].measured | found[-1].variants).items():
            print(name, kind, measured, *measured.wrong, flush=True)
    arguments.path.write_text(page(found))


if __name__ == "__main__":
    main()
