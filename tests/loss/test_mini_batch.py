"""Decisions for whole mini-batches through `train()`: the same however the mini-batch is cut, and what they cost."""

import math
from functools import partial

import pytest
import torch
from conftest import logps, tiny_model
from rollouts import assert_same_updates, build, given_rollouts, random_rollouts, train, with_advantages_per_token

from tic_grpo_trl.forward.responses import loss_mask, sequences
from tic_grpo_trl.loss.mini_batch_rules import adaptive_cap


RULES = ["tic_grpo_adaptive", "vcpo"]
# Rollouts of 16 responses for two updates of eight, each twice: all but the first updates are off-policy
RUN = {
    "num_iterations": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "loss_type": None,
    "max_steps": 4,
    "learning_rate": 0.05,
    "partition_by_prompt": True,
}
CUTS = {  # the same mini-batches in one and in several forward passes
    "one": {},
    "two": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "eight": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "steps_per_generation": 16},
}
PADDED = {"padding_free": False, "skip_zero_advantage": False}
METRICS = ("update/cap", "update/learning_rate_factor")


def record_mini_batches(trainer):
    """Note the log-ratios and the advantages of the responses of every update, from the test's own path."""
    updates, compute = [], trainer._compute_loss

    def noting(model, inputs):
        with torch.no_grad():
            mask, old = loss_mask(inputs), inputs.get("old_per_token_logps")
            difference = torch.zeros(mask.shape) if old is None else logps(trainer.model, inputs) - old
        if trainer.schedule.at(trainer._step).micro_batch % trainer.args.gradient_accumulation_steps == 0:
            updates.append([])
        updates[-1] += [
            (ratio[count.bool()].double(), advantage)
            for ratio, count, advantage in zip(difference, mask, inputs["advantages"].tolist(), strict=True)
            if count.any()
        ]
        return compute(model, inputs)

    trainer._compute_loss = noting
    return updates


@pytest.mark.parametrize("algorithm", RULES)
@pytest.mark.parametrize(("padding", "cut"), [({}, "two"), (PADDED, "eight")], ids=["packed", "padded"])
def test_a_mini_batch_in_several_passes_is_the_one_of_a_single_pass(tmp_path, algorithm, padding, cut):
    whole = train(tmp_path / "one", algorithm=algorithm, **RUN | padding)
    parts = train(tmp_path / cut, algorithm=algorithm, leader=whole, **RUN | padding | CUTS[cut])
    assert_same_updates(parts, whole)
    for mine, theirs in zip(parts.logs, whole.logs, strict=True):
        expected = {name: theirs[name] for name in METRICS if name in theirs}
        assert {name: mine[name] for name in METRICS if name in mine} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", ["trajectory", "prefix"])
def test_the_cap_is_that_of_the_active_responses(tmp_path, level):
    updates, trainers = [], []

    def watch(trainer):
        trainers.append(trainer)
        updates.append(record_mini_batches(trainer))

    run = train(
        tmp_path,
        watch,
        algorithm="tic_grpo_adaptive",
        importance_sampling_level=level,
        **RUN | PADDED | CUTS["two"] | {"max_steps": 8},
    )
    capped = left_out = 0
    for log, responses in zip(run.logs, updates[0], strict=True):
        active = [ratio for ratio, advantage in responses if advantage]
        left_out += len(active) < len(responses)
        advantages = torch.tensor([advantage for _, advantage in responses if advantage])
        if not active:
            assert "update/cap" not in log
            continue
        if level == "trajectory":
            weights = torch.stack([ratio.sum() for ratio in active]).unsqueeze(1)
        else:
            weights = torch.nn.utils.rnn.pad_sequence([ratio.cumsum(0) for ratio in active], batch_first=True)
        lengths = torch.tensor([len(ratio) for ratio in active]).unsqueeze(1)
        mask = torch.arange(int(lengths.max())) < lengths
        cap = adaptive_cap(weights, advantages, mask, trainers[0].args.gradient_noise_scale)
        assert log["update/cap"] == pytest.approx(math.exp(cap), rel=1e-4)
        capped += bool((weights > cap + 1e-6).any())
    assert capped  # a cap that is never reached would be no cap
    assert left_out


