"""A run with carry-over that resumes ends like one that was never stopped, bit for bit: its pool comes back as it was
saved, and every prompt of every epoch is trained on once."""

import shutil
import signal
from collections import Counter
from itertools import chain

import pytest
import torch
from conftest import CPU, WORDS, tiny_model, tiny_tokenizer
from datasets import Dataset
from killing import (
    Moment,
    assert_same_run,
    differences,
    draw,
    fresh_chance,
    kill_again_and_again,
    launched,
    resuming,
)
from launching import CONFIGS, ON_CPU, ROOT, run_script
from topologies import EXPECTED
from transformers import TrainerCallback

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.carry_over.prompts import PromptReader
from tic_grpo_trl.checkpoint.storage import to_plain


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

DATA = Dataset.from_dict({"prompt": [f"{a} {b}" for a in WORDS[1:5] for b in WORDS[1:3]], "n": range(8)})
HELD_OUT = Dataset.from_dict({"prompt": ["e e"], "n": [100]})
GROUP = 4
SETTINGS = {
    "per_device_train_batch_size": 8,  # two prompts: K = 1
    "num_generations": GROUP,
    "num_generations_eval": 2,
    "num_iterations": 2,
    "max_completion_length": 24,  # three segments
    "temperature": 1.5,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "log_completions": True,
    "num_completions_to_print": 1,
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "max_steps": 16,  # two epochs of four rollouts
}
# One mini-batch for each of a rollout's four prompts: K = 4. Two rollouts per epoch; the last one serves six updates
K4 = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "save_steps": 4, "eval_steps": 7, "max_steps": 30}
WITH = {"max_carry_over": 2}


class Watch(TrainerCallback):
    """Keep the state of carry-over before the first step, and the examples that are trained on."""

    def __init__(self):
        self.resumed = None
        self.examples: list[int] = []  # one for each response, as the reward function sees them

    def reward(self, prompts, completions, n=None, **columns):
        if n is not None and n[0] < 100:
            assert prompts == [DATA[number]["prompt"] for number in n]
            self.examples += n
        return [sum(map(ord, text)) % 5 / 4 for text in completions]

    def on_step_begin(self, args, state, control, **kwargs):
        if self.resumed is None and self.trainer.carry_over:
            self.resumed = to_plain(self.trainer.carry_over.state_dict())


def build(folder, data=DATA, **config):
    watch = Watch()
    watch.trainer = trainer = TICGRPOTrainer(
        model=tiny_model(num_hidden_layers=1, hidden_size=8, intermediate_size=8),
        reward_funcs=watch.reward,
        args=TICGRPOConfig(str(folder), **CPU | SETTINGS | config),
        train_dataset=data,
        eval_dataset=HELD_OUT,
        processing_class=tiny_tokenizer(),
        callbacks=[watch],
    )
    trainer.watch = watch
    return trainer


def train(folder, resume=None, **config):
    trainer = build(folder, **config)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def saved(run, step, process=0):
    return torch.load(run / f"checkpoint-{step}/tic_grpo_state_{process}.pt", weights_only=True)


def unfinished(pool):
    """Return how many tokens each unfinished response of a pool has, as far as it has any."""
    return [length for length, ends in zip(pool["lengths"], pool["finished"], strict=True) if length and not ends]


def copy_up_to(step, whole, folder):
    """Copy what a run had written when it was killed after a step."""
    steps = {path: int(path.name.rpartition("-")[2]) for path in whole.glob("checkpoint-*")}
    steps |= {path: int(path.stem.rpartition("_")[2]) for path in whole.glob("completions/completions_*")}
    later = [path.name for path, its in steps.items() if its > step]
    shutil.copytree(whole, folder, ignore=lambda *_: later)


