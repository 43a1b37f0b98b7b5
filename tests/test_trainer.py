"""trainer.py: parity with TRL, every inherited option under the trajectory level, and what is relied on inside TRL."""

import inspect
import math
from collections import Counter

import pytest
import torch
from conftest import (
    CPU,
    TINY_PROMPTS,
    TRL_UPDATE_PHASE,
    WORDS,
    batch,
    count_a,
    drifted,
    logps,
    loss_and_gradients,
    make_trainer,
    relative_error,
    tiny_model,
    tiny_moe_model,
    tiny_tokenizer,
    tiny_vision_model,
)
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from tic_grpo_trl import ALGORITHMS, TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.version import __version__


LENGTHS = (5, 2, 6, 1, 4, 6, 3, 6)
DAPO = {"epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dapo", "scale_rewards": "none"}
GSPO = {
    "importance_sampling_level": "sequence",
    "epsilon": 3e-4,
    "epsilon_high": 4e-4,
    "loss_type": "grpo",
    "scale_rewards": "group",
}


def tool_mask():
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[0, 1:3] = 0
    mask[5, :] = 0  # a response without a token of its own
    return mask


def reference_logps(model, inputs):
    return logps(drifted(model, 0.1, seed=9), inputs).detach()


def variants(model, inputs):
    """Every inherited option: (config, trainer attributes, extra inputs)."""
    generator = torch.Generator().manual_seed(11)
    not_truncated = torch.ones(8, 1, dtype=torch.long)
    not_truncated[[1, 4, 6, 7]] = 0
    return {
        "plain": ({}, {}, {}),
        "tool_mask": ({}, {}, {"tool_mask": tool_mask()}),
        "truncated_rows_masked": ({}, {}, {"completion_mask": inputs["completion_mask"] * not_truncated}),
        "per_token_advantages": ({}, {}, {"advantages": torch.randn(8, 6, generator=generator)}),
        "kl": ({"beta": 0.5}, {}, {"ref_per_token_logps": reference_logps(model, inputs)}),
        "kl_without_bias_correction": (
            {"beta": 0.5, "use_bias_correction_kl": False},
            {},
            {"ref_per_token_logps": reference_logps(model, inputs)},
        ),
        "entropy_bonus": ({"entropy_coef": 0.2}, {}, {}),
        "off_policy_mask": ({"off_policy_mask_threshold": 0.05}, {}, {}),
        "off_policy_mask_from_sampler": (
            {"off_policy_mask_threshold": 0.05},
            {},
            {"sampling_per_token_logps": logps(model, inputs).detach() + 0.2},
        ),
        "vllm_correction": (
            {},
            {"use_vllm": True},
            {"importance_sampling_ratio": torch.rand(8, 1, generator=generator) + 0.5},
        ),
        "vllm_correction_per_token": (
            {},
            {"use_vllm": True},
            {"importance_sampling_ratio": torch.rand(8, 6, generator=generator) + 0.5},
        ),
    }


VARIANTS = list(variants(tiny_model(), batch(tiny_model(), LENGTHS)))


def loss_of(tmp_path, variant, trl=False, **config):
    model = tiny_model()
    inputs = batch(model, LENGTHS)
    extra_config, attributes, extra_inputs = variants(model, inputs)[variant]
    if "ref_per_token_logps" in extra_inputs:
        model.config._name_or_path = save_for_reference(tmp_path, model)
    trainer = make_trainer(tmp_path / "run", model, trl=trl, **config, **extra_config)
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return *loss_and_gradients(trainer, inputs | extra_inputs), trainer, inputs | extra_inputs


def save_for_reference(tmp_path, model) -> str:
    """TRL loads the reference model from the policy's name."""
    model.save_pretrained(tmp_path / "reference")
    return str(tmp_path / "reference")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("algorithm", "settings"), [("grpo", DAPO), ("gspo", GSPO)])
def test_token_and_sequence_arms_equal_trl(tmp_path, algorithm, settings, variant):
    loss, gradients, *_ = loss_of(tmp_path / "ours", variant, algorithm=algorithm, **TRL_UPDATE_PHASE)
    trl_loss, trl_gradients, *_ = loss_of(tmp_path / "trl", variant, trl=True, **settings)
    assert torch.equal(loss, trl_loss)
    assert gradients.keys() == trl_gradients.keys()
    assert all(torch.equal(gradients[name], trl_gradients[name]) for name in gradients)


