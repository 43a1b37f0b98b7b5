"""Trainings with carry-over: what they train on, with which ratios, and that waiting is a special case of it."""

import dataclasses
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import test_gradient
import torch
from carrying import generate, talkative_model
from conftest import (
    CPU,
    TINY_PROMPTS,
    drifted,
    logps,
    loss_and_gradients,
    make_trainer,
    relative_error,
    tiny_model,
    tiny_tokenizer,
)
from rollouts import build, random_rollouts, with_vllm_correction
from test_gradient import HORIZON, exact
from transformers import TrainerCallback

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.carry_over.carry_over import Share


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

EXAMPLES = TINY_PROMPTS.select(range(26)).add_column("answer", list(range(26)))
PROMPTS, GROUP = 4, 4  # prompts of a rollout, responses of a group
EPOCH = 6  # rollouts; two examples are left over
COLUMNS = ("prompt_ids", "completion_ids", "sampling_per_token_logps", "token_age")


def rows(inputs, names=COLUMNS):
    """The responses of a rollout or a micro-batch, without padding and blank ones."""
    found = []
    for index in range(len(inputs["completion_ids"])):
        prompt, completion = (inputs[f"{kind}_mask"][index].bool() for kind in ("prompt", "completion"))
        if completion.any():
            masks = [prompt if name.startswith("prompt") else completion for name in names]
            found.append(
                tuple(tuple(inputs[name][index][mask].tolist()) for name, mask in zip(names, masks, strict=True))
            )
    return found


class Noting(TICGRPOTrainer):
    """Notes the rollouts, what the rewards saw, and what was trained on."""

    def __init__(self, folder, data=EXAMPLES, model=None, **config):
        settings = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
            "num_generations": GROUP,
            "max_completion_length": 48,
            "max_carry_over": 2,
            "max_steps": 20,
            "learning_rate": 0.3,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        self.rollouts, self.seen, self.trained = [], [], []
        super().__init__(
            model=talkative_model() if model is None else model,
            reward_funcs=self.reward,
            args=TICGRPOConfig(str(folder), **CPU | settings | config),
            train_dataset=data,
            eval_dataset=EXAMPLES.select(range(4)),
            processing_class=tiny_tokenizer(),
        )

    def reward(self, prompts, completions, completion_ids, answer, **kwargs):
        if self.model.training:
            self.seen.append(list(zip(prompts, completions, completion_ids, answer, strict=True)))
        return [text.split().count("a") / 4 for text in completions]

    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        if self.model.training:
            pool = self.carry_over.pool if self.carry_over else SimpleNamespace(groups=[])
            self.rollouts.append(SimpleNamespace(rows=rollout, pool=list(pool.groups), epoch=self.position.epoch))
        return rollout

    def _compute_loss(self, model, inputs):
        if self.model.training:
            old = inputs["old_per_token_logps"]
            mask = inputs["completion_mask"].bool()
            assert torch.equal(old[mask], inputs["sampling_per_token_logps"][mask])
            self.trained += rows(inputs)
        return super()._compute_loss(model, inputs)

    @property
    def logs(self):
        return [entry for entry in self.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("late", "times", "stream"), [(1, 2.0, True), (2, 1.5, False), (3, 3.0, False)])
