"""Which responses each forward pass holds, planned from their lengths alone."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .packing import SharedPrompts, first_fit, longest_first


@dataclass(frozen=True)
class ResponseLengths:
    """What decides how many responses fit into a pass.

    Args:
        tokens: number of tokens of each response with its prompt; 0 for none.
        sharing: the prompts that are computed once in each pass.
    """

    tokens: list[int]
    sharing: SharedPrompts

    @classmethod
    def of(
        cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, shares: bool
    ) -> "ResponseLengths":
        """Read them off a padded batch, (B, P + T) each, with T = `logits_to_keep` columns of completions."""
        tokens = attention_mask.sum(dim=1).tolist()
        if not shares:
            return cls(tokens, SharedPrompts.none(len(tokens)))
        return cls(tokens, SharedPrompts.of(input_ids, attention_mask, logits_to_keep))

    def cost(self, members: Sequence[int]) -> int:
        """Count the unique tokens of some responses."""
        shared = {self.sharing.prompts[i]: self.sharing.tokens[i] for i in members}
        return sum(self.tokens[i] - self.sharing.tokens[i] for i in members) + sum(shared.values())

    def plan(self, members: Sequence[int], rows_per_pass: int, packs: bool) -> list[list[int]]:
        """Distribute responses over the fewest forward passes that are no larger than TRL's.

        A pass has `rows_per_pass` rows as long as the longest response. With `packs`, several responses share a row;
        without, responses of similar length share a pass. A group is split only if that saves a pass, or if it doesn't
        fit into one. Returns the responses by pass.
        """
        if not members:
            return []
        lengths = [self.tokens[i] for i in members]
        rows = first_fit(lengths, max(lengths)) if packs else [[i] for i in longest_first(lengths)]
        passes = -(-len(rows) // rows_per_pass)
        cuts = [len(rows) * i // passes for i in range(passes + 1)]
        plans = [[[members[i] for row in rows[start:end] for i in row] for start, end in pairwise(cuts)]]
        if any(self.sharing.tokens[i] for i in members):
            limit = rows_per_pass * max(lengths)
            plans = [self._whole_groups(members, limit), self._in_order(members, limit), *plans]
        return min(plans, key=len)  # the first of these

    def _groups(self, members: Sequence[int]) -> list[list[int]]:
        groups: dict[int, list[int]] = defaultdict(list)
        for i in members:
            groups[self.sharing.prompts[i]].append(i)
        return list(groups.values())

    def _whole_groups(self, members: Sequence[int], limit: int) -> list[list[int]]:
        """Keep together every group that fits into a pass of `limit` tokens."""
        pieces = [piece for group in self._groups(members) for piece in self._in_order(group, limit)]
        passes = first_fit([self.cost(piece) for piece in pieces], limit)
        return [[i for piece in sorted(one) for i in pieces[piece]] for one in passes]

    def _in_order(self, members: Sequence[int], limit: int) -> list[list[int]]:
        """Fill one pass after the other, group by group."""
        passes: list[list[int]] = []
        filled = limit
        for group in self._groups(members):
            for i in group:
                added = self.tokens[i] - (0 if i == group[0] else self.sharing.tokens[i])
                if filled + added > limit:
                    passes.append([])
                    filled, added = 0, self.tokens[i]
                filled += added
                passes[-1].append(i)
        return passes
