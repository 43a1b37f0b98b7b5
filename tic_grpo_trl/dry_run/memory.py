"""Estimate the GPU memory of a training process from the model's configuration, before anything is loaded.

Weights, gradients and Adam's states are bytes per parameter, as documented in `accelerate_configs/`. Activations are
counted in the way of Korthikanti et al. (arXiv 2205.05198, section 4), for a decoder with RMSNorm, grouped-query
attention without a stored attention matrix, and a gated MLP. For other architectures they are a rough guide. Not
included: the CUDA context, communication buffers and fragmentation.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig

from .topology import Topology


# TRL's fused head computes logits in float32, in tiles of 4,096 tokens and 32,768 columns (trl.kernels)
TILE_TOKENS, TILE_BYTES_PER_TOKEN = 4096, 4 * 32768


@dataclass(frozen=True)
class ModelSize:
    """Store what the memory of a training process depends on. Bytes are per token of a forward pass."""

    trained: int  # parameters
    frozen: int  # parameters
    layers: int
    cache: int  # numbers, not bytes, of the key-value cache over all layers
    stream: int  # bytes of the residual stream
    layer: int  # bytes that autograd keeps for one layer
    rest: int  # bytes that autograd keeps outside the layers
    widest: int  # bytes of the widest tensor


def model_size(
    config: PretrainedConfig,
    dtype: torch.dtype,  # of the weights in the forward pass
    autocast: bool = False,  # mixed precision computes in bfloat16 on weights of another dtype
    peft_config: Any = None,
) -> ModelSize:
    """Compute the sizes of a model without allocating it."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text: Any = config.get_text_config()
    hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    queries, keys = heads * head_dim, (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    mlp = getattr(text, "intermediate_size", None) or 4 * hidden

    # Bytes of a number: in the residual stream, in the result of a matrix product, in an adapter's input (float32)
    stream, product = dtype.itemsize, 2 if autocast else dtype.itemsize
    adapter = 0 if peft_config is None or autocast or dtype == torch.float32 else 4
    has_qk_norm = any(name.endswith("q_norm") for name, _ in model.named_modules())
    normed = 2 * hidden + (queries + keys if has_qk_norm else 0)
    layer = 4 * normed  # RMSNorm keeps its input in float32, and what a trained weight is multiplied by
    layer += stream * normed if peft_config is None else 0
    layer += (3 * stream + product) * queries  # queries, keys and values of every head, and their result
    layer += 3 * product * mlp  # gate before and after its activation, up
    # Inputs of the projections: attention and MLP share theirs, but each adapter converts its own
    layer += adapter * (5 * hidden + queries + mlp) if adapter else product * (2 * hidden + mlp)
    return ModelSize(
        trained=trained,
        frozen=sum(p.numel() for p in model.parameters()) - trained,
        layers=layers,
        cache=2 * layers * keys,
        stream=stream * hidden,
        layer=layer,
        rest=(4 + (stream if peft_config is None else 0)) * hidden,  # the last norm
        widest=max(product, adapter) * mlp,
    )


def activation_bytes(size: ModelSize, tokens: int, checkpointing: bool, autocast: bool = False) -> int:
    """Estimate the peak memory of a forward and backward pass over `tokens` tokens, besides weights and gradients.

    With gradient checkpointing every layer keeps its input, and one layer at a time is recomputed. The gradient of the
    widest tensor is added. Logits exist only as tiles of TRL's fused head, before any layer is recomputed.
    """
    head = min(tokens, TILE_TOKENS) * TILE_BYTES_PER_TOKEN
    # Autograd keeps autocast's bfloat16 copies of the weights; with checkpointing only until the backward pass
    copies = 2 * size.trained if autocast else 0
    if checkpointing:
        kept = tokens * (size.layers * size.stream + size.rest)
        return kept + max(tokens * (size.layer + size.widest), head + copies)
    kept = tokens * (size.layers * size.layer + size.rest)
    return kept + copies + max(tokens * size.widest, head)


def state_bytes(
    size: ModelSize,
    topology: Topology,
    weight_bytes: int,  # of a weight as it is loaded (`--dtype`): 4 or 2
    bf16: bool,  # mixed precision
    reference: bool,  # there is also a reference model (`beta` > 0 without an adapter)
) -> dict[str, float]:
    """Estimate the bytes by purpose of one process that don't depend on the batch, with AdamW."""
    shards, trained, frozen = topology.processes, size.trained, size.frozen
    if topology.zero_stage:  # computes in bf16 whatever --dtype says, and keeps fp32 weights
        compute = 2 if bf16 else 4
        weights = reference_bytes = compute * (trained + frozen) / (shards if topology.zero_stage == 3 else 1)
        gradients = compute * trained / (shards if topology.zero_stage > 1 else 1)
        optimizer = 12 * trained / shards  # fp32 weights 4, Adam's moments 8
        if topology.offload:
            gradients += 4 * trained / shards
    elif topology.fsdp:  # trained weights are stored in fp32 and gathered in bf16
        weights = (4 * trained + weight_bytes * frozen) / shards
        gradients, optimizer = 4 * trained / shards, 8 * trained / shards
        reference_bytes = weight_bytes * (trained + frozen) / shards
    else:
        trained_bytes = 4 if frozen else weight_bytes  # peft keeps adapters in fp32
        weights = trained_bytes * trained + weight_bytes * frozen
        gradients = trained_bytes * trained * (2 if topology.processes > 1 else 1)  # DDP's buckets are a second copy
        optimizer = 2 * trained_bytes * trained
        reference_bytes = weight_bytes * (trained + frozen)
    parts = {"weights": weights, "gradients": gradients, "AdamW": optimizer}
    return parts | ({"reference policy": reference_bytes} if reference else {})
