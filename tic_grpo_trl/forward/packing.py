"""Forward passes without padding: several responses in one row, each blind to the others.

TRL pads every prompt and completion to the longest of a whole generation batch. Here the real tokens of a micro-batch
are laid out in rows in which every response has the log-probabilities that it has alone. A model with relative
positions (RoPE, ALiBi) gives it the same ones in TRL's rows; with absolute positions TRL counts the padding before a
prompt. The layouts, best first:

- `"segments"`: all responses in one row; PyTorch's scaled-dot-product attention is called for one after the other;
- `"varlen"`: all responses in one row; FlashAttention's variable-length kernels read the positions;
- `"rows"`: several responses in each row, kept apart by an attention mask that transformers makes from the positions;
  it has width² elements, so the rows are short;
- `"sorted"`: one response in each row, from its first column on, so that what is left of the padding stands behind it,
  where a causal model cannot see it. Responses of like length share a pass;
- `"padded"`: TRL's rows, for models whose log-probabilities depend on the padding itself.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch


IGNORED = -100  # the label of a token that is not scored
SINGLE_ROW = ("segments", "varlen")
PACKED = (*SINGLE_ROW, "rows")


def longest_first(lengths: list[int]) -> list[int]:
    """Indices of the items, longest first, equal ones in their order."""
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def first_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Lay items out in rows of `width`, longest first, each in the first row that has room (first-fit decreasing).

    Args:
        lengths: of the items, in tokens, none above `width`.
        width: of a row, in tokens.

    Returns:
        Indices of the items by row; at most 11/9 of the fewest rows possible, plus one.
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
    """The rows that cost least, where the attention of a row costs its width squared.

    A token costs `width + linear_width`: the first for attention over its row, the second for everything else. Rows as
    wide as the longest item leave the last one half empty; somewhat wider ones may leave nothing empty.

    Args:
        lengths: of the items, in tokens.
        linear_width: width at which attention costs as much as the rest of the model, in tokens.

    Returns:
        Indices of the items by row.
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

    A forward pass has `rows_per_pass` rows as long as the longest response. With `packs`, several responses share a
    row; without, responses of similar length share a pass. Rows are spread evenly over the passes.

    Args:
        lengths: of the responses with their prompts, in tokens.
        rows_per_pass: TRL's micro-batch, `per_device_train_batch_size`.
        packs: whether responses can share a row.

    Returns:
        Indices of the responses by pass; at most ⌈n / rows_per_pass⌉ passes.
    """
    if not lengths:
        return []
    rows = first_fit(lengths, max(lengths)) if packs else [[i] for i in longest_first(lengths)]
    passes = -(-len(rows) // rows_per_pass)
    cuts = [len(rows) * i // passes for i in range(passes + 1)]
    return [[i for row in rows[start:end] for i in row] for start, end in pairwise(cuts)]


@dataclass(frozen=True)
class PackedBatch:
    """Real tokens of B sequences of S columns, in R rows of W slots.

    Attributes:
        input_ids: (R, W).
        attention_mask: (R, W), 1 on real tokens.
        position_ids: (R, W), from 0 in every sequence; 0 in empty slots, which so attend to themselves alone.
        labels: (R, W), the id of every token that is to be scored, -100 elsewhere.
        scored: (m,) index into the R·W slots of the tokens that are scored.
        columns: (m,) index of the same tokens into the B·T values that [`unpack`] returns.
        shape: (B, T), T columns being the last ones.
        segments: lengths of what stands side by side in a single row, in tokens, W in all.
        tokens: number of real tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    scored: torch.Tensor
    columns: torch.Tensor
    shape: tuple[int, int]
    segments: list[int]
    tokens: int

    def unpack(self, per_token: torch.Tensor) -> torch.Tensor:
        """Put values of the label of every slot but a row's first, (R, W-1), back to (B, T), 0 where not scored."""
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
    """Lay the real tokens of a padded batch out in rows.

    Args:
        input_ids: prompts padded on the left, completions on the right.
        attention_mask: 1 on real tokens.
        logits_to_keep: T, the completions' columns, whose tokens are scored. The first token of a sequence never is.
        pad_token_id: for empty slots.
        layout: `"segments"`, `"varlen"`, `"rows"` or `"sorted"`.
        linear_width: see [`lay_out`], for `"rows"`.
        multiple_of: make the width a multiple of this.

    Returns:
        The rows; two empty slots where the batch has no token at all, so that a forward pass is possible.
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
    """What is left of a padded batch without the columns that no sequence uses.

    Args:
        prompt_mask: (B, P), padded on the left.
        completion_mask: (B, T), padded on the right.

    Returns:
        How many columns of the prompts (the last ones) and of the completions (the first ones); at least one and two,
        where there are so many: TRL takes one column of completions for one value per sequence.
    """
    from_right = torch.arange(prompt_mask.size(1), 0, -1, device=prompt_mask.device)
    from_left = torch.arange(1, completion_mask.size(1) + 1, device=prompt_mask.device)
    furthest = [(prompt_mask.bool() * from_right).max(), (completion_mask.bool() * from_left).max()]
    prompt, completion = torch.stack(furthest).tolist()
    return max(prompt, 1), min(max(completion, 2), completion_mask.size(1))
