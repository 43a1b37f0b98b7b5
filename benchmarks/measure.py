"""Time the update phase of a trainer, and count its passes."""

import gc
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from cases import GROUP, UPDATES, Rollout, Scale, make_rollout, make_trainer, skewed_lengths
from torch import nn
from transformers import TrainerCallback
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


@dataclass
class Run:
    """The update phase of one rollout.

    Attributes:
        seconds: from the end of the step before it to the end of its last step.
        parts: seconds per kind of work, without the rest.
        forwards: passes through the model's layers.
        positions: token positions in these passes, including padding.
        grad_norms: gradient norms of the `UPDATES` steps.
    """

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    forwards: int = 0
    positions: int = 0
    grad_norms: list[float] = field(default_factory=list)


class Stopwatch(TrainerCallback):
    """Time the rollout after the warm-up, and the kinds of work in it."""

    def __init__(self, trainer):
        self.run, self.start, self.part_start = Run(), 0.0, 0.0
        trainer.add_callback(self)
        trainer.model.register_forward_pre_hook(self._begin)
        trainer.model.register_forward_hook(self._end_forward)
        first_layer = next(module for module in trainer.model.modules() if isinstance(module, Qwen3DecoderLayer))
        first_layer.register_forward_pre_hook(self._count)
        trainer.accelerator.backward = self._timed(trainer.accelerator.backward, "backward")
        trainer._generate = self._timed(trainer._generate, "replaying the responses")

    def _timed(self, function, part: str):
        def timed(*args, **kwargs):
            self._begin()
            result = function(*args, **kwargs)
            self._end(part)
            return result

        return timed

    def _begin(self, *ignored):
        self.part_start = time.perf_counter()

    def _end(self, part: str):
        self.run.parts[part] += time.perf_counter() - self.part_start

    def _end_forward(self, *ignored):
        self._end("forward for the loss" if torch.is_grad_enabled() else "forward for old log-probabilities")

    def _count(self, module, args):
        self.run.forwards += 1
        self.run.positions += args[0].shape[0] * args[0].shape[1]

    def on_pre_optimizer_step(self, *args, **kwargs):
        self._begin()

    def on_optimizer_step(self, *args, **kwargs):
        self._end("optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == UPDATES:
            self.run, self.start = Run(), time.perf_counter()
        elif state.global_step == 2 * UPDATES:
            self.run.seconds = time.perf_counter() - self.start


def train(kind: str, scale: Scale, model, rollout: Rollout, seed: int = 0, lora: bool = False, **options) -> Run:
    """Run the trainer `kind` (see [`make_trainer`](cases.py)) over a warm-up rollout and `rollout`."""
    trainer = make_trainer(kind, scale, model, rollout, seed, lora, **options)
    watch = Stopwatch(trainer)
    gc.collect()
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    watch.run.grad_norms = norms[UPDATES : 2 * UPDATES]
    return watch.run


def disagreement(run: Run, other: Run) -> float:
    """Return the largest relative difference of the gradient norms of two runs."""
    pairs = zip(run.grad_norms, other.grad_norms, strict=True)
    return max(abs(a - b) / max(a, b) for a, b in pairs)


class Limit:
    """The strictly necessary work of a rollout, without a trainer.

    For each mini-batch this is one forward and backward pass over the tokens of the active responses, as a batch of
    equal lengths without padding or mask. Mini-batches after the first need another forward pass for the old
    log-probabilities. The model is the trainer's, so its head also computes the entropy that the trainers log.
    """

    def __init__(self, scale: Scale, model, rollout: Rollout):
        self.model = make_trainer("trl", scale, model, rollout).model.train()
        self.vocabulary = scale.model["vocab_size"]
        self.minibatches = rollout.active_minibatches  # maps a seed to responses and tokens of each

    def run(self, seed: int) -> tuple[float, float, int]:
        """Return seconds of training passes, seconds of scoring, and trained tokens, for the shuffle of `seed`."""
        shapes = [(n, round(tokens / n)) for n, tokens in self.minibatches(seed) if n]
        batches = [torch.randint(1, self.vocabulary, shape) for shape in shapes]
        self.model.zero_grad()
        gc.collect()
        start = time.perf_counter()
        for ids in batches:
            self.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum().backward()
        middle = time.perf_counter()
        with torch.no_grad():
            for ids in batches[1:]:
                self.model(input_ids=ids, labels=ids, fused_lm_head=True)
        return middle - start, time.perf_counter() - middle, sum(ids.numel() for ids in batches)


class FreeModel(nn.Module):
    """Replace a model by free log-probabilities: slices of one parameter, whatever the input."""

    def __init__(self, template, positions: int):
        super().__init__()
        self.config, self.dtype = template.config, torch.float32
        self.log_probs = nn.Parameter(torch.full((positions,), -1.0))
        self.entropy = torch.ones(positions)

    def forward(self, input_ids, labels=None, **ignored):
        rows, width = input_ids.shape[0], input_ids.shape[1] - 1
        log_probs = self.log_probs[: rows * width].view(rows, width)
        return SimpleNamespace(log_probs=log_probs, entropy=self.entropy[: rows * width].view(rows, width))


class LossAlone:
    """Time the forward and backward pass of a trainer's loss of one batch, without the model.

    Args:
        kind: kind of trainer.
        scale: sizes.
        model: model to build the trainer with; it computes nothing here.
        lengths: tokens per response.
    """

    def __init__(self, kind: str, scale: Scale, model, lengths: list[int]):
        rows, width, prompt = len(lengths), max(lengths), scale.prompt[0]
        # Only the longest response of this rollout matters: it is the T of the constant normalizer.
        rollout = make_rollout(scale, [width, *[2] * (GROUP * UPDATES - 1)], zero_advantage_groups=0)
        self.trainer = make_trainer(kind, scale, model, rollout)
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = self.trainer.args.gradient_accumulation_steps
        self.model = FreeModel(self.trainer.model, rows * (prompt + width)).train()
        mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()  # (B, T)
        self.inputs = {
            "prompt_ids": torch.ones(rows, prompt, dtype=torch.long),
            "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
            "completion_ids": torch.ones(rows, width, dtype=torch.long),
            "completion_mask": mask,
            "advantages": torch.tensor([0.5, -0.5] * (rows // 2)),
            "old_per_token_logps": torch.full((rows, width), -1.01),
            "num_items_in_batch": mask.sum(),
        }

    def run(self) -> float:
        """Return the seconds of one pass."""
        self.model.zero_grad()
        start = time.perf_counter()
        self.trainer._compute_loss(self.model, dict(self.inputs)).backward()
        return time.perf_counter() - start


def loss_lengths(scale: Scale) -> dict[str, list[int]]:
    """Return the lengths for timing the loss alone: all full, and skewed as in the other cases."""
    mean = scale.loss_width * scale.mean // scale.longest
    count = scale.loss_responses
    return {
        "full": [scale.loss_width] * count,
        "skewed": skewed_lengths(count, 2 * mean, scale.loss_width),
    }


class SavedBytes:
    """Count the bytes of storages, except weights, that autograd keeps for the backward pass."""

    def __init__(self, weights):
        self.weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.holders: dict[int, int] = defaultdict(int)
        self.alive = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> "_Held":
        storage = tensor.untyped_storage()
        held = _Held(tensor, storage.data_ptr(), self)
        if held.key not in self.weights:
            self.holders[held.key] += 1
            if self.holders[held.key] == 1:
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
        return held

    def release(self, held: "_Held"):
        if held.key not in self.weights:
            self.holders[held.key] -= 1
            if self.holders[held.key] == 0:
                self.alive -= held.tensor.untyped_storage().nbytes()

    @contextmanager
    def counting(self):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor):
            yield


class _Held:
    """A tensor that autograd holds until its step of the backward pass is done."""

    def __init__(self, tensor: torch.Tensor, key: int, owner: SavedBytes):
        self.tensor, self.key, self.owner = tensor, key, owner

    def __del__(self):
        self.owner.release(self)


def _memory(name: str) -> int:
    """Return resident memory of this process in bytes: VmRSS (now) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def peak_memory(kind: str, scale: Scale, model, rollout: Rollout, **options) -> tuple[int, int]:
    """Measure the memory of a trainer's `train()`. Call it once per process for the peak, which is the process's.

    Returns:
        Largest number of bytes that autograd held for the backward pass, and the increase of the peak resident memory
        of the process in bytes.
    """
    trainer = make_trainer(kind, scale, model, rollout, **options)
    counter = SavedBytes(trainer.model.parameters())
    gc.collect()
    before = _memory("VmRSS")
    with counter.counting():
        trainer.train()
    return counter.peak, _memory("VmHWM") - before
