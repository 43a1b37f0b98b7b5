"""What a request for the rest of a response asks for."""

from tic_grpo_trl import TICGRPOConfig
from tic_grpo_trl.carry_over.pool import Group, Response
from tic_grpo_trl.carry_over.sampling_parameters import request_parameters


def config(**settings):
    return TICGRPOConfig("out", report_to="none", use_cpu=True, bf16=False, max_completion_length=10, **settings)


def group(*written, number=0):
    """A group whose responses have so many tokens."""
    return Group(number, None, {}, [1, 2], [Response([7] * count, [-1.0] * count) for count in written])


def parameters(group, index=0, pool=0, **settings):
    return request_parameters(config(**settings), group, group.responses[index], pool)


def test_the_rest_of_a_response():
    kwargs = {"min_tokens": 6, "stop_token_ids": [3], "ignore_eos": True}
    asked = parameters(group(4, 0), repetition_penalty=1.1, temperature=0.7, generation_kwargs=kwargs)
    assert asked == {
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "stop_token_ids": [3],
        "ignore_eos": True,
        "n": 1,
        "max_tokens": 6,
        "min_tokens": 2,
        "logprobs": 0,
    }
    assert parameters(group(8), generation_kwargs=kwargs)["min_tokens"] == 0
    assert parameters(group(8), generation_kwargs={"temperature": 0.5})["temperature"] == 0.5


def test_seeds():
    """Every response and segment has its own, also where responses are equal; a repeated segment has the same."""

    def seed(*args, given=42, **kwargs):
        return parameters(*args, **kwargs, generation_kwargs={"seed": given})["seed"]

    same = group(0, 0, 3, 3)
    seeds = [seed(same, index) for index in range(4)]  # equal responses of a group
    seeds += [seed(group(0, number=1)), seed(group(4)), seed(same, pool=1), seed(same, given=0)]
    assert len(set(seeds)) == len(seeds)
    assert [seed(same, index) for index in range(4)] == seeds[:4]
    assert all(0 <= each < 2**63 for each in seeds)
