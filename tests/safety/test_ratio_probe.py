"""One warning per cause, with a figure that the test computes in another way, and no effect on the run."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
import zoo
from conftest import logps, make_trainer, tiny_model
from peft import LoraConfig
from rollouts import GIVEN, build, given_rollouts, own_logprobs, random_rollouts, train
from transformers import GenerationConfig

from tic_grpo_trl.safety.ratio_probe import RatioProbe, root_mean_square, sampler_log_ratio


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
# Two mini-batches per rollout, so that there are ratios
INNER = {"steps_per_generation": 2, "max_steps": 2}


@pytest.fixture
def warned(caplog):
    """Return a function for the warnings of this module so far, without the prefix for the rank."""

    def so_far():
        logged = [record.getMessage() for record in caplog.records if record.name == "tic_grpo_trl.safety.ratio_probe"]
        return [message.removeprefix("[RANK 0] ") for message in logged]

    return so_far


def run(tmp_path, model=None, **config):
    trainer = make_trainer(tmp_path, model, **INNER | config)
    trainer.train()
    return trainer


# Sampling


def test_sampler_log_ratio_by_hand():
    """Probabilities 0.5, 0.25, 0.15, 0.1 of four tokens, the same at every position."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = p.log().expand(1, 3, 4)
    ids = torch.tensor([[3, 0, 1, 2]])  # a prompt of one token

    def ratios(temperature=1.0, **settings):
        return sampler_log_ratio(logits * temperature, ids, temperature, settings)[0].exp().tolist()

    assert ratios() == pytest.approx([1, 1, 1])
    assert ratios(top_k=2) == pytest.approx([1 / 0.75, 1 / 0.75, 0])
    assert ratios(top_p=0.8) == pytest.approx([1 / 0.9] * 3)
    assert ratios(top_p=0.6) == pytest.approx([1 / 0.75, 1 / 0.75, 0])
    assert ratios(min_p=0.4) == pytest.approx([1 / 0.75, 1 / 0.75, 0])
    assert ratios(top_k=3, temperature=0.5) == pytest.approx([1 / 0.9] * 3)  # the cut comes after temperature
    # the logarithms of the prompt's token and of those that were written are doubled
    squared = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 1]])
    q = p ** (1 + squared)
    expected = [(q[t, token] / q[t].sum() / p[token]).item() for t, token in enumerate((0, 1, 2))]
    assert ratios(repetition_penalty=2.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.8, "temperature": 0.7},
        {"top_k": 3, "min_p": 0.2},
        {"repetition_penalty": 4.0},
        {"generation_kwargs": {"top_k": 2}},
    ],
)
def test_the_figure_is_that_of_the_distributions_generate_draws_from(tmp_path, warned, settings):
    """`generate` itself returns the distribution from which it drew each token."""
    trainer = make_trainer(tmp_path, **INNER, **settings)
    seen = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(generate(inputs)) or seen[-1]
    trainer.train()
    (message,) = warned()
    named = settings.get("generation_kwargs", settings)
    for name, value in named.items():
        assert (f"{name}={value}" in message) == (name != "temperature")

    asked = NEUTRAL | {"temperature": 1.0} | settings
    asked |= asked.pop("generation_kwargs", {})
    rollout, model = seen[0], tiny_model()
    total = count = 0.0
    for response in range(0, 16, 2):
        prompt = rollout["prompt_ids"][response][None]
        mask = rollout["prompt_mask"][response][None]
        for t in range(int(rollout["completion_mask"][response].sum())):
            seen_ids = torch.cat([prompt, rollout["completion_ids"][response][None, :t]], 1)
            seen_mask = torch.cat([mask, torch.ones(1, t, dtype=mask.dtype)], 1)
            config = GenerationConfig(do_sample=True, max_new_tokens=1, pad_token_id=0, eos_token_id=0, **asked)
            kwargs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
            out = model.generate(seen_ids, attention_mask=seen_mask, generation_config=config, **kwargs)
            token = rollout["completion_ids"][response, t]
            policy = (out.logits[0][0] / asked["temperature"]).log_softmax(-1)[token]
            total += (out.scores[0][0].log_softmax(-1)[token] - policy).item()
            count += 1
    per_token = total / count
    length = rollout["completion_mask"].sum(1).double().mean().item()
    assert abs(per_token) > 0.01
    found = re.search(r"On (\d+) tokens .* a token (\S+) times .* of (\d+) tokens e\^(\S+) times", message).groups()
    assert int(found[0]) == count
    assert float(found[1]) == pytest.approx(math.exp(per_token), rel=1e-3)
    assert int(found[2]) == round(length)
    assert float(found[3]) == pytest.approx(per_token * length, rel=0.06)


