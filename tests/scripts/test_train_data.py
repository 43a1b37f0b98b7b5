"""The data and reward flags of the training script, as a user with own data and an own reward function gives them."""

import json
import re
import sys

import pytest
import torch
from conftest import tiny_tokenizer
from data_files import DAPO_AFTER, DAPO_BEFORE, EVALUATION_EXAMPLES, aime_examples, contents, write
from datasets import Dataset, DatasetDict, IterableDataset
from launching import run_script
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config
from trl import ModelConfig, TrlParser
from trl.rewards import accuracy_reward, think_format_reward

from tic_grpo_trl import TICGRPOConfig
from tic_grpo_trl.data import drop_long_prompts
from tic_grpo_trl.rewards import math_reward
from tic_grpo_trl.scripts.recipes import recipe_path
from tic_grpo_trl.scripts.train_data import TrainArguments, import_rewards, load_data, reward_functions
from tic_grpo_trl.starter import STARTER_MODEL


pytestmark = pytest.mark.usefixtures("own_cache")

CPU = "--use_cpu --bf16 false --output_dir unused".split()
STEPS = "--eval_strategy steps --eval_steps 1 --num_generations_eval 1".split()
SUMS = [{"prompt": f"{n} + 1?", "answer": n + 1, "level": "easy"} for n in range(3)]
REWARDS = """
from math import sqrt

SCALE = 2.0

class Correct:
    pass

def correct(completions, answer, **kwargs):
    return [float(text.endswith(str(right))) for text, right in zip(completions, answer)]

def short(completions):
    return [1.0] * len(completions)

def zero(completions, **kwargs):
    return [0.0] * len(completions)

def _hidden(completions, **kwargs):
    return [0.0] * len(completions)
"""


def arguments(*flags):
    parser = TrlParser((TrainArguments, TICGRPOConfig, ModelConfig))
    script_args, training_args, _ = parser.parse_args_and_config([*CPU, *map(str, flags)])
    return script_args, training_args


def load(*flags):
    """Load data and rewards as the script does for these flags."""
    script_args, training_args = arguments(*flags)
    data = load_data(script_args, training_args)
    return *data, reward_functions(script_args, training_args, data[0])


def refused(*flags, error=ValueError) -> str:
    """Return the message of an error, which must be one line."""
    with pytest.raises(error) as raised:
        load(*flags)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with `my_rewards.py`, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


MINE = ("--reward_funcs", "my_rewards.correct")


# Own data