def expected(model, inputs, trainer, low, high):
    """The trajectory-level loss written out for one micro-batch with the constant normaliser, on plain logits."""
    args = trainer.args
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    logp = logps(model, inputs)
    advantages = inputs["advantages"] if inputs["advantages"].dim() == 2 else inputs["advantages"].unsqueeze(1)
    ratio = ((logp - inputs["old_per_token_logps"]) * mask).sum(1, keepdim=True).exp().detach()
    upper = torch.full_like(advantages, 1 + high)
    keep = ratio <= upper
    weight = torch.minimum(ratio, upper)
    # value w, gradient w·∇log π, or none above the cap
    token_weight = weight * (1 + keep * (logp - logp.detach()))
    loss = -token_weight * advantages
    if args.off_policy_mask_threshold is not None:
        sampler = inputs.get("sampling_per_token_logps", inputs["old_per_token_logps"])
        drift = ((sampler - logp.detach()) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        loss = loss * ((advantages >= 0) | (drift <= args.off_policy_mask_threshold))
    if "importance_sampling_ratio" in inputs:
        loss = loss * inputs["importance_sampling_ratio"]
    if args.beta:
        gap = inputs["ref_per_token_logps"] - logp
        kl = gap.exp() - gap - 1
        loss = loss + args.beta * (kl * token_weight if args.use_bias_correction_kl else kl)
    loss = (loss * mask).sum() / (len(loss) * args.max_completion_length)
    if args.entropy_coef:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logits = type(model).forward(model, input_ids=ids, attention_mask=attention).logits[:, -7:-1]
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        loss = loss - args.entropy_coef * (entropy * mask).sum() / mask.sum()
    return loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_inherited_options_under_the_trajectory_level(tmp_path, variant):
    loss, gradients, trainer, inputs = loss_of(tmp_path, variant, epsilon_high=0.28)
    reference = tiny_model()
    expected_loss = expected(reference, inputs, trainer, 0.2, 0.28)
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-5, atol=1e-7)
    assert relative_error(gradients, {name: p.grad for name, p in reference.named_parameters()}) < 1e-5
    if variant != "plain":  # the option does something
        _, plain, *_ = loss_of(tmp_path, "plain", epsilon_high=0.28)
        assert relative_error(gradients, plain) > 1e-3


def test_the_off_policy_mask_measures_the_drift_per_token_not_the_anchor(tmp_path):
    """One response with A < 0 has a mean drift of 0.13 and −R = 0.53: a threshold between the two keeps it."""
    model = tiny_model()
    inputs = batch(model, LENGTHS)
    mask = inputs["completion_mask"]
    drift = ((inputs["old_per_token_logps"] - logps(model, inputs)) * mask).sum(1)
    assert 0.1 < drift[4] / mask[4].sum() < 0.2 < drift[4]
    _, plain, *_ = loss_of(tmp_path, "plain")
    for threshold, equal in ((0.2, True), (0.1, False)):
        trainer = make_trainer(tmp_path, tiny_model(), off_policy_mask_threshold=threshold)
        _, gradients = loss_and_gradients(trainer, inputs)
        assert all(torch.equal(gradients[name], plain[name]) for name in plain) == equal


def test_some_rows_lie_above_the_cap_in_these_tests():
    model = tiny_model()
    inputs = batch(model, LENGTHS)
    ratio = ((logps(model, inputs) - inputs["old_per_token_logps"]) * inputs["completion_mask"]).sum(1).exp()
    above, gains = ratio > 1.28, inputs["advantages"] > 0
    assert (above & gains).any()
    assert (above & ~gains).any()
    assert (~above & gains).any()
    assert (~above & ~gains).any()


def test_gradient_is_exactly_zero_where_every_row_is_above_the_cap(tmp_path):
    model = tiny_model()
    inputs = batch(model, LENGTHS)
    inputs["old_per_token_logps"] = logps(model, inputs).detach() - 1.0
    _, gradients = loss_and_gradients(make_trainer(tmp_path, model), inputs)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