def test_each_prompt_is_trained_on_once_with_its_own_columns(tmp_path, late, times, stream):
    """Over two epochs, whose boundary the pool crosses; in the end nothing is left."""
    data = EXAMPLES.to_iterable_dataset() if stream else EXAMPLES
    settings = {"max_carry_over": late, "oversampling": times, "max_steps": 2 * 2 * EPOCH}
    trainer = Noting(tmp_path, data, shuffle_dataset=False, **settings)
    trainer.train()
    assert trainer.state.global_step == 2 * 2 * EPOCH
    assert trainer.carry_over.pool.groups == []
    counted = Counter(answer for seen in trainer.seen for *_, answer in seen)
    assert counted == dict.fromkeys(range(EPOCH * PROMPTS), 2 * GROUP)

    tokenizer, texts = trainer.processing_class, EXAMPLES["prompt"]
    for seen, rollout in zip(trainer.seen, trainer.rollouts, strict=True):
        assert len(seen) == PROMPTS * GROUP
        for (prompt, text, ids, answer), (prompt_ids, tokens) in zip(
            seen, rows(rollout.rows, ("prompt_ids", "completion_ids")), strict=True
        ):
            assert prompt == texts[answer] == tokenizer.decode(prompt_ids)
            assert tuple(ids) == tokens
            assert text == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(rollout.pool) <= times * PROMPTS - PROMPTS
        assert all(len(group.responses) == GROUP for group in rollout.pool)

    moved = [call - answer // PROMPTS for call, seen in enumerate(trainer.seen[:EPOCH]) for *_, answer in seen]
    assert set(moved) - {0}  # not every prompt is in its own rollout
    assert trainer.rollouts[EPOCH - 1].pool[-1].number >= EPOCH * PROMPTS  # begun in the first epoch, of the second one
    ages = torch.cat([rollout.rows["token_age"].flatten() for rollout in trainer.rollouts])
    assert 1 <= ages.max() <= late + times - 1


def test_what_trains_is_what_was_recorded(tmp_path):
    """Tokens, log-probabilities and ages stay together from the pool to the loss, and are the ratios' denominators."""
    trainer = Noting(tmp_path, skip_zero_advantage=False)
    trainer.train()
    assert len(trainer.rollouts) == 10
    recorded = Counter(row for rollout in trainer.rollouts for row in rows(rollout.rows))
    assert Counter(trainer.trained) == recorded
    assert any(max(row[3]) > 0 for row in recorded)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2},
        {"beta": 0.1},
        {"algorithm": "grpo"},
        {"algorithm": "gspo"},
        {"gradient_accumulation_steps": 4},
        {"pad_to_multiple_of": 8},
        {"gradient_checkpointing": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_of_the_update_go_with_it(tmp_path, settings):
    if "beta" in settings:
        model = talkative_model()
        model.save_pretrained(tmp_path / "reference")
        model.config._name_or_path = str(tmp_path / "reference")
    else:
        model = None
    trainer = Noting(tmp_path / "run", model=model, max_steps=8, **settings)
    trainer.train()
    rollouts = {"num_iterations": 2, "gradient_accumulation_steps": 8}.get(next(iter(settings)), 4)
    assert len(trainer.rollouts) == rollouts
    assert trainer.carry_over.pool.groups == []
    assert all(row.isfinite().all() for row in trainer.model.parameters())
    assert max(rollout.rows["token_age"].max() for rollout in trainer.rollouts) > 0


def test_a_second_training_begins_anew(tmp_path):
    """Of the first one, which a callback ended, nothing is left."""
    trainer = Noting(tmp_path, max_steps=8)
    stop = StopAfter(steps=2)
    trainer.add_callback(stop)
    trainer.train()
    assert len(trainer.rollouts) == 1
    assert len(trainer.carry_over.pool.groups) == PROMPTS
    trainer.remove_callback(stop)
    trainer.seen, trainer.rollouts = [], []
    trainer.train()
    assert len(trainer.rollouts) == 4
    assert trainer.carry_over.pool.groups == []
    assert set(Counter(answer for seen in trainer.seen for *_, answer in seen).values()) == {GROUP}


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def test_an_evaluation_leaves_a_full_pool_alone(tmp_path):
    def state(trainer):
        pool = trainer.carry_over.pool
        return str(pool.state_dict()), trainer.carry_over.reader.position

    trainer = Noting(tmp_path / "evaluates", max_steps=8, eval_strategy="steps", eval_steps=2)
    states = []
    evaluate = trainer.evaluate

    def noted(*args, **kwargs):
        before, groups = state(trainer), len(trainer.carry_over.pool.groups)
        with torch.random.fork_rng():  # so that the training goes on as without
            metrics = evaluate(*args, **kwargs)
        assert state(trainer) == before
        states.append(groups)
        return metrics

    trainer.evaluate = noted
    trainer.train()
    assert states == [4, 4, 4, 0]
    other = Noting(tmp_path / "does not", max_steps=8)
    other.train()
    assert trainer.trained == other.trained
    evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(evaluations) == 4
    assert all(entry["eval_completions/mean_length"] > 1 for entry in evaluations)


# Waiting is a special case


@pytest.mark.parametrize("late", [1, 3])
@pytest.mark.parametrize("longest", [8, 24])
def test_equal_lengths_and_one_rollout_at_a_time_are_waiting(tmp_path, longest, late):
    """Bit for bit where a response is one segment; with three, its keys and values are computed in other passes."""
    runs = []
    for settings in ({"max_carry_over": late, "oversampling": 1.0}, {"max_carry_over": 0}):
        torch.manual_seed(0)
        trainer = Waiting(
            tmp_path / str(settings["max_carry_over"]),
            max_completion_length=longest,
            generation_kwargs={"min_new_tokens": longest},
            behaviour_policy="sampler",
            max_steps=12,
            **settings,
        )
        trainer.train()
        runs.append(trainer)
    carried, waited = runs
    assert len(carried.rollouts) == len(waited.rollouts) == 6
    for mine, theirs in zip(carried.rollouts, waited.rollouts, strict=True):
        assert not mine.rows["token_age"].any()
        for name in ("prompt_ids", "completion_ids", "completion_mask", "advantages"):
            assert torch.equal(mine.rows[name], theirs.rows[name]), name
        difference = mine.rows["sampling_per_token_logps"] - theirs.rows["sampling_per_token_logps"]
        assert difference.abs().max() <= (0 if longest == 8 else 1e-5)
    start = talkative_model().state_dict()
    for mine, theirs in zip(carried.model.parameters(), waited.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if longest == 8 else 1e-5)
    assert any((mine - start[name]).abs().max() > 1e-3 for name, mine in carried.model.state_dict().items())
    compared = ("loss", "grad_norm", "trajectory_ratio/ess", "trajectory_ratio/log_std")
    for mine, theirs in zip(carried.logs, waited.logs, strict=True):
        assert {name: mine[name] for name in compared} == pytest.approx(
            {name: theirs[name] for name in compared}, abs=1e-5
        )


class Waiting(Noting):
    def _compute_loss(self, model, inputs):
        return TICGRPOTrainer._compute_loss(self, model, inputs)


# The gradient of responses that several versions wrote


enumeration = test_gradient.enumeration  # the fixture


def several_versions(enumeration, models, ends):
    """Every trajectory, its log-probability under the versions that wrote it, and each token's age.

    `ends`: the number of tokens after which each version was interrupted.
    """
    position = torch.arange(HORIZON)
    version = sum((position >= end).long() for end in ends)
    of_models = torch.stack([logps(model, enumeration).detach() for model in models])  # (versions, n, T)
    recorded = of_models.gather(0, version.expand(1, of_models.size(1), HORIZON)).squeeze(0)
    age = (len(models) - 1 - version).expand_as(recorded) * enumeration["completion_mask"]
    return recorded * enumeration["completion_mask"], age, of_models


def gradient_error(tmp_path, enumeration, ends, drift, denominator="recorded", **config):
    """Relative error of −T·(gradient of the trainer's loss) against ∇J(θ), both sums over all trajectories."""
    versions = [drifted(tiny_model(), drift, seed=seed) for seed in range(1, len(ends) + 2)]
    model = drifted(versions[-1], drift, seed=9)  # the updates of the rollout have moved it on
    rewards = torch.rand(len(enumeration["prompt_ids"]), generator=torch.Generator().manual_seed(5)).double()
    recorded, age, of_versions = several_versions(enumeration, versions, ends)
    behaviour = recorded.double().sum(1).exp()
    assert behaviour.sum() == pytest.approx(1, abs=1e-5)
    policy, gradient = exact(model, enumeration, rewards)
    assert (policy / behaviour).max() < 1e4  # far from the cap
    sampled = recorded if denominator == "recorded" else of_versions[-1] * enumeration["completion_mask"]
    inputs = enumeration | {
        # as in test_gradient.py: this makes the mean over trajectories the expectation over the behaviour policy
        "advantages": (len(rewards) * behaviour * (rewards - 0.3)).float(),
        "sampling_per_token_logps": sampled,
        "token_age": age,
    }
    settings = {"loss_type": "dr_grpo", "max_completion_length": HORIZON, "max_carry_over": len(ends)}
    trainer = make_trainer(tmp_path, model, **settings | {"epsilon_high": 1e6} | config)
    trainer.scorer.score([inputs], trainer._metrics["train"])
    _, gradients = loss_and_gradients(trainer, inputs)
    return relative_error({name: -HORIZON * value for name, value in gradients.items()}, gradient)


ENDS = [(1,), (2,), (1, 2)]


@pytest.mark.parametrize("algorithm", ["tic_grpo", "tic_grpo_capped"])
@pytest.mark.parametrize("drift", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_gradient_is_the_policy_gradient_whatever_versions_wrote(tmp_path, enumeration, ends, drift, algorithm):
    error = gradient_error(tmp_path, enumeration, ends, drift, algorithm=algorithm)
    print(f"{algorithm}, {len(ends) + 1} versions, drift {drift}: relative error {error:.1e}")
    assert error <= 1e-4


@pytest.mark.parametrize("drift", [0.3, 0.5])
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_a_ratio_to_the_last_version_alone_is_wrong(tmp_path, enumeration, ends, drift):
    error = gradient_error(tmp_path, enumeration, ends, drift, denominator="last")
    print(f"last version alone, {len(ends) + 1} versions, drift {drift}: relative error {error:.1e}")
    assert error > 0.05


# The trainer's policy as the behaviour policy


@pytest.mark.parametrize(("mode", "low", "high"), [("sequence_truncate", None, 1.5), ("sequence_mask", 0.8, 1.5)])
def test_the_correction_is_the_old_policy_over_what_was_recorded(tmp_path, enumeration, mode, low, high):
    """One product per response, over all versions that wrote it, bounded as TRL does it."""
    versions = [drifted(tiny_model(), 0.1, seed=seed) for seed in (1, 2, 3)]
    trainer = build(tmp_path, random_rollouts(), model=versions[-1], behaviour_policy="trainer", steps_per_generation=2)
    with_vllm_correction(mode, low, high)(trainer)
    recorded, age, of_versions = several_versions(enumeration, versions, (1, 2))
    inputs = enumeration | {
        "advantages": torch.ones(len(recorded)),
        "sampling_per_token_logps": recorded,
        "token_age": age,
    }
    trainer.model.train()
    trainer.packed_forward.choose_layout()
    trainer.scorer.score([inputs], trainer._metrics["train"])
    mask = enumeration["completion_mask"]
    assert ((inputs["old_per_token_logps"] - of_versions[-1]) * mask).abs().max() < 1e-5
    products = []
    for old, sampled, tokens in zip(of_versions[-1], recorded, mask.sum(1), strict=True):
        product = 1.0
        for position in range(int(tokens)):
            product *= math.exp(old[position]) / math.exp(sampled[position])
        products.append(product)
    products = torch.tensor(products)
    assert products.min() < 0.8 < 1.5 < products.max()
    bounded = products.clamp(max=high) if mode == "sequence_truncate" else products
    if mode == "sequence_mask":
        bounded = torch.where((products < low) | (products > high), 0.0, products)
    torch.testing.assert_close(inputs["importance_sampling_ratio"].squeeze(1), bounded, rtol=1e-4, atol=1e-6)


# Processes


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(0, 2, 0, 1), (2, 2, 0, 1), (4, 2, 0, 1), (6, 2, 0, 1)]),
        ({"use_vllm": True}, [(0, 2, 0, 1), (2, 2, 0, 1), (4, 2, 0, 1), (6, 2, 0, 1)]),
        (
            {"use_vllm": True, "vllm_tensor_parallel_size": 2},
            [(0, 4, 0, 2), (0, 4, 1, 2), (4, 4, 0, 2), (4, 4, 1, 2)],
        ),
        ({"use_vllm": True, "vllm_mode": "server"}, [(0, 8, process, 4) for process in range(4)]),
    ],
)
def test_share_of_a_process(tmp_path, settings, expected):
    """Of eight prompts in four processes: first prompt, prompts, and the part that is trained on. Together they are the
    rollout, in the order of TRL's loader."""
    trainer = Noting(tmp_path)
    trainer.schedule = dataclasses.replace(trainer.schedule, processes=4, steps_per_generation=2)
    for name, value in settings.items():
        setattr(trainer.args, name, value)
    taken = []
    for process, values in enumerate(expected):
        trainer.accelerator = SimpleNamespace(process_index=process)
        share = Share.of(trainer)
        assert (share.first, share.prompts, share.part, share.parts) == values
        assert share.broadcast == ("vllm_mode" in settings)
        taken += share.of_process(list(range(share.first * GROUP, (share.first + share.prompts) * GROUP)))
    assert taken == list(range(8 * GROUP))


# What it refuses while it runs


def test_prompts_that_have_changed_are_refused(tmp_path):
    trainer = Noting(tmp_path)
    rollout = generate(trainer)
    prompts = [row[0] for row in rows(rollout, ("prompt_ids",))]
    assert trainer.carry_over.take([list(prompt) for prompt in prompts])[0]
    with pytest.raises(ValueError, match=r"^The prompts of responses that were carried over have changed: .* Resume "):
        trainer.carry_over.take([[9, *prompt] for prompt in prompts])


def test_a_discarded_rollout_goes_back(tmp_path):
    """Its prompts are generated again, and nothing else is lost."""
    trainer = Noting(tmp_path)
    first = generate(trainer)
    pool = trainer.carry_over.pool
    carried = {group.number: [list(each.tokens) for each in group.responses] for group in pool.groups}
    trainer.carry_over.put_back()
    assert [group.number for group in pool.groups] == list(range(2 * PROMPTS))
    assert pool.call == 0
    for group in pool.groups:
        assert [each.tokens for each in group.responses] == carried.get(group.number, [[]] * GROUP)
    again = generate(trainer)
    assert rows(again) != rows(first)
    assert pool.call == 1
