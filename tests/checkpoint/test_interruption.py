"""A run that is told to stop saves a checkpoint, ends with an error, and resumes as if it had never stopped."""

import os
import signal
import threading
import time

import pytest
from conftest import make_trainer
from test_run_state import SETTINGS, assert_same_end, train
from transformers import TrainerCallback

from tic_grpo_trl.checkpoint import interruption
from tic_grpo_trl.checkpoint.storage import checkpoints_in, find_damage


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

QUICK = {name: SETTINGS[name] for name in ("per_device_train_batch_size", "steps_per_generation", "learning_rate")}
ENDS = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt}
STATED = {signal.SIGTERM: "by SIGTERM", signal.SIGINT: "by Ctrl-C"}


@pytest.fixture(autouse=True)
def default_handlers():
    """A shell starts background processes with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class At(TrainerCallback):
    """Do something in the middle of an update, which is the one after `step` others."""

    def __init__(self, step, action):
        self.step, self.action, self.saves = step, action, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()

    def on_save(self, args, state, control, **kwargs):
        self.saves.append(state.global_step)


def send(*numbers, pause=0.0):
    """Return a function that sends signals to this process."""

    def action():
        for index, number in enumerate(numbers):
            time.sleep(pause if index else 0)
            os.kill(os.getpid(), number)

    return action


def stopped(folder, at, number, **config):
    """Run a trainer that is stopped by a signal, and return it."""
    trainer = make_trainer(folder, callbacks=[at], **{"disable_tqdm": True} | QUICK | config)
    handlers = [signal.getsignal(one) for one in ENDS]
    with pytest.raises(ENDS[number]) as raised:
        trainer.train()
    assert number == signal.SIGINT or raised.value.code == 143
    assert [signal.getsignal(one) for one in ENDS] == handlers
    return trainer


def steps_saved(folder):
    assert all(find_damage(path) is None for path in checkpoints_in(folder))
    return sorted(int(path.name.split("-")[1]) for path in checkpoints_in(folder))


@pytest.mark.parametrize("number", ENDS)
def test_resumes_exactly_from_the_middle_of_a_rollout(tmp_path, capfd, number):
    """The third of four updates, at which the run also logs and evaluates."""
    config = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 3, "max_steps": 6}
    whole = train(tmp_path / "whole", **config)

    def prepare(trainer):
        trainer.add_callback(At(2, send(number)))

    with pytest.raises(ENDS[number]):
        train(tmp_path / "from-3", prepare=prepare, **config)
    assert steps_saved(tmp_path / "from-3") == [3]
    lines = capfd.readouterr().err.splitlines()
    path = tmp_path / "from-3/checkpoint-3"
    assert [line for line in lines if line.startswith("Stopped")] == [
        f"Stopped {STATED[number]} after update 3 of 6. Saved {path}; continue with --resume_from_checkpoint true (or "
        "trainer.train(resume_from_checkpoint=True))."
    ]
    assert sum("stopping after this update and saving" in line for line in lines) == 1
    assert_same_end(train(tmp_path / "from-3", resume=True, **config), whole, tmp_path, 3)


def test_the_same_trainer_continues(tmp_path):
    """What a user does in a notebook: interrupt the cell, look at the results, and go on."""
    whole = train(tmp_path / "whole", save_strategy="no", max_steps=6)
    trainers = []

    def prepare(trainer):
        trainers.append(trainer)
        trainer.add_callback(At(1, send(signal.SIGINT)))

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "from-2", prepare=prepare, save_strategy="no", max_steps=6)
    (trainer,) = trainers
    trainer.output = trainer.train(resume_from_checkpoint=True)
    assert_same_end(trainer, whole, tmp_path, 2)


def test_a_checkpoint_that_was_due_is_written_once(tmp_path):
    at = At(1, send(signal.SIGTERM))
    stopped(tmp_path, at, signal.SIGTERM, save_strategy="steps", save_steps=1, save_total_limit=1)
    assert at.saves == [1, 2]
    assert steps_saved(tmp_path) == [2]


def test_a_checkpoint_is_written_though_the_evaluation_was_not_the_best(tmp_path):
    at = At(1, send(signal.SIGTERM))
    best = {"save_strategy": "best", "metric_for_best_model": "reward", "greater_is_better": False}
    trainer = stopped(
        tmp_path, at, signal.SIGTERM, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, **best
    )
    assert at.saves[-1] == 2
    assert steps_saved(tmp_path) == sorted({*at.saves})
    assert trainer.state.global_step == 2


def test_the_last_update_of_an_epoch_and_of_the_run(tmp_path):
    stopped(tmp_path, At(3, send(signal.SIGTERM)), signal.SIGTERM, max_steps=4)
    resumed = make_trainer(tmp_path, disable_tqdm=True, **QUICK | {"max_steps": 4})
    assert resumed.train(resume_from_checkpoint=True).global_step == 4


def test_weights_alone_cannot_be_continued(tmp_path, capfd):
    stopped(tmp_path, At(0, send(signal.SIGTERM)), signal.SIGTERM, save_only_model=True)
    assert "save_only_model=True), so the run can't be continued exactly" in capfd.readouterr().err


def test_ctrl_c_again_stops_at_once(tmp_path):
    assert_stops_at_once(tmp_path, pause=0.2)


def test_under_a_launcher_the_same_ctrl_c_may_come_twice(tmp_path, monkeypatch):
    """From the terminal and from the launcher; it is another one after two seconds."""
    monkeypatch.setattr(interruption, "IS_LAUNCHED", True)
    stopped(tmp_path / "once", At(0, send(signal.SIGINT, signal.SIGINT, pause=0.2)), signal.SIGINT)
    assert steps_saved(tmp_path / "once") == [1]
    assert_stops_at_once(tmp_path, pause=2.1)


def assert_stops_at_once(folder, pause: float):
    ends = []
    at = At(0, lambda: (send(signal.SIGINT, signal.SIGINT, pause=pause)(), ends.append("not at once")))
    stopped(folder / "twice", at, signal.SIGINT)
    assert steps_saved(folder / "twice") == []
    assert ends == []


def test_sigterm_again_does_not_disturb_the_save(tmp_path):
    stopped(tmp_path, At(0, send(signal.SIGTERM, signal.SIGTERM, pause=2.1)), signal.SIGTERM)
    assert steps_saved(tmp_path) == [1]


def test_handlers_are_restored_after_an_error_and_ignored_signals_stay_ignored(tmp_path):
    def fail():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        send(signal.SIGINT)()
        raise ZeroDivisionError

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = make_trainer(tmp_path, callbacks=[At(0, fail)], disable_tqdm=True, **QUICK)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_thread_leaves_signals_alone(tmp_path):
    seen = []
    at = At(1, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    trainer = make_trainer(tmp_path, callbacks=[at], disable_tqdm=True, **QUICK | {"max_steps": 2})
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(60)
    assert trainer.state.global_step == 2
    assert seen == [signal.SIG_DFL]


def test_forked_children_outlive_ctrl_c_but_not_sigterm(tmp_path):
    """Such as a data loader's workers, which get the terminal's Ctrl-C too, and SIGTERM from their parent."""
    statuses = []

    def fork():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(7)
        os.kill(child, signal.SIGINT)
        time.sleep(0.5)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        statuses.append(os.waitpid(child, 0)[1])

    trainer = make_trainer(tmp_path, callbacks=[At(0, fork)], disable_tqdm=True, **QUICK | {"max_steps": 1})
    trainer.train()
    assert statuses == [signal.SIGTERM]


def test_the_checkpoints_of_transformers_on_sigterm_are_replaced(tmp_path, capsys):
    """Alone they would let `train()` return in the middle of an update as if training had finished."""
    at = At(1, send(signal.SIGTERM))
    stopped(tmp_path, at, signal.SIGTERM, enable_jit_checkpoint=True)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert steps_saved(tmp_path) == [2]
    assert capsys.readouterr().out.count("enable_jit_checkpoint is not needed") == 1