@pytest.mark.parametrize("algorithm", [algorithm for algorithm in ALGORITHMS if algorithm != "gspo"])
def test_on_policy_rollouts_have_ratio_one(tmp_path, algorithm):
    """Without old log-probabilities every algorithm has the gradient A·∇log π and its own normaliser."""
    model = tiny_model()
    inputs = batch(model, LENGTHS)
    del inputs["old_per_token_logps"]
    trainer = make_trainer(tmp_path, model, algorithm=algorithm, advantage_baseline="group_mean")
    _, gradients = loss_and_gradients(trainer, inputs)

    reference = tiny_model()
    mask, logp = inputs["completion_mask"], logps(reference, inputs)
    lengths = mask.sum(1, keepdim=True)
    by_response = {"grpo": 8 * lengths, "sapo": 8 * lengths, "luspo": 8}
    by_loss_type = {"dr_grpo": 8 * 6} | by_response | dict.fromkeys(("dapo", "cispo", "vespo"), mask.sum())
    normaliser = by_loss_type[trainer.loss_type]
    (-(inputs["advantages"].unsqueeze(1) * logp * mask) / normaliser).sum().backward()
    assert relative_error(gradients, {name: p.grad for name, p in reference.named_parameters()}) < 1e-5
    trainer.log({})
    logged = trainer.state.log_history[-1]
    assert logged["trajectory_ratio/ess"] == 1.0
    assert logged["trajectory_ratio/log_std"] == 0.0


def test_delta_caps_only_negative_advantages(tmp_path):
    """A > 0 may go above `delta` when the length-scaled cap does."""
    model = tiny_model()
    inputs = batch(model, LENGTHS)
    inputs["old_per_token_logps"] = logps(model, inputs).detach() - 2.0 / 6  # R = 2/6 per token
    trainer = make_trainer(tmp_path, model, algorithm="tic_grpo", length_scaled_cap=2.0, delta=1.5)
    loss, _ = loss_and_gradients(trainer, inputs)
    ratio = (inputs["completion_mask"].sum(1) / 3).exp()
    advantages = inputs["advantages"]
    weight = torch.where(advantages >= 0, ratio, ratio.clamp(max=1.5))
    expected_loss = -(weight * advantages * inputs["completion_mask"].sum(1)).sum() / 48
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert trainer.args.delta == 1.5


def test_inputs_of_the_buffered_rollout_are_left_alone(tmp_path):
    model = tiny_model()
    inputs = batch(model, LENGTHS)
    before = {name: value.clone() for name, value in inputs.items()}
    loss_and_gradients(make_trainer(tmp_path, model), inputs)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[name], before[name]) for name in before)


# What the trainer relies on inside TRL and transformers. If one of these fails after an upgrade, its message says what
# has changed; read TRL's `_compute_loss` before anything.

# Methods that are overridden, with what TRL and transformers pass to them. More is allowed only where it is passed on.
OVERRIDDEN = {
    "_tokenize_prompts": "prompts",
    "_generate_single_turn": "prompt_ids images multimodal_fields num_generations has_tool_images",
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "_generate_and_score_completions": "inputs",
    "_prepare_inputs": "generation_batch",
    "training_step": "model inputs num_items_in_batch",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "_compute_loss": "model inputs",
    "_get_per_token_logps_and_entropies": "model input_ids attention_mask "
    "logits_to_keep batch_size compute_entropy compute_aux_loss",
    "_clip_grad_norm": "model",
    "_get_grad_norm": "model grad_norm",
    "log": "logs start_time",
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "create_model_card": "model_name dataset_name tags",
    "_get_output_dir": "trial",
    "_save_checkpoint": "model trial",
    "_push_from_checkpoint": "checkpoint_folder",
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    "_init_training_state": "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_best_model": "",
    "_issue_warnings_after_load": "load_result",
    "_get_train_sampler": "dataset",
    "_run_epoch": "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch "
    "trial ignore_keys_for_eval start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    "_evaluate": "trial ignore_keys_for_eval skip_scheduler",
    "_maybe_log_save_evaluate": "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
    "_finalize_training": "trial num_train_samples start_time",
}
PASSED_ON = {"_get_per_token_logps_and_entropies"}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_guard_overridden_methods_take_what_they_took(name):
    assert hasattr(GRPOTrainer, name), f"{name} is gone: what it did is not overridden any more"
    theirs = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[1:]
    expected = OVERRIDDEN[name].split()
    if name in PASSED_ON:
        theirs = theirs[: len(expected)]
    assert theirs == expected, f"{name} took ({', '.join(expected)}) and takes ({', '.join(theirs)}) now"


