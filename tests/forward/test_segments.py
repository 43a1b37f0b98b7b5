"""segments.py: attention within segments equals attention with the mask that it avoids."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import zoo
from conftest import tiny_model
from peft import LoraConfig
from rollouts import assert_same_updates, build, random_rollouts, total, train, trl_and_ours, with_reference
from test_packing import IGNORED, fused, gradients
from transformers import AttentionInterface, AttentionMaskInterface, MistralConfig, MistralForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from tic_grpo_trl.forward import segments as module
from tic_grpo_trl.forward.layouts import model_inputs, packed_layouts, shares_exactly
from tic_grpo_trl.forward.packing import SharedPrompts, pack
from tic_grpo_trl.forward.segments import SegmentedAttention, Segments, attention_by_segment, register_flash


ROWS = [
    Segments([3, 1, 5], [None, None, None]),
    Segments([4, 2, 3], [None, 0, 0]),
    Segments([2, 3, 4, 1, 1], [None, 0, None, 2, 0]),  # the last two are not beside their prompts
]


def visible(segments: Segments, window: int | None = None) -> torch.Tensor:
    """Which key, in columns, each query sees."""
    number = torch.repeat_interleave(torch.arange(len(segments.lengths)), torch.tensor(segments.lengths))
    before = torch.tensor([-1 if prompt is None else prompt for prompt in segments.prompts])[number]
    within = torch.cat([torch.arange(length) for length in segments.lengths])
    position = within + torch.tensor([0 if p is None else segments.lengths[p] for p in segments.prompts])[number]
    seen = (number[:, None] == number) | (before[:, None] == number)
    distance = position[:, None] - position
    return seen & (distance >= 0) & (distance < (window or 100))


@pytest.mark.parametrize("queries", [2, 256])  # blocks of two, and all at once
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("segments", ROWS)
def test_attention_by_segment_is_attention_with_a_mask(segments, window, queries, monkeypatch):
    monkeypatch.setattr(module, "QUERIES", queries)
    generator = torch.Generator().manual_seed(0)
    layer = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
    given = [torch.randn(1, heads, 9 + 2 * (len(segments.lengths) == 5), 8, generator=generator) for heads in (4, 2, 2)]

    def outputs_and_gradients(attend):
        tensors = [tensor.clone().requires_grad_() for tensor in given]
        output = attend(*tensors)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        return [output.detach(), *(tensor.grad for tensor in tensors)]

    windows = set()
    attention = SegmentedAttention(segments, "cpu", windows)
    found = outputs_and_gradients(
        lambda *tensors: attention_by_segment(layer, *tensors, None, attention, sliding_window=window)[0]
    )
    mask = visible(segments, window)[None, None]
    expected = outputs_and_gradients(lambda *tensors: sdpa_attention_forward(layer, *tensors, mask)[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert windows == {window}


def test_calls_without_segments_stay_what_they_are():
    layer = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False)
    tensors = torch.randn(3, 1, 2, 5, 8)
    whole, _ = attention_by_segment(layer, *tensors, None)
    assert torch.equal(whole, sdpa_attention_forward(layer, *tensors, None)[0])
    attention = SegmentedAttention(Segments([5], [None]), "cpu")
    with pytest.raises(ValueError, match="make their own masks"):
        attention_by_segment(layer, *tensors, torch.ones(1, 1, 5, 5, dtype=torch.bool), attention)
    with pytest.raises(ValueError, match="bias by position"):
        attention_by_segment(layer, *tensors, None, attention, position_bias=torch.ones(1, 2, 5, 5))


class Saved:
    """Count the elements of what autograd saves, views of one storage once."""

    def __init__(self):
        self.sizes = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    @property
    def elements(self) -> int:
        return sum(self.sizes.values())


@pytest.mark.parametrize("prompt", [64, 2048])
def test_what_is_saved_for_the_backward_pass_grows_with_a_response_not_with_its_square(prompt):
    """Of responses that are longer than the prompt, and of shorter ones."""
    layer, saved = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=True), {}
    for length in (256, 512, 1024):
        segments = Segments([prompt, length, length], [None, 0, 0])
        attention = SegmentedAttention(segments, "cpu")
        width = sum(segments.lengths)
        tensors = [torch.randn(1, heads, width, 16, requires_grad=True) for heads in (4, 4, 4)]
        count = Saved()
        with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda tensor: tensor):
            output = attention_by_segment(layer, *tensors, None, attention)[0]
        saved[length] = count.elements
        del output
    assert saved[1024] - saved[512] < 2.5 * (saved[512] - saved[256])


# Whole rows


def groups(seed: int, prompts: int = 3, responses: int = 4, vocabulary: int = 6):
    """Random ids and their mask, (B, 6 + 9); some prompts of one token, and a response without any token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    lengths = draw(1, 7, prompts, 1).repeat_interleave(responses, 0)
    ids = torch.cat([draw(1, vocabulary, prompts, 6).repeat_interleave(responses, 0), draw(1, vocabulary, 12, 9)], 1)
    mask = torch.cat([torch.arange(6, 0, -1) <= lengths, torch.arange(9) < draw(1, 10, 12, 1)], 1).long()
    mask[seed % 12, 6:] = 0
    order = torch.randperm(12, generator=generator)
    return ids[order], mask[order]


