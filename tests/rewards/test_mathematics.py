r"""Check what math_reward accepts and that no expression can hang it, with real math-verify workers."""

import json
import pickle
import subprocess
import sys
import threading
import time

import psutil
import pytest
from launching import environment_of_script

from tic_grpo_trl.rewards import MathReward, math_reward, mathematics
from tic_grpo_trl.rewards.mathematics import default_workers


HANGS = r"\boxed{9^{9^{9^{9}}}}"  # one integer multiplication, which no signal handler can interrupt


@pytest.fixture(scope="module")
def reward():
    reward = MathReward(timeout=30.0, workers=2)
    yield reward
    reward.close()


RIGHT = [
    ("33", r"\boxed{033}"),
    ("033", "Answer: 33"),
    (r"\frac{1}{2}", "Answer: 0.5"),
    ("3{,}140", r"\boxed{3140}"),
    ("3140", "Answer: $3,140$."),
    ("24", r"\boxed{x = 24}"),
    ("x = 24", r"\boxed{24}"),
    ("24", "Answer: 24 apples"),
    (r"\text{Evelyn}", r"\boxed{Evelyn}"),
    ("even", r"Answer: \text{even}"),
    (r"\sqrt{2}", r"\boxed{2^{1/2}}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}"),
    ("x^2 + 2x + 1", r"\boxed{(x+1)^2}"),
    ("24, 25", r"\boxed{25} and \boxed{24}"),
    (r"We find $12$ and then $\boxed{24}$.", r"\boxed{24}"),
    (24, r"\boxed{24}"),
]
WRONG = [
    ("24", r"\boxed{25}"),
    ("24", ""),
    ("24", "It may be 24."),
    (r"\sqrt{2}", r"\boxed{2}"),  # math-verify alone reads a bare \sqrt{2} as 2
    ("1/3", r"\boxed{0.33}"),
    ("1011", r"\boxed{10,11}"),
    (r"x \in [0, 1]", r"\boxed{x}"),
    # several candidates
    ("24", r"\boxed{24} \boxed{25}"),
    ("25", r"\boxed{24} \boxed{25}"),
    ("24", "Answer: 24 or 25"),
    ("25", "Answer: 24 or 25"),
    ("24", "Answer: $24$ or $25$"),
    ("24", r"\boxed{\{24, 25\}}"),
    ("24", r"\boxed{24, 25}"),
    ("24", r"\boxed{24;25}"),
    ("24", r"\boxed{24 \text{ or } 25}"),
    ("24", r"\boxed{x = 24 \text{ or } x = 25}"),
    ("24", r"\boxed{[24, 25]}"),
    ("24", r"\boxed{(20, 30)}"),
    ("24", r"\boxed{24 \pm 1}"),
    ("24", r"\boxed{\mathbb{R}}"),
    ("24", r"\boxed{x > 20}"),
    ("24", r"\boxed{x \neq 25}"),
    ("24", r"\boxed{24\\25}"),
]


@pytest.mark.parametrize(("pairs", "expected"), [(RIGHT, 1.0), (WRONG, 0.0)])
def test_right_and_wrong(reward, pairs, expected):
    solutions, texts = zip(*pairs, strict=True)
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = reward(prompts=["?"] * len(pairs), completions=messages, solution=list(solutions), source=["a"])
    assert [pair for pair, got in zip(pairs, rewards, strict=True) if got != expected] == []


def test_gold_comes_first(reward):
    """An interval equals a solution that is an inequality, but not the other way round."""
    assert reward([r"\boxed{(1, 2)}"], solution=["1 < x < 2"]) == [1.0]
    assert reward([r"\boxed{1 < x < 2}"], solution=["(1, 2)"]) == [0.0]


def test_what_cannot_be_parsed_is_skipped_and_counted(reward):
    extra, metrics = {}, {}
    solutions = ["24", "", "@#!", None, '{"tests": []}', "24"]
    texts = [r"\boxed{24}", r"\boxed{24}", r"\boxed{@#!}", r"\boxed{24}", "print(24)", "no idea"]
    rewards = reward(texts, solution=solutions, log_extra=extra.__setitem__, log_metric=metrics.__setitem__)
    assert rewards == [1.0, None, None, None, None, 0.0]
    assert extra == {"extracted_answer": ["24", "24", "@#!", "24", "", ""]}
    assert metrics == {
        "math_reward/no_answer": pytest.approx(2 / 6),
        "math_reward/unparseable_solution": pytest.approx(4 / 6),
        "math_reward/timeout": 0.0,
        "math_reward/crash": 0.0,
    }


def test_long_completion(reward):
    """18,000 tokens of noise before the answer cost nothing."""
    noise = r"\frac{\sqrt{" * 8000
    start = time.monotonic()
    assert reward([noise + r"\boxed{24}", noise + "\nAnswer: 24", noise], solution=["24"] * 3) == [1.0, 1.0, 0.0]
    assert time.monotonic() - start < 5


