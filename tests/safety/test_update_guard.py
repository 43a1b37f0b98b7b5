"""Bad numbers injected at every point of an update, in one process: none reaches weights or optimizer."""

import dataclasses
import math

import pytest
import torch
from conftest import drifted, tiny_model, tiny_tokenizer
from faults import (
    INF,
    MARKED,
    NAN,
    ROWS,
    Judge,
    build,
    edit_rollouts,
    edit_scores,
    in_scoring,
    in_training,
    logged,
    marked_rollouts,
    poison_embedding,
    spoil_gradients,
    spoil_losses,
    without_marked,
)
from rollouts import count_forwards
from trl import GRPOTrainer

from tic_grpo_trl.safety.non_finite import NonFiniteError


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

PER_UPDATE = 8  # responses of a mini-batch


def set_marked(name, value):
    def edit(rollout, marked):
        rollout[name] = rollout[name].clone()
        rollout[name][marked] = value

    return lambda trainer: edit_rollouts(trainer, edit)


def add_ratio(value):
    """Add a ratio, as if vLLM had sampled and TRL corrected for it."""

    def edit(rollout, marked):
        rollout["importance_sampling_ratio"] = torch.ones(len(marked), 1)
        rollout["importance_sampling_ratio"][marked] = value

    return lambda trainer: edit_rollouts(trainer, edit)


def policy(value):
    return lambda trainer: poison_embedding(trainer.model, value, in_training)


def one_token_of_reference(value):
    def edit(logps, marked):
        logps[marked, 0] = value

    return lambda trainer: edit_scores(trainer, edit)


def reference(value):
    return lambda trainer: poison_embedding(trainer.ref_model, value)


def scored(value):
    return lambda trainer: poison_embedding(trainer.model, value, in_scoring)


# Where a number is made bad, and settings with which it would be read
FAULTS = {
    "policy nan": (policy(NAN), {}),
    "policy inf, padded": (policy(INF), {"padding_free": False}),
    "policy, zero-advantage responses kept": (policy(NAN), {"skip_zero_advantage": False}),
    "policy, mean over responses": (policy(NAN), {"loss_type": "grpo"}),
    "policy, tokens of the batch": (policy(NAN), {"algorithm": "grpo", "loss_type": "dapo"}),
    "policy, checkpointing": (policy(NAN), {"gradient_checkpointing": True}),
    "old, scored": (scored(NAN), {"skip_on_policy_logps": False}),
    "old, scored by TRL": (
        scored(INF),
        {"padding_free": False, "skip_zero_advantage": False, "skip_on_policy_logps": False},
    ),
    "reference": (reference(NAN), {"beta": 0.1}),
    "reference -inf": (one_token_of_reference(-INF), {"beta": 0.1}),
    "reference, exp overflows": (one_token_of_reference(100.0), {"beta": 0.1}),
    "advantage nan": (set_marked("advantages", NAN), {}),
    "advantage -inf, padded": (set_marked("advantages", -INF), {"padding_free": False}),
    "ratio inf": (add_ratio(INF), {}),
    "ratio nan": (add_ratio(NAN), {}),
}


