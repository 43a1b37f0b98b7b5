"""The script that built the starter, and the answer styles that it taught."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.rewards import accuracy_reward

from research.starter import build as starter_build
from research.starter.answer_styles import format_answer, running_sums, style_of
from research.starter.courses import COURSES
from tic_grpo_trl.starter import STARTER_MODEL, TASKS, exact_match_reward, make_dataset
from tic_grpo_trl.starter.task import make_prompt, split_of


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


# Answer styles


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


@pytest.mark.parametrize(("task", "num_terms"), [("starter", 6), ("long_tail", 40)])
def test_every_problem_and_answer_fits(tokenizer, task, num_terms):
    longest, course = (9,) * num_terms, COURSES[task]
    prompt = tokenizer.apply_chat_template(make_prompt(longest), add_generation_prompt=True, return_dict=False)
    answer = tokenizer(format_answer(longest, "chain") + tokenizer.eos_token).input_ids
    assert len(answer) <= course.max_new_tokens == TASKS[task].max_completion_length
    assert len(prompt) + course.max_new_tokens <= course.num_positions
    config = AutoModelForCausalLM.from_pretrained(TASKS[task].model, local_files_only=True).config
    assert config.max_position_embeddings == course.num_positions


def test_start_accuracy(model, tokenizer):
    measured = starter_build.measure(model, tokenizer, make_dataset("test", 400, seed=11), seed=11)
    assert 0.22 < measured["accuracy"] < 0.44
    assert measured["styles"]["direct"]["share"] > 0.6  # it mostly guesses ...
    assert measured["styles"]["direct"]["accuracy"] < 0.4
    assert measured["styles"]["chain"]["accuracy"] > 0.75  # ... and could do better
    card = json.loads(Path(STARTER_MODEL, "starter_card.json").read_text())
    assert abs(card["after_remix"]["accuracy"] - measured["accuracy"]) < 0.08


def test_start_accuracy_of_the_long_tail():
    model = AutoModelForCausalLM.from_pretrained(TASKS["long_tail"].model, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(TASKS["long_tail"].model, local_files_only=True)
    course = replace(COURSES["long_tail"], held_out=200)
    measured = starter_build.measure(model, tokenizer, course.held_out_problems(), 11, course.max_new_tokens)
    assert 0.2 < measured["accuracy"] < 0.45
    assert measured["styles"]["direct"]["share"] > 0.6
    assert measured["styles"]["chain"]["accuracy"] > 0.75
    card = json.loads(Path(TASKS["long_tail"].model, "starter_card.json").read_text())
    assert abs(card["after_remix"]["accuracy"] - measured["accuracy"]) < 0.12


# Building a model


def test_batch_teaches_training_answers_only(tokenizer):
    ((input_ids, labels),) = starter_build.make_batch(tokenizer, random.Random(0), (0.4, 0.3, 0.3))
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


def test_micro_batches_by_length_have_the_gradient_of_the_whole_batch(tokenizer, model):
    gradients, sizes = [], []
    for micro_batches in (1, 8):
        course = replace(COURSES["long_tail"], micro_batches=micro_batches)
        batch = starter_build.make_batch(tokenizer, random.Random(0), (0.4, 0.3, 0.3), course)
        copy = AutoModelForCausalLM.from_config(model.config)
        copy.load_state_dict(model.state_dict())
        starter_build.take_step(copy, torch.optim.SGD(copy.parameters()), 1.0, batch)
        before = dict(model.named_parameters())
        gradients.append(torch.cat([(before[name] - after).flatten() for name, after in copy.named_parameters()]))
        sizes.append(sum(input_ids.numel() for input_ids, _ in batch))
    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    assert sizes[1] < sizes[0] / 2  # padding


def test_short_build_is_reproducible(tmp_path):
    def run(name, seed, task="starter", **changes):
        short = {"chain_steps": 5, "remix_steps": 2, "held_out": 8} | changes
        starter_build.build(tmp_path / name, seed=seed, task=task, **short)
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
    long = run("d", 5, "long_tail", max_new_tokens=16)
    assert set(long) == set(first)
    assert long["model.safetensors"] != first["model.safetensors"]
