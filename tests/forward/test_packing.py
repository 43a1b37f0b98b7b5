"""packing.py: every real token in one place, every value back where it belongs, responses of a row blind to others."""

import pytest
import torch
import transformers
import zoo
from conftest import tiny_model
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
)
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids
from trl.trainer.utils import add_fused_lm_head

from tic_grpo_trl.forward.layouts import (
    attention_arguments,
    ignores_left_padding,
    keeps_apart,
    model_inputs,
    packed_layouts,
    why_trl_layout,
)
from tic_grpo_trl.forward.packing import IGNORED, first_fit, lay_out, pack, used_columns


def random_lengths(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 20, (), generator=generator))
    return torch.randint(0, 30, (count,), generator=generator).tolist()


# Rows


@pytest.mark.parametrize(
    ("lengths", "width", "rows"),
    [
        ([3, 5, 2, 4], 7, [[1, 2], [3, 0]]),  # 5+2, 4+3
        ([4, 4, 4], 4, [[0], [1], [2]]),  # no two fit, ties in their order
        ([1, 9, 1, 1], 9, [[1], [0, 2, 3]]),
        ([2, 0, 3], 3, [[2, 1], [0]]),  # an empty item goes where there is no room, too
        ([6, 5, 4, 3, 2], 10, [[0, 2], [1, 3, 4]]),  # two full rows
    ],
)
def test_first_fit_by_hand(lengths, width, rows):
    assert first_fit(lengths, width) == rows


@pytest.mark.parametrize("seed", range(20))
def test_first_fit_holds_every_item_once_in_rows_that_cannot_be_merged(seed):
    lengths = random_lengths(seed)
    width = max(lengths) + seed % 4
    rows = first_fit(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[i] for i in row) for row in rows)
    assert sums[-1] <= width
    assert len(sums) == 1 or sums[0] + sums[1] > width  # else the later row would have gone into the earlier


def cost(rows: list[list[int]], lengths: list[int], linear_width: int) -> int:
    width = max(sum(lengths[i] for i in row) for row in rows)
    return len(rows) * width * (width + linear_width)


def test_a_wider_row_wins_where_attention_is_cheap():
    lengths = [5, 3, 3, 3]
    # At width 5 every item has its own row: 20 slots for 14 tokens. Two rows of 8 waste 2 slots.
    assert lay_out(lengths, linear_width=1000) == [[0, 1], [2, 3]]
    # 2·8·8 = 128 slots of attention are more than 4·5·5 = 100
    assert lay_out(lengths, linear_width=0) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("linear_width", [0, 50, 5000])
