"""Warnings about settings that make the ratios meaningless, once per run and cause, with the measured effect.

The measurement is a few forward passes over some responses of the first rollout, before any update on it. It is made
only with such a setting, by every process alike. It leaves the random states alone, so a resumed run that measures
again continues exactly like one that was never interrupted.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import nn
from transformers.generation import logits_process
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..config import TICGRPOConfig
from ..forward.packed_forward import PackedForward
from ..forward.packing import used_columns
from ..forward.responses import loss_mask, response_count, sequences
from ..objective import PRODUCT_LEVELS


logger = get_logger(__name__)

MAX_RESPONSES = 16  # measured on each process
# Fewer and shorter where every token needs its logits: 600 kB each with a vocabulary of 150,000.
MAX_LOGIT_RESPONSES, MAX_LOGIT_TOKENS = 8, 64
LOGIT_ERROR = 0.1  # nats per token that rounding may change
SHIFT = 16  # columns of padding that the second pass has more
# Noise of 0.1 in R alone costs 1 % of the effective sample size (e^(-σ²)) and puts 0.7 % of the responses above the
# default cap, log 1.28 = 0.25. It is what log-probabilities stored in bfloat16 cost at 512 tokens.
NOISE_LIMIT = 0.1
# Beyond 1 % per token the sampler is another policy: a response of 1,000 tokens then has a ratio of about e^-10.
STALE_LOG_RATIO = 0.01
DROPOUT_FIX = "set disable_dropout=True (the default), or lora_dropout=0 and the model's own dropout to 0."


def disable_attention_dropout(model: nn.Module, disable: bool) -> list[str]:
    """Disable the dropout that TRL misses, an argument of attention functions; return names of what stays active."""
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
    """Return the root mean square of the finite ones of (n,) log-ratios; NaN if none is finite."""
    finite = log_ratios[log_ratios.isfinite()].double()
    return finite.square().mean().sqrt().item()


def sampler_log_ratio(
    logits: torch.Tensor,  # (B, N, V) of the last N tokens, before temperature
    input_ids: torch.Tensor,  # (B, P + N)
    temperature: float,
    settings: dict[str, float],  # those of `top_p`, `top_k`, `min_p` and `repetition_penalty` that are in force
) -> torch.Tensor:
    """Compute log P_sampler − log P of tokens, (B, N) in nats; −inf if the sampler would not have drawn a token."""
    kinds: dict[str, Any] = {  # in the order of `generate`
        "repetition_penalty": logits_process.RepetitionPenaltyLogitsProcessor,
        "temperature": logits_process.TemperatureLogitsWarper,
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    values = {name: int(value) if name == "top_k" else float(value) for name, value in settings.items()}
    values["temperature"] = float(temperature)
    warp: Any = logits_process.LogitsProcessorList(kinds[name](values[name]) for name in kinds if name in values)
    first = input_ids.size(1) - logits.size(1)
    columns = []
    for t in range(logits.size(1)):  # one token of every response at a time, as when they were sampled
        scores, token = logits[:, t].float(), input_ids[:, first + t, None]
        policy = (scores / temperature).log_softmax(-1)
        sampler = warp(input_ids[:, : first + t], scores).log_softmax(-1)
        columns.append((sampler - policy).gather(1, token))
    return torch.cat(columns, dim=1)


@dataclass
class RatioProbe:
    """Warn if settings make the ratios meaningless; raise a ValueError for dropout where trajectory ratios are used."""

    args: TICGRPOConfig
    accelerator: Accelerator
    model: Callable[[], Any]
    forward: PackedForward
    pad_token_id: int
    temperature: float
    compares: bool  # whether an update compares the policy with an earlier one or the sampler; else the ratio is 1

    def __post_init__(self):
        self.by_trajectory = self.args.importance_sampling_level in PRODUCT_LEVELS or self.args.uses_mini_batch
        self._has_measured = self._is_stale = False
        self.dropout = disable_attention_dropout(self.model(), self.args.disable_dropout)
        if self.dropout and self.by_trajectory:
            raise ValueError(
                f"Dropout is active in {len(self.dropout)} modules (first: {self.dropout[0]}), which makes the "
                f"trajectory ratio noise that grows with the response length: {DROPOUT_FIX}"
            )
        if not self.compares and self.by_trajectory and not self.args.max_carry_over:
            logger.warning(
                "K = 1: every rollout is used for one update, so every ratio is 1 and TIC-GRPO has nothing to correct. "
                "Set updates_per_rollout=4 (mini-batches of a larger rollout) or num_iterations=4 (the same rollout "
                "four times)."
            )

    def check_rollout(self, rollout: dict[str, Any], metrics: dict[str, list[float]], is_new: bool):
        """Measure the effect of the settings on the first rollout; every process must call this.

        A run that has just begun, `is_new`, gets the metric `trajectory_ratio/noise_floor`: the root mean square, in
        nats, of the noise that rounding makes in R. A resumed run has logged it before.
        """
        if self._has_measured:
            return
        self._has_measured = True
        dtypes = {torch.bfloat16, torch.float16} & {parameter.dtype for parameter in self.model().parameters()}
        dtypes |= {torch.bfloat16} if self.args.bf16 else {torch.float16} if self.args.fp16 else set()
        if self.compares and self.dropout and self.args.importance_sampling_level != "none":
            self._check_dropout(rollout)
        elif self.compares and dtypes and self.by_trajectory:
            noise = self._check_precision(rollout, dtypes)
            if noise is not None and is_new:
                metrics["trajectory_ratio/noise_floor"].append(noise)
        if self.args.changed_sampling and self.by_trajectory:
            self._check_sampling(rollout, self.args.changed_sampling)

    def check_sampler(self, ratio: float | None):
        """Warn when the sampler's weights begin to look stale by the mean sampler ratio since the last log."""
        if ratio is None:
            return
        was_stale = self._is_stale
        self._is_stale = abs(math.log(ratio)) > STALE_LOG_RATIO and not self.args.changed_sampling
        if self._is_stale and not was_stale:
            logger.warning(
                f"The sampler's weights look stale: the policy gives its tokens {ratio:.3f} times the probability "
                "that the sampler gave them (geometric mean; 1 with equal weights). Check that the engine receives the "
                "weights, its precision, and that its log-probabilities are those after temperature."
            )

    def _check_dropout(self, rollout: dict[str, Any]):
        measured = ""
        if "pixel_values" not in rollout:
            noise, on = self._noise(rollout, self._score)
            measured = f": R, which should be 0, is {noise:.2g} nats (rms) {on}"
        logger.warning(
            f"Dropout is active in {len(self.dropout)} modules (first: {self.dropout[0]}), so two passes with the same "
            f"weights differ{measured}. The noise grows with the square root of the length: {DROPOUT_FIX}"
        )

    def _check_precision(self, rollout: dict[str, Any], dtypes: set[torch.dtype]) -> float | None:
        if "pixel_values" in rollout or (self.args.padding_free and self.forward.layout == "padded"):
            return None  # in a model that must be padded, padding changes more than rounding does
        noise, on = self._noise(rollout, self._score_shifted)
        if noise > NOISE_LIMIT:
            names = " and ".join(sorted(str(each).removeprefix("torch.") for each in dtypes))
            logger.warning(
                f"Log-probabilities in {names} are noise in R: between two passes with the same weights in other batch "
                f"shapes it is {noise:.2g} nats (rms) {on}, and grows with the square root of the length. Above "
                f"{NOISE_LIMIT}, rounding alone moves responses over the cap. Load the model in float32 and set "
                "bf16=False and fp16=False, or at least cast_lm_head_to_fp32=True; or widen the cap (epsilon_high)."
            )
        return noise

    def _check_sampling(self, rollout: dict[str, Any], settings: dict[str, float]):
        names, measured = ", ".join(f"{name}={value}" for name, value in settings.items()), ""
        if "pixel_values" not in rollout:
            with self._measuring():
                per_token, tokens = self._mean_sampler_log_ratio(rollout, settings)
            length = self.accelerator.gather(loss_mask(rollout).sum(1).double()).mean().item()
            if tokens:
                measured = (
                    f" On {tokens} tokens of the first rollout it gives a token {math.exp(per_token):.4g} times the "
                    f"policy's probability (geometric mean), and so a response of {length:.0f} tokens "
                    f"e^{per_token * length:.2g} times."
                )
        meaning = "so P_θ/P_old is not the ratio of anything that was sampled and the gradient is biased"
        if self.args.behaviour_policy == "sampler":
            meaning = "so the ratio does not start at 1, and tokens that the sampler never draws do not count"
        logger.warning(
            f"With {names} the sampler is a different policy from the one whose log-probabilities are computed, "
            f"{meaning}.{measured} Set top_p=1.0, top_k=0, min_p=None and repetition_penalty=1.0 for an exact ratio."
        )

    @contextmanager
    def _measuring(self):
        """Compute without gradients and without using up random numbers."""
        device, kwargs = self.accelerator.device, cast(Any, self.args.gradient_checkpointing_kwargs)
        devices = [] if device.type in ("cpu", "mps") else [device]
        random_state = torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")
        with random_state, torch.no_grad(), disable_gradient_checkpointing(self.model(), kwargs):
            yield

    def _noise(self, rollout: dict[str, Any], score_again: Callable[[dict], torch.Tensor]) -> tuple[float, str]:
        """Return the root mean square of R between a pass of training and another one, and what it was measured on."""
        responses = _select(rollout, MAX_RESPONSES)
        mask = loss_mask(responses)
        with self._measuring():
            log_ratios = ((self._score(responses) - score_again(responses)) * mask).sum(1)  # (n,)
        log_ratios = self.accelerator.gather(torch.where(mask.any(1), log_ratios, math.nan))
        lengths = self.accelerator.gather(mask.sum(1))
        lengths = lengths[lengths > 0].double()
        on = f"over {lengths.numel()} responses of the first rollout with {lengths.mean().item():.0f} tokens on average"
        return root_mean_square(log_ratios), on

    def _score(self, responses: dict[str, torch.Tensor]) -> torch.Tensor:  # (n, T)
        """Compute log-probabilities as training does."""
        return self.forward.score(responses, self.args.per_device_train_batch_size).logps

    def _score_shifted(self, responses: dict[str, torch.Tensor]) -> torch.Tensor:  # (n, T)
        """Compute log-probabilities in padded batches, with more padding than they need."""
        ids, mask = sequences(responses)
        ids = nn.functional.pad(ids, (SHIFT, 0), value=self.pad_token_id)
        mask = nn.functional.pad(mask, (SHIFT, 0))
        # Rotary embeddings see differences of positions only: shifted ones are rounded in another way.
        rotary = getattr(self.model().config.get_text_config(), "rope_parameters", None)
        positions = (mask.cumsum(1) - 1).clamp(min=0) + (SHIFT if rotary else 0)
        size, width = self.args.per_device_train_batch_size, responses["completion_ids"].size(1)
        parts = zip(ids.split(size), mask.split(size), positions.split(size), strict=True)
        return torch.cat([self._pass(*part[:2], width, position_ids=part[2]) for part in parts])

    def _mean_sampler_log_ratio(self, rollout: dict[str, Any], settings: dict[str, float]) -> tuple[float, int]:
        """Return the mean of [`sampler_log_ratio`] over tokens of all processes, in nats, and their number."""
        responses = _select(rollout, MAX_LOGIT_RESPONSES, MAX_LOGIT_TOKENS)
        count = responses["completion_ids"].size(1)
        ids, mask = sequences(responses)
        logps, logits = self._logits(ids, mask, count)
        log_ratio = sampler_log_ratio(logits, ids, self.temperature, settings)
        known = loss_mask(responses).bool() & log_ratio.isfinite()
        # Some models scale or cap their logits: only the log-probabilities tell whether these are the right ones.
        own = (logits.float() / self.temperature).log_softmax(-1).gather(2, responses["completion_ids"].unsqueeze(2))
        known &= (own.squeeze(2) - logps).abs().where(known, 0.0).sum() <= LOGIT_ERROR * known.sum()
        sums = torch.stack([log_ratio.where(known, 0.0).double().sum(), known.double().sum()])
        total, tokens = self.accelerator.gather(sums).view(-1, 2).sum(dim=0).tolist()
        return total / max(tokens, 1), int(tokens)

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities of the last tokens, (n, count), and the logits behind them, (n, count, V).

        The logits come from the hidden states and the head. Called for its logits, a model under ZeRO-3 would leave the
        head's weights gathered, and its next pass would rely on that.
        """
        policy = self.model()
        model = policy.get_base_model() if is_peft_model(policy) else policy
        hidden: list[torch.Tensor] = []
        with model.base_model.register_forward_hook(lambda module, args, output: hidden.append(output[0])):
            logps = self._pass(ids, mask, count)
        head = model.get_output_embeddings()
        weight, bias = (  # FSDP2 splits them
            value.full_tensor() if hasattr(value, "full_tensor") else value for value in (head.weight, head.bias)
        )
        with maybe_gather_lm_head_ctx(weight, bias):
            return logps, nn.functional.linear(hidden[0][:, -count - 1 : -1].to(weight.dtype), weight, bias)

    def _pass(self, ids: torch.Tensor, mask: torch.Tensor, count: int, **inputs: torch.Tensor) -> torch.Tensor:
        """Make TRL's own kind of forward pass for the log-probabilities of the last tokens, (n, count)."""
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-count] = -100
        with self.accelerator.autocast():
            outputs = self.model()(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **inputs)
        return outputs.log_probs[:, -count:]


def _select(rollout: dict[str, Any], responses: int, tokens: int | None = None) -> dict[str, torch.Tensor]:
    """Select responses of as many groups as possible, and the first tokens of their completions."""
    size = response_count(rollout)
    chosen = list(range(0, size, max(1, size // responses))[:responses])
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
    selected = {name: rollout[name][chosen] for name in names if name in rollout}
    prompt, completion = used_columns(selected["prompt_mask"], selected["completion_mask"])
    return {
        name: value[:, -prompt:] if name.startswith("prompt") else value[:, :completion][:, :tokens]
        for name, value in selected.items()
    }
