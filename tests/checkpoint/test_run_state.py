"""A run that resumes from any of its checkpoints ends like one that was never stopped, bit for bit."""

import shutil

import pandas
import pytest
import torch
from conftest import CPU, TINY_PROMPTS, make_trainer, tiny_model, tiny_tokenizer
from peft import LoraConfig
from rollouts import own_logprobs, random_rollouts
from transformers import TrainerCallback

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.checkpoint.storage import read_manifest


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

# Four prompts per rollout and epoch. Its mini-batches are the next four or eight updates.
SETTINGS = {
    "num_generations": 4,
    "logging_steps": 1,
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 4,
    "max_completion_length": 4,
    "max_steps": 6,
    "learning_rate": 0.01,
    "temperature": 1.5,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_eval_batch_size": 4,
}
TIMES = ("runtime", "per_second", "step_time")


def small_model(**overrides):
    return tiny_model(num_hidden_layers=1, hidden_size=8, intermediate_size=8, **overrides)


def varied(completions, **kwargs):
    """A reward that differs between most completions."""
    return [sum(map(ord, text)) % 5 / 4 for text in completions]


def train(folder, resume=None, prompts=4, model=None, prepare=None, **config):
    """Return a trainer after `train()`."""
    torch.manual_seed(5)  # for a new adapter
    peft_config, rollout_func = config.pop("peft_config", None), config.pop("rollout_func", None)
    trainer = TICGRPOTrainer(
        model=small_model() if model is None else model(),
        reward_funcs=varied,
        args=TICGRPOConfig(str(folder), **CPU | SETTINGS | config),
        train_dataset=TINY_PROMPTS.select(range(prompts)) if isinstance(prompts, int) else prompts,
        eval_dataset=TINY_PROMPTS.select(range(4)),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        rollout_func=rollout_func,
    )
    if prepare:
        prepare(trainer)
    trainer.output = trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer):
    """Return all log entries without measured times."""
    return [
        {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}
        for entry in trainer.state.log_history
    ]


def same(first, second) -> bool:
    """Compare bit for bit; NaN equals NaN."""
    if torch.is_tensor(first):
        return torch.is_tensor(second) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


def assert_same_end(resumed, whole, folder, step):
    """Compare weights, optimizer, schedule, log, and the tables of completions written since the checkpoint."""
    assert resumed.state.global_step == whole.state.global_step
    assert same(dict(resumed.model.named_parameters()), dict(whole.model.named_parameters()))
    assert same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert same(resumed.lr_scheduler.state_dict(), whole.lr_scheduler.state_dict())
    assert history(resumed) == history(whole)
    assert resumed.output.training_loss == whole.output.training_loss
    for path in (folder / "whole/completions").glob("*.parquet"):
        if int(path.stem.rpartition("_")[2]) > step:
            again = folder / f"from-{step}/completions" / path.name
            pandas.testing.assert_frame_equal(pandas.read_parquet(path), pandas.read_parquet(again), check_exact=True)


def resumed_from(folder, step, **kwargs):
    """Resume from one checkpoint of the whole run, without the others."""
    own = folder / f"from-{step}"
    shutil.copytree(folder / f"whole/checkpoint-{step}", own / f"checkpoint-{step}")
    return train(own, resume=True, **kwargs | {"save_steps": 100})


def assert_exact(folder, steps, **kwargs):
    """Compare a whole run with runs that resume from some of its checkpoints."""
    whole = train(folder / "whole", **kwargs)
    moved = [entry["grad_norm"] > 0 for entry in whole.state.log_history if "grad_norm" in entry]
    assert sum(moved) >= len(moved) / 2
    for step in steps:
        assert_same_end(resumed_from(folder, step, **kwargs), whole, folder, step)
    return whole


def test_within_a_rollout_between_entries_of_the_log_and_in_later_epochs(tmp_path):
    """Steps 2 and 9 lie within a rollout, the latter in the third epoch; entries hold metrics of three steps; an
    evaluation draws random numbers and fills the table."""
    whole = assert_exact(
        tmp_path,
        (2, 9),
        max_steps=10,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=5,
        eval_on_start=True,
        log_completions=True,
    )
    entries = [entry["step"] for entry in whole.state.log_history]
    assert entries == [0, 3, 5, 6, 9, 10, 10]
    table = pandas.read_parquet(tmp_path / "from-2/completions/completions_00003.parquet")
    assert table["trajectory_ratio"].notna().any()
    assert len(table) == 16


def test_every_iteration_over_a_rollout_with_accumulation_and_an_adapter(tmp_path):
    """Resume in the first and in the second iteration, whose old log-probabilities come from the first."""
    assert_exact(
        tmp_path,
        (1, 3),
        max_steps=5,
        gradient_accumulation_steps=2,
        num_iterations=2,
        beta=0.1,
        logging_steps=2,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )


def test_zero_advantage_responses_and_micro_batches_with_nothing_to_compute(tmp_path):
    saved = []

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            name = f"checkpoint-{state.global_step}/tic_grpo_state_0.pt"
            saved.append(torch.load(f"{args.output_dir}/{name}", weights_only=True)["rollout"]["micro_batches"])

    def prepare(trainer):
        trainer.add_callback(Keep())
        trainer.reward_funcs[0].reward_func = lambda completions, **kwargs: [1.0] * 8 + varied(completions[8:])

    assert_exact(tmp_path, (1,), max_steps=4, gradient_accumulation_steps=2, algorithm="grpo", prepare=prepare)
    assert any(None in buffered for buffered in saved if buffered)
    assert saved[1] is None  # after the rollout's last update


def test_log_probabilities_of_the_sampler(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    sampler = own_logprobs(0.1)

    def rollout(prompts, trainer):
        """Draw from torch's random numbers, which a checkpoint keeps; a state of its own would not be saved."""
        seed = int(torch.randint(1 << 30, ()))
        return random_rollouts(seed=seed, longest=4, sampler=sampler)[0](prompts, trainer)

    assert_exact(tmp_path, (3,), max_steps=5, behaviour_policy="sampler", rollout_func=rollout, model=tiny_model)


def test_a_reference_model_that_moves(tmp_path):
    small_model().save_pretrained(tmp_path / "model")

    def model():
        policy = small_model()
        policy.config._name_or_path = str(tmp_path / "model")
        return policy

    moving = {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    assert_exact(tmp_path, (3,), max_steps=6, model=model, **moving)


def test_an_entropy_bonus_that_adapts(tmp_path):
    """Step 5 lies in the first of an epoch's two rollouts; which prompts the second has is drawn with the epoch."""
    adapting = {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 1.0}
    assert_exact(tmp_path, (5,), max_steps=7, steps_per_generation=2, **adapting)


def test_what_happens_at_the_end_of_an_epoch(tmp_path):
    """The checkpoint of an epoch's last update is older than the evaluation and the entry that close the epoch; that of
    the last update of all is followed by these alone."""
    whole = assert_exact(
        tmp_path, (4, 6), prompts=4, logging_strategy="epoch", eval_strategy="epoch", max_steps=6, save_steps=2
    )
    assert [entry["step"] for entry in whole.state.log_history] == [4, 4, 6, 6, 6]


def test_a_stream_of_data_that_starts_again(tmp_path):
    """A stream of two rollouts with two updates each: step 4 is its end, step 5 lies in its second round."""
    stream = TINY_PROMPTS.select(range(8)).to_iterable_dataset()
    seen = []

    def prepare(trainer):
        generate = trainer._generate_and_score_completions

        def noted(inputs):
            seen[-1].append([example["prompt"] for example in inputs])
            return generate(inputs)

        seen.append([])
        trainer._generate_and_score_completions = noted

    assert_exact(
        tmp_path, (4, 5), max_steps=7, prompts=stream, prepare=prepare, steps_per_generation=2, num_generations=2
    )
    whole, at_its_end, in_its_second_round = seen
    assert len(whole) == 4
    assert whole[2:] == at_its_end
    assert whole[3:] == in_its_second_round
    first, second = ([prompt for rollout in rollouts for prompt in rollout] for rollouts in (whole[:2], whole[2:]))
    assert sorted(first) == sorted(second)
    assert first != second  # shuffled anew


def test_completions_logged_only_after_a_resume_inside_a_rollout(tmp_path):
    """The rest of that rollout has no numbers in the table; the next one has."""
    config = {"max_steps": 8, "num_iterations": 2, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, **config).train()
    resumed = make_trainer(tmp_path, log_completions=True, num_completions_to_print=1, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 8
    assert len(resumed._logs["extra"]["trajectory_ratio"]) == len(resumed._logs["prompt"]) == 16


def test_a_state_of_another_version_is_not_used(tmp_path, messages):
    config = {"max_steps": 4, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, **config).train()
    torch.save({"_step": 3}, tmp_path / "checkpoint-3/tic_grpo_state_0.pt")
    (tmp_path / "checkpoint-3/manifest.json").unlink()  # which knows the size of the file
    resumed = make_trainer(tmp_path, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 4
    assert [text for text in messages() if "was written by another version" in text]


def test_the_manifest_counts_the_data_that_are_trained_on(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train_dataset = trainer.train_dataset.select(range(16))
    trainer.train()
    assert read_manifest(tmp_path / "checkpoint-1")["settings"]["number of prompts"] == 16
