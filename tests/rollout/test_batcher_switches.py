"""What the switches of the update phase change and what they don't, and the metrics of its cost."""

import pytest
import torch
from conftest import TRL_UPDATE_PHASE, WORDS, drifted, logps, tiny_model
from rollouts import (
    ACTIVE,
    ANCHORED,
    GIVEN,
    active_inputs,
    assert_same_updates,
    given_rollouts,
    total,
    train,
    trl_and_ours,
)
from transformers import (
    BloomConfig,
    BloomForCausalLM,
)

from tic_grpo_trl import TICGRPOTrainer


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")


OF_PASSES = ("forwards_saved", "real_token_share", "shared_token_share")


@pytest.mark.parametrize("algorithm", ANCHORED)
def test_the_switches_change_no_gradient_of_the_anchored_algorithms(tmp_path, algorithm):
    config = {
        "algorithm": algorithm,
        "learning_rate": 0.3,
        "loss_type": None,
        "scale_rewards": None,
        "num_iterations": 2,
    }
    off = train(tmp_path, **config, **TRL_UPDATE_PHASE)
    on = train(tmp_path, leader=off, **config)
    assert_same_updates(on, off)
    assert on.forwards == off.forwards - total(on, "update/forwards_saved") < off.forwards
    assert all(entry["update/responses_skipped"] == 0 for entry in off.logs)
    assert total(off, "update/forwards_saved") == 0
    # the weights were off-policy, so that something was at stake
    assert any(entry["trajectory_ratio/log_std"] > 0.05 for entry in off.logs)


@pytest.mark.parametrize(
    "settings", [{"algorithm": "grpo"}, {"algorithm": "tic_grpo", "beta": 0.3}, {"loss_type": "grpo"}]
)
@pytest.mark.parametrize("switch", TRL_UPDATE_PHASE)
def test_each_switch_alone_changes_no_gradient(tmp_path, switch, settings):
    model = tiny_model()
    model.save_pretrained(tmp_path / "reference")
    model.config._name_or_path = str(tmp_path / "reference")
    settings = settings | {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 8,
    }
    off = train(tmp_path, model=model, **settings, **TRL_UPDATE_PHASE)
    on = train(tmp_path, model=model, leader=off, **settings, **TRL_UPDATE_PHASE | {switch: True})
    assert_same_updates(on, off)
    padded = off.logs[0]["update/real_token_share"]
    if switch == "padding_free":
        assert on.logs[0]["update/real_token_share"] > padded
        assert all(entry["update/responses_skipped"] == 0 for entry in on.logs)
        assert on.forwards < off.forwards  # TRL's micro-batches of one mini-batch share passes
    if switch == "skip_zero_advantage":
        assert (total(on, "update/responses_skipped") > 0) == ("beta" not in settings)
    if switch == "skip_on_policy_logps":
        assert off.forwards - on.forwards == 2 * 4  # two rollouts, four micro-batches of the first update each
        assert all(entry["trajectory_ratio/inner_1/log_std"] == 0 for entry in on.logs[::2])


