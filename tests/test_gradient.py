"""The gradient is the policy gradient at the current θ, checked against exact values by enumeration."""

import itertools

import pytest
import torch
from conftest import WORDS, drifted, logps, loss_and_gradients, make_trainer, relative_error, tiny_model


HORIZON = 3
DRIFTS = (0.0, 0.05, 0.3, 1.0)
EOS = 0


def every_trajectory() -> list[tuple[int, ...]]:
    """All trajectories of at most HORIZON tokens that stop at the first end token."""
    found = []
    for length in range(1, HORIZON + 1):
        for tokens in itertools.product(range(len(WORDS)), repeat=length):
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == HORIZON):
                found.append(tokens)
    return found


@pytest.fixture(scope="module")
def enumeration():
    trajectories = every_trajectory()
    assert len(trajectories) == 1 + 5 + 25 * 6
    size = len(trajectories)
    completion_ids = torch.zeros(size, HORIZON, dtype=torch.long)
    completion_mask = torch.zeros_like(completion_ids)
    for row, tokens in enumerate(trajectories):
        completion_ids[row, : len(tokens)] = torch.tensor(tokens)
        completion_mask[row, : len(tokens)] = 1
    return {
        "prompt_ids": torch.tensor([[2, 3]]).expand(size, 2).contiguous(),
        "prompt_mask": torch.ones(size, 2, dtype=torch.long),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "num_items_in_batch": completion_mask.sum(),
    }


def exact(model, inputs, rewards):
    """P_θ of every trajectory and ∇J(θ), in float64 from the plain logits."""
    model = drifted(model, 0.0).double()
    log_p = (logps(model, inputs) * inputs["completion_mask"]).sum(-1)
    (log_p.exp() * rewards).sum().backward()
    return log_p.detach().exp(), {name: p.grad for name, p in model.named_parameters()}


def rewards_of(enumeration):
    return torch.rand(len(enumeration["prompt_ids"]), generator=torch.Generator().manual_seed(5)).double()


def trainer_error(tmp_path, enumeration, drift, baseline=0.3, gradient=None, **config) -> float:
    """Relative error of −T·(gradient of the trainer's own loss) against ∇J(θ), or against another `gradient`."""
    old_model = tiny_model()
    model = drifted(old_model, drift)
    rewards = rewards_of(enumeration)
    old_p, _ = exact(old_model, enumeration, rewards)
    p, policy_gradient = exact(model, enumeration, rewards)
    assert abs(old_p.sum() - 1) < 1e-6
    assert abs(p.sum() - 1) < 1e-6

    # dr_grpo averages over the B rows and divides by T; weighting row i by B·P_old(i) makes it the exact expectation.
    inputs = enumeration | {
        "advantages": (len(rewards) * old_p * (rewards - baseline)).float(),
        "old_per_token_logps": logps(old_model, enumeration).detach(),
    }
    trainer = make_trainer(
        tmp_path, model, loss_type="dr_grpo", max_completion_length=HORIZON, epsilon_high=1e6, **config
    )
    _, gradients = loss_and_gradients(trainer, inputs)
    return relative_error({name: -HORIZON * g for name, g in gradients.items()}, gradient or policy_gradient)


@pytest.mark.parametrize("drift", DRIFTS)
def test_loss_gradient_is_the_policy_gradient_at_the_current_policy(tmp_path, enumeration, drift, record_property):
    error = trainer_error(tmp_path, enumeration, drift)
    record_property("relative_error", error)
    print(f"trajectory, drift {drift}: relative error {error:.1e}")
    assert error <= 1e-4


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("drift", DRIFTS[1:])
def test_token_and_sequence_levels_are_not(tmp_path, enumeration, drift, level):
    error = trainer_error(tmp_path, enumeration, drift, importance_sampling_level=level)
    print(f"{level}, drift {drift}: relative error {error:.1e}")
    assert error > 1e-2


@pytest.mark.parametrize("drift", DRIFTS[1:])
def test_prefixes_weigh_the_state_of_a_token_and_not_what_follows_it(tmp_path, enumeration, drift):
    """Level "prefix" is unbiased for Σ E_θ[Q_old(s, o)·∇log π_θ(o|s)]: states and tokens of θ, values of π_old."""
    old_model = tiny_model()
    model, rewards = drifted(old_model, drift), rewards_of(enumeration)
    old_p, _ = exact(old_model, enumeration, rewards)
    p, _ = exact(model, enumeration, rewards)
    reference = drifted(model, 0.0).double()
    log_p, trajectories = logps(reference, enumeration), every_trajectory()
    surrogate = torch.zeros((), dtype=torch.float64)
    for prefix in {tokens[:length] for tokens in trajectories for length in range(1, len(tokens) + 1)}:
        passing = torch.tensor([tokens[: len(prefix)] == prefix for tokens in trajectories])
        value = (old_p * (rewards - 0.3))[passing].sum() / old_p[passing].sum()
        surrogate = surrogate + p[passing].sum() * value * log_p[passing.nonzero()[0, 0], len(prefix) - 1]
    surrogate.backward()
    gradient = {name: parameter.grad for name, parameter in reference.named_parameters()}
    settings = {"importance_sampling_level": "prefix", "clip_mode": "capped"}
    assert trainer_error(tmp_path, enumeration, drift, gradient=gradient, **settings) <= 1e-4
    assert trainer_error(tmp_path, enumeration, drift, **settings) > 1e-2  # which is not the policy gradient


def test_without_importance_sampling_it_is_the_score_of_the_rows_as_they_come(tmp_path, enumeration):
    """`grpo_no_is`: −Σ A·∇log P_θ / (B·T), from the test's own log-probabilities."""
    model = drifted(tiny_model(), 0.3)
    generator = torch.Generator().manual_seed(5)
    advantages = torch.randn(len(enumeration["prompt_ids"]), generator=generator)
    reference = drifted(model, 0.0).double()
    log_p = (logps(reference, enumeration) * enumeration["completion_mask"]).sum(-1)
    (-(log_p * advantages).mean() / HORIZON).backward()
    inputs = enumeration | {
        "advantages": advantages,
        "old_per_token_logps": logps(tiny_model(), enumeration).detach(),
    }
    trainer = make_trainer(tmp_path, model, algorithm="grpo_no_is", loss_type="dr_grpo", max_completion_length=HORIZON)
    _, gradients = loss_and_gradients(trainer, inputs)
    assert relative_error(gradients, {name: p.grad for name, p in reference.named_parameters()}) <= 1e-4