def test_guard_no_other_method_is_overridden():
    """Else the table above would have no say in it."""
    names = {name for name, value in vars(TICGRPOTrainer).items() if callable(value) and hasattr(GRPOTrainer, name)}
    assert names - {"__init__"} == OVERRIDDEN.keys()


class Recorder(dict):
    def __init__(self, *args):
        super().__init__(*args)
        self.events = []

    def get(self, key, default=None):
        self.events.append(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.events.append(key)
        return super().__getitem__(key)


def trl_trainer(tmp_path, model, **config):
    return make_trainer(tmp_path, model, trl=True, loss_type="dr_grpo", **config)


def test_guard_old_log_probabilities_are_read_after_the_one_forward_pass(tmp_path):
    model = tiny_model()
    trainer = trl_trainer(tmp_path, model)
    inputs = Recorder(batch(model, LENGTHS))
    forward = trainer._get_per_token_logps_and_entropies

    def recorded(*args, **kwargs):
        inputs.events.append("forward")
        return forward(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = recorded
    loss_and_gradients(trainer, inputs)
    assert inputs.events.count("forward") == 1, "_compute_loss does not have one forward pass"
    assert inputs.events.count("old_per_token_logps") == 1, "_compute_loss does not read old_per_token_logps once"
    order = inputs.events.index("forward") < inputs.events.index("old_per_token_logps")
    assert order, "_compute_loss reads old_per_token_logps before the forward pass, so they can't be anchored"


def test_guard_token_ratio_is_exp_of_the_difference_and_lets_old_carry_gradient(tmp_path):
    """ratio = exp(log π − old); a gradient inside `old` is not cut, so it can cancel; clip bounds are attributes."""
    model = tiny_model()
    inputs = batch(model, LENGTHS)
    trainer = trl_trainer(tmp_path, model)
    trainer.epsilon_low, trainer.epsilon_high = 1.0, math.inf
    shift = torch.linspace(-5, 5, 8).unsqueeze(1)
    forward = trainer._get_per_token_logps_and_entropies

    def anchored(*args, **kwargs):
        logp, entropies, aux = forward(*args, **kwargs)
        inputs["old_per_token_logps"] = torch.where(shift > 0, logp, logp.detach()) - shift
        return logp, entropies, aux

    trainer._get_per_token_logps_and_entropies = anchored
    loss, gradients = loss_and_gradients(trainer, inputs)

    reference = tiny_model()
    mask, logp = inputs["completion_mask"], logps(reference, inputs)
    weight = shift.exp() * inputs["advantages"].unsqueeze(1) * mask / 48
    changed = "_compute_loss: a token's ratio is not exp(log π − old) within epsilon_low and epsilon_high any more"
    assert loss.item() == pytest.approx(-weight.sum().item(), rel=1e-5), changed
    (-(weight * (shift <= 0) * logp).sum()).backward()
    error = relative_error(gradients, {name: p.grad for name, p in reference.named_parameters()})
    assert error < 1e-5, "_compute_loss cuts the gradient of old_per_token_logps, so the ratio's can't be cancelled"


def test_guard_off_policy_mask_prefers_the_sampler_log_probabilities(tmp_path):
    model = tiny_model()
    inputs = batch(model, LENGTHS)
    trainer = trl_trainer(tmp_path, model, off_policy_mask_threshold=0.05)
    seen = {}
    mask_function = trainer.get_off_policy_mask
    trainer.get_off_policy_mask = lambda **kwargs: seen.update(kwargs) or mask_function(**kwargs)
    marker = torch.zeros_like(inputs["old_per_token_logps"])
    loss_and_gradients(trainer, inputs | {"sampling_per_token_logps": marker})
    assert seen.get("sampling_per_token_logps") is marker, "the off-policy mask is not made from the sampler's any more"


def test_a_trl_that_skips_the_hook_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: torch.zeros(()))
    with pytest.raises(RuntimeError, match=r"install trl>=1\.16,<1\.17"):
        loss_and_gradients(trainer, batch(trainer.model))


# Whole training runs


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(("algorithm", "settings"), [("grpo", DAPO), ("gspo", GSPO)])
def test_six_step_runs_equal_trl(tmp_path, algorithm, settings):
    run = {"max_steps": 6, "steps_per_generation": 2, "learning_rate": 0.01}
    ours = make_trainer(tmp_path / "ours", algorithm=algorithm, partition_by_prompt=False, **TRL_UPDATE_PHASE, **run)
    ours.train()
    theirs = make_trainer(tmp_path / "trl", trl=True, **settings, **run)
    theirs.train()
    start = tiny_model().state_dict()
    for name, value in parameters(ours).items():
        assert torch.equal(value, parameters(theirs)[name])
        assert not torch.equal(value, start[name])
    for a, b in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        shared = [name for name in b if name not in ("step_time", "train_runtime") and "per_second" not in name]
        assert all(a[name] == b[name] for name in shared)
        ours_alone = ("trajectory_ratio/", "update/", "frac_non_finite")
        assert set(a) - set(b) <= {name for name in a if name.startswith(ours_alone)}


@pytest.mark.parametrize("algorithm", ["tic_grpo", "tic_grpo_truncated", "grpo2", "grpo_no_is"])
def test_training_moves_every_parameter(tmp_path, algorithm):
    trainer = make_trainer(
        tmp_path, algorithm=algorithm, steps_per_generation=4, max_steps=8, skip_zero_advantage=False
    )
    before = parameters(trainer)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in parameters(trainer).items())
    logged = [entry for entry in trainer.state.log_history if "trajectory_ratio/ess" in entry]
    assert len(logged) == 8
    for step, entry in enumerate(logged):
        k = step % 4 + 1
        inner = {name.split("/")[1] for name in entry if name.startswith("trajectory_ratio/inner_")}
        assert inner == {f"inner_{k}"}
        assert 0 < entry[f"trajectory_ratio/inner_{k}/ess"] <= 1 + 1e-9
        if k == 1:  # the same weights on the same shapes: no noise at all
            assert entry["trajectory_ratio/log_std"] == 0.0
            assert entry["trajectory_ratio/ess"] == 1.0
        else:
            assert entry["trajectory_ratio/log_std"] > 0
        assert not any(name.startswith("clip_ratio/") for name in entry)


