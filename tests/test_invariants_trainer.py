"""The trainer's own loss, every algorithm with every `loss_type`, on inputs that hypothesis searches."""

import pytest
import torch
from conftest import WORDS, logps, loss_and_gradients, make_trainer, tiny_model
from hypothesis import assume, given
from hypothesis import strategies as st
from searching import ALGORITHM_RULES, NORMALISERS, Batch, T, lies_on_a_bound, searched, tensors, written_out

from tic_grpo_trl.algorithms import FAMILY


PROMPT = 3
UNLIKE = [name for name in FAMILY if name != "grpo_ub_clip"]  # which is grpo2


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory):
    trainers = {}

    def trainer_of(algorithm: str):
        if algorithm not in trainers:
            folder = tmp_path_factory.mktemp("trainer")
            trainers[algorithm] = make_trainer(folder, tiny_model(), algorithm=algorithm, max_completion_length=T)
        return trainers[algorithm]

    return trainer_of


@st.composite
def micro_batches(draw) -> dict:
    """Inputs of the loss with old log-probabilities up to 1 from the model's at each token."""
    size, width = draw(st.integers(1, 4)), draw(st.integers(2, T))

    def mask(longest: int, shortest: int) -> torch.Tensor:
        lengths = draw(tensors((size,), st.integers(shortest, longest), int))
        return (torch.arange(1, longest + 1) <= lengths.unsqueeze(1)).long()

    inputs = {
        "prompt_ids": draw(tensors((size, PROMPT), st.integers(1, len(WORDS) - 1), int)),
        "prompt_mask": mask(PROMPT, 1).flip(1),
        "completion_ids": draw(tensors((size, width), st.integers(0, len(WORDS) - 1), int)),
        "completion_mask": mask(width, 0),
        "tool_mask": draw(tensors((size, width), st.integers(0, 3), int)).clamp(max=1),
        "advantages": draw(tensors((size,), st.floats(-2, 2, width=32))).float(),
    }
    inputs["num_items_in_batch"] = (inputs["completion_mask"] * inputs["tool_mask"]).sum()
    drift = draw(tensors((size, width), st.floats(-1, 1, width=32))).float()
    return inputs | {"old_per_token_logps": logps(tiny_model(), inputs).detach() - drift}


def same(actual: dict, expected: dict, scale: float = 1.0) -> bool:
    """Gradients, or losses, equal but for the float32 noise of a forward pass of another shape."""
    pairs = [(actual[name].double(), scale * expected[name].double()) for name in expected]
    difference = sum((a - b).square().sum() for a, b in pairs) ** 0.5
    return bool(difference <= 1e-5 * sum(b.square().sum() for _, b in pairs) ** 0.5 + 1e-6 * scale)


@pytest.mark.parametrize("algorithm", UNLIKE)
def test_the_trainers_loss_and_gradient_are_the_formulas(trainer_of, algorithm):
    trainer, (level, clip) = trainer_of(algorithm), (ALGORITHM_RULES[algorithm].level, ALGORITHM_RULES[algorithm].clip)

    @searched(2)
    @given(micro_batches(), st.sampled_from([0.0, 1e4, -1e4]), st.data())
    def search(inputs, far, data):
        if trainer.args.is_anchored:  # where TRL computes the weight itself, its own limits hold
            place = data.draw(st.integers(0, len(inputs["advantages"]) - 1))
            inputs["old_per_token_logps"][place, 0] -= far
        model = tiny_model()
        logp = logps(model, inputs)
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        exact = Batch(*(x.double() for x in (logp.detach(), inputs["old_per_token_logps"])), inputs["advantages"], mask)
        assume(not lies_on_a_bound(exact, level, clip, 1e-4))
        value, coefficient = written_out(exact, level, clip)
        lengths = mask.sum(-1).double()
        for loss_type, by in NORMALISERS.items():
            trainer.loss_type = loss_type
            loss, gradients = loss_and_gradients(trainer, inputs)
            by = by(lengths, len(lengths), int(lengths.sum())).unsqueeze(1)
            assert same({"loss": loss}, {"loss": -(value / by).sum()}), loss_type
            model.zero_grad()
            (-(coefficient / by) * logp).sum().backward(retain_graph=True)
            assert same(gradients, {name: p.grad for name, p in model.named_parameters()}), loss_type

    search()


@pytest.mark.parametrize("algorithm", UNLIKE)
def test_what_must_not_change_the_trainers_loss_does_not(trainer_of, algorithm):
    """Order, columns of padding with anything behind them, advantages per token; a factor of these scales it."""
    trainer = trainer_of(algorithm)
    trainer.loss_type = ALGORITHM_RULES[algorithm].loss_type

    @searched(2)
    @given(micro_batches(), st.randoms(use_true_random=False), st.sampled_from([0.25, 4.0]))
    def search(inputs, random, factor):
        loss, gradients = loss_and_gradients(trainer, inputs)

        def check(other: dict, scale: float = 1.0):
            other_loss, other_gradients = loss_and_gradients(trainer, inputs | other)
            assert same({"loss": other_loss}, {"loss": loss}, scale)
            assert same(other_gradients, gradients, scale)

        order = random.sample(range(len(inputs["advantages"])), len(inputs["advantages"]))
        check({name: value[order] if value.dim() else value for name, value in inputs.items()})
        garbage = torch.nan if trainer.args.is_anchored else 5.0
        filling = {"prompt_ids": 1, "completion_ids": 2, "tool_mask": 1, "old_per_token_logps": garbage}
        check(
            {
                name: torch.nn.functional.pad(
                    inputs[name], (2, 0) if "prompt" in name else (0, 2), value=filling.get(name, 0)
                )
                for name in [*filling, "prompt_mask", "completion_mask"]
            }
        )
        check({"advantages": inputs["advantages"] * factor}, factor)
        if ALGORITHM_RULES[algorithm].level != "sequence" or trainer.args.is_anchored:
            per_token = inputs["advantages"].unsqueeze(1).expand_as(inputs["completion_mask"])
            check({"advantages": per_token.contiguous()})

    search()


@pytest.mark.parametrize("algorithm", UNLIKE)
def test_identical_policies_have_the_ratio_1_exactly(trainer_of, algorithm):
    trainer = trainer_of(algorithm)
    trainer.loss_type = ALGORITHM_RULES[algorithm].loss_type

    @searched(2)
    @given(micro_batches())
    def search(inputs):
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        _, gradients = loss_and_gradients(trainer, inputs | {"old_per_token_logps": None})
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with torch.no_grad():
            old, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.size(1))
        trainer.ratios._closed["train"].clear()
        _, scored = loss_and_gradients(trainer, inputs | {"old_per_token_logps": old})
        ((_, rows),) = trainer.ratios._closed["train"]
        assert not rows[:, 1].any()  # R
        assert all(torch.equal(scored[name], gradients[name]) for name in gradients)

    search()
