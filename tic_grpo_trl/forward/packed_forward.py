"""Log-probabilities and entropies from forward passes over real tokens only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..checkpoint.run_state import ResumableTrainer
from ..config import TICGRPOConfig
from ..rollout.micro_batches import plan_passes
from .layouts import (
    NOT_TAKEN,
    PROMPT,
    attention_arguments,
    ignores_left_padding,
    keeps_apart,
    model_inputs,
    rounding,
    ways_to_pack,
    why_trl_layout,
)
from .packing import PACKED, pack


logger = get_logger(__name__)

# What TRL's loss passes to a forward pass beside tokens, in models that read images
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
    "A pass costs as much as if every response were as long as the longest {of}; update/real_token_share logs which "
    "share of the computed tokens is real."
)


class PaddingFreeTrainer(ResumableTrainer):
    """
    [`~trl.GRPOTrainer`] whose forward passes (training, old policy, reference policy, evaluation) see no padding, with
    `padding_free=True` in its [`TICGRPOConfig`].

    Each model gets the best layout of [`~tic_grpo_trl.forward.packing`] in which its responses have the
    log-probabilities that they have alone. Inputs with images are forwarded as TRL does. Every process makes the same
    number of passes.
    """

    args: TICGRPOConfig
    model: PreTrainedModel
    pad_to_multiple_of: int | None

    def __init__(self, model, reward_funcs=None, args: Any = None, *positional, **kwargs):
        self._layout: str | None = None  # found out when first needed, because it takes passes of every process
        self._work = {"tokens": 0, "slots": 0, "forwards": 0, "trl_forwards": 0}  # since the last update
        super().__init__(model, reward_funcs, args, *positional, **kwargs)

    def _of_all(self, numbers: list[int]) -> torch.Tensor:
        """(processes, n) of the n numbers that each process passes."""
        tensor = torch.tensor(numbers, device=self.accelerator.device)
        return self.accelerator.gather(tensor).view(self.accelerator.num_processes, -1)

    def _score(self, inputs: dict[str, Any], batch_size: int | None = None, model: Any = None) -> torch.Tensor:
        """(B, T) log-probabilities without gradient, of a model or under the current weights."""
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].size(1)
        images = {name: inputs[name] for name in MULTIMODAL if inputs.get(name) is not None}
        kwargs: Any = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, kwargs):
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model if model is None else model, input_ids, attention_mask, width, batch_size, **images
            )
        return logps

    @contextmanager
    def _reference_policy(self) -> Iterator[Any]:
        """The reference model, or where an adapter is trained the model with the adapter that it had at first."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.model

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal,
    ):
        if any(value is not None for value in multimodal.values()) or self.layout == "padded":
            passes = -(-input_ids.size(0) // (batch_size or input_ids.size(0)))
            self._note(attention_mask.sum(), input_ids.numel(), passes)
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
        forward_kwargs = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
        if not self.model.training:
            # An evaluation batch may be as large as the engine likes it. The passes over it are always the same, so
            # that equal weights have equal log-probabilities.
            batch_size = int(self.args.per_device_train_batch_size)
        if batch_size is None:  # a micro-batch: one pass, whatever it holds
            return self._forward(model, input_ids, attention_mask, logits_to_keep, **forward_kwargs)

        # An evaluation batch, or the responses on which a run's ratios are looked at
        lengths = attention_mask.sum(dim=1).tolist()
        kept = [i for i, length in enumerate(lengths) if length > 0]
        passes = plan_passes([lengths[i] for i in kept], batch_size, self.layout in PACKED)
        shape = (input_ids.size(0), logits_to_keep)
        logps = torch.zeros(shape, device=input_ids.device)
        entropies = torch.zeros(shape, device=input_ids.device) if compute_entropy else None
        aux_losses = []
        for index in range(int(self._of_all([len(passes)]).max())):
            # a process that has no more rows makes its pass over a blank one
            rows = [kept[i] for i in passes[index]] if index < len(passes) else []
            ids, mask = (input_ids[rows], attention_mask[rows]) if rows else (input_ids[:1], attention_mask[:1] * 0)
            row_logps, row_entropies, aux_loss = self._forward(model, ids, mask, logits_to_keep, **forward_kwargs)
            aux_losses.append(aux_loss)
            if rows:
                logps[rows] = row_logps
                if entropies is not None:
                    entropies[rows] = row_entropies
        return logps, entropies, torch.stack(aux_losses).mean() if compute_aux_loss else None

    def _forward(self, model, input_ids, attention_mask, logits_to_keep, compute_entropy, compute_aux_loss):
        """Log-probabilities (B, T), entropies (B, T) and router loss of (B, P+T) ids, from one forward pass."""
        layout = self.layout  # asked first: the answer takes forward passes of every process
        if compute_aux_loss or attention_mask.all():
            # the router's loss is a mean over tokens that leaves padding out by the attention mask
            layout = "sorted"
        packed = pack(
            input_ids,
            attention_mask,
            logits_to_keep,
            self._tokenizer.pad_token_id,
            layout,
            linear_width=6 * self.model.config.get_text_config().hidden_size,
            multiple_of=self.pad_to_multiple_of,
        )
        self._note(packed.tokens, packed.input_ids.numel())
        router = {"output_router_logits": True} if compute_aux_loss else {}
        with self.accelerator.autocast():
            outputs = model(
                input_ids=packed.input_ids,
                labels=packed.labels,
                fused_lm_head=True,
                **model_inputs(packed, layout),
                **router,
            )
        entropies = packed.unpack(outputs.entropy) if compute_entropy else None
        return packed.unpack(outputs.log_probs), entropies, outputs.aux_loss if compute_aux_loss else None

    def _note(self, tokens: Any, slots: int, forwards: int = 1):
        if self.model.training:
            self._work["tokens"] += int(tokens)
            self._work["slots"] += slots
            self._work["forwards"] += forwards

    @property
    def layout(self) -> str:
        """How forward passes lay out responses: a layout of [`~tic_grpo_trl.forward.packing`]."""
        if self._layout is None:
            training = self.model.training
            self.model.eval()  # dropout would make any two passes differ
            try:
                self._layout = self._choose_layout()
            finally:
                self.model.train(training)
        return self._layout

    @property
    def _precision(self) -> float:
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        return torch.finfo(dtype).eps

    def _choose_layout(self) -> str:
        # Prompt tuning puts its virtual tokens before the padding of a prompt, which is then part of the sequence.
        if any(adapter.is_prompt_learning for adapter in getattr(self.model, "peft_config", {}).values()):
            return "padded"
        self._check_head()
        if not self.args.padding_free:
            return "padded"
        if why := why_trl_layout(self.model.config):
            logger.warning(
                f"padding_free does not apply: {why}, so responses keep TRL's padding. "
                f"{COST.format(of='of the rollout')}"
            )
            return "padded"
        device = self.accelerator.device
        for layout in ways_to_pack(self.model.config):

            def call(segments=None, layout=layout, **inputs):
                return self._log_probs(**inputs, **attention_arguments(layout, segments, device))

            if keeps_apart(call, device, self._precision):
                logger.info(f"padding_free: responses are packed ({layout}).")
                return layout
        if ignores_left_padding(self._log_probs, device, self._precision):
            logger.warning(
                "padding_free: the model lets responses that share a row see each other, so each has a row of its own, "
                f"sorted by length. {COST.format(of='in its pass')}"
            )
            return "sorted"
        logger.warning(
            "padding_free does not apply: padding before a prompt changes the model's log-probabilities, so responses "
            f"keep TRL's. {COST.format(of='of the rollout')}"
        )
        return "padded"

    @torch.no_grad()
    def _check_head(self):
        """Warn where TRL's head, which takes the place of the model's own, computes other log-probabilities."""
        if self.is_deepspeed_enabled:  # ZeRO-3 would keep the head gathered after an ordinary call
            return
        ids = torch.tensor([PROMPT], device=self.accelerator.device)
        try:
            with self.accelerator.autocast():
                logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
        except NOT_TAKEN:
            return
        own = (logits / self.temperature).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        error = float((self._log_probs(ids)[0].float() - own).abs().max())
        if error > rounding(own, self._precision):
            logger.warning(
                f"TRL's head leaves out a step of this model: its log-probabilities are up to {error:.2g} nats away "
                "from those of the model's logits. Training follows another policy than the one that samples, with "
                "TRL's own trainer, too."
            )

    def _log_probs(self, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.model(input_ids=input_ids, labels=input_ids, fused_lm_head=True, **inputs).log_probs