def unique_tokens(ids, mask) -> int:
    """The prompts without their last token, once each, and the rest of every response."""
    prompts, count = [], 0
    for row, real in zip(ids.tolist(), mask.bool(), strict=True):
        prompt = [token for token, keep in zip(row[:6], real[:6], strict=True) if keep]
        prompts.append(tuple(prompt))
        count += int(real.sum())
    for prompt in set(prompts):
        count -= (prompts.count(prompt) - 1) * max(len(prompt) - 1, 0)
    return count


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("multiple_of", [None, 8])
def test_every_value_comes_back_to_its_token(seed, multiple_of):
    ids, mask = groups(seed, vocabulary=50)
    packed = pack(ids, mask, 9, 99, "segments", multiple_of=multiple_of, sharing=SharedPrompts.of(ids, mask, 9))
    assert packed.tokens == packed.attention_mask.sum() == unique_tokens(ids, mask)
    assert packed.tokens + packed.shared_tokens == mask.sum()
    assert packed.segments.shares
    assert sum(packed.segments.lengths) == packed.input_ids.size(1)
    assert packed.input_ids.size(1) % (multiple_of or 1) == 0

    # what every slot sees, its own token last, is the beginning of the response that it belongs to
    position = mask.cumsum(1) - 1
    sees = visible(packed.segments)
    slots = packed.scored - 1  # the token before each scored one
    seen = [packed.input_ids[0, sees[slot]].tolist() for slot in slots]
    rows = packed.columns // 9
    for context, row, column in zip(seen, rows.tolist(), (packed.columns % 9).tolist(), strict=True):
        assert context == ids[row, : 6 + column][mask[row, : 6 + column].bool()].tolist()

    said = (1000 * packed.labels + packed.position_ids).double()[:, 1:]
    said[packed.labels[:, 1:] == IGNORED] = torch.nan
    scored = mask.bool() & (position > 0)
    expected = torch.where(scored, 1000 * ids + position, 0)[:, -9:].double()
    assert torch.equal(packed.unpack(said), expected)


def log_probs_of(model, ids, mask, layout, shares):
    packed = pack(ids, mask, 9, 0, layout, sharing=SharedPrompts.of(ids, mask, 9) if shares else None)
    assert packed.segments.shares == shares
    inputs = model_inputs(packed, layout)
    return packed.unpack(fused(model)(input_ids=packed.input_ids, labels=packed.labels, **inputs))


def mistral():
    """With a window of three tokens in every layer, which most contexts are longer than."""
    sizes = {"vocab_size": 6, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "sliding_window": 3}
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**sizes, **heads, attn_implementation="sdpa"))


