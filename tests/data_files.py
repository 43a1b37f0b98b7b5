"""Small data files with the real schemas of the hub data sets."""

import base64
import json
import pickle
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from tic_grpo_trl.data import MATH_INSTRUCTION


DAPO_BEFORE, DAPO_AFTER = MATH_INSTRUCTION.split("{problem}")
PROBLEMS = [
    (r"Let $x_{1} = \frac{a}{b}$ and {problem}. Find $x$.", "34"),
    ("How many ways?", "033"),
    ("  How   many\nways?", "33"),
    ("求 $x$ 的值。", "-7"),
    ("How many ways?", "33"),
]
EVALUATION_EXAMPLES = {
    "aime24": [
        {"id": 60 + i, "problem": f"P{i}", "solution": "Long.", "answer": "033", "url": "u", "year": "2024"}
        for i in (1, 0, 1)
    ],
    "aime25": [{"id": str(i), "problem": f"P{i}", "answer": "033", "solution": "", "year": "2025"} for i in (1, 0, 1)],
    "math500": [
        {"problem": f"P{i}", "solution": "S", "answer": "33", "subject": "A", "level": 2, "unique_id": f"{i}.json"}
        for i in (1, 0, 1)
    ],
}


def write(path, examples):
    """Write examples to a file of the type that the name ends in, or to a `save_to_disk` folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    elif path.suffix == ".json":
        path.write_text(json.dumps(examples))
    elif path.suffix == ".csv":
        Dataset.from_list(examples).to_csv(path)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(examples), path)
    else:
        Dataset.from_list(examples).save_to_disk(path)
    return path


def dapo_original(problems):
    return [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO_BEFORE + problem + DAPO_AFTER, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": str(i)},
        }
        for i, (problem, answer) in enumerate(problems)
    ]


def dapo_processed(problems):
    return [
        {
            "prompt": problem,
            "solution": answer,
            "data_source": "math_dapo",
            "source_prompt": [{"content": DAPO_BEFORE + problem + DAPO_AFTER, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": str(i)},
        }
        for i, (problem, answer) in enumerate(problems)
    ]


def aime_examples(*years):
    return [
        {
            "ID": f"{year}-{number}",
            "Year": year,
            "Problem Number": number,
            "Question": f"Problem of {year}",
            "Answer": "033",
            "Part": None if year < 2000 else "I",
        }
        for number, year in enumerate(years, 1)
    ]


def contents(dataset):
    return [prompt[0]["content"] for prompt in dataset["prompt"]]


def packed(value) -> str:
    """Encode private tests as LiveCodeBench does: a pickle, compressed with zlib, in base64."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]


def livecodebench_example(**changes):
    return {
        "question_title": "Sum",
        "question_content": "Add {two} numbers.\n",
        "platform": "atcoder",
        "question_id": "abc300_a",
        "contest_id": "abc300",
        "contest_date": "2023-05-01T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(STDIN),
        "private_test_cases": packed(json.dumps(STDIN * 2)),
        "metadata": "{}",
    } | changes
