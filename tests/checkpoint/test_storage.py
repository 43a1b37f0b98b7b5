"""A checkpoint exists completely or not at all; a damaged one, or one of another model, is refused by name."""

import json
import logging
import os
import shutil
from collections import defaultdict, deque
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import count_a, make_trainer, tiny_model, tiny_moe_model
from peft import LoraConfig
from safetensors import safe_open
from transformers import TrainerCallback
from trl import GRPOTrainer

from tic_grpo_trl.checkpoint import storage as checkpoints
from tic_grpo_trl.checkpoint.storage import (
    MANIFEST,
    STAGING,
    find_damage,
    find_mismatch,
    load_state,
    newest_if_any,
    restore_containers,
    to_plain,
)


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

SETTINGS = {
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "max_completion_length": 2,
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
}
LORA = {"r": 2, "target_modules": ["q_proj"]}


def small_model(**overrides):
    return tiny_model(**{"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8} | overrides)


def varied(completions, **kwargs):
    """A reward that differs between most completions, so that every update moves the weights."""
    return [sum(map(ord, text)) % 5 / 4 for text in completions]


def trainer_in(folder, model=None, **config):
    trainer = make_trainer(folder, small_model() if model is None else model, **SETTINGS | config)
    trainer.reward_funcs[0].reward_func = varied
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first, second) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run's folder with checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("whole")
    trainer_in(folder).train()
    return folder


@pytest.fixture
def run_dir(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("checkpoint") or path.name == STAGING)


# Writing


def test_manifest_lists_every_file_and_what_the_rollout_was_made_with(whole):
    for step in (1, 2, 3):
        checkpoint = whole / f"checkpoint-{step}"
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != MANIFEST}
        assert manifest["files"] == files
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "tic_grpo_state_0.pt"} < files.keys()
        assert manifest["settings"]["steps_per_generation"] == 2
        assert manifest["settings"]["number of processes"] == 1
        assert manifest["versions"]["torch"] == version("torch")
        assert find_damage(checkpoint) is None
    assert names(whole) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_size_is_reported_at_debug_level(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, logger="tic_grpo_trl")
    trainer_in(tmp_path, max_steps=1).train()
    (record,) = [record for record in caplog.records if "resume state" in record.getMessage()]
    assert record.levelno == logging.DEBUG
    assert f"{(tmp_path / 'checkpoint-1/tic_grpo_state_0.pt').stat().st_size / 1000:.1f} kB" in record.getMessage()


class Died(BaseException):
    """Raised at the moment at which a process would be killed."""


POINTS = {
    "before the weights": (GRPOTrainer, "save_model"),
    "after the weights": (GRPOTrainer, "_save_rng_state"),
    "before our state": (torch, "save"),
    "before the manifest": (checkpoints.json, "dumps"),
    "before it is on the disk": (os, "fsync"),
}


@pytest.mark.parametrize("point", POINTS)
def test_kill_during_a_save_leaves_no_checkpoint_that_can_be_seen(run_dir, monkeypatch, point):
    """Nothing is cleaned up, as in a process that is killed."""
    shutil.rmtree(run_dir / "checkpoint-3")
    trainer = trainer_in(run_dir)
    where, name = POINTS[point]
    called = getattr(where, name)

    def dies(*args, **kwargs):
        if trainer.state.global_step < 3 or (name == "dumps" and "files" not in args[0]):
            return called(*args, **kwargs)
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(where, name, dies)
        with pytest.raises(Died):
            trainer.train(resume_from_checkpoint=True)
    assert names(run_dir)[-2:] == ["checkpoint-1", "checkpoint-2"]
    again = trainer_in(run_dir)
    again.train(resume_from_checkpoint=True)
    assert names(run_dir) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert find_damage(run_dir / "checkpoint-3") is None


