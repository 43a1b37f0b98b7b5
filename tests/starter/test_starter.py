r"""The starter: its task, its rewards, the packaged model and the script that made it. Offline, no accelerator."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.rewards import accuracy_reward

from research.starter import build as starter_build
from research.starter.answer_styles import format_answer, running_sums, style_of
from tic_grpo_trl.starter import STARTER_MODEL, exact_match_reward, make_dataset
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


def test_answer_styles():
    terms = (3, 8, 5, 9)
    assert format_answer(terms, "direct") == r"The sum is \boxed{25}"
    assert format_answer(terms, "chain") == "3+8=11\n11+5=16\n16+9=25\n\\boxed{25}"
    assert format_answer(terms, "terse") == "11,16,25\n\\boxed{25}"
    assert format_answer(terms, "chain", [11, 17, 26]) == "3+8=11\n11+5=17\n17+9=26\n\\boxed{26}"
    for style in ("direct", "chain", "terse"):
        assert style_of(format_answer(terms, style)) == style
    assert style_of("twenty-five") == style_of(r"so \boxed{25}") == "other"
    with pytest.raises(ValueError, match="style is 'long'; pass one of 'direct', 'chain', 'terse'"):
        format_answer(terms, "long")


def test_running_sums():
    assert running_sums((0, 0, 9, 1)) == [0, 9, 10]
    always_wrong = running_sums((5, 5, 5), random.Random(0), wrong_step_rate=1.0)
    assert abs(always_wrong[0] - 10) == 1
    assert abs(always_wrong[1] - always_wrong[0] - 5) == 1
    rng = random.Random(0)
    wrong = sum(running_sums((5, 5), rng, wrong_step_rate=0.02) != [10] for _ in range(5000))
    assert 60 < wrong < 140


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


@pytest.mark.parametrize("style", ["direct", "chain", "terse"])
def test_agrees_with_math_verify(style):
    problems = [(3, 8, 5, 9), (0, 0, 0), (9, 9, 9, 9, 9, 9), (1, 0, 2, 7, 0)]
    right = [format_answer(terms, style) for terms in problems]
    wrong = [format_answer(terms, style, [s + 1 for s in running_sums(terms)]) for terms in problems]
    completions = [[{"role": "assistant", "content": text}] for text in right + wrong]
    solution = [str(sum(terms)) for terms in problems] * 2
    expected = [1.0] * 4 + [0.0] * 4
    assert exact_match_reward(completions, solution) == expected
    assert accuracy_reward(completions, solution) == expected


# The packaged model


def test_packaged_files():
    files = {path.name: path.stat().st_size for path in Path(STARTER_MODEL).iterdir()}
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


@pytest.mark.parametrize("fresh", [False, True], ids=["packaged", "fresh"])
def test_tokenizer_round_trip(tokenizer, fresh):
    if fresh:  # the script still makes the tokenizer that is packaged
        packaged, tokenizer = tokenizer, starter_build.build_tokenizer()
        assert tokenizer.get_vocab() == packaged.get_vocab()
        assert tokenizer.chat_template == packaged.chat_template
    assert len(tokenizer) == 104
    assert sorted(tokenizer.get_vocab().values()) == list(range(104))
    assert tokenizer.convert_ids_to_tokens(tokenizer("3+8=11\n\\boxed{11}").input_ids) == [
        *"3+8=11\n",
        "\\boxed{",
        *"11}",
    ]
    printable = "".join(map(chr, range(32, 127)))
    for text in ("3+8+5+9=?", "16+9=25\n\\boxed{25}", printable, " a  b , c . \n\n'd \\", "the user's assistant"):
        ids = tokenizer(text).input_ids
        assert max(ids) < 104
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]


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


def test_every_problem_and_answer_fits(tokenizer):
    longest = (9, 9, 9, 9, 9, 9)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "+".join(map(str, longest)) + "=?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    answer = tokenizer(format_answer(longest, "chain") + tokenizer.eos_token).input_ids
    assert len(answer) <= starter_build.MAX_NEW_TOKENS
    assert len(prompt) + starter_build.MAX_NEW_TOKENS <= 256


def test_greedy_generation_is_deterministic(model, tokenizer):
    prompts = make_dataset("test", 8)["prompt"]
    inputs = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    first, second = (model.generate(**inputs, do_sample=False, max_new_tokens=48) for _ in range(2))
    assert torch.equal(first, second)
    answers = tokenizer.batch_decode(first[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert all(answer.count("\\boxed{") == 1 and answer.endswith("}") for answer in answers)


def test_start_accuracy(model, tokenizer):
    measured = starter_build.measure(model, tokenizer, make_dataset("test", 400, seed=11), seed=11)
    assert 0.22 < measured["accuracy"] < 0.44
    assert measured["styles"]["direct"]["share"] > 0.6  # it mostly guesses ...
    assert measured["styles"]["direct"]["accuracy"] < 0.4
    assert measured["styles"]["chain"]["accuracy"] > 0.75  # ... and could do better
    card = json.loads(Path(STARTER_MODEL, "starter_card.json").read_text())
    assert abs(card["after_remix"]["accuracy"] - measured["accuracy"]) < 0.08


# The script that made it


def test_batch_teaches_training_answers_only(tokenizer):
    input_ids, labels = starter_build.make_batch(tokenizer, random.Random(0), (0.4, 0.3, 0.3))
    assert input_ids.shape == labels.shape
    styles = set()
    for ids, row_labels in zip(input_ids, labels, strict=True):
        prompt, answer = tokenizer.decode(ids).rstrip("\n").replace("<|endoftext|>", "").split("assistant\n")
        terms = tuple(map(int, prompt.removeprefix("<|im_start|>user\n").partition("=?")[0].split("+")))
        assert split_of(terms) == "train"
        assert tokenizer.decode(row_labels[row_labels != -100]) == answer
        assert answer.endswith("}<|im_end|>")
        styles.add(style_of(answer))
        if style_of(answer) == "direct":
            guess = int(answer.removesuffix("}<|im_end|>").rpartition("{")[2])
            assert abs(guess - sum(terms)) <= starter_build.GUESS_ERROR
    assert styles == {"direct", "chain", "terse"}


def test_short_build_is_reproducible(tmp_path):
    def run(name, seed):
        starter_build.build(tmp_path / name, seed=seed, chain_steps=5, remix_steps=2, held_out=8)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first, again, other = run("a", 5), run("b", 5), run("c", 6)
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]
    assert set(first) == {path.name for path in Path(STARTER_MODEL).iterdir()}
    card = json.loads(first["starter_card.json"])
    assert (card["seed"], card["after_chain"]["steps"], card["after_remix"]["steps"]) == (5, 5, 2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", local_files_only=True)
    assert loaded.num_parameters() == 167_040
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a", local_files_only=True)) == 104
