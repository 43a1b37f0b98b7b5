"""Check the code reward: parsing problems and completions, comparing outputs, rewards and logging."""

import json
import logging
import time

import pytest
from conftest import CPU, tiny_model, tiny_tokenizer
from datasets import Dataset

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.rewards import programs as code_module
from tic_grpo_trl.rewards.isolation import Report
from tic_grpo_trl.rewards.programs import (
    CodeReward,
    IOTest,
    Problem,
    extract_code,
    parse_problem,
    same_output,
    same_value,
)
from tic_grpo_trl.rewards.sandbox import Limits


DOUBLE = json.dumps(
    {
        "tests": [
            {"input": "1\n", "output": "2\n", "type": "stdin"},
            {"input": "21\n", "output": "42\n", "type": "stdin"},
            {"input": "-3\n", "output": "-6\n", "type": "stdin"},
        ],
        "function": None,
    }
)
PAIR = json.dumps(
    {
        "tests": [
            {"input": '[1, 2]\n"ab"', "output": '[3, "ba"]', "type": "functional"},
            {"input": '[]\n""', "output": '[0, ""]', "type": "functional"},
        ],
        "function": "pair",
    }
)


def block(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


def score(reward, completions, solutions):
    """Return the rewards, verdicts and metrics of a batch."""
    verdicts, metrics = {}, {}
    rewards = reward(
        prompts=["?"] * len(completions),
        completions=completions,
        solution=solutions,
        log_extra=verdicts.__setitem__,
        log_metric=metrics.__setitem__,
        source=["x"] * len(completions),
    )
    assert list(verdicts) == ["code_verdict"]
    assert set(metrics) == {"code_reward/timeout", "code_reward/no_code", "code_reward/skipped"}
    return rewards, verdicts["code_verdict"], metrics


@pytest.fixture(scope="module")
def reward():
    return CodeReward(Limits(wall_seconds=20), workers=2)


# Completions


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("```py\nprint(1)\n```", "print(1)"),
        ("```\nprint(1)\n```", "print(1)"),
        ("```Python\nprint(1)\n```  \n", "print(1)"),
        ("```python\nprint(1)\n```\nbetter:\n```python\nprint(2)\n```", "print(2)"),
        ("```python\nprint(1)\n```\nwhich prints\n```text\n1\n```", "print(1)"),
        ("```cpp\nint main() {}\n```", None),
        ("```python\nprint(1)", None),  # cut off
        ("```python\nprint(1)\n```\n```python\nprint(2)", "print(1)"),
        ("```python\n\n```", None),
        ("print(1)", None),
        ("", None),
        ("- so:\n  ```python\n  if x:\n      y\n  ```", "if x:\n    y"),
        ("<think>```python\nprint(1)\n```</think> no", None),
        ("<think>```python\nprint(1)\n```</think>```python\nprint(2)\n```", "print(2)"),
        ("<think>still\n```python\nprint(1)\n```", None),
        ("```python\ns = '```'\nprint(s)\n```", "s = '```'\nprint(s)"),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


# Problems


def test_parse_problem():
    assert parse_problem(DOUBLE) == Problem((IOTest("1\n", "2\n"), IOTest("21\n", "42\n"), IOTest("-3\n", "-6\n")))
    tests = (IOTest("", '[3, "ba"]', ([1, 2], "ab")), IOTest("", '[0, ""]', ([], "")))
    assert parse_problem(PAIR) == Problem(tests, "pair")


@pytest.mark.parametrize(
    "solution",
    [
        None,
        "42",
        "",
        "[]",
        "{}",
        '{"tests": []}',
        '{"tests": [{"input": "1", "output": "2"}]}',
        '{"tests": [{"input": "1", "output": 2, "type": "stdin"}]}',
        '{"tests": [{"input": "1", "output": "2", "type": "functional"}]}',
        '{"tests": [{"input": "one", "output": "2", "type": "functional"}], "function": "f"}',
        '{"tests": [{"input": "1", "output": "two", "type": "functional"}], "function": "f"}',
        "[" * 100_000,
    ],
)
def test_other_solutions_are_no_problems(solution):
    assert parse_problem(solution) is None


# Comparisons


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1 2  \r\n3\n\n", "1 2\n3\n", True),
        ("YES\n", "Yes\n", False),
        ("1\n2\n", "1 2\n", False),
        ("1.50 2\n", "1.5 2.0\n", True),
        ("0.1\n", "0.10000000000000001\n", False),
        ("1e3\n", "1000\n", True),
        ("12345678901234567890123\n", "12345678901234567890124\n", False),
        ("a 1.0\n", "a 1\n", False),
        ("a  b\n", "a b\n", False),
        ("1  2\n", "1 2\n", True),
        ("", "", True),
        ("", "0", False),
        ("nan\n", "nan\n", True),
        ("snan\n", "1\n", False),
        ("1e999999999999999999999\n", "1\n", False),
    ],
)
def test_same_output(printed, expected, same):
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("[1, 2]", "[1,2]", True),
        ("[2, 1]", "[1, 2]", False),
        ("1.0", "1", True),
        ('"1"', "1", False),
        ("null", "null", True),
        (None, "null", False),
        ("[1][1]", "[1]", False),
        ("9" * 5000, "9", False),
        ("[" * 100_000, "[]", False),
    ],
)
def test_same_value(answer, expected, same):
    assert same_value(answer, expected) is same


# Rewards


