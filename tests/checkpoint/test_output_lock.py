"""Two runs never train in the same output folder at once."""

import re
import signal
import socket
import sys
import time
from concurrent.futures import Future

import pytest
from conftest import make_trainer
from filelock import FileLock
from huggingface_hub.utils import filter_repo_objects
from launching import CONFIGS, ON_CPU, ROOT, free_port, launch_command, started
from transformers import TrainerCallback

from tic_grpo_trl.checkpoint.output_lock import LOCK


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

QUICK = {"max_steps": 1, "per_device_train_batch_size": 4, "max_completion_length": 2}


def test_a_second_process_is_refused_until_the_first_one_is_gone(tmp_path):
    """A killed process leaves the file, but no lock."""
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    with started([sys.executable, ROOT / "tests/workers/holds_folder.py", folder], log) as first:
        latest = time.monotonic() + 240
        while not (folder / "waits").exists():
            assert first.poll() is None, log.read_text()
            assert time.monotonic() < latest
            time.sleep(0.05)
        holder = re.escape(f"process {first.pid} on {socket.gethostname()}")
        refusal = rf"^output_dir {folder}: another run \({holder}\) is training there; choose another --output_dir, or"
        second = make_trainer(folder, **QUICK)
        for _ in range(2):  # being refused changes nothing
            with pytest.raises(ValueError, match=refusal):
                second.train()
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (folder / LOCK).exists()
    assert second.train().global_step == 1
    assert not (folder / LOCK).exists()


def test_trainers_of_one_process_take_turns(tmp_path):
    """An error releases the folder."""

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="is training there"):
                other.train()
            raise ZeroDivisionError

    other, failing = make_trainer(tmp_path, **QUICK), make_trainer(tmp_path, callbacks=[Fail()], **QUICK)
    with pytest.raises(ZeroDivisionError):
        failing.train()
    for _ in range(2):
        assert other.train().global_step == 1


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, messages):
    (tmp_path / LOCK).mkdir()
    assert make_trainer(tmp_path, **QUICK).train().global_step == 1
    (warning,) = [text for text in messages() if "cannot be locked" in text]
    assert str(tmp_path / LOCK) in warning


def test_the_hub_does_not_get_the_lock(tmp_path, monkeypatch):
    """Pushes during training upload the folder while it is locked."""
    uploads = []

    class Hub:
        def upload_folder(self, folder_path, ignore_patterns, **kwargs):
            names = [path.name for path in tmp_path.iterdir() if path.is_file()]
            uploads.append((LOCK in names, set(filter_repo_objects(names, ignore_patterns=ignore_patterns))))
            done = Future()
            done.set_result(None)
            return done

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = make_trainer(tmp_path, **QUICK | {"save_strategy": "steps", "save_steps": 1})
    trainer.args.push_to_hub, trainer.hub_model_id, trainer.push_in_progress = True, "someone/something", None
    trainer.train()
    ((was_there, uploaded),) = uploads
    assert was_there
    assert "model.safetensors" in uploaded
    assert LOCK not in uploaded


@pytest.mark.distributed
def test_both_of_two_processes_are_refused(tmp_path):
    script, folder, log = ROOT / "tests/workers/refused.py", tmp_path / "run", tmp_path / "log.txt"
    folder.mkdir()
    launcher = launch_command(CONFIGS / "multi_gpu.yaml", *ON_CPU, "--main_process_port", free_port())
    with FileLock(folder / LOCK), started([*launcher, script, folder], log) as process:
        assert process.wait(240) == 0, log.read_text()[-3000:]
    for rank in range(2):
        processes, kind, error = (folder / f"rank-{rank}").read_text().split(", ", 2)
        assert (processes, kind) == ("2", "DistributedType.MULTI_CPU")
        assert f"output_dir {folder}: another run (an unknown process) is training there" in error
