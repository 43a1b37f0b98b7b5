"""Every algorithm through the trainer, loss and gradient, against its formula written out in float64.

A formula takes the token log-ratios r_{i,t} of one response (only the tokens that the policy chose) and A_i, and gives
per token the objective's value (`None`: the coefficient times the log-probability) and the coefficient of
∇log π_θ(o_{i,t}) in its gradient. Nothing here comes from objective.py; log-probabilities are those of plain logits.
"""

import functools
import math

import pytest
import torch
from conftest import batch, logps, loss_and_gradients, make_trainer, relative_error, tiny_model

from tic_grpo_trl import ALGORITHMS
from tic_grpo_trl.algorithms import BOUNDS_READ
from tic_grpo_trl.loss.mini_batch_rules import adaptive_cap
from tic_grpo_trl.objective import PRODUCT_LEVELS


T = 8
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 8, 5, 3, 6)
ROLLOUTS = [(0.0, True), (0.05, True), (0.3, True), (0.3, False), (1.0, True), (2.0, True)]  # drift, tool mask
GROUP = 4
HIGH = 1.28  # 1 + ε_high
SIGMA = 0.3  # of the length-scaled cap, where an algorithm without one is given it


def up_only(w, a, cap):  # clip̄(w)·A with ∇ = 1[w ≤ cap]·w·A·∇log π: v2 §4 and Eq. 11 (*), v5 §3
    return min(w, cap) * a, w * a if w <= cap else 0.0


def ppo(w, a, low, high):  # min(w·A, clip(w)·A): v2 Eq. 5
    clipped = min(max(w, low), high)
    return min(w * a, clipped * a), w * a if w * a <= clipped * a else 0.0


def tic_grpo(r, a, high=HIGH):  # v5 Eq. 8; v2 Eq. 9 and Eq. 11 (*)
    w = math.prod(math.exp(x) for x in r)
    return [up_only(w, a, high)] * len(r)


def tic_grpo_released(r, a, high=None):  # the authors' code: log-cap 0.01·√|o| for A > 0, dual clip 3 for A < 0
    w = math.prod(math.exp(x) for x in r)
    return [up_only(w, a, 3.0 if a < 0 else high or math.exp(0.01 * math.sqrt(len(r))))] * len(r)


def tic_grpo_capped(r, a, high=HIGH):  # truncated importance sampling: min(w, cap)·A·∇log π
    w = math.prod(math.exp(x) for x in r)
    return [(min(w, high) * a, min(w, high) * a)] * len(r)


def tic_grpo_truncated(r, a, high=HIGH):  # A > 0 as PPO; A < 0: nothing below 1 − ε_low, weight held at 1 + ε_high
    w = math.prod(math.exp(x) for x in r)
    if a >= 0:
        return [ppo(w, a, 0.8, high)] * len(r)
    return [(min(max(w, 0.8), high) * a, 0.0 if w < 0.8 else min(w, high) * a)] * len(r)


def seq_tis(r, a, high=2.0):  # verl: min(w, C)·A·∇log π, C = 2
    return tic_grpo_capped(r, a, high)


def seq_mis(r, a, high=3.0):  # verl and TRL's sequence_mask: w·A·∇log π where w ≤ C = 3, else nothing
    w = math.prod(math.exp(x) for x in r)
    return [(w * a, w * a) if w <= high else (0.0, 0.0)] * len(r)


def ctpo(r, a, sigma=0.05):  # CTPO: the ratio of the tokens so far, PPO's clip with bounds in √t, dual clip for A < 0
    terms = []
    for t in range(1, len(r) + 1):
        w = math.prod(math.exp(x) for x in r[:t])
        low, high = math.exp(-0.025 * math.sqrt(t)), math.exp(sigma * math.sqrt(t))
        terms.append((high * a, 0.0) if a < 0 and w > high else ppo(w, a, low, high))
    return terms


def vcpo(r, a, high=8.0):  # min(w, 8)·A·∇log π, with the advantages of `minimum_variance`
    return tic_grpo_capped(r, a, high)


