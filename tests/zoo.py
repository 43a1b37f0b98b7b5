"""A tiny random model of every causal language model architecture of the installed transformers."""

import copy
import functools
import inspect
import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


VOCABULARY = 32

# The first pattern that is found in an attribute's name gives its largest value.
LIMITS = [
    (re.compile(pattern), limit)
    for limit, pattern in [
        (0, r"token_id|token_index"),
        (VOCABULARY, r"vocab|codebook_size"),
        (160, r"max_.*position|n_positions|n_ctx|max_seq_len|context_length|max_length"),
        (8, r"window|floor|local_attention$|chunk|index_topk$|block_size|multiple_of|qk_(nope|rope)_head_dim"),
        (1, r"expand$|offset|first_k_dense|num_dense_layers|shared_experts|topk_group|num_kv_shared"),
        (16, r"index.*heads"),
        (2, r"layers?$|^num_blocks|^depth$|period|interval|pattern$|every_n|decoder_sparse_step|layer_group_size"),
        (2, r"top_?k|per_tok|moe_k$|groups?$|zero_expert|per_ngram|(kv|key_value)_heads"),
        (8, r"experts"),
        (4, r"value_heads"),
        (2, r"heads|n_head"),
        (16, r"head_?dim|query_pre_attn|dim_head|head_size|d_head|d_kv|kv_channels|rotary_dim"),
        (8, r"rank|state|d_rel|kernel|conv|patch_size|num_channels|in_channels"),
        (32, r"size|dim|width|hidden|inner|ffn|embd|d_model|channel|filters|dff|d_ff|rel_extent|d_ssm"),
    ]
]

# What the code of an architecture needs although its configuration may leave it out.
FILLED = {
    "head_dim": 16,
    "num_key_value_heads": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

# What makes an architecture causal, and the kinds of layers that can be switched on by name.
SETTINGS = {
    "is_decoder": True,
    "causal": True,
    "use_sliding_window": True,
    "use_mem_rope": True,
    "use_cache": False,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 1,
}

# What these rules cannot know, most of all kinds of layers that the defaults lack.
HYBRIDS = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "partial_rotary_factor": 0.5,
    },
    "doge": {"keep_window_size": 160},  # A smaller one would choose among equal tokens, which tie in the first layer.
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "minimax_m3_vl_text": {"index_n_heads": 2, "layer_types": ["full_attention", "minimax_m3_sparse"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "max_inference_chunksize": 160},
    "xmod": {"default_language": "en_XX"},
    "zamba": HYBRIDS,
    "zamba2": HYBRIDS,
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 8},
}


class NotBuiltError(Exception):
    """Say in one line why an architecture has no tiny model."""


def in_one_line(error: Exception) -> str:
    """Name an error and quote its first sentence."""
    sentence = re.split(r"(?<=[.!?]) ", " ".join(str(error).split()))[0]
    return f"{type(error).__name__}: {sentence}"


def architectures() -> list[str]:
    """List the model types that have a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _limited(name: str, value: Any) -> Any:
    """Shrink numbers by their attribute's name, and switch off what is random."""
    if isinstance(value, (list, tuple)):
        return type(value)(_limited(name, one) for one in value)
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        return value
    if re.search("drop|jitter", name):
        return type(value)(0)
    limit = next((limit for pattern, limit in LIMITS if pattern.search(name)), value)
    return min(value, limit) if isinstance(value, int) else value


def _kept(per_layer: list[list], count: int) -> list[int]:
    """Choose at least two layers, among which is every value of every list."""
    kept, seen = [], set()
    for layer in range(count):
        values = {(number, str(one[layer])) for number, one in enumerate(per_layer)}
        if not values <= seen:
            kept.append(layer)
            seen |= values
    return sorted(kept + [layer for layer in range(count) if layer not in kept][: max(0, 2 - len(kept))])


def _arguments(default: PreTrainedConfig) -> dict[str, Any]:
    """Compute the arguments of a small configuration of the same class."""
    named = default.attribute_map.get
    parameters = inspect.signature(type(default)).parameters.values()
    fields = {named(parameter.name, parameter.name): parameter.default for parameter in parameters}
    values = {name: value for name, value in vars(default).items() if name in fields}
    count = getattr(default, "num_hidden_layers", 0)
    lists, indices = [], []
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and count:
            if len(value) == count and list(value) != list(range(count)):
                lists.append(name)
            elif re.search("idxs|indices|layers|layer_ids", name) and all(type(one) is int for one in value):
                indices.append(name)
    members = [[layer in values[name] for layer in range(count)] for name in indices]
    kept = _kept([values[name] for name in lists] + members, count)
    arguments = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            arguments[name] = type(value)(**_arguments(value))
        elif name in lists:
            arguments[name] = [_limited(name, value[layer]) for layer in kept]
        elif name in indices:
            arguments[name] = [new for new, old in enumerate(kept) if old in value]
        elif name == named("num_hidden_layers", "num_hidden_layers"):
            arguments[name] = len(kept)
        elif value is None and name in FILLED:
            arguments[name] = FILLED[name]
        elif (fields[name] is not None or "window" in name) and _limited(name, value) != value:
            # The others are derived from the rest, once more from the small sizes.
            arguments[name] = _limited(name, value)
    if spec := getattr(default, "_heterogeneity_spec", None):
        arguments["per_layer_config"] = {
            new: {name: _limited(name, value) for name, value in spec.per_layer_overrides[old].items()}
            for new, old in enumerate(kept)
            if old in spec.per_layer_overrides
        }
    heads = values.get(named("num_attention_heads", "num_attention_heads"))
    if 0 < (values.get("num_key_value_heads") or 0) < (heads or 0):
        arguments["num_key_value_heads"] = 1
    if set(arguments.get("layer_types", [])) == {"full_attention"} and "sliding_window" in fields:
        arguments |= {"layer_types": ["sliding_attention", *arguments["layer_types"][1:]], "sliding_window": 8}
    if "use_sliding_window" in fields:
        arguments["sliding_window"] = 8
    arguments |= {name: value for name, value in SETTINGS.items() if name in fields}
    return arguments | EXCEPTIONS.get(default.model_type, {})


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Build an architecture's own configuration with small sizes."""
    default = CONFIG_MAPPING[model_type]()
    text = default.get_text_config(decoder=True)
    overrides = {text.attribute_map.get(name, name): value for name, value in overrides.items()}
    arguments = _arguments(default)
    if place := next((name for name, value in vars(default).items() if value is text), None):
        arguments[place] = type(text)(**_arguments(text) | overrides)
        overrides = {}
    config = type(default)(**arguments | overrides)
    for one in config, config.get_text_config(decoder=True):
        # Some configurations take a zero for a missing value.
        one.pad_token_id, one.eos_token_id = 0, 0
    return config


