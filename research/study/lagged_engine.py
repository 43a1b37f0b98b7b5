"""Stale rollouts: sampled with the weights of some rollouts ago, while training goes on with the current ones."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tic_grpo_trl.carry_over.transformers_engine import TransformersEngine


class LaggedEngine(TransformersEngine):
    """
    Sample training rollouts with the weights of `lag` rollouts ago, and evaluations with the current ones.

    Set it as the `recorder` of a trainer with `behaviour_policy="sampler"`: its log-probabilities are those of the
    weights that sampled. The first rollouts, before there are weights so old, use the start weights.
    """

    def __init__(self, trainer: Any, lag: int):
        super().__init__(trainer)
        self._versions: deque[list[torch.Tensor]] = deque(maxlen=lag + 1)  # of the newest rollouts, oldest first

    @contextmanager
    def _model(self) -> Iterator[Any]:
        trains = self._trainer.model.training
        with super()._model() as model:
            if not trains:
                yield model
                return
            parameters = list(model.parameters())
            current = [parameter.detach().clone() for parameter in parameters]
            self._versions.append(current)
            try:
                torch._foreach_copy_(parameters, self._versions[0])
                yield model
            finally:
                torch._foreach_copy_(parameters, current)