def adaptive_cap_of(ratios, advantages):
    """The cap of a mini-batch, from its responses with tokens and A ≠ 0; tests/loss has the rule itself."""
    moving = [(sum(r), a, len(r)) for r, a in zip(ratios, advantages, strict=True) if r and a]
    log_weights, advantages, lengths = torch.tensor(moving).double().T
    mask = torch.arange(T) < lengths.unsqueeze(1)
    return math.exp(adaptive_cap(log_weights.unsqueeze(1), advantages, mask, 20.0))


def minimum_variance(ratios, advantages):
    """VCPO: r_i − Σ k_j·r_j/Σ k_j over the others j of the group, k = w²·‖∇log P‖², here w²·|o|; by groups of four."""
    new = list(advantages)
    for i, r in enumerate(ratios):
        start = i - i % GROUP
        others = [j for j in range(start, start + GROUP) if j != i and ratios[j]]
        k = {j: math.exp(2 * sum(ratios[j])) * len(ratios[j]) for j in others}
        new[i] -= sum(k[j] * advantages[j] for j in others) / sum(k.values()) if r else 0.0
    return new


def grpo(r, a):  # v2 Eq. 5 with DAPO's bounds
    return [ppo(math.exp(x), a, 0.8, HIGH) for x in r]


def grpo2(r, a):  # v5 Eq. 14
    return [up_only(math.exp(x), a, HIGH) for x in r]


def grpo_traj_is(r, a, high=HIGH):  # v5 Table 2: GRPO with the ratio of the trajectory
    w = math.prod(math.exp(x) for x in r)
    return [ppo(w, a, 0.8, high)] * len(r)


def gspo(r, a):  # GSPO Eq. 5–7: s = (P_θ/P_old)^(1/|o|), min(s·A, clip(s)·A), ∇ = s·A·(1/|o|)·Σ_t ∇log π
    s = math.prod(math.exp(x) for x in r) ** (1 / max(len(r), 1))
    return [ppo(s, a, 1 - 3e-4, 1 + 4e-4)] * len(r)


def grpo_no_is(r, a):  # v2 Fig. 1: A·∇log π_θ
    return [(a, a)] * len(r)


def cispo(r, a):  # ScaleRL: min(exp r_t, 5)·A·log π, the weight without gradient
    return [(None, min(math.exp(x), 5.0) * a) for x in r]


def sapo(r, a):  # SAPO Eq. 5: 4/τ·σ(τ(w − 1))·A with a τ for either sign of A
    tau = 1.0 if a > 0 else 1.05
    gates = [1 / (1 + math.exp(-tau * (math.exp(x) - 1))) for x in r]
    return [(4 / tau * g * a, 4 * g * (1 - g) * math.exp(x) * a) for g, x in zip(gates, r, strict=True)]


def luspo(r, a):  # GSPO's weight of the response times its length, §5.1's bounds
    s = math.prod(math.exp(x) for x in r) ** (1 / max(len(r), 1))
    return [ppo(s, a, 1 - 2e-3, 1 + 2.5e-3)] * len(r)


def vespo(r, a):  # φ(w) = e^λ·w^k·e^(−λw) without gradient, w the response's ratio; (k, λ) by the sign of A
    k, lam = (2, 3) if a >= 0 else (3, 2)
    w = math.prod(math.exp(x) for x in r)
    return [(None, math.exp(lam) * w**k * math.exp(-lam * w) * a)] * len(r)


# What a token of a response is divided by: 1/|o_i| and the mean over responses (v2 Eq. 5 and 9), the constant T and the
# mean (v5 Eq. 8 and 14), all tokens of the batch (DAPO), the number of responses (LUSPO).
NORMALISERS = {
    "per response": lambda lengths, i: len(lengths) * max(lengths[i], 1),
    "constant": lambda lengths, i: len(lengths) * T,
    "all tokens": lambda lengths, i: sum(lengths),
    "responses": lambda lengths, i: len(lengths),
}
FORMULAS = {
    "tic_grpo": (tic_grpo, "constant"),
    "tic_grpo_released": (tic_grpo_released, "constant"),
    "tic_grpo_capped": (tic_grpo_capped, "constant"),
    "tic_grpo_truncated": (tic_grpo_truncated, "constant"),
    "tic_grpo_v2": (tic_grpo, "per response"),
    "seq_tis": (seq_tis, "constant"),
    "seq_mis": (seq_mis, "constant"),
    "ctpo": (ctpo, "constant"),
    "vcpo": (vcpo, "constant"),
    "tic_grpo_adaptive": (tic_grpo_capped, "constant"),
    "grpo": (grpo, "all tokens"),
    "dapo": (grpo, "all tokens"),
    "grpo2": (grpo2, "constant"),
    "grpo_ub_clip": (grpo2, "constant"),
    "grpo_traj_is": (grpo_traj_is, "all tokens"),
    "gspo": (gspo, "per response"),
    "grpo_no_is": (grpo_no_is, "all tokens"),
    "cispo": (cispo, "all tokens"),
    "sapo": (sapo, "per response"),
    "luspo": (luspo, "responses"),
    "vespo": (vespo, "all tokens"),
}
TRAJECTORY_ALGORITHMS = [
    name
    for name, algorithm in ALGORITHMS.items()
    if algorithm["importance_sampling_level"] in PRODUCT_LEVELS
    and "length_scaled_cap" in BOUNDS_READ[algorithm["clip_mode"]]
]