def test_no_warning_if_the_sampler_is_the_policy_or_at_another_level(tmp_path, warned):
    run(tmp_path)
    run(tmp_path, algorithm="grpo", top_p=0.5)
    assert warned() == []


def test_logits_that_the_model_caps_give_no_figure(tmp_path, warned):
    model = tiny_model()
    model.config.final_logit_softcapping = 0.1
    run(tmp_path, model, top_p=0.8)
    (message,) = warned()
    assert message.startswith("With top_p=0.8 the sampler is a different policy")
    assert "tokens of the first rollout" not in message


def test_the_sampler_as_behaviour_policy_has_a_meaning_of_its_own(tmp_path, warned):
    rollouts = given_rollouts(**GIVEN, sampler=own_logprobs(0.0))
    config = {"num_generations": 2, "steps_per_generation": 2, "max_steps": 1, "behaviour_policy": "sampler"}
    train(tmp_path, rollouts=rollouts, top_k=4, **config)
    (message,) = warned()
    assert "so the ratio does not start at 1" in message


# Dropout


def test_dropout_is_measured_if_it_is_allowed(tmp_path, warned):
    """Compare with the spread of R that the run itself logs between two passes with the same weights."""
    config = {"disable_dropout": False, "algorithm": "grpo", "num_iterations": 2, "skip_on_policy_logps": False}
    config |= {"learning_rate": 0.0, "max_steps": 4, "skip_zero_advantage": False}
    trainer = run(tmp_path, tiny_model(attention_dropout=0.2), **config)
    (message,) = warned()
    assert message.startswith("Dropout is active in 2 modules (first: model.layers.0.self_attn.attention_dropout)")
    noise = float(re.search(r"is (\S+) nats \(rms\) over 16 responses", message)[1])
    entries = [entry for entry in trainer.state.log_history if "trajectory_ratio/log_std" in entry]
    logged = [math.hypot(e["trajectory_ratio/log_std"], e["trajectory_ratio/log_mean"]) for e in entries]
    assert noise == pytest.approx(math.sqrt(sum(value**2 for value in logged) / len(logged)), rel=0.6)
    assert noise > 0.05


def test_dropout_of_an_adapter_is_measured(tmp_path, warned):
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
    run(tmp_path, algorithm="gspo", disable_dropout=False, peft_config=lora)
    (message,) = warned()
    assert "lora_dropout" in message
    assert float(re.search(r"is (\S+) nats", message)[1]) > 0


def test_dropout_does_not_matter_without_a_ratio(tmp_path, warned):
    dropout = {"disable_dropout": False, "max_steps": 1}
    run(tmp_path, tiny_model(attention_dropout=0.2), algorithm="grpo", **dropout | {"steps_per_generation": 1})
    run(tmp_path, tiny_model(attention_dropout=0.2), algorithm="grpo_no_is", **dropout)
    assert warned() == []


# Precision


# Rounding adds up over long responses
LONG = {"max_completion_length": 48, "generation_kwargs": {"min_new_tokens": 47}, "max_steps": 1}


@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_is_measured_and_warned_of(tmp_path, warned, autocast):
    """The figure is as large as the error of the log-probabilities, compared with those in float32."""
    model = tiny_model(initializer_range=0.5)
    model = model if autocast else model.to(torch.bfloat16)
    exact = tiny_model()
    exact.load_state_dict(model.state_dict())  # as the precision holds them
    trainer = make_trainer(tmp_path, model, bf16=autocast, **INNER | LONG)
    seen = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(generate(inputs)) or seen[-1]
    trainer.train()
    (message,) = warned()
    assert message.startswith("Log-probabilities in bfloat16 are noise in R")
    noise = trainer.state.log_history[0]["trajectory_ratio/noise_floor"]
    assert f"it is {noise:.2g} nats (rms) over 16 responses" in message
    assert trainer.state.log_history[0]["trajectory_ratio/inner_1/log_std"] == 0.0  # which does not show it

    rollout = seen[0]
    trainer.model.load_state_dict(exact.state_dict())  # before the update
    error = (trainer.packed_forward.score(rollout).logps - logps(exact, rollout).detach()) * rollout["completion_mask"]
    assert 0.4 < noise / root_mean_square(error.sum(1)) < 2.5
    assert noise > 0.1


def test_a_noise_that_is_small_is_logged_without_a_warning(tmp_path, warned):
    trainer = run(tmp_path, tiny_model().to(torch.bfloat16), max_steps=1)
    assert 0 < trainer.state.log_history[0]["trajectory_ratio/noise_floor"] < 0.1
    assert warned() == []


