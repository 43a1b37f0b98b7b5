r"""The starter: its task, its reward and the packaged model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tic_grpo_trl.starter import STARTER_MODEL, TASKS, exact_match_reward, make_dataset
from tic_grpo_trl.starter.task import split_of


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STARTER_MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(STARTER_MODEL, local_files_only=True).eval()


def texts(dataset):
    return [prompt[0]["content"] for prompt in dataset["prompt"]]


# The task


def test_splits_are_disjoint_and_problems_distinct():
    seen = {"train": set(), "test": set()}
    for split in seen:
        for size, seed in ((1, 0), (400, 0), (400, 1), (5000, 2)):
            rows = texts(make_dataset(split, size, seed))
            assert len(rows) == len(set(rows)) == size
            seen[split] |= set(rows)
    assert not seen["train"] & seen["test"]


def test_large_train_set():
    rows = texts(make_dataset("train", 20_000))
    assert len(set(rows)) == 20_000
    counts = [sum(row.count("+") == n - 1 for row in rows) for n in (3, 4, 5, 6)]
    # three terms stop at half of 900 problems, four at half of 9,000; five and six share the rest equally
    assert counts == [450, 4500, 7525, 7525]


def test_held_out_share_is_one_in_ten():
    four_terms = [(a, b, c, d) for a in range(10) for b in range(10) for c in range(10) for d in range(10)]
    assert 900 < sum(split_of(terms) == "test" for terms in four_terms) < 1100


def test_rows_are_right_and_seeded():
    rows = make_dataset("train", 200, seed=3)
    assert rows.column_names == ["prompt", "solution"]
    for row in rows:
        (message,) = row["prompt"]
        assert message["role"] == "user"
        expression, end = message["content"][:-2], message["content"][-2:]
        assert end == "=?"
        digits = expression.split("+")
        assert 3 <= len(digits) <= 6
        assert all(len(digit) == 1 for digit in digits)
        assert row["solution"] == str(sum(map(int, digits)))
    assert rows.to_list() == make_dataset("train", 200, seed=3).to_list()
    assert rows.to_list() != make_dataset("train", 200, seed=4).to_list()


def test_number_of_terms_is_uniform():
    rows = texts(make_dataset("train", 400))
    assert [sum(row.count("+") == n - 1 for row in rows) for n in (3, 4, 5, 6)] == [100] * 4


@pytest.mark.parametrize(
    ("split", "size", "says"),
    [
        ("validation", 10, "split is 'validation'; pass one of 'train', 'test'"),
        ("train", 0, "size is 0; .* from 1 to 499950"),
        ("train", 499_951, "size is 499951; .* from 1 to 499950"),
        ("test", 55_551, "size is 55551; .* from 1 to 55550"),
    ],
)
def test_wrong_arguments(split, size, says):
    with pytest.raises(ValueError, match=says):
        make_dataset(split, size)


# The rewards


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"The sum is \boxed{25}", 1.0),
        ("11,16,25\n\\boxed{ 25 }", 1.0),
        (r"\boxed{24} no, \boxed{25}", 1.0),
        (r"\boxed{25} no, \boxed{24}", 0.0),
        (r"\boxed{25} no, \boxed{2", 0.0),
        (r"\boxed{25} no, \boxed{\text{24}}", 0.0),
        (r"\boxed{25", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{2 5}", 0.0),
        (r"\boxed{025}", 0.0),
        ("25", 0.0),
        ("", 0.0),
    ],
)
def test_exact_match_reward(text, reward):
    assert exact_match_reward([text], ["25"]) == [reward]
    assert exact_match_reward([[{"role": "assistant", "content": text}]], solution=[" 25 "]) == [reward]


def test_exact_match_reward_in_a_batch():
    rewards = exact_match_reward(
        prompts=["a", "b"], completions=[r"\boxed{7}", r"\boxed{8}"], solution=["7", "7"], trainer_state=None
    )
    assert rewards == [1.0, 0.0]
    with pytest.raises(ValueError, match="shorter"):
        exact_match_reward([r"\boxed{7}", r"\boxed{7}"], ["7"])


# The packaged model


@pytest.mark.parametrize("task", TASKS)
def test_packaged_files(task):
    files = {path.name: path.stat().st_size for path in Path(TASKS[task].model).iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "starter_card.json",
    }
    assert sum(files.values()) < 1_000_000


def test_model_shape(model, tokenizer):
    config = model.config
    assert config.model_type == "qwen3"
    assert model.num_parameters() == 167_040
    assert (config.vocab_size, config.head_dim, config.num_attention_heads) == (104, 32, 2)
    assert config.num_key_value_heads == 2
    assert config.max_position_embeddings >= 256
    assert config.attention_dropout == 0.0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert eos != pad
    assert tokenizer.eos_token == "<|im_end|>"
    assert (config.eos_token_id, config.pad_token_id) == (eos, pad)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (eos, pad)


def test_chat_template(tokenizer):
    prompt = [{"role": "user", "content": "3+8+5+9=?"}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n3+8+5+9=?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    answered = [{"role": "system", "content": "Add."}, *prompt, {"role": "assistant", "content": r"\boxed{25}"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n3+8+5+9=?<|im_end|>\n"
        "<|im_start|>assistant\n\\boxed{25}<|im_end|>\n"
    )


def test_greedy_generation_is_deterministic(model, tokenizer):
    prompts = make_dataset("test", 8)["prompt"]
    inputs = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    first, second = (model.generate(**inputs, do_sample=False, max_new_tokens=48) for _ in range(2))
    assert torch.equal(first, second)
    answers = tokenizer.batch_decode(first[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert all(answer.count("\\boxed{") == 1 and answer.endswith("}") for answer in answers)
