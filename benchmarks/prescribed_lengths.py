"""Prescribe the length of every response of a colocated vLLM engine, and count what the engine does."""

import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from cases import GROUP, skewed_lengths


Key = tuple[int, int]  # a response: number of its prompt, index in its group


@dataclass(frozen=True)
class Workload:
    """The lengths that every trainer has to generate.

    Attributes:
        rollouts: number of rollouts.
        lengths: tokens of each response, by prompt, in the order of the training data.
    """

    rollouts: int
    lengths: tuple[tuple[int, ...], ...]

    @property
    def prompts(self) -> list[str]:
        """The training data: a prompt of 8 to 16 words, which are its number."""
        return [" ".join([word(number)] * prompt_length(number)) for number in range(len(self.lengths))]


def word(number: int) -> str:
    """Return the word that prompt `number` is made of: w0 ends a text, w1 is an unknown word."""
    return f"w{number + 2}"


def prompt_length(number: int) -> int:
    """Return the tokens of a prompt."""
    return 8 + number % 9


def make_workload(rollouts: int, responses: int, mean: int, longest: int, seed: int) -> Workload:
    """Draw the lengths of `rollouts` rollouts: log-normal with one of `longest` in each, or all equal to `mean`.

    Each rollout has exactly the same number of tokens; its lengths are in random order. With `longest` equal to `mean`
    all lengths are equal.
    """
    lengths: list[int] = []
    for rollout in range(rollouts):
        if longest == mean:
            lengths += [mean] * responses
        else:
            drawn = skewed_lengths(responses, mean, longest, seed=1000 * seed + rollout)
            random.Random(f"{seed} {rollout}").shuffle(drawn)
            lengths += drawn
    return Workload(rollouts, tuple(tuple(lengths[i : i + GROUP]) for i in range(0, len(lengths), GROUP)))


@dataclass
class EngineWork:
    """What an engine did in a call.

    Attributes:
        running: of each forward pass that sampled: responses that got a token.
        seconds: of CPU time of each of these steps, in the engine's core.
        prefilled_again: tokens of responses whose keys and values an earlier call had computed.
    """

    running: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    prefilled_again: int = 0

    @property
    def steps(self) -> int:
        return len(self.running)

    @property
    def sampled(self) -> int:
        return sum(self.running)


class Responses:
    """The responses to a workload's prompts: what has been written, and by what the engine knows those it is writing.

    Args:
        workload: prompts and lengths.
    """

    def __init__(self, workload: Workload):
        self.lengths = workload.lengths
        self.written: dict[Key, list[int]] = defaultdict(list)
        self.work = EngineWork()
        self._running: dict[str, Key] = {}
        self._resumed: dict[str, int] = {}  # tokens of those that have no new one yet

    def find(self, ids: list[int]) -> tuple[Key, int]:
        """Return the response that a request's tokens belong to, and how many tokens it still needs.

        The prompt says its number. What follows it is what an earlier call wrote; requests for the same tokens belong
        to the group's responses in their order.
        """
        number = ids[0] - 2
        tokens, running = ids[prompt_length(number) :], set(self._running.values())
        keys = ((number, index) for index in range(GROUP))
        key = next(key for key in keys if key not in running and self.written[key] == tokens)
        return key, self.lengths[number][key[1]] - len(tokens)

    def begin(self, name: str, key: Key):
        self._running[name] = key
        self._resumed[name] = len(self.written[key])

    def write(self, tokens_of: dict[str, list[int]], seconds: float):
        """Note the tokens of a step."""
        self.work.seconds.append(seconds)
        self.work.running.append(len(tokens_of))
        for name, tokens in tokens_of.items():
            self.written[self._running[name]] += tokens
            self.work.prefilled_again += self._resumed.pop(name, 0)

    def end_call(self) -> EngineWork:
        """Return what was done in this call. Nothing is running after it."""
        work, self.work = self.work, EngineWork()
        self._running, self._resumed = {}, {}
        return work


class PrescribedEngine:
    """Make an engine end each response at its prescribed length, whoever adds the request, and note its steps.

    Args:
        engine: vLLM's `LLMEngine`, in this process; two of its methods are replaced.
    """

    def __init__(self, engine: Any):
        self._add, self._get_output = engine.add_request, engine.engine_core.get_output
        engine.add_request, engine.engine_core.get_output = self._add_prescribed, self._note
        self.slots: int = engine.vllm_config.scheduler_config.max_num_seqs
        self.responses: Responses  # of the trainer whose turn it is

    def _add_prescribed(self, request_id: str, prompt: Any, params: Any, *args, **kwargs):
        params = params.clone()
        key, params.max_tokens = self.responses.find(list(prompt["prompt_token_ids"]))
        params.ignore_eos = True
        name = self._add(request_id, prompt, params, *args, **kwargs)
        self.responses.begin(name, key)
        return name

    def _note(self):
        start = time.process_time()
        outputs = self._get_output()
        tokens_of = {each.request_id: each.new_token_ids for each in outputs.outputs if each.new_token_ids}
        if tokens_of:
            self.responses.write(tokens_of, time.process_time() - start)
        return outputs
