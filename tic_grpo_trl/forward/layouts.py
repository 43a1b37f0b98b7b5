"""Finds out in which layouts a model gives a response the log-probabilities that it has alone."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from .packing import SINGLE_ROW, PackedBatch
from .segments import FlashSegments, SegmentedAttention, Segments, register_sdpa


# Layer types in which only mask and positions decide what a token sees, or for which `keeps_apart` finds out
BY_POSITION = {
    *("full_attention", "sliding_attention", "indexed_attention"),
    *("linear_attention", "conv", "hybrid", "hybrid_sliding", "moe", "mlp"),
}


# Layer types in which only attention lets a token see others
ATTENTION_ONLY = {"full_attention", "sliding_attention", "moe", "mlp"}
# Layer types with attention, and whether it has a sliding window
WINDOWED = {"full_attention": False, "sliding_attention": True, "hybrid": False, "hybrid_sliding": True}


def why_trl_layout(config: PreTrainedConfig) -> str | None:
    """Return why a response's log-probabilities depend on its place in a pass, as a clause, or `None`.

    Only TRL's layout then gives TRL's numbers: a rotary embedding follows the longest position of the whole call
    (transformers' `dynamic` and `longrope`), or layers divide a row into blocks of columns. No short test shows it.
    """
    text = config.get_text_config()
    # models that bring their own code may still have the older name, and the older key
    given = [getattr(text, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    given += [value for parameters in given for value in parameters.values() if isinstance(value, dict)]
    for rope_type in [parameters.get(key) for parameters in given for key in ("rope_type", "type")]:
        if rope_type in ("dynamic", "longrope"):
            return f"with rope_type={rope_type!r} the model's frequencies follow the longest position of a pass"
    for layer_type in getattr(text, "layer_types", None) or []:
        if layer_type not in BY_POSITION:
            return f"the model's layers of type {layer_type!r} divide a row into blocks of columns"
    return None


def packed_layouts(config: PreTrainedConfig) -> list[str]:
    """Return the packed layouts in which a model's attention might keep responses apart, best first."""
    implementation = str(config._attn_implementation)
    if "flash" in implementation:
        return ["varlen"]
    text = config.get_text_config()
    if implementation == "sdpa" and not any(
        getattr(text, name, None) for name in ("attention_chunk_size", "index_topk")
    ):
        register_sdpa()
        return ["segments", "rows"]
    return ["rows"]


def passes_windows(config: PreTrainedConfig, windows: set[int | None]) -> bool:
    """Return whether a model's layers called attention with the sliding windows that its config states, in tokens.

    `None` stands for a layer without one. No short test shows a window that a layer keeps to itself.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = [kind for kind in getattr(text, "layer_types", None) or ["sliding_attention"] if kind in WINDOWED]
    return window is None or windows == {window if WINDOWED[kind] else None for kind in kinds}


def model_inputs(packed: PackedBatch, layout: str) -> dict[str, Any]:
    """Return the arguments of a forward pass beside ids and labels."""
    if layout == "sorted":
        return {"attention_mask": packed.attention_mask}
    return {"position_ids": packed.position_ids} | attention_arguments(layout, packed.segments, packed.input_ids.device)


def attention_arguments(
    layout: str, segments: Segments | None, device: torch.device, windows: set[int | None] | None = None
) -> dict[str, Any]:
    """Return the arguments that keep the segments of a row apart, beside their positions.

    `windows` collects the sliding windows that layers ask for; see [`SegmentedAttention`].
    """
    if segments is None:
        return {}
    if layout == "segments":
        # transformers passes a mask with four axes through, instead of making one with W² elements
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        return {"segments": SegmentedAttention(segments, device, windows), "attention_mask": unused}
    # FlashAttention reads from the positions where segments begin, unless they share a prompt
    return {"segments": FlashSegments(segments, device)} if layout == "varlen" and segments.shares else {}


# Raised by models that don't take the calls of the tests below
NOT_TAKEN = (TypeError, ValueError, IndexError, NotImplementedError, RuntimeError)
PROMPT = [4, 1, 3, 2]  # token ids of a short response with its prompt
LAST_BITS = 32  # units in the last place by which rounding in dozens of layers moves log-probabilities
LEAK = 0.01  # the share of a visible neighbour's effect that still counts as rounding
MISSED = 0.5  # the share of a prompt's effect that may be lost in rounding


def rounding(log_probs: torch.Tensor, precision: float) -> float:
    """Return how far another batch shape may move log-probabilities; it grows with depth and with the logits."""
    return precision**0.5 * (1 + float(log_probs.abs().max()))


@torch.no_grad()
def keeps_apart(log_probs: Callable[..., torch.Tensor], device: torch.device | str, precision: float) -> bool:
    """Measure whether a model gives a response in a shared row the log-probabilities that it has alone.

    Attention, recurrent states and wrappers (prompt tuning, compiled code) differ in whether they respect positions
    that restart within a row; no config tells. `log_probs` maps `input_ids`, and for a shared row `position_ids` and
    `segments`, to (1, W-1) log-probabilities; `precision` is the machine epsilon.
    """

    def scored(before: list[int], apart: bool) -> torch.Tensor:
        row: dict[str, Any] = {"input_ids": torch.tensor([before + PROMPT], device=device)}
        if apart:  # otherwise the model chooses the positions itself
            lengths = [len(before), len(PROMPT)]
            positions = [i for length in lengths for i in range(length)]
            row |= {"position_ids": torch.tensor([positions], device=device)}
            row |= {"segments": Segments(lengths, [None, None])}
        return log_probs(**row)[0, -(len(PROMPT) - 1) :].float()

    one, another = [1, 2, 3], [2, 4, 1]
    try:
        shared, other = scored(one, apart=True), scored(another, apart=True)
        alone = scored([], apart=False)
        seen = (scored(one, apart=False) - scored(another, apart=False)).abs().max()
    except NOT_TAKEN:
        return False
    # Another neighbour may change nothing but the last bits, as it does in mixtures of experts. In low precision these
    # are large, so the change is also compared with that of a neighbour that is visible.
    leak = (shared - other).abs().max()
    faint = leak <= min(LAST_BITS * precision * (1 + float(alone.abs().max())), LEAK * float(seen))
    return bool(faint and (shared - alone).abs().max() <= rounding(alone, precision))


@torch.no_grad()
def ignores_left_padding(log_probs: Callable[..., torch.Tensor], device: torch.device | str, precision: float) -> bool:
    """Measure whether a model gives a response behind padding the log-probabilities that it has alone.

    Generation pads prompts on the left and passes positions that skip the padding. Some recurrent models take the
    padding into their state anyway: they sample from TRL's padded row, so only that row may be scored.
    """
    size = len(PROMPT)
    padding = [0, 0, 0]
    ids = torch.tensor([padding + PROMPT], device=device)
    mask = torch.tensor([[0] * len(padding) + [1] * size], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = log_probs(input_ids=ids[:, -size:], attention_mask=mask[:, -size:])[0].float()

    def is_alone(**inputs: torch.Tensor) -> bool:
        padded = log_probs(input_ids=ids, attention_mask=mask, **inputs)[0, -(size - 1) :].float()
        return bool((padded - alone).abs().max() <= rounding(alone, precision))

    if is_alone():
        return True
    try:
        return is_alone(position_ids=positions)
    except NOT_TAKEN:
        return False


def may_share_prompts(config: PreTrainedConfig, layout: str) -> bool:
    """Return whether a model's attention can let several responses see one prompt, as far as its config tells."""
    text = config.get_text_config()
    return layout in SINGLE_ROW and ATTENTION_ONLY.issuperset(getattr(text, "layer_types", None) or [])


@torch.no_grad()
def shares_exactly(log_probs: Callable[..., torch.Tensor], device: torch.device | str, precision: float) -> bool:
    """Measure whether responses to a shared prompt have the log-probabilities that they have with their own.

    A response must not see another, and must see the prompt as it does without sharing. `log_probs` maps padded ids and
    their mask, (B, P + T), T, and whether prompts are shared to (B, T) log-probabilities; `precision` is the machine
    epsilon.
    """
    first, second, third, another_second = [1, 2, 3, 4, 1, 2], [3, 1], [2, 2, 4], [1, 4]
    another_prompt = [1, *PROMPT[1:]]

    def scored(shares: bool, *pairs: tuple[list[int], list[int]]) -> torch.Tensor:
        padding = [len(first) - len(response) for _, response in pairs]
        ids = [[*prompt, *response, *[0] * rest] for (prompt, response), rest in zip(pairs, padding, strict=True)]
        mask = [[1] * (len(row) - rest) + [0] * rest for row, rest in zip(ids, padding, strict=True)]
        tensors = (torch.tensor(values, device=device) for values in (ids, mask))
        return log_probs(*tensors, len(first), shares).float()

    group = [(PROMPT, response) for response in (first, second, third)]
    other_group = [(another_prompt, response) for _, response in group]
    other_sibling = [group[0], (PROMPT, another_second), group[2]]
    visible = [(PROMPT, before + third) for before in (second, another_second)]
    try:
        alone, other, seen = scored(False, *group, *other_group, *visible).split([3, 3, 2])
        shared, shared_other = scored(True, *group), scored(True, *other_group)
        leak = (scored(True, *other_sibling) - shared)[2].abs().max()
    except NOT_TAKEN:
        return False
    noise = LAST_BITS * precision * (1 + float(alone.abs().max()))
    effect = (seen[0] - seen[1])[len(second) : len(second + third)].abs().max()
    of_prompt, missed = (other - alone).abs().max(), ((shared_other - shared) - (other - alone)).abs().max()
    equal = (shared - alone).abs().max() <= rounding(alone, precision)
    return bool(equal and leak <= min(noise, LEAK * float(effect)) and missed <= MISSED * of_prompt)