def test_reused_rollouts_and_accumulation_count_inner_steps(tmp_path):
    """num_iterations = 2 over 2 windows of 2 micro-batches: K = 4 updates a rollout."""
    trainer = make_trainer(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
        max_steps=8,
        skip_zero_advantage=False,
    )
    trainer.train()
    inner = [
        sorted(name.split("/")[1] for name in entry if name.endswith("/ess") and "inner" in name)
        for entry in trainer.state.log_history
        if "trajectory_ratio/ess" in entry
    ]
    assert inner == [[f"inner_{k}"] for k in (1, 2, 3, 4)] * 2


def noted_windows(trainer):
    """Trains and returns per optimizer step the (prompt, completion) of every row that its loss saw."""
    windows, rows = [], []
    compute_loss = trainer._compute_loss

    def noted(model, inputs):
        for mask, prompt, completion in zip(
            inputs["prompt_mask"], inputs["prompt_ids"], inputs["completion_ids"], strict=True
        ):
            rows.append((tuple(prompt[mask.bool()].tolist()), tuple(completion.tolist())))
        if trainer.accelerator.sync_gradients:
            windows.append(rows.copy())
            rows.clear()
        return compute_loss(model, inputs)

    trainer._compute_loss = noted
    trainer.train()
    return windows


@pytest.mark.parametrize(
    "config",
    [
        {"per_device_train_batch_size": 8, "steps_per_generation": 4},
        # each group of four spans two micro-batches
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 16},
        # reuse (v2's Algorithm 2): the same mini-batches again
        {"per_device_train_batch_size": 8, "steps_per_generation": 2, "num_iterations": 2},
    ],
)
def test_no_prompt_is_in_two_mini_batches_of_a_rollout(tmp_path, config):
    windows = noted_windows(
        make_trainer(tmp_path, max_steps=8, learning_rate=1e-3, skip_zero_advantage=False, **config)
    )
    assert len(windows) == 8
    for rollout in (windows[:4], windows[4:]):
        if config.get("num_iterations"):
            assert rollout[:2] == rollout[2:]
            rollout = rollout[:2]
        prompts = [{prompt for prompt, _ in window} for window in rollout]
        assert all(len(window) == 8 for window in rollout)
        assert all(len(of_window) == 2 for of_window in prompts)  # two whole groups
        assert len(set.union(*prompts)) == 2 * len(rollout)  # disjoint
        counts = Counter(prompt for window in rollout for prompt, _ in window)
        assert set(counts.values()) == {4}  # every response once
    assert [{p for p, _ in w} for w in windows[:4]] != [{p for p, _ in w} for w in windows[4:]]


