"""Check the model, tokenizer, rewards and data before anything is computed. Every error names the input and the fix."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.modeling_utils import is_fsdp_enabled
from trl.trainer.utils import get_config_model_id

from ..config import TICGRPOConfig
from ..rollout.schedule import RolloutSchedule
from .batch_sizes import check_length, check_prompts
from .mini_batch import check_images


EXAMPLES = 10_000  # of a data set, checked at once


def check_inputs(model: Any, reward_funcs: Any, args: TICGRPOConfig, train_dataset: Any = None, **others: Any):
    """Check the trainer's arguments for what can be known before a model is loaded or vLLM started."""
    check_length(args, None)
    _check_tokenizer(others.get("processing_class"))
    if isinstance(model, nn.Module):
        _check_model(model, args, others.get("peft_config"))
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if not (function is None or isinstance(function, str) or callable(function)):
            raise TypeError(
                f"reward_funcs contains {function!r}, which is not a reward function: pass functions, reward models or "
                "names of reward models."
            )
    if others.get("environment_factory") is not None:
        return  # the prompts come from the environment
    if isinstance(train_dataset, Dataset | IterableDataset):
        batches = RolloutSchedule.of(args, args.world_size)
        check_prompts(args, batches, _check_examples("train_dataset", train_dataset, batches.prompts))
    if args.eval_on_start and others.get("eval_dataset") is None:
        raise ValueError(
            "eval_on_start=True needs data to evaluate on: set eval_strategy='steps' and give an eval_dataset, or set "
            "eval_on_start=False."
        )
    evaluated = others.get("eval_dataset") if args.eval_strategy != "no" else None
    for name, dataset in (evaluated if isinstance(evaluated, dict) else {"eval_dataset": evaluated}).items():
        if isinstance(dataset, Dataset | IterableDataset):
            _check_examples(name, dataset, 1)


def _check_model(model: Any, args: TICGRPOConfig, peft_config: Any):
    """Refuse a model without weights, and one for which TRL cannot load the reference model."""
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty and not is_fsdp_enabled():  # FSDP loads the weights on one process and distributes them
        raise ValueError(
            f"The model has no weights: {len(empty)} of its parameters are on the meta device (first: {empty[0]}). "
            "Load it with from_pretrained, without device_map, or pass its name."
        )
    adapted = peft_config is not None or is_peft_model(model)  # the reference is then the model without its adapter
    if args.beta != 0.0 and not adapted and not get_config_model_id(model.config):
        raise ValueError(
            f"beta={args.beta} needs a reference model, which TRL loads from the model's folder or hub id, but this "
            "model has neither: save it with save_pretrained and pass the folder's name, or set beta=0.0."
        )


def _check_tokenizer(processing_class: Any):
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer ({type(tokenizer).__name__} {tokenizer.name_or_path!r}) has no EOS token, so no response "
            "would end: set tokenizer.eos_token to the token that ends one."
        )


def _check_examples(name: str, dataset: Dataset | IterableDataset, count: int) -> int:
    """Check the prompts of a data set, or the first `count` of a stream, and return how many there are."""
    if isinstance(dataset, Dataset):
        size, columns = len(dataset), [dataset.column_names]
    else:
        examples = list(itertools.islice(dataset, count))
        size, columns = len(examples), [list(example) for example in examples]
    if not size:
        raise ValueError(f"{name} is empty: pass a data set with prompts.")
    for names in columns:
        if "prompt" not in names:
            raise ValueError(
                f"{name} has no column 'prompt', only {', '.join(map(repr, names)) or 'none'}: rename the column with "
                "the prompts, with dataset.rename_column(name, 'prompt')."
            )
    if isinstance(dataset, Dataset):
        _check_missing(name, dataset)
        examples = list(dataset.select_columns("prompt").select(range(min(8, size))))
    check_kinds(name, [example["prompt"] for example in examples])
    return size


def _check_missing(name: str, dataset: Dataset):
    """Refuse examples whose prompt is `None` or a conversation without messages."""
    for start, table in enumerate(dataset.select_columns("prompt").with_format("arrow").iter(EXAMPLES)):
        prompts = table["prompt"].combine_chunks()
        present = prompts.is_valid()
        if pa.types.is_list(prompts.type) or pa.types.is_large_list(prompts.type):
            present = pc.greater(pc.list_value_length(prompts), 0).fill_null(False)
        if (index := pc.index(present, False).as_py()) >= 0:
            what = "a conversation without messages" if prompts[index].is_valid else "None"
            raise ValueError(
                f"The prompt of example {start * EXAMPLES + index} of {name} is {what}: drop such examples, with "
                "dataset.filter(lambda example: example['prompt'])."
            )


def check_kinds(name: str, prompts: list):
    """Check that the prompts of a data set or batch are either all strings or all conversations."""
    for index, prompt in enumerate(prompts):
        is_messages = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
        if not isinstance(prompt, str) and not (prompt and is_messages):
            raise ValueError(
                f"Prompt {index} of {name} is {_shortened(prompt)}: a prompt must be a string, or a list of messages "
                "with 'role' and 'content'."
            )
        if isinstance(prompt, str) != isinstance(prompts[0], str):
            kind = "string" if isinstance(prompt, str) else "conversation"
            raise ValueError(
                f"Prompt {index} of {name} is a {kind}, unlike those before it: use only strings or only conversations."
            )


