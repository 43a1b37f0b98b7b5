"""The user's own data, answers, instructions, prompt lengths, and errors about names, files and the hub."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_tokenizer
from data_files import DAPO_AFTER, DAPO_BEFORE, aime_examples, contents, dapo_processed, write
from datasets import Dataset, DatasetDict, load_dataset

from tic_grpo_trl.data import NAMED_SETS, drop_long_prompts, load_problems, normalize_answer, prompt_lengths


pytestmark = pytest.mark.usefixtures("own_cache")


def own(path, **arguments):
    """Load the user's own data without an instruction."""
    return load_problems(str(path), **{"instruction": None, **arguments})


# Answers and instructions


@pytest.mark.parametrize(
    ("stored", "normalized"),
    [
        ("033", "33"),
        ("33", "33"),
        (33, "33"),
        (33.0, "33"),
        ("-007", "-7"),
        ("+5", "5"),
        ("0", "0"),
        ("000", "0"),
        ("-0", "0"),
        (" 12\n", "12"),
        (0.5, "0.5"),
        ("0.5", "0.5"),
        ("33.0", "33.0"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("3,140", "3,140"),
        ("007a", "007a"),
        ("10^{03}", "10^{03}"),
    ],
)
def test_normalize_answer(stored, normalized):
    assert normalize_answer(stored) == normalized


@pytest.mark.parametrize("bad", [None, True, ["33"], {"answer": 1}])
def test_answer_of_a_wrong_type(bad):
    with pytest.raises(TypeError, match="string or a number"):
        normalize_answer(bad)


@pytest.mark.parametrize("bad", ["", "  ", float("nan"), float("inf")])
def test_no_answer(bad):
    with pytest.raises(ValueError, match=r"empty|finite"):
        normalize_answer(bad)


def test_instruction(tmp_path):
    problem = r"Let {a} be $\frac{1}{2}$, {problem}"
    path = write(tmp_path / "own.jsonl", [{"prompt": problem, "solution": "1"}])
    (default,) = contents(load_problems(str(path)))
    assert default == DAPO_BEFORE + problem + DAPO_AFTER
    assert default.startswith("Solve the following math problem step by step. The last line of your response should be")
    assert default.endswith('Remember to put your answer on its own line after "Answer:".')
    assert contents(load_problems(str(path), instruction="Q: {problem} {x}")) == [f"Q: {problem} {{x}}"]
    assert contents(load_problems(str(path), instruction=None)) == [problem]
    assert contents(load_problems(str(path), instruction="")) == [problem]
    with pytest.raises(ValueError, match=r"instruction has no placeholder \{problem\}: 'Answer: \{question\}'"):
        load_problems("no_such_set", instruction="Answer: {question}")  # before anything is read


# Generated sets


def test_starter():
    dataset = load_problems("starter", "train", size=20, seed=3)
    assert dataset.column_names == ["prompt", "solution", "source"]
    assert len(dataset) == 20
    (message,) = dataset[0]["prompt"]
    assert str(eval(message["content"].removesuffix("=?"))) == dataset[0]["solution"]
    assert dataset.to_list() == load_problems("starter", size=20, seed=3).to_list()
    assert dataset.to_list() != load_problems("starter", size=20, seed=4).to_list()
    held_out = load_problems("starter", "test")
    assert len(held_out) == 1000
    assert not set(contents(held_out)) & set(contents(load_problems("starter")))
    with pytest.raises(ValueError, match="split is 'validation'"):
        load_problems("starter", "validation")
    with pytest.raises(ValueError, match="size is 0"):
        load_problems("starter", size=0)
    with pytest.raises(ValueError, match=r"starter is generated.*remove @here"):
        load_problems("starter@here")


def test_few_shot_sums():
    dataset = load_problems("few_shot_sums", "test", size=5, seed=1)
    assert dataset.column_names == ["prompt", "solution", "source"]
    assert (len(dataset), set(dataset["source"])) == (5, {"few_shot_sums"})
    assert all(prompt[-1]["role"] == "user" for prompt in dataset["prompt"])


# Own data


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".json", ".csv", ""])
def test_own_data(tmp_path, ending, messages):
    path = write(tmp_path / f"own{ending}", [{"question": "A?", "answer": 1, "extra": "x"}] * 2)
    dataset = own(path, columns={"prompt": "question", "solution": "answer"})
    example = {"prompt": [{"role": "user", "content": "A?"}], "solution": "1", "source": str(path), "extra": "x"}
    assert dataset.to_list() == [example] * 2
    assert messages() == [f"{path}: 2 examples read, all kept"]