def test_partition_by_prompt_can_be_turned_off(tmp_path):
    windows = noted_windows(make_trainer(tmp_path, max_steps=4, steps_per_generation=4, partition_by_prompt=False))
    prompts = [{prompt for prompt, _ in window} for window in windows]
    assert len(set.union(*prompts)) < sum(map(len, prompts))


@pytest.mark.parametrize(
    ("config", "obstacle"),
    [
        (
            {"per_device_train_batch_size": 2, "steps_per_generation": 4},
            "per_device_train_batch_size * gradient_accumulation_steps * number of processes = 2 is not divisible by "
            "num_generations = 4",
        ),
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 3},
            "steps_per_generation = 3 is not divisible by gradient_accumulation_steps = 2",
        ),
    ],
)
def test_where_groups_do_not_fit_it_says_so_and_shuffles_responses(tmp_path, caplog, config, obstacle):
    trainer = make_trainer(tmp_path, **config)
    (message,) = [r.getMessage() for r in caplog.records if "partition_by_prompt" in r.getMessage()]
    assert message.endswith(f"responses are shuffled across mini-batches, which splits groups: {obstacle}.")
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_single_mini_batch_needs_no_partition(tmp_path, caplog):
    make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, steps_per_generation=2)
    assert not [r for r in caplog.records if "partition_by_prompt" in r.getMessage()]


def test_trl_clip_ratio_is_logged_where_trl_computes_the_weight(tmp_path):
    trainer = make_trainer(tmp_path, algorithm="grpo", max_steps=1)
    trainer.train()
    assert "clip_ratio/region_mean" in trainer.state.log_history[0]


def test_lora_moves_only_the_adapter_and_its_reference_is_the_base(tmp_path):
    model = tiny_model()
    model.config._name_or_path = save_for_reference(tmp_path, model)
    peft_config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"])
    trainer = make_trainer(
        tmp_path / "run", model, peft_config=peft_config, steps_per_generation=4, max_steps=8, beta=0.01
    )
    before = parameters(trainer)
    trainer.train()
    for name, value in parameters(trainer).items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name
    history = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert history[0]["kl"] == 0.0  # a fresh adapter is the base model
    assert history[-1]["kl"] > 0.0
    # lora_dropout is off, or the first inner step would be noise
    assert all(e["trajectory_ratio/log_std"] == 0.0 for e in history if "trajectory_ratio/inner_1/ess" in e)


@pytest.mark.parametrize("lora", [False, True])
def test_save_load_resume(tmp_path, lora):
    config = {"steps_per_generation": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if lora else None
    whole = make_trainer(tmp_path / "run", peft_config=peft_config, **config)
    whole.train()
    resumed = make_trainer(tmp_path / "run", peft_config=peft_config, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    final = parameters(whole)
    for name, value in parameters(resumed).items():
        torch.testing.assert_close(value, final[name], rtol=1e-5, atol=1e-6)
    steps = [entry["step"] for entry in resumed.state.log_history if "trajectory_ratio/ess" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]

    resumed.save_model(str(tmp_path / "saved"))
    model = tiny_model()
    if lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(tmp_path / "saved"))
        loaded = {n.replace(".default.", "."): v for n, v in model.state_dict().items() if "lora_" in n}
        assert loaded
        saved = {n.replace(".default.", "."): v for n, v in parameters(resumed).items() if "lora_" in n}
    else:
        loaded = type(model).from_pretrained(tmp_path / "saved").state_dict()
        saved = parameters(resumed)
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


# Other models


def test_moe_auxiliary_loss_is_added(tmp_path):
    def trainer(coef):
        return make_trainer(tmp_path, tiny_moe_model(), router_aux_loss_coef=coef)

    inputs = batch(tiny_model(), LENGTHS)
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] * 0 - math.log(len(WORDS))
    without, _ = loss_and_gradients(trainer(0.0), inputs)
    with_aux = trainer(0.5)
    loss, gradients = loss_and_gradients(with_aux, inputs)
    (aux_loss,) = with_aux._metrics["train"]["aux_loss"]
    torch.testing.assert_close(loss - without, torch.tensor(0.5 * aux_loss), rtol=1e-5, atol=1e-6)
    assert any("gate" in name for name in gradients)


