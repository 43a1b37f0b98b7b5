"""Log-probabilities and entropies from forward passes over real tokens only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing

from ..config import TICGRPOConfig
from .layouts import (
    NOT_TAKEN,
    PROMPT,
    attention_arguments,
    ignores_left_padding,
    keeps_apart,
    may_share_prompts,
    model_inputs,
    packed_layouts,
    passes_windows,
    rounding,
    shares_exactly,
    why_trl_layout,
)
from .packing import PACKED, SharedPrompts, pack
from .planning import ResponseLengths
from .responses import sequences
from .segments import register_flash


logger = get_logger(__name__)

# What TRL's loss passes to a forward pass beside tokens, for models that read images
MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
COST = (
    "A pass costs as much as if every response were as long as the longest {of}; update/real_token_share logs the "
    "share of real tokens."
)


@dataclass(frozen=True)
class ForwardOutput:
    """What a forward pass returned, and what it cost."""

    logps: torch.Tensor  # (B, T)
    entropies: torch.Tensor | None  # (B, T)
    aux_loss: torch.Tensor | None  # the router's
    tokens: int  # real ones, of a shared prompt once
    shared_tokens: int  # real ones that were not computed, because others have the same prompt
    slots: int  # computed tokens, padding included
    passes: int


@dataclass
class PackedForward:
    """
    Compute log-probabilities without computing padding, where `padding_free` is set.

    Each model gets the best layout of [`~tic_grpo_trl.forward.packing`] in which its responses have the
    log-probabilities that they have alone; `layout` is empty until [`choose_layout`] has found it. With
    `shares_prompts`, a pass computes the prompt of a group once. Inputs with images go through TRL's own forward pass,
    `padded_forward`.
    """

    args: TICGRPOConfig
    accelerator: Accelerator
    model: Callable[[], PreTrainedModel]
    pad_token_id: int
    temperature: float
    pad_to_multiple_of: int | None
    padded_forward: Callable
    checks_head: bool  # False if the model may not be called without labels: ZeRO-3 would keep its head gathered
    layout: str = ""
    shares_prompts: bool = False

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,  # (B, P + T)
        attention_mask: torch.Tensor,  # (B, P + T)
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> ForwardOutput:
        """Compute what TRL's `_get_per_token_logps_and_entropies` computes; the arguments are the same.

        With a `batch_size`, and for evaluation batches, every process has to make the call.
        """
        outputs = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
        if any(value is not None for value in multimodal.values()) or self.layout == "padded":
            passes = -(-input_ids.size(0) // (batch_size or input_ids.size(0)))
            logps, entropies, aux_loss = self.padded_forward(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **outputs, **multimodal
            )
            return ForwardOutput(logps, entropies, aux_loss, int(attention_mask.sum()), 0, input_ids.numel(), passes)
        if not self.model().training:
            # An evaluation batch may be as large as the engine likes. The passes over it are always the same, so that
            # equal weights have equal log-probabilities.
            batch_size = int(self.args.per_device_train_batch_size)
        if batch_size is None:  # a micro-batch is one pass, whatever it holds
            return self._pass(model, input_ids, attention_mask, logits_to_keep, self.shares_prompts, **outputs)
        return self._passes(model, input_ids, attention_mask, logits_to_keep, batch_size, **outputs)

    def score(self, inputs: dict[str, Any], batch_size: int | None = None, model: Any = None) -> ForwardOutput:
        """Compute a micro-batch's log-probabilities without gradients, in passes of `batch_size` rows or in one."""
        ids, mask = sequences(inputs)
        images = {name: inputs[name] for name in MULTIMODAL if inputs.get(name) is not None}
        policy: Any = self.model()
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(policy, checkpointing):
            return self(
                policy if model is None else model, ids, mask, inputs["completion_ids"].size(1), batch_size, **images
            )

    @property
    def packs(self) -> bool:
        """Whether responses share rows."""
        return self.layout in PACKED

    def lengths(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int) -> ResponseLengths:
        """Return what decides how many responses of a padded batch, (B, P + T), fit into a pass."""
        return ResponseLengths.of(input_ids, attention_mask, logits_to_keep, self.shares_prompts)

    def _passes(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss
    ) -> ForwardOutput:
        """Compute several passes, as many on every process."""
        shares = self.shares_prompts and not compute_aux_loss  # which needs a row for each response
        lengths = ResponseLengths.of(input_ids, attention_mask, logits_to_keep, shares)
        kept = [i for i, length in enumerate(lengths.tokens) if length]
        planned = lengths.plan(kept, batch_size, self.packs and not compute_aux_loss)
        shape = (input_ids.size(0), logits_to_keep)
        logps = torch.zeros(shape, device=input_ids.device)
        entropies: Any = torch.zeros(shape, device=input_ids.device) if compute_entropy else None
        outputs: list[Any] = []
        for index in range(max(gather_object([len(planned)]))):
            # a process that has no responses left makes its pass over a blank one
            rows = planned[index] if index < len(planned) else []
            ids, mask = (input_ids[rows], attention_mask[rows]) if rows else (input_ids[:1], attention_mask[:1] * 0)
            output = self._pass(model, ids, mask, logits_to_keep, shares, compute_entropy, compute_aux_loss)
            outputs.append(output)
            if rows:
                logps[rows] = output.logps
                if entropies is not None:
                    entropies[rows] = output.entropies
        aux_loss = torch.stack([output.aux_loss for output in outputs]).mean() if compute_aux_loss else None
        tokens, shared, slots = (
            sum(getattr(o, name) for o in outputs) for name in ("tokens", "shared_tokens", "slots")
        )
        return ForwardOutput(logps, entropies, aux_loss, tokens, shared, slots, len(outputs))

    def _pass(
        self, model, input_ids, attention_mask, logits_to_keep, shares, compute_entropy=False, compute_aux_loss=False
    ) -> ForwardOutput:
        """Compute one pass, in which responses share their prompt if `shares`."""
        layout, sharing = self.layout, None
        if shares:
            if layout == "varlen":
                register_flash(self.model().config._attn_implementation)
            sharing = SharedPrompts.of(input_ids, attention_mask, logits_to_keep)
        if compute_aux_loss or (attention_mask.all() and not (sharing and any(sharing.tokens))):
            # the router's loss is a mean over tokens that leaves padding out by the attention mask
            layout = "sorted"
        packed = pack(
            input_ids,
            attention_mask,
            logits_to_keep,
            self.pad_token_id,
            layout,
            linear_width=6 * self.model().config.get_text_config().hidden_size,
            multiple_of=self.pad_to_multiple_of,
            sharing=sharing,
        )
        router = {"output_router_logits": True} if compute_aux_loss else {}
        with self.accelerator.autocast():
            outputs = model(
                input_ids=packed.input_ids,
                labels=packed.labels,
                fused_lm_head=True,
                **model_inputs(packed, layout),
                **router,
            )
        return ForwardOutput(
            packed.unpack(outputs.log_probs),
            packed.unpack(outputs.entropy) if compute_entropy else None,
            outputs.aux_loss if compute_aux_loss else None,
            packed.tokens,
            packed.shared_tokens,
            packed.input_ids.numel(),
            passes=1,
        )

    def choose_layout(self) -> str:
        """Choose the layout once, by forward passes that every process has to make, and return it."""
        if not self.layout:
            model = self.model()
            training = model.training
            model.eval()  # dropout would make any two passes differ
            try:
                self.layout = self._best_layout(model)
                self.shares_prompts = self._can_share_prompts(model)
            finally:
                model.train(training)
        return self.layout

    @property
    def _precision(self) -> float:
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model().dtype
        return torch.finfo(dtype).eps

    def _best_layout(self, model: Any) -> str:
        # Prompt tuning puts its virtual tokens before the padding of a prompt, which is then part of the sequence.
        if any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values()):
            return "padded"
        if self.checks_head:
            self._check_head()
        if not self.args.padding_free:
            return "padded"
        if why := why_trl_layout(model.config):
            logger.warning(
                f"padding_free has no effect: {why}, so TRL's padding is kept. {COST.format(of='of the rollout')}"
            )
            return "padded"
        device = self.accelerator.device
        for layout in packed_layouts(model.config):
            windows: set[int | None] = set()

            def call(segments=None, layout=layout, windows=windows, **inputs):
                arguments = attention_arguments(layout, segments, device, windows)
                return self._log_probs(**inputs, **arguments)

            apart = keeps_apart(call, device, self._precision)
            if apart and (layout != "segments" or passes_windows(model.config, windows)):
                logger.info(f"padding_free: responses are packed ({layout}).")
                return layout
        if ignores_left_padding(self._log_probs, device, self._precision):
            logger.warning(
                "padding_free: responses that share a row change each other's log-probabilities in this model, so each "
                f"gets its own row, sorted by length. {COST.format(of='in its pass')}"
            )
            return "sorted"
        logger.warning(
            "padding_free has no effect: padding before a prompt changes the model's log-probabilities, so TRL's "
            f"padding is kept. {COST.format(of='of the rollout')}"
        )
        return "padded"

    @torch.no_grad()
    def _can_share_prompts(self, model: Any) -> bool:
        if not (self.args.share_prompts and may_share_prompts(model.config, self.layout)):
            return False

        def log_probs(ids: torch.Tensor, mask: torch.Tensor, completion: int, shares: bool) -> torch.Tensor:
            return self._pass(model, ids, mask, completion, shares).logps

        found = shares_exactly(log_probs, self.accelerator.device, self._precision)
        logger.info(f"share_prompts: a group's prompt is computed {'once' if found else 'for each of its responses'}.")
        return found

    @torch.no_grad()
    def _check_head(self):
        """Warn if TRL's fused head, which replaces the model's own, computes other log-probabilities."""
        ids = torch.tensor([PROMPT], device=self.accelerator.device)
        try:
            with self.accelerator.autocast():
                logits = self.model()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
        except NOT_TAKEN:
            return
        own = (logits / self.temperature).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        error = float((self._log_probs(ids)[0].float() - own).abs().max())
        if error > rounding(own, self._precision):
            logger.warning(
                "TRL's fused head skips a step of this model: its log-probabilities differ from those of the model's "
                f"logits by up to {error:.2g} nats. The trained policy is not the one that samples; TRL's own trainer "
                "has the same error."
            )

    def _log_probs(self, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.model()(input_ids=input_ids, labels=input_ids, fused_lm_head=True, **inputs).log_probs
