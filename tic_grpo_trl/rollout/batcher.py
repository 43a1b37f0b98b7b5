"""From a rollout to its micro-batches: the partition by prompt, and passes without responses that change nothing.

TRL pads every response to the longest of the generation batch and computes those whose advantage is 0. Neither changes
a gradient. Here each mini-batch is computed in as few forward passes as it needs. The loss stays TRL's: it gets other
micro-batches of the same mini-batch, and their gradients add up to the same sum.

Every process makes the same number of passes, so that no collective of DDP, DeepSpeed ZeRO or FSDP waits forever: the
processes agree on the size of each micro-batch once per rollout and fill up with blank responses of one token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict, unsplit_pixel_values_by_grid

from ..config import TICGRPOConfig
from ..forward.packed_forward import PackedForward
from ..forward.responses import loss_mask, response_count, sequences
from .loss_terms import LossTerms
from .micro_batches import active_responses, mark_groups, take_responses
from .partition import exchange_prompts, immovable_keys, shuffle_prompts, value_kinds
from .schedule import RolloutSchedule


logger = get_logger(__name__)

SPLITS_GROUPS = "partition_by_prompt has no effect: responses are shuffled across mini-batches, which splits groups"


@dataclass
class Batcher:
    """Cut rollouts into the micro-batches of their updates."""

    schedule: RolloutSchedule
    args: TICGRPOConfig
    accelerator: Accelerator
    pad_token_id: int
    forward: PackedForward
    terms: LossTerms

    def __post_init__(self):
        self._needs_groups = self.args.advantage_baseline == "minimum_variance"
        self.by_prompt = self.args.partition_by_prompt and self._can_partition_by_prompt()
        self.fixed_by = self.terms.fixed_micro_batches()
        if self.fixed_by:
            logger.info(f"TRL's micro-batches are kept, zero-advantage responses included, because of {self.fixed_by}.")

    def _can_partition_by_prompt(self) -> bool:
        """Check whether every mini-batch can consist of complete groups, and warn if it can't."""
        schedule = self.schedule
        steps, window = schedule.steps_per_generation, schedule.gradient_accumulation_steps
        if steps <= window:
            return False  # one mini-batch holds the whole rollout
        obstacles = []
        if schedule.update_responses % schedule.num_generations:
            obstacles.append(
                "per_device_train_batch_size * gradient_accumulation_steps * number of processes = "
                f"{schedule.update_responses} is not divisible by num_generations = {schedule.num_generations}"
            )
        if steps % window:
            obstacles.append(
                f"steps_per_generation = {steps} is not divisible by gradient_accumulation_steps = {window}"
            )
        if obstacles:
            self._report_split_groups(logger.warning, ", and ".join(obstacles))
        return not obstacles

    def _report_split_groups(self, warn: Callable[[str], None], reason: str):
        if self._needs_groups:
            raise ValueError(
                "advantage_baseline='minimum_variance' needs mini-batches of complete groups, which is impossible "
                f"here: {reason}. Change the batch sizes, or set advantage_baseline='group_mean'."
            )
        warn(f"{SPLITS_GROUPS}: {reason}.")

    def mark(self, rollout: dict[str, Any], has_reward: torch.Tensor | None):
        """Note the group of every response, where the loss needs it; `has_reward` is (n,) bool."""
        if self._needs_groups:
            mark_groups(rollout, self.schedule.num_generations, self.accelerator, has_reward)

    def partition(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """Put the responses of a rollout in the random order in which they are cut into mini-batches."""
        group, process_responses = self.schedule.num_generations, self.schedule.process_responses
        if not self.by_prompt:
            return shuffle_sequence_dict(rollout)
        if process_responses % group == 0:
            return shuffle_prompts(rollout, group)
        # Only the mini-batch of all processes together consists of complete groups.
        if fixed := immovable_keys(gather_object([value_kinds(rollout)])):
            self._report_split_groups(
                logger.warning_once,
                f"the groups of a mini-batch span several processes, and {', '.join(fixed)} cannot be exchanged "
                "between processes. Make per_device_train_batch_size * gradient_accumulation_steps divisible by "
                "num_generations",
            )
            return shuffle_sequence_dict(rollout)
        return exchange_prompts(rollout, group, process_responses, self.pad_token_id, self.accelerator)

    def cut(self, rollout: dict[str, Any]) -> list[dict[str, Any] | None]:
        """Cut a partitioned rollout into micro-batches; `None` stands for one with nothing to compute."""
        movable = not self.fixed_by and not immovable_keys([value_kinds(rollout)])
        if (self.forward.layout != "padded" or self.args.skip_zero_advantage) and all(gather_object([movable])):
            return self._regroup(rollout)
        parts: list[Any] = split_tensor_dict(rollout, self.schedule.steps_per_generation)
        return [unsplit_pixel_values_by_grid(part) for part in parts]

    def _regroup(self, rollout: dict[str, Any]) -> list[dict[str, Any] | None]:
        """Cut the same mini-batches into as few micro-batches as possible.

        Those with nothing to compute come first, because the last one of an update synchronises the processes.
        """
        size, count = self.schedule.per_device_train_batch_size, self.schedule.regrouped_micro_batches
        padding_free, packs = self.forward.layout != "padded", self.forward.packs
        active = torch.ones(response_count(rollout), dtype=torch.bool)
        if self.args.skip_zero_advantage:
            active = active_responses(rollout, only_advantages=self.terms.beta == 0.0).cpu()
        lengths = self.forward.lengths(*sequences(rollout), rollout["completion_ids"].size(1))
        tokens = loss_mask(rollout).sum(1).tolist()

        count = count if padding_free else 1
        passes: list[list[int]] = []  # responses by micro-batch
        for start in range(0, self.schedule.steps_per_generation, count):
            kept = [i for i in range(start * size, (start + count) * size) if active[i]]
            planned = lengths.plan(kept, size, packs) if padding_free else [kept]
            passes += [[]] * (count - len(planned)) + planned

        sizes = gather_object([[len(members) for members in passes]])
        largest = [max(of_processes) for of_processes in zip(*sizes, strict=True)]
        micro_batches: list[dict[str, Any] | None] = []
        for index, (members, largest_size) in enumerate(zip(passes, largest, strict=True)):
            closes = (index + 1) % count == 0
            if largest_size == 0 and not closes:
                micro_batches.append(None)
                continue
            micro_batch = take_responses(rollout, members, max(largest_size, 1) - len(members), trim=padding_free)
            # The last micro-batch also reports the responses that its neighbours left out.
            first = index + 1 - count if closes else index + 1
            left_out = [i for i in range(first * size, (index + 1) * size) if not active[i]]
            counts = [sum(tokens[i] for i in left_out), len(left_out)]
            micro_batch["left_out"] = torch.tensor(counts, device=self.accelerator.device)  # tokens and responses
            micro_batches.append(micro_batch)
        return micro_batches
