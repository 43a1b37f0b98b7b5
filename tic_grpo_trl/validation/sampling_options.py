"""Refuse sampling options under which the recorded log-probabilities would not be those of what was sampled."""

from typing import Any


OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # fields of TRL's configuration

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


def check_sampling_options(args: Any):
    """Refuse sampling options whose effect the recorded log-probabilities, or an interruption, would miss.

    Args:
        args: a [`TICGRPOConfig`] with `max_carry_over` above 0, or that records what transformers samples. The latter
            may leave out improbable tokens, because the recorded log-probabilities then do so too.

    Raises:
        ValueError: naming the option, its value, the reason and the fix.
    """
    carries = args.max_carry_over > 0
    other, fix = "behaviour_policy='sampler'", "behaviour_policy='trainer'"
    if carries:
        other, fix = "max_carry_over > 0", "max_carry_over=0"
    given = dict(args.generation_kwargs or {})
    options = {name: getattr(args, name) for name in OPTIONS if name not in given} | given
    if args.use_vllm:
        options["vllm_structured_outputs_regex"] = args.vllm_structured_outputs_regex
    kept = (_KEPT_BY_VLLM if args.use_vllm else _KEPT_BY_TRANSFORMERS).split()
    kept += [] if carries else ["top_p", "top_k", "min_p"]
    for name, value in options.items():
        where = f"generation_kwargs={{{name!r}: {value!r}}}" if name in given else f"{name}={value!r}"
        greedy = (name == "temperature" and value == 0) or (name == "do_sample" and value is False)
        if greedy:
            reason = _REASONS["do_sample"]
        elif name in kept or not value or value == _NEUTRAL.get(name) or (name == "do_sample" and value):
            continue
        else:
            reason = _REASONS.get(name, "its effect on what is recorded is not known")
        raise ValueError(f"{where} cannot be combined with {other}: {reason}. Remove {name}, or set {fix}.")
