"""Warns of settings that make the ratios meaningless, once per run and cause, with the effect as measured.

The measurements are a few forward passes over some responses of the first rollout, before any update on it. They are
made only where such a setting is on, by every process alike. They don't touch the random states, so that a resumed run
that measures again continues exactly like one that was never interrupted.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import nn
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..config import TICGRPOConfig
from ..forward.packed_forward import PackedForward
from ..forward.packing import used_columns
from ..forward.responses import loss_mask, response_count, sequences


logger = get_logger(__name__)

# Responses of each process that are measured, and how many and how much of them where a token takes a whole row of
# logits, which with a vocabulary of 150,000 are 600 kB
ROWS = 16
LOGIT_ROWS, LOGIT_TOKENS = 8, 64
LOGIT_ERROR = 0.1  # nats per token that rounding may make of the same logits
SHIFT = 16  # columns of padding that the second pass has more
# A noise of 0.1 in R alone takes 1 % of the effective sample size (e^(-σ²)) and puts 0.7 % of the responses above the
# default cap, log 1.28 = 0.25. It is what log-probabilities stored in bfloat16 cost at 512 tokens.
NOISE_LIMIT = 0.1
# Beyond 1 % per token the sampler is another policy: a response of 1,000 tokens then has a ratio of about e^-10.
STALE_LOG_RATIO = 0.01


def disable_attention_dropout(model: nn.Module, disable: bool) -> list[str]:
    """Switch the dropout off that TRL misses, an argument of attention functions.

    Args:
        model: whose modules TRL has been through.
        disable: TRL's `disable_dropout`.

    Returns:
        Names of what is still active.
    """
    active = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    for name, module in model.named_modules():
        probability = getattr(module, "attention_dropout", None)
        if isinstance(probability, float) and probability > 0:
            if disable:
                module.attention_dropout = 0.0
            else:
                active.append(f"{name}.attention_dropout")
    return active


def root_mean_square(log_ratios: torch.Tensor) -> float:
    """Of the finite ones of (n,) log-ratios that should all be 0; NaN where there is none."""
    finite = log_ratios[log_ratios.isfinite()].double()
    return finite.square().mean().sqrt().item()


def sampler_log_ratio(
    logits: torch.Tensor,  # (B, N, V)
    input_ids: torch.Tensor,  # (B, P + N)
    temperature: float,
    settings: dict[str, float],
) -> torch.Tensor:
    """log P_sampler − log P of tokens, where the sampler changes the distributions before it draws from them.

    Args:
        logits: of the last N tokens, before temperature.
        input_ids: the tokens and all before them.
        temperature: of both policies.
        settings: `top_p`, `top_k`, `min_p`, `repetition_penalty`, those that are in force.

    Returns:
        (B, N) in nats; −inf where the sampler would not have drawn the token.
    """
    warpers = {  # in the order of `generate`
        "repetition_penalty": lambda value: RepetitionPenaltyLogitsProcessor(float(value)),
        "temperature": lambda value: TemperatureLogitsWarper(float(value)),
        "top_k": lambda value: TopKLogitsWarper(int(value)),
        "top_p": lambda value: TopPLogitsWarper(float(value)),
        "min_p": lambda value: MinPLogitsWarper(float(value)),
    }
    settings = settings | {"temperature": temperature}
    warp: Any = LogitsProcessorList([make(settings[name]) for name, make in warpers.items() if name in settings])
    first = input_ids.size(1) - logits.size(1)
    columns = []
    for t in range(logits.size(1)):  # one token of every response at a time, as when they were sampled
        scores, token = logits[:, t].float(), input_ids[:, first + t, None]
        policy = (scores / temperature).log_softmax(-1)
        sampler = warp(input_ids[:, : first + t], scores).log_softmax(-1)
        columns.append((sampler - policy).gather(1, token))
    return torch.cat(columns, dim=1)


class RatioProbe:
    """
    Measure what a run's settings do to its ratios, and warn where they make them meaningless.

    Args:
        args: the settings.
        accelerator: for autocast and the communication between processes.
        model: returns the policy.
        forward: the forward passes.
        pad_token_id: of the tokenizer.
        temperature: of the sampler.
        compares: whether any update compares the policy with an earlier one or with the sampler. Otherwise the ratio is
            1 by definition.

    Raises:
        ValueError: if dropout is active although the weight is a product over the response.
    """

    def __init__(
        self,
        args: TICGRPOConfig,
        accelerator: Accelerator,
        model: Callable[[], Any],
        forward: PackedForward,
        pad_token_id: int,
        temperature: float,
        compares: bool,
    ):
        self.args, self.accelerator, self.model, self.forward = args, accelerator, model, forward
        self.pad_token_id, self.temperature = pad_token_id, temperature
        self.compares, self.dropout = compares, disable_attention_dropout(model(), args.disable_dropout)
        if self.dropout and args.importance_sampling_level == "trajectory":
            raise ValueError(
                f"Dropout is active in {len(self.dropout)} modules (first: {self.dropout[0]}), which makes the "
                "trajectory ratio noise that grows with the response length: set disable_dropout=True (the default), "
                "or lora_dropout=0 and the model's own dropout to 0."
            )
        if not compares and args.importance_sampling_level == "trajectory":
            logger.warning(
                "K = 1: no rollout serves a second update, so every ratio is 1 and TIC-GRPO has nothing to correct. "
                f"For K = 4 set steps_per_generation={4 * args.gradient_accumulation_steps} (mini-batches of a larger "
                "rollout) or num_iterations=4 (the same rollout four times)."
            )
        self._has_measured = False
        self._is_stale = False

    def check_rollout(self, rollout: dict[str, Any], metrics: dict[str, list[float]], is_new: bool):
        """Measure the effect of the settings on the first rollout. Every process has to call this.

        Args:
            rollout: that was generated.
            metrics: TRL's, to which `trajectory_ratio/noise_floor` is added: the noise of R through rounding, root mean
                square in nats.
            is_new: whether the run has just begun; a resumed run has logged the noise before.
        """
        if self._has_measured:
            return
        self._has_measured = True
        args, noise = self.args, None
        by_trajectory = args.importance_sampling_level == "trajectory"
        types = {torch.bfloat16, torch.float16} & {parameter.dtype for parameter in self.model().parameters()}
        types |= {torch.bfloat16} if args.bf16 else {torch.float16} if args.fp16 else set()
        if self.compares and self.dropout and args.importance_sampling_level != "none":
            self._check_dropout(rollout)
        elif self.compares and types and by_trajectory:
            names = " and ".join(sorted(str(each).removeprefix("torch.") for each in types))
            noise = self._check_precision(rollout, names)
        if args.changed_sampling and by_trajectory:
            self._check_sampling(rollout)
        if noise is not None and is_new:
            metrics["trajectory_ratio/noise_floor"].append(noise)

    def check_sampler(self, ratio: float | None):
        """Warn when the sampler's weights look stale, and again only after they looked well.

        Args:
            ratio: [`~tic_grpo_trl.metrics.ratios.mean_sampler_ratio`] of the updates since the last log,
                or `None` if it is unknown.
        """
        if ratio is None:
            return
        was_stale = self._is_stale
        self._is_stale = abs(math.log(ratio)) > STALE_LOG_RATIO and not self.args.changed_sampling
        if self._is_stale and not was_stale:
            logger.warning(
                f"The sampler's weights look stale: the policy gives its tokens {ratio:.3f} times the probability "
                "that the sampler gave them (geometric mean; 1 with equal weights). Check that the weights reach "
                "the engine, its precision, and that its log-probabilities are those after temperature."
            )

    def _check_dropout(self, rollout: dict[str, Any]):
        measured = ""
        if rows := self._rows(rollout, ROWS):
            with self._measuring():
                noise, shown = self._noise(rows, self._score(rows) - self._score(rows))
            measured = f": R, which should be 0, is {noise:.2g} nats (rms) {shown}"
        logger.warning(
            f"Dropout is active in {len(self.dropout)} modules (first: {self.dropout[0]}), so that two passes over "
            f"the same weights differ{measured}, and grows with the square root of the length. Set "
            "disable_dropout=True (the default), or lora_dropout=0 and the model's own dropout to 0."
        )

    def _check_precision(self, rollout: dict[str, Any], types: str) -> float | None:
        rows = self._rows(rollout, ROWS)
        if not rows or (self.args.padding_free and self.forward.layout == "padded"):
            return None  # in such a model more padding changes more than the rounding
        with self._measuring():
            noise, shown = self._noise(rows, self._score(rows) - self._score_shifted(rows))
        if noise > NOISE_LIMIT:
            logger.warning(
                f"Log-probabilities in {types} are noise in R: between two passes over the same weights in other "
                f"batch shapes it is {noise:.2g} nats (rms) {shown}, and grows with the square root of the length. "
                f"Above {NOISE_LIMIT} rounding alone moves responses over the cap. Load the model in float32 and set "
                "bf16=False and fp16=False, or at least cast_lm_head_to_fp32=True; or widen the cap "
                "(epsilon_high)."
            )
        return noise

    def _check_sampling(self, rollout: dict[str, Any]):
        settings = self.args.changed_sampling
        names = ", ".join(f"{name}={value}" for name, value in settings.items())
        measured = ""
        if rows := self._rows(rollout, LOGIT_ROWS):
            with self._measuring():
                per_token, tokens = self._sampler_log_ratio(rows, settings)
            lengths = self.accelerator.gather(loss_mask(rollout).sum(1).double())
            length = lengths.mean().item()
            if tokens:
                measured = (
                    f" On {tokens} tokens of the first rollout it gives a token {math.exp(per_token):.4g} times the "
                    f"policy's probability (geometric mean), and so a response of {length:.0f} tokens "
                    f"e^{per_token * length:.2g} times."
                )
        meaning = "so P_θ/P_old is not the ratio of anything that was sampled and the gradient is biased"
        if self.args.behaviour_policy == "sampler":
            meaning = "so the ratio does not start at 1, and what the sampler never draws does not count"
        logger.warning(
            f"With {names} the sampler is a different policy from the one whose log-probabilities are computed, "
            f"{meaning}.{measured} Set top_p=1.0, top_k=0, min_p=None and repetition_penalty=1.0 for an exact ratio."
        )

    # Passes

    @contextmanager
    def _measuring(self):
        """Compute without gradients and without using up random numbers."""
        device = self.accelerator.device
        devices = [] if device.type in ("cpu", "mps") else [device]
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with (
            torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
            torch.no_grad(),
            disable_gradient_checkpointing(self.model(), checkpointing),
        ):
            yield

    def _rows(self, rollout: dict[str, Any], count: int) -> dict[str, torch.Tensor]:
        """Some responses, of as many groups as can be; none of a rollout with images, whose passes take more."""
        if "pixel_values" in rollout:
            return {}
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
        size = response_count(rollout)
        chosen = range(0, size, max(1, size // count))[:count]
        rows = {name: rollout[name][list(chosen)] for name in names if name in rollout}
        prompt, completion = used_columns(rows["prompt_mask"], rows["completion_mask"])
        sides = {name: slice(-prompt, None) if name.startswith("prompt") else slice(completion) for name in rows}
        return {name: value[:, sides[name]] for name, value in rows.items()}

    def _noise(self, rows: dict[str, torch.Tensor], difference: torch.Tensor) -> tuple[float, str]:
        """The root mean square of R over the responses of all processes, and what it was measured on."""
        mask = loss_mask(rows)
        length = mask.sum(1)
        log_ratios = torch.where(length > 0, (difference * mask).sum(1), math.nan)  # (n,)
        gather = self.accelerator.gather
        log_ratios, length = gather(log_ratios), gather(length)
        lengths = length[length > 0].double()
        return root_mean_square(log_ratios), (
            f"over {lengths.numel()} responses of the first rollout with {lengths.mean().item():.0f} tokens on average"
        )

    def _score(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """(n, T) log-probabilities, as training computes them."""
        return self.forward.score(rows, self.args.per_device_train_batch_size).logps

    def _score_shifted(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """(n, T) the same in padded rows, with more padding than they need."""
        model, size = self.model(), self.args.per_device_train_batch_size
        ids, mask = sequences(rows)
        ids = nn.functional.pad(ids, (SHIFT, 0), value=self.pad_token_id)
        mask = nn.functional.pad(mask, (SHIFT, 0))
        width = rows["completion_ids"].size(1)
        # Rotary embeddings see differences of positions only: shifted ones are rounded in another way.
        rotary = getattr(model.config.get_text_config(), "rope_parameters", None)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0) + (SHIFT if rotary else 0)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-width] = -100
        logps = []
        for start in range(0, ids.size(0), size):
            part = slice(start, start + size)
            with self.accelerator.autocast():
                outputs = model(
                    input_ids=ids[part],
                    attention_mask=mask[part],
                    position_ids=position_ids[part],
                    labels=labels[part],
                    fused_lm_head=True,
                )
            logps.append(outputs.log_probs[:, -width:])
        return torch.cat(logps)

    def _sampler_log_ratio(self, rows: dict[str, torch.Tensor], settings: dict[str, float]) -> tuple[float, int]:
        """Mean over tokens of [`sampler_log_ratio`], in nats, and their number, over all processes."""
        count = min(LOGIT_TOKENS, rows["completion_ids"].size(1))
        rows = {name: value if name.startswith("prompt") else value[:, :count] for name, value in rows.items()}
        ids, mask = sequences(rows)
        logps, logits = self._logits(ids, mask, count)
        log_ratio = sampler_log_ratio(logits, ids, self.temperature, settings)
        known = loss_mask(rows).bool() & log_ratio.isfinite()
        # The pass itself says whether these are its logits: some models scale or bend them.
        own = (logits.float() / self.temperature).log_softmax(-1).gather(2, rows["completion_ids"].unsqueeze(2))
        known &= (own.squeeze(2) - logps).abs().where(known, 0.0).sum() <= LOGIT_ERROR * known.sum()
        sums = torch.stack([log_ratio.where(known, 0.0).double().sum(), known.double().sum()])
        total, tokens = self.accelerator.gather(sums).view(-1, 2).sum(dim=0).tolist()
        return total / max(tokens, 1), int(tokens)

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the last tokens, (n, count), and the logits behind them, (n, count, V).

        By TRL's own kind of pass and the head's weights: ZeRO-3 keeps those of a model that was called for its logits
        gathered, which the next pass then takes for granted.
        """
        policy = self.model()
        model = policy.get_base_model() if is_peft_model(policy) else policy
        hidden = []
        hook = model.base_model.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-count] = -100
        try:
            with self.accelerator.autocast():
                logps = policy(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[
                    :, -count:
                ]
        finally:
            hook.remove()
        head = model.get_output_embeddings()
        weight, bias = (  # FSDP2 splits them
            value.full_tensor() if hasattr(value, "full_tensor") else value for value in (head.weight, head.bias)
        )
        with maybe_gather_lm_head_ctx(weight, bias):
            logits = nn.functional.linear(hidden[0][:, -count - 1 : -1].to(weight.dtype), weight, bias)
        return logps, logits