def test_own_columns_that_have_the_name_of_ours(tmp_path, messages):
    """`solution` and `source` are what the documentation says they are; other columns stay."""
    stored = {"problem": "A?", "solution": "Long.", "answer": 1.5, "source": "a book", "level": 3}
    path = write(tmp_path / "own.jsonl", [stored])
    assert own(path, columns={"prompt": "problem", "solution": "answer", "difficulty": "level"}).to_list() == [
        {
            "prompt": [{"role": "user", "content": "A?"}],
            "solution": "1.5",
            "source": str(path),
            "difficulty": 3,
        }
    ]
    assert f"{path}: the columns renamed to solution replace those of the same name" in messages()


def test_own_columns_that_are_swapped(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"prompt": "1", "solution": "A?"}])
    assert own(path, columns={"prompt": "solution", "solution": "prompt"})[0] == {
        "prompt": [{"role": "user", "content": "A?"}],
        "solution": "1",
        "source": str(path),
    }


def test_conversational_prompts_keep_their_messages(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A?"}]
    examples = [{"prompt": prompt, "solution": "1"}, {"prompt": prompt[1:], "solution": "2"}]
    dataset = load_problems(str(write(tmp_path / "own.jsonl", examples)))
    assert dataset["prompt"][:] == [prompt, prompt[1:]]


def test_own_splits(tmp_path):
    parts = {split: Dataset.from_list([{"prompt": f"{split}?", "solution": "1"}]) for split in ("train", "held_out")}
    DatasetDict(parts).save_to_disk(tmp_path / "disk")
    assert contents(own(tmp_path / "disk")) == ["train?"]
    assert contents(own(tmp_path / "disk", split="held_out")) == ["held_out?"]
    with pytest.raises(ValueError, match="there is no split 'test'; the splits are 'train', 'held_out'"):
        own(tmp_path / "disk", split="test")
    for split in ("train", "test"):
        write(tmp_path / "files" / f"{split}.jsonl", [{"prompt": f"{split}?", "solution": "1"}])
    assert contents(own(tmp_path / "files", split="test")) == ["test?"]
    with pytest.raises(ValueError, match="there is no split 'test'; the splits are 'train'"):
        own(tmp_path / "files" / "train.jsonl", split="test")


def test_a_folder_with_notes_and_scripts_beside_the_data(tmp_path, monkeypatch):
    write(tmp_path / "my.jsonl", [{"prompt": "A?", "solution": "1"}])
    for name in ("train.py", "test_rewards.py", "my_rewards.py", "README.md", "notes.txt", "config.json"):
        (tmp_path / name).write_text("{}")
    write(tmp_path / ".cache/train.jsonl", [{"prompt": "hidden?", "solution": "1"}])
    monkeypatch.chdir(tmp_path)
    for name in (".", "./", tmp_path):
        assert contents(own(name)) == ["A?"]
    write(tmp_path / "runs/out/summary.json", [{"reward": 1}])
    with pytest.raises(
        ValueError, match=r"several types, such as my\.jsonl and runs/out/summary\.json\. Give one file"
    ):
        own(".")


@pytest.mark.parametrize(
    "files",
    [
        ["train.jsonl", "test.jsonl", "valid.jsonl"],
        ["sums-train-1.jsonl", "sums_eval.jsonl", "dev.jsonl"],
        ["train/a.jsonl", "testing/a.jsonl", "validation/x/a.jsonl"],
        [f"data/{split}-00000-of-00001.jsonl" for split in ("train", "test", "validation")],
    ],
)
def test_splits_are_those_of_datasets(tmp_path, files):
    for file in files:
        write(tmp_path / file, [{"prompt": f"{file}?", "solution": "1"}])
    theirs = load_dataset(str(tmp_path))
    for split, file in zip(("train", "test", "validation"), files, strict=True):
        assert contents(own(tmp_path, split=split)) == theirs[split]["prompt"][:] == [f"{file}?"]


def test_configurations_on_a_card(tmp_path):
    card = "configs:\n- config_name: easy\n  data_files: e.jsonl\n- config_name: hard\n  data_files: h.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\nSums.\n")
    write(tmp_path / "e.jsonl", [{"prompt": "easy?", "solution": "1"}])
    write(tmp_path / "h.jsonl", [{"prompt": "hard?", "solution": "1"}])
    assert contents(own(tmp_path, config="hard")) == ["hard?"]
    with pytest.raises(ValueError, match="Config name is missing"):
        own(tmp_path)