def test_rewards_and_verdicts(reward):
    right = "print(2 * int(input()))"
    answers = {
        right: "passed",
        "n = int(input())\nprint(2 * n if n > 0 else 0)": "wrong answer in test 3",
        "print(2 * int(input()) if False else 2)": "wrong answer in test 2",
        "n = int(input())\nprint(2 * n)\nif n == 21: raise ValueError('no\\nmore')": "runtime error in test 2: more",
        "import sys; sys.exit(3)": "runtime error in test 1: ",
        "x = bytearray(4 << 30)": "out of memory in test 1",
        "for _ in range(32): print('x' * (1 << 20))": "too much output in test 1",
    }
    completions = [block(code) for code in answers]
    completions += [[{"role": "assistant", "content": block(right)}], "print(2)", block(right)]
    solutions = [DOUBLE] * (len(answers) + 2) + ["42"]
    rewards, verdicts, metrics = score(reward, completions, solutions)
    assert verdicts == [*answers.values(), "passed", "no code", "skipped: no tests"]
    assert rewards == [1.0] + [0.0] * 6 + [1.0, 0.0, None]
    assert metrics == {"code_reward/timeout": 0.0, "code_reward/no_code": 0.1, "code_reward/skipped": 0.1}


def test_functions(reward):
    answers = {
        "class Solution:\n    def pair(self, xs: List[int], s: str): return sum(xs), s[::-1]": "passed",
        "def pair(xs, s): return [sum(xs), s[::-1]]": "passed",
        "def pair(xs, s): return [sum(xs), s]": "wrong answer in test 1",
        "def pair(xs, s): print([3, 'ba'])": "wrong answer in test 1",
        "def other(xs, s): return [sum(xs), s[::-1]]": (
            "runtime error in test 1: AttributeError: module 'candidate' has no attribute 'pair'"
        ),
    }
    rewards, verdicts, _ = score(reward, [block(code) for code in answers], [PAIR] * 5)
    assert verdicts == list(answers.values())
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_verdict_cannot_be_forged(reward):
    """Exiting early, printing a verdict or writing to every open descriptor earns nothing."""
    attempts = [
        "import os\nprint('passed')\nos._exit(0)",
        'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"exit_code": 0, "passed": true}\\n\')\n'
        "    except OSError: pass",
        "import gc, sys\nframe = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\n"
        "print([o for o in gc.get_objects() if isinstance(o, dict) and 'output' in o and 'input' in o])",
        "class Always:\n    __eq__ = lambda *_: True\n    __str__ = lambda _: ''\nprint(Always())",
    ]
    for solution in (DOUBLE, PAIR):
        rewards, verdicts, _ = score(reward, [block(code) for code in attempts], [solution] * 4)
        assert rewards == [0.0] * 4, verdicts


def test_timeouts_are_counted_and_run_side_by_side():
    reward = CodeReward(Limits(wall_seconds=3), workers=4)
    started = time.monotonic()
    rewards, verdicts, metrics = score(reward, [block("import time; time.sleep(30)")] * 4, [DOUBLE] * 4)
    assert rewards == [0.0] * 4
    assert verdicts == ["timeout in test 1"] * 4
    assert metrics["code_reward/timeout"] == 1.0
    assert time.monotonic() - started < 9  # 12 if run one after another


def test_partial_rewards_run_all_tests():
    reward = CodeReward(Limits(wall_seconds=20), partial=True)
    rewards, verdicts, _ = score(reward, [block("n = int(input())\nprint(abs(2 * n) if n != 1 else 0)")], [DOUBLE])
    assert rewards == [pytest.approx(1 / 3)]
    assert verdicts == ["wrong answer in test 1"]


def test_an_empty_batch_logs_the_same_names(reward):
    assert score(reward, [], []) == (
        [],
        [],
        dict.fromkeys(("code_reward/timeout", "code_reward/no_code", "code_reward/skipped"), 0.0),
    )


def test_without_logging(reward):
    assert reward(prompts=["?"], completions=["no code"], solution=[DOUBLE]) == [0.0]


def test_options_are_checked():
    with pytest.raises(ValueError, match="workers is 0: pass 1 or more"):
        CodeReward(workers=0)
    with pytest.raises(ValueError, match="1 completions and no solutions: the data set needs the column `solution`"):
        CodeReward()(prompts=["?"], completions=["x"])


def test_incomplete_isolation(monkeypatch, caplog):
    """Refused by default; otherwise one warning."""
    report = Report(mechanisms=("seccomp",), missing=("environment", "writing"))
    monkeypatch.setattr(code_module, "sandbox_report", lambda: report)
    with pytest.raises(
        RuntimeError, match=r"Missing: environment \(no other.*In force: seccomp.*require_isolation=False"
    ):
        CodeReward()(prompts=["?"], completions=[block("print(1)")], solution=[DOUBLE])
    lenient = CodeReward(require_isolation=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert lenient(prompts=["?"], completions=["none"], solution=[DOUBLE]) == [0.0]
    warnings = [record for record in caplog.records if "without full isolation" in record.message]
    assert len(warnings) == 1
    assert "environment" in warnings[0].message


def test_in_the_trainer(tmp_path):
    """Verdicts reach the table of completions, and metrics reach the log."""
    trainer = TICGRPOTrainer(
        model=tiny_model(),
        reward_funcs=CodeReward(Limits(wall_seconds=20)),
        args=TICGRPOConfig(
            output_dir=str(tmp_path),
            **CPU,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=4,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a b", "b c"], "solution": [DOUBLE, DOUBLE]}),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert list(trainer._logs["extra"]["code_verdict"]) == ["no code"] * 4
    assert trainer.state.log_history[0]["code_reward/no_code"] == 1.0
    assert trainer.state.log_history[0]["rewards/code_reward/mean"] == 0.0