def test_what_a_decision_costs(tmp_path):
    """Nothing where the mini-batch is one pass or on-policy, else one pass without gradient for each pass."""
    rollouts = {"zero_advantage": 0.0}
    passes = {}
    for algorithm in ("tic_grpo_capped", "tic_grpo_adaptive"):
        for cut in ("one", "two"):
            run = train(tmp_path / cut, algorithm=algorithm, rollouts=rollouts, **RUN | PADDED | CUTS[cut])
            saved = sum(log["update/forwards_saved"] for log in run.logs)
            passes[algorithm, cut] = run.forwards, saved
    for cut, micro_batches in (("one", 0), ("two", 2)):
        (before, saved), (after, saved_less) = (passes[name, cut] for name in ("tic_grpo_capped", "tic_grpo_adaptive"))
        assert after - before == saved - saved_less == 3 * micro_batches  # of four updates one is on-policy


@pytest.mark.parametrize("algorithm", RULES)
@pytest.mark.parametrize("cut", ["one", "two"])
def test_a_response_with_bad_numbers_takes_no_part_in_a_decision(tmp_path, algorithm, cut):
    """As if it had no tokens, whether the decision comes from passes of its own or from the loss's."""

    def prepare(trainer, is_bad):
        sick = []  # ids of a response of every micro-batch that is scored
        start = trainer.current_rollout.start

        def changed(micro_batches, dropped):
            for micro_batch in micro_batches:
                if "old_per_token_logps" in micro_batch and is_bad:
                    sick.append(sequences(micro_batch)[0][0])
                elif "old_per_token_logps" in micro_batch:
                    micro_batch["completion_mask"][0] = 0
            start(micro_batches, dropped)

        def spoil(model, args, inputs, output):
            for ids in sick:
                rows = (inputs["input_ids"] == ids).all(dim=1, keepdim=True)
                output.log_probs = output.log_probs.masked_fill(rows, float("nan"))

        trainer.current_rollout.start = changed
        trainer.model.register_forward_hook(spoil, with_kwargs=True)

    settings = {"algorithm": algorithm, "rollouts": {"zero_advantage": 0.0}} | RUN | PADDED | CUTS[cut]
    without = train(tmp_path, partial(prepare, is_bad=False), **settings)
    bad = train(tmp_path, partial(prepare, is_bad=True), leader=without, **settings)
    assert_same_updates(bad, without)
    for mine, theirs in zip(bad.logs, without.logs, strict=True):
        expected = {name: theirs[name] for name in METRICS if name in theirs}
        assert {name: mine[name] for name in METRICS if name in mine} == pytest.approx(expected, rel=1e-5)
    assert sum(log["frac_non_finite"] for log in bad.logs) > 0


@pytest.mark.parametrize("algorithm", RULES)
def test_an_evaluation_decides_nothing(tmp_path, algorithm):
    trainer = build(tmp_path, random_rollouts(), algorithm=algorithm, **RUN)
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert not set(METRICS) & {name.removeprefix("eval_") for name in metrics}


@pytest.mark.parametrize("algorithm", RULES)
def test_a_run_that_resumes_inside_a_rollout_is_exact(tmp_path, algorithm):
    def run(resume=None, **config):
        settings = RUN | CUTS["two"] | {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
        settings |= {"learning_rate": 0.01, "max_steps": 5, "model": tiny_model(), "algorithm": algorithm}
        trainer = build(tmp_path, random_rollouts(), **settings | config)
        torch.manual_seed(0)
        trainer.train(resume_from_checkpoint=resume)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return list(trainer.model.parameters()), {log["step"]: log for log in logs}

    _, logs = run()
    resumed, again = run(str(tmp_path / "checkpoint-3"), max_steps=4)
    straight, _ = run(max_steps=4)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed, straight, strict=True))
    names = [name for name in logs[4] if name.startswith(("update/", "trajectory_ratio", "loss", "learning_rate"))]
    assert {name: again[4][name] for name in names} == {name: logs[4][name] for name in names}


# The baseline of minimum variance, and the learning rate