def test_paths_with_a_plus_or_an_at_sign(tmp_path):
    examples = [{"prompt": "A?", "solution": "1"}]
    assert len(own(write(tmp_path / "c++" / "a@b.jsonl", examples))) == 1
    path = write(tmp_path / "c++" / "aime.csv", aime_examples(1990))
    assert len(load_problems(f"aime_1983_2022@{path}")) == 1


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "own.jsonl", [{"prompt": "A?", "solution": "1"}])
    assert own("~/own.jsonl")["source"][:] == ["~/own.jsonl"]


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ({"prompt": "", "solution": "1"}, "example 1 has no usable prompt"),
        ({"prompt": None, "solution": "1"}, "example 1 has no usable prompt"),
        ({"prompt": "B?", "solution": None}, "example 1 has no usable answer"),
        ({"prompt": "B?", "solution": " "}, "example 1 has no usable answer"),
    ],
)
def test_own_example_with_a_gap(tmp_path, example, says):
    path = write(tmp_path / "own.jsonl", [{"prompt": "A?", "solution": "1"}, example])
    with pytest.raises(ValueError, match=rf"own\.jsonl: {says}"):
        own(path)


@pytest.mark.parametrize(
    "prompt", [[], [{"role": "user"}], [{"role": "user", "content": "A?", "name": "x"}], 7, ["A?"]]
)
def test_own_messages_of_another_form(tmp_path, prompt):
    path = write(tmp_path / "own.parquet", [{"prompt": prompt, "solution": "1"}])
    with pytest.raises(ValueError, match="example 0 has no usable prompt"):
        own(path)


def test_missing_column(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"question": "A?", "answer": "1"}])
    with pytest.raises(
        ValueError,
        match=r"no column 'prompt'; the columns are 'question', 'answer'.*columns=\{'prompt': 'question'\}\.$",
    ):
        own(path)
    with pytest.raises(ValueError, match=r"no column 'solution'.*columns=\{'solution': 'answer'\}\.$"):
        own(path, columns={"prompt": "question"})
    with pytest.raises(ValueError, match="no column 'problem' to rename to 'prompt'"):
        own(path, columns={"prompt": "problem", "solution": "answer"})
    with pytest.raises(ValueError, match="The new name comes first: prompt=question"):
        own(path, columns={"question": "prompt"})
    with pytest.raises(ValueError, match="columns is for your own data, and aime24 has fixed columns"):
        load_problems("aime24", columns={"prompt": "question"})


# What cannot be read