def test_hanging_answers_are_killed_and_cost_only_themselves():
    reward, metrics = MathReward(timeout=5.0, workers=2), {}
    try:
        assert reward([r"\boxed{24}"] * 2, solution=["24", "25"]) == [1.0, 0.0]
        before = [psutil.Process(worker.process.pid) for worker in reward._pool.workers]
        texts = [r"\boxed{24}", HANGS, r"\boxed{25}", HANGS, *[r"\boxed{24}"] * 4]
        start = time.monotonic()
        rewards = reward(texts, solution=["24"] * 8, log_metric=metrics.__setitem__)
        assert 5 <= time.monotonic() - start < 120
        assert rewards == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
        assert metrics["math_reward/timeout"] == 0.25
        assert metrics["math_reward/crash"] == 0.0
        assert not any(process.is_running() for process in before)
        # a solution that math-verify cannot parse, or not in time, is not the completion's fault
        assert reward([r"\boxed{24}"], solution=["(" * 1500 + "24" + ")" * 1500]) == [None]
    finally:
        reward.close()


def test_a_process_that_dies_costs_one_answer():
    reward, metrics = MathReward(timeout=60.0, workers=1), {}
    try:
        assert reward([r"\boxed{24}"], solution=["24"]) == [1.0]
        (worker,) = reward._pool.workers
        threading.Timer(1.0, worker.process.kill).start()
        texts = [HANGS, r"\boxed{24}", r"\boxed{25}"]
        assert reward(texts, solution=["24"] * 3, log_metric=metrics.__setitem__) == [0.0, 1.0, 0.0]
        assert metrics["math_reward/crash"] == pytest.approx(1 / 3)
        # a worker that dies while idle costs nothing
        (worker,) = reward._pool.workers
        worker.process.kill()
        worker.process.wait()
        assert reward([r"\boxed{24}"], solution=["24"], log_metric=metrics.__setitem__) == [1.0]
        assert metrics["math_reward/crash"] == 0.0
    finally:
        reward.close()


def test_from_another_thread_and_as_a_copy(reward):
    """math-verify's own timeouts only work in the main thread, and reward functions may be pickled."""
    results = []
    thread = threading.Thread(target=lambda: results.append(reward([r"\boxed{24}"], solution=["24"])))
    thread.start()
    thread.join(60)
    assert results == [[1.0]]
    copy = pickle.loads(pickle.dumps(reward))
    assert (copy.timeout, copy.workers, copy.__name__, copy._pool) == (30.0, 2, "math_reward", None)


def test_errors_name_the_remedy(monkeypatch):
    with pytest.raises(ValueError, match=r"dataset\.rename_column\('answer', 'solution'\)"):
        math_reward(prompts=["?"], completions=["24"], answer=["24"])
    with pytest.raises(ValueError, match="pass the seconds"):
        MathReward(timeout=0)
    with pytest.raises(ValueError, match="pass 1 or more"):
        MathReward(workers=0)
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="check that `import math_verify` works"):
        MathReward(workers=1)(["\\boxed{24}"], solution=["24"])


def test_cores_are_shared_by_the_processes_of_a_host(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(16))
    assert default_workers() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert default_workers() == 1


# As users write scripts, without `if __name__ == "__main__"`
SCRIPT = r"""
import json, os
print("started", flush=True)
from tic_grpo_trl.rewards import MathReward
reward = MathReward(timeout=3.0, workers=2)
texts, right = ["\\boxed{24}", "\\boxed{25}"], ["24", "24"]
rewards = [reward(texts, solution=right)]
child = os.fork()
if child == 0:
    os._exit(0 if reward(texts, solution=right) == [1.0, 0.0] else 1)
rewards.append(os.waitpid(child, 0)[1])
rewards.append(reward(texts, solution=right))
print(json.dumps([rewards, [worker.process.pid for worker in reward._pool.workers]]), flush=True)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def read(output):
    """Check the script's rewards and return the process ids of its workers."""
    results, pids = json.loads(next(line for line in output if line.startswith("[[")))
    assert results == [[1.0, 0.0], 0, [1.0, 0.0]]
    assert len(pids) == 2
    return pids


def test_script_without_a_guard(script):
    done = subprocess.run(
        [sys.executable, script],
        cwd=script.parent,
        env=environment_of_script(),
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert done.stdout.count("started") == 1
    assert not any(psutil.pid_exists(pid) for pid in read(done.stdout.splitlines()))


# The same workers without torch, which is slow to import
KILLED = r"""
import json, sys, types
sys.modules["rewards"] = package = types.ModuleType("rewards")
package.__path__ = [sys.argv[1]]
from rewards.math_pool import MathPool
pool = MathPool(3.0, 2)
outcomes = pool.run([("24", "24"), ("24", "25")])
print(json.dumps([outcomes, [worker.process.pid for worker in pool.workers]]), flush=True)
pool.run([("24", "9^{9^{9^{9}}}")])
"""


def test_processes_end_with_one_that_is_killed():
    """One worker is idle and one is inside a long comparison."""
    command = [sys.executable, "-c", KILLED, mathematics.__file__.rpartition("/")[0]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        outcomes, pids = json.loads(process.stdout.readline())
        assert outcomes == ["1", "0"]
        workers = [psutil.Process(pid) for pid in pids]
        assert len(workers) == 2
        time.sleep(1)
        process.kill()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) == 2, alive
