"""Finds out in which layouts a model gives a response the log-probabilities that it has alone."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .packing import PackedBatch


def attention_by_segment(module, query, key, value, attention_mask, segments: list[int] | None = None, **kwargs):
    """Compute transformers' `"sdpa"` attention; with `segments`, for each response of a single row alone.

    Query, key and value are (1, heads, W, head dimension); `segments` are lengths that add up to W.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.numel() > 1:
        raise ValueError("This model's layers make their own masks, which attention by segments would ignore.")
    parts = zip(*(tensor.split(segments, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in parts], dim=1), None


# Layer types in which only mask and positions decide what a token sees, or for which `keeps_apart` finds out
BY_POSITION = {
    *("full_attention", "sliding_attention", "indexed_attention"),
    *("linear_attention", "conv", "hybrid", "hybrid_sliding", "moe", "mlp"),
}


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
    masks = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "index_topk")]
    if implementation == "sdpa" and not any(masks):
        AttentionInterface.register("sdpa", attention_by_segment)
        return ["segments", "rows"]
    return ["rows"]


def model_inputs(packed: PackedBatch, layout: str) -> dict[str, Any]:
    """Return the arguments of a forward pass beside ids and labels."""
    if layout == "sorted":
        return {"attention_mask": packed.attention_mask}
    return {"position_ids": packed.position_ids} | attention_arguments(layout, packed.segments, packed.input_ids.device)


def attention_arguments(layout: str, segments: list[int] | None, device: torch.device) -> dict[str, Any]:
    """Return the arguments that keep the responses of a row apart, beside their positions."""
    if layout != "segments" or segments is None:
        return {}
    # transformers passes a mask with four axes through, instead of making one with W² elements
    return {"segments": segments, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}


# Raised by models that don't take the calls of the tests below
NOT_TAKEN = (TypeError, ValueError, IndexError, NotImplementedError, RuntimeError)
PROMPT = [4, 1, 3, 2]  # token ids of a short response with its prompt
LAST_BITS = 32  # units in the last place by which rounding in dozens of layers moves log-probabilities
LEAK = 0.01  # the share of a visible neighbour's effect that still counts as rounding


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
            row |= {"position_ids": torch.tensor([positions], device=device), "segments": lengths}
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
