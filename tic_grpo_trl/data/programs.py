"""Convert LiveCodeBench problems without its loader script and without executing its pickles.

Schema: https://huggingface.co/datasets/livecodebench/code_generation_lite
"""

import base64
import io
import json
import pickle
import zlib
from typing import Any


COLUMNS = ("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata")
STDIN_FORMAT = "Read the input from standard input and write the answer to standard output."
STARTER_FORMAT = "Complete this starter code and keep its names:\n\n```python\n{starter_code}\n```"


class _TextOnlyUnpickler(pickle.Unpickler):
    """Unpickle strings, numbers and containers only; reject a pickle that names any class or function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle refers to {module}.{name}, but tests must be plain strings")


def decode_tests(encoded: str) -> list[dict[str, str]]:
    """Decode test cases: a JSON list, or a pickled JSON string, compressed with zlib and encoded in base64.

    The pickle may contain only plain values. No class or function is looked up, so no code can run.
    """
    try:
        tests = json.loads(encoded)
    except json.JSONDecodeError:
        try:
            packed = zlib.decompress(base64.b64decode(encoded, validate=True))
            tests = json.loads(_TextOnlyUnpickler(io.BytesIO(packed)).load())
        except Exception as error:  # a corrupt pickle may raise anything
            raise ValueError(f"tests cannot be decoded: {error}") from error
    try:
        decoded = [{"input": test["input"], "output": test["output"], "type": test["testtype"]} for test in tests]
    except (TypeError, KeyError) as error:
        raise ValueError("tests must be a list of objects with input, output and testtype") from error
    for test in decoded:
        if test["type"] not in ("stdin", "functional") or not all(isinstance(value, str) for value in test.values()):
            raise ValueError(f"a test must consist of strings and have type stdin or functional: {str(test)[:200]}")
    return decoded


def problem_text(content: str, starter_code: str | None) -> str:
    """Return the problem and what its tests expect: a program that reads standard input, or completed starter code."""
    if starter_code and starter_code.strip():
        return f"{content.strip()}\n\n" + STARTER_FORMAT.replace("{starter_code}", starter_code.rstrip())
    return f"{content.strip()}\n\n{STDIN_FORMAT}"


def solution_text(public: str, private: str, metadata: str) -> str:
    """Return the `solution` column: JSON of `tests` (public, then private) and `function` (name; null for programs)."""
    tests = decode_tests(public) + decode_tests(private)
    function = json.loads(metadata or "{}").get("func_name")
    if not tests:
        raise ValueError("there are no tests")
    if function is None and any(test["type"] == "functional" for test in tests):
        raise ValueError("the tests are functional, but the metadata has no func_name")
    return json.dumps({"tests": tests, "function": function}, ensure_ascii=False)