def test_vision_inputs_pass_through(tmp_path):
    """Pixels reach the model and change the trajectory-level loss as they change its log-probabilities."""
    model = tiny_vision_model()
    trainer = make_trainer(tmp_path, model)
    inputs = batch(tiny_model(), (3, 2), old_drift=0.0)
    inputs["prompt_ids"] = torch.tensor([[1, 10, 8, 8, 11, 2]] * 2)  # two image tokens a prompt
    inputs["prompt_mask"] = torch.ones_like(inputs["prompt_ids"])
    inputs["old_per_token_logps"] = torch.full((2, 3), -math.log(12))
    inputs["image_grid_thw"] = torch.tensor([[1, 2, 4]] * 2)
    inputs["num_images"] = [1, 1]
    inputs["mm_token_type_ids"] = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0, 0]] * 2)
    pixels = torch.randn(16, 3 * 2 * 4 * 4)
    loss, gradients = loss_and_gradients(trainer, inputs | {"pixel_values": pixels})
    other, _ = loss_and_gradients(trainer, inputs | {"pixel_values": pixels * 3})
    assert loss.isfinite()
    assert not torch.equal(loss, other)
    assert any("visual" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())


# Construction


def test_without_args_it_builds_its_own_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.config._name_or_path = "someone/Tiny-Model"
    trainer = TICGRPOTrainer(
        model=model, reward_funcs=count_a, train_dataset=TINY_PROMPTS, processing_class=tiny_tokenizer()
    )
    assert isinstance(trainer.args, TICGRPOConfig)
    assert trainer.args.output_dir == "Tiny-Model-TIC-GRPO"
    assert trainer.args.algorithm == "tic_grpo"


def test_a_plain_grpo_config_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"args must be a TICGRPOConfig, got GRPOConfig: replace GRPOConfig"):
        TICGRPOTrainer(tiny_model(), count_a, GRPOConfig(str(tmp_path), **CPU), TINY_PROMPTS)


def test_active_dropout_is_switched_off_or_refused(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(attention_dropout=0.1))
    layers = [m for m in trainer.model.modules() if hasattr(m, "attention_dropout")]
    assert layers
    assert all(layer.attention_dropout == 0.0 for layer in layers)

    with pytest.raises(ValueError, match=r"Dropout is active.*attention_dropout.*set disable_dropout=True"):
        make_trainer(tmp_path, tiny_model(attention_dropout=0.1), disable_dropout=False)
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"Dropout is active.*lora_dropout=0"):
        make_trainer(tmp_path, peft_config=lora, disable_dropout=False)
    make_trainer(tmp_path, tiny_model(attention_dropout=0.1), disable_dropout=False, algorithm="grpo")


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_settings_in_force_are_shown_once(tmp_path, capsys, disable_tqdm):
    """On the screen of a script that sets up no logging."""
    config = {"algorithm": "tic_grpo_v2", "epsilon_high": 0.03, "epsilon": 0.2, "disable_tqdm": disable_tqdm}
    batches = {"steps_per_generation": 8, "gradient_accumulation_steps": 4, "num_iterations": 2}
    make_trainer(tmp_path, max_steps=1, **config, **batches).train()
    lines = capsys.readouterr().out.splitlines()
    (start,) = [index for index, line in enumerate(lines) if "settings in force" in line]
    assert "algorithm=tic_grpo_v2" in lines[start]
    assert "epsilon_high=0.03" in lines[start]
    assert "loss_type=grpo" in lines[start]
    assert lines[start].endswith("K = 4 updates per rollout")
    assert lines[start + 1] == "epsilon=0.2 has no effect with clip_mode='up_only'."


def test_a_default_without_an_inner_loop_says_how_to_have_one(tmp_path, messages):
    make_trainer(tmp_path, gradient_accumulation_steps=2)
    (warning,) = messages()
    assert "K = 1" in warning
    assert "updates_per_rollout=4 " in warning
    assert "num_iterations=4 " in warning
    for k_is_4 in ({"updates_per_rollout": 4}, {"steps_per_generation": 8}, {"num_iterations": 4}):
        make_trainer(tmp_path, gradient_accumulation_steps=2, **k_is_4)
    make_trainer(tmp_path, algorithm="grpo")  # whose ratio acts on nothing else either, as in TRL
    assert len(messages()) == 1


