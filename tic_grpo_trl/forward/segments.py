"""The segments of a packed row, and attention in which each sees itself and the prompt that it shares.

A group's prompt stands in a row once. The segment of each of its responses begins with a copy of the prompt's last
token, which predicts the response's first one, so that only the other tokens of the prompt are shared.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


QUERIES = 256  # of a segment in one call with a mask


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
    Causal scaled-dot-product attention within the segments of a row, for all layers of a forward pass.

    Args:
        segments: the segments.
        device: device of the row.
        windows: collects the sliding windows, in tokens, with which layers call; `None` for none.
    """

    def __init__(self, segments: Segments, device: torch.device | str, windows: set[int | None] | None = None):
        self.segments, self.windows = segments, windows
        pairs = zip(segments.lengths, segments.key_lengths, strict=True)
        masked = [(min(length, QUERIES), keys) for length, keys in pairs if length < keys <= 2 * (keys - length)]
        # Each corner at the bottom right of a causal mask that is aligned there is a smaller mask of this kind.
        queries, keys = (max(values) for values in zip(*masked, (0, 0), strict=True))
        self._mask = _visible(queries, keys, device)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,  # (1, heads, W, head dimension)
        key: torch.Tensor,  # (1, key heads, W, head dimension)
        value: torch.Tensor,  # (1, key heads, W, head dimension)
        window: int | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return (1, W, heads, head dimension).

        A response that is longer than its shared prompt attends in one causal call without a mask, for which the
        prompt's queries are computed again. A shorter one attends with a mask, as its few queries see many keys.
        """
        if self.windows is not None:
            self.windows.add(window)
        parts = list(zip(*(each.split(self.segments.lengths, dim=2) for each in (query, key, value)), strict=True))
        attended = []
        for (q, k, v), prompt in zip(parts, self.segments.prompts, strict=True):
            own, shared = q.size(2), 0
            if prompt is not None:
                shared = self.segments.lengths[prompt]
                q, k, v = (torch.cat(pair, dim=2) for pair in zip(parts[prompt], (q, k, v), strict=True))
            if own > shared and (window is None or own + shared <= window):
                attended.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0][:, shared:])
            else:
                attended += self._attend_masked(module, q, k, v, own, window, **kwargs)
        return torch.cat(attended, dim=1)

    def _attend_masked(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        own: int,
        window: int | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **ignored: Any,
    ) -> list[torch.Tensor]:
        """Attend with the last `own` queries, in blocks."""
        groups: Any = getattr(module, "num_key_value_groups", 1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        end = key.size(2) - own
        attended = []
        for block in query[:, :, end:].split(QUERIES, dim=2):
            size, end = block.size(2), end + block.size(2)
            start = 0 if window is None else max(0, end - size + 1 - window)
            mask = self._mask[-size:, -end:] if window is None else _visible(size, end - start, block.device, window)
            keys, values = key[:, :, start:end], value[:, :, start:end]
            output = scaled_dot_product_attention(block, keys, values, mask, dropout, scale=scaling)
            attended.append(output.transpose(1, 2))
        return attended


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
    if kwargs.get("position_bias") is not None:
        raise ValueError("This model's attention has a bias by position, which attention by segments would ignore.")
    return segments.attend(module, query, key, value, kwargs.pop("sliding_window", None), **kwargs), None


class FlashSegments:
    """
    Segments of a row as FlashAttention's variable-length kernels take them, for all layers of a forward pass.

    The kernels align queries and keys at their ends, so a response's queries are the last of its keys.
    """

    def __init__(self, segments: Segments, device: torch.device | str):
        self.segments = segments

        def ends(lengths: list[int]) -> torch.Tensor:
            return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)

        self.arguments = {
            "cu_seq_lens_q": ends(segments.lengths),
            "cu_seq_lens_k": ends(segments.key_lengths),
            "max_length_q": max(segments.lengths),
            "max_length_k": max(segments.key_lengths),
        }

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:  # (1, key heads, W, head dimension)
        """Return keys or values with those of shared prompts before each of their responses."""
        parts = tensor.transpose(1, 2).split(self.segments.lengths, dim=1)
        seen = [
            parts[each] for i, prompt in enumerate(self.segments.prompts) for each in (prompt, i) if each is not None
        ]
        return torch.cat(seen, dim=1).transpose(1, 2)


def attention_with_copied_keys(
    attention, module, query, key, value, *args, segments: FlashSegments | None = None, **kwargs
):
    """Compute FlashAttention's `attention`; with `segments`, each response of a single row also sees its prompt."""
    if segments is None:
        return attention(module, query, key, value, *args, **kwargs)
    key, value = segments.copied(key), segments.copied(value)
    return attention(module, query, key, value, *args, **kwargs | segments.arguments)


def register_sdpa():
    """Let transformers' `"sdpa"` take segments."""
    AttentionInterface.register("sdpa", attention_by_segment)


def register_flash(implementation: str):
    """Let a FlashAttention of transformers take segments; another model may have registered it anew."""
    attention = ALL_ATTENTION_FUNCTIONS[implementation]
    if getattr(attention, "func", None) is not attention_with_copied_keys:
        AttentionInterface.register(implementation, partial(attention_with_copied_keys, attention))
