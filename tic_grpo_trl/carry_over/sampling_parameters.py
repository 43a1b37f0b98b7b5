"""Sampling options: those of one continued response, and which options an interruption leaves unchanged."""

from typing import Any

import numpy as np

from .pool import Group, Response


_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # fields of TRL's configuration

# What means the same for a response that goes on as for one that is written at once
_KEPT_BY_VLLM = (
    "temperature repetition_penalty seed min_tokens stop_token_ids ignore_eos skip_special_tokens detokenize"
)
_KEPT_BY_TRANSFORMERS = (
    "temperature repetition_penalty min_new_tokens eos_token_id pad_token_id bos_token_id use_cache "
    "cache_implementation disable_compile prefill_chunk_size remove_invalid_values"
)

_TRUNCATED = "it gives tokens the probability 0 that the policy may choose, so the ratio to it isn't exact"
_COUNTED = "it counts the tokens that were sampled, and forgets those before an interruption"
_TEXT = "it looks at text, which is lost at an interruption"
_SET_HERE = "carry-over sets it itself"
_REASONS = {
    name: reason
    for reason, names in {
        _TRUNCATED: "top_p top_k min_p top_h typical_p epsilon_cutoff eta_cutoff allowed_token_ids bad_words "
        "bad_words_ids suppress_tokens begin_suppress_tokens no_repeat_ngram_size do_sample",
        _COUNTED: "presence_penalty frequency_penalty thinking_token_budget repetition_detection "
        "exponential_decay_length_penalty",
        _TEXT: "stop stop_strings structured_outputs vllm_structured_outputs_regex",
        _SET_HERE: "n num_return_sequences logprobs prompt_logprobs output_kind max_tokens max_new_tokens max_length "
        "return_dict_in_generate output_scores output_logits",
    }.items()
    for name in names.split()
}
_NEUTRAL = {"top_p": 1, "top_k": -1, "typical_p": 1, "n": 1, "num_beams": 1, "num_return_sequences": 1}


def check_generation_kwargs(args: Any):
    """Refuse sampling options that would not mean the same for a response that is interrupted and goes on.

    Args:
        args: a [`TICGRPOConfig`] with `max_carry_over` above 0.

    Raises:
        ValueError: naming the option, its value, the reason and the fix.
    """
    given = dict(args.generation_kwargs or {})
    options = {name: getattr(args, name) for name in _OPTIONS if name not in given} | given
    if args.use_vllm:
        options["vllm_structured_outputs_regex"] = args.vllm_structured_outputs_regex
    kept = (_KEPT_BY_VLLM if args.use_vllm else _KEPT_BY_TRANSFORMERS).split()
    for name, value in options.items():
        where = f"generation_kwargs={{{name!r}: {value!r}}}" if name in given else f"{name}={value!r}"
        greedy = (name == "temperature" and value == 0) or (name == "do_sample" and value is False)
        if greedy:
            reason = _REASONS["do_sample"]
        elif name in kept or not value or value == _NEUTRAL.get(name) or (name == "do_sample" and value):
            continue
        else:
            reason = _REASONS.get(name, "it is not known to survive an interruption")
        raise ValueError(
            f"{where} cannot be combined with max_carry_over > 0: {reason}. Remove {name}, or set max_carry_over=0."
        )


def request_parameters(args: Any, group: Group, response: Response, pool: int = 0) -> dict[str, Any]:
    """Return vLLM's sampling parameters for the rest of a response.

    Args:
        args: a [`TICGRPOConfig`] that [`check_generation_kwargs`] accepts.
        group: to which the response belongs.
        response: with the tokens that are written; they are appended to the prompt.
        pool: number of the pool, where several processes have one each. Groups of different pools share their numbers.

    Returns:
        Arguments of `SamplingParams`, or of a request to vLLM's server. The seed follows from the run's seed and what
        is continued: it is another one for every response and every segment, and the same if a segment is repeated.
    """
    written, longest = len(response.tokens), args.max_completion_length
    index = next(index for index, each in enumerate(group.responses) if each is response)
    options = {name: getattr(args, name) for name in _OPTIONS} | (args.generation_kwargs or {})
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
