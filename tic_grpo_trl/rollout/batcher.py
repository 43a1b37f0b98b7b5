"""The update phase of a GRPO-family trainer without waste: what is forwarded, and when.

TRL pads every response to the longest of the generation batch, forwards those whose advantage is 0, and scores a whole
rollout with the policy that is about to make its first update on it. None of this changes a gradient. Here the real
tokens are packed, rows that cannot move the weights are left out, and only what needs old log-probabilities is scored.
The loss itself stays TRL's: it only gets other micro-batches of the same mini-batch, with the same sum of gradients.

Every process makes the same number of forward and backward passes, so that no collective of DDP, DeepSpeed ZeRO or FSDP
waits for one that never comes: the processes agree on each micro-batch's rows once per rollout and fill up with blank
ones, which cost a token each.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from trl.trainer.utils import (
    nanmax,
    nanmin,
    shuffle_sequence_dict,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from ..forward.packed_forward import PaddingFreeTrainer
from ..forward.packing import PACKED
from ..objective import sampler_correction
from .micro_batches import active_responses, plan_passes, take_responses
from .partition import exchange_prompts, immovable_keys, shuffle_prompts, value_kinds
from .responses import lacks_sampler_logps, loss_mask, response_count


logger = get_logger(__name__)

SPLITS_GROUPS = "partition_by_prompt does not apply and responses are shuffled across mini-batches, splitting groups"

# Losses that are a mean over the rows of a micro-batch, so that its number of rows has to be put right
MEAN_OVER_ROWS = ("grpo", "dr_grpo", "sapo", "luspo")
# TRL's metrics that are means over tokens: a row that was left out was never clipped, but has a KL and an entropy
MEAN_OVER_ALL = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")
MEAN_OVER_LIVE = ("kl", "entropy")
EXTREMES = {"clip_ratio/low_min": min, "clip_ratio/high_max": max}


class UpdatePhaseTrainer(PaddingFreeTrainer):
    """
    [`~trl.GRPOTrainer`] with another update phase: mini-batches of whole groups of responses (v5 §2.2), and the
    switches `padding_free`, `skip_zero_advantage`, `skip_on_policy_logps` and `behaviour_policy` of
    [`~tic_grpo_trl.TICGRPOConfig`].

    Metrics, under `update/` once per optimizer step and over all processes: `real_token_share` (of what was computed in
    forward passes), `rows_skipped` (share of the mini-batch's responses), `forwards_saved` (passes that TRL would have
    made in addition, scoring included).

    Raises:
        ValueError: if `behaviour_policy="sampler"` although nothing returns the sampler's log-probabilities, or a vLLM
            server returns those before temperature.
    """

    num_generations: int
    _buffered_inputs: Any

    def __init__(self, model, reward_funcs=None, args: Any = None, *positional, **kwargs):
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        args = self.args
        if args.behaviour_policy == "sampler" and not (self.use_vllm or self.rollout_func is not None):
            raise ValueError(
                "behaviour_policy='sampler' needs the sampler's log-probabilities, which only vLLM or a rollout_func "
                "returns: set use_vllm=True, or behaviour_policy='trainer'."
            )
        self._check_server_logprobs()
        window = args.gradient_accumulation_steps  # micro-batches of a mini-batch
        self._micro_batches = int(args.steps_per_generation or 1)  # of a rollout, on one process
        self._rollout_steps = self._micro_batches * self.num_iterations  # from one generation to the next
        # of one process in a mini-batch
        self._update_rows = args.per_device_train_batch_size * window
        self._by_prompt = self._can_partition_by_prompt()

        # Micro-batches whose rows may change places: those of one mini-batch and one rollout
        in_step = self._micro_batches % window == 0 or window % self._micro_batches == 0
        self._unit = min(window, self._micro_batches) if in_step else 1
        self._fixed_rows = self._why_rows_are_fixed()
        if self._fixed_rows:
            logger.info(f"Responses stay in TRL's micro-batches, dead rows included, because of {self._fixed_rows}.")
        self._has_old_policy = window % self._rollout_steps != 0  # TRL's condition for scoring a rollout
        self._starts_on_policy = self._rollout_steps % window == 0  # a rollout's first step starts a mini-batch
        self._postpones_scoring = False  # the parent's calls for log-probabilities are answered with None
        self._filled_at = -1  # the step at which the buffer was filled
        self._last_logps: torch.Tensor | None = None  # of the last forward pass
        self._counts: list[torch.Tensor] = []  # of the micro-batches since the last update

    def _check_server_logprobs(self):
        """The ratio needs log-probabilities after temperature; TRL only warns, and only where it corrects."""
        if self.args.behaviour_policy != "sampler" or not self.use_vllm or self.vllm_mode != "server":
            return
        modes = []
        if self.accelerator.is_main_process:
            modes = [self.vllm_generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]]
        (mode,) = gather_object(modes)
        if mode != "processed_logprobs":
            raise ValueError(
                f"behaviour_policy='sampler', but the vLLM server runs with --logprobs-mode {mode}, which leaves out "
                "the temperature: restart it with --logprobs-mode processed_logprobs."
            )

    def _why_rows_are_fixed(self) -> str:
        """The options that make a loss, or a metric of TRL's, depend on which rows share a micro-batch."""
        reasons = {
            f"loss_type={self.loss_type!r}": self.loss_type in ("bnpo", "vespo"),
            "the entropy bonus": self._entropy_bonus_enabled,
            f"top_entropy_quantile={self.top_entropy_quantile}": self.top_entropy_quantile < 1.0,
            "the router's auxiliary loss": self.aux_loss_enabled,
        }
        return ", ".join(reason for reason, holds in reasons.items() if holds)

    # Cutting a rollout into mini-batches

    def _can_partition_by_prompt(self) -> bool:
        """Whether every mini-batch can be made of whole groups; says so where it can't."""
        steps, window = self._micro_batches, self.args.gradient_accumulation_steps
        if not self.args.partition_by_prompt or steps <= window:
            return False  # not wanted, or one mini-batch holds the whole rollout
        rows, obstacles = self._update_rows * self.accelerator.num_processes, []
        if rows % self.num_generations:
            obstacles.append(
                "per_device_train_batch_size * gradient_accumulation_steps * number of processes = "
                f"{rows} is not a multiple of num_generations = {self.num_generations}"
            )
        if steps % window:
            obstacles.append(
                f"steps_per_generation = {steps} is not a multiple of gradient_accumulation_steps = {window}"
            )
        if obstacles:
            logger.warning(f"{SPLITS_GROUPS}: {', and '.join(obstacles)}.")
        return not obstacles

    def _partition(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """The rows of a rollout in the order in which they are cut into mini-batches."""
        if not self._by_prompt:
            return shuffle_sequence_dict(rollout)
        if self._update_rows % self.num_generations == 0:
            return shuffle_prompts(rollout, self.num_generations)
        # A mini-batch is made of whole groups only over all processes together.
        if fixed := immovable_keys(gather_object([value_kinds(rollout)])):
            logger.warning_once(
                f"{SPLITS_GROUPS}: the groups of a mini-batch span several processes, and the rollout holds "
                f"{', '.join(fixed)}, which cannot be exchanged between them response by response. Make "
                "per_device_train_batch_size * gradient_accumulation_steps a multiple of num_generations."
            )
            return shuffle_sequence_dict(rollout)
        pad_token_id = self._tokenizer.pad_token_id
        return exchange_prompts(rollout, self.num_generations, self._update_rows, pad_token_id, self.accelerator)

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        starts = self._step % self._rollout_steps == 0 and self._filled_at != self._step
        if starts or self._buffered_inputs is None:
            rollout = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            self._buffered_inputs = self._cut(self._partition(rollout))
            self._filled_at = self._step
        return self._buffered_inputs[self._step % self._micro_batches]

    def _cut(self, rollout: dict[str, Any]) -> list[dict[str, Any] | None]:
        """The micro-batches of a rollout with all that their losses compare with; `None`: nothing to compute."""
        trl_scores = self._has_old_policy or self.use_vllm
        self._work["trl_forwards"] += self._micro_batches * (trl_scores + (self.beta != 0.0))
        movable = not self._fixed_rows and not immovable_keys([value_kinds(rollout)])
        micro_batches: list[dict[str, Any] | None]
        if (self.layout != "padded" or self.args.skip_zero_advantage) and self._of_all([int(movable)]).all():
            micro_batches = self._plan(rollout)
        else:
            parts: list[Any] = split_tensor_dict(rollout, self._micro_batches)
            micro_batches = [unsplit_pixel_values_by_grid(part) for part in parts]
        self._score_micro_batches(micro_batches)
        return micro_batches

    def _plan(self, rollout: dict[str, Any]) -> list[dict[str, Any] | None]:
        """The same mini-batches in as few micro-batches as may be, the empty ones first: the last synchronises."""
        rows, padding_free = self.args.per_device_train_batch_size, self.layout != "padded"
        live = torch.ones(response_count(rollout), dtype=torch.bool)
        if self.args.skip_zero_advantage:
            live = active_responses(rollout, only_advantages=self.beta == 0.0).cpu()
        lengths = (rollout["prompt_mask"].sum(1) + rollout["completion_mask"].sum(1)).tolist()
        tokens = loss_mask(rollout).sum(1).tolist()

        unit = self._unit if padding_free else 1
        plans: list[list[int]] = []  # rows by micro-batch
        for start in range(0, self._micro_batches, unit):
            kept = [i for i in range(start * rows, (start + unit) * rows) if live[i]]
            passes: list[Any] = [range(len(kept))]
            if padding_free:
                passes = plan_passes([lengths[i] for i in kept], rows, self.layout in PACKED)
            plans += [[]] * (unit - len(passes)) + [[kept[i] for i in group] for group in passes]

        heights = self._of_all([len(plan) for plan in plans]).amax(dim=0).tolist()  # equal on every process
        micro_batches: list[dict[str, Any] | None] = []
        for index, (plan, height) in enumerate(zip(plans, heights, strict=True)):
            closes = (index + 1) % unit == 0
            if height == 0 and not closes:
                micro_batches.append(None)
                continue
            micro_batch = take_responses(rollout, plan, max(height, 1) - len(plan), trim=padding_free)
            first = index + 1 - unit if closes else index + 1  # whose rows this one answers for, if any
            left_out = [i for i in range(first * rows, (index + 1) * rows) if not live[i]]
            counts = [sum(tokens[i] for i in left_out), len(left_out)]
            micro_batch["left_out"] = torch.tensor(counts, device=self.accelerator.device)  # tokens and rows
            micro_batches.append(micro_batch)
        return micro_batches

    # Old, reference and sampler's log-probabilities

    @contextmanager
    def _scoring_postponed(self) -> Iterator[None]:
        """TRL's rollout without its forward passes: what they compute is computed on the micro-batches that train."""
        corrects = self.vllm_importance_sampling_correction
        self._postpones_scoring, self.vllm_importance_sampling_correction = True, False
        try:
            yield
        finally:
            self._postpones_scoring, self.vllm_importance_sampling_correction = False, corrects

    def _generate_and_score_completions(self, inputs):
        with self._scoring_postponed():
            rollout = super()._generate_and_score_completions(inputs)
        if self.args.behaviour_policy == "sampler":
            self._check_sampler_logps(rollout)
        if not self.model.training:
            self._score_micro_batches([rollout])
        return rollout

    def _check_sampler_logps(self, rollout: dict[str, Any]):
        if rollout.get("sampling_per_token_logps") is None:
            raise ValueError(
                "behaviour_policy='sampler', but the rollout has no log-probabilities of the sampler: return them from "
                "rollout_func under 'logprobs', or set behaviour_policy='trainer'."
            )
        share = self.accelerator.gather(lacks_sampler_logps(rollout).float()).mean().item()
        self._metrics["train" if self.model.training else "eval"]["sampling/responses_without_logps"].append(share)

    def _score_micro_batches(self, micro_batches: list[dict[str, Any] | None]):
        """Add to each micro-batch the log-probabilities that its loss compares the policy with."""
        scored = [micro_batch for micro_batch in micro_batches if micro_batch is not None]
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        if self.args.behaviour_policy == "sampler":
            self._take_sampler_logps(scored)
        elif self._has_old_policy or corrects:
            # Those of a rollout's first update have their old log-probabilities from the very pass that trains them.
            on_policy = self._starts_on_policy and self.args.skip_on_policy_logps and not corrects
            for micro_batch in micro_batches[self.args.gradient_accumulation_steps if on_policy else 0 :]:
                if micro_batch is not None and "old_per_token_logps" not in micro_batch:
                    micro_batch["old_per_token_logps"] = self._score(micro_batch)
        if corrects:
            self._correct_for_sampler(scored)
        if self.beta != 0.0:
            with self._reference_policy() as model:
                for micro_batch in scored:
                    micro_batch["ref_per_token_logps"] = self._score(micro_batch, model=model)

    def _take_sampler_logps(self, micro_batches: list[dict[str, Any]]):
        """The sampler's log-probabilities as the old ones; the policy's own for responses that lack one."""
        lacking = [lacks_sampler_logps(micro_batch) for micro_batch in micro_batches]  # (B,) each
        on_any_process = self._of_all([int(rows.any()) for rows in lacking]).any(dim=0).tolist()
        for micro_batch, rows, scores in zip(micro_batches, lacking, on_any_process, strict=True):
            rows = rows.unsqueeze(1)
            logps = torch.where(loss_mask(micro_batch).bool(), micro_batch["sampling_per_token_logps"], 0.0)
            if scores:
                masked = () if "num_images" in micro_batch else ("prompt_mask", "completion_mask")
                own = self._score(micro_batch | {name: micro_batch[name] * rows for name in masked})
                logps = torch.where(rows, own, logps)
            micro_batch["old_per_token_logps"] = logps

    def _correct_for_sampler(self, micro_batches: list[dict[str, Any]]):
        """TRL's correction of the mismatch between engine and trainer, and its metrics, over what is trained on."""
        differences, ratios = [], []
        for micro_batch in micro_batches:
            old, sampler = micro_batch["old_per_token_logps"], micro_batch["sampling_per_token_logps"]
            mask = loss_mask(micro_batch)
            micro_batch["importance_sampling_ratio"] = sampler_correction(
                old,
                sampler,
                mask,
                self.vllm_importance_sampling_mode,
                self.vllm_importance_sampling_clip_min,
                self.vllm_importance_sampling_clip_max,
            )
            difference, ratio = (old - sampler).abs(), micro_batch["importance_sampling_ratio"]
            differences.append(difference[mask.bool() & ~difference.isnan()])
            ratios.append(ratio[mask.bool() if ratio.size(1) > 1 else mask.any(dim=1)].flatten())
        nothing = torch.full((1,), torch.nan, device=self.accelerator.device)  # of a process that trains on nothing
        difference, ratio = (torch.cat(values) for values in (differences, ratios))
        difference, ratio = (values if values.numel() else nothing for values in (difference, ratio))
        local = torch.stack([difference.mean(), difference.max(), ratio.min(), ratio.mean(), ratio.max()])
        means, largest, least, averages, most = self.accelerator.gather(local).view(-1, 5).unbind(dim=1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["sampling/sampling_logp_difference/mean"].append(means.nanmean().item())
        metrics["sampling/sampling_logp_difference/max"].append(nanmax(largest).item())
        metrics["sampling/importance_sampling_ratio/min"].append(nanmin(least).item())
        metrics["sampling/importance_sampling_ratio/mean"].append(averages.nanmean().item())
        metrics["sampling/importance_sampling_ratio/max"].append(nanmax(most).item())

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self._postpones_scoring:
            return None, None, None
        outputs = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._last_logps = outputs[0].detach()
        return outputs

    # Steps

    def training_step(self, model, inputs, num_items_in_batch=None):
        start = time.perf_counter()
        model.train()
        micro_batch = self._prepare_inputs(inputs)
        self._current_train_step_time += time.perf_counter() - start
        if micro_batch is None:  # nothing to compute on any process; never the last of a mini-batch
            self._work["trl_forwards"] += 1
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._has_old_policy and self.num_iterations > 1:
            # Not scored before means on-policy: the next pass over the rollout takes what this one computed.
            micro_batch.setdefault("old_per_token_logps", self._last_logps)
        return loss

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if not self.model.training:
            return loss
        self._work["trl_forwards"] += 1
        rows, left_out = inputs["completion_ids"].size(0), inputs.get("left_out")
        if left_out is not None and self.loss_type in MEAN_OVER_ROWS:
            loss = loss * (rows / self.args.per_device_train_batch_size)
        tokens = loss_mask(inputs).sum()
        none = torch.zeros(2, dtype=tokens.dtype, device=tokens.device)
        counts = torch.stack([tokens, tokens.new_tensor(rows)])
        self._counts.append(torch.cat([counts, none if left_out is None else left_out]))
        if self.accelerator.sync_gradients:
            by_row = self.importance_sampling_level == "sequence" and inputs["advantages"].dim() == 1
            self._log_update(settles=left_out is not None, by_row=by_row)
        return loss

    def _log_update(self, settles: bool, by_row: bool):
        """Log the work of a mini-batch and, where its rows were moved, make TRL's metrics independent of that.

        Args:
            settles: whether they were.
            by_row: whether TRL's clip ratios are one value per response.
        """
        metrics, processes, steps = self._metrics["train"], self.accelerator.num_processes, len(self._counts)
        work = torch.tensor([self._work["tokens"], self._work["slots"]], device=self.accelerator.device)
        local = torch.cat([work, torch.stack(self._counts).flatten()])
        of_all = self.accelerator.gather(local).view(processes, -1).sum(dim=0)
        real, slots = of_all[:2].tolist()
        tokens, rows, skipped_tokens, skipped_rows = of_all[2:].view(steps, 4).T.tolist()
        # an epoch may end within a mini-batch
        all_rows = self.args.per_device_train_batch_size * self.current_gradient_accumulation_steps * processes
        metrics["update/real_token_share"].append(real / max(slots, 1))
        metrics["update/responses_skipped"].append(sum(skipped_rows) / all_rows)
        metrics["update/forwards_saved"].append(self._work["trl_forwards"] - self._work["forwards"])
        self._work = dict.fromkeys(self._work, 0)
        self._counts.clear()
        if not settles:
            return
        for name in metrics:
            values = metrics[name][-steps:]
            if name in MEAN_OVER_LIVE + MEAN_OVER_ALL:
                rowwise = by_row and name.startswith("clip_ratio/")
                weights = rows if rowwise else tokens
                skipped = sum(skipped_tokens) if name in MEAN_OVER_ALL else 0
                total = all_rows if rowwise else sum(weights) + skipped
                metrics[name][-steps:] = [sum(v * w for v, w in zip(values, weights, strict=True)) / max(total, 1)]
            elif name in EXTREMES:
                known = [value for value in values if value == value] + [0.0] * any(skipped_rows)
                metrics[name][-steps:] = [EXTREMES[name](known, default=float("nan"))]
