"""Compare the estimates with what real passes of real models allocate, and with the bytes in accelerate_configs/."""

import contextlib
import dataclasses

import pytest
import torch
import trl.trainer.utils
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import add_fused_lm_head

from tic_grpo_trl.dry_run import memory
from tic_grpo_trl.dry_run.memory import ModelSize, activation_bytes, model_size, state_bytes
from tic_grpo_trl.dry_run.topology import Topology


TOKENS = 512
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)


def small_config(kind=Qwen3Config, **changes):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    return kind(**sizes | heads | changes)


def peak_of(step):
    """The most bytes allocated at once during a call, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def pass_of(config, autocast, adapter, checkpointing):
    """A function that makes a forward and a backward pass over `TOKENS` tokens."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    add_fused_lm_head(model)
    inner = model
    if adapter:
        model = get_peft_model(model, adapter)
        model.enable_input_require_grads()
    if checkpointing:
        inner.gradient_checkpointing_enable()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    ids = torch.randint(0, 64, (1, TOKENS))

    def step():
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            log_probs = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        log_probs.sum().backward()

    step()  # allocates what stays allocated
    return step


@pytest.mark.parametrize("kind", [Qwen3Config, LlamaConfig])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("autocast", "adapter"), [(False, None), (True, None), (False, LORA)])
def test_activations_match_a_real_pass(monkeypatch, kind, checkpointing, autocast, adapter):
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)  # the layers' peak, not the head's
    monkeypatch.setattr(memory, "TILE_BYTES_PER_TOKEN", 4 * 64)
    config = small_config(kind)
    size = model_size(config, torch.float32, autocast, adapter)
    peak = peak_of(pass_of(config, autocast, adapter, checkpointing))
    assert peak == pytest.approx(activation_bytes(size, TOKENS, checkpointing, autocast), rel=0.12)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_tile_of_the_head_matches_a_real_pass(checkpointing):
    config = small_config(num_hidden_layers=1)
    estimated = activation_bytes(model_size(config, torch.float32), TOKENS, checkpointing)
    assert estimated > TOKENS * 4 * 32768
    assert peak_of(pass_of(config, False, None, checkpointing)) == pytest.approx(estimated, rel=0.05)


def test_tile_is_trls():
    assert memory.TILE_TOKENS == TOKEN_CHUNK_SIZE
    assert memory.TILE_BYTES_PER_TOKEN == 4 * trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


def test_sizes_of_a_small_model_counted_by_hand():
    size = model_size(small_config(num_hidden_layers=3, tie_word_embeddings=False), torch.float32)
    # embeddings and head; a layer: q and o 2 x 128 x 128, k and v 2 x 128 x 64, mlp 3 x 128 x 512, four norms
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512 + 2 * 128 + 2 * 64
    assert (size.trained, size.frozen) == (2 * 64 * 128 + 3 * layer + 128, 0)
    assert (size.layers, size.cache, size.stream) == (3, 2 * 3 * 64, 4 * 128)
    assert size.widest == 4 * 512  # of the feed-forward layer


def test_adapters_are_counted():
    size = model_size(small_config(num_hidden_layers=1), torch.float32, peft_config=LORA)
    # rank 4: q 128+128, k and v 128+64 each, o 128+128, gate and up 128+512 each, down 512+128
    assert size.trained == 4 * (2 * 256 + 2 * 192 + 3 * 640)
    assert size.frozen == model_size(small_config(num_hidden_layers=1), torch.float32).trained


SIZE = ModelSize(trained=10**9, frozen=0, layers=1, cache=1, stream=1, layer=1, rest=1, widest=1)


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        (Topology(), 16),
        (Topology(processes=8), 20),
        (Topology(processes=8, zero_stage=2), 2 + 14 / 8),
        (Topology(processes=8, zero_stage=3), 16 / 8),
        (Topology(processes=8, fsdp=True), 16 / 8),
        (Topology(processes=4, zero_stage=3, offload=True), 20 / 4),
    ],
)
def test_states_are_the_bytes_of_the_configurations(topology, expected):
    """Bytes per parameter as documented in docs/scaling.md and accelerate_configs/."""
    parts = state_bytes(SIZE, topology, weight_bytes=4, bf16=True, reference=False)
    assert sum(parts.values()) == pytest.approx(expected * 10**9)


def test_frozen_weights_have_no_states():
    size = dataclasses.replace(SIZE, trained=10**6, frozen=10**9)
    one = state_bytes(size, Topology(), weight_bytes=2, bf16=True, reference=False)
    assert one == {"weights": 2 * 10**9 + 4 * 10**6, "gradients": 4 * 10**6, "AdamW": 8 * 10**6}
    split = state_bytes(size, Topology(processes=4, zero_stage=3), weight_bytes=2, bf16=True, reference=False)
    assert split["weights"] == 2 * (10**9 + 10**6) / 4


def test_reference_policy_is_a_model_more():
    parts = state_bytes(SIZE, Topology(), weight_bytes=4, bf16=False, reference=True)
    assert parts["reference policy"] == 4 * 10**9