def test_lay_out_never_costs_more_than_rows_of_the_longest_item(seed, linear_width):
    lengths = [max(length, 1) for length in random_lengths(seed)]
    rows = lay_out(lengths, linear_width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert cost(rows, lengths, linear_width) <= cost(first_fit(lengths, max(lengths)), lengths, linear_width)
    assert max(sum(lengths[i] for i in row) for row in rows) <= 2 * max(lengths)  # the mask grows with its square


# Packing


def padded(seed: int, size: int = 7, prompt: int = 5, completion: int = 9, vocabulary: int = 50):
    """Random ids of (B, P+T), prompts padded on the left, completions on the right, one row without any token."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, prompt + 1, (size, 1), generator=generator)  # an empty prompt happens, too
    completions = torch.randint(1, completion + 1, (size, 1), generator=generator)
    prompts[seed % size] = completions[seed % size] = 0
    prompt_mask = torch.arange(prompt, 0, -1) <= prompts
    completion_mask = torch.arange(1, completion + 1) <= completions
    ids = torch.randint(1, vocabulary, (size, prompt + completion), generator=generator)
    return ids, torch.cat([prompt_mask, completion_mask], dim=1).long()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("multiple_of", [None, 8])
@pytest.mark.parametrize("layout", ["segments", "rows", "sorted"])
@pytest.mark.parametrize("linear_width", [0, 1000])
def test_every_value_comes_back_to_its_token(seed, layout, multiple_of, linear_width):
    ids, mask = padded(seed)
    packed = pack(ids, mask, 9, 99, layout, linear_width=linear_width, multiple_of=multiple_of)
    assert packed.tokens == mask.sum() == packed.attention_mask.sum()
    assert packed.input_ids.shape == packed.position_ids.shape == packed.labels.shape == packed.attention_mask.shape
    lengths = [length for length in mask.sum(1).tolist() if length]
    if layout == "segments":
        assert len(packed.input_ids) == 1
        assert packed.segments.lengths[: len(lengths)] == lengths
        assert sum(packed.segments.lengths) == packed.input_ids.size(1)
        assert not packed.segments.shares
    if layout == "sorted":
        # each from its first column on, so that nothing stands before it
        assert packed.attention_mask.tolist() == [[1] * n + [0] * (packed.input_ids.size(1) - n) for n in lengths]
    assert packed.input_ids.size(1) % (multiple_of or 1) == 0

    # A model that says of every label which one it is and at which position, and noise where nothing is scored
    said = (1000 * packed.labels + packed.position_ids).double()[:, 1:]
    said[packed.labels[:, 1:] == IGNORED] = torch.nan
    position = mask.cumsum(1) - 1
    scored = mask.bool() & (position > 0)  # nothing comes before a sequence's first token that could predict it
    expected = torch.where(scored, 1000 * ids + position, 0)[:, -9:].double()
    assert torch.equal(packed.unpack(said), expected)


@pytest.mark.parametrize("multiple_of", [None, 8])
@pytest.mark.parametrize("layout", ["segments", "rows", "sorted"])
def test_the_rows_hold_every_sequence_whole_and_nothing_else(layout, multiple_of):
    ids, mask = padded(seed=3)
    packed = pack(ids, mask, 9, 99, layout, linear_width=50, multiple_of=multiple_of)
    found = []
    for row_ids, row_positions in zip(packed.input_ids.tolist(), packed.position_ids.tolist(), strict=True):
        for token, position in zip(row_ids, row_positions, strict=True):
            if position == 0:
                found.append([])
            assert position == len(found[-1])  # positions count from 0 in every sequence
            found[-1].append(token)
    expected = [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True) if real.any()]
    assert sorted(sequence for sequence in found if sequence != [99]) == sorted(expected)


def test_values_carry_their_gradient_back():
    ids, mask = padded(seed=1)
    packed = pack(ids, mask, 9, 99, "rows", linear_width=50)
    said = torch.zeros(packed.labels[:, 1:].shape, requires_grad=True)
    packed.unpack(said).sum().backward()
    assert torch.equal(said.grad, (packed.labels[:, 1:] != IGNORED).float())  # each scored slot once


@pytest.mark.parametrize("layout", ["segments", "rows", "sorted"])
def test_a_batch_without_tokens_is_two_empty_slots(layout):
    ids, mask = padded(seed=0)
    packed = pack(ids, mask * 0, 9, 99, layout, linear_width=50)
    assert packed.tokens == 0
    assert packed.input_ids.size(1) == 2
    assert (packed.input_ids == 99).all()
    assert (packed.labels == IGNORED).all()
    values = packed.unpack(torch.full(packed.labels[:, 1:].shape, torch.nan))
    assert torch.equal(values, torch.zeros(ids.size(0), 9))


# FlashAttention's variable-length kernels (transformers' own reading of the positions, since none runs here)


@pytest.mark.parametrize("multiple_of", [None, 16])
def test_flash_attention_reads_the_segments_of_a_single_row(multiple_of):
    ids, mask = padded(seed=5)
    packed = pack(ids, mask, 9, 99, "varlen", multiple_of=multiple_of)
    lengths = torch.tensor([length for length in mask.sum(1).tolist() if length])
    empty = packed.input_ids.size(1) - int(lengths.sum())  # each a sequence of its own
    assert empty == -int(lengths.sum()) % (multiple_of or 1)
    ends = torch.cat([torch.zeros(1), torch.cat([lengths, torch.ones(empty)]).cumsum(0)]).int()
    (queries, keys), (longest_query, longest_key) = prepare_fa_kwargs_from_position_ids(packed.position_ids)
    assert torch.equal(queries, ends)
    assert torch.equal(keys, ends)
    assert longest_query == longest_key == lengths.max()
    assert _is_packed_sequence(packed.position_ids, batch_size=1)


# Forward passes


def fused(model):
    """With TRL's head, which the trainer calls."""
    add_fused_lm_head(model)
    return lambda **inputs: model(**inputs, fused_lm_head=True).log_probs


def packed_log_probs(log_probs, ids, mask, layout, multiple_of=None):
    """Of the last 9 columns, from one pass."""
    packed = pack(ids, mask, 9, 0, layout, linear_width=96, multiple_of=multiple_of)
    assert (len(packed.input_ids) < len(ids)) == (layout != "sorted")
    return packed.unpack(log_probs(input_ids=packed.input_ids, labels=packed.labels, **model_inputs(packed, layout)))


def padded_log_probs(log_probs, ids, mask):
    """As TRL computes them, without those of a sequence's first token."""
    result = log_probs(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, IGNORED))[:, -9:]
    return result * ((mask.cumsum(1) > 1) * mask)[:, -9:]