@pytest.mark.parametrize("algorithm", ["tic_grpo", "grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_micro_batch_is_only_a_matter_of_memory(tmp_path, algorithm, beta):
    """Eight passes of one row or one of eight: the same gradients and the same metrics."""
    model = tiny_model()
    drifted(model, 0.05, seed=9).save_pretrained(tmp_path / "reference")
    model.config._name_or_path = str(tmp_path / "reference")
    config = {
        "algorithm": algorithm,
        "beta": beta,
        "model": model,
        "learning_rate": 0.3,
        "rollouts": {"tools": True, "seed": 1},
    }
    eight = train(
        tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1, steps_per_generation=4, **config
    )
    config |= {"gradient_accumulation_steps": 8, "steps_per_generation": 32, "leader": eight}
    one = train(tmp_path, per_device_train_batch_size=1, **config)
    assert_same_updates(one, eight)
    compared = set()
    for mine, theirs in zip(one.logs, eight.logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"step_time", *(f"update/{of_passes}" for of_passes in OF_PASSES)}:
            if theirs[name] is None:  # of no response at all
                assert mine[name] is None, name
                continue
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
            compared.add(name.split("/")[0])
    assert {"loss", "grad_norm", "entropy", "trajectory_ratio"} <= compared
    assert ("kl" in compared) == (beta > 0)
    assert ("clip_ratio" in compared) == (algorithm == "grpo")
    if algorithm == "grpo":
        assert total(eight, "clip_ratio/region_mean") > 0


def bloom():
    """Cannot pack: ALiBi takes distances over the row."""
    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            n_layer=2,
            n_head=2,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


@pytest.mark.parametrize("model", [bloom, tiny_model])
def test_a_model_that_cannot_pack_sees_trimmed_rows_of_like_length(tmp_path, model):
    shapes = []

    def prepare(trainer):
        if isinstance(trainer, TICGRPOTrainer):
            if model is tiny_model:
                trainer.packed_forward.layout = "sorted"
            assert trainer.packed_forward.choose_layout() == "sorted"

            def note(module, args, kwargs):
                shapes.append((kwargs["attention_mask"].shape, kwargs["attention_mask"].sum(1).tolist()))

            trainer.model.register_forward_pre_hook(note, with_kwargs=True)

    reference, ours = trl_and_ours(tmp_path, {}, model=model(), prepare=prepare)
    assert_same_updates(ours, reference)
    assert ours.forwards == len(shapes) < reference.forwards
    for (rows, width), lengths in shapes:
        assert rows <= 4
        assert lengths == sorted(lengths, reverse=True)
        assert width < max(lengths) + 5  # only the longest prompt and the longest response may be in different rows


# Metrics by hand


def test_metrics_of_the_work_by_hand(tmp_path):
    config = {"num_generations": 2, "steps_per_generation": 2, "max_steps": 1, "learning_rate": 0.0}
    settings = config | {"rollouts": given_rollouts(**GIVEN)}
    reference = train(tmp_path, trl=True, **settings)
    for attention, share in (
        ("sdpa", 1.0),  # called for one response after the other, all in one row
        # A mask keeps them apart: 8+3 and 5+4 tokens in two rows of 11 slots, since rows of 8 would have to be three.
        ("eager", 20 / 22),
    ):
        result = train(tmp_path, model=tiny_model(attn_implementation=attention), **settings)
        (log,) = result.logs
        assert log["update/real_token_share"] == pytest.approx(share)
        assert log["update/responses_skipped"] == 4 / 8
        assert log["update/forwards_saved"] == 1
        assert (reference.forwards, result.forwards) == (2, 1)
    # Off-policy: the other mini-batch is scored in one pass, too
    config |= {"steps_per_generation": 4, "max_steps": 2}
    rollouts = given_rollouts(2, GIVEN["lengths"] * 2, GIVEN["rewards"] * 2)
    reference = train(tmp_path, trl=True, rollouts=rollouts, **config)
    result = train(tmp_path, rollouts=rollouts, **config)
    assert (reference.forwards, result.forwards) == (4 + 2 + 2, 1 + 1 + 1)
    assert [entry["update/forwards_saved"] for entry in result.logs] == [4 + 2 - 2, 2 - 1]
    # All off: everything that TRL computes, two rows of 2+7 tokens' width per row
    off = train(tmp_path, **settings, **TRL_UPDATE_PHASE)
    assert off.logs[0]["update/real_token_share"] == pytest.approx((30 + 16) / (8 * 9))
    assert off.logs[0]["update/forwards_saved"] == off.logs[0]["update/responses_skipped"] == 0


@pytest.mark.parametrize("rows", [1, 4])
def test_entropy_and_kl_are_means_over_the_tokens_of_the_rows_that_count(tmp_path, rows):
    model, reference = tiny_model(), drifted(tiny_model(), 0.1, seed=9)
    reference.save_pretrained(tmp_path / "reference")
    model.config._name_or_path = str(tmp_path / "reference")
    config = {
        "num_generations": 2,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 8 // rows,
        "steps_per_generation": 8 // rows,
        "max_steps": 1,
        "model": model,
        "rollouts": given_rollouts(**GIVEN),
    }
    inputs = active_inputs(**GIVEN, active=ACTIVE)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = type(model).forward(model, input_ids=ids, attention_mask=attention).logits[:, 1:-1].detach()
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    mask = inputs["completion_mask"].bool()
    (log,) = train(tmp_path, **config).logs
    assert log["entropy"] == pytest.approx(entropy[mask].mean().item(), rel=1e-5)

    # With a KL term every row counts
    inputs = active_inputs(**GIVEN, active=range(8))
    gap = (logps(reference, inputs) - logps(model, inputs)).detach()[inputs["completion_mask"].bool()]
    (log,) = train(tmp_path, beta=0.1, **config).logs
    assert log["kl"] == pytest.approx((gap.exp() - gap - 1).mean().item(), rel=1e-4)
    assert log["update/responses_skipped"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 1, "steps_per_generation": 4, "num_iterations": 2},
        # rows that share a mask round according to their neighbours
        {"skip_on_policy_logps": False, "model": tiny_model(attn_implementation="eager")},
    ],
)
def test_without_a_step_every_ratio_is_exactly_one(tmp_path, settings):
    """Scored in the very shapes that are trained on: no kernel may round differently."""
    settings = {"steps_per_generation": 8, "learning_rate": 0.0, "max_steps": 8} | settings
    logs = train(tmp_path, rollouts={"zero_advantage": 0.0}, **settings).logs
    updates = settings["steps_per_generation"] // settings.get("gradient_accumulation_steps", 2)
    assert {name for log in logs for name in log if name.endswith("/log_std")} == {
        "trajectory_ratio/log_std",
        *(f"trajectory_ratio/inner_{k + 1}/log_std" for k in range(updates * settings.get("num_iterations", 1))),
    }
    for log in logs:
        assert log["trajectory_ratio/log_std"] == 0.0
        assert log["trajectory_ratio/log_min"] == log["trajectory_ratio/log_max"] == 0.0


def test_one_mini_batch_used_twice_is_never_scored(tmp_path):
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 1}
    settings |= {"num_iterations": 2, "max_steps": 6, "learning_rate": 0.3}
    reference, ours = trl_and_ours(tmp_path, settings, rollouts={"zero_advantage": 0.0})
    assert_same_updates(ours, reference)
    assert (reference.forwards, ours.forwards) == (6 + 3, 6)
    # the ratios of the second time are those against the first
    assert all(log["trajectory_ratio/log_std"] == 0 for log in ours.logs[::2])
    assert all(log["trajectory_ratio/log_std"] > 0.01 for log in ours.logs[1::2])
