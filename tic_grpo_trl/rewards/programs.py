"""Reward programs: run each one against its problem's tests in the sandbox."""

import json
import logging
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from .answers import completion_text
from .isolation import GUARANTEES, sandbox_report
from .mathematics import check_workers, default_workers
from .sandbox import DEFAULT_LIMITS, Limits, run_program


logger = logging.getLogger(__name__)

NO_CODE, SKIPPED, PASSED, TIMEOUT = "no code", "skipped: no tests", "passed", "timeout"
FAILURES = {"timeout": TIMEOUT, "memory": "out of memory", "output": "too much output"}  # by status
FENCE = "```"
LANGUAGES = ("", "python", "py", "python3")  # marks of a block of Python


@dataclass(frozen=True)
class IOTest:
    """Hold one test."""

    stdin: str
    expected: str
    arguments: tuple[Any, ...] | None = None  # of a call of the problem's function; `None`: run with `stdin`


@dataclass(frozen=True)
class Problem:
    """Hold a problem's tests."""

    tests: tuple[IOTest, ...]
    function: str | None = None  # to call, if there is one


def parse_problem(solution: Any) -> Problem | None:
    """Read the JSON of a `solution` column (format: docs/code_reward.md). Return `None` if it has no readable tests."""
    try:
        parsed = json.loads(solution)
        function = parsed.get("function")
        tests = tuple(_parse_test(test, function) for test in parsed["tests"])
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
        return None
    return Problem(tests, function) if tests else None


def _parse_test(test: dict[str, Any], function: Any) -> IOTest:
    given, expected, kind = test["input"], test["output"], test["type"]
    if not isinstance(given, str) or not isinstance(expected, str):
        raise TypeError("input and output must be strings")
    if kind == "stdin":
        return IOTest(given, expected)
    if kind != "functional" or not isinstance(function, str):
        raise ValueError(f"type is {kind!r} and function {function!r}")
    json.loads(expected)
    return IOTest("", expected, tuple(json.loads(line) for line in given.split("\n") if line.strip()))


def extract_code(completion: str) -> str | None:
    """Return the last closed Python block after `</think>`, or `None` if there is none or a `<think>` is still open."""
    text = completion.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    found: list[str] = []
    block: list[str] | None = None
    language = ""
    for line in text.splitlines():
        stripped = line.strip()
        if block is None and stripped.startswith(FENCE):
            block, language = [], stripped[len(FENCE) :].strip().lower()
        elif block is not None and stripped == FENCE:
            found = block if language in LANGUAGES else found
            block = None
        elif block is not None:
            block.append(line)
    code = textwrap.dedent("\n".join(found))
    return code if code.strip() else None


def same_output(printed: str, expected: str) -> bool:
    """Compare outputs line by line as LiveCodeBench does: without the spaces around lines, and numbers as decimals."""
    lines, correct = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(lines) == len(correct) and all(map(_same_line, lines, correct))


def _same_line(a: str, b: str) -> bool:
    try:
        return a == b or list(map(Decimal, a.split())) == list(map(Decimal, b.split()))
    except InvalidOperation:  # not a number, or a comparison with a signalling NaN
        return False


def same_value(answer: str | None, expected: str) -> bool:
    """Compare two JSON strings by value. JSON makes tuples lists, and 1 equals 1.0."""
    try:
        return answer is not None and json.loads(answer) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


