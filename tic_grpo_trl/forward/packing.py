"""Packs the real tokens of several responses into rows, so that no padding is computed.

TRL pads every prompt and completion to the longest of the generation batch. Here each response has the
log-probabilities that it has alone. With relative positions (RoPE, ALiBi) they equal those in TRL's rows; with absolute
positions TRL counts the padding before a prompt. The layouts, best first:

- `"segments"`: all responses in one row; PyTorch's scaled-dot-product attention is called once per response;
- `"varlen"`: all responses in one row; FlashAttention's variable-length kernels read the positions;
- `"rows"`: several responses per row, separated by an attention mask that transformers makes from the positions. The
  mask has width² elements, so the rows are short;
- `"sorted"`: one response per row, without padding before it. A causal model can't see the padding behind it, and
  responses of similar length share a pass;
- `"padded"`: TRL's rows, for models whose log-probabilities depend on the padding.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch


IGNORED = -100  # the label of a token that is not scored
SINGLE_ROW = ("segments", "varlen")
PACKED = (*SINGLE_ROW, "rows")


def longest_first(lengths: list[int]) -> list[int]:
    """Return the indices of the items, longest first; equal ones keep their order."""
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def first_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Put items into rows of `width` by first-fit decreasing, and return their indices by row.

    There are at most 11/9 of the fewest possible rows, plus one. Lengths and width are in tokens.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for item in longest_first(lengths):
        row = next((r for r, left in enumerate(room) if left >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows


def lay_out(lengths: list[int], linear_width: int) -> list[list[int]]:
    """Put items into the rows that cost least, and return their indices by row.

    A token costs `width + linear_width`: the first for attention over its row, the second for everything else. Rows
    somewhat wider than the longest item may leave fewer slots empty.
    """
    longest, total = max(lengths), sum(lengths)

    def cost(rows: list[list[int]]) -> float:
        width = max(sum(lengths[i] for i in row) for row in rows)
        return len(rows) * width * (width + linear_width)

    best = first_fit(lengths, longest)
    # The mask of a row has width² elements, so no row becomes wider than two of the longest items.
    for count in range(len(best) - 1, 0, -1):
        width = max(longest, -(-total // count))
        while width <= 2 * longest and len(rows := first_fit(lengths, width)) > count:
            width += max(1, width // 16)
        if width > 2 * longest:
            break
        best = min(best, rows, key=cost)
    return best


def plan_passes(lengths: list[int], rows_per_pass: int, packs: bool) -> list[list[int]]:
    """Distribute responses over the fewest forward passes that are no larger than TRL's.

    A pass has `rows_per_pass` rows as long as the longest response. With `packs`, several responses share a row;
    without, responses of similar length share a pass. Returns the indices of the responses by pass.
    """
    if not lengths:
        return []
    rows = first_fit(lengths, max(lengths)) if packs else [[i] for i in longest_first(lengths)]
    passes = -(-len(rows) // rows_per_pass)
    cuts = [len(rows) * i // passes for i in range(passes + 1)]
    return [[i for row in rows[start:end] for i in row] for start, end in pairwise(cuts)]


@dataclass(frozen=True)
class PackedBatch:
    """The real tokens of B responses in R packed rows of W slots."""

    input_ids: torch.Tensor  # (R, W)
    attention_mask: torch.Tensor  # (R, W), 1 on real tokens
    # from 0 in every response; 0 in empty slots, which so attend to themselves alone
    position_ids: torch.Tensor  # (R, W)
    labels: torch.Tensor  # (R, W), the id of every token that is scored, -100 elsewhere
    scored: torch.Tensor  # (m,) the slots of the scored tokens
    columns: torch.Tensor  # (m,) their places among the B·T values that `unpack` returns
    shape: tuple[int, int]  # (B, T)
    segments: list[int]  # lengths of the responses in a single row, and of the empty rest
    tokens: int  # number of real tokens

    def unpack(self, per_token: torch.Tensor) -> torch.Tensor:
        """Bring values of all slots but a row's first, (R, W-1), back to (B, T), with 0 where nothing was scored."""
        by_slot = torch.nn.functional.pad(per_token, (1, 0)).reshape(-1)
        values = by_slot.new_zeros(self.shape[0] * self.shape[1])
        return values.index_copy(0, self.columns, by_slot.index_select(0, self.scored)).view(self.shape)


def pack(
    input_ids: torch.Tensor,  # (B, S)
    attention_mask: torch.Tensor,  # (B, S)
    logits_to_keep: int,
    pad_token_id: int,
    layout: str,
    linear_width: int = 0,
    multiple_of: int | None = None,
) -> PackedBatch:
    """Pack the real tokens of a padded batch (prompts padded on the left, completions on the right) into rows.

    T = `logits_to_keep` columns of completions are scored, but never the first token of a response. `linear_width` is
    that of [`lay_out`], and the width becomes divisible by `multiple_of`.

    Returns:
        The rows; two empty slots if the batch has no token at all, so that a forward pass is possible.
    """
    real = attention_mask.bool()
    lengths = real.sum(dim=1).tolist()
    if layout == "sorted":
        rows = [[i] for i, length in enumerate(lengths) if length] or [[0]]
    else:
        rows = [list(range(len(lengths)))] if layout in SINGLE_ROW else lay_out(lengths, linear_width)
    width = max(2, *(sum(lengths[i] for i in row) for row in rows))
    width += -width % (multiple_of or 1)

    empty = width - sum(lengths)  # of a single row
    segments = [length for length in [*lengths, empty] if length] if layout in SINGLE_ROW else []
    starts = [0] * len(lengths)
    for r, row in enumerate(rows):
        start = r * width
        for i in row:
            starts[i] = start
            start += lengths[i]

    position = real.cumsum(dim=1) - 1  # (B, S)
    slot = torch.tensor(starts, device=real.device).unsqueeze(1) + position
    source = real.flatten().nonzero().squeeze(1)  # (n,) index into B·S of the real tokens
    target = slot.flatten()[source]  # (n,) index into R·W

    def laid_out(values: torch.Tensor, empty: int) -> torch.Tensor:
        flat = torch.full((len(rows) * width,), empty, dtype=values.dtype, device=values.device)
        return flat.index_copy_(0, target, values.flatten()[source]).view(len(rows), width)

    scored = real & (position > 0)
    scored[:, :-logits_to_keep] = False
    columns = scored[:, -logits_to_keep:].flatten().nonzero().squeeze(1)
    return PackedBatch(
        input_ids=laid_out(input_ids, pad_token_id),
        attention_mask=laid_out(attention_mask, 0),
        position_ids=laid_out(position, 0),
        labels=laid_out(torch.where(scored, input_ids, IGNORED), IGNORED),
        scored=slot[:, -logits_to_keep:].flatten()[columns],
        columns=columns,
        shape=(len(lengths), logits_to_keep),
        segments=segments,
        tokens=sum(lengths),
    )


def used_columns(prompt_mask: torch.Tensor, completion_mask: torch.Tensor) -> tuple[int, int]:
    """Count the columns of a padded batch that some response uses: of the prompts (the last ones), and the completions.

    At least one and two columns are returned, where there are so many: TRL takes one column of completions for one
    value per response.
    """
    from_right = torch.arange(prompt_mask.size(1), 0, -1, device=prompt_mask.device)
    from_left = torch.arange(1, completion_mask.size(1) + 1, device=prompt_mask.device)
    furthest = [(prompt_mask.bool() * from_right).max(), (completion_mask.bool() * from_left).max()]
    prompt, completion = torch.stack(furthest).tolist()
    return max(prompt, 1), min(max(completion, 2), completion_mask.size(1))
