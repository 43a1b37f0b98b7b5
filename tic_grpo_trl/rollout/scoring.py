"""The log-probabilities that the loss compares the policy with: of the old policy, the sampler and the reference.

TRL scores a whole rollout before it cuts it. Here the micro-batches that train are scored, so that nothing is computed
for padding and zero-advantage responses, and both passes over a micro-batch round alike.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from trl.trainer.utils import nanmax, nanmin, use_adapter

from ..config import TICGRPOConfig
from ..forward.packed_forward import ForwardOutput, PackedForward
from ..forward.responses import lacks_sampler_logps, loss_mask
from ..objective import sampler_correction
from .loss_terms import LossTerms
from .schedule import Position, RolloutSchedule


Metrics = dict[str, list[float]]
Count = Callable[[ForwardOutput], None]


def check_behaviour_policy(trainer: Any):
    """Refuse `behaviour_policy="sampler"` if nothing returns the sampler's log-probabilities after temperature."""
    if trainer.args.behaviour_policy != "sampler":
        return
    if not (trainer.use_vllm or trainer.rollout_func is not None):
        for name in ("use_transformers_continuous_batching", "_is_vlm"):
            if getattr(trainer, name):
                what = "a model with images" if name == "_is_vlm" else f"{name}=True"
                raise ValueError(
                    f"behaviour_policy='sampler' needs the sampler's log-probabilities, which {what} does not return: "
                    "set use_vllm=True, or behaviour_policy='trainer'."
                )
    if not trainer.use_vllm or trainer.vllm_mode != "server":
        return
    modes = []
    if trainer.accelerator.is_main_process:
        modes = [trainer.vllm_generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]]
    (mode,) = gather_object(modes)
    if mode != "processed_logprobs":
        raise ValueError(
            f"behaviour_policy='sampler', but the vLLM server runs with --logprobs-mode {mode}, which ignores the "
            "temperature: restart it with --logprobs-mode processed_logprobs."
        )


