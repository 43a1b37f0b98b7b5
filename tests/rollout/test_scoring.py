"""The sampler as behaviour policy, evaluation, and rollouts with images."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, TRL_UPDATE_PHASE, drifted, logps, tiny_model, tiny_vision_model
from rollouts import (
    ACTIVE,
    GIVEN,
    SETTINGS,
    active_inputs,
    assert_same_updates,
    build,
    count_forwards,
    given_rollouts,
    own_logprobs,
    random_rollouts,
    total,
    train,
    trl_and_ours,
    with_vllm_correction,
)
from trl import GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.forward.packed_forward import MULTIMODAL
from tic_grpo_trl.objective import CORRECTION_MODES
from tic_grpo_trl.rollout.scoring import check_behaviour_policy


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")


# The sampler as behaviour policy


SAMPLER = {"num_generations": 2, "behaviour_policy": "sampler", "learning_rate": 0.0}


def expected_log_ratios(sampler):
    """R of the active responses of GIVEN, own minus the sampler's, from plain logits."""
    inputs = active_inputs(**GIVEN, active=ACTIVE)
    own = (logps(tiny_model(), inputs) * inputs["completion_mask"]).sum(1).tolist()
    output = given_rollouts(**GIVEN)[0]([""] * 8, None)
    sampled = [sum(sampler(output["prompt_ids"][i], output["completion_ids"][i])) for i in ACTIVE]
    return [mine - theirs for mine, theirs in zip(own, sampled, strict=True)]


