"""Which layout of packed rows a model takes."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .packing import PackedBatch


def attention_by_segment(module, query, key, value, attention_mask, segments: list[int] | None = None, **kwargs):
    """transformers' `"sdpa"` attention, and with `segments` the same for each of them alone.

    Args:
        module, attention_mask, **kwargs: as transformers passes them; with `segments` the mask holds nothing.
        query, key, value: (1, heads, W, head dimension).
        segments: lengths of the responses in the row, in tokens, W in all.

    Returns:
        (1, W, heads, head dimension) and `None`, as every attention function of transformers.

    Raises:
        ValueError: if a layer passes a mask of its own beside `segments`.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.numel() > 1:
        raise ValueError("This model's layers make masks of their own, which attention by segments would not apply.")
    parts = zip(*(tensor.split(segments, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in parts], dim=1), None


# Layers in which a token sees others by the mask and the positions that it is given, or as the test below finds out
BY_POSITION = {
    *("full_attention", "sliding_attention", "indexed_attention"),
    *("linear_attention", "conv", "hybrid", "hybrid_sliding", "moe", "mlp"),
}


def why_trl_layout(config: PreTrainedConfig) -> str | None:
    """Find what makes a response's log-probabilities depend on where it stands in a pass, which no short test can see.

    There is then no layout but TRL's that gives TRL's numbers: a rotary embedding whose frequencies follow the longest
    position of the whole call (transformers' `dynamic` and `longrope`), or layers that divide a row into blocks of
    columns.

    Args:
        config: of a model; each layer type may have a rotary embedding of its own.

    Returns:
        The reason as a clause, or `None` where there is none.
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


def ways_to_pack(config: PreTrainedConfig) -> list[str]:
    """Name the layouts in which a model's attention might keep the responses of a row apart, best first."""
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
    """Name what a model is called with, beside ids and labels, so that each response has what it has alone."""
    if layout == "sorted":
        return {"attention_mask": packed.attention_mask}
    return {"position_ids": packed.position_ids} | attention_arguments(layout, packed.segments, packed.input_ids.device)


def attention_arguments(layout: str, segments: list[int] | None, device: torch.device) -> dict[str, Any]:
    """Name what keeps the responses of a row apart, beside their positions."""
    if layout != "segments" or segments is None:
        return {}
    # transformers passes a mask with four axes on as it is, instead of making one with W² elements
    return {"segments": segments, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}


# What a model raises that does not take a call of the tests below
NOT_TAKEN = (TypeError, ValueError, IndexError, NotImplementedError, RuntimeError)
PROMPT = [4, 1, 3, 2]  # token ids of a short response with its prompt
LAST_BITS = 32  # units in the last place that rounding moves log-probabilities by through dozens of layers
LEAK = 0.01  # of what a neighbour in the same row changes when it can be seen, the share that counts as rounding


def rounding(log_probs: torch.Tensor, precision: float) -> float:
    """How far another shape of the batch may move log-probabilities: it grows with depth and the logits."""
    return precision**0.5 * (1 + float(log_probs.abs().max()))


@torch.no_grad()
def keeps_apart(log_probs: Callable[..., torch.Tensor], device: torch.device | str, precision: float) -> bool:
    """Measure whether a model gives a response in a shared row the log-probabilities that it gives it alone.

    Architectures differ in whether their attention, their recurrent states and their wrappers (prompt tuning, compiled
    code) respect positions that start again within a row; nothing in a config tells.

    Args:
        log_probs: maps `input_ids` (1, W), and in a shared row `position_ids` (1, W) and the `segments`, to the
            log-probabilities (1, W-1) of ids as labels.
        device: of the model.
        precision: machine epsilon of its arithmetic.

    Returns:
        False too where the model does not take such a call.
    """

    def scored(before: list[int], apart: bool) -> torch.Tensor:
        row: dict[str, Any] = {"input_ids": torch.tensor([before + PROMPT], device=device)}
        if apart:  # in an ordinary row a response has the positions that the model itself gives it
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
    # Another neighbour must change nothing but the last bits, with which a mixture of experts shares its tokens out. Of
    # a low precision these are many: then little is judged by what a neighbour changes that can be seen.
    leak = (shared - other).abs().max()
    faint = leak <= min(LAST_BITS * precision * (1 + float(alone.abs().max())), LEAK * float(seen))
    return bool(faint and (shared - alone).abs().max() <= rounding(alone, precision))


@torch.no_grad()
def ignores_left_padding(log_probs: Callable[..., torch.Tensor], device: torch.device | str, precision: float) -> bool:
    """Measure whether a model gives a response behind padding the log-probabilities that it gives it alone.

    Generation pads prompts on the left and passes positions that do not count the padding. Some recurrent models take
    the padding into their state all the same: what they sample from is TRL's padded row, which nothing else stands for.

    Args:
        log_probs: maps `input_ids`, `attention_mask` (1, W) and maybe `position_ids` to the log-probabilities (1, W-1)
            of ids as labels.
        device: of the model.
        precision: machine epsilon of its arithmetic.

    Returns:
        Whether it does, with the positions of generation where it takes positions.
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
