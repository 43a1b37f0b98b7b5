"""TICGRPOTrainer: GRPOTrainer with trajectory-level importance correction.

Kept from TRL: generation, rewards, advantages, the whole loss (KL, entropy bonus, off-policy mask, tool mask, vLLM
correction, MoE loss, length normalisers), metrics, saving. Changed: between the forward pass and the loss, the old
log-probabilities are *anchored*, so that the parent's token-level ratio of every token has the value and the gradient
that the algorithm asks for (see `objective.anchored_old_logps`). Added: metrics of the trajectory ratio.
"""

import inspect
import math
import textwrap
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from .config import TICGRPOConfig
from .data.sources import is_hub_id
from .metrics.model_card import complete_card
from .metrics.progress import DISPLAYS, SettingsCallback
from .metrics.ratios import mean_sampler_ratio, merge_steps, ratio_statistics
from .objective import anchored_old_logps, clip_log_weight, log_importance_weight, token_log_ratio
from .rewards.failures import checked, raise_failures
from .rollout.responses import loss_mask
from .safety.ratio_probe import RatioProbe, disable_attention_dropout
from .safety.update_guard import SafeUpdateTrainer
from .validation.inputs import (
    check_ids,
    check_inputs,
    check_kinds,
    check_loaded,
    checked_rollout,
    naming_refused_prompt,
)


logger = get_logger(__name__)

METRIC_PREFIX = "trajectory_ratio"