def assert_ratios(log, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    assert log["trajectory_ratio/log_min"] == pytest.approx(expected.min().item(), abs=1e-5)
    assert log["trajectory_ratio/log_max"] == pytest.approx(expected.max().item(), abs=1e-5)
    assert log["trajectory_ratio/log_mean"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert log["trajectory_ratio/log_std"] == pytest.approx(expected.std(correction=0).item(), abs=1e-5)


@pytest.mark.parametrize("switches", [{}, TRL_UPDATE_PHASE | {"skip_zero_advantage": True}])
def test_ratios_to_the_sampler(tmp_path, switches):
    sampler = own_logprobs(0.1)
    rollouts = given_rollouts(**GIVEN, sampler=sampler)
    result = train(tmp_path, steps_per_generation=2, max_steps=1, rollouts=rollouts, **SAMPLER, **switches)
    expected = expected_log_ratios(sampler)
    assert max(expected) - min(expected) > 0.1
    assert_ratios(result.logs[0], expected)
    assert result.logs[0]["sampling/responses_without_logps"] == 0
    assert result.forwards == (2 if switches else 1)  # nothing is scored

    # One mini-batch after the other: the second one's ratios are to the sampler, too, and still nothing is scored
    config = {"steps_per_generation": 4, "max_steps": 2, "partition_by_prompt": False}
    rollouts = given_rollouts(2, GIVEN["lengths"] * 2, GIVEN["rewards"] * 2, sampler=sampler)
    result = train(tmp_path, rollouts=rollouts, **config, **SAMPLER, **switches)
    assert all(log["trajectory_ratio/log_std"] > 0.01 for log in result.logs)
    assert result.forwards == (4 if switches else 2)


def test_the_sampler_s_ratio_is_in_the_gradient(tmp_path):
    """At A·w·∇log P with the trajectory weight, all from plain logits; the cap does not act."""
    sampler = own_logprobs(0.1)
    rollouts = given_rollouts(**GIVEN, sampler=sampler)
    config = SAMPLER | {"steps_per_generation": 2, "max_steps": 1, "loss_type": "dr_grpo", "epsilon_high": 1e3}
    result = train(tmp_path, rollouts=rollouts, **config)
    model, inputs = tiny_model(), active_inputs(**GIVEN, active=ACTIVE)
    ratio = torch.tensor(expected_log_ratios(sampler)).exp()
    advantages = torch.tensor([0.5, -0.5, -0.25, 0.25])
    log_p = (logps(model, inputs) * inputs["completion_mask"]).sum(1)
    (-(ratio * advantages * log_p).sum() / (8 * SETTINGS["max_completion_length"])).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (result.gradients[0] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("switches", [{}, TRL_UPDATE_PHASE | {"skip_zero_advantage": True}])
def test_a_row_that_the_sampler_left_a_token_out_of_has_ratio_one(tmp_path, switches):
    whole = own_logprobs(0.1)

    def sampler(prompt, completion):
        values = whole(prompt, completion)
        return [None, *values[1:]] if len(completion) == 3 else values  # the third active response

    rollouts = given_rollouts(**GIVEN, sampler=sampler)
    result = train(tmp_path, steps_per_generation=2, max_steps=1, rollouts=rollouts, **SAMPLER, **switches)
    expected = expected_log_ratios(whole)
    expected[2] = 0.0
    assert_ratios(result.logs[0], expected)
    assert result.logs[0]["sampling/responses_without_logps"] == 1 / 8
    assert result.forwards == (1 + 1 if not switches else 2 + 1)  # of its micro-batch that response alone is scored
    assert result.gradients[0].isfinite().all()


def test_a_sampler_without_log_probabilities_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"behaviour_policy='sampler', but the rollout has no log-probabilities"):
        train(tmp_path, **SAMPLER)
    with pytest.raises(ValueError, match=r"behaviour_policy='sampler' needs .* set use_vllm=True"):
        build(tmp_path, (None, random_rollouts()[1]), use_transformers_continuous_batching=True, **SAMPLER)
    with pytest.raises(ValueError, match=r"vllm_importance_sampling_correction=True would correct twice"):
        build(tmp_path, random_rollouts(), vllm_importance_sampling_correction=True, **SAMPLER)
    assert TICGRPOConfig(str(tmp_path), **CPU).vllm_importance_sampling_correction is True
    assert TICGRPOConfig(str(tmp_path), **CPU, behaviour_policy="sampler").vllm_importance_sampling_correction is False


# TRL's correction


@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_metrics_of_the_correction_are_trl_s(tmp_path, mode):
    """Where every response is trained on, so that both look at the same ones."""

    def prepare(trainer):
        with_vllm_correction(mode, 0.7, 1.3)(trainer)
        trainer.args.skip_zero_advantage = False

    reference, ours = trl_and_ours(tmp_path, {}, rollouts={"sampler": own_logprobs(0.3)}, prepare=prepare)
    assert total(ours, "update/responses_skipped") == 0
    names = [name for log in reference.logs for name in log if name.startswith("sampling/")]
    assert len(names) == 5 * 2  # in the log of every rollout's first update
    for mine, theirs in zip(ours.logs, reference.logs, strict=True):
        for name in names:
            assert mine.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-5), name


# The engine's weights


def stale(caplog):
    """The warnings about stale weights."""
    return [record.getMessage() for record in caplog.records if "stale" in record.getMessage()]


def gaps_per_token(sampler, active=range(8)):
    """log P_own − log P_sampler of all tokens of the given rows of GIVEN, from plain logits."""
    inputs = active_inputs(**GIVEN, active=active)
    own = logps(tiny_model(), inputs)
    output = given_rollouts(**GIVEN)[0]([""] * 8, None)
    gaps = []
    for row, i in enumerate(active):
        sampled = sampler(output["prompt_ids"][i], output["completion_ids"][i])
        gaps += [own[row, t].item() - value for t, value in enumerate(sampled)]
    return gaps


ONE_UPDATE = {"steps_per_generation": 2, "max_steps": 1}
BOTH_POLICIES = [{}, {"behaviour_policy": "sampler"}, {"skip_on_policy_logps": False}]


def surer(prompt, completion):
    """A sampler that gave its tokens 2 % more than the policy does, as one does that is another policy."""
    return [value + 0.02 for value in own_logprobs(0.0)(prompt, completion)]


@pytest.mark.parametrize("policy", BOTH_POLICIES)
@pytest.mark.parametrize("sampler", [own_logprobs(0.0), own_logprobs(0.5), surer])
def test_stale_weights_raise_the_alarm(tmp_path, caplog, policy, sampler):
    """A sampler with other weights: the mean ratio from plain logits, and a warning; silence with the same weights."""
    rollouts = given_rollouts(**GIVEN, sampler=sampler)
    result = train(tmp_path, rollouts=rollouts, num_generations=2, learning_rate=0.0, **ONE_UPDATE, **policy)
    gaps = gaps_per_token(sampler, ACTIVE)
    expected = math.exp(sum(gaps) / len(gaps))
    assert result.logs[0]["sampling/mean_ratio"] == pytest.approx(expected, abs=1e-6)
    if abs(expected - 1) > 1e-5:
        assert abs(expected - 1) > 0.015
        (message,) = stale(caplog)
        assert f"{expected:.3f} times the probability" in message
    else:
        assert stale(caplog) == []


@pytest.mark.parametrize("policy", BOTH_POLICIES)
def test_the_policy_s_own_drift_is_no_alarm(tmp_path, caplog, policy):
    """The engine had the weights of the rollout's start; that later updates move on from there is not its fault."""
    sampler = own_logprobs(0.0)
    rollouts = given_rollouts(2, GIVEN["lengths"] * 2, GIVEN["rewards"] * 2, sampler=sampler)
    config = {"steps_per_generation": 4, "max_steps": 2, "num_generations": 2, "learning_rate": 1.0}
    result = train(tmp_path, rollouts=rollouts, partition_by_prompt=False, **config, **policy)
    assert result.logs[1]["trajectory_ratio/log_std"] > 0.05
    ratios = [log["sampling/mean_ratio"] for log in result.logs if "sampling/mean_ratio" in log]
    assert ratios[0] == pytest.approx(1.0, abs=1e-5)
    assert all(ratio == pytest.approx(1.0, abs=1e-5) for ratio in ratios)
    assert stale(caplog) == []


def test_no_alarm_where_the_sampler_is_meant_to_differ(tmp_path, caplog):
    rollouts = given_rollouts(**GIVEN, sampler=own_logprobs(0.5))
    result = train(tmp_path, rollouts=rollouts, num_generations=2, top_p=0.9, **ONE_UPDATE)
    assert result.logs[0]["sampling/mean_ratio"] > 1.1
    assert [record.getMessage() for record in caplog.records if "With top_p=0.9 the sampler" in record.getMessage()]
    assert stale(caplog) == []


def test_a_server_with_unprocessed_log_probabilities_is_refused(tmp_path):
    """TRL's client is the only part that is not real here: what the server says about itself."""
    trainer = build(tmp_path, random_rollouts(sampler=own_logprobs(0.0)), behaviour_policy="sampler")
    info = {"model_config": {"logprobs_mode": "raw_logprobs"}}
    client = SimpleNamespace(get_server_info=lambda: info)
    trainer.use_vllm, trainer.vllm_mode = True, "server"
    trainer.vllm_generation = SimpleNamespace(vllm_client=client)
    with pytest.raises(ValueError, match="restart it with --logprobs-mode processed_logprobs"):
        check_behaviour_policy(trainer)
    info["model_config"]["logprobs_mode"] = "processed_logprobs"
    check_behaviour_policy(trainer)


# Evaluation


@pytest.mark.parametrize("settings", [{"algorithm": "grpo"}, {"algorithm": "tic_grpo", "beta": 0.3}])
def test_evaluation_is_the_same_with_and_without_padding(tmp_path, settings):
    model = tiny_model()
    drifted(model, 0.05, seed=9).save_pretrained(tmp_path / "reference")
    model.config._name_or_path = str(tmp_path / "reference")

    def evaluated(**switches):
        trainer = build(tmp_path, random_rollouts(zero_advantage=0.2), model=model, **settings, **switches)
        forwards = count_forwards(trainer)
        return trainer.evaluate() | trainer.state.log_history[-1], forwards[0]

    on, passes = evaluated()
    off, trl_passes = evaluated(**TRL_UPDATE_PHASE)
    assert on["eval_loss"] != 0
    assert on.keys() == off.keys()
    compared = [name for name in on if not any(part in name for part in ("time", "runtime", "per_second"))]
    assert {"eval_loss", "eval_entropy"} <= set(compared)
    for name in compared:
        assert on[name] == pytest.approx(off[name], rel=1e-5, abs=1e-6), name
    assert passes < trl_passes  # nothing off-policy is evaluated, so nothing is scored


def seeding_the_shuffle():
    """Random rollouts after which prompts are shuffled alike, because evaluation draws from torch's generator, too."""
    generate, reward = random_rollouts()

    def rollout(prompts, trainer):
        torch.manual_seed(0)
        return generate(prompts, trainer)

    return rollout, reward


def test_evaluation_between_updates_changes_nothing_about_them(tmp_path):
    alone = train(tmp_path, rollouts=seeding_the_shuffle())
    between = train(tmp_path, rollouts=seeding_the_shuffle(), eval_strategy="steps", eval_steps=1)
    assert_same_updates(between, alone)
    for mine, theirs in zip(between.logs, alone.logs, strict=True):
        for name in mine:
            if name != "step_time":
                assert mine[name] == theirs[name], name


# Images


def vision_rollout():
    """Eight responses to prompts with an image of one or two tokens, padded on the left; half have zero advantage."""
    generator = torch.Generator().manual_seed(2)
    images = [1 + i % 2 for i in range(8)]  # tokens
    prompts = [[1, 10, *[8] * n, 11, 2] for n in images]
    prompt_ids = torch.tensor([[0] * (6 - len(p)) + p for p in prompts])
    lengths = torch.tensor([5, 1, 3, 2, 4, 4, 1, 2]).unsqueeze(1)
    completion_mask = (torch.arange(6) < lengths).long()  # one column more than is used
    completion_ids = torch.randint(1, 8, (8, 6), generator=generator) * completion_mask
    kinds = torch.cat([(prompt_ids == 8).long(), torch.zeros(8, 6, dtype=torch.long)], dim=1)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": (prompt_ids > 0).long(),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([0.5, 0.0, -0.5, 0.0, 0.0, 1.0, 0.0, -1.0]),
        "num_items_in_batch": completion_mask.sum(),
        "old_per_token_logps": torch.full((8, 6), -math.log(12)),
        "pixel_values": torch.randn(4 * sum(images), 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 2 * n] for n in images]),
        "num_images": [1] * 8,
        "mm_token_type_ids": kinds,
    }