class CodeReward:
    """Reward programs that pass their problem's tests, in TRL's reward-function signature.

    Each test runs separately in the sandbox (`sandbox.run_program`). The program sees only the test's input. The
    expected output stays in this process, which compares. After the first failed test, the others do not run.

    Args:
        limits: what each run may use.
        workers: programs to run at the same time. Default: this process's share of the host's cores, at most 16.
        partial: return the fraction of tests passed, which runs all of them, instead of 1.0 for all and 0.0 otherwise.
        require_isolation: refuse to run any program if the sandbox on this host lacks a guarantee (`sandbox_report`).
            `False` only warns, for hosts that are expendable.

    Raises:
        ValueError: if `workers` is not positive.
    """

    def __init__(
        self,
        limits: Limits = DEFAULT_LIMITS,
        workers: int | None = None,
        partial: bool = False,
        require_isolation: bool = True,
    ):
        check_workers(workers)
        self.__name__ = "code_reward"
        self.limits, self.workers, self.partial = limits, workers, partial
        self.require_isolation, self._isolation_checked = require_isolation, False

    def check_isolation(self) -> None:
        """Test the sandbox and log the result, once. Raise `RuntimeError` if it fails or lacks a required guarantee."""
        if self._isolation_checked:
            return
        report = sandbox_report()
        logger.info("Sandbox for candidate programs on this host:\n%s", report)
        if report.missing:
            missing = "; ".join(f"{name} ({GUARANTEES[name]})" for name in report.missing)
            if self.require_isolation:
                raise RuntimeError(
                    f"The sandbox cannot isolate candidate programs on this host. Missing: {missing}. In force: "
                    f"{', '.join(report.mechanisms) or 'resource limits alone'}. Enable user namespaces or Landlock "
                    "(see docs/code_reward.md) or, if the host is expendable, use CodeReward(require_isolation=False)."
                )
            logger.warning("Candidate programs run without full isolation. Missing: %s.", missing)
        self._isolation_checked = True

    def __call__(
        self,
        completions: list[Any],
        solution: list[Any] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Score a batch.

        Args:
            completions: (B,) strings or lists of messages.
            solution: (B,) problems as `parse_problem` reads them.
            log_extra, log_metric: TRL's logging functions. They receive the column `code_verdict` and, as fractions of
                the batch, `code_reward/timeout`, `code_reward/no_code` and `code_reward/skipped`.

        Returns:
            (B,) rewards: 1.0 if all tests pass. 0.0 otherwise, and for a completion without code. With `partial`, the
            fraction of tests passed. `None` if the solution holds no tests.

        Raises:
            ValueError: if the data set has no column `solution`, or its length differs from that of `completions`.
            RuntimeError: if the sandbox does not work, or lacks a guarantee and `require_isolation` is set.
        """
        if solution is None or len(solution) != len(completions):
            raise ValueError(
                f"code_reward got {len(completions)} completions and "
                f"{'no' if solution is None else len(solution)} solutions: the data set needs the column `solution`."
            )
        self.check_isolation()
        with ThreadPoolExecutor(self.workers or default_workers()) as pool:
            scored = list(pool.map(self._score, completions, solution))
        verdicts = [verdict for _, verdict in scored]
        if log_extra is not None:
            log_extra("code_verdict", verdicts)
        if log_metric is not None:
            for name, start in (("timeout", TIMEOUT), ("no_code", NO_CODE), ("skipped", SKIPPED)):
                share = sum(verdict.startswith(start) for verdict in verdicts) / max(1, len(verdicts))
                log_metric(f"code_reward/{name}", share)
        return [reward for reward, _ in scored]

    def _score(self, completion: Any, solution: Any) -> tuple[float | None, str]:
        """Return a completion's reward and verdict."""
        problem = parse_problem(solution)
        if problem is None:
            return None, SKIPPED
        code = extract_code(completion_text(completion))
        if code is None:
            return 0.0, NO_CODE
        verdict, passed = PASSED, 0
        for number, test in enumerate(problem.tests, 1):
            failure, details = self._run_test(code, test, problem.function)
            passed += not failure
            if failure and verdict == PASSED:
                verdict = f"{failure} in test {number}{details}"
            if failure and not self.partial:
                break
        return (passed / len(problem.tests) if self.partial else float(verdict == PASSED)), verdict

    def _run_test(self, code: str, test: IOTest, function: str | None) -> tuple[str, str]:
        """Return why the program fails a test, empty if it passes, and details to append to the verdict."""
        if test.arguments is None:
            result = run_program(code, test.stdin, self.limits)
            correct = same_output(result.stdout, test.expected)
        else:
            result = run_program(code, limits=self.limits, function=function, arguments=test.arguments)
            correct = same_value(result.answer, test.expected)
        if result.status == "error":
            return "runtime error", f": {result.error[:200]}"
        return FAILURES.get(result.status) or ("" if correct else "wrong answer"), ""


code_reward = CodeReward()