@functools.cache
def rollout(drift, tools):
    """Twelve responses of 1 to T tokens with either sign of A and A = 0; `drift` is the spread of r_{i,t}."""
    inputs = batch(tiny_model(), LENGTHS, old_drift=0.0)
    noise = torch.randn(inputs["old_per_token_logps"].shape, generator=torch.Generator().manual_seed(5))
    inputs["old_per_token_logps"] -= drift * noise
    inputs["advantages"] = torch.tensor([1.0, -0.7, 0.0, 0.4, -1.3, 0.9, -0.4, 0.6, -1.1, 0.3, -0.2, 0.8])
    if tools:
        inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
        inputs["tool_mask"][4, 1:3] = 0
        inputs["tool_mask"][8, 5] = 0
        inputs["tool_mask"][10, :] = 0  # a response without a token of its own
    inputs["group"] = torch.arange(len(LENGTHS)) // GROUP
    inputs["num_items_in_batch"] = chosen_tokens(inputs).sum()
    return inputs


def chosen_tokens(inputs):
    return (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()


def log_ratios(logp, inputs):
    """r_{i,t} of the chosen tokens, a list per response, float64."""
    difference = logp.detach().double() - inputs["old_per_token_logps"].double()
    return [row[mask].tolist() for row, mask in zip(difference, chosen_tokens(inputs), strict=True)]


def written_out(algorithm, inputs, **cap):
    """Loss and gradients of the algorithm's formula for these inputs."""
    formula, normaliser = FORMULAS[algorithm]
    model = tiny_model()
    logp = logps(model, inputs)  # (B, T)
    ratios = log_ratios(logp, inputs)
    lengths = [len(r) for r in ratios]
    advantages = inputs["advantages"].double().tolist()
    if "advantage_baseline" in ALGORITHMS[algorithm]:
        advantages = minimum_variance(ratios, advantages)
    loss, surrogate = 0.0, torch.zeros((), dtype=torch.float64)
    for i, r in enumerate(ratios):
        high = {"high": math.exp(cap["sigma"] * math.sqrt(len(r)))} if cap else {}
        if ALGORITHMS[algorithm]["clip_mode"] == "adaptive":
            high = {"high": adaptive_cap_of(ratios, advantages)}
        terms = formula(r, advantages[i], **cap if formula is ctpo else high)
        by = NORMALISERS[normaliser](lengths, i)
        chosen = logp[i][chosen_tokens(inputs)[i]].double()
        values = [c * p if v is None else v for (v, c), p in zip(terms, chosen.tolist(), strict=True)]
        loss -= sum(values) / by
        coefficients = torch.tensor([coefficient for _, coefficient in terms], dtype=torch.float64)
        surrogate = surrogate - (coefficients * chosen).sum() / by
    surrogate.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def trainer_for(tmp_path, **config):
    size = {"per_device_train_batch_size": len(LENGTHS), "max_completion_length": T}
    return make_trainer(tmp_path, tiny_model(), **size | config)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loss_and_gradient_of_every_algorithm(tmp_path, algorithm):
    trainer = trainer_for(tmp_path, algorithm=algorithm)
    for drift, tools in ROLLOUTS:
        inputs = rollout(drift, tools)
        loss, gradients = loss_and_gradients(trainer, inputs)
        expected_loss, expected_gradients = written_out(algorithm, inputs)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5, abs=1e-6), (drift, tools)
        assert relative_error(gradients, expected_gradients) < 1e-5, (drift, tools)