@pytest.mark.parametrize("left", [".done", ".old"])
def test_kill_between_the_two_renames_loses_nothing(run_dir, left):
    """Both the new checkpoint of a step and the old one that it replaces are complete in `.saving`."""
    for step in (1, 2):
        shutil.rmtree(run_dir / f"checkpoint-{step}")
    (run_dir / STAGING).mkdir()
    (run_dir / "checkpoint-3").rename(run_dir / STAGING / f"checkpoint-3{left}")
    (run_dir / STAGING / "checkpoint-4.done").mkdir()  # without a manifest: not complete
    trainer = trainer_in(run_dir, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert names(run_dir) == ["checkpoint-3", "checkpoint-4"]


def test_checkpoint_of_the_same_step_is_replaced(run_dir):
    old = (run_dir / "checkpoint-3").stat().st_ino
    trainer_in(run_dir).train(resume_from_checkpoint=str(run_dir / "checkpoint-2"))
    assert (run_dir / "checkpoint-3").stat().st_ino != old
    assert find_damage(run_dir / "checkpoint-3") is None
    assert names(run_dir) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_two_nodes_may_publish_the_same_folder(tmp_path):
    for name in ("mine", "shared"):
        folder = tmp_path / STAGING / f"checkpoint-{name}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(name)
        checkpoints.publish(folder, tmp_path / "checkpoint-1", {})
        checkpoints.publish(folder, tmp_path / "checkpoint-1", {})  # the other node's process, too late
        assert (tmp_path / "checkpoint-1/weights").read_text() == name


class Notes(TrainerCallback):
    """Note which checkpoints exist after each save."""

    def __init__(self):
        self.seen = []

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(names(Path(args.output_dir)))


def test_save_total_limit_and_the_best_checkpoint(tmp_path, monkeypatch):
    """The first evaluation is the best one; its path is the final one, in the saved state too."""
    notes, deleted = Notes(), []
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **kwargs: (deleted.append(Path(path)), rmtree(path, **kwargs)))
    config = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "score",
        "load_best_model_at_end": True,
    }
    trainer = trainer_in(tmp_path, max_steps=4, save_total_limit=2, callbacks=[notes], **config)
    scores, at_best = iter((3.0, 1.0, 2.0, 0.0)), {}

    def evaluate(*args, **kwargs):
        assert not at_best or not same(weights(trainer), at_best)
        if not at_best:
            at_best.update(weights(trainer))
        trainer.control.should_evaluate = False
        return {"eval_score": next(scores)}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.train()
    first = "checkpoint-1"
    assert notes.seen == [[first], [first, "checkpoint-2"], [first, "checkpoint-3"], [first, "checkpoint-4"]]
    assert trainer.state.best_model_checkpoint == str(tmp_path / first)
    for name in (first, "checkpoint-4"):
        assert json.loads((tmp_path / name / "trainer_state.json").read_text())["best_model_checkpoint"] == str(
            tmp_path / first
        )
        assert find_damage(tmp_path / name) is None
    assert same(weights(trainer), at_best)
    assert not any(path.name.startswith("checkpoint") and path.parent == tmp_path for path in deleted)


def test_hub_gets_a_checkpoint_when_it_is_complete(tmp_path, monkeypatch):
    pushed = []

    def push(self, folder):
        pushed.append((folder, find_damage(Path(folder))))

    monkeypatch.setattr(GRPOTrainer, "_push_from_checkpoint", push)
    trainer = trainer_in(tmp_path, max_steps=2)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None) for step in (1, 2)]


# Refusing


def cut(name, size=100):
    return lambda checkpoint: os.truncate(checkpoint / name, size)


def garbled(name):
    """Replace all bytes: only reading the file reveals it."""
    return lambda checkpoint: (checkpoint / name).write_bytes(b"\x00" * (checkpoint / name).stat().st_size)


def without_manifest(harm):
    def both(checkpoint):
        (checkpoint / MANIFEST).unlink()
        harm(checkpoint)

    return both


