"""How a rollout is cut into mini-batches."""

from typing import Any

import torch


def shuffle_prompts(rollout: dict[str, Any], num_generations: int) -> dict[str, Any]:
    """Put the prompts of a rollout in uniformly random order, each with its whole group of responses.

    Cut into consecutive mini-batches of whole groups, this is the uniform partition by prompt of v5 §2.2: no prompt is
    in two mini-batches, so that a mini-batch is independent of the weights that the earlier ones led to (Lemma A.1).
    Shuffling responses, as TRL does, splits the groups.

    Args:
        rollout: tensors and lists of n rows in which the responses to a prompt follow one another, scalar tensors and
            `None`; n is a multiple of `num_generations`.
        num_generations: responses per prompt, G.

    Returns:
        The same keys with rows reordered in unison, by torch's global generator.
    """

    def has_rows(value: Any) -> bool:
        return isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0)

    size = next(len(value) for value in rollout.values() if has_rows(value))
    prompts = torch.randperm(size // num_generations)
    order = (prompts.unsqueeze(1) * num_generations + torch.arange(num_generations)).flatten()  # (n,)

    def reorder(value: Any) -> Any:
        if not has_rows(value):
            return value
        return value[order.to(value.device)] if isinstance(value, torch.Tensor) else [value[i] for i in order.tolist()]

    return {name: reorder(value) for name, value in rollout.items()}