@pytest.mark.parametrize("build", [tiny_model, mistral])
@pytest.mark.parametrize("seed", range(3))
def test_a_shared_pass_equals_one_of_whole_responses(build, seed):
    ids, mask = groups(seed)
    ids, mask = ids[mask.any(1)], mask[mask.any(1)]
    model = build()
    packed_layouts(model.config)  # which registers the attention
    found = log_probs_of(model, ids, mask, "segments", shares=True)
    of_shared = gradients(model, found)
    model = build()
    sorted_rows = pack(ids, mask, 9, 0, "sorted")
    output = fused(model)(
        input_ids=sorted_rows.input_ids, labels=sorted_rows.labels, attention_mask=sorted_rows.attention_mask
    )
    expected = sorted_rows.unpack(output)
    of_whole = gradients(model, expected)
    assert expected.min() < -2.5  # far from uniform, so that a wrong neighbour shows
    assert (found - expected).abs().max() < 1e-5
    assert (of_shared - of_whole).norm() < 1e-5 * of_whole.norm()


# FlashAttention's variable-length kernels need a GPU. What they are documented to compute, in plain tensor operations:


def variable_length_attention(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """Causal attention of each sequence's queries to its keys, aligned at the bottom right, of flattened sequences.

    They begin where the arguments say, or by transformers' own reading where positions begin again."""
    if attention_mask is not None or query.size(0) > 1:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    begins_q, begins_k, longest_q, longest_k = (kwargs.pop(name, None) for name in names)
    if begins_q is None:
        (begins_q, begins_k), (longest_q, longest_k) = prepare_fa_kwargs_from_position_ids(position_ids)
    assert begins_q.dtype == begins_k.dtype == torch.int32
    ends = list(zip(begins_q.tolist(), begins_k.tolist(), strict=True))
    outputs = []
    for (first, first_key), (end, end_key) in pairwise(ends):
        queries, keys = end - first, end_key - first_key
        assert queries <= longest_q
        assert keys <= longest_k
        mask = torch.ones(queries, keys).tril(keys - queries).bool()[None, None]
        parts = query[:, :, first:end], key[:, :, first_key:end_key], value[:, :, first_key:end_key]
        outputs.append(sdpa_attention_forward(module, *parts, mask, **kwargs)[0])
    assert ends[-1] == (query.size(2), key.size(2))
    return torch.cat(outputs, dim=1), None


@pytest.fixture
def flash_in_words():
    AttentionInterface.register("flash_in_words", variable_length_attention)
    AttentionMaskInterface.register("flash_in_words", flash_attention_mask)
    model = tiny_model()
    model.config._attn_implementation = "flash_in_words"
    return model


def test_flash_attention_gets_copied_keys_and_where_they_begin(flash_in_words):
    ids, mask = groups(seed=1)
    ids, mask = ids[mask.any(1)], mask[mask.any(1)]
    model = flash_in_words
    assert packed_layouts(model.config) == ["varlen"]
    for _ in range(2):  # a second trainer in the same process changes nothing
        register_flash("flash_in_words")
    found = log_probs_of(model, ids, mask, "varlen", shares=True)
    of_copies = gradients(model, found)
    model = tiny_model()
    packed_layouts(model.config)
    expected = log_probs_of(model, ids, mask, "segments", shares=True)
    of_segments = gradients(model, expected)
    assert (found - expected).abs().max() < 1e-5
    assert (of_copies - of_segments).norm() < 1e-5 * of_segments.norm()


# The test at the start


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def scorer(request):
    """Scores padded responses, in shared rows that `broken` may change."""
    model = tiny_model().to(request.param).eval()
    packed_layouts(model.config)
    log_probs = fused(model)

    def score(ids, mask, width, shares, broken=None):
        sharing = SharedPrompts.of(ids, mask, width) if shares else None
        packed = pack(ids, mask, width, 0, "segments", sharing=sharing)
        inputs = model_inputs(packed, "segments")
        if shares and broken:
            inputs["segments"] = SegmentedAttention(broken(packed.segments), "cpu")
        return packed.unpack(log_probs(input_ids=packed.input_ids, labels=packed.labels, **inputs))

    return score, torch.finfo(request.param).eps


def sees_siblings(segments: Segments) -> Segments:
    return Segments([sum(segments.lengths)], [None])


def sees_no_prompt(segments: Segments) -> Segments:
    return Segments(segments.lengths, [None] * len(segments.lengths))


def test_the_test_at_the_start_allows_for_rounding(scorer):
    score, precision = scorer
    assert shares_exactly(score, "cpu", precision)


@pytest.mark.parametrize("broken", [sees_siblings, sees_no_prompt])
def test_the_test_at_the_start_finds_what_a_response_must_not_see_and_must(scorer, broken):
    score, precision = scorer
    assert not shares_exactly(lambda *args, **kwargs: score(*args, **kwargs, broken=broken), "cpu", precision)


@pytest.mark.parametrize("error", [TypeError, ValueError, NotImplementedError])
def test_a_model_that_refuses_the_arguments_does_not_share(error):
    def refuse(*args, **kwargs):
        raise error("unexpected")

    assert not shares_exactly(refuse, "cpu", 1e-7)


# Trainers


def test_a_trainer_with_flash_attention_shares(tmp_path, flash_in_words):
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    other = train(tmp_path / "sdpa", rollouts={"prompt": 9}, **settings)
    ours = train(tmp_path / "flash", rollouts={"prompt": 9}, model=flash_in_words, leader=other, **settings)
    assert (ours.trainer.packed_forward.layout, ours.trainer.packed_forward.shares_prompts) == ("varlen", True)
    assert_same_updates(ours, other)
    shares = [total(run, "update/shared_token_share") for run in (ours, other)]
    assert shares[0] == pytest.approx(shares[1])
    assert shares[0] > 0


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_shared_prompts_train_as_trl_does(tmp_path, lora, reentrant):
    """With a reference, tool masks, and all kinds of gradient checkpointing, in updates of several passes."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    if lora:
        settings |= {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")}
    if reentrant is not None:
        kwargs = {"use_reentrant": reentrant}
        settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    rollouts = {"prompt": 9, "tools": True, "zero_advantage": 0.2}
    kl, prepare = ({"beta": 0.1}, None) if lora else ({"beta": 0.0}, with_reference)
    reference, ours = trl_and_ours(tmp_path, kl, rollouts=rollouts, prepare=prepare, **settings)
    assert_same_updates(ours, reference)
    assert min(log["update/shared_token_share"] for log in ours.logs) > 0.1


def test_share_prompts_can_be_switched_off(tmp_path):
    on = train(tmp_path / "on", rollouts={"prompt": 9})
    off = train(tmp_path / "off", rollouts={"prompt": 9}, share_prompts=False, leader=on)
    assert_same_updates(off, on)
    assert total(off, "update/shared_token_share") == 0 < total(on, "update/shared_token_share")


def test_evaluation_with_a_router_s_loss_plans_for_the_rows_that_it_computes(tmp_path):
    """The loss needs a row for each response, so that a pass holds no more of them than TRL's."""
    model = zoo.tiny_model("qwen3_moe")
    settings = {"router_aux_loss_coef": 0.1, "per_device_train_batch_size": 2, "steps_per_generation": 8}
    trainer = build(tmp_path, random_rollouts(), model=model, **settings)
    assert trainer.packed_forward.choose_layout() == "segments"
    trainer.model.eval()
    ids, mask = groups(seed=2)
    output = trainer.packed_forward(trainer.model, ids, mask, 9, compute_aux_loss=True)
    assert output.passes == 6  # of two responses each
    assert output.aux_loss > 0