def gradients(model, log_probs):
    """Of a weighted sum."""
    model.zero_grad()
    (log_probs * torch.linspace(-1, 1, 9)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def without_empty_rows(seed):
    """Softmax over nothing is the padded pass's problem."""
    ids, mask = padded(seed, vocabulary=6)
    return ids[mask.any(1)], mask[mask.any(1)]


@pytest.mark.parametrize("multiple_of", [None, 16])
@pytest.mark.parametrize(
    ("attention", "layout"),
    [("eager", "rows"), ("sdpa", "rows"), ("sdpa", "segments"), ("sdpa", "sorted"), ("eager", "sorted")],
)
def test_a_packed_pass_equals_a_padded_one(attention, layout, multiple_of):
    ids, mask = without_empty_rows(seed=2)
    model = tiny_model(attn_implementation=attention)
    log_probs = fused(model)
    if layout not in (*packed_layouts(model.config), "sorted"):
        pytest.skip("only scaled-dot-product attention is called by segments")
    expected = padded_log_probs(log_probs, ids, mask)
    expected_gradients = gradients(model, expected)
    actual = packed_log_probs(log_probs, ids, mask, layout, multiple_of=multiple_of)
    actual_gradients = gradients(model, actual)
    assert expected.min() < -3  # far from uniform, so that a wrong neighbour shows
    assert (actual - expected).abs().max() < 1e-5
    assert (actual_gradients - expected_gradients).norm() < 1e-5 * expected_gradients.norm()


@pytest.mark.parametrize("layout", ["rows", "segments", "sorted"])
def test_absolute_positions_count_from_each_response(layout):
    """What a response has in a row it has alone, without the padding that TRL's default positions would count."""
    torch.manual_seed(0)
    model = gpt2().eval()
    assert layout in (*packed_layouts(model.config), "sorted")
    log_probs = fused(model)
    ids, mask = without_empty_rows(seed=2)
    together = packed_log_probs(log_probs, ids, mask, layout)
    for row in range(len(ids)):
        own = ids[row, mask[row].bool()].unsqueeze(0)
        scored = (mask[row, -9:] > 0) & (mask[row].cumsum(0)[-9:] > 1)
        if count := int(scored.sum()):
            alone = log_probs(input_ids=own, labels=own)[0, -count:]
            assert (together[row, scored] - alone).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*compile")
def test_a_packed_pass_of_flex_attention_equals_a_padded_one():
    """Uncompiled, which takes seconds less; it has no backward pass on a CPU."""
    ids, mask = without_empty_rows(seed=2)
    model = tiny_model(attn_implementation="flex_attention")
    assert packed_layouts(model.config) == ["rows"]
    with torch.no_grad():
        expected = padded_log_probs(fused(tiny_model()), ids, mask)
        with torch.compiler.set_stance("force_eager"):
            actual = packed_log_probs(fused(model), ids, mask, "rows")
    assert (actual - expected).abs().max() < 1e-5


def with_attention(config, implementation):
    config._attn_implementation = implementation
    return config


@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        (with_attention(LlamaConfig(), "sdpa"), ["segments", "rows"]),
        (with_attention(LlamaConfig(), "eager"), ["rows"]),
        (with_attention(LlamaConfig(), "flash_attention_2"), ["varlen"]),
        (with_attention(LlamaConfig(), "kernels-community/flash-attn2"), ["varlen"]),
        (with_attention(MistralConfig(sliding_window=4), "sdpa"), ["segments", "rows"]),
        (with_attention(Llama4TextConfig(), "sdpa"), ["rows"]),  # its chunks are masks
    ],
)
def test_packed_layouts(config, layouts):
    assert packed_layouts(config) == layouts