def test_model_card_has_tags_citation_settings_and_results(tmp_path):
    trainer = make_trainer(tmp_path, steps_per_generation=4, gradient_accumulation_steps=2, seed=7)
    trainer.train()
    trainer.create_model_card(model_name="tiny", dataset_name="dapo_math_17k+aime_1983_2022")
    card = (tmp_path / "README.md").read_text()
    reward = trainer.reward_func_names[0]
    for part in (
        "- tic-grpo",
        "- trl",
        "TIC-GRPO",
        "2508.02833",
        "Lei Pang and Ruinan Jin",
        "| `epsilon_high` | 0.28 |",
        f"| `learning_rate` | {trainer.args.learning_rate} |",
        "| `seed` | 7 |",
        "| `lr_scheduler_type` | linear |",
        "| updates per rollout (K) | 2 |",
        f"| responses per update | {trainer.args.per_device_train_batch_size * 2} |",
        f"| updates | {trainer.state.global_step} |",
        "| processes | 1 |",
        f"| reward functions | {reward} |",
        "| training data | dapo_math_17k+aime_1983_2022 |",
        f"- tic-grpo-trl: {__version__}",
        f'model="{tmp_path.name}"',
    ):
        assert part in card, part
    assert "datasets/dapo_math" not in card  # it is no hub id
    assert str(tmp_path.parent) not in card
    trainer.state.log_history += [{"step": n, f"eval_rewards/{reward}/mean": v} for n, v in ((0, 0.25), (2, 0.75))]
    trainer.create_model_card(dataset_name="org/data")
    card = (tmp_path / "README.md").read_text()
    assert f"| held-out {reward}, before and after | 0.250, 0.750 |" in card
    assert "[org/data](https://huggingface.co/datasets/org/data)" in card
    model = tiny_model()
    model.config._name_or_path = str(tmp_path)  # a model from a local folder
    make_trainer(tmp_path, model).create_model_card()
    assert "None]" not in (tmp_path / "README.md").read_text()


def test_evaluation_logs_its_own_ratios(tmp_path):
    trainer = make_trainer(tmp_path, steps_per_generation=2, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    assert "eval_reward" in metrics
    assert trainer.current_rollout.micro_batches is None  # evaluation does not touch the training rollout
    logged = trainer.state.log_history[-1]
    assert logged["eval_trajectory_ratio/ess"] == pytest.approx(1.0, abs=1e-6)
    assert not any("inner_" in name for name in logged)


def test_passes_of_an_evaluation_are_no_larger_than_those_of_training(tmp_path):
    """So that an engine can be given a whole evaluation set at once."""

    def evaluate(rows):
        trainer = make_trainer(tmp_path, per_device_train_batch_size=rows, per_device_eval_batch_size=16)
        passes = []

        def note(module, args, kwargs):
            if kwargs.get("fused_lm_head"):
                passes.append(kwargs["input_ids"].numel())

        trainer.model.register_forward_pre_hook(note, with_kwargs=True)
        assert trainer.packed_forward.choose_layout()  # makes passes of its own
        passes.clear()
        torch.manual_seed(3)
        metrics = trainer.evaluate() | trainer.state.log_history[-1]
        timed = ("_runtime", "_per_second", "_preparation_time")
        return passes, {name: value for name, value in metrics.items() if not name.endswith(timed)}

    small, expected = evaluate(4)
    large, metrics = evaluate(16)
    assert len(small) > len(large) == 1  # 16 responses, packed, in passes of 4 and of 16 full rows
    assert max(small) < large[0]
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_ratio_metrics_read_nothing_from_the_device_in_the_loss_path(tmp_path, monkeypatch):
    """One gather per optimizer step, and no tensor is turned into a number before the log."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    inputs = batch(trainer.model)
    logp = torch.randn(4, 6, requires_grad=True)
    gathered = []
    monkeypatch.setattr(trainer.accelerator, "gather", lambda rows: gathered.append(rows) or rows)

    def refuse(*args, **kwargs):
        raise AssertionError("read from the device")

    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, refuse)
        for sync in (False, True):
            trainer.accelerator.gradient_state._set_sync_gradients(sync)
            trainer.weighted_loss._weight(logp, dict(inputs), trainer.schedule.at(0), None)
            assert len(gathered) == sync
    assert gathered[0].shape == (8, 10)
