"""vLLM's sampling parameters for the rest of a response."""

from typing import Any

import numpy as np

from ..validation.sampling_options import OPTIONS
from .pool import Group, Response


def request_parameters(args: Any, group: Group, response: Response, pool: int = 0) -> dict[str, Any]:
    """Return vLLM's sampling parameters for the rest of a response.

    Args:
        args: a [`TICGRPOConfig`] with options that an interruption leaves unchanged.
        group: to which the response belongs.
        response: with the tokens that are written; they are appended to the prompt.
        pool: number of the pool, where several processes have one each. Groups of different pools share their numbers.

    Returns:
        Arguments of `SamplingParams`, or of a request to vLLM's server. A seed in `generation_kwargs` gives every
        response and every segment a seed of its own, the same if a segment is repeated. Without it the engine's random
        numbers go on; vLLM draws those of requests with a seed one by one.
    """
    written, longest = len(response.tokens), args.max_completion_length
    options = {name: getattr(args, name) for name in OPTIONS} | (args.generation_kwargs or {})
    if options.get("seed") is not None:
        index = next(index for index, each in enumerate(group.responses) if each is response)
        fresh = np.random.SeedSequence((options["seed"], pool, group.number, index, written))
        options["seed"] = int(fresh.generate_state(1, np.uint64)[0] >> 1)  # fits int64
    return options | {
        "top_k": options["top_k"] or 0,
        "min_p": options["min_p"] or 0.0,
        "n": 1,
        "max_tokens": None if longest is None else longest - written,
        "min_tokens": max(0, (options.get("min_tokens") or 0) - written),
        "logprobs": 0,  # of the sampled token alone
    }
