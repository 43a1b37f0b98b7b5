"""Decisions for whole mini-batches through `train()`: the same however the mini-batch is cut, and what they cost."""

import math

import pytest
import torch
from conftest import logps, tiny_model
from rollouts import assert_same_updates, build, random_rollouts, train

from tic_grpo_trl.forward.responses import loss_mask
from tic_grpo_trl.loss.mini_batch_rules import adaptive_cap


RULES = ["tic_grpo_adaptive"]
# Rollouts of 16 responses for two updates of eight, each twice: all but the first updates are off-policy
RUN = {
    "num_iterations": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "loss_type": None,
    "max_steps": 8,
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
@pytest.mark.parametrize("padding", [{}, PADDED], ids=["packed", "padded"])
def test_a_mini_batch_in_several_passes_is_the_one_of_a_single_pass(tmp_path, algorithm, padding):
    whole = train(tmp_path / "one", algorithm=algorithm, **RUN | padding)
    for cut in ("two", "eight"):
        parts = train(tmp_path / cut, algorithm=algorithm, leader=whole, **RUN | padding | CUTS[cut])
        assert_same_updates(parts, whole)
        for mine, theirs in zip(parts.logs, whole.logs, strict=True):
            expected = {name: theirs[name] for name in METRICS if name in theirs}
            assert {name: mine[name] for name in METRICS if name in mine} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", ["trajectory", "prefix"])
def test_the_cap_is_that_of_the_responses_that_can_move_the_weights(tmp_path, level):
    updates = []
    run = train(
        tmp_path,
        lambda trainer: updates.append(record_mini_batches(trainer)),
        algorithm="tic_grpo_adaptive",
        importance_sampling_level=level,
        **RUN | PADDED | CUTS["two"],
    )
    capped = 0
    for log, responses in zip(run.logs, updates[0], strict=True):
        moving = [ratio for ratio, advantage in responses if advantage]
        if not moving:
            assert "update/cap" not in log
            continue
        assert len(moving) < len(responses) or len(responses) == 8
        if level == "trajectory":
            weights, mask = torch.stack([ratio.sum() for ratio in moving]).unsqueeze(1), torch.ones(len(moving), 1)
        else:
            weights = torch.nn.utils.rnn.pad_sequence([ratio.cumsum(0) for ratio in moving], batch_first=True)
            lengths = torch.tensor([len(ratio) for ratio in moving]).unsqueeze(1)
            mask = torch.arange(weights.size(1)) < lengths
        assert log["update/cap"] == pytest.approx(math.exp(adaptive_cap(weights, mask)), rel=1e-4)
        capped += bool((weights > adaptive_cap(weights, mask) + 1e-9).any())
    assert capped  # a cap that is never reached would be no cap


def test_what_a_decision_costs(tmp_path):
    """Nothing where the mini-batch is one pass or on-policy, else one pass without gradient for each pass."""
    rollouts = {"zero_advantage": 0.0}
    passes = {}
    for algorithm in ("tic_grpo_capped", "tic_grpo_adaptive"):
        for cut in CUTS:
            run = train(tmp_path / cut, algorithm=algorithm, rollouts=rollouts, **RUN | PADDED | CUTS[cut])
            saved = sum(log["update/forwards_saved"] for log in run.logs)
            passes[algorithm, cut] = run.forwards, saved
    for cut, micro_batches in (("one", 0), ("two", 2), ("eight", 8)):
        (before, saved), (after, saved_less) = (passes[name, cut] for name in ("tic_grpo_capped", "tic_grpo_adaptive"))
        assert after - before == saved - saved_less == 6 * micro_batches  # of eight updates two are on-policy


@pytest.mark.parametrize("algorithm", RULES)
def test_a_response_with_bad_numbers_takes_no_part_in_a_decision(tmp_path, algorithm):
    """As if it had no tokens, whether the decision comes from passes of its own or from the loss's."""

    def with_bad_numbers(value):
        def prepare(trainer):
            start = trainer.current_rollout.start

            def changed(micro_batches, dropped):
                for micro_batch in micro_batches:
                    if "old_per_token_logps" in micro_batch:
                        micro_batch["old_per_token_logps"][0] = value
                start(micro_batches, trainer.guard.drop_from_micro_batches(micro_batches, dropped))

            trainer.current_rollout.start = changed

        return prepare

    runs = [
        train(
            tmp_path,
            with_bad_numbers(value),
            {"zero_advantage": 0.0},
            algorithm=algorithm,
            **RUN | PADDED | CUTS["two"],
        )
        for value in (float("nan"), float("inf"))
    ]
    assert_same_updates(*runs)
    assert sum(log["frac_non_finite"] for log in runs[0].logs) > 0


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
        settings |= {"learning_rate": 0.01, "max_steps": 7, "model": tiny_model(), "algorithm": algorithm}
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