def test_rollouts_with_images_stay_in_trl_s_micro_batches(tmp_path):
    seen = {True: [], False: []}

    def prepare(trainer):
        trainer._generate_and_score_completions = lambda inputs: vision_rollout()
        if isinstance(trainer, TICGRPOTrainer):
            trainer.scorer.score = lambda *args: None  # the rollout has old log-probabilities
        compute_loss = trainer._compute_loss

        def noted(model, inputs):
            seen[isinstance(trainer, TICGRPOTrainer)].append(inputs)
            return compute_loss(model, inputs)

        trainer._compute_loss = noted

    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 2}
    reference, ours = trl_and_ours(tmp_path, settings, model=tiny_vision_model(), prepare=prepare)
    assert_same_updates(ours, reference)
    assert ours.forwards == reference.forwards == 2
    assert all(log["update/responses_skipped"] == 0 for log in ours.logs)
    for mine, theirs in zip(seen[True], seen[False], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(mine[name], value) if torch.is_tensor(value) else mine[name] == value, name
        assert mine["completion_ids"].shape == (4, 6)


@pytest.mark.parametrize("behaviour_policy", ["trainer", "sampler"])
def test_rollouts_with_images_are_scored_with_them(tmp_path, behaviour_policy):
    """By the policy, or where the sampler left a token out."""
    rollout = vision_rollout()
    del rollout["old_per_token_logps"]
    sampled = torch.full(rollout["completion_ids"].shape, -1.0)
    sampled[1, 0] = sampled[5, 2] = math.nan
    rollout["sampling_per_token_logps"] = sampled
    lacks = torch.tensor([False, True, False, False, False, True, False, False])
    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "skip_on_policy_logps": False}
    rollouts = random_rollouts(sampler=own_logprobs(0.0))
    trainer = build(tmp_path, rollouts, model=tiny_vision_model(), behaviour_policy=behaviour_policy, **settings)
    trainer.model.train()
    trainer.packed_forward.choose_layout()
    micro_batches = trainer.batcher.cut(split_pixel_values_by_grid(rollout))
    trainer.scorer.score(micro_batches, trainer._metrics["train"])
    assert len(micro_batches) == 2
    for index, inputs in enumerate(micro_batches):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        images = {name: inputs[name] for name in MULTIMODAL if name in inputs}
        assert "pixel_values" in images
        with torch.no_grad():
            theirs = GRPOTrainer._get_per_token_logps_and_entropies
            own = theirs(trainer, trainer.model, ids, mask, inputs["completion_ids"].size(1), **images)[0]
        scored = torch.ones(4, dtype=torch.bool) if behaviour_policy == "trainer" else lacks[4 * index : 4 * index + 4]
        old, chosen = inputs["old_per_token_logps"], inputs["completion_mask"].bool()
        assert torch.equal(old[scored][chosen[scored]], own[scored][chosen[scored]])
        assert (old[~scored][chosen[~scored]] == -1).all()
