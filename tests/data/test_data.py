"""The named sets, read as NAME@LOCATION from small files with their schemas, and mixtures; nothing is downloaded."""

import pytest
from data_files import (
    DAPO_AFTER,
    DAPO_BEFORE,
    EVALUATION_EXAMPLES,
    PROBLEMS,
    aime_examples,
    contents,
    dapo_original,
    dapo_processed,
    write,
)
from datasets import Dataset, DatasetDict

from tic_grpo_trl.data import load_problems


pytestmark = pytest.mark.usefixtures("own_cache")


# DAPO-Math-17k


@pytest.mark.parametrize("schema", [dapo_original, dapo_processed])
@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ""])
def test_dapo(tmp_path, schema, ending, messages):
    path = write(tmp_path / f"dapo{ending}", schema(PROBLEMS))
    dataset = load_problems(f"dapo_math_17k@{path}")
    assert dataset.column_names == ["prompt", "solution", "source"]
    bare = [PROBLEMS[0][0], "How many ways?", PROBLEMS[3][0]]
    assert dataset["prompt"][:] == [
        [{"role": "user", "content": DAPO_BEFORE + problem + DAPO_AFTER}] for problem in bare
    ]
    assert dataset["solution"][:] == ["34", "33", "-7"]
    assert set(dataset["source"]) == {"dapo_math_17k"}
    assert messages() == [
        "dapo_math_17k: 5 examples read, 2 duplicates dropped, 0 problems with conflicting answers dropped, 3 kept"
    ]
    assert contents(load_problems(f"dapo_math_17k@{path}", instruction=None)) == bare


def test_both_dapo_schemas_give_the_same_examples(tmp_path):
    original = write(tmp_path / "original.parquet", dapo_original(PROBLEMS))
    processed = write(tmp_path / "processed.parquet", dapo_processed(PROBLEMS))
    first, second = (load_problems(f"dapo_math_17k@{path}") for path in (original, processed))
    assert first.features == second.features
    assert first.to_list() == second.to_list()


@pytest.mark.parametrize("schema", [dapo_original, dapo_processed])
def test_conflicting_answers_are_dropped(tmp_path, schema, messages):
    problems = [("A?", "1"), ("B?", "2"), ("A?", "3"), ("B?", "02"), ("A?", "1")]
    path = write(tmp_path / "dapo.jsonl", schema(problems))
    dataset = load_problems(f"dapo_math_17k@{path}", instruction=None)
    assert (contents(dataset), dataset["solution"][:]) == (["B?"], ["2"])
    assert messages() == [
        "dapo_math_17k: 5 examples read, 3 duplicates dropped, 1 problems with conflicting answers dropped, 1 kept"
    ]


def test_unknown_wording_of_the_dapo_instruction_is_logged(tmp_path, messages):
    examples = dapo_original([("A?", "1"), ("B?", "2")])
    examples[1]["prompt"][0]["content"] = "Solve this. B?"
    dataset = load_problems(f"dapo_math_17k@{write(tmp_path / 'dapo.parquet', examples)}", instruction=None)
    assert contents(dataset) == ["A?", "Solve this. B?"]
    assert "1 prompts do not contain DAPO's instruction" in messages()[0]


def test_large_dapo_in_several_batches(tmp_path):
    problems = [(f"Problem {i % 700}", str(i % 700)) for i in range(25_000)]
    path = write(tmp_path / "dapo.parquet", dapo_original(problems))
    dataset = load_problems(f"dapo_math_17k@{path}", instruction=None)
    assert contents(dataset) == [f"Problem {i}" for i in range(700)]
    assert dataset["solution"][:] == [str(i) for i in range(700)]


def test_wrong_dapo_schema(tmp_path):
    examples = dapo_original([("A?", "1"), ("B?", "2")])
    del examples[0]["reward_model"], examples[1]["reward_model"]
    with pytest.raises(ValueError, match="no column 'reward_model'; the columns are 'data_source', 'prompt'"):
        load_problems(f"dapo_math_17k@{write(tmp_path / 'a.parquet', examples)}")
    examples = dapo_processed([("A?", "1")])
    del examples[0]["solution"]
    with pytest.raises(ValueError, match="no column 'solution'"):
        load_problems(f"dapo_math_17k@{write(tmp_path / 'b.parquet', examples)}")
    examples = dapo_original([("A?", "1"), ("B?", "2")])
    examples[1]["prompt"] *= 2
    with pytest.raises(ValueError, match="several messages or none"):
        load_problems(f"dapo_math_17k@{write(tmp_path / 'c.parquet', examples)}")
    examples = dapo_original([("A?", "1"), ("B?", "2")])
    examples[1]["prompt"][0]["content"] = None
    with pytest.raises(ValueError, match="a message has no content"):
        load_problems(f"dapo_math_17k@{write(tmp_path / 'd.parquet', examples)}")
    examples = [{"prompt": [{"role": "user", "content": "A?"}], "reward_model": "1"}]
    with pytest.raises(ValueError, match=r"not DAPO's schema.*found"):
        load_problems(f"dapo_math_17k@{write(tmp_path / 'e.parquet', examples)}")
    for problem, answer, says in [("A?", None, r"'A\?' has no usable answer"), ("  ", "1", "has no problem")]:
        path = write(tmp_path / f"f{len(says)}.parquet", dapo_original([("B?", "2"), (problem, answer)]))
        with pytest.raises(ValueError, match=says):
            load_problems(f"dapo_math_17k@{path}")