@contextmanager
def naming_refused_prompt(tokenize: Callable[[list], Any], prompts: list) -> Iterator[None]:
    """Name the prompt in a tokenizer's error by tokenizing `prompts` one by one; give none if that is impossible."""
    try:
        yield
    except Exception as error:
        for index, prompt in enumerate(prompts):
            try:
                tokenize([prompt])
            except Exception as alone:
                reason = str(alone).splitlines()[0] if str(alone) else type(alone).__name__
                raise ValueError(
                    f"The tokenizer cannot encode prompt {index} of a batch, {_shortened(prompt)} ({reason}): correct "
                    "it in the data, or drop it."
                ) from error
        raise


def check_loaded(trainer: Any):
    """Check what needs the loaded model and tokenizer, before the trainer computes anything."""
    _check_tokenizer(trainer._tokenizer)
    check_images(trainer)
    tokenizer, size = trainer._tokenizer, _vocabulary_size(trainer.model)
    for name in ("pad_token", "eos_token", "bos_token"):
        if (number := getattr(tokenizer, f"{name}_id")) is not None and number >= size:
            raise ValueError(
                f"The tokenizer's {name} {getattr(tokenizer, name)!r} has the id {number}, but the model's embeddings "
                f"end at {size - 1}: set tokenizer.{name} to a token that the model has, or call "
                f"model.resize_token_embeddings({len(tokenizer)})."
            )
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset) or trainer._is_vlm or trainer.environment_factories or trainer.rollout_func:
        return
    prompts = dataset.select_columns("prompt")
    # Some tokenizers have more tokens than their model but never produce them, so only the prompts can tell.
    if len(tokenizer) > size:
        for batch in prompts.iter(1000):
            trainer._tokenize_prompts(batch["prompt"])
    elif pa.types.is_string(prompts.features.arrow_schema.field("prompt").type):
        tables = prompts.with_format("arrow").iter(EXAMPLES)
        if any(pc.any(pc.equal(table["prompt"], "")).as_py() for table in tables):
            trainer._tokenize_prompts([""])


def check_ids(
    trainer: Any,
    ids: list[list[int]],  # of a batch, B lists
    prompt_of: Callable[[int], Any],  # returns the prompt of an index, for the error
    what: str = "prompt",  # or "response"
):
    """Refuse token ids that are none, beyond the model's vocabulary, or too many for the model."""
    size = _vocabulary_size(trainer.model)
    for index, tokens in enumerate(ids):
        if len(tokens) == 0:
            hint = "drop it from the data" if what == "prompt" else "it must contain at least the EOS token"
            raise ValueError(f"A {what} has no tokens: {hint}. Prompt: {_shortened(prompt_of(index))}")
        if min(tokens) < 0 or max(tokens) >= size:
            bad = next(token for token in tokens if not 0 <= token < size)
            raise ValueError(
                f"A {what} has the token {bad}, but the model's embeddings end at {size - 1}: the tokenizer or vLLM "
                "does not match the model. Use the model's own tokenizer, or model.resize_token_embeddings. Prompt: "
                f"{_shortened(prompt_of(index))}"
            )
    if what == "prompt":
        longest = max(range(len(ids)), key=lambda index: len(ids[index]))
        _check_room(trainer, len(ids[longest]), prompt_of(longest))


def checked_rollout(rollout_func: Callable | None) -> Callable | None:
    """Check the token ids that a `rollout_func` returns."""
    if rollout_func is None:
        return None

    def checked(prompts: list, trainer: Any) -> dict[str, Any]:
        output = rollout_func(prompts, trainer)
        for name, what in (("prompt_ids", "prompt"), ("completion_ids", "response")):
            if name in output:
                check_ids(trainer, output[name], lambda index: prompts[index % len(prompts)], what)
        return output

    return checked


def _check_room(trainer: Any, length: int, prompt: Any):
    args, where = trainer.args, f"Prompt: {_shortened(prompt)}"
    fix = "drop long prompts (tic_grpo_trl.data.drop_long_prompts), or lower max_completion_length"
    room = args.vllm_max_model_length if args.use_vllm and args.vllm_mode == "colocate" else None
    if room is not None and length >= room:
        raise ValueError(
            f"A prompt has {length} tokens, which leaves no room for a response in vllm_max_model_length={room}: raise "
            f"it, or {fix}. {where}"
        )
    limit = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    longest = length + (args.max_completion_length or 0)
    if limit is None or longest <= limit:
        return
    what = f"A prompt of {length} tokens + max_completion_length={args.max_completion_length} make {longest}"
    # Learned positions end there. OPT's table has two more; a table of another size belongs to another modality.
    names = ("wpe", "embed_positions", "position_embeddings")
    tables = (m for n, m in trainer.model.named_modules() if n.rpartition(".")[2] in names)
    if any(isinstance(m, nn.Embedding) and limit <= m.num_embeddings <= limit + 2 for m in tables):
        raise ValueError(f"{what}, but the model has {limit} learned positions: {fix}. {where}")
    if not getattr(trainer, "_warned_of_length", False):
        trainer._warned_of_length = True
        warnings.warn(
            f"{what}, more than the {limit} positions that the model was trained for (max_position_embeddings), so "
            f"the text beyond them may be poor. To avoid this, {fix}. {where}",
            stacklevel=2,
        )


def _vocabulary_size(model: Any) -> int:
    """Return the number of the model's input embeddings, also if DeepSpeed or FSDP has sharded them."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return size or model.config.get_text_config().vocab_size


def _shortened(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 200 else f"{text[:100]} … {text[-100:]}"