def run(tmp_path, prepare, **config):
    if "beta" in config:
        model = tiny_model()
        drifted(model, 0.05).save_pretrained(tmp_path / "reference")
        model.config._name_or_path = str(tmp_path / "reference")  # where TRL takes it from
        config["model"] = model
    trainer = build(tmp_path, max_steps=2, **config)
    prepare(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("fault", FAULTS)
def test_a_dropped_response_contributes_exactly_nothing(tmp_path, fault, messages):
    """Gradients, losses and moments are those of a run in which its advantage is 0 (with a KL term: has no token)."""
    inject, settings = FAULTS[fault]
    clean = run(tmp_path / "clean", lambda t: without_marked(t, masked="beta" in settings), **settings)
    faulty = run(tmp_path / "faulty", inject, leader=clean.gradients, **settings)
    assert faulty.states.moved == [True] * 2
    for mine, theirs in zip(faulty.gradients.gradients, clean.gradients.gradients, strict=True):
        assert theirs.norm() > 0
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
    assert logged(faulty, "loss") == pytest.approx(logged(clean, "loss"), abs=1e-6)
    moments = [torch.cat([v["exp_avg"].flatten() for v in t.optimizer.state.values()]) for t in (faulty, clean)]
    assert torch.allclose(*moments, atol=1e-7)

    assert sum(logged(faulty, "frac_non_finite")) * PER_UPDATE == len(MARKED)
    assert logged(faulty, "update/skipped") == [0] * 2
    assert any("Non-finite numbers" in message and " e " in message for message in messages())


def test_a_run_without_faults_counts_nothing_and_is_trls(tmp_path):
    """So the guard changes no number."""
    guarded = run(tmp_path / "a", lambda trainer: None)
    unguarded = build(tmp_path / "b", max_steps=2)
    unguarded.compute_loss = lambda *args, **kwargs: GRPOTrainer.compute_loss(unguarded, *args, **kwargs)
    unguarded.train()
    for mine, theirs in zip(guarded.gradients.gradients, unguarded.gradients.gradients, strict=True):
        assert torch.equal(mine, theirs)
    assert logged(guarded, "frac_non_finite") == logged(guarded, "update/skipped") == [0] * 2


def test_without_the_guard_the_weights_would_be_lost(tmp_path):
    """This is the control: the same fault in TRL's own loop."""
    trainer = build(tmp_path, max_steps=1)
    poison_embedding(trainer.model, NAN, in_training)
    trainer.guard.check_forward = lambda *args: None
    trainer.guard.close_loss = lambda loss, *args: loss
    trainer._get_grad_norm = lambda *args, **kwargs: GRPOTrainer._get_grad_norm(trainer, *args, **kwargs)
    trainer.train()
    assert any(parameter.isnan().any() for parameter in trainer.model.parameters())


@pytest.mark.parametrize(
    ("value", "behaviour_policy"), [(-INF, "sampler"), (INF, "sampler"), (NAN, "sampler"), (-INF, "trainer")]
)
def test_log_probabilities_of_a_sampler(tmp_path, value, behaviour_policy):
    """An infinite one drops its response. NaN means that there is none, and is replaced."""

    def rollouts(bad):
        return marked_rollouts(sampler=lambda ids: [bad if i == 5 else -1.6 for i in ids])

    settings = {"behaviour_policy": behaviour_policy, "max_steps": 2}
    faulty = build(tmp_path / "faulty", rollouts(value), **settings)
    faulty.train()
    if math.isnan(value):
        assert logged(faulty, "frac_non_finite") == [0, 0]
        return
    assert sum(logged(faulty, "frac_non_finite")) * PER_UPDATE == len(MARKED)
    clean = build(tmp_path / "clean", rollouts(-1.6), **settings)
    without_marked(clean)
    clean.train()
    for mine, theirs in zip(faulty.gradients.gradients, clean.gradients.gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm() > 0


@pytest.mark.parametrize("settings", [{"algorithm": "grpo"}, {"algorithm": "gspo"}])
def test_a_token_ratio_that_overflows_drops_its_response(tmp_path, settings):
    """This concerns the algorithms whose ratio TRL computes; ours are bounded in log space."""
    rollouts = marked_rollouts(sampler=lambda ids: [-500.0 if 5 in ids else -1.6 for _ in ids])
    trainer = build(tmp_path, rollouts, behaviour_policy="sampler", max_steps=2, **settings)
    trainer.train()
    assert sum(logged(trainer, "frac_non_finite")) * PER_UPDATE == len(MARKED)
    assert trainer.states.moved == [True, True]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_response_stays_dropped_when_the_rollout_is_used_again(tmp_path):
    """It stays dropped even if the second pass finds nothing bad, because its old log-probabilities are gone."""
    trainer = build(tmp_path, max_steps=4, num_iterations=2)
    poison_embedding(trainer.model, NAN, lambda: in_training() and trainer.state.global_step < 2)
    trainer.train()
    shares = logged(trainer, "frac_non_finite")
    assert shares[:2] == shares[2:]
    assert sum(shares[:2]) * PER_UPDATE == len(MARKED)
    clean = build(tmp_path / "clean", max_steps=4, num_iterations=2)
    without_marked(clean)
    clean.train()
    for mine, theirs in zip(trainer.gradients.gradients, clean.gradients.gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm() > 0


# Whole updates

SPOILED = {
    "loss nan": lambda trainer: spoil_losses(trainer, {2}, NAN),
    "loss inf, gradient fine": lambda trainer: spoil_losses(trainer, {2}, INF),
    "gradient nan": lambda trainer: spoil_gradients(trainer, {2}, NAN),
    "gradient inf": lambda trainer: spoil_gradients(trainer, {2}, INF),
}


@pytest.mark.parametrize(
    ("fault", "optim"),
    [*[(fault, "adamw_torch") for fault in SPOILED], ("gradient inf", "adafactor"), ("loss nan", "rmsprop")],
)
def test_a_spoiled_update_is_skipped(tmp_path, fault, optim, messages):
    """Weights, moments and step counters stay; the learning rate advances; the logged loss is finite."""
    trainer = build(tmp_path, max_steps=4, optim=optim, lr_scheduler_type="linear")
    SPOILED[fault](trainer)
    trainer.train()
    assert trainer.states.moved == [True, False, True, True]
    assert logged(trainer, "update/skipped") == [0, 1, 0, 0]
    assert trainer.states.rates == pytest.approx([0.0075, 0.005, 0.0025, 0])
    assert trainer.gradients.gradients[1] is None
    losses = logged(trainer, "loss")
    assert all(map(math.isfinite, losses))
    assert losses[1] == 0 if "loss" in fault else losses[1] != 0
    assert not math.isfinite(logged(trainer, "grad_norm")[1])
    assert all(map(math.isfinite, logged(trainer, "grad_norm")[2:]))
    kind = "loss" if "loss" in fault else "gradient norm"
    assert any(f"Non-finite numbers: {kind}" in message for message in messages())


def test_an_update_without_any_response_left_is_skipped(tmp_path):
    """Adam's momentum and weight decay would move the weights on a gradient of 0."""
    rollouts = marked_rollouts(marked=range(ROWS))
    trainer = build(tmp_path, rollouts, max_steps=4, max_non_finite_steps=9)
    poison_embedding(trainer.model, NAN, lambda: in_training() and trainer.state.global_step == 1)
    trainer.train()
    assert trainer.states.moved == [True, False, True, True]
    assert logged(trainer, "frac_non_finite") == [0, 1, 0, 0]
    assert logged(trainer, "update/skipped") == [0, 1, 0, 0]
    assert (logged(trainer, "loss")[1], logged(trainer, "grad_norm")[1]) == (0, 0)


def test_an_update_with_only_zero_advantage_responses_is_made(tmp_path):
    trainer = build(tmp_path, reward=lambda completions, **kwargs: [1.0] * len(completions), max_steps=2)
    trainer.train()
    assert logged(trainer, "update/skipped") == [0, 0]
    assert trainer.states.moved == [True, True]  # weight decay, as in TRL


def test_a_response_that_stays_bad_without_its_tokens_skips_the_update(tmp_path):
    """The model itself is broken, so dropping responses does not help."""
    trainer = build(tmp_path, max_steps=3, max_non_finite_steps=9)
    forward = trainer.packed_forward._pass

    def nan_everywhere(*args, **kwargs):
        output = forward(*args, **kwargs)
        return dataclasses.replace(output, logps=output.logps * NAN) if trainer.state.global_step == 1 else output

    trainer.packed_forward._pass = nan_everywhere
    trainer.train()
    assert trainer.states.moved == [True, False, True]
    assert logged(trainer, "update/skipped") == [0, 1, 0]


def test_after_max_non_finite_steps_the_run_ends_with_a_report(tmp_path):
    trainer = build(tmp_path, max_steps=8, max_non_finite_steps=2)
    spoil_losses(trainer, {2, 4, 5, 6}, INF)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    assert trainer.state.global_step == 4  # update 2 alone is tolerated; 4 and 5 are two in a row
    assert trainer.states.moved == [True, False, True, False]
    text = str(error.value)
    assert "2 updates in a row were skipped" in text
    assert "the last one (a non-finite loss or gradient) at step 5" in text
    assert "On process 0 of 1, step 4: Non-finite numbers: loss inf in pass 1 of" in text
    assert "  prompt: '" in text
    assert "  completion: '" in text
    assert "max_non_finite_steps" in text


def test_the_report_names_the_dropped_responses_and_their_values(tmp_path):
    trainer = build(tmp_path, marked_rollouts(marked=range(ROWS)), max_steps=8)
    poison_embedding(trainer.model, NAN, in_training)
    with pytest.raises(NonFiniteError, match="3 updates in a row") as error:
        trainer.train()
    assert "(no response of the mini-batch left)" in str(error.value)
    assert "log-probability of the policy nan at token 0" in str(error.value)
    assert " e " in str(error.value)


def test_warnings_become_rarer(tmp_path, messages):
    trainer = build(tmp_path, max_steps=8)
    poison_embedding(trainer.model, NAN, in_training)
    trainer.train()
    shown = [message for message in messages() if "Non-finite numbers" in message]
    assert trainer.guard.reports._count >= 8
    assert len(shown) == math.floor(math.log2(trainer.guard.reports._count)) + 1


# Reward models


def with_judge(tmp_path, bad, **config):
    trainer = build(tmp_path, reward=Judge(bad), **config)
    trainer.reward_processing_classes = [tiny_tokenizer()]
    return trainer


@pytest.mark.parametrize(
    ("bad", "settings"),
    [
        (NAN, {"scale_rewards": "none"}),
        (-INF, {"scale_rewards": "group"}),
        (NAN, {"scale_rewards": "batch"}),
        (INF, {"scale_rewards": "batch"}),
        (INF, {"multi_objective_aggregation": "normalize_then_sum"}),
    ],
)
def test_a_reward_models_bad_reward_drops_its_group_alone(tmp_path, bad, settings, messages):
    """The advantages of the other groups are those of a batch without it."""
    trainer = with_judge(tmp_path, bad, max_steps=2, **settings)
    rollouts, judged = [], trainer.reward_funcs[0].judged
    edit_rollouts(trainer, lambda rollout, marked: rollouts.append((rollout["advantages"].clone(), marked)))
    trainer.train()
    advantages, marked = rollouts[0]
    hit = marked.view(-1, 4).any(dim=1)  # groups
    assert hit.tolist() == [True, False, True, False]
    assert advantages.view(-1, 4)[hit].isnan().all()
    rewards = judged[0].view(-1, 4)[~hit]
    expected = rewards - rewards.mean(dim=1, keepdim=True)
    if settings.get("scale_rewards") == "group":
        expected = expected / (rewards.std(dim=1, keepdim=True) + 1e-4)
    elif settings.get("scale_rewards") == "batch":
        expected = expected / (rewards.std() + 1e-4)
    elif "multi_objective_aggregation" in settings:
        scaled = expected / (rewards.std(dim=1, keepdim=True) + 1e-4)
        expected = (scaled - scaled.mean()) / (scaled.std() + 1e-4)
    assert torch.allclose(advantages.view(-1, 4)[~hit], expected, atol=1e-5)
    shares = logged(trainer, "frac_non_finite")
    assert sum(shares) * PER_UPDATE == 8
    assert trainer.states.moved == [share < 1 for share in shares]  # the groups may be those of one mini-batch
    assert all(map(math.isfinite, logged(trainer, "reward")))
    assert any(f"reward of 'judge' {bad:g}: its group is dropped" in message for message in messages())


def test_rewards_whose_weighted_sum_overflows_drop_their_groups(tmp_path):
    rewards = [3e38 if i == 5 else float(i % 3) for i in range(ROWS)]
    settings = {"reward_weights": [10.0], "scale_rewards": "batch", "max_steps": 2}
    trainer = build(tmp_path, reward=lambda completions, **kwargs: rewards, **settings)
    trainer.train()
    assert sum(logged(trainer, "frac_non_finite")) * PER_UPDATE == 4
    assert trainer.states.moved == [True, True]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_an_evaluation_tolerates_a_bad_reward(tmp_path):
    trainer = with_judge(tmp_path, NAN)
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])


# min_ess

K4 = {"gradient_accumulation_steps": 1, "num_generations": 4, "learning_rate": 0.3, "optim": "adamw_torch"}


@pytest.mark.parametrize("padding_free", [True, False])
def test_min_ess_skips_the_rest_of_a_rollout(tmp_path, padding_free, messages):
    """A rollout's first update has ratios of 1. The second one is skipped, and nothing is computed for the rest."""
    trainer = build(tmp_path, min_ess=0.9999, max_steps=12, padding_free=padding_free, **K4)
    forwards, totals = count_forwards(trainer), []
    step = trainer.training_step

    def counted(*args, **kwargs):
        before = forwards[0]
        loss = step(*args, **kwargs)
        totals.append(forwards[0] - before)
        return loss

    trainer.training_step = counted
    trainer.train()
    assert trainer.states.moved == [True, False, False, False] * 3
    assert logged(trainer, "update/skipped") == [0, 1, 1, 1] * 3
    assert logged(trainer, "frac_non_finite") == [0] * 12
    assert [count > 0 for count in totals] == [True, True, False, False] * 3
    assert totals[1::4] == [1, 1, 1]
    assert logged(trainer, "grad_norm")[1:4] == [0, 0, 0]
    assert len(logged(trainer, "step_time")) == 12
    assert sum("below min_ess=0.9999" in message for message in messages()) == 1


def test_min_ess_over_several_iterations_and_micro_batches(tmp_path):
    trainer = build(tmp_path, min_ess=0.9999, max_steps=8, num_iterations=2, learning_rate=0.3)
    trainer.train()
    assert trainer.states.moved == [True, False, False, False] * 2


def test_min_ess_that_is_not_reached_changes_nothing(tmp_path):
    plain = build(tmp_path / "a", max_steps=8, **K4)
    plain.train()
    guarded = build(tmp_path / "b", max_steps=8, min_ess=1e-9, **K4)
    guarded.train()
    assert logged(guarded, "update/skipped") == [0] * 8
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, guarded.model.state_dict()[name])