class TICGRPOTrainer(SafeUpdateTrainer):
    """
    Trainer for TIC-GRPO (arXiv 2508.02833) and the papers' baselines and ablations, a drop-in for
    [`~trl.GRPOTrainer`].

    Args:
        model, reward_funcs, *positional, **kwargs:
            As in [`~trl.GRPOTrainer`].
        args ([`TICGRPOConfig`], *optional*):
            Configuration. If not given, one is built with the model's name.

    Metrics of the trajectory ratio w' = P_θ/P_old of the responses that were trained on (not those that
    `skip_zero_advantage` left out), before any cap and over all processes, are logged under `trajectory_ratio/` for
    every algorithm, and per inner step k = 1 … K under `trajectory_ratio/inner_<k>/`; names and units are those of
    [`~tic_grpo_trl.metrics.ratios.ratio_metrics`]. TRL's `clip_ratio/*` are logged only for the algorithms whose weight
    TRL computes itself, because it would see the other algorithms' weights after the cap.

    Where the rollouts come with the sampler's log-probabilities (vLLM, or a `rollout_func`), `sampling/mean_ratio` is
    the geometric mean of P_old/P_sampler per token, measured on what is trained on; 1 % away from 1 a warning says that
    the engine's weights are stale. With `log_completions` the table has a column `trajectory_ratio`: w' of each
    response as of its latest update, empty before and for those left out.

    Settings that make the ratio meaningless are warned of once in a run, each with what it does measured on the first
    rollout, see [`~tic_grpo_trl.safety.ratio_probe.RatioProbe`].

    A reward function that raises, or returns anything but one finite number or `None` per completion, ends training on
    every process with a [`~tic_grpo_trl.rewards.RewardError`] that names it, the sample and its texts.

    Raises:
        TypeError: if `args` is not a [`TICGRPOConfig`].
        ValueError: if dropout is active although the weight is a product over the response.
    """

    model: PreTrainedModel

    _tag_names = ["trl", "grpo", "tic-grpo"]
    _name = "TIC-GRPO"
    _paper = {
        "title": "TIC-GRPO: Provable and Efficient Optimization for Reinforcement Learning from Human Feedback",
        "id": "2508.02833",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{pang2025ticgrpo,
                title        = {{TIC-GRPO: Provable and Efficient Optimization for Reinforcement Learning from Human
                                 Feedback}},
                author       = {Lei Pang and Ruinan Jin},
                year         = 2025,
                eprint       = {arXiv:2508.02833},
            }"""),
    }

    def __init__(self, model, reward_funcs=None, args: TICGRPOConfig | None = None, *positional, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TICGRPOConfig(f"{model_name.split('/')[-1]}-TIC-GRPO")
        elif not isinstance(args, TICGRPOConfig):
            raise TypeError(
                f"args must be a TICGRPOConfig, got {type(args).__name__}: replace GRPOConfig(...) by "
                "TICGRPOConfig(...); it takes the same fields."
            )
        given = inspect.signature(GRPOTrainer).bind(model, reward_funcs, args, *positional, **kwargs).arguments
        check_inputs(**given)
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        check_loaded(self)
        self.rollout_func = checked_rollout(self.rollout_func)
        self.reward_funcs = [checked(function, args.reward_timeout) for function in self.reward_funcs]
        dropout = disable_attention_dropout(self.model, args.disable_dropout)
        if dropout and args.importance_sampling_level == "trajectory":
            raise ValueError(
                f"Dropout is active in {len(dropout)} modules (first: {dropout[0]}), which makes the trajectory ratio "
                "noise that grows with the response length: set disable_dropout=True (the default), or lora_dropout=0 "
                "and the model's own dropout to 0."
            )
        self._guards = RatioProbe(self, dropout)

        self._level = str(args.importance_sampling_level)
        self._clip = args.clip
        self._anchored = args.is_anchored
        if self._anchored:
            # The weights reach the parent already bounded, so its own clip must not act again.
            self.epsilon_low, self.epsilon_high = 1.0, math.inf
        self._loss_inputs: dict[str, Any] | None = None  # set while the parent computes a loss
        self._ratio_rows: list[torch.Tensor] = []  # of the current accumulation window, local
        self._ratio_steps: dict[str, list] = {"train": [], "eval": []}  # (k, rows) per step, of all processes
        # For `log_completions`: the responses in the table so far, and (their numbers, R) in the current window, local
        self._samples = 0
        self._sample_ratios: list[tuple[torch.Tensor, torch.Tensor]] = []

        for shown in [type(callback) for callback in self.callback_handler.callbacks if type(callback) in DISPLAYS]:
            self.remove_callback(shown)
            self.add_callback(DISPLAYS[shown])
        self.add_callback(SettingsCallback())
        if not self._has_old_policy and self._level == "trajectory" and args.behaviour_policy == "trainer":
            logger.warning(
                "K = 1: no rollout serves a second update, so the policy is the one that sampled, every ratio is 1 and "
                f"TIC-GRPO has nothing to correct. For K = 4 set steps_per_generation="
                f"{4 * args.gradient_accumulation_steps} (mini-batches of a larger rollout) or num_iterations=4 (the "
                "same rollout four times)."
            )

    def _tokenize_prompts(self, prompts):
        check_kinds("a batch", prompts)
        alone = [] if self.environment_factories else prompts  # with environments only a whole batch is taken
        with naming_refused_prompt(super()._tokenize_prompts, alone):
            tokenized = super()._tokenize_prompts(prompts)
        check_ids(self, tokenized[0], prompts.__getitem__)
        return tokenized

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completion_ids, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        check_ids(self, completion_ids, lambda index: self._tokenizer.decode(prompt_ids[index]), "response")
        return completion_ids, logps

    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self._guards.check_rollout(rollout)
        if self.log_completions:
            sizes = self._of_all([len(inputs)]).flatten()
            first = self._samples + int(sizes[: self.accelerator.process_index].sum())
            self._samples += int(sizes.sum())
            rollout["sample"] = torch.arange(first, first + len(inputs), device=self.accelerator.device)
            self._sample_column.extend([None] * int(sizes.sum()))
        return rollout

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        raise_failures(self.reward_funcs, self.reward_func_names, rewards, prompts, completions)
        return rewards  # (B of all processes, functions)

    def _compute_loss(self, model, inputs):
        # The parent reads the old log-probabilities from this copy after its forward pass; the buffered rollout that
        # `inputs` belongs to keeps the real ones.
        self._loss_inputs = dict(inputs)
        # `delta` is part of the weight already; the parent would apply it to A > 0 as well.
        delta = self.args.delta
        if self._anchored:
            self.args.delta = None
            self.importance_sampling_level = self._parent_level(inputs)
        try:
            loss = super()._compute_loss(model, self._loss_inputs)
            if self._anchored and self._loss_inputs.get("old_per_token_logps") is inputs.get("old_per_token_logps"):
                raise RuntimeError("This TRL version computes its loss in another way: install trl>=1.16,<1.17.")
            return loss
        finally:
            self.args.delta = delta
            self._loss_inputs = None

    def _parent_level(self, inputs: dict[str, Any]) -> str:
        """The parent's level at which anchoring costs least.

        One weight per response gives the same loss and gradient at its sequence level, the mean of the anchored
        log-ratios times the number of tokens, as long as nothing else in the loss differs between tokens.
        """
        correction = inputs.get("importance_sampling_ratio")  # (B, 1) or (B, T)
        per_response = (
            self._level != "token"
            and inputs["advantages"].dim() == 1
            and self.beta == 0.0
            and self.top_entropy_quantile == 1.0
            and (correction is None or correction.size(1) == 1)
        )
        return "sequence" if per_response else "token"

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._loss_inputs is not None:
            self._anchor(logps, self._loss_inputs)
        return logps, entropies, aux_loss

    def _anchor(self, per_token_logps: torch.Tensor, inputs: dict[str, Any]):
        """Note the ratios of this micro-batch and, where the algorithm needs it, anchor its old log-probabilities."""
        mask = loss_mask(inputs)  # (B, T)
        old_per_token_logps = inputs.get("old_per_token_logps")  # (B, T), None: on-policy
        log_ratio = token_log_ratio(per_token_logps, old_per_token_logps, mask)  # (B, T)
        log_weight = log_importance_weight(log_ratio, mask, self._level)  # (B, 1) or (B, T)
        clipped = clip_log_weight(log_weight, inputs["advantages"], mask, self._clip)
        sampler_log_ratio = self._sampler_log_ratio(per_token_logps, inputs)
        self._ratio_rows.append(ratio_statistics(log_ratio, clipped, inputs["advantages"], mask, sampler_log_ratio))
        if "sample" in inputs:
            samples = torch.where(mask.any(dim=1), inputs["sample"], -1)
            self._sample_ratios.append((samples, log_ratio.sum(dim=1)))
        if self._anchored:
            # The off-policy mask measures the drift from the real behaviour policy, not from the anchor.
            if old_per_token_logps is None:
                old_per_token_logps = per_token_logps.detach()
            inputs.setdefault("sampling_per_token_logps", old_per_token_logps)
            inputs["old_per_token_logps"] = anchored_old_logps(per_token_logps, clipped)
        if self.accelerator.sync_gradients or not self.model.training:
            self._close_ratio_window()

    def _sampler_log_ratio(self, per_token_logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor | None:
        """(B, T) log P_old − log P_sampler, NaN where the sampler gave none; `None` where it is not known."""
        sampler = inputs.get("sampling_per_token_logps")
        if sampler is None or not self.model.training:
            return None
        old = inputs.get("old_per_token_logps") if self.args.behaviour_policy == "trainer" else None
        if old is not None:
            return old - sampler
        first_update = self._step % self._rollout_steps < self.args.gradient_accumulation_steps
        return per_token_logps.detach() - sampler if first_update and self._starts_on_policy else None

    def _close_ratio_window(self):
        """Gather the rows of one optimizer step (or evaluation batch); nothing is read from the device here."""
        rows = self.accelerator.gather(torch.cat(self._ratio_rows))
        self._ratio_rows.clear()
        if self._sample_ratios:
            self._show_sample_ratios()
        if not self.model.training:
            self._ratio_steps["eval"].append((None, rows))
            return
        window = self.current_gradient_accumulation_steps
        self._heed_ess(rows)
        k = self._step % self._rollout_steps // window + 1 if self._rollout_steps > window else None
        self._ratio_steps["train"].append((k, rows))

    @property
    def _sample_column(self) -> Any:
        """A column of the table beside TRL's own; like these it keeps the last `generation_batch_size` responses."""
        logs: Any = self._logs
        return logs["extra"]["trajectory_ratio"]

    def _show_sample_ratios(self):
        """Put the ratios of this window into the table of `log_completions`."""
        columns = (torch.cat(column) for column in zip(*self._sample_ratios, strict=True))
        samples, log_ratios = (self.accelerator.gather(column).tolist() for column in columns)
        self._sample_ratios.clear()
        shown = self._sample_column
        first = self._samples - len(shown)
        for sample, log_ratio in zip(samples, log_ratios, strict=True):
            if sample >= first:
                shown[sample - first] = float(f"{math.exp(min(log_ratio, 700.0)):.4g}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        steps = self._ratio_steps[mode]
        if steps and (ratio := mean_sampler_ratio(steps)) is not None:
            metrics["sampling/mean_ratio"].append(ratio)
            self._guards.check_sampler(ratio)
        for name, value in merge_steps(steps).items():
            metrics[f"{METRIC_PREFIX}/{name}"].append(value)
        steps.clear()
        if self._anchored:
            for name in [name for name in metrics if name.startswith("clip_ratio/")]:
                del metrics[name]
        super().log(logs, start_time)
        if self.log_completions and self.accelerator.is_main_process:
            self._rotate_tables()

    def _rotate_tables(self):
        """Delete the oldest tables of `log_completions`; those that a resumed run will write again do not count."""
        limit = self.args.completions_total_limit
        if limit is None:
            return
        folder = Path(str(self.args.output_dir), "completions")
        tables = {int(path.stem.split("_")[1]): path for path in folder.glob("completions_*.parquet")}
        for step in sorted(step for step in tables if step <= self.state.global_step)[:-limit]:
            tables[step].unlink()

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, **kwargs) -> None:  # type: ignore[override]
        folder = Path(str(self.args.output_dir))
        on_hub = dataset_name if dataset_name and is_hub_id(dataset_name) else None
        super().create_model_card(model_name or folder.name, on_hub, **kwargs)
        if not self.is_world_process_zero():
            return
        path = folder / "README.md"
        card = complete_card(
            path.read_text(),
            self.args,
            self.state.log_history,
            self.accelerator.num_processes,
            self.reward_func_names,
            dataset_name,
            base_model="/".join(Path(get_config_model_id(self.model.config)).parts[-2:]) or "unnamed",
            model=folder.name,
        )
        path.write_text(card)