DAMAGES = {
    "optimizer is missing": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "weights are cut": (cut("model.safetensors"), r"model.safetensors has 100 bytes instead of [\d,]+"),
    "random state is cut": (cut("rng_state.pth"), "rng_state.pth has 100 bytes"),
    "our state cannot be read": (garbled("tic_grpo_state_0.pt"), "tic_grpo_state_0.pt cannot be read"),
    "our state is gone": (lambda c: (c / "tic_grpo_state_0.pt").unlink(), "tic_grpo_state_0.pt is missing"),
    "manifest is cut": (cut(MANIFEST), f"{MANIFEST} cannot be read"),
    "weights are cut, no manifest": (
        without_manifest(cut("model.safetensors", 2000)),
        "model.safetensors cannot be read",
    ),
    "state is cut, no manifest": (without_manifest(cut("trainer_state.json")), "trainer_state.json cannot be read"),
    "no state, no manifest": (
        without_manifest(lambda c: (c / "trainer_state.json").unlink()),
        "trainer_state.json is missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_is_refused_by_name_and_skipped(run_dir, messages, kind):
    harm, said = DAMAGES[kind]
    last, before = run_dir / "checkpoint-3", run_dir / "checkpoint-2"
    harm(last)
    trainer = trainer_in(run_dir)
    initial = weights(trainer)
    with pytest.raises(ValueError, match=f"Cannot resume from checkpoint {last}: {said}") as refused:
        trainer.train(resume_from_checkpoint=str(last))
    assert f"resume_from_checkpoint='{before}'" in str(refused.value)
    assert same(weights(trainer), initial)
    assert trainer.checkpoints._newest() == before
    (warning,) = [text for text in messages() if "Skipping checkpoint" in text]
    assert str(last) in warning


def test_error_without_a_complete_checkpoint_says_what_was_found(run_dir, tmp_path):
    with pytest.raises(ValueError, match=r"No valid checkpoint found in output directory \(.*empty\), none at all"):
        trainer_in(tmp_path / "empty").train(resume_from_checkpoint=True)
    for step in (1, 2, 3):
        (run_dir / f"checkpoint-{step}/optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"only damaged ones: .*checkpoint-3 \(optimizer.pt is missing\), .*-1 \("):
        trainer_in(run_dir).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="There is no complete checkpoint before it"):
        trainer_in(run_dir).train(resume_from_checkpoint=str(run_dir / "checkpoint-3"))
    with pytest.raises(ValueError, match="there is no such folder"):
        trainer_in(run_dir).train(resume_from_checkpoint=str(run_dir / "checkpoint-7"))


FOREIGN = {
    "wider": (
        lambda: {"model": small_model(hidden_size=16)},
        r"is \(\d+, 8\) in the checkpoint and \(\d+, 16\) in the model",
    ),
    "deeper": (lambda: {"model": small_model(num_hidden_layers=2)}, r"it lacks model\.layers\.1\..*"),
    "shallower": (lambda: {"model": small_model(num_hidden_layers=0)}, r"it has model\.layers\.0\..*"),
    "adapter": (lambda: {"peft_config": LoraConfig(**LORA)}, "a whole model, while this run trains an adapter"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoint_of_another_model_is_refused(run_dir, kind):
    other, said = FOREIGN[kind]
    for resume in (True, str(run_dir / "checkpoint-3")):
        with pytest.raises(ValueError, match=f"checkpoint-3 is of another model: .*{said}.*no complete checkpoint"):
            trainer_in(run_dir, **other()).train(resume_from_checkpoint=resume)


def test_weights_that_fit(whole, tmp_path):
    """They also fit if names differ on disk, are shared, or belong to an adapter."""
    assert find_mismatch(whole / "checkpoint-1", small_model()) is None
    for number, model in enumerate((tiny_moe_model(), small_model(tie_word_embeddings=True))):
        model.save_pretrained(tmp_path / f"{number}", max_shard_size="1KB")  # several files
        assert len(checkpoints.weight_files(tmp_path / f"{number}")) > 1
        assert find_mismatch(tmp_path / f"{number}", model) is None
    adapted = trainer_in(tmp_path / "run", peft_config=LoraConfig(**LORA))
    adapted.save_model(str(tmp_path / "adapter"))
    assert find_mismatch(tmp_path / "adapter", adapted.model) is None
    other = trainer_in(tmp_path / "run", peft_config=LoraConfig(r=3, target_modules=["q_proj"])).model
    assert "lora_A.weight is (2, 8) in the checkpoint and (3, 8) in the model" in find_mismatch(
        tmp_path / "adapter", other
    )
    other = trainer_in(tmp_path / "run", peft_config=LoraConfig(r=2, target_modules=["k_proj"])).model
    assert "q_proj.lora_A.weight, which this model does not have" in find_mismatch(tmp_path / "adapter", other)


def test_weights_that_have_other_names_on_disk_are_loaded(tmp_path):
    """A mixture of experts has them; transformers would keep the initial weights."""
    whole = trainer_in(tmp_path, tiny_moe_model())
    initial = weights(whole)
    whole.train()
    assert not same(weights(whole), initial)
    resumed = trainer_in(tmp_path, tiny_moe_model())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(resumed), weights(whole))


# What may change


class FirstStep(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def first_and_last_step(trainer, **training) -> tuple[int, int]:
    trainer.add_callback(first := FirstStep())
    trainer.train(**training)
    return first.step, trainer.state.global_step


@pytest.mark.parametrize("text", ["true", "True"])
def test_flag_means_the_newest_checkpoint(run_dir, text):
    assert first_and_last_step(trainer_in(run_dir), resume_from_checkpoint=text) == (3, 3)


def test_the_same_command_starts_and_resumes_a_run(whole, tmp_path):
    for flag in (True, "true", "True"):
        assert newest_if_any(flag, tmp_path / "new") is None
        assert newest_if_any(flag, whole) is True
    (tmp_path / STAGING / "checkpoint-3").mkdir(parents=True)  # a first save that was killed
    assert newest_if_any("true", tmp_path) is None
    (tmp_path / STAGING / "checkpoint-3.done").mkdir()
    assert newest_if_any("true", tmp_path) is True
    for flag in (None, False, "false", "some/path"):
        assert newest_if_any(flag, whole) is flag


@pytest.mark.parametrize("nothing", [None, False, "false"])
def test_no_resume(run_dir, nothing):
    assert first_and_last_step(trainer_in(run_dir, max_steps=1), resume_from_checkpoint=nothing) == (0, 1)


def generations(trainer) -> list[int]:
    """Note the steps before which a rollout is generated."""
    generate, steps = trainer._generate_and_score_completions, []

    def noted(inputs):
        steps.append(trainer.state.global_step)
        return generate(inputs)

    trainer._generate_and_score_completions = noted
    return steps


def test_checkpoint_of_trl_is_loaded_with_a_warning(tmp_path, messages):
    """Inside a rollout, a new one is generated and used for all its updates."""
    make_trainer(tmp_path, small_model(), trl=True, **SETTINGS).train()
    trainer = trainer_in(tmp_path, max_steps=5)
    steps = generations(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert steps == [1, 3]
    (warning,) = [text for text in messages() if "checkpoint-1" in text]
    assert "has no tic_grpo_state_0.pt" in warning
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(
        sum(entry["loss"] for entry in trainer.state.log_history if entry["step"] > 1 and "loss" in entry) / 4
    )


def resumed(run_dir, step, **config):
    """Resume a run of five steps; return it and the steps before which it generated a rollout."""
    trainer = trainer_in(run_dir, max_steps=5, save_strategy="no", **config)
    steps = generations(trainer)
    trainer.train(resume_from_checkpoint=str(run_dir / f"checkpoint-{step}"))
    return trainer, steps


# Checkpoint 1 lies inside a rollout of two updates, checkpoint 2 between two rollouts.


def test_settings_that_shape_a_rollout(run_dir, messages):
    assert resumed(run_dir, 1, per_device_train_batch_size=8)[1] == [1, 3]
    (warning,) = [text for text in messages() if "Settings changed" in text]
    assert "per_device_train_batch_size = 8 (was 4)." in warning


def test_another_algorithm_inside_a_rollout(run_dir, messages):
    """An error before anything is generated; only a warning if the rollout is discarded, or between two rollouts."""
    with pytest.raises(ValueError, match=r"is inside a rollout of another .*clip_mode = two_sided \(was up_only\)"):
        resumed(run_dir, 1, algorithm="grpo")
    with pytest.raises(ValueError, match=r"epsilon_high = 0.5 \(was 0.28\)"):
        resumed(run_dir, 1, epsilon_high=0.5)
    assert not [text for text in messages() if "Settings changed" in text]
    assert resumed(run_dir, 1, algorithm="grpo", discard_rollout_on_resume=True)[1] == [1, 3]
    assert resumed(run_dir, 2, algorithm="grpo")[1] == [2, 4]
    warnings = [text for text in messages() if "Settings changed" in text]
    assert len(warnings) == 2
    for warning in warnings:
        assert "and take effect from here on: importance_sampling_level = token (was trajectory)" in warning


def test_settings_that_a_rollout_was_scored_with(run_dir, messages):
    """Its log-probabilities belong to the old temperature, so ratios to them would not start at 1."""
    assert resumed(run_dir, 1, temperature=0.5)[1] == [1, 3]
    named, discarded = (text for text in messages() if "checkpoint-1" in text)
    assert "take effect from here on: temperature = 0.5 (was 1.0)" in named
    assert "is discarded" in discarded
    assert resumed(run_dir, 2, temperature=0.5, discard_rollout_on_resume=True)[1] == [2, 4]
    assert not [text for text in messages() if "checkpoint-2 is discarded" in text]


def test_a_new_rollout_for_other_batches_may_be_one_of_another_algorithm(run_dir):
    assert resumed(run_dir, 1, per_device_train_batch_size=8, algorithm="grpo")[1] == [1, 3]


def test_changed_settings_of_updates_are_named(run_dir, messages):
    """transformers restores the learning rate with the optimizer and ignores the new one."""
    trainer, steps = resumed(run_dir, 1, learning_rate=0.5, max_grad_norm=0.9, warmup_steps=1)
    assert steps == [2, 4]
    acting, ignored = (text for text in messages() if "Settings changed" in text)
    assert "take effect from here on: warmup_steps = 1.0 (was 0.0), max_grad_norm = 0.9 (was " in acting
    assert "without effect" in ignored
    assert "learning_rate = 0.5 (was " in ignored
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert max(rates) < 0.5


def test_same_settings_make_no_new_rollout(run_dir, messages):
    assert resumed(run_dir, 1)[1] == [2, 4]
    assert not [text for text in messages() if "checkpoint-1" in text]


def test_checkpoint_with_weights_only(tmp_path, messages):
    trainer_in(tmp_path, max_steps=1, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-1/tic_grpo_state_0.pt").exists()
    trainer = trainer_in(tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert [text for text in messages() if "has no tic_grpo_state_0.pt" in text]


def test_tied_weights_are_not_reported_as_missing(tmp_path, caplog):
    """A checkpoint has them under one of their names; others that are missing are still reported."""
    theirs = logging.getLogger("transformers.trainer")
    theirs.addHandler(caplog.handler)
    try:
        tied = {"model": small_model(tie_word_embeddings=True)}
        trainer_in(tmp_path, **tied, max_steps=1).train()
        trainer = trainer_in(tmp_path, **tied, max_steps=2)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 2
        assert "missing keys" not in caplog.text
        with safe_open(tmp_path / "checkpoint-1/model.safetensors", "pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        rest = {"lm_head.weight": trainer.model.lm_head.weight}
        loaded = trainer.model.load_state_dict(rest, strict=False)
        assert "model.embed_tokens.weight" in loaded.missing_keys
        trainer._issue_warnings_after_load(loaded)
        assert "missing keys" in caplog.text
        assert "model.norm.weight" in caplog.text
        assert "embed_tokens" not in caplog.text
    finally:
        theirs.removeHandler(caplog.handler)


# Plain values


def test_plain_values_survive_and_others_are_not_read(tmp_path):
    class Odd:
        def __repr__(self):
            return "odd"

    value = {
        "tensor": torch.arange(3).double(),
        "numbers": (1, 2.5, True, None, np.float64(0.5), np.int64(3), float("nan")),
        "list": deque(["a", b"b", [np.arange(2)]], maxlen=5),
        3: Odd(),
        "grown": torch.ones(2, requires_grad=True) * 2,
    }
    torch.save(to_plain(value), tmp_path / "state.pt")
    loaded = load_state(tmp_path / "state.pt", torch.device("cpu"))
    assert torch.equal(loaded["tensor"], value["tensor"])
    assert not loaded["grown"].requires_grad
    assert loaded["numbers"][:6] == (1, 2.5, True, None, 0.5, 3)
    assert loaded["numbers"][2] is True
    assert loaded["numbers"][6] != loaded["numbers"][6]
    assert loaded["list"] == ["a", b"b", [[0, 1]]]
    assert loaded[3] == "odd"
    torch.save(count_a, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt cannot be read"):
        load_state(tmp_path / "code.pt", torch.device("cpu"))


def test_containers_keep_their_kind():
    current = {"table": defaultdict(lambda: deque(maxlen=2)), "lists": defaultdict(list), "last": deque([7], maxlen=3)}
    saved = {"table": {"a": [1, 2]}, "lists": {"b": [3]}, "last": [4]}
    filled = restore_containers(current, saved)
    filled["table"]["a"].append(3)
    filled["table"]["new"].extend("xyz")
    filled["lists"]["c"].append(1)
    filled["last"].extend([5, 6, 7])
    assert [*filled["table"]["a"]] == [2, 3]
    assert [*filled["table"]["new"]] == ["y", "z"]
    assert filled["lists"] == {"b": [3], "c": [1]}
    assert [*filled["last"]] == [5, 6, 7]