@torch.no_grad()
def _redraw(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Make all weights matter: matrices that keep the scale, all others near to where they start."""
    convolutions = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.modules.conv._ConvNd)}
    embeddings = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2 or parameter.std() < 2 * parameter.mean().abs():
            parameter += 0.1 * noise
        elif id(parameter) in embeddings:
            parameter.copy_(0.5 * noise)
        elif id(parameter) in convolutions:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(1.2 * noise / (parameter.shape[-1] * parameter.shape[-2]) ** 0.25)
    for name, buffer in model.named_buffers():
        if "bias" in name and buffer.is_floating_point() and not buffer.any():
            buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
        if "tid2eid" in name:  # The table of the experts of every token is in the checkpoints only.
            buffer.copy_(torch.rand(len(buffer), 8, generator=generator).argsort(1)[:, : buffer.shape[1]])


@torch.no_grad()
def _check(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Run the forward pass, and scale the output layer until the policy is far from uniform."""
    ids = torch.randint(2, VOCABULARY, (2, 48), generator=generator)
    ids[1, :32] = ids[0, :32]
    for _ in range(3):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if logits.shape[:2] != ids.shape or not logits.isfinite().all():
            raise NotBuiltError(f"logits of shape {tuple(logits.shape)}, finite: {bool(logits.isfinite().all())}")
        if (logits[0, :32] - logits[1, :32]).abs().max() > 1e-4:
            raise NotBuiltError("is not causal: a later token moves earlier logits")
        model.get_output_embeddings().weight *= 2.5 / logits.std(-1).mean()


def tiny_model(model_type: str, attention: str = "sdpa", seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """Build an architecture's causal language model with random weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    try:
        config = tiny_config(model_type, **config_overrides)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
            _redraw(model, generator)
            _check(model, generator)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(in_one_line(error)) from error
    return model


def _with_rope(parameters: dict[str, Any], model: PreTrainedModel, kind: str) -> dict[str, Any]:
    """Switch rotary parameters, flat or one dict for every type of layer, to a kind that depends on the length."""

    def switched(values: dict[str, Any], buffer: str) -> dict[str, Any]:
        size = next(len(value) for name, value in model.named_buffers() if name.split(".")[-1] == buffer)
        # The proportional kind counts the whole head, and leaves a part of it unrotated.
        left_out = {"partial_rotary_factor"} if values["rope_type"] == "proportional" else set()
        values = {name: value for name, value in values.items() if name not in left_out}
        values |= {"rope_type": kind, "factor": 4.0}
        if kind == "longrope":
            values |= {
                "short_factor": [1 + 0.1 * i for i in range(size)],
                "long_factor": [4.0 + i for i in range(size)],
                "original_max_position_embeddings": 32,
            }
            if model.config.model_type == "phimoe":
                values |= {"short_mscale": 1.0, "long_mscale": 1.2}
        return values

    if "rope_type" in parameters:
        return switched(parameters, "inv_freq")
    return {name: value and switched(value, f"{name}_inv_freq") for name, value in parameters.items()}


@functools.cache
def _rope_variants(model_type: str) -> dict[str, dict]:
    """Try both kinds of rotary embedding on the same tokens in a short and in a long call."""
    ids = torch.randint(2, VOCABULARY, (2, 80), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    variants = {}
    for kind, positions in ("dynamic", 32), ("longrope", 128):
        try:
            default = tiny_model(model_type, "eager")
            config = default.config.get_text_config(decoder=True)
            overrides = {
                "rope_parameters": _with_rope(config.rope_parameters, default, kind),
                "max_position_embeddings": positions,
            }
            if hasattr(config, "original_max_position_embeddings"):
                overrides["original_max_position_embeddings"] = 32
            model = tiny_model(model_type, "eager", **copy.deepcopy(overrides))
            with torch.no_grad():
                short, long = (model(input_ids=ids[:, :n], attention_mask=mask[:, :n]).logits for n in (24, 80))
        except Exception:  # Whatever the reason, the architecture has no such variant.
            continue
        if (short[0, :20] - long[0, :20]).abs().max() > 1e-4:
            variants[kind] = overrides
    return variants


def rope_variants(model_type: str) -> dict[str, dict]:
    """Find the overrides with which an architecture's rotary embedding depends on the longest position of a call."""
    return copy.deepcopy(_rope_variants(model_type))
