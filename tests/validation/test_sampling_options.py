"""Which sampling options the recorded log-probabilities, or an interruption, would miss."""

import pytest
from conftest import make_trainer

from tic_grpo_trl import TICGRPOConfig


def config(**settings):
    return TICGRPOConfig("out", report_to="none", use_cpu=True, bf16=False, max_completion_length=10, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"generation_kwargs": {"min_new_tokens": 4, "repetition_penalty": 1.2, "cache_implementation": "dynamic"}},
        {"generation_kwargs": {"do_sample": True, "num_beams": 1, "top_p": 1.0, "stop_strings": None}},
        {"use_vllm": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.2},
        {"use_vllm": True, "generation_kwargs": {"seed": 1, "min_tokens": 2, "stop_token_ids": [3], "n": 1}},
        {"use_vllm": True, "generation_kwargs": {"temperature": 0.8, "ignore_eos": True, "presence_penalty": 0.0}},
    ],
)
def test_what_survives_an_interruption(settings):
    config(max_carry_over=1, **settings)


@pytest.mark.parametrize(
    ("value", "settings"),
    [
        ("top_p=0.9", {"top_p": 0.9}),
        ("top_k=50", {"use_vllm": True, "top_k": 50}),
        ("min_p=0.1", {"min_p": 0.1}),
        ("temperature=0.0", {"temperature": 0.0}),
        ("vllm_structured_outputs_regex='a+'", {"use_vllm": True, "vllm_structured_outputs_regex": "a+"}),
        ("{'stop_strings': ['.']}", {"generation_kwargs": {"stop_strings": ["."]}}),
        ("{'do_sample': False}", {"generation_kwargs": {"do_sample": False}}),
        ("{'num_beams': 4}", {"generation_kwargs": {"num_beams": 4}}),
        ("{'max_new_tokens': 4}", {"generation_kwargs": {"max_new_tokens": 4}}),
        ("{'min_tokens': 4}", {"generation_kwargs": {"min_tokens": 4}}),  # vLLM's
        ("{'stop': ['.']}", {"use_vllm": True, "generation_kwargs": {"stop": ["."]}}),
        ("{'frequency_penalty': 0.5}", {"use_vllm": True, "generation_kwargs": {"frequency_penalty": 0.5}}),
        ("{'top_p': 0.5}", {"use_vllm": True, "generation_kwargs": {"top_p": 0.5}}),
        ("{'n': 2}", {"use_vllm": True, "generation_kwargs": {"n": 2}}),
        ("{'logit_bias': {5: 2.0}}", {"use_vllm": True, "generation_kwargs": {"logit_bias": {5: 2.0}}}),
        ("{'min_new_tokens': 4}", {"use_vllm": True, "generation_kwargs": {"min_new_tokens": 4}}),  # transformers'
    ],
)
def test_what_does_not_is_refused(value, settings):
    with pytest.raises(ValueError, match="max_carry_over=0") as caught:
        config(max_carry_over=1, **settings)
    message = str(caught.value)
    assert value in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "options", [{"typical_p": 0.9}, {"num_beams": 2}, {"num_return_sequences": 2}, {"do_sample": False}]
)
def test_what_the_recorder_would_miss_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"cannot be combined with behaviour_policy='sampler'.*'trainer'") as caught:
        make_trainer(tmp_path, behaviour_policy="sampler", generation_kwargs=options)
    assert f"generation_kwargs={options}" in str(caught.value)
    make_trainer(tmp_path, behaviour_policy="trainer", generation_kwargs=options)


def test_the_recorder_cuts_the_distribution_itself(tmp_path):
    make_trainer(tmp_path, behaviour_policy="sampler", top_p=0.9, top_k=3, generation_kwargs={"min_p": 0.1})