def test_min_ess_acts_on_the_effective_sample_size_that_is_logged(tmp_path):
    plain = build(tmp_path / "a", max_steps=4, **K4)
    plain.train()
    seen = logged(plain, "trajectory_ratio/ess")
    assert seen[0] == 1 > seen[1]
    for least, skipped in [(seen[1] * 1.001, 1), (seen[1] * 0.999, 0)]:
        trainer = build(tmp_path / str(skipped), max_steps=2, min_ess=least, **K4)
        trainer.train()
        assert logged(trainer, "update/skipped") == [0, skipped]


def test_min_ess_does_not_count_as_non_finite(tmp_path):
    trainer = build(tmp_path, min_ess=0.9999, max_steps=8, max_non_finite_steps=1, **K4)
    trainer.train()
    assert trainer.state.global_step == 8


def test_min_ess_goes_on_after_a_resume(tmp_path):
    """The checkpoint lies in the middle of the skipped updates."""
    settings = K4 | {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "min_ess": 0.9999}
    whole = build(tmp_path, **settings)
    whole.train()
    resumed = build(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.states.moved == whole.states.moved[3:] == [False, True, False, False, False]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_a_streak_goes_on_after_a_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "max_non_finite_steps": 3}
    for resume, steps in [(None, 3), (str(tmp_path / "checkpoint-2"), 3)]:
        trainer = build(tmp_path, **settings)
        spoil_losses(trainer, {2, 3, 4}, NAN)
        with pytest.raises(NonFiniteError, match="3 updates in a row"):
            trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == steps