def rollouts_of(run, process=0):
    """Return the numbers of the groups of every rollout of a process, from its checkpoints."""
    found = []
    for step in sorted(int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")):
        numbers = [number for number, *_ in saved(run, step, process)["carry_over"]["released"]["groups"]]
        found += [numbers] if found[-1:] != [numbers] else []
    return found


def assert_once_each(run, *examples, epochs=2):
    """Check that whole epochs were trained on: every prompt once in each, every group once."""
    assert Counter(chain(*examples)) == dict.fromkeys(range(len(DATA)), epochs * GROUP)
    assert sorted(chain(*rollouts_of(run))) == list(range(epochs * len(DATA)))


def own(number):
    return number // 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed run, and what its reward function saw."""
    folder = tmp_path_factory.mktemp("carry-over") / "whole"
    return folder, train(folder, **WITH).watch.examples


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A run without carry-over."""
    folder = tmp_path_factory.mktemp("without") / "whole"
    return folder, train(folder).watch.examples


@pytest.mark.parametrize("step", [5, 8])
def test_inside_a_rollout_and_at_the_end_of_an_epoch(whole, tmp_path, step):
    folder, examples = whole
    copy_up_to(step, folder, tmp_path / "run")
    resumed = train(tmp_path / "run", resume=True, **WITH).watch
    state = saved(folder, step)
    pool = state["carry_over"]["pool"]
    assert len(pool["groups"]) == 2
    assert unfinished(pool)
    assert (state["rollout"]["micro_batches"] is not None) == (step == 5)
    assert differences(resumed.resumed, state["carry_over"], "carry_over") == []
    assert_same_run(tmp_path / "run", folder)
    assert_once_each(folder, examples)
    assert any(own(number) != rollout for rollout, numbers in enumerate(rollouts_of(folder)) for number in numbers)


def test_four_updates_per_rollout_half_a_rollout_ahead_and_an_end_inside_one(tmp_path):
    config = WITH | K4 | {"oversampling": 1.5}
    examples = train(tmp_path / "whole", **config).watch.examples
    copy_up_to(12, tmp_path / "whole", tmp_path / "run")
    resumed = train(tmp_path / "run", resume=True, **config).watch
    pools = [saved(tmp_path / "whole", step)["carry_over"]["pool"]["groups"] for step in (4, 12, 20, 28)]
    assert [len(groups) for groups in pools] == [2, 2, 2, 0]
    assert differences(resumed.resumed, saved(tmp_path / "whole", 12)["carry_over"], "carry_over") == []
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert_once_each(tmp_path / "whole", examples)


def test_another_bound_and_other_oversampling(whole, tmp_path):
    """The pool goes on under the new rule: first with S = 3 and a third rollout in flight, then with S = 1 and none."""
    folder, examples = whole
    copy_up_to(3, folder, tmp_path / "more")
    more = train(tmp_path / "more", resume=True, max_carry_over=3, oversampling=3.0).watch
    assert differences(more.resumed, saved(folder, 3)["carry_over"], "carry_over") == []
    assert_once_each(tmp_path / "more", examples[: 2 * 2 * GROUP], more.examples)
    assert max(len(saved(tmp_path / "more", step)["carry_over"]["pool"]["groups"]) for step in range(3, 17)) == 4
    rollouts = rollouts_of(tmp_path / "more")
    assert all(own(number) - 2 <= rollout <= own(number) + 3 for rollout, of in enumerate(rollouts) for number in of)

    copy_up_to(9, tmp_path / "more", tmp_path / "less")
    less = train(tmp_path / "less", resume=True, max_carry_over=1, oversampling=1.0).watch
    assert differences(less.resumed, saved(tmp_path / "more", 9)["carry_over"], "carry_over") == []
    assert_once_each(tmp_path / "less", examples[: 2 * 2 * GROUP], more.examples[: 3 * 2 * GROUP], less.examples)
    # what was read ahead is trained on first
    assert rollouts_of(tmp_path / "less")[7:] == [[14, 15]]


def test_carry_over_that_begins_inside_a_rollout_or_at_its_end(whole, without, tmp_path):
    folder, examples = without
    with pytest.raises(ValueError, match="is inside a rollout of another algorithm") as error:
        train(tmp_path / "refused", resume=str(folder / "checkpoint-3"), **WITH)
    assert "behaviour_policy = sampler (was trainer)" in str(error.value)
    assert "\n" not in str(error.value)
    copy_up_to(4, folder, tmp_path / "end")
    at_end = train(tmp_path / "end", resume=True, **WITH).watch
    assert Counter(examples[: 2 * 2 * GROUP] + at_end.examples) == dict.fromkeys(range(len(DATA)), 2 * GROUP)

    copy_up_to(3, folder, tmp_path / "new")
    anew = train(tmp_path / "new", resume=True, discard_rollout_on_resume=True, max_steps=17, **WITH).watch
    seen = examples[: 2 * GROUP] + anew.examples  # the second rollout is generated anew, as the rest of the two epochs
    assert Counter(seen) == dict.fromkeys(range(len(DATA)), 2 * GROUP)


def test_carry_over_ends_where_nothing_is_carried_over(whole, without, tmp_path):
    """Also where `oversampling` has emptied the pool."""
    folder, _ = whole
    with pytest.raises(ValueError, match="carries over 2 groups of responses, which don't fit these settings") as error:
        train(tmp_path / "refused", resume=str(folder / "checkpoint-8"))
    assert ": max_carry_over = 0 (was 2). Resume with the old ones, or first with oversampling=1" in str(error.value)
    assert "\n" not in str(error.value)

    copy_up_to(9, folder, tmp_path / "emptied")
    train(tmp_path / "emptied", resume=True, oversampling=1.0, **WITH)
    assert [len(saved(tmp_path / "emptied", step)["carry_over"]["pool"]["groups"]) for step in (10, 11)] == [2, 0]
    copy_up_to(12, tmp_path / "emptied", tmp_path / "ended")
    ended = train(tmp_path / "ended", resume=True).watch
    assert ended.examples == without[1][6 * 2 * GROUP :]


def test_a_discarded_rollout_is_begun_again(whole, tmp_path):
    """The second rollout, after one update: its groups go back to the pool, and tokens of its weights are older now."""
    folder, examples = whole
    copy_up_to(3, folder, tmp_path / "run")
    resumed = train(tmp_path / "run", resume=True, discard_rollout_on_resume=True, max_steps=17, **WITH).watch
    state = saved(folder, 3)["carry_over"]
    assert [number for number, *_ in resumed.resumed["pool"]["groups"]] == [2, 3, 4, 5]
    assert Counter(examples[: 2 * GROUP] + resumed.examples) == dict.fromkeys(range(len(DATA)), 2 * GROUP)
    pool = state["pool"]
    begun = [tokens for tokens in pool["tokens"].split(pool["lengths"]) if len(tokens) > 8]
    ages = [
        age[: len(tokens) + 1].tolist()
        for batch in saved(tmp_path / "run", 4)["rollout"]["micro_batches"]
        for ids, age in zip(batch["completion_ids"], batch["token_age"], strict=True)
        for tokens in begun
        if torch.equal(ids[: len(tokens)], tokens)
    ]
    assert ages == [[2] * 8 + [1] * 8 + [0]] * 2


MISFITS = {
    "per_device_train_batch_size = 4 (was 8)": {"per_device_train_batch_size": 4},
    "num_generations = 2 (was 4)": {"num_generations": 2},
    "num_iterations = 1 (was 2)": {"num_iterations": 1},
    "number of prompts = 6 (was 8)": {"data": DATA.select(range(6))},
    "seed = 1 (was 42)": {"seed": 1},
    "shuffle_dataset = False (was True)": {"shuffle_dataset": False},
}


@pytest.mark.parametrize("changed", MISFITS)
def test_settings_and_data_that_the_pool_does_not_fit_are_refused(whole, tmp_path, changed):
    with pytest.raises(ValueError, match="carries over 2 groups") as error:
        train(tmp_path, resume=str(whole[0] / "checkpoint-5"), **WITH | MISFITS[changed])
    assert f": {changed}. Resume with the old ones." in str(error.value)
    assert "\n" not in str(error.value)


def test_longer_responses_go_on_and_shorter_ones_where_none_is_longer(whole, tmp_path):
    with pytest.raises(ValueError, match="max_completion_length=8 is too short for an unfinished response of 8 tokens"):
        train(tmp_path / "short", resume=str(whole[0] / "checkpoint-9"), max_completion_length=8, **WITH)
    for longest in (9, 30):
        copy_up_to(9, whole[0], tmp_path / f"{longest}")
        resumed = train(tmp_path / f"{longest}", resume=True, max_completion_length=longest, **WITH).watch
        assert_once_each(tmp_path / f"{longest}", whole[1][: 5 * 2 * GROUP], resumed.examples)


def test_data_in_another_order_are_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="The prompts of responses that were carried over have changed") as error:
        train(tmp_path, resume=str(whole[0] / "checkpoint-5"), data=DATA.shuffle(seed=1), **WITH)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_its_pool_is_refused(tmp_path):
    train(tmp_path, save_only_model=True, **WITH | {"save_steps": 3, "max_steps": 6, "oversampling": 3.0})
    with pytest.raises(ValueError, match="carries over 2 groups of responses, but has no") as error:
        train(tmp_path, resume=str(tmp_path / "checkpoint-3"), **WITH)
    assert "save_only_model" in str(error.value)


def test_fewer_prompts_than_a_rollout(tmp_path):
    with pytest.raises(ValueError, match="prompts"):
        train(tmp_path, data=DATA.select(range(1)), **WITH)


STREAM = DATA.to_iterable_dataset()
SHARDS = DATA.to_iterable_dataset(num_shards=3)
ORDERS = {
    "shuffled": (DATA, {}),
    "in order": (DATA, {"shuffle_dataset": False}),
    "with a rest": (DATA.select(range(7)), {}),
    "unused columns": (DATA, {"remove_unused_columns": True}),
    "stream": (STREAM, {"shuffle_dataset": False}),
    "shuffled stream": (SHARDS, {}),
    "stream with unused columns": (STREAM, {"remove_unused_columns": True}),
    "stream shuffled by its owner": (SHARDS.shuffle(seed=3, buffer_size=4), {"shuffle_dataset": False}),
    "stream shuffled twice": (SHARDS.shuffle(seed=3, buffer_size=4), {}),
}


def epochs_of_loader(trainer, epochs, between=lambda: None):
    """Return the prompts' examples, epoch by epoch, as TRL's own loader brings them for training."""
    loader, found = trainer.get_train_dataloader(), []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        batches = []
        for batch in loader:
            batches.append(batch)
            between()
        found.append([example for batch in batches[:: trainer.schedule.rollout_steps] for example in batch[::GROUP]])
    return found


@pytest.mark.parametrize("order", ORDERS)
def test_prompts_come_in_the_order_of_the_loader_and_leave_it_alone(tmp_path, order):
    data, config = ORDERS[order]
    expected = epochs_of_loader(build(tmp_path, data=data, **config), 3)
    rollouts = [len(epoch) for epoch in expected]
    assert len(set(rollouts)) == 1
    trainer = build(tmp_path, data=data, **WITH | config)
    reader, read = trainer.carry_over.reader, []

    def read_ahead():
        if len(read) < sum(rollouts):
            read.append(reader.read())

    assert epochs_of_loader(trainer, 3, between=read_ahead) == expected
    assert getattr(data, "epoch", 0) == 0
    while len(read) < sum(rollouts):
        read_ahead()
    assert [example for _, example in read] == [*chain(*expected)]
    assert reader.read_again([place for place, _ in read]) == [*chain(*expected)]

    again = PromptReader(trainer, 0, 2)
    again.move(reader.position)
    goes_on = [reader.read() for _ in range(3)]
    assert [again.read() for _ in range(3)] == goes_on


def test_a_stream_resumes_with_its_pool(tmp_path):
    """Step 7 is in the first epoch, while the pool has prompts of the second."""
    config = WITH | {"max_steps": 12, "eval_strategy": "no", "oversampling": 3.0}
    train(tmp_path / "whole", data=SHARDS, **config)
    copy_up_to(7, tmp_path / "whole", tmp_path / "run")
    resumed = train(tmp_path / "run", resume=True, data=SHARDS, **config).watch
    state = saved(tmp_path / "whole", 7)
    assert {epoch for _, (epoch, _), _, _ in state["carry_over"]["pool"]["groups"]} == {1}
    assert state["position"]["epoch"] == 0
    assert differences(resumed.resumed, state["carry_over"], "carry_over") == []
    assert_same_run(tmp_path / "run", tmp_path / "whole")

    for other in (DATA.select(range(2)), DATA.shuffle(seed=1)):
        with pytest.raises(ValueError, match="The prompts of responses that were carried over have changed"):
            train(
                tmp_path / "other",
                resume=str(tmp_path / "whole/checkpoint-7"),
                data=other.to_iterable_dataset(),
                **config,
            )


COMMON = f"""--config {ROOT}/examples/recipes/starter.yaml --reward_funcs killing.even_letters --max_carry_over 2
    --num_generations 4 --num_iterations 2 --max_completion_length 32 --temperature 3 --learning_rate 3e-4
    --test_size 8 --per_device_eval_batch_size 8 --eval_steps 5 --save_strategy steps --logging_steps 2
    --log_completions true --num_completions_to_print 1 --disable_tqdm true""".split()
CASES = {
    # four rollouts per epoch, two updates each
    "K = 1": "--train_size 8 --per_device_train_batch_size 8 --updates_per_rollout 1 --max_steps 16 --save_steps 1",
    # two rollouts per epoch, eight updates each; the next rollout's half is read ahead
    "K = 4": """--train_size 8 --per_device_train_batch_size 4 --updates_per_rollout 4 --max_steps 32 --save_steps 2
        --oversampling 1.5""",
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    with launched(tmp_path_factory.mktemp("jobs"), CONFIGS / "cpu.yaml") as jobs:
        yield jobs


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_in_generation_in_updates_and_in_saves(jobs, tmp_path, case):
    """Kill it between two tokens of a segment and between two responses of one, then at random moments."""
    flags, whole, run = [*COMMON, *CASES[case].split()], tmp_path / "whole", tmp_path / "run"
    times = jobs.run(*resuming(whole, *flags))["times"]
    steps, save = (int(flags[flags.index(f"--{name}_steps") + 1]) for name in ("max", "save"))
    for moment in ({"DIE_AT_TOKEN": "45"}, {"DIE_AT_WRITE": "20"}):
        job = jobs.start(*resuming(run, *flags), **moment)
        assert job.wait() == [signal.SIGKILL], job.log()[-5000:]
        assert job.phase()[1] == "generation"
    chance = fresh_chance()
    moments = draw(chance, steps, save, {"update": 2, "saving": 2})
    moments += [Moment(steps // 2, "generation", chance.random())]
    kill_again_and_again(jobs, run, flags, sorted(moments, key=lambda moment: moment.step), times)
    jobs.run(*resuming(run, *flags))
    assert_same_run(run, whole)
    assert sorted(chain(*rollouts_of(run))) == list(range(16))
    assert any(unfinished(saved(run, step)["carry_over"]["pool"]) for step in range(save, steps, save))


# A group of four for each of two updates on each of two processes; two rollouts per epoch
OF_TWO = """--train_size 8 --per_device_train_batch_size 4 --updates_per_rollout 2 --max_steps 16 --save_steps 2
    --eval_strategy no --eval_on_start false""".split()


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["multi_gpu", "zero3", "fsdp2"])
def test_processes_killed_in_generation(tmp_path, name):
    """Each has a pool of its own, and they are not equally far."""
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    flags, whole, run = [*COMMON, *OF_TWO], tmp_path / "whole", tmp_path / "run"
    with launched(tmp_path / "jobs", CONFIGS / f"{name}.yaml", 2, ON_CPU) as jobs:
        ended = jobs.run(*resuming(whole, *flags))
        assert ended["num_processes"] == 2
        assert {key: ended[key] for key in EXPECTED[name]} == EXPECTED[name]
        kill_again_and_again(jobs, run, flags, [Moment(8, "generation", fresh_chance().random())], ended["times"])
        jobs.run(*resuming(run, *flags))
    assert_same_run(run, whole)
    pools = [[saved(run, step, process)["carry_over"]["pool"] for process in (0, 1)] for step in range(2, 16, 2)]
    assert any(unfinished(first) != unfinished(second) for first, second in pools)
    rollouts = [rollouts_of(run, process) for process in (0, 1)]
    assert all(sorted(chain(*of_process)) == list(range(8)) for of_process in rollouts)
    if name == "multi_gpu":  # the others' checkpoints need their own kind of sharding
        flags += ["--output_dir", tmp_path / "alone", "--resume_from_checkpoint", run / "checkpoint-6"]
        alone = run_script(*flags)
        assert alone.returncode != 0
        assert "don't fit these settings: number of processes = 1 (was 2), number of pools = 1 (was 2)." in alone.stderr