@pytest.mark.skipif("deepseek_v32" not in CONFIG_MAPPING, reason="this transformers has no sparse attention")
def test_sparse_attention_is_a_mask_that_each_layer_makes():
    assert packed_layouts(with_attention(AutoConfig.for_model("deepseek_v32"), "sdpa")) == ["rows"]


SMALL = {
    "vocab_size": 6,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TOKENS = {name: SMALL[name] for name in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def gpt2():
    """Absolute positions: what counts is that they start at 0 in each response."""
    return GPT2LMHeadModel(GPT2Config(**TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def bloom():
    """ALiBi: distances are taken over the row."""
    return BloomForCausalLM(BloomConfig(**TOKENS, hidden_size=16, n_layer=2, n_head=2))


def falcon():
    """ALiBi again, with rows that are cut by the attention mask alone."""
    return FalconForCausalLM(
        FalconConfig(**TOKENS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=True)
    )


def lfm2():
    """A short convolution before attention reaches over the border between two responses."""
    return Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))


def mamba():
    """A recurrent state does."""
    return MambaForCausalLM(MambaConfig(**TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4))


def is_kept_apart(model, layout):
    log_probs = fused(model)

    def call(input_ids, segments=None, **positions):
        arguments = attention_arguments(layout, segments, input_ids.device)
        return log_probs(input_ids=input_ids, labels=input_ids, **positions, **arguments)

    return keeps_apart(call, "cpu", torch.finfo(model.dtype).eps)


MASK_BY_POSITION = Version(transformers.__version__) >= Version("5.24")  # in Falcon


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        (tiny_model, ["segments", "rows"]),
        (llama, ["segments", "rows"]),
        (gpt2, ["segments", "rows"]),
        (bloom, []),
        (falcon, ["rows"] if MASK_BY_POSITION else []),
        (lfm2, []),
        (mamba, []),
    ],
)
def test_which_models_keep_responses_of_a_row_apart(model, layouts):
    torch.manual_seed(0)
    model = model().eval()
    assert [layout for layout in packed_layouts(model.config) if is_kept_apart(model, layout)] == layouts


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "glm4_moe", "hunyuan_v1_moe"])
def test_the_layout_does_not_depend_on_the_random_weights(model_type):
    """Tokens that are shared out anew among experts move the last bit of log-probabilities of any size."""
    for seed in range(12):
        model = zoo.tiny_model(model_type, seed=seed)
        assert is_kept_apart(model, packed_layouts(model.config)[0]), seed


def test_the_layout_does_not_depend_on_depth():
    for seed in range(4):
        model = zoo.tiny_model("mixtral", seed=seed, num_hidden_layers=32)
        assert is_kept_apart(model, packed_layouts(model.config)[0]), seed


@pytest.mark.parametrize("model_type", ["qwen3_next", "falcon_h1", "lfm2", "minimax", "bamba", "nemotron_h", "mamba"])
def test_a_leak_shows_in_a_low_precision(model_type):
    """A limit that allows for bfloat16's rounding alone would let it pass."""
    for seed in range(6):
        model = zoo.tiny_model(model_type, "eager", seed=seed).to(torch.bfloat16)
        assert not any(is_kept_apart(model, layout) for layout in packed_layouts(model.config)), seed


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "mixtral", "gpt2"])
def test_a_low_precision_does_not_look_like_a_leak(model_type):
    for seed in range(6):
        model = zoo.tiny_model(model_type, seed=seed).to(torch.bfloat16)
        assert is_kept_apart(model, packed_layouts(model.config)[0]), seed


@pytest.mark.parametrize(
    ("model_type", "ignores"),
    [
        ("llama", True),
        ("bloom", True),  # ALiBi counts from the attention mask
        ("mamba", True),  # masks what enters its state
        ("openai-gpt", True),  # absolute positions, which generation passes
        ("rwkv", False),  # takes the padding into its state
        ("bart", False),  # has absolute positions of its own
    ],
)
def test_which_models_ignore_padding_before_a_prompt(model_type, ignores):
    model = zoo.tiny_model(model_type, "eager")
    log_probs = fused(model)
    assert ignores_left_padding(lambda **row: log_probs(labels=row["input_ids"], **row), "cpu", 1e-7) is ignores


