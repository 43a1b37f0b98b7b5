"""The responses that have been begun and not trained on, and which of them a rollout takes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


Read = Callable[[list[Any]], list[dict[str, Any]]]  # returns the examples of the training data at some places


def choose_groups(complete: Sequence[bool], due: int, count: int) -> list[int] | None:
    """Choose the groups of a rollout: the `count` oldest complete ones, or `None` as long as it has to wait.

    `complete` says of each group, oldest first, whether all its responses are finished. The first `due` groups must be
    in this rollout, or as many of them as it holds.
    """
    chosen = [index for index, done in enumerate(complete) if done][:count]
    return chosen if len(chosen) == count and all(complete[: min(due, count)]) else None


@dataclass
class Response:
    """A response that is being written, or waits for the rest of its group."""

    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)  # of each token when it was sampled, after temperature, in nats
    versions: list[int] = field(default_factory=list)  # of each token: the generation call whose weights sampled it
    finished: bool = False

    def write(self, tokens: list[int], logps: list[float]):
        """Append tokens that were just sampled.

        Raise a RuntimeError if a log-probability is not finite: the ratio would not be that of what was sampled.
        """
        if not all(map(math.isfinite, logps)):
            raise RuntimeError(
                "The engine returned a log-probability that is NaN or infinite, so the ratio to it is none: check the "
                "model's weights, or set max_carry_over=0 and behaviour_policy='trainer'."
            )
        self.tokens += tokens
        self.logps += logps


@dataclass
class Group:
    """A prompt and the responses to it."""

    number: int  # the prompt's, in the order in which its pool reads prompts
    place: Any  # the example's, in the training data
    example: dict[str, Any]
    prompt_ids: list[int]
    responses: list[Response]

    @property
    def complete(self) -> bool:
        return all(response.finished for response in self.responses)

    def begin_again(self):
        """Forget what has been written."""
        self.responses = [Response() for _ in self.responses]


def save_groups(groups: list[Group]) -> dict[str, Any]:
    """Return the state of groups without their examples; tensors hold the tokens of all responses end to end."""
    responses = [response for group in groups for response in group.responses]
    return {
        "groups": [(group.number, group.place, group.prompt_ids, len(group.responses)) for group in groups],
        "lengths": [len(response.tokens) for response in responses],
        "finished": [response.finished for response in responses],
        "tokens": torch.tensor([token for response in responses for token in response.tokens], dtype=torch.long),
        "logps": torch.tensor([logp for response in responses for logp in response.logps], dtype=torch.double),
        "versions": torch.tensor([each for response in responses for each in response.versions], dtype=torch.long),
    }


def load_groups(state: dict[str, Any], read: Read) -> list[Group]:
    """Restore groups from their state, and their examples from the training data."""
    parts = [state[name].split(state["lengths"]) for name in ("tokens", "logps", "versions")]
    responses = [
        Response(tokens.tolist(), logps.tolist(), versions.tolist(), finished)
        for tokens, logps, versions, finished in zip(*parts, state["finished"], strict=True)
    ]
    examples, first, groups = read([place for _, place, _, _ in state["groups"]]), 0, []
    for (number, place, prompt_ids, size), example in zip(state["groups"], examples, strict=True):
        groups.append(Group(number, place, example, prompt_ids, responses[first : first + size]))
        first += size
    return groups


@dataclass
class Pool:
    """
    Hold the groups that have been begun and not trained on, oldest first.

    A prompt's own rollout is the one that would train on it without carry-over. A group may be trained on before that,
    and at most `max_carry_over` rollouts after it.
    """

    prompts: int  # of a rollout
    max_carry_over: int
    groups: list[Group] = field(default_factory=list)
    admitted: int = 0  # groups, since the start
    version: int = 0  # of the weights: number of generation calls so far, those of discarded rollouts included

    @property
    def call(self) -> int:
        """Number of rollouts so far, without discarded ones."""
        return (self.admitted - len(self.groups)) // self.prompts

    @property
    def unfinished(self) -> list[tuple[Group, Response]]:
        """The responses to go on with, oldest first."""
        return [(group, each) for group in self.groups for each in group.responses if not each.finished]

    @property
    def longest(self) -> int:
        """Tokens of the longest unfinished response."""
        return max((len(response.tokens) for _, response in self.unfinished), default=0)

    def chosen(self) -> list[int] | None:
        """Return the indices of the groups for this rollout, or `None` if generation has to go on."""
        first_not_due = (self.call - self.max_carry_over + 1) * self.prompts
        due = sum(group.number < first_not_due for group in self.groups)
        return choose_groups([group.complete for group in self.groups], due, self.prompts)

    def admit(self, group: Group):
        """Add a group that nothing has been generated for."""
        self.groups.append(group)
        self.admitted += 1

    def release(self) -> list[Group]:
        """Remove and return the groups for this rollout, after giving all new tokens their version."""
        for group in self.groups:
            for each in group.responses:
                each.versions += [self.version] * (len(each.tokens) - len(each.versions))
        self.version += 1
        chosen = self.chosen()
        assert chosen is not None
        released = [self.groups[index] for index in chosen]
        self.groups = [group for index, group in enumerate(self.groups) if index not in chosen]
        return released

    def state_dict(self) -> dict[str, Any]:
        return {"admitted": self.admitted, "version": self.version} | save_groups(self.groups)

    def load_state_dict(self, state: dict[str, Any], read: Read):
        """Restore the pool."""
        self.admitted, self.version = state["admitted"], state["version"]
        self.groups = load_groups(state, read)
