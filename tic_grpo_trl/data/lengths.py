"""Measure prompts in tokens, and drop those that are too long."""

from typing import Any

from datasets import Dataset, IterableDataset

from .examples import log_once


def prompt_lengths(
    dataset: Dataset, processing_class: Any, chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Return the number of tokens of each prompt, as the trainer tokenizes it.

    Conversational prompts go through the chat template with the generation prompt added; plain ones are tokenized as
    they are. `chat_template_kwargs` are those of the trainer's configuration.
    """
    lengths: list[int] = []
    for batch in dataset.select_columns("prompt").iter(batch_size=1000):
        prompts = batch["prompt"]
        if isinstance(prompts[0], str):
            tokenized = processing_class(text=prompts)
        else:
            tokenized = processing_class.apply_chat_template(
                prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
            )
        lengths += map(len, tokenized["input_ids"])
    return lengths


def drop_long_prompts(
    dataset: Any,
    processing_class: Any,
    max_prompt_length: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Any:
    """Drop the examples whose prompt has more than `max_prompt_length` tokens, and log how many.

    The prompts of an `IterableDataset` are measured as they are read.

    Raises:
        ValueError: if `max_prompt_length` is not positive, or no prompt is short enough.
    """
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length is {max_prompt_length}; it must be a positive number of tokens.")
    if isinstance(dataset, IterableDataset):

        def fits(example: dict[str, Any]) -> bool:
            one = Dataset.from_dict({"prompt": [example["prompt"]]})
            return prompt_lengths(one, processing_class, chat_template_kwargs)[0] <= max_prompt_length

        return dataset.filter(fits)
    lengths = prompt_lengths(dataset, processing_class, chat_template_kwargs)
    fitting = [i for i, length in enumerate(lengths) if length <= max_prompt_length]
    if not fitting:
        raise ValueError(
            f"none of the {len(lengths):,} prompts fits into max_prompt_length={max_prompt_length} tokens"
            + (f"; the shortest has {min(lengths):,}. Raise max_prompt_length." if lengths else ".")
        )
    log_once(f"{len(lengths) - len(fitting):,} of {len(lengths):,} prompts dropped: over {max_prompt_length:,} tokens")
    return dataset.select(fitting)
