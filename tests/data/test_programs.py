"""LiveCodeBench: prompts, tests in both encodings, and pickles that try to run something."""

import base64
import json
import os
import pickle
import zlib

import pytest
from data_files import STDIN, packed
from data_files import livecodebench_example as example
from datasets import Dataset

from tic_grpo_trl.data import CODE_INSTRUCTION, load_problems
from tic_grpo_trl.data.programs import decode_tests


FUNCTIONAL = [{"input": '[1, 2]\n"x"', "output": "3", "testtype": "functional"}]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_examples(tmp_path, kind):
    functional = example(
        starter_code="class Solution:\n    def add(self, a: List[int], b: str) -> int:\n        ",
        public_test_cases=json.dumps(FUNCTIONAL),
        private_test_cases=json.dumps(FUNCTIONAL),
        metadata=json.dumps({"func_name": "add"}),
    )
    path = tmp_path / f"test.{kind}"
    examples = Dataset.from_list([example(), functional])
    examples.to_parquet(path) if kind == "parquet" else examples.to_json(path)
    dataset = load_problems(f"livecodebench@{path}")
    assert dataset.column_names == ["prompt", "solution", "source"]
    assert set(dataset["source"]) == {"livecodebench"}
    program, method = (prompt[0]["content"] for prompt in dataset["prompt"])
    before, after = CODE_INSTRUCTION.split("{problem}")
    task = "Add {two} numbers.\n\nRead the input from standard input and write the answer to standard output."
    assert program == before + task + after
    assert method.startswith(f"{before}Add {{two}} numbers.\n\nComplete this starter code")
    assert "```python\nclass Solution:\n    def add(self, a: List[int], b: str) -> int:\n```" in method
    assert "standard input" not in method
    decoded = {"input": "1 2\n", "output": "3\n", "type": "stdin"}
    assert json.loads(dataset[0]["solution"]) == {"tests": [decoded] * 3, "function": None}
    decoded = {"input": '[1, 2]\n"x"', "output": "3", "type": "functional"}
    assert json.loads(dataset[1]["solution"]) == {"tests": [decoded] * 2, "function": "add"}


def test_own_instruction(tmp_path):
    Dataset.from_list([example()]).to_parquet(tmp_path / "a.parquet")
    dataset = load_problems(f"livecodebench@{tmp_path / 'a.parquet'}", instruction="Code: {problem}")
    assert dataset[0]["prompt"][0]["content"].startswith("Code: Add {two} numbers.")


def test_folder_with_the_loader_script(tmp_path):
    """The loader script in a copy of the repository does not run."""
    folder = tmp_path / "lcb"
    folder.mkdir()
    (folder / "code_generation_lite.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name in ("test.jsonl", "test2.jsonl"):
        Dataset.from_list([example()]).to_json(folder / name)
    assert len(load_problems(f"livecodebench@{folder}")) == 2
    assert not (tmp_path / "ran").exists()


class RunsSomething:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: [json.dumps(STDIN), bad]])
def test_malicious_pickle_does_not_run(tmp_path, wrap):
    bad = packed(wrap(RunsSomething(tmp_path / "ran")))
    with pytest.raises(
        ValueError,
        match=r"tests cannot be decoded: the pickle refers to posix\.system, but tests must be plain strings",
    ):
        decode_tests(bad)
    Dataset.from_list([example(), example(private_test_cases=bad)]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"livecodebench: example 1 cannot be used: tests cannot be decoded"):
        load_problems(f"livecodebench@{tmp_path / 'a.parquet'}")
    assert not (tmp_path / "ran").exists()
    pickle.loads(zlib.decompress(base64.b64decode(bad)))  # the attack is real: an ordinary unpickler runs it
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_no_global_in_any_pickle_protocol(protocol):
    for value in (dict.fromkeys, len, ValueError("x")):
        text = base64.b64encode(zlib.compress(pickle.dumps(value, protocol=protocol))).decode()
        with pytest.raises(ValueError, match="the pickle refers to"):
            decode_tests(text)
    text = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(STDIN), protocol=protocol))).decode()
    assert decode_tests(text)[0]["output"] == "3\n"


@pytest.mark.parametrize(
    "encoded",
    [
        "",
        "not base64",
        base64.b64encode(b"not zlib").decode(),
        base64.b64encode(zlib.compress(b"not a pickle")).decode(),
        packed("not json"),
        packed(STDIN),
        packed(json.dumps(STDIN))[:-8],
        "3",
        "{}x",
        '[{"input": "1"}]',
        '["stdin"]',
        '[{"input": 1, "output": "1", "testtype": "stdin"}]',
        '[{"input": "1", "output": "1", "testtype": "interactive"}]',
    ],
)
def test_broken_tests(encoded):
    with pytest.raises(ValueError, match="test"):
        decode_tests(encoded)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"private_test_cases": "?"}, "example 0 cannot be used: tests cannot be decoded"),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "example 0 cannot be used: there are no tests"),
        ({"public_test_cases": json.dumps(FUNCTIONAL)}, "example 0 cannot be used: the tests are functional, but"),
        ({"metadata": "?"}, "example 0 cannot be used"),
        ({"question_content": None}, "example 0 cannot be used"),
    ],
)
def test_broken_examples(tmp_path, changes, says):
    Dataset.from_list([example(**changes)]).to_json(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=f"livecodebench: {says}"):
        load_problems(f"livecodebench@{tmp_path / 'a.jsonl'}")


def test_missing_column(tmp_path):
    Dataset.from_list([example()]).remove_columns("metadata").to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match="livecodebench: there is no column 'metadata'; the columns are 'question_title'"
    ):
        load_problems(f"livecodebench@{tmp_path / 'a.parquet'}")
