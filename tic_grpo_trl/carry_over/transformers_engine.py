"""transformers' own generation in segments, with the log-probability of every token it samples."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad

from ..loss.importance_weight import overridden
from ..validation.sampling_options import check_sampling_options
from .engine import EngineUse
from .pool import Group, Response


# The longest response has at most so many segments; no segment is shorter than the second number, in tokens.
SEGMENTS, SHORTEST_SEGMENT = 16, 8

# What comes after the temperature, and would come after the recorder too
NO_TRUNCATION: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": None}


def truncation(config: GenerationConfig) -> LogitsProcessorList:
    """Return what leaves out improbable tokens, in transformers' order."""
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    options = {name: getattr(config, name) for name in warpers}
    return LogitsProcessorList(
        [warpers[name](value) for name, value in options.items() if value not in (None, NO_TRUNCATION[name])]
    )


class Recorder(LogitsProcessor):
    """Apply temperature and truncation, and keep the log-probability of every token that is sampled afterwards."""

    def __init__(self, temperature: float, eos_ids: list[int], fewest: torch.Tensor, truncate: Callable):
        """`fewest`, (B,), says how many tokens of each response must follow before it may end."""
        self._temperature, self._eos_ids, self._fewest, self._truncate = temperature, eos_ids, fewest, truncate
        self._previous: torch.Tensor | None = None  # (B, V) log-probabilities of the token that is sampled next
        self._columns: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._take(input_ids)
        scores = scores / self._temperature
        must_go_on = self._fewest > len(self._columns)
        if must_go_on.any():
            ends = torch.zeros_like(scores[0], dtype=torch.bool)
            ends[self._eos_ids] = True
            scores = scores.masked_fill(must_go_on.unsqueeze(1).to(scores.device) & ends, -torch.inf)
        scores = self._truncate(input_ids, scores)
        self._previous = scores.log_softmax(-1)
        return scores

    def _take(self, input_ids: torch.Tensor):
        if self._previous is not None:
            self._columns.append(self._previous.gather(1, input_ids[:, -1:]))

    def logps(self, sampled: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of the (B, n) tokens that were sampled."""
        if len(self._columns) < sampled.size(1):  # otherwise transformers has undone a step, as it does on some devices
            self._take(sampled)
        return torch.cat(self._columns, dim=1)


class TransformersEngine:
    """
    Sample with `model.generate`, a segment of tokens at a time.

    Between segments finished responses make room for others. A segment computes the keys and values of what it
    continues again. With weights that are split over processes, all of them generate as long as one has to.
    """

    def __init__(self, trainer: Any):
        self._trainer, args, schedule = trainer, trainer.args, trainer.schedule
        if args.max_completion_length is None:
            raise ValueError(
                "behaviour_policy='sampler' needs max_completion_length, which is None: set it to the most tokens of a "
                "response."
            )
        check_sampling_options(args)
        self._longest = args.max_completion_length
        self._segment = max(SHORTEST_SEGMENT, -(-self._longest // SEGMENTS))
        self._slots = schedule.per_device_train_batch_size * schedule.steps_per_generation
        splits_weights = trainer._dist.is_zero3 or trainer._dist.is_fsdp
        self._together = splits_weights and trainer.accelerator.num_processes > 1

    @classmethod
    def of(cls, trainer: Any) -> "TransformersEngine | None":
        """Return one for a trainer whose behaviour policy is what transformers samples from, otherwise `None`."""
        records = trainer.args.behaviour_policy == "sampler"
        return cls(trainer) if records and not trainer.use_vllm and trainer.rollout_func is None else None

    def prepare(self):
        """Do nothing: the model that is trained generates."""

    def run(self, unfinished: list[tuple[Group, Response]], enough: Callable[[], bool]) -> EngineUse:
        """Go on with responses until `enough()`."""
        use = EngineUse(slots=self._slots)
        waiting = [(group.prompt_ids, response) for group, response in unfinished]
        with self._model() as model:
            while self._on_any_process(not enough()):
                running = waiting[: self._slots]
                for _, response in running:
                    use.prefilled_again += len(response.tokens)
                use.steps += self._continue(model, running, self._segment, use)
                waiting = [each for each in waiting if not each[1].finished]
        return use

    def generate(self, prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], list[list[float]]]:
        """Sample a response to every prompt, and return tokens and log-probabilities."""
        responses = [Response() for _ in prompt_ids]
        with self._model() as model:
            self._continue(model, list(zip(prompt_ids, responses, strict=True)), self._longest, EngineUse())
        return [each.tokens for each in responses], [each.logps for each in responses]

    def _on_any_process(self, holds: bool) -> bool:
        if not self._together:
            return holds
        accelerator = self._trainer.accelerator
        return bool(accelerator.gather(torch.tensor([holds], device=accelerator.device)).any())

    @contextmanager
    def _model(self) -> Iterator[Any]:
        """Yield the policy, ready to generate, as TRL does it."""
        trainer, args = self._trainer, self._trainer.args
        unwrapped = unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=args.ds3_gather_for_generation,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        )
        with (
            unwrapped as model,
            torch.no_grad(),
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            base = model.get_base_model() if is_peft_model(model) else model
            with overridden(base, generation_config=GenerationConfig()):  # options that aren't set would come from it
                yield model

    def _continue(self, model: Any, running: list[tuple[list[int], Response]], length: int, use: EngineUse) -> int:
        """Sample up to `length` tokens of each response, and return the number of steps."""
        trainer, device = self._trainer, self._trainer.accelerator.device
        config, filler = copy.deepcopy(trainer.generation_config), trainer._tokenizer.pad_token_id
        eos_ids = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
        # A process that has nothing left takes part with one token.
        written = [torch.tensor(prompt + response.tokens) for prompt, response in running] or [torch.tensor([filler])]
        left = [self._longest - len(response.tokens) for _, response in running] or [1]
        fewest = (config.min_new_tokens or 0) - (self._longest - torch.tensor(left))
        recorder = Recorder(config.temperature, eos_ids, fewest, truncation(config))
        config.update(max_new_tokens=min(length, max(left)), min_new_tokens=None, temperature=1.0, **NO_TRUNCATION)
        of_ids = {"padding_side": "left", "pad_to_multiple_of": trainer.pad_to_multiple_of}
        ids = pad(written, padding_value=filler, **of_ids).to(device)
        mask = pad([torch.ones_like(each) for each in written], padding_value=0, **of_ids).to(device)
        sequences = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([recorder]),
        )
        sampled = sequences[:, ids.size(1) :]
        values = zip(sampled.tolist(), recorder.logps(sampled).tolist(), left, strict=True)
        for (_, response), (tokens, of_tokens, room) in zip(running, values, strict=bool(running)):
            end = next((index + 1 for index, token in enumerate(tokens[:room]) if token in eos_ids), len(tokens[:room]))
            response.write(tokens[:end], of_tokens[:end])
            response.finished = tokens[end - 1] in eos_ids or end == room
            use.sampled += end
        return sampled.size(1)