def test_responses_at_the_mean_of_their_group_train_on(tmp_path):
    """Their own advantage is 0 in TRL, but not with another baseline; groups with equal rewards are left out."""
    mixed, equal = [0.0, 0.5, 0.5, 1.0], [1.0] * 4
    rollouts = given_rollouts(3, [5, 2, 8, 3, 1, 2, 4, 4, 3, 9, 1, 6, 7, 7, 2, 5], [*mixed, *equal, *mixed, *mixed])
    padded = train(tmp_path / "padded", algorithm="vcpo", rollouts=rollouts, **RUN | PADDED)
    packed = train(tmp_path / "packed", algorithm="vcpo", rollouts=rollouts, leader=padded, **RUN)
    assert_same_updates(packed, padded)
    assert sorted(log["update/responses_skipped"] for log in packed.logs) == [0, 0, 0.5, 0.5]  # one group of four


def test_a_response_without_a_reward_is_not_trained_on(tmp_path):
    """It has no advantage, and no part in its neighbours' baselines."""
    found = []

    def watch(trainer):
        decide = trainer.mini_batch.decide_from_pass

        def noting(inputs, log_ratio, position):
            decision = decide(inputs, log_ratio, position)
            if "old_per_token_logps" not in inputs:  # on-policy: every w is 1
                advantages = inputs["advantages"] + decision.shifts[position.micro_batch]
                found.append(advantages.view(-1, 4).tolist())
            return decision

        trainer.mini_batch.decide_from_pass = noting

    rollouts = given_rollouts(3, [5, 2, 8, 3] * 4, [1.0, None, 0.0, 1.0] * 4)
    padded = train(tmp_path / "padded", watch, rollouts, algorithm="vcpo", **RUN | PADDED)
    packed = train(tmp_path / "packed", rollouts=rollouts, leader=padded, algorithm="vcpo", **RUN)
    expected = [1 - 3 / (8 + 3), 0.0, 0 - (5 + 3) / (5 + 3), 1 - 5 / (5 + 8)]
    assert found == [[pytest.approx(expected)] * 2]
    assert_same_updates(packed, padded)
    assert [log["update/responses_skipped"] for log in packed.logs] == [0.25] * 4


@pytest.mark.parametrize("overflows", [False, True], ids=["finite", "overflows"])
@pytest.mark.parametrize("cut", ["one", "two"])
def test_exact_norms_are_those_of_each_response_s_own_gradient(tmp_path, cut, overflows):
    """Advantages by plain loops from the test's own log-probabilities, differentiated one response at a time. One whose
    gradient overflows where it is alone, as in fp16, keeps its advantage and has no part in the others' baselines.
    No response of this seed has one token, which TRL's rows pad to two."""
    updates, is_alone = {}, [False]

    def ends_in_overflow(ids):
        return overflows and int(ids[-2]) % 4 == 0

    def watch(trainer):
        decide = trainer.mini_batch.decide_from_pass

        def noting(inputs, log_ratio, position):
            decision = decide(inputs, log_ratio, position)
            model = trainer.model
            logp = logps(model, inputs)
            for i, mask in enumerate(inputs["completion_mask"].bool()):
                if mask.any():
                    own = torch.autograd.grad(logp[i][mask].sum(), list(model.parameters()), retain_graph=True)
                    k = math.exp(2 * log_ratio[i].double().sum()) * float(sum(g.square().sum() for g in own))
                    shift = decision.shifts[position.micro_batch][i]
                    bad = ends_in_overflow(sequences(inputs)[0][i][: mask.sum() - len(mask) or None])
                    key = position.rollout, position.update, int(inputs["group"][i])
                    updates.setdefault(key, []).append((float(inputs["advantages"][i]), k, float(shift), bad))
            return decision

        def note_size(model, args, inputs):
            is_alone[0] = len(inputs["input_ids"]) == 1 and ends_in_overflow(inputs["input_ids"][0])

        trainer.mini_batch.decide_from_pass = noting
        trainer.model.register_forward_pre_hook(note_size, with_kwargs=True)
        next(trainer.model.parameters()).register_hook(lambda g: g * float("inf") if is_alone[0] else g)

    settings = {"baseline_norms": "gradients", "max_steps": 4, "algorithm": "vcpo"}
    train(tmp_path, watch, {"zero_advantage": 0.0, "seed": 1}, **RUN | PADDED | CUTS[cut] | settings)
    assert len(updates) == 8  # two groups in each of four updates
    for responses in updates.values():
        for i, (_, _, shift, bad) in enumerate(responses):
            others = [(a, k) for j, (a, k, _, bad) in enumerate(responses) if j != i and not bad]
            baseline = sum(a * k for a, k in others) / sum(k for _, k in others) if others and not bad else 0.0
            assert shift == pytest.approx(-baseline, rel=1e-3, abs=1e-5)
    assert any(bad for responses in updates.values() for *_, bad in responses) == overflows