ROPE = {"rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(), None),
        (LlamaConfig(rope_parameters=ROPE | {"rope_type": "linear"}), None),
        (LlamaConfig(rope_parameters=ROPE | {"rope_type": "dynamic"}), "rope_type='dynamic'"),
        (LlamaConfig(rope_scaling={"type": "dynamic", "factor": 4.0}), "rope_type='dynamic'"),
    ],
)
def test_what_only_trl_s_layout_gives(config, reason):
    found = why_trl_layout(config)
    assert reason in found if reason else found is None


@pytest.mark.parametrize(
    ("model_type", "rope_type", "reason"),
    [
        ("phi3", "longrope", "rope_type='longrope'"),
        ("gemma3_text", "dynamic", "rope_type='dynamic'"),  # one of the layer types
        ("qwen3_5", "dynamic", "rope_type='dynamic'"),  # a model with images
        ("deepseek_v4", None, "'compressed_sparse_attention' divide a row into blocks"),
        ("minimax_m3_vl_text", None, "'minimax_m3_sparse' divide"),
    ],
)
def test_architectures_for_which_only_trl_s_layout_will_do(model_type, rope_type, reason):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such architecture")
    overrides = zoo.rope_variants(model_type)[rope_type] if rope_type else {}
    assert reason in why_trl_layout(zoo.tiny_config(model_type, **overrides))


def test_positions_that_a_model_counts_otherwise_are_not_passed():
    """RoBERTa's start after the padding's id: packed with positions from 0 it would be another model."""
    model = zoo.tiny_model("roberta")
    assert not any(is_kept_apart(model, layout) for layout in packed_layouts(model.config))


@pytest.mark.parametrize("layout", ["rows", "segments"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_test_allows_for_the_rounding_of_the_model(dtype, layout):
    assert is_kept_apart(tiny_model().to(dtype), layout)


def test_a_wrapper_that_drops_arguments_or_refuses_them_is_found():
    log_probs = fused(tiny_model())
    # the causal mask then runs over the whole row
    assert not keeps_apart(lambda input_ids, **dropped: log_probs(input_ids=input_ids, labels=input_ids), "cpu", 1e-7)
    for error in (TypeError, ValueError, NotImplementedError):

        def refuses(error=error, **inputs):
            raise error("positions")

        assert not keeps_apart(refuses, "cpu", 1e-7)


@pytest.mark.parametrize(
    ("leak", "rounding", "apart"), [(0, 0, True), (0, 1e-5, True), (1e-5, 0, False), (0, 1e-2, False)]
)
def test_a_faint_trace_of_the_neighbour_is_told_from_the_rounding_of_another_shape(leak, rounding, apart):
    def log_probs(input_ids, **positions):
        first, width = input_ids[0, 0], input_ids.size(1)  # the neighbour's, where there is one
        return -input_ids[:, 1:].float() - leak * first - rounding * width

    assert keeps_apart(log_probs, "cpu", torch.finfo(torch.float32).eps) is apart


# Trimming


@pytest.mark.parametrize(
    ("prompt_mask", "completion_mask", "columns"),
    [
        ([[0, 0, 1, 1], [0, 0, 0, 1]], [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], (2, 3)),
        ([[1, 1, 1, 1], [0, 0, 0, 1]], [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], (4, 5)),
        # TRL takes one column for one value per response
        ([[0, 0, 1, 1]], [[1, 0, 0]], (2, 2)),
        ([[0, 0, 0, 0]], [[0, 0, 0]], (1, 2)),
        ([[0, 1]], [[1]], (1, 1)),
        # a response whose tokens are all masked needs none, whatever its prompt
        ([[0, 1, 1], [0, 0, 1]], [[0, 0, 0], [1, 1, 0]], (2, 2)),
    ],
)
def test_used_columns_by_hand(prompt_mask, completion_mask, columns):
    assert used_columns(torch.tensor(prompt_mask), torch.tensor(completion_mask)) == columns
