"""What a training process needs of its GPU's memory, worked out before anything is loaded.

Weights, gradients and Adam's states are bytes per parameter, as measured for the files in `accelerate_configs/`.
Activations come from the model's own code, run on PyTorch's fake tensors, which have shapes and nothing else: what
autograd keeps is counted. The CUDA context, buffers of the communication library and fragmentation are not.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from .topology import Topology


# Length of the row that is counted: a prime, so that its tensors are told from weights by their shape
ROW = 1009
# TRL's fused head computes logits in float32, in tiles of 4,096 tokens and 32,768 columns (trl.kernels)
TILE_TOKENS, TILE_BYTES_PER_TOKEN = 4096, 4 * 32768


@dataclass(frozen=True)
class ModelSize:
    """What the memory of a training process depends on. Bytes are per token of a forward pass.

    Attributes:
        trained, frozen: numbers of parameters.
        layers: number of decoder layers.
        head: parameters of the output projection.
        cache: numbers that keys and values of one token take, in all layers.
        stream: bytes of the residual stream.
        layer: bytes that autograd keeps of one layer.
        rest: bytes that autograd keeps outside the layers.
        widest: bytes of the widest tensor.
    """

    trained: int
    frozen: int
    layers: int
    head: int
    cache: int
    stream: int
    layer: int
    rest: int
    widest: int


def _make_model(config: PretrainedConfig, layers: int, dtype: torch.dtype, peft_config: Any) -> Any:
    """The model with so many layers, on the device `meta`."""
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * layers)[:layers]
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
            model.enable_input_require_grads()  # as TRL does: gradients pass through the frozen embeddings
    return model.train()


def _make_fake(model: Any):
    """Put the weights of a `meta` model on a CPU that is none; to be called under FakeTensorMode."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype)
                    if isinstance(value, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
                    values[name] = made.setdefault(id(value), fake)


def _kept_by_autograd(model: Any, autocast: bool) -> tuple[int, int, int]:
    """Bytes per token that autograd keeps of a pass without its head, of the widest tensor, and of the output."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # weights (and their copies in bfloat16) have no dimension of the row's length, a causal mask has two
        if sum(size == ROW for size in tensor.shape) == 1:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        FakeTensorMode(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        _make_fake(model)
        decoder = model.get_base_model().base_model if hasattr(model, "peft_config") else model.base_model
        output = decoder(input_ids=torch.zeros(1, ROW, dtype=torch.long), use_cache=False).last_hidden_state
    return sum(kept.values()) // ROW, max(kept.values()) // ROW, output.nbytes // ROW


def model_size(
    config: PretrainedConfig, dtype: torch.dtype, autocast: bool = False, peft_config: Any = None
) -> ModelSize:
    """Sizes of a model that is never allocated.

    Args:
        config: the model's configuration.
        dtype: of the weights as they are computed with.
        autocast: whether mixed precision computes in bfloat16 on weights of another dtype.
        peft_config: an adapter to train, `None` for all weights.

    Returns:
        The sizes.
    """
    text: Any = config.get_text_config()
    whole = _make_model(config, text.num_hidden_layers, dtype, peft_config)
    trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in whole.parameters()) - trained
    kept_1, widest, stream = _kept_by_autograd(_make_model(config, 1, dtype, peft_config), autocast)
    kept_2, _, _ = _kept_by_autograd(_make_model(config, 2, dtype, peft_config), autocast)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    return ModelSize(
        trained=trained,
        frozen=frozen,
        layers=text.num_hidden_layers,
        head=whole.get_output_embeddings().weight.numel(),
        cache=cache * head_dim,
        stream=stream,
        layer=kept_2 - kept_1,
        rest=2 * kept_1 - kept_2,
        widest=widest,
    )


def activation_bytes(size: ModelSize, tokens: int, checkpointing: bool, autocast: bool = False) -> int:
    """Peak of what a forward and backward pass needs beside weights and gradients.

    With gradient checkpointing every layer leaves its input behind, and one layer at a time is computed again; the
    gradient of the widest tensor comes on top. Logits exist only as tiles of TRL's fused head, before any layer is
    computed again.

    Args:
        size: of the model.
        tokens: in the pass, all rows together.
        checkpointing: whether gradient checkpointing is on.
        autocast: whether mixed precision makes copies of the weights in bfloat16: autograd keeps them, and with
            checkpointing the forward pass.

    Returns:
        Bytes; measured against real passes in `tests/dry_run/test_memory.py`.
    """
    head = min(tokens, TILE_TOKENS) * TILE_BYTES_PER_TOKEN
    copies = 2 * size.trained if autocast else 0
    if checkpointing:
        kept = tokens * (size.layers * size.stream + size.rest)
        return kept + max(tokens * (size.layer + size.widest), head + copies)
    kept = tokens * (size.layers * size.layer + size.rest)
    return kept + copies + max(tokens * size.widest, head)


def state_bytes(
    size: ModelSize, topology: Topology, weight_bytes: int, bf16: bool, reference: bool
) -> dict[str, float]:
    """Bytes of one process that do not depend on the batch, AdamW assumed.

    Args:
        size: of the model.
        topology: of the run.
        weight_bytes: of a weight as it is loaded (`--dtype`): 4 or 2.
        bf16: whether `bf16` mixed precision is on.
        reference: whether a reference policy is held besides (`beta` > 0 without an adapter).

    Returns:
        Bytes by what they are for: on the GPU, or with offload in the memory of the machine.
    """
    shards, trained, frozen = topology.processes, size.trained, size.frozen
    adapter = frozen > 0
    if topology.zero_stage:  # computes in bf16 whatever --dtype says, and keeps fp32 weights behind
        compute = 2 if bf16 else 4
        whole = topology.zero_stage < 3
        weights = compute * (trained + frozen) / (1 if whole else shards)
        gradients = compute * trained / (shards if topology.zero_stage > 1 else 1)
        optimizer = 12 * trained / shards  # fp32 weights 4, Adam's moments 8
        if topology.offload:
            gradients += 4 * trained / shards
        reference_bytes = compute * (trained + frozen) / (1 if whole else shards)
    elif topology.fsdp:  # trained weights are held in fp32 and gathered in bf16
        weights = (4 * trained + weight_bytes * frozen) / shards
        gradients, optimizer = 4 * trained / shards, 8 * trained / shards
        reference_bytes = weight_bytes * (trained + frozen) / shards
    else:
        trained_bytes = 4 if adapter else weight_bytes  # peft keeps adapters in fp32
        weights = trained_bytes * trained + weight_bytes * frozen
        gradients = trained_bytes * trained * (2 if topology.processes > 1 else 1)  # DDP's buckets hold them again
        optimizer = 2 * trained_bytes * trained
        reference_bytes = weight_bytes * (trained + frozen)
    parts = {"weights": weights, "gradients": gradients, "AdamW": optimizer}
    parts["reference policy"] = reference_bytes if reference else 0.0
    return {name: value for name, value in parts.items() if value}