@pytest.mark.parametrize("name", ["sums.jsonl", "sums.json", "sums.csv", "sums.parquet", "saved", "~/sums.jsonl"])
def test_every_column_reaches_the_reward_functions(folder, name, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    write(folder / name.removeprefix("~/"), SUMS)
    dataset, evaluation, (reward,) = load("--dataset_name", name, *MINE)
    assert dataset.to_list() == SUMS
    assert evaluation is None
    columns = {column: dataset[column][:] for column in dataset.column_names if column != "prompt"}
    assert reward(prompts=dataset["prompt"][:], completions=["= 1", "= 3", "= 3"], **columns) == [1.0, 0.0, 1.0]


def test_a_folder_of_files(folder):
    write(folder / "data/train.jsonl", SUMS)
    write(folder / "data/test.jsonl", SUMS[:1])
    dataset, evaluation, _ = load("--dataset_name", "data", *MINE, *STEPS)
    assert (len(dataset), len(evaluation)) == (3, 1)
    assert load("--dataset_name", "data", "--dataset_train_split", "test", *MINE)[0].to_list() == SUMS[:1]
    assert "there is no split 'dev'; the splits are 'train', 'test'" in refused(
        "--dataset_name", "data", "--dataset_train_split", "dev", *MINE
    )


def test_files_joined_by_a_plus(folder):
    write(folder / "a.jsonl", SUMS)
    write(folder / "b.csv", [{"prompt": "B?", "answer": 7}])
    dataset, *_ = load("--dataset_name", "a.jsonl+b.csv", *MINE)
    assert dataset["prompt"][:] == ["0 + 1?", "1 + 1?", "2 + 1?", "B?"]
    assert dataset["level"][:] == ["easy"] * 3 + [None]
    write(folder / "c.jsonl", [{"prompt": "C?", "answer": "seven"}])
    assert "a.jsonl+c.jsonl: the parts cannot be joined" in refused("--dataset_name", "a.jsonl+c.jsonl", *MINE)


def test_renamed_columns_keep_the_others(folder):
    examples = [{"question": "1 + 1?", "solution": "Count.", "answer": 2, "level": "easy"}]
    write(folder / "sums.jsonl", examples)
    flags = ("--dataset_name", "sums.jsonl", "--dataset_columns")
    dataset, *_ = load(*flags, "prompt=question", *MINE)
    assert dataset.to_list() == [{"prompt": "1 + 1?", "solution": "Count.", "answer": 2, "level": "easy"}]
    dataset, *_ = load(*flags, "prompt=question", "solution=answer")  # takes the place of the worked solution
    assert dataset.to_list() == [{"prompt": "1 + 1?", "solution": 2, "level": "easy"}]
    dataset, *_ = load(*flags, "prompt=answer", "answer=question", *MINE)
    assert dataset[0]["answer"] == "1 + 1?"


def test_conversations_stay_as_they_are(folder):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    write(folder / "sums.jsonl", [{"prompt": prompt, "answer": 2}])
    for flags in ((), ("--instruction", "Q: {problem}")):
        assert load("--dataset_name", "sums.jsonl", *flags, *MINE)[0]["prompt"][:] == [prompt]


@pytest.mark.parametrize("instruction", [None, "Q: {problem}"])
def test_streams(folder, instruction):
    write(folder / "sums.jsonl", [{"question": e["prompt"], "answer": e["answer"]} for e in SUMS])
    flags = ("--dataset_name", "sums.jsonl", "--dataset_streaming", "--dataset_columns", "prompt=question", *MINE)
    dataset, *_ = load(*flags, *(["--instruction", instruction] if instruction else []), "--max_steps", 1)
    assert isinstance(dataset, IterableDataset)
    examples = list(dataset)
    assert [example["answer"] for example in examples] == [1, 2, 3]
    told = [{"role": "user", "content": "Q: 0 + 1?"}]
    assert examples[0]["prompt"] == (told if instruction else "0 + 1?")


def test_long_prompts_of_a_stream(folder):
    write(folder / "words.jsonl", [{"prompt": " ".join(["a"] * n), "answer": n} for n in (1, 5, 2)])
    dataset, *_ = load("--dataset_name", "words.jsonl", "--dataset_streaming", *MINE)
    assert [example["answer"] for example in drop_long_prompts(dataset, tiny_tokenizer(), 2)] == [1, 2]


# The instruction


def test_own_strings_get_no_instruction_unless_it_is_asked_for(folder, messages):
    write(folder / "sums.jsonl", SUMS)
    dataset, *_ = load("--dataset_name", "sums.jsonl", *MINE)
    assert dataset["prompt"][:] == ["0 + 1?", "1 + 1?", "2 + 1?"]
    assert not any("The first prompt" in message for message in messages())

    dataset, *_ = load("--dataset_name", "sums.jsonl", "--instruction", "default", *MINE)
    assert contents(dataset) == [f"{DAPO_BEFORE}{n} + 1?{DAPO_AFTER}" for n in range(3)]
    assert dataset["answer"][:] == [1, 2, 3]
    assert set(dataset.column_names) == {"prompt", "answer", "level"}
    (shown,) = [message for message in messages() if "The first prompt" in message]
    lines = [line.removeprefix("  | ") for line in shown.splitlines()[1:]]
    assert "\n".join(lines) == contents(dataset)[0]


def test_named_sets_get_their_instruction_and_show_it(folder, messages, monkeypatch):
    aime = write(folder / "aime.csv", aime_examples(1990, 1991))
    dataset, *_ = load("--dataset_name", f"aime_1983_2022@{aime}")
    assert contents(dataset)[0] == f"{DAPO_BEFORE}Problem of 1990{DAPO_AFTER}"
    assert sum("The first prompt" in message for message in messages()) == 1
    monkeypatch.setenv("RANK", "1")  # the other processes say nothing
    before = len(messages())
    load("--dataset_name", f"aime_1983_2022@{aime}")
    assert len(messages()) == before


def test_a_mixture_of_own_and_named_data_keeps_own_columns(folder):
    aime = write(folder / "aime.csv", aime_examples(1990))
    write(folder / "sums.jsonl", [{"question": "1 + 1?", "answer": 2, "level": "easy"}])
    columns = ("--dataset_columns", "prompt=question", "solution=answer")
    dataset, *_ = load("--dataset_name", f"aime_1983_2022@{aime}+sums.jsonl", *columns)
    assert dataset["solution"][:] == ["33", "2"]
    assert dataset["level"][:] == [None, "easy"]
    assert contents(dataset)[1] == f"{DAPO_BEFORE}1 + 1?{DAPO_AFTER}"


def test_prompts_that_ask_for_no_answer_are_noticed(folder, messages):
    write(folder / "sums.jsonl", [{"prompt": "1 + 1?", "solution": 2}])
    assert load("--dataset_name", "sums.jsonl")[2] == [math_reward]
    assert any("add --instruction default" in message for message in messages())
    before = len(messages())
    load("--dataset_name", "sums.jsonl", "--instruction", "{problem} Answer in \\boxed{}.")
    assert not any("add --instruction" in message for message in messages()[before:])


# Evaluation data


def test_own_evaluation_data(folder):
    write(folder / "sums.jsonl", [{"question": "1 + 1?", "answer": 2, "level": "easy"}])
    write(folder / "held_out.jsonl", [{"question": "2 + 2?", "answer": 4, "level": "hard"}])
    columns = ("--dataset_columns", "prompt=question", "--instruction", "Q: {problem}", *MINE, *STEPS)
    dataset, evaluation, _ = load("--dataset_name", "sums.jsonl", "--eval_dataset_name", "held_out.jsonl", *columns)
    assert dataset["prompt"][0] == [{"role": "user", "content": "Q: 1 + 1?"}]
    assert evaluation.to_list() == [
        {"prompt": [{"role": "user", "content": "Q: 2 + 2?"}], "answer": 4, "level": "hard"}
    ]
    assert load("--dataset_name", "sums.jsonl", "--eval_dataset_name", "no.jsonl", *columns[:4], *MINE)[1] is None


def test_named_evaluation_data_beside_own_training_data(folder):
    write(folder / "sums.jsonl", [{"question": "1 + 1?", "answer": 2}])
    aime24 = write(folder / "aime24.jsonl", EVALUATION_EXAMPLES["aime24"])
    columns = ("--dataset_columns", "prompt=question", "solution=answer")
    own = ("--dataset_name", "sums.jsonl", "--eval_dataset_name", f"aime24@{aime24}")
    dataset, evaluation, _ = load(*own, *columns, *STEPS)
    assert (dataset["prompt"][0], evaluation["solution"][0]) == ("1 + 1?", "33")


def test_evaluation_without_held_out_data(folder):
    write(folder / "sums.jsonl", SUMS)
    message = refused("--dataset_name", "sums.jsonl", *MINE, *STEPS)
    assert re.fullmatch(r"--eval_strategy steps .*sums\.jsonl has no split 'test'.*add --eval_dataset_name .*", message)
    DatasetDict(train=Dataset.from_list(SUMS), dev=Dataset.from_list(SUMS[:1])).save_to_disk("saved")
    flags = ("--dataset_name", "saved", "--dataset_test_split", "dev", *MINE, *STEPS)
    assert len(load(*flags)[1]) == 1
    assert "there is no split 'held'" in refused(
        *("--dataset_name", "sums.jsonl", "--eval_dataset_name", "saved"),
        *("--dataset_test_split", "held", *MINE, *STEPS),
    )


def test_evaluation_on_start_needs_held_out_data():
    flags = ("--config", recipe_path("starter"), "--train_size", 8, "--test_size", 8)
    assert len(load(*flags)[1]) == 8
    assert refused(*flags, "--eval_strategy", "no") == (
        "--eval_on_start true needs held-out data: add --eval_strategy steps, or set --eval_on_start false."
    )
    assert load(*flags, "--eval_strategy", "no", "--eval_on_start", "false")[1] is None


# Names and files with a mistake


def test_mistyped_names(folder):
    write(folder / "sums.jsonl", SUMS)
    (folder / "notes.txt").write_text("no data")
    assert "--dataset_name dapo_mth_17k: there is no data set 'dapo_mth_17k'. Did you mean 'dapo_math_17k'?" in refused(
        "--dataset_name", "dapo_mth_17k"
    )
    assert "Did you mean 'starter'?" in refused("--dataset_name", "Startr")
    assert "Did you mean 'sums.jsonl'?" in refused("--dataset_name", "sums")
    gone = {"error": FileNotFoundError}
    assert "no file or folder 'sum.jsonl'. Did you mean 'sums.jsonl'?" in refused("--dataset_name", "sum.jsonl", **gone)
    assert "Did you mean 'sums.jsonl'?" in refused("--dataset_name", "sums.parquet", **gone)
    assert "Did you mean" not in refused("--dataset_name", "notes.jsonl", **gone)
    write(folder / "my.jsonl", SUMS)
    assert "Did you mean 'my.jsonl'?" in refused("--dataset_name", "mi.jsonl", **gone)
    assert "Did you mean" not in refused("--dataset_name", "gone/sums.jsonl", **gone)
    write(folder / "data/sums.jsonl", SUMS)
    assert "Did you mean 'data/sums.jsonl'?" in refused("--dataset_name", "data/sums", error=ConnectionError)
    assert "'math50' is not one of" in refused("--dataset_name", "math50@copy.csv")
    assert "Did you mean 'math500'?" in refused("--dataset_name", "math50@copy.csv")


def test_missing_columns(folder):
    write(folder / "sums.jsonl", [{"id": 1, "question": "1 + 1?", "answer": 2}])
    flags = ("--dataset_name", "sums.jsonl")
    assert refused(*flags) == (
        "--dataset_name sums.jsonl: there is no column 'prompt'; the columns are 'id', 'question', 'answer'. "
        "Name it with --dataset_columns prompt=question, or in Python columns={'prompt': 'question'}."
    )
    columns = (*flags, "--dataset_columns")
    assert "--dataset_columns solution=answer" in refused(*columns, "prompt=question")  # for the default reward
    assert "no column 'questoin' to rename to 'prompt'" in refused(*columns, "prompt=questoin")
    assert "Did you mean 'question'?" in refused(*columns, "prompt=questoin")
    assert "The new name comes first: prompt=question." in refused(*columns, "question=prompt")
    assert refused(*columns, "prompt:question") == (
        "--dataset_columns prompt:question: give NEW=OLD, such as prompt=question."
    )
    aime = write(folder / "aime.csv", aime_examples(1990))
    assert "has fixed columns" in refused("--dataset_name", f"aime_1983_2022@{aime}", *columns[2:], "prompt=Question")


def test_columns_that_a_reward_function_reads(folder):
    write(folder / "sums.jsonl", [{"prompt": "1 + 1?", "result": 2}])
    flags = ("--dataset_name", "sums.jsonl", "--reward_funcs")
    message = refused(*flags, "my_rewards.correct")
    assert "--reward_funcs my_rewards.correct reads the column 'answer'" in message
    assert "the columns are 'prompt', 'result'. Rename one with --dataset_columns answer=COLUMN" in message
    assert load(*flags, "my_rewards.correct", "--dataset_columns", "answer=result")[0]["answer"][:] == [2]
    for path in ("accuracy_reward", "tic_grpo_trl.rewards.math_reward", "tic_grpo_trl.rewards.code_reward"):
        assert f"--reward_funcs {path} reads the column 'solution'" in refused(*flags, path)
    assert "my_rewards.short does not accept completion_ids, log_extra" in refused(*flags, "my_rewards.short")
    write(folder / "held_out.jsonl", [{"prompt": "2 + 2?"}])
    evaluation = ("--dataset_columns", "answer=result", "--eval_dataset_name", "held_out.jsonl", *STEPS)
    message = refused(*flags, "my_rewards.correct", *evaluation)
    assert message.startswith("--eval_dataset_name held_out.jsonl: there is no column 'result' to rename to 'answer'")


def test_files_without_examples(folder):
    for name, text in {"a.jsonl": "", "b.csv": "", "c.csv": "prompt,answer\n", "d.jsonl": "\n"}.items():
        (folder / name).write_text(text)
        assert re.match(
            rf"--dataset_name {name}: .*(empty|no examples|cannot be read)", refused("--dataset_name", name, *MINE)
        ), name


def test_files_that_are_no_json_lines_name_the_line(folder, capfd):
    good = json.dumps(SUMS[0]) + "\n"
    (folder / "cut.jsonl").write_text(good + good + '{"prompt": "1 + \n')
    assert re.search(r"cut.jsonl: .* \(line 3 is not JSON, .*\{\"prompt", refused("--dataset_name", "cut.jsonl", *MINE))
    (folder / "list.jsonl").write_text(good + "[1, 2]\n")
    assert "(line 2 is no JSON object: '[1, 2]')" in refused("--dataset_name", "list.jsonl", *MINE)
    assert "Failed to load JSON" not in capfd.readouterr().err  # what `datasets` logs on its own


# TRL's mixtures


def mixture(folder, text):
    (folder / "mixture.yaml").write_text(text)
    return ("--config", "mixture.yaml")


A = """
datasets:
- path: json
  data_files: a.jsonl
  columns: [prompt, answer]
"""
A_AND_B = A + A.replace("datasets:", "").replace("a.jsonl", "b.jsonl").lstrip()


def test_a_mixture_of_trl(folder):
    write(folder / "a.jsonl", SUMS)
    write(folder / "b.jsonl", [{"prompt": "B?", "answer": 7}])
    flags = mixture(folder, A_AND_B)
    dataset, evaluation, _ = load(*flags, *MINE, "--instruction", "Q: {problem}")
    assert contents(dataset) == ["Q: 0 + 1?", "Q: 1 + 1?", "Q: 2 + 1?", "Q: B?"]
    assert (dataset["answer"][:], evaluation) == ([1, 2, 3, 7], None)
    assert "datasets has no split 'test', only 'train': add --eval_dataset_name" in refused(*flags, *MINE, *STEPS)
    assert len(load(*flags, *MINE, *STEPS, "--eval_dataset_name", "b.jsonl")[1]) == 1


def test_a_mixture_s_held_out_part_depends_on_the_seed_alone(folder):
    write(folder / "a.jsonl", [{"prompt": f"{n}?", "answer": n} for n in range(20)])
    flags = (*mixture(folder, A), "--test_split_size", 0.25, *MINE, *STEPS)
    parts = [load(*flags, "--seed", seed)[:2] for seed in (1, 1, 2)]
    (train, held_out), again, other = [[part["answer"][:] for part in pair] for pair in parts]
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted(train + held_out) == list(range(20))
    assert [train, held_out] == again != other


def test_fractions_and_streams_of_a_mixture(folder):
    write(folder / "a.jsonl", SUMS)
    half = "  fraction: 0.5\n"
    flags = mixture(folder, A + half + A_AND_B.removeprefix(A).replace("b.jsonl", "a.jsonl") + half)
    assert load(*flags, *MINE)[0]["answer"][:] == [1, 2, 3, 1, 2, 3]
    flags = mixture(folder, A + "streaming: true\n")
    dataset, *_ = load(*flags, *MINE, "--max_steps", 1)
    assert isinstance(dataset, IterableDataset)
    assert [example["answer"] for example in dataset] == [1, 2, 3]
    assert "does not work with streaming" in refused(*flags, *MINE, "--test_split_size", 0.5)


def test_mistakes_in_a_mixture(folder):
    write(folder / "a.jsonl", SUMS)
    flags = mixture(folder, A_AND_B)
    assert re.match(r"datasets: json, json cannot be read \(FileNotFoundError: .*b\.jsonl", refused(*flags, *MINE))
    assert refused(*flags, *MINE, "--dataset_name", "a.jsonl") == (
        "--dataset_name a.jsonl and datasets are both given: remove one of them."
    )
    assert "give --dataset_streaming" in refused("--dataset_name", "a.jsonl", "--streaming", *MINE)
    assert "add --eval_dataset_name" in refused("--dataset_name", "a.jsonl", "--test_split_size", 0.5, *MINE)


# Reward functions


def test_a_reward_model_needs_no_function(folder):
    write(folder / "sums.jsonl", [{"prompt": "1 + 1?", "answer": 2}])  # no solution for a default
    flags = ("--dataset_name", "sums.jsonl", "--reward_model_name_or_path")
    assert load(*flags, STARTER_MODEL)[2] == [STARTER_MODEL]
    model, function = load(*flags, STARTER_MODEL, *MINE)[2]  # in the order of TRL's script, and of --reward_weights
    assert (model, function.__name__) == (STARTER_MODEL, "correct")
    assert refused(*flags, "./judge").startswith("--reward_model_name_or_path ./judge does not exist.")


def test_a_reward_model_trains(folder):
    tokenizer = AutoTokenizer.from_pretrained(STARTER_MODEL)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    done = run_script(
        *"--reward_model_name_or_path judge --reward_funcs my_rewards.zero --reward_weights 1 0 --train_size 8".split(),
        *"--max_steps 2 --per_device_train_batch_size 8 --num_generations 4 --max_completion_length 8".split(),
        *"--report_to none --use_cpu --bf16 false --save_strategy no".split(),
        *("--output_dir", folder / "run"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first = json.loads((folder / "run/trainer_state.json").read_text())["log_history"][0]
    assert first["rewards/judge/mean"] != 0
    assert first["rewards/zero/mean"] == 0
    assert first["reward"] == pytest.approx(first["rewards/judge/mean"])


def reward(*paths):
    return import_rewards(arguments("--reward_funcs", *paths)[0])


def wrong_reward(path) -> str:
    with pytest.raises(ValueError, match=re.escape(f"--reward_funcs {path}: ")) as raised:
        reward(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_rewards_of_trl_by_short_name_and_by_path(folder):
    assert reward("accuracy_reward", "trl.rewards.think_format_reward") == [accuracy_reward, think_format_reward]
    (length,) = reward("get_soft_overlong_punishment")  # 1280 and 256 tokens, as in TRL's script
    assert length(completion_ids=[[0] * n for n in (1024, 1152, 1280, 1281)]) == [0, -0.5, -1, -1]
    assert "give --soft_punish_cache instead" in wrong_reward("trl.rewards.get_soft_overlong_punishment")


def test_a_reward_without_a_dot(folder):
    assert "give MODULE.FUNCTION, such as my_rewards.correct" in wrong_reward("correct")
    assert "Did you mean 'accuracy_reward'?" in wrong_reward("acuracy_reward")


def test_a_reward_in_a_module_that_does_not_exist(folder):
    message = wrong_reward("my_reward.correct")
    assert f"no module 'my_reward' in the working directory {folder} or among the installed packages" in message
    assert message.endswith("Did you mean 'my_rewards'?")
    assert "Did you mean" not in wrong_reward("zzz.correct")
    assert "no module 'reward' in the package tic_grpo_trl. Did you mean 'rewards'?" in (
        wrong_reward("tic_grpo_trl.reward.math_reward")
    )
    assert "my_rewards is a file with functions, not a package" in wrong_reward("my_rewards.Correct.score")


def test_a_reward_in_a_module_that_cannot_be_imported(folder):
    (folder / "broken.py").write_text("\nvalue = undefined\n")
    assert "importing broken failed with NameError: name 'undefined' is not defined (broken.py, line 2)" in (
        wrong_reward("broken.correct")
    )
    (folder / "needs.py").write_text("import no_such_package\n")
    assert "importing needs failed with ModuleNotFoundError: No module named 'no_such_package' (needs.py, line 1)" in (
        wrong_reward("needs.correct")
    )
    (folder / "typo.py").write_text("x = 1\ndef correct(:\n")
    assert re.search(r"importing typo failed with SyntaxError: .*\(typo\.py, line 2\)", wrong_reward("typo.correct"))
    (folder / "ends.py").write_text("raise SystemExit(3)\n")
    assert "importing ends failed with SystemExit: 3 (ends.py, line 1)" in wrong_reward("ends.correct")


def test_a_reward_that_its_module_lacks(folder):
    assert wrong_reward("my_rewards.corect").endswith(
        "the module my_rewards has no function 'corect'; it has correct, short, zero. Did you mean 'correct'?"
    )
    assert "Did you mean 'math_reward'?" in wrong_reward("tic_grpo_trl.rewards.maths_reward")  # an exported object


@pytest.mark.parametrize(
    "path",
    [
        "./my_rewards.py:correct",
        "my_rewards.py:correct",
        "my_rewards:correct",
        "./my_rewards:correct",
        "./my_rewards.correct",
    ],
)
def test_the_path_of_a_file_is_told_what_to_give(folder, path):
    assert wrong_reward(path) == f"--reward_funcs {path}: give an import path: my_rewards.correct."
    absolute = folder / path
    assert wrong_reward(str(absolute)).endswith("give an import path: my_rewards.correct.")


def test_a_file_without_a_function_is_told_which_it_has(folder):
    assert wrong_reward("my_rewards.py").endswith(
        "give an import path: my_rewards.correct or my_rewards.short or my_rewards.zero."
    )
    assert wrong_reward("no_rewards.py").endswith("give an import path: MODULE.FUNCTION, such as my_rewards.correct.")
    (folder / "lib").mkdir()
    (folder / "lib/scores.py").write_text(REWARDS)
    assert wrong_reward("lib/scores.py:short").endswith("give an import path: lib.scores.short.")
    assert wrong_reward("lib/scores.py").endswith(
        "give an import path: lib.scores.correct or lib.scores.short or lib.scores.zero."
    )


def test_a_file_elsewhere_needs_its_folder_on_the_path(folder, monkeypatch):
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    assert wrong_reward("../my_rewards.py:correct").endswith(
        f"give an import path: my_rewards.correct. Add {folder} to PYTHONPATH."
    )


def test_a_reward_with_a_parameter_by_position_only(folder):
    (folder / "by_position.py").write_text("def correct(completions, /, **kwargs):\n    return [1.0]\n")
    write(folder / "sums.jsonl", SUMS)
    assert refused("--dataset_name", "sums.jsonl", "--reward_funcs", "by_position.correct") == (
        "--reward_funcs by_position.correct takes 'completions' by position only, but TRL passes every argument by "
        "name: remove the / from its parameters."
    )


def test_a_reward_that_cannot_be_called(folder):
    assert "SCALE is a value of type float; give a function" in wrong_reward("my_rewards.SCALE")
    assert "Correct is a class; give a function" in wrong_reward("my_rewards.Correct")


def test_own_data_and_reward_from_file_to_model(folder):
    """The command of the documentation, with the starter for a model from the hub and a few steps on the CPU."""
    write(folder / "my.jsonl", [{"question": f"{a}+{b}+2=?", "total": a + b + 2} for a in range(8) for b in (1, 4)])
    (folder / "my_sums.py").write_text(
        "def correct(completions, answer, **kwargs):\n"
        "    texts = [completion[0]['content'] for completion in completions]\n"
        "    return [float(f'boxed{{{right}}}' in text) for text, right in zip(texts, answer)]\n"
    )
    done = run_script(
        *("--model_name_or_path", STARTER_MODEL, "--dataset_name", "my.jsonl", "--output_dir", folder / "run"),
        *("--dataset_columns", "prompt=question", "answer=total", "--instruction", "{problem}"),
        *("--reward_funcs", "my_sums.correct", "think_format_reward", "--per_device_train_batch_size", 16),
        *"--num_generations 4 --max_completion_length 32 --max_steps 4 --learning_rate 1e-4".split(),
        *"--report_to none --use_cpu --bf16 false --log_completions true".split(),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "my.jsonl: 16 examples with the columns prompt, answer" in done.stderr
    state = json.loads((folder / "run/trainer_state.json").read_text())
    means = [entry["rewards/correct/mean"] for entry in state["log_history"] if "rewards/correct/mean" in entry]
    assert 0 < max(means) <= 1
    assert (folder / "run/model.safetensors").exists()
