"""vLLM's sampling parameters for the rest of a response."""

from typing import Any

import numpy as np

from .pool import Group, Response


OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # fields of TRL's configuration


def request_parameters(args: Any, group: Group, response: Response, pool: int = 0) -> dict[str, Any]:
    """Return vLLM's sampling parameters for the rest of a response.

    Args:
        args: a [`TICGRPOConfig`] with options that an interruption leaves unchanged.
        group: to which the response belongs.
        response: with the tokens that are written; they are appended to the prompt.
        pool: number of the pool, where several processes have one each. Groups of different pools share their numbers.

    Returns:
        Arguments of `SamplingParams`, or of a request to vLLM's server. The seed follows from the run's seed and what
        is continued: it is another one for every response and every segment, and the same if a segment is repeated.
    """
    written, longest = len(response.tokens), args.max_completion_length
    index = next(index for index, each in enumerate(group.responses) if each is response)
    options = {name: getattr(args, name) for name in OPTIONS} | (args.generation_kwargs or {})
    seed = args.seed if options.get("seed") is None else options["seed"]
    fresh = np.random.SeedSequence((seed, pool, group.number, index, written)).generate_state(1, np.uint64)
    return options | {
        "top_k": options["top_k"] or 0,
        "min_p": options["min_p"] or 0.0,
        "n": 1,
        "max_tokens": None if longest is None else longest - written,
        "min_tokens": max(0, (options.get("min_tokens") or 0) - written),
        "seed": int(fresh[0] >> 1),  # fits int64
        "logprobs": 0,  # of the sampled token alone
    }