def test_norms_by_tokens_are_near_the_exact_ones_and_cost_nothing(tmp_path):
    forwards = {}
    for norms in ("tokens", "gradients"):
        settings = {"baseline_norms": norms, "algorithm": "vcpo", "max_steps": 4}
        run = train(tmp_path, rollouts={"zero_advantage": 0.0}, **RUN | settings)
        forwards[norms] = run.forwards
    # a pass for each of the eight responses, from which the ratios come, too
    assert forwards["gradients"] - forwards["tokens"] == 4 * 8


def test_one_step_has_the_scaled_rate_and_the_log_that_of_the_schedule(tmp_path):
    """SGD moves the weights by rate · √(ESS/n) · gradient; scheduler, log and checkpoint know the schedule's rate."""
    settings = RUN | {"lr_scheduler_type": "linear", "algorithm": "vcpo", "model": tiny_model()}
    settings |= {"save_strategy": "steps", "save_steps": 3}
    run = train(tmp_path, rollouts={"zero_advantage": 0.0}, **settings)
    before = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    factors = []
    for log, gradient, weights in zip(run.logs, run.gradients, run.weights, strict=True):
        rate, factor = log["learning_rate"], log["update/learning_rate_factor"]
        assert rate == pytest.approx(0.05 * (1 - (log["step"] - 1) / 4))
        ess = log["trajectory_ratio/ess"]  # of responses that are all active
        assert factor == pytest.approx(math.sqrt(ess), rel=1e-5)
        after = torch.cat([p.flatten() for p in weights])
        torch.testing.assert_close(after - before, -rate * factor * gradient, rtol=1e-3, atol=1e-6)
        before = after
        factors.append(factor)
    assert factors[0] == 1
    assert min(factors) < 0.95
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=False)
    assert [group["lr"] for group in saved["param_groups"]] == pytest.approx([0.05 / 4] * 2)


def test_a_skipped_update_restores_the_rate(tmp_path):
    run = train(
        tmp_path, rollouts={"zero_advantage": 0.0}, prepare=without_recorder, algorithm="vcpo", min_ess=1.0, **RUN
    )
    assert sum(log["update/skipped"] for log in run.logs) > 0
    assert {group["lr"] for group in run.trainer.optimizer.param_groups} == {0.05}


def without_recorder(trainer):
    """It reads the gradients, which a skipped update has none of."""
    trainer.remove_callback(trainer.recorder)


def test_advantages_of_the_rollout_stay_trl_s(tmp_path):
    """Later iterations compute them again, with other ratios."""
    kept = []

    def watch(trainer):
        start = trainer.current_rollout.start

        def noting(micro_batches, dropped):
            kept.append([(each["advantages"], each["advantages"].clone()) for each in micro_batches if each])
            start(micro_batches, dropped)

        trainer.current_rollout.start = noting

    train(tmp_path, watch, algorithm="vcpo", **RUN | CUTS["two"])
    assert all(torch.equal(now, then) for rollout in kept for now, then in rollout)


def test_groups_that_a_mini_batch_cannot_hold_are_refused(tmp_path):
    settings = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 1}
    with pytest.raises(ValueError, match=r"needs mini-batches of complete groups, .*= 2 is not divisible by num_gen"):
        build(tmp_path, random_rollouts(), algorithm="vcpo", **settings)


def test_advantages_per_token_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one advantage per response, but the rollout has one per token"):
        train(tmp_path, with_advantages_per_token, algorithm="vcpo", **RUN)
