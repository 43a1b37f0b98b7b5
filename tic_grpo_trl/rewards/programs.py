"""The reward for programs: each runs against the problem's tests in the sandbox."""

import json
import logging
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from .answers import completion_text
from .isolation import HOLDS, sandbox_report
from .mathematics import check_workers, default_workers
from .sandbox import DEFAULT_LIMITS, Limits, Result, run_program


logger = logging.getLogger(__name__)

NO_CODE, SKIPPED, PASSED, TIMEOUT = "no code", "skipped: no tests", "passed", "timeout"
FENCE = "```"
LANGUAGES = ("", "python", "py", "python3")


@dataclass(frozen=True)
class IOTest:
    """One test of a program: `arguments` are for a call of the problem's function, `None` for a run with `stdin`."""

    stdin: str
    expected: str
    arguments: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Problem:
    """A problem's tests and the name of the function to call, if there is one."""

    tests: tuple[IOTest, ...]
    function: str | None = None


def parse_problem(solution: Any) -> Problem | None:
    """Reads a `solution` column.

    Args:
        solution: JSON text, `{"tests": [{"input", "output", "type"}, …], "function": name or null}`. With the type
            `stdin`, `input` is the standard input and `output` what the program has to print; with `functional`,
            `input` has one JSON value per line for each argument of `function`, and `output` is its result as JSON.

    Returns:
        The problem, `None` for anything else: another column's content, no tests, a test that cannot be read.
    """
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
        raise TypeError("input and output are text")
    if kind == "stdin":
        return IOTest(given, expected)
    if kind != "functional" or not isinstance(function, str):
        raise ValueError(f"type is {kind!r} and function {function!r}")
    json.loads(expected)
    return IOTest("", expected, tuple(json.loads(line) for line in given.split("\n") if line.strip()))


def extract_code(completion: str) -> str | None:
    """The last closed block of Python between fences (marked python, py or not at all) after `</think>`.

    Returns:
        The code without common indentation; `None` where there is no such block, or a `<think>` is still open.
    """
    text = completion.rpartition("</think>")[2]
    found: list[str] | None = None
    block: list[str] | None = None
    language = ""
    if "<think>" in text:
        return None
    for line in text.splitlines():
        stripped = line.strip()
        if block is None and stripped.startswith(FENCE):
            block, language = [], stripped[len(FENCE) :].strip().lower()
        elif block is not None and stripped == FENCE:
            if language in LANGUAGES:
                found = block
            block = None
        elif block is not None:
            block.append(line)
    code = textwrap.dedent("\n".join(found)) if found is not None else ""
    return code if code.strip() else None


def same_output(printed: str, expected: str) -> bool:
    """Whether two outputs agree line by line, spaces around a line and empty lines at the end apart.

    A line may also agree number by number (`1.50 2` and `1.5 2.0`, as decimals), as in LiveCodeBench's comparison.
    """
    lines, right = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(lines) == len(right) and all(a == b or _same_numbers(a, b) for a, b in zip(lines, right, strict=True))


def _same_numbers(a: str, b: str) -> bool:
    try:
        return [Decimal(word) for word in a.split()] == [Decimal(word) for word in b.split()]
    except InvalidOperation:  # not a number, or a comparison with a signalling NaN
        return False


def same_value(answer: str | None, expected: str) -> bool:
    """Whether two JSON texts hold equal values; tuples have become lists, and 1 equals 1.0."""
    try:
        return answer is not None and json.loads(answer) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


class CodeReward:
    """Rewards programs that pass their problem's tests, in TRL's reward-function signature.

    Every test is a run of its own in the sandbox (`sandbox.run_program`). The program sees the test's input alone;
    what it should answer stays in this process, which compares. After the first test that fails, the rest is not run.

    Args:
        limits: what each run may use.
        workers: programs that run at a time; by default this process' share of the host's cores, at most 16.
        partial: reward the share of tests passed (all of them are run then) instead of 1.0 for all and else 0.0.
        require_isolation: refuse to run any program where the sandbox lacks something on this host (`sandbox_report`).
            `False` runs them nevertheless, with a warning: for hosts that are themselves expendable.

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
        self.require_isolation = require_isolation
        self._checked = False

    def check_isolation(self) -> None:
        """Tries the sandbox out, logs what holds, once.

        Raises:
            RuntimeError: if something is missing and `require_isolation` is set, or the sandbox does not work at all.
        """
        if self._checked:
            return
        report = sandbox_report()
        logger.info("The sandbox for candidate programs on this host:\n%s", report)
        if report.missing:
            lacking = "; ".join(f"{name} ({HOLDS[name]})" for name in report.missing)
            if self.require_isolation:
                raise RuntimeError(
                    f"The sandbox cannot hold candidate programs back on this host. Missing: {lacking}. In force: "
                    f"{', '.join(report.means) or 'resource limits alone'}. Allow user namespaces or Landlock (see "
                    "docs/code_reward.md) or, where the host is expendable, use CodeReward(require_isolation=False)."
                )
            logger.warning("Candidate programs run without full isolation. Missing: %s.", lacking)
        self._checked = True

    def __call__(
        self,
        completions: list[Any],
        solution: list[Any] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Scores a batch.

        Args:
            completions: completions, length B; plain text or lists of messages.
            solution: problems as `parse_problem` reads them, length B.
            log_extra, log_metric: as TRL passes them. Logged are the column `code_verdict` and, as shares of this
                batch, `code_reward/timeout`, `code_reward/no_code` and `code_reward/skipped`.
            **kwargs: the other columns and arguments that TRL passes, unused.

        Returns:
            Rewards, length B: 1.0 where all tests pass, 0.0 otherwise and for a completion without code (with
            `partial`, the share of tests passed); `None` where the solution holds no tests.

        Raises:
            ValueError: if the data set has no column `solution`, or its length is another.
            RuntimeError: as [`check_isolation`] does.
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
        """A completion's reward and verdict."""
        problem = parse_problem(solution)
        if problem is None:
            return None, SKIPPED
        code = extract_code(completion_text(completion))
        if code is None:
            return 0.0, NO_CODE
        verdict, passed = PASSED, 0
        for number, test in enumerate(problem.tests, 1):
            failure = self._failure(code, test, problem.function)
            if failure is None:
                passed += 1
                continue
            if verdict == PASSED:
                verdict = f"{failure[0]} in test {number}{failure[1]}"
            if not self.partial:
                break
        share = passed / len(problem.tests)
        return (share if self.partial else float(share == 1)), verdict

    def _failure(self, code: str, test: IOTest, function: str | None) -> tuple[str, str] | None:
        """`None` where the program passes the test, otherwise what went wrong and the details to put behind it."""
        if test.arguments is None:
            result = run_program(code, test.stdin, self.limits)
            right = same_output(result.stdout, test.expected)
        else:
            result = run_program(code, "", self.limits, function=function, arguments=test.arguments)
            right = same_value(result.answer, test.expected)
        if result.status == "ok":
            return None if right else ("wrong answer", "")
        return _describe(result)


def _describe(result: Result) -> tuple[str, str]:
    names = {"timeout": TIMEOUT, "memory": "out of memory", "output": "too much output"}
    if result.status in names:
        return names[result.status], ""
    return "runtime error", f": {result.error[:200]}"


code_reward = CodeReward()
