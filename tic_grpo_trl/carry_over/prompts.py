"""Reads prompts ahead of training."""

import itertools
from collections.abc import Iterator
from typing import Any

from datasets import IterableDataset
from trl.trainer.utils import RepeatSampler, repeat_iterable_dataset


Place = Any  # of an example: its index in the training data, or the epoch and its number in a stream


class PromptReader:
    """
    Read prompts in the order in which TRL's data loader brings them, epoch after epoch.

    TRL's loader goes on reading its own batches, by which transformers counts epochs; they are not used.
    """

    def __init__(self, trainer: Any, first: int, count: int):
        """Read `count` prompts of each rollout, from number `first` on."""
        self._trainer, self._first, self._count = trainer, first, count
        self.position: tuple[int, int, int] | None = None  # epoch, its rollout, prompt; `None` is where training is
        self._examples: Iterator[tuple[tuple[int, int, int], Place, dict[str, Any]]] | None = None

    def read(self) -> tuple[Place, dict[str, Any]]:
        """Return the place and the content of the next example."""
        if self._examples is None:
            training, steps = self._trainer.position, self._trainer.schedule.rollout_steps
            self._examples = self._from(*self.position or (training.epoch, training.batches // steps, 0))
        self.position, place, example = next(self._examples)
        return place, example

    def move(self, position: tuple[int, int, int] | None):
        """Go on from a position."""
        self.position, self._examples = None if position is None else tuple(position), None  # type: ignore[assignment]

    def read_again(self, places: list[Place]) -> list[dict[str, Any]]:
        """Return the examples at some places; that of a place which a stream no longer has is empty."""
        dataset = self._trainer.train_dataset
        if not isinstance(dataset, IterableDataset):
            return [self._columns(dataset[place]) for place in places]
        wanted, found = {tuple(place) for place in places}, {}
        for epoch in {epoch for epoch, _ in wanted}:
            last = max(number for of, number in wanted if of == epoch)
            for place, example in itertools.islice(self._stream(epoch), last + 1):
                if place in wanted:
                    found[place] = self._columns(example)
        return [found.get(tuple(place), {}) for place in places]

    def _from(self, epoch: int, rollout: int, prompt: int) -> Iterator[tuple[Any, Place, dict[str, Any]]]:
        size = self._trainer.schedule.prompts
        while True:
            examples = self._epoch(epoch)
            number = -1
            while len(chunk := list(itertools.islice(examples, size))) == size:
                number += 1
                share = chunk[self._first : self._first + self._count] if number >= rollout else []
                for place, example in share[prompt:]:
                    prompt += 1
                    yield (epoch, number, prompt), place, self._columns(example() if callable(example) else example)
                prompt = 0 if number >= rollout else prompt
            if number < 0:
                raise ValueError(f"train_dataset has fewer prompts than a rollout takes ({size}): use more data.")
            epoch, rollout = epoch + 1, 0

    def _epoch(self, epoch: int) -> Iterator[tuple[Place, Any]]:
        """Iterate over places and examples; those of data with an index are functions, to read them only if needed."""
        dataset = self._trainer.train_dataset
        if isinstance(dataset, IterableDataset):
            return self._stream(epoch)
        position = self._trainer.position
        of_loader = position.sampler
        sampler = self._trainer._get_train_sampler()
        position.sampler = of_loader
        if not isinstance(sampler, RepeatSampler):
            raise ValueError(
                f"max_carry_over={self._trainer.args.max_carry_over} reads prompts in the order of TRL's "
                f"RepeatSampler, but the trainer has a {type(sampler).__name__}: remove it, or set max_carry_over=0."
            )
        sampler.mini_repeat_count = sampler.repeat_count = 1
        for _ in range(epoch):  # its generator goes on from one epoch to the next
            next(iter(sampler), None)
        return ((index, lambda index=index: dataset[index]) for index in sampler)

    def _stream(self, epoch: int) -> Iterator[tuple[Place, dict[str, Any]]]:
        dataset = self._trainer.train_dataset
        if self._trainer.shuffle_dataset:
            dataset = dataset.shuffle(seed=self._trainer.args.seed)
        rollouts = repeat_iterable_dataset(dataset, 1, self._trainer.schedule.prompts)  # a stream with its own epoch
        rollouts.set_epoch(epoch)
        return (((epoch, number), example) for number, example in enumerate(rollouts))

    def _columns(self, example: dict[str, Any]) -> dict[str, Any]:
        """Drop the columns that transformers would drop."""
        if not self._trainer.args.remove_unused_columns:
            return example
        self._trainer._set_signature_columns_if_needed()
        return {name: value for name, value in example.items() if name in self._trainer._signature_columns}
