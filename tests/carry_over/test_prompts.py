"""Prompts that are read ahead are those of TRL's loader, in its order, in every epoch."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, TINY_PROMPTS, tiny_model, tiny_tokenizer
from datasets import Dataset
from rollouts import random_rollouts

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.carry_over.prompts import PromptReader


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

EXAMPLES = TINY_PROMPTS.select(range(11)).add_column("answer", list(range(11)))
PROMPTS, EPOCH = 4, 2  # of a rollout, and rollouts of an epoch: three examples are left over


def build(tmp_path, data=EXAMPLES, reward=None, **config):
    settings = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "max_completion_length": 24,
        "learning_rate": 0.0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 16,
    }
    rollout, rewards = random_rollouts(group=2)
    return TICGRPOTrainer(
        model=tiny_model(),
        reward_funcs=reward or rewards,
        args=TICGRPOConfig(str(tmp_path), **CPU | settings | config),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        rollout_func=rollout,
    )


def trained_on(tmp_path, **config):
    """The answers of the examples of every rollout of a training without carry-over, in order."""
    seen = []

    def reward(prompts, answer, **kwargs):
        seen.append(answer[::2])
        return [0.0] * len(prompts)

    build(tmp_path, reward=reward, **config).train()
    return seen


def read(trainer, rollouts, first=0, count=PROMPTS):
    reader = PromptReader(trainer, first, count)
    return [[reader.read()[1]["answer"] for _ in range(count)] for _ in range(rollouts)]


@pytest.mark.parametrize("settings", [{}, {"shuffle_dataset": False}, {"num_iterations": 2, "seed": 7}])
@pytest.mark.parametrize("stream", [False, True])
def test_order_is_that_of_the_loader(tmp_path, settings, stream):
    data = EXAMPLES.to_iterable_dataset() if stream else EXAMPLES
    expected = trained_on(tmp_path, data=data, **settings)
    rollouts = 16 // (2 * settings.get("num_iterations", 1))
    assert len(expected) == rollouts
    assert (expected[:EPOCH] == expected[EPOCH : 2 * EPOCH]) == (settings.get("shuffle_dataset") is False)
    assert read(build(tmp_path, data=data, **settings), rollouts) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_every_process_reads_its_part(tmp_path, stream):
    """Of each rollout, and goes on from where it was, or from where training is."""
    trainer = build(tmp_path, data=EXAMPLES.to_iterable_dataset() if stream else EXAMPLES)
    whole = read(trainer, 6)
    parts = [read(trainer, 6, first=first, count=2) for first in (0, 2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole

    reader = PromptReader(trainer, 2, 2)
    rest = [answer for rollout in parts[1] for answer in rollout]
    for count in range(len(rest)):
        again = PromptReader(trainer, 2, 2)
        again.move(reader.position)
        assert [again.read()[1]["answer"] for _ in rest[count:]] == rest[count:]
        reader.read()

    steps = trainer.schedule.rollout_steps
    trainer.position.epoch, trainer.position.batches = 1, steps  # the second rollout of the second epoch
    assert read(trainer, 3) == whole[3:]


@pytest.mark.parametrize("stream", [False, True])
def test_examples_are_found_again_by_their_places(tmp_path, stream):
    trainer = build(tmp_path, data=EXAMPLES.to_iterable_dataset() if stream else EXAMPLES)
    reader = PromptReader(trainer, 0, PROMPTS)
    found = [reader.read() for _ in range(4 * PROMPTS)]  # two epochs, which bring some examples twice
    for chosen in ([], found[3:9], found[::-5]):
        assert reader.read_again([place for place, _ in chosen]) == [example for _, example in chosen]


def test_reading_leaves_the_loader_of_the_run_alone(tmp_path):
    def epoch(loader):
        return [example["answer"] for batch in loader for example in batch]

    loader = build(tmp_path / "untouched").get_train_dataloader()
    expected = [epoch(loader), epoch(loader)]
    assert expected[0] != expected[1]

    trainer = build(tmp_path)
    loader, sampler = trainer.get_train_dataloader(), trainer.position.sampler
    first = epoch(loader)
    read(trainer, 3)
    assert trainer.position.sampler is sampler
    assert [first, epoch(loader)] == expected


@pytest.mark.parametrize("drops", [False, True])
def test_columns_are_those_that_rewards_see(tmp_path, drops):
    trainer = build(tmp_path, remove_unused_columns=drops)
    place, example = PromptReader(trainer, 0, PROMPTS).read()
    assert list(example) == (["prompt"] if drops else ["prompt", "answer"])
    assert PromptReader(trainer, 0, PROMPTS).read_again([place]) == [example]


def test_too_few_prompts(tmp_path):
    trainer = build(tmp_path)
    trainer.train_dataset = Dataset.from_dict({"prompt": ["a b", "a c", "b c"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"^train_dataset has fewer prompts than a rollout takes \(4\): use more data"):
        PromptReader(trainer, 0, PROMPTS).read()


def test_another_sampler(tmp_path):
    trainer = build(tmp_path)
    trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.args = SimpleNamespace(max_carry_over=2, remove_unused_columns=False)
    with pytest.raises(ValueError, match=r"^max_carry_over=2 .* the trainer has a SequentialSampler: remove it, or"):
        PromptReader(trainer, 0, PROMPTS).read()
