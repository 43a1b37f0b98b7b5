"""Collects rollouts from a pool of responses that go on from one rollout to the next."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from trl.trainer.utils import pad

from ..validation.carry_over import check_trainer
from .engine import Engine, EngineUse
from .measures import carry_over_metrics, count_carry_over
from .pool import Group, Pool, Response, load_groups, save_groups
from .prompts import PromptReader
from .transformers_engine import TransformersEngine


CHANGED = (
    "The prompts of responses that were carried over have changed: the training data, tokenizer or chat template is "
    "another one than when they were begun. Resume with the same ones."
)


@dataclass(frozen=True)
class Share:
    """Say which prompts of each rollout a process's pool holds, and which part of them the process trains on."""

    first: int
    prompts: int
    part: int = 0
    parts: int = 1
    broadcast: bool = False  # the main process holds the pool of all

    @classmethod
    def of(cls, trainer: Any) -> "Share":
        """Return the share of this process: its own groups, those of its tensor-parallel group, or all on a server."""
        schedule, args, process = trainer.schedule, trainer.args, trainer.accelerator.process_index
        if args.use_vllm and args.vllm_mode == "server":
            return cls(0, schedule.prompts, process, schedule.processes, broadcast=True)
        parts = args.vllm_tensor_parallel_size if args.use_vllm else 1
        prompts = schedule.prompts * parts // schedule.processes
        return cls(process // parts * prompts, prompts, process % parts, parts)

    def of_process(self, responses: list[Any]) -> list[Any]:
        """Return this process's part of a rollout's responses."""
        size = len(responses) // self.parts
        return responses[self.part * size : (self.part + 1) * size]


@dataclass
class Sampled:
    """A response of the rollout that is being made."""

    example: dict[str, Any]
    prompt_ids: list[int]
    tokens: list[int]
    logps: list[float]
    ages: list[int]  # of each token: rollouts since the weights that sampled it


def engine_of(trainer: Any) -> Engine:
    """Return the engine that the settings ask for."""
    if not trainer.use_vllm:
        return TransformersEngine(trainer)
    if trainer.vllm_mode == "server":
        from .vllm_server import VLLMServer

        return VLLMServer(trainer)
    from .vllm_colocated import VLLMColocated

    return VLLMColocated(trainer)


class CarryOver:
    """
    Make rollouts of the groups that are complete, and carry the unfinished ones over to later rollouts.

    Nothing is dropped: each prompt is trained on once. The pool is part of every checkpoint.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.share = Share.of(trainer)
        self.engine = engine_of(trainer)
        self.reset()

    @classmethod
    def of(cls, trainer: Any) -> "CarryOver | None":
        """Return a trainer's, or `None` without carry-over.

        Raise a ValueError for inputs and batches whose responses can't be carried over.
        """
        if not trainer.args.max_carry_over:
            return None
        check_trainer(trainer, Share.of(trainer).prompts)
        return cls(trainer)

    def reset(self):
        """Forget all responses, and begin to read prompts where training is."""
        self.pool = Pool(self.share.prompts, self._trainer.args.max_carry_over)
        self.reader = PromptReader(self._trainer, self.share.first, self.share.prompts)
        self._rollout: list[Sampled] = []
        self._released: list[Group] = []  # those of the newest rollout

    def collect(self, metrics: dict[str, list[float]]) -> list[dict[str, Any]]:
        """Generate until a rollout is complete, and return its examples, one per response of this process."""
        self.engine.prepare()
        sampled: list[Sampled] = []
        counts = count_carry_over([], [], EngineUse(), 0)
        if not self.share.broadcast or self._trainer.accelerator.is_main_process:
            self._fill()
            use = self.engine.run(self.pool.unfinished, lambda: self.pool.chosen() is not None)
            version = self.pool.version
            self._released = self.pool.release()
            sampled = [
                Sampled(group.example, group.prompt_ids, each.tokens, each.logps, [version - v for v in each.versions])
                for group in self._released
                for each in group.responses
            ]
            if self.share.part == 0:  # the other processes of a tensor-parallel group have the same pool
                counts = count_carry_over(self._released, self.pool.groups, use, version)
            for group in self._released:
                group.begin_again()
        if self.share.broadcast:
            (sampled,) = broadcast_object_list([sampled])
        self._rollout = self.share.of_process(sampled)
        for name, value in carry_over_metrics(gather_object([counts])).items():
            metrics[name].append(value)
        return [copy.deepcopy(each.example) for each in self._rollout]

    def _fill(self):
        """Begin as many groups as `oversampling` and the rest of the run allow."""
        trainer, pool = self._trainer, self.pool
        rollouts = math.ceil((trainer.state.max_steps - trainer.state.global_step) / trainer.schedule.updates)
        bound = int(min(trainer.args.oversampling, rollouts) * pool.prompts)
        while len(pool.groups) < bound:
            place, example = self.reader.read()
            responses = [Response() for _ in range(trainer.num_generations)]
            pool.admit(Group(pool.admitted, place, example, self._prompt_ids(example), responses))

    def _prompt_ids(self, example: dict[str, Any]) -> list[int]:
        prompt_ids, images, _ = self._trainer._tokenize_prompts([example["prompt"]])
        if images is not None:
            raise ValueError("max_carry_over cannot carry over prompts with images: set max_carry_over=0.")
        return prompt_ids[0]

    def take(self, prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], list[list[float]]]:
        """Return tokens and log-probabilities of the rollout's responses, whose prompts are `prompt_ids`."""
        if prompt_ids != [each.prompt_ids for each in self._rollout]:
            raise ValueError(CHANGED)
        return [each.tokens for each in self._rollout], [each.logps for each in self._rollout]

    def mark(self, rollout: dict[str, Any]):
        """Add `token_age`, (n, T): rollouts since the weights that sampled each token; 0 on padding."""
        of_each = [torch.tensor(each.ages, dtype=torch.int32) for each in self._rollout]
        ages = pad(of_each, padding_value=0, padding_side="right")
        missing = rollout["completion_ids"].size(1) - ages.size(1)
        rollout["token_age"] = torch.nn.functional.pad(ages, (0, missing)).to(rollout["completion_ids"].device)

    def put_back(self):
        """Put the groups of a rollout that is discarded back into the pool, with nothing written."""
        self.pool.groups = sorted(self._released + self.pool.groups, key=lambda group: group.number)
        self._released = []

    def state_dict(self) -> dict[str, Any]:
        released = save_groups(self._released)
        return {"pool": self.pool.state_dict(), "released": released, "position": self.reader.position}

    def load_state_dict(self, state: dict[str, Any]):
        """Restore the pool. Raise a ValueError on every process if a prompt has changed or a response is too long."""
        self.pool.load_state_dict(state["pool"], self.reader.read_again)
        self._released = load_groups(state["released"], self.reader.read_again)
        self.reader.move(state["position"])
        groups = self._released + self.pool.groups
        if any(gather_object([any(not self._is_unchanged(group) for group in groups)])):
            raise ValueError(CHANGED)
        longest, most = max(gather_object([self.pool.longest])), self._trainer.args.max_completion_length
        if longest >= most:
            raise ValueError(
                f"max_completion_length={most} is too short for an unfinished response of {longest} tokens, which the "
                "checkpoint carries over: resume with the old max_completion_length."
            )

    def _is_unchanged(self, group: Group) -> bool:
        return "prompt" in group.example and self._prompt_ids(group.example) == group.prompt_ids
