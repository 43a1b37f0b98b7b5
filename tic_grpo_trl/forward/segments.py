"""The segments of a packed row, and attention in which each sees itself and the prompt that it shares.

A group's prompt stands in a row once. The segment of each of its responses begins with a copy of the prompt's last
token, which predicts the response's first one, so that only the other tokens of the prompt are shared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


QUERIES = 256  # of a segment in one call with a mask, so that no mask has the square of its length elements


@dataclass(frozen=True)
class Segments:
    """Consecutive parts of a single row.

    Args:
        lengths: number of slots of each.
        prompts: for each, the number of the segment whose keys and values it also sees, all of them before its own.
    """

    lengths: list[int]
    prompts: list[int | None]

    @property
    def key_lengths(self) -> list[int]:
        """Return the number of keys that each sees."""
        pairs = zip(self.lengths, self.prompts, strict=True)
        return [length + (0 if prompt is None else self.lengths[prompt]) for length, prompt in pairs]

    @property
    def shares(self) -> bool:
        """Whether some segment sees another."""
        return any(prompt is not None for prompt in self.prompts)


class SegmentedAttention:
    """
    Causal attention within the segments of a row, for all layers of a forward pass.

    Args:
        segments: the segments.
        device: device of the row.

    `windows` collects the sliding windows, in tokens, with which layers have called; `None` for none.
    """

    def __init__(self, segments: Segments, device: torch.device | str):
        self.segments, self.windows = segments, set[int | None]()
        pairs = zip(segments.lengths, segments.key_lengths, segments.prompts, strict=True)
        sizes = [(min(length, QUERIES), keys) for length, keys, prompt in pairs if prompt is not None]
        # Each corner at the bottom right of a causal mask that is aligned there is a smaller mask of this kind.
        queries, keys = (max(values, default=0) for values in zip(*sizes, (0, 0), strict=True))
        self._mask = _visible(queries, keys, device)

    def attend(
        self,
        attention: Callable[..., Any],  # maps query, key, value and mask to (1, queries, heads, head dimension)
        query: torch.Tensor,  # (1, heads, W, head dimension)
        key: torch.Tensor,  # (1, key heads, W, head dimension)
        value: torch.Tensor,  # (1, key heads, W, head dimension)
        window: int | None,
    ) -> torch.Tensor:
        """Return (1, W, heads, head dimension)."""
        self.windows.add(window)
        lengths = self.segments.lengths
        parts = list(zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True))
        attended = []
        for (queries, *own), prompt in zip(parts, self.segments.prompts, strict=True):
            if prompt is None and (window is None or queries.size(2) <= window):
                attended.append(attention(queries, *own, None))
                continue
            shared = [] if prompt is None else [parts[prompt][1:]]
            keys, values = (torch.cat(tensors, dim=2) for tensors in zip(*shared, own, strict=True))
            end = keys.size(2) - queries.size(2)
            for block in queries.split(QUERIES, dim=2):
                size, end = block.size(2), end + block.size(2)
                start = max(0, end - size + 1 - window) if window else 0
                if prompt is not None and (window is None or end <= window):
                    mask = self._mask[-size:, -end:]
                else:
                    mask = _visible(size, end - start, block.device, window)
                attended.append(attention(block, keys[:, :, start:end], values[:, :, start:end], mask[None, None]))
        return torch.cat(attended, dim=1)


def _visible(queries: int, keys: int, device: torch.device | str, window: int | None = None) -> torch.Tensor:
    """Return a causal mask, (queries, keys), in which the last query belongs to the last key."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


def attention_by_segment(
    module, query, key, value, attention_mask, segments: SegmentedAttention | None = None, **kwargs
):
    """Compute transformers' `"sdpa"` attention; with `segments`, within each segment of a single row.

    Query, key and value are (1, heads, W, head dimension).
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.numel() > 1:
        raise ValueError("This model's layers make their own masks, which attention by segments would ignore.")

    def attention(query, key, value, mask) -> torch.Tensor:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]

    return segments.attend(attention, query, key, value, kwargs.get("sliding_window")), None


def attention_with_copied_keys(attention, module, query, key, value, *args, key_slots=None, **kwargs):
    """Compute FlashAttention's variable-length `attention`, with the keys and values of `key_slots`, (keys,)."""
    if key_slots is not None:
        key, value = (tensor.index_select(2, key_slots) for tensor in (key, value))
    return attention(module, query, key, value, *args, **kwargs)


def register_sdpa():
    """Let transformers' `"sdpa"` take segments."""
    AttentionInterface.register("sdpa", attention_by_segment)


def register_flash(implementation: str):
    """Let a variable-length attention of transformers take copied keys."""
    attention = ALL_ATTENTION_FUNCTIONS[implementation]
    if getattr(attention, "func", None) is not attention_with_copied_keys:
        AttentionInterface.register(implementation, partial(attention_with_copied_keys, attention))


def flash_arguments(segments: Segments, device: torch.device) -> dict[str, Any]:
    """Return FlashAttention's arguments for segments: where each begins, and the slots of the keys that it sees.

    The variable-length kernels align queries and keys at their ends, so a response's queries are the last of its keys.
    """
    starts = [0]
    for length in segments.lengths:
        starts.append(starts[-1] + length)
    slots: list[int] = []
    for i, prompt in enumerate(segments.prompts):
        for segment in (i,) if prompt is None else (prompt, i):
            slots += range(starts[segment], starts[segment + 1])

    def ends(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)

    return {
        "cu_seq_lens_q": ends(segments.lengths),
        "cu_seq_lens_k": ends(segments.key_lengths),
        "max_length_q": max(segments.lengths),
        "max_length_k": max(segments.key_lengths),
        "key_slots": torch.tensor(slots, device=device),
    }