# AIME 1983 to 2022: no later problem is accepted


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl", ""])
def test_aime_years(tmp_path, ending, messages):
    path = write(tmp_path / f"aime{ending}", aime_examples(2024, 1983, 2022, 2023, 1999, 2025, 1999))
    dataset = load_problems(f"aime_1983_2022@{path}", instruction=None)
    assert contents(dataset) == ["Problem of 1983", "Problem of 2022", "Problem of 1999"]
    assert dataset["solution"][:] == ["33"] * 3
    assert set(dataset["source"]) == {"aime_1983_2022"}
    assert messages() == [
        "aime_1983_2022: 7 examples read, 3 after 2022 dropped, 1 duplicates dropped, "
        "0 problems with conflicting answers dropped, 3 kept"
    ]


@pytest.mark.parametrize("missing", ["Year", "ID"])
def test_aime_year_from_one_column(tmp_path, missing):
    examples = [
        {key: value for key, value in example.items() if key != missing}
        for example in aime_examples(1984, 2022, 2023, 2024)
    ]
    dataset = load_problems(f"aime_1983_2022@{write(tmp_path / 'aime.jsonl', examples)}", instruction=None)
    assert contents(dataset) == ["Problem of 1984", "Problem of 2022"]


@pytest.mark.parametrize(
    "change",
    [
        {"Year": None},
        {"Year": None, "ID": None},
        {"Year": "unknown"},
        {"Year": "20 22"},
        {"Year": "24"},
        {"Year": "1924", "ID": None},
        {"Year": "2021"},  # its ID says 2024
        {"ID": "2021-1"},  # its year says 2024
        {"Year": "", "ID": "2021-1"},
    ],
)
def test_uncertain_aime_year(tmp_path, change):
    examples = [example | {"Year": str(example["Year"])} for example in aime_examples(1983, 2024)]
    examples[1] |= change
    path = write(tmp_path / "aime.jsonl", examples)
    with pytest.raises(ValueError, match=r"aime_1983_2022: the year of example 1 is uncertain.*Correct or remove"):
        load_problems(f"aime_1983_2022@{path}")


def test_aime_without_years(tmp_path):
    examples = [{"Question": "A?", "Answer": "1"}]
    with pytest.raises(ValueError, match="no column 'Year' or 'ID'; the columns are 'Question', 'Answer'"):
        load_problems(f"aime_1983_2022@{write(tmp_path / 'a.csv', examples)}")
    examples = [{"ID": "17", "Question": "A?", "Answer": "1"}]
    with pytest.raises(ValueError, match="the year of example 0 is uncertain"):
        load_problems(f"aime_1983_2022@{write(tmp_path / 'b.jsonl', examples)}")


def test_aime_with_no_early_problem(tmp_path):
    path = write(tmp_path / "late.csv", aime_examples(2023, 2024))
    with pytest.raises(ValueError, match=r"aime_1983_2022: no problem is left of the 2 examples in .*late\.csv"):
        load_problems(f"aime_1983_2022@{path}")


def test_answers_that_a_csv_made_numbers(tmp_path):
    (tmp_path / "ints.csv").write_text("ID,Year,Question,Answer\n1983-1,1983,A?,033\n1984-1,1984,B?,7\n")
    assert load_problems(f"aime_1983_2022@{tmp_path / 'ints.csv'}")["solution"][:] == ["33", "7"]
    path = write(tmp_path / "floats.parquet", [{"Year": 1983.0, "Question": "A?", "Answer": 33.0}])
    assert load_problems(f"aime_1983_2022@{path}")["solution"][:] == ["33"]
    (tmp_path / "gap.csv").write_text("ID,Year,Question,Answer\n1983-1,1983,A?,033\n1984-1,1984,B?,\n")
    with pytest.raises(ValueError, match=r"'B\?' has no usable answer"):
        load_problems(f"aime_1983_2022@{tmp_path / 'gap.csv'}")


# Evaluation sets