def test_float32_measures_nothing(tmp_path, warned, monkeypatch):
    """No pass and no metric; neither without a ratio or with one per token."""
    monkeypatch.setattr(RatioProbe, "_noise", lambda *args: pytest.fail("measured"))
    assert not any("noise_floor" in name for entry in run(tmp_path).state.log_history for name in entry)
    run(tmp_path, bf16=True, algorithm="grpo")
    run(tmp_path, bf16=True, steps_per_generation=1)
    assert [message for message in warned() if not message.startswith("K = 1")] == []


def test_no_noise_is_measured_for_a_model_that_padding_changes(tmp_path, messages):
    """Its state depends on the padding before the prompt, whatever the precision."""
    model = zoo.tiny_model("rwkv", "eager")
    trainer = build(tmp_path, random_rollouts(), model=model, bf16=True)
    trainer.train()
    assert trainer.packed_forward.choose_layout() == "padded"
    assert not [text for text in messages() if "noise in R" in text]
    assert not any("trajectory_ratio/noise_floor" in entry for entry in trainer.state.log_history)


# All causes


@pytest.mark.parametrize(
    "config",
    [{"top_p": 0.7}, {"bf16": True}, {"disable_dropout": False, "algorithm": "grpo"}],
)
def test_measuring_leaves_no_trace(tmp_path, monkeypatch, config):
    """The same run without it has the same weights and logs. It happens once, at the first rollout."""
    model = {"attention_dropout": 0.2} if "disable_dropout" in config else {}
    passes = []
    measured = make_trainer(tmp_path, tiny_model(**model), max_steps=4, steps_per_generation=2, **config)
    assert measured.packed_forward.choose_layout()  # whose probes are passes of the run itself
    noted = RatioProbe._measuring
    monkeypatch.setattr(RatioProbe, "_measuring", lambda self: passes.append(1) or noted(self))
    measured.train()
    assert len(passes) == 1  # of two rollouts
    monkeypatch.setattr(RatioProbe, "check_rollout", lambda self, *args, **kwargs: None)
    plain = make_trainer(tmp_path, tiny_model(**model), max_steps=4, steps_per_generation=2, **config)
    assert plain.packed_forward.choose_layout()
    plain.train()
    for mine, theirs in zip(measured.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    timed = ("_runtime", "_per_second", "step_time", "noise_floor")
    for mine, theirs in zip(measured.state.log_history, plain.state.log_history, strict=True):
        kept = {name: value for name, value in mine.items() if not name.endswith(timed)}
        assert kept == {name: value for name, value in theirs.items() if not name.endswith(timed)}


def test_a_resumed_run_has_the_noise_floor_in_its_history(tmp_path):
    config = {"bf16": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(tmp_path, **config)
    resumed = make_trainer(tmp_path, **INNER | config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sum("trajectory_ratio/noise_floor" in entry for entry in resumed.state.log_history) == 1


def probe_of(args):
    """Return a probe that makes no pass."""
    model = tiny_model()
    return RatioProbe(args, None, lambda: model, None, pad_token_id=0, temperature=1.0, compares=True)


def test_rollouts_with_images_give_a_warning_without_a_figure(warned):
    args = SimpleNamespace(
        importance_sampling_level="trajectory",
        behaviour_policy="trainer",
        changed_sampling={"top_p": 0.9},
        bf16=True,
        fp16=False,
        disable_dropout=True,
    )
    probe_of(args).check_rollout({"pixel_values": torch.zeros(1)}, {}, is_new=True)
    (message,) = warned()
    assert message.startswith("With top_p=0.9 the sampler is a different policy")
    assert "tokens of the first rollout" not in message


def test_stale_weights_give_one_warning_until_they_are_current_again(warned):
    probe = probe_of(SimpleNamespace(changed_sampling={}, disable_dropout=True, importance_sampling_level="trajectory"))
    for ratio in (1.0, 0.98, 0.97, 0.98):
        probe.check_sampler(ratio)
    assert len(warned()) == 1
    assert "0.980 times the probability" in warned()[0]
    for ratio in (1.005, 1.02, 0.5):
        probe.check_sampler(ratio)
    assert len(warned()) == 2
    assert "1.020 times the probability" in warned()[1]


def test_root_mean_square_ignores_non_finite_values():
    assert root_mean_square(torch.tensor([3.0, -4.0, math.nan, math.inf])) == pytest.approx(math.sqrt(12.5))
    assert math.isnan(root_mean_square(torch.tensor([math.nan])))