def test_wrong_files(tmp_path):
    (tmp_path / "own.txt").write_text("A?")
    with pytest.raises(ValueError, match=r"own\.txt has an unknown file type; give a \.parquet"):
        own(tmp_path / "own.txt")
    whole = write(tmp_path / "own.parquet", [{"prompt": "A?", "solution": "1"}]).read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"half\.parquet cannot be read as \.parquet \(.+\)\. Check that it is complete"
    ):
        load_problems(f"aime24@{tmp_path / 'half.parquet'}")
    (tmp_path / "list.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"list\.json cannot be read as \.json"):
        own(tmp_path / "list.json")
    (tmp_path / "text.jsonl").write_text("Problem one\nProblem two\n")
    with pytest.raises(ValueError, match=r"text\.jsonl cannot be read as \.jsonl"):
        own(tmp_path / "text.jsonl")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none contains no data"):
        own(tmp_path / "none")
    (tmp_path / "none" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="none cannot be read"):
        own(tmp_path / "none")


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_empty_files(tmp_path, ending):
    path = tmp_path / f"own{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "solution": pa.array([], pa.string())}), path)
    else:
        path.write_text("prompt,solution\n" if ending == ".csv" else "")
    with pytest.raises(
        ValueError,
        match=rf"own\{ending}: (the file is empty|the file has no examples|no problem is left of the 0 examples)",
    ):
        own(path)


def test_unknown_names(tmp_path):
    with pytest.raises(
        ValueError, match=r"no data set 'dapo'\. The named sets are dapo_math_17k, aime_1983_2022, aime24"
    ):
        load_problems("dapo")
    with pytest.raises(ValueError, match=r"only named sets accept @LOCATION, and 'aime' is not one of dapo_math_17k"):
        load_problems("aime@copy.csv")
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'data/own\.jsonl'\. Give a \.parquet"):
        load_problems("data/own.jsonl")
    with pytest.raises(FileNotFoundError, match=r"aime24: there is no file or folder 'gone\.csv'"):
        load_problems("aime24@gone.csv")
    with pytest.raises(ValueError, match="give a location after @"):
        load_problems("aime24@")
    with pytest.raises(ValueError, match="a data set's name is empty"):
        load_problems("starter+")


@pytest.mark.parametrize("name", NAMED_SETS)
def test_unreachable_hub(name):
    hub_id = NAMED_SETS[name].hub_id
    with pytest.raises(ConnectionError) as error:
        load_problems(name)
    assert f"{name}: cannot get '{hub_id}' from the hub" in str(error.value)
    assert f"hf download {hub_id} --repo-type dataset --local-dir DIR" in str(error.value)
    assert f"{name}@DIR" in str(error.value)


def test_unreachable_hub_for_other_ids():
    with pytest.raises(ConnectionError, match=r"'someone/sums'.*There is no local file.*give the copy: DIR"):
        load_problems("someone/sums")
    with pytest.raises(ConnectionError, match=r"aime24: cannot get 'someone/aime'.*give the copy: aime24@DIR"):
        load_problems("aime24@someone/aime")


def test_hub_ids_and_configurations(monkeypatch):
    """Which data sets and configurations are requested, always without remote code."""
    asked = []

    def load(location, **arguments):
        asked.append((location, arguments))
        return DatasetDict(train=Dataset.from_list(dapo_processed([("A?", "1")])))

    monkeypatch.setattr("tic_grpo_trl.data.sources.load_dataset", load)
    load_problems("dapo_math_17k")
    load_problems("dapo_math_17k@open-r1/DAPO-Math-17k-Processed")
    load_problems("dapo_math_17k@open-r1/DAPO-Math-17k-Processed", config="en")
    load_problems("someone/sums", config="main")
    assert asked == [
        ("BytedTsinghua-SIA/DAPO-Math-17k", {"name": None, "streaming": False}),
        ("open-r1/DAPO-Math-17k-Processed", {"name": "all", "streaming": False}),
        ("open-r1/DAPO-Math-17k-Processed", {"name": "en", "streaming": False}),
        ("someone/sums", {"name": "main", "streaming": False}),
    ]


# Overlong prompts


def test_drop_long_prompts(messages):
    tokenizer = tiny_tokenizer()  # one token a word
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}b b{% endif %}"
        "{% if extra %} c{% endif %}"
    )
    prompts = [[{"role": "user", "content": " ".join(["a"] * n)}] for n in (1, 5, 2, 4)]
    dataset = Dataset.from_dict({"prompt": prompts, "solution": list("1524")})
    assert prompt_lengths(dataset, tokenizer) == [4, 8, 5, 7]  # the role and the generation prompt count: n + 3
    kept = drop_long_prompts(dataset, tokenizer, 5)
    assert kept["solution"][:] == ["1", "2"]
    assert messages() == ["2 of 4 prompts dropped: over 5 tokens"]
    assert len(drop_long_prompts(dataset, tokenizer, 8)) == 4
    assert drop_long_prompts(dataset, tokenizer, 5, {"extra": True})["solution"][:] == ["1"]
    plain = Dataset.from_dict({"prompt": ["a a a", "a"], "solution": ["3", "1"]})
    assert drop_long_prompts(plain, tokenizer, 2)["solution"][:] == ["1"]
    with pytest.raises(
        ValueError, match="none of the 4 prompts fits into max_prompt_length=3 tokens; the shortest has 4"
    ):
        drop_long_prompts(dataset, tokenizer, 3)
    with pytest.raises(ValueError, match="max_prompt_length is 0"):
        drop_long_prompts(dataset, tokenizer, 0)