@pytest.mark.parametrize("algorithm", TRAJECTORY_ALGORITHMS)
def test_the_length_scaled_cap_with_every_trajectory_algorithm(tmp_path, algorithm):
    trainer, differs = trainer_for(tmp_path, algorithm=algorithm, length_scaled_cap=SIGMA), []
    for drift, tools in ROLLOUTS:
        inputs = rollout(drift, tools)
        loss, gradients = loss_and_gradients(trainer, inputs)
        expected_loss, expected_gradients = written_out(algorithm, inputs, sigma=SIGMA)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5, abs=1e-6), (drift, tools)
        assert relative_error(gradients, expected_gradients) < 5e-6, (drift, tools)
        differs.append(relative_error(expected_gradients, written_out(algorithm, inputs)[1]))
    assert max(differs) > 1e-2  # it is another rule


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_micro_batches_add_up_to_the_loss_of_the_mini_batch(tmp_path, algorithm):
    """The normaliser is the mini-batch's where gradients are accumulated, tokens of the other micro-batch included."""
    inputs = rollout(0.3, True)
    expected_loss, expected_gradients = written_out(algorithm, inputs)
    trainer = trainer_for(
        tmp_path,
        algorithm=algorithm,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        steps_per_generation=2,
    )
    halves = slice(0, 6), slice(6, 12)
    parts = [{name: value[half] if value.dim() else value for name, value in inputs.items()} for half in halves]
    trainer.current_rollout.start(parts, [0, 0])
    trainer.mini_batch.begin(trainer.schedule.at(0))
    losses = []
    for trainer._step, part in enumerate(parts):
        trainer.accelerator.gradient_state._set_sync_gradients(trainer._step == 1)
        losses.append(loss_and_gradients(trainer, part))
    (first, gradients), (second, more) = losses
    assert (first + second).item() == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert relative_error({name: gradients[name] + more[name] for name in more}, expected_gradients) < 5e-6


def test_these_rollouts_reach_both_sides_of_every_bound_and_lie_on_none():
    """Else a wrong bound would go unseen, or float noise would decide."""
    reached = set()
    for drift, tools in ROLLOUTS:
        inputs = rollout(drift, tools)
        ratios = log_ratios(logps(tiny_model(), inputs), inputs)
        for r, a in zip(ratios, inputs["advantages"].tolist(), strict=True):
            bounds = {"low": math.log(0.8), "high": math.log(HIGH)}
            constant = {"tis": math.log(2.0), "mis": math.log(3.0), "vcpo": math.log(8.0)}
            caps = {"dual": math.log(3.0), "released": 0.01 * math.sqrt(len(r)), "scaled": SIGMA * math.sqrt(len(r))}
            for level, values, of_level in (
                ("token", r, bounds),
                ("trajectory", [sum(r)] if r else [], bounds | caps | constant),
                ("sequence", [sum(r) / len(r)] if r else [], {"low": math.log1p(-3e-4), "high": math.log1p(4e-4)}),
            ):
                assert all(abs(x) < 15 for x in values)  # within the hold of an unbounded weight
                for name, bound in of_level.items():
                    assert all(abs(x - bound) > 5e-6 for x in values)
                    reached |= {(level, name, x > bound, a > 0) for x in values if a}
    names = {(level, name) for level, name, *_ in reached}
    assert len(names) == 2 + 8 + 2
    assert reached == {(*name, above, gain) for name in names for above in (True, False) for gain in (True, False)}


def test_these_rollouts_reach_both_sides_of_the_bounds_of_prefixes():
    """As above, for bounds that grow with the position of a token."""
    reached = set()
    for drift, tools in ROLLOUTS:
        inputs = rollout(drift, tools)
        ratios = log_ratios(logps(tiny_model(), inputs), inputs)
        for r, a in zip(ratios, inputs["advantages"].tolist(), strict=True):
            for t in range(1, len(r) + 1):
                for sigma in (-0.025, 0.05, SIGMA):
                    bound, x = sigma * math.sqrt(t), sum(r[:t])
                    assert abs(x - bound) > 5e-6
                    reached |= {(sigma, x > bound, a > 0)} if a else set()
    assert len(reached) == 3 * 2 * 2
