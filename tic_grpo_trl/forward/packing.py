"""Packs the real tokens of several responses into rows, so that no padding is computed.

TRL pads every prompt and completion to the longest of the generation batch. Here each response has the
log-probabilities that it has alone. With relative positions (RoPE, ALiBi) they equal those in TRL's rows; with absolute
positions TRL counts the padding before a prompt. The layouts, best first:

- `"segments"`: all responses in one row; PyTorch's scaled-dot-product attention is called for each response;
- `"varlen"`: all responses in one row; FlashAttention's variable-length kernels read the positions;
- `"rows"`: several responses per row, separated by an attention mask that transformers makes from the positions. The
  mask has width² elements, so the rows are short;
- `"sorted"`: one response per row, without padding before it. A causal model can't see the padding behind it, and
  responses of similar length share a pass;
- `"padded"`: TRL's rows, for models whose log-probabilities depend on the padding.
"""

from dataclasses import dataclass

import torch

from .segments import Segments


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


@dataclass(frozen=True)
class SharedPrompts:
    """The prompts that several responses have.

    Args:
        prompts: number of each response's prompt; equal prompts have the same.
        tokens: how many tokens of each response's prompt need to be computed only once: all but the last, which
            predicts the response, or 0 if no other response has this prompt.
    """

    prompts: list[int]
    tokens: list[int]

    @classmethod
    def none(cls, responses: int) -> "SharedPrompts":
        """Share nothing."""
        return cls(list(range(responses)), [0] * responses)

    @classmethod
    def of(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int) -> "SharedPrompts":
        """Find them in a padded batch, (B, P + T) each, with T = `logits_to_keep` columns of completions."""
        prompt = torch.where(attention_mask.bool(), input_ids, -1)[:, :-logits_to_keep].cpu()
        _, numbers, counts = torch.unique(prompt, dim=0, return_inverse=True, return_counts=True)
        tokens = (prompt >= 0).sum(dim=1) - 1
        return cls(numbers.tolist(), tokens.clamp(min=0).where(counts[numbers] > 1, 0).tolist())


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
    segments: Segments | None  # of a single row: shared prompts, responses, and the empty rest
    tokens: int  # number of real tokens, of a shared prompt once
    shared_tokens: int  # number of real tokens that stand in no slot, because others have the same prompt

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
    sharing: SharedPrompts | None = None,
) -> PackedBatch:
    """Pack the real tokens of a padded batch (prompts padded on the left, completions on the right) into rows.

    T = `logits_to_keep` columns of completions are scored, but never the first token of a response. `linear_width` is
    that of [`lay_out`], and the width becomes divisible by `multiple_of`. With `sharing`, a single row holds the prompt
    of several responses once, and its last token also in each of them.

    Returns:
        The rows; two empty slots if the batch has no token at all, so that a forward pass is possible.
    """
    real = attention_mask.bool()
    position = real.cumsum(dim=1) - 1  # (B, S)
    lengths = real.sum(dim=1).tolist()
    segments, kept, starts = None, real, [0] * len(lengths)
    if layout in SINGLE_ROW:
        sharing = sharing or SharedPrompts.none(len(lengths))
        segments, starts, holds = _lay_out_segments(lengths, sharing, multiple_of)
        own = position >= torch.tensor(sharing.tokens, device=real.device).unsqueeze(1)
        kept = real & (own | torch.tensor(holds, device=real.device).unsqueeze(1))
        count, width = 1, sum(segments.lengths)
    else:
        alone = [[i] for i, length in enumerate(lengths) if length] or [[0]]
        rows = alone if layout == "sorted" else lay_out(lengths, linear_width)
        count, width = len(rows), _width(max(sum(lengths[i] for i in row) for row in rows), multiple_of)
        for r, row in enumerate(rows):
            start = r * width
            for i in row:
                starts[i] = start
                start += lengths[i]

    slot = torch.tensor(starts, device=real.device).unsqueeze(1) + position
    source = kept.flatten().nonzero().squeeze(1)  # (n,) index into B·S of the tokens that have a slot
    target = slot.flatten()[source]  # (n,) index into R·W

    def laid_out(values: torch.Tensor, empty: int) -> torch.Tensor:
        flat = torch.full((count * width,), empty, dtype=values.dtype, device=values.device)
        return flat.index_copy_(0, target, values.flatten()[source]).view(count, width)

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
        tokens=len(source),
        shared_tokens=sum(lengths) - len(source),
    )


def _width(tokens: int, multiple_of: int | None) -> int:
    """Return the slots of a row of so many tokens."""
    width = max(2, tokens)
    return width + -width % (multiple_of or 1)


def _lay_out_segments(
    lengths: list[int], sharing: SharedPrompts, multiple_of: int | None
) -> tuple[Segments, list[int], list[bool]]:
    """Lay out a single row: a response behind the other, each shared prompt before the first response to it.

    Returns:
        The segments, with one for the empty rest of the row; for each response, the slot at which its first token
        stands, or would stand if the shared ones were its own; and whether the shared ones stand there.
    """
    segments = Segments([], [])
    place: dict[int, int] = {}  # segment by prompt
    starts, holds, end = [], [], 0
    for length, prompt, common in zip(lengths, sharing.prompts, sharing.tokens, strict=True):
        holds.append(common > 0 and prompt not in place)
        if holds[-1]:
            place[prompt] = len(segments.lengths)
            segments.lengths.append(common)
            segments.prompts.append(None)
            end += common
        starts.append(end - common)
        if length:
            segments.lengths.append(length - common)
            segments.prompts.append(place[prompt] if common else None)
            end += length - common
    if empty := _width(end, multiple_of) - end:
        segments.lengths.append(empty)
        segments.prompts.append(None)
    return segments, starts, holds


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