@pytest.mark.parametrize("name", EVALUATION_EXAMPLES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_evaluation_sets(tmp_path, name, split, messages):
    path = write(tmp_path / "examples.jsonl", EVALUATION_EXAMPLES[name])
    dataset = load_problems(f"{name}@{path}", split)
    assert contents(dataset) == [
        DAPO_BEFORE + problem + DAPO_AFTER for problem in ("P1", "P0", "P1")
    ]  # no example dropped
    assert dataset["solution"][:] == ["33"] * 3
    assert set(dataset["source"]) == {name}
    assert messages() == [f"{name}: 3 examples read, all kept"]


def test_evaluation_set_with_a_gap(tmp_path):
    examples = EVALUATION_EXAMPLES["aime24"]
    path = write(tmp_path / "a.jsonl", [examples[0], examples[1] | {"answer": None}])
    with pytest.raises(ValueError, match="aime24: example 1 has no usable answer"):
        load_problems(f"aime24@{path}")
    path = write(tmp_path / "b.jsonl", [examples[0], examples[1] | {"problem": " "}])
    with pytest.raises(ValueError, match="aime24: example 1 has no string in column 'problem'"):
        load_problems(f"aime24@{path}")
    path = write(tmp_path / "c.jsonl", [{"problem": "P", "result": "1"}])
    with pytest.raises(
        ValueError, match=r"aime24: there is no column 'answer'; the columns are 'problem', 'result'.*own"
    ):
        load_problems(f"aime24@{path}")


def test_the_splits_and_configurations_of_a_copy(tmp_path):
    """A copy has the folders of the hub. The set's split is read, or the only one there is."""
    examples = EVALUATION_EXAMPLES["math500"]
    write(tmp_path / "hub" / "train.jsonl", examples[:1])
    write(tmp_path / "hub" / "test.jsonl", examples[1:])
    assert contents(load_problems(f"math500@{tmp_path / 'hub'}", instruction=None)) == ["P0", "P1"]
    two = DatasetDict(train=Dataset.from_list(examples), dev=Dataset.from_list(examples))
    two.save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match="math500: there is no split 'test'; the splits are 'train', 'dev'"):
        load_problems(f"math500@{tmp_path / 'disk'}")

    folder = tmp_path / "processed"
    write(folder / "en" / "train-0.parquet", dapo_processed([("A?", "1")]))
    write(folder / "cn" / "train-0.parquet", dapo_processed([("求?", "2")]))
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n" for name in ("en", "cn")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert contents(load_problems(f"dapo_math_17k@{folder}", config="cn", instruction=None)) == ["求?"]
    with pytest.raises(ValueError, match=r"processed cannot be read .*pass one as config"):
        load_problems(f"dapo_math_17k@{folder}")
    with pytest.raises(ValueError, match="config='cn' needs a single data set"):
        load_problems(f"dapo_math_17k@{folder}+starter", config="cn")


# Mixtures


def test_mixture(tmp_path):
    dapo = write(tmp_path / "dapo.parquet", dapo_original(PROBLEMS))
    aime = write(tmp_path / "aime.csv", aime_examples(1990, 2024, 1991))
    mine = write(tmp_path / "mine.jsonl", [{"q": "Mine?", "a": 5}])
    name = f"dapo_math_17k@{dapo}+aime_1983_2022@{aime}+{mine}+starter"
    arguments = {"columns": {"prompt": "q", "solution": "a"}, "size": 4}
    dataset = load_problems(name, **arguments)
    assert dataset["source"][:] == ["dapo_math_17k"] * 3 + ["aime_1983_2022"] * 2 + [str(mine)] + ["starter"] * 4
    assert dataset["solution"][:6] == ["34", "33", "-7", "33", "33", "5"]
    assert all(DAPO_BEFORE in content for content in contents(dataset)[:6])
    assert dataset.features == load_problems("starter", size=1).features
    assert dataset.to_list() == load_problems(name, **arguments).to_list()
    assert "2024" not in " ".join(contents(dataset))


def test_evaluation_sets_stay_out_of_mixtures_for_training(tmp_path):
    dapo = write(tmp_path / "dapo.parquet", dapo_original(PROBLEMS))
    aime = write(tmp_path / "aime.jsonl", EVALUATION_EXAMPLES["aime24"])
    with pytest.raises(ValueError, match="aime24 cannot be mixed with dapo_math_17k: it is for evaluation"):
        load_problems(f"dapo_math_17k@{dapo}+aime24@{aime}")
    both = load_problems(f"aime24@{aime}+aime25@{aime}")
    assert both["source"][:] == ["aime24"] * 3 + ["aime25"] * 3


def test_training_sets_have_no_test_split():
    for name in ("dapo_math_17k", "aime_1983_2022"):
        with pytest.raises(ValueError, match=f"{name} is for training and has no split 'test'; evaluate on aime24, "):
            load_problems(name, "test")