@dataclass
class Scorer:
    """Add the log-probabilities that a loss reads to its micro-batches."""

    args: TICGRPOConfig
    schedule: RolloutSchedule
    accelerator: Accelerator
    forward: PackedForward
    model: Callable[[], Any]
    ref_model: Callable[[], Any]  # returns `None` where an adapter is trained
    terms: LossTerms

    def passes_of_trl(self) -> int:
        """Return the forward passes in which TRL would score one rollout."""
        scores_old = self.schedule.has_old_policy or bool(self.terms.trainer.use_vllm)
        return self.schedule.steps_per_generation * (scores_old + (self.terms.beta != 0.0))

    def check_sampler_logps(self, rollout: dict[str, Any], metrics: Metrics):
        """Require the sampler's log-probabilities where they are the old ones, and log how many are missing."""
        if self.args.behaviour_policy != "sampler":
            return
        if rollout.get("sampling_per_token_logps") is None:
            raise ValueError(
                "behaviour_policy='sampler', but the rollout has no log-probabilities of the sampler: return them from "
                "rollout_func as 'logprobs', or set behaviour_policy='trainer'."
            )
        share = self.accelerator.gather(lacks_sampler_logps(rollout).float()).mean().item()
        metrics["sampling/responses_without_logps"].append(share)

    def score(
        self,
        micro_batches: list[dict[str, Any] | None],
        metrics: Metrics,
        count: Count = lambda output: None,
    ):
        """Add `old_per_token_logps`, `importance_sampling_ratio` and `ref_per_token_logps`, as far as they are needed.

        The micro-batches are those of one rollout, in order, or an evaluation batch; all processes have `None` in the
        same places. The vLLM correction adds to `metrics`, and `count` is called with each forward pass.
        """
        scored = [micro_batch for micro_batch in micro_batches if micro_batch is not None]
        corrects = self.terms.corrects_sampler
        if self.args.behaviour_policy == "sampler":
            self._use_sampler_logps(scored, count)
        elif self.schedule.has_old_policy or corrects:
            # The first update takes its old log-probabilities from the pass that trains.
            skips_first = self.schedule.starts_on_policy and self.args.skip_on_policy_logps and not corrects
            for micro_batch in micro_batches[self.schedule.gradient_accumulation_steps if skips_first else 0 :]:
                if micro_batch is not None:
                    micro_batch["old_per_token_logps"] = self._logps(micro_batch, count)
        if corrects:
            self._correct_for_sampler(scored, metrics)
        if self.terms.beta != 0.0:
            with self._reference_policy() as model:
                for micro_batch in scored:
                    micro_batch["ref_per_token_logps"] = self._logps(micro_batch, count, model)

    def sampler_log_ratio(self, logps: torch.Tensor, inputs: dict[str, Any], position: Position) -> torch.Tensor | None:
        """Return (B, T) log P_old − log P_sampler, NaN where it is unknown, or `None` if it is for every token.

        The sampler had the old policy's weights for tokens of age 0 only. In a rollout's first update the policy, with
        log-probabilities `logps`, is the old one.
        """
        sampler, age = inputs.get("sampling_per_token_logps"), inputs.get("token_age")
        if sampler is None:
            return None
        old = inputs.get("old_per_token_logps") if self.args.behaviour_policy == "trainer" else None
        if old is None and position.update == 0 and self.schedule.starts_on_policy:
            old = logps
        if old is None:
            return None
        return old - sampler if age is None else torch.where(age == 0, old - sampler, torch.nan)

    def _logps(self, micro_batch: dict[str, Any], count: Count, model: Any = None) -> torch.Tensor:
        output = self.forward.score(micro_batch, model=model)
        count(output)
        return output.logps

    @contextmanager
    def _reference_policy(self) -> Iterator[Any]:
        """Yield the reference model; where an adapter is trained, the policy with the adapter that it began with."""
        if (reference := self.ref_model()) is not None:
            yield reference
            return
        model = self.accelerator.unwrap_model(self.model())
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.model()

    def _use_sampler_logps(self, micro_batches: list[dict[str, Any]], count: Count):
        """Use the sampler's log-probabilities as the old ones, and the policy's own for responses that lack one."""
        lacking = [lacks_sampler_logps(micro_batch) for micro_batch in micro_batches]  # (B,) each
        on_processes = gather_object([[bool(responses.any()) for responses in lacking]])
        on_any_process = [any(of_processes) for of_processes in zip(*on_processes, strict=True)]
        for micro_batch, responses, scores in zip(micro_batches, lacking, on_any_process, strict=True):
            responses = responses.unsqueeze(1)
            logps = torch.where(loss_mask(micro_batch).bool(), micro_batch["sampling_per_token_logps"], 0.0)
            if scores:
                masks = () if "num_images" in micro_batch else ("prompt_mask", "completion_mask")
                own = self._logps(micro_batch | {name: micro_batch[name] * responses for name in masks}, count)
                logps = torch.where(responses, own, logps)
            micro_batch["old_per_token_logps"] = logps

    def _correct_for_sampler(self, micro_batches: list[dict[str, Any]], metrics: Metrics):
        """Apply TRL's correction for the mismatch of vLLM and trainer, and log its metrics."""
        differences, ratios = [], []
        for micro_batch in micro_batches:
            old, sampler = micro_batch["old_per_token_logps"], micro_batch["sampling_per_token_logps"]
            mask = loss_mask(micro_batch)
            ratio = sampler_correction(
                old,
                sampler,
                mask,
                self.args.vllm_importance_sampling_mode,
                self.args.vllm_importance_sampling_clip_min,
                self.args.vllm_importance_sampling_clip_max,
            )
            micro_batch["importance_sampling_ratio"], difference = ratio, (old - sampler).abs()
            differences.append(difference[mask.bool() & ~difference.isnan()])
            ratios.append(ratio[mask.bool() if ratio.size(1) > 1 else mask.any(dim=1)].flatten())
        nothing = torch.full((1,), torch.nan, device=self.accelerator.device)  # from a process that trains on nothing
        difference, ratio = (torch.cat(values) for values in (differences, ratios))
        difference, ratio = (values if values.numel() else nothing for values in (difference, ratio))
        local = torch.stack([difference.mean(), difference.max(), ratio.min(), ratio.mean(), ratio.max()])
        means, largest, least, averages, most = self.accelerator.gather(local).view(-1, 5).unbind(dim=1)
        metrics["sampling/sampling_logp_difference/mean"].append(means.nanmean().item())
        metrics["sampling/sampling_logp_difference/max"].append(nanmax(largest).item())
        metrics["sampling/importance_sampling_ratio/min"].append(nanmin(least).item())
        metrics["sampling/importance_sampling_ratio/mean"].append(averages.nanmean().item())
        metrics["sampling/importance_sampling_ratio/max"].append(nanmax(most).item())
