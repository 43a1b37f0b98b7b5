"""Log-probabilities and entropies from forward passes over real tokens only."""

from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing

from .batching import plan_forwards
from .config import TICGRPOConfig
from .packing import attention_arguments, keeps_apart, pack, used_columns, ways_to_pack
from .resume import ResumableTrainer


logger = get_logger(__name__)


class PaddingFreeTrainer(ResumableTrainer):
    """
    [`~trl.GRPOTrainer`] whose forward passes (training, old policy, reference policy, evaluation) see no padding, with
    `padding_free=True` in its [`TICGRPOConfig`].

    Where the model keeps responses of one row apart, their tokens are packed; where it does not, columns that no
    response uses are cut off. Inputs with images are forwarded as TRL does. Every process makes the same number of
    passes.
    """

    args: TICGRPOConfig
    model: PreTrainedModel
    pad_to_multiple_of: int | None

    def __init__(self, model, reward_funcs=None, args: Any = None, *positional, **kwargs):
        self._way: str | None = None  # how responses share rows, "" if they can't; found out when first needed
        self._work = {"tokens": 0, "slots": 0, "forwards": 0, "trl_forwards": 0}  # since the last update
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        # Prompt tuning puts its virtual tokens before the padding of a prompt, which is then part of the sequence.
        adapters = getattr(self.model, "peft_config", {}).values()
        self._padding_free = self.args.padding_free and not any(adapter.is_prompt_learning for adapter in adapters)

    def _of_all(self, numbers: list[int]) -> torch.Tensor:
        """(processes, n) of the n numbers that each process passes."""
        tensor = torch.tensor(numbers, device=self.accelerator.device)
        return self.accelerator.gather(tensor).view(self.accelerator.num_processes, -1)

    def _score(self, inputs: dict[str, Any], batch_size: int | None = None) -> torch.Tensor:
        """(B, T) log-probabilities under the current weights, without gradient."""
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].size(1)
        kwargs: Any = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, kwargs):
            return self._get_per_token_logps_and_entropies(self.model, input_ids, attention_mask, width, batch_size)[0]

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
        if any(value is not None for value in multimodal.values()) or not self._padding_free:
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
        if not self.model.training:  # an evaluation batch may be as large as the engine likes it
            batch_size = batch_size or int(self.args.per_device_train_batch_size)
        if batch_size is None:  # a micro-batch: one pass, whatever it holds
            return self._forward(model, input_ids, attention_mask, logits_to_keep, **forward_kwargs)

        # A rollout or an evaluation batch
        lengths = attention_mask.sum(dim=1).tolist()
        kept = [i for i, length in enumerate(lengths) if length > 0]
        passes = plan_forwards([lengths[i] for i in kept], batch_size, bool(self._way_to_pack()))
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
        way = self._way_to_pack()  # asked first: the answer takes forward passes of every process
        if compute_aux_loss or not way or attention_mask.all():
            # the router's loss is a mean over tokens that leaves padding out by the attention mask
            split = input_ids.size(1) - logits_to_keep
            prompt, width = used_columns(attention_mask[:, :split], attention_mask[:, split:])
            columns = slice(split - prompt, split + width)
            ids, mask = input_ids[:, columns], attention_mask[:, columns]
            self._note(mask.sum(), ids.numel())
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                model, ids, mask, width, None, compute_entropy, compute_aux_loss
            )
            missing = (0, logits_to_keep - width)
            logps = torch.nn.functional.pad(logps, missing)
            return logps, torch.nn.functional.pad(entropies, missing) if compute_entropy else None, aux_loss
        packed = pack(
            input_ids,
            attention_mask,
            logits_to_keep,
            self._tokenizer.pad_token_id,
            linear_width=6 * self.model.config.get_text_config().hidden_size,
            single_row=way != "rows",
            multiple_of=self.pad_to_multiple_of,
        )
        self._note(packed.tokens, packed.input_ids.numel())
        with self.accelerator.autocast():
            outputs = model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                labels=packed.labels,
                fused_lm_head=True,
                **attention_arguments(way, packed.segments, input_ids.device),
            )
        return packed.unpack(outputs.log_probs), packed.unpack(outputs.entropy) if compute_entropy else None, None

    def _note(self, tokens: Any, slots: int, forwards: int = 1):
        if self.model.training:
            self._work["tokens"] += int(tokens)
            self._work["slots"] += slots
            self._work["forwards"] += forwards

    def _way_to_pack(self) -> str:
        """How several responses share a row (see [`~tic_grpo_trl.packing`]); empty if they can't."""
        if self._way is None:
            device = self.accelerator.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # where dropout is active
                self._way = next((way for way in ways_to_pack(self.model.config) if self._works(way)), "")
            how = f"packed ({self._way})" if self._way else "sorted by length and trimmed: the model can't share rows"
            logger.info(f"padding_free: responses are {how}.")
        return self._way

    def _works(self, way: str) -> bool:
        device = self.accelerator.device

        def log_probs(input_ids, position_ids, segments):
            arguments = attention_arguments(way, segments, device)
            with self.accelerator.autocast():
                return self.model(
                    input_ids=input_ids, position_ids=position_ids, labels=input_ids, fused_lm_head=True, **arguments
                ).log_probs

        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        return keeps_apart(log_probs, device, torch.finfo(dtype).eps)
