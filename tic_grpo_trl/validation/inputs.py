"""Checks of model, tokenizer, rewards and data before anything is computed; every error names the input and the fix."""

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


ROWS = 10_000  # of a data set that are looked at together


def check_inputs(
    model: Any,
    reward_funcs: Any,
    args: TICGRPOConfig,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    environment_factory: Any = None,
    **others: Any,
):
    """What can be said before a model is loaded or an engine started.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, environment_factory, **others:
            as given to the trainer.

    Raises:
        ValueError, TypeError: naming what is wrong and what to do.
    """
    check_length(args, None)
    if isinstance(model, nn.Module):
        _check_device(model)
        _check_reference(model, args, others.get("peft_config"))
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if not (function is None or isinstance(function, str) or callable(function)):
            raise TypeError(
                f"reward_funcs holds {function!r}, which is no reward function: pass functions, reward models or names "
                "of such models."
            )
    if processing_class is not None:
        check_tokenizer(processing_class)
    if environment_factory is not None:
        return  # prompts come from the environment
    if isinstance(train_dataset, Dataset | IterableDataset):
        batches = RolloutSchedule.of(args, args.world_size)
        if isinstance(train_dataset, Dataset):
            _check_rows("train_dataset", train_dataset)
            check_prompts(batches, len(train_dataset))
        else:
            check_prompts(batches, _check_first("train_dataset", train_dataset, batches.prompts))
    if args.eval_strategy != "no":
        of_eval = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, dataset in of_eval.items():
            if isinstance(dataset, Dataset):
                _check_rows(name, dataset)
            elif isinstance(dataset, IterableDataset):
                _check_first(name, dataset, 1)


def _check_device(model: nn.Module):
    if is_fsdp_enabled():
        return  # which loads the weights on one process and hands them out
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(
            f"The model has no weights: {len(empty)} of its parameters are on the meta device (first: {empty[0]}). "
            "Load it with from_pretrained, without device_map, or pass its name."
        )


def _check_reference(model: Any, args: TICGRPOConfig, peft_config: Any):
    """TRL loads the reference model from where the policy came from."""
    adapted = peft_config is not None or is_peft_model(model)  # which are their own reference
    if args.beta != 0.0 and not adapted and not get_config_model_id(model.config):
        raise ValueError(
            f"beta={args.beta} needs a reference model, which is loaded from where the model came from, but this one "
            "came from nowhere: save it with save_pretrained and pass the folder's name, or set beta=0.0."
        )


def check_tokenizer(processing_class: Any):
    """A tokenizer, and one that knows how a response ends."""
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return  # which TRL refuses
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer ({type(tokenizer).__name__} {tokenizer.name_or_path!r}) has no EOS token, so no response "
            "would end: set tokenizer.eos_token to the token that ends one."
        )


def _check_column(name: str, columns: list[str] | None):
    if columns is None or "prompt" in columns:  # unknown for some streams
        return
    raise ValueError(
        f"{name} has no column 'prompt', only {', '.join(map(repr, columns)) or 'none'}: rename the one that holds the "
        "prompts, with dataset.rename_column(name, 'prompt')."
    )


def _check_rows(name: str, dataset: Dataset):
    """Every row has a prompt."""
    _check_column(name, dataset.column_names)
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: pass a data set with prompts.")
    for start, table in enumerate(dataset.select_columns("prompt").with_format("arrow").iter(ROWS)):
        prompts = table["prompt"].combine_chunks()
        lacks = pc.is_null(prompts)
        if pa.types.is_list(prompts.type) or pa.types.is_large_list(prompts.type):
            lacks = pc.or_(lacks, pc.equal(pc.fill_null(pc.list_value_length(prompts), 0), 0))
        if (row := pc.index(lacks, True).as_py()) >= 0:
            what = "None" if prompts[row].as_py() is None else "a conversation without messages"
            raise ValueError(
                f"Row {start * ROWS + row} of {name} has {what} as its prompt: drop such rows, with "
                "dataset.filter(lambda row: row['prompt'])."
            )
    check_kinds(name, [row["prompt"] for row in dataset.select_columns("prompt").select(range(min(8, len(dataset))))])


def _check_first(name: str, dataset: IterableDataset, count: int) -> int:
    """How many of the first `count` rows a stream has; they have prompts."""
    _check_column(name, dataset.column_names)
    rows = list(itertools.islice(dataset, count))
    if not rows:
        raise ValueError(f"{name} is empty: its stream ends before the first row.")
    for row in rows:
        _check_column(name, list(row))
    check_kinds(name, [row["prompt"] for row in rows])
    return len(rows)


def check_kinds(name: str, prompts: list):
    """Prompts of one kind: texts, or conversations.

    Args:
        name: where they come from.
        prompts: of a batch.

    Raises:
        ValueError: naming the first that is neither, or of another kind than the others.
    """
    kinds = set()
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            kinds.add("text")
        elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
            kinds.add("conversation")
        else:
            raise ValueError(
                f"Prompt {index} of {name} is {_shortened(prompt)}: a prompt is a text, or a list of messages with "
                "'role' and 'content'."
            )
        if len(kinds) > 1:
            raise ValueError(
                f"Prompt {index} of {name} is a {'text' if isinstance(prompt, str) else 'conversation'}, those before "
                "it are not: make all of them texts, or all of them lists of messages."
            )


@contextmanager
def naming_refused_prompt(tokenize: Callable[[list], Any], prompts: list) -> Iterator[None]:
    """Name the prompt that a tokenizer cannot take, such as a text with half a surrogate pair.

    Args:
        tokenize: what the block does with all prompts at once.
        prompts: of a batch, or none where a prompt alone cannot be tried.

    Raises:
        ValueError: instead of the tokenizer's own error, if one of the prompts alone raises one, too.
    """
    try:
        yield
    except Exception as error:
        for index, prompt in enumerate(prompts):
            try:
                tokenize([prompt])
            except Exception as alone:
                reason = str(alone).splitlines()[0] if str(alone) else type(alone).__name__
                raise ValueError(
                    f"The tokenizer cannot take prompt {index} of a batch, {_shortened(prompt)} ({reason}): correct it "
                    "in the data, or drop it."
                ) from error
        raise


def check_loaded(trainer: Any):
    """What needs the model and the tokenizer that the trainer loaded, before it computes anything.

    Raises:
        ValueError: naming what is wrong and what to do.
    """
    check_tokenizer(trainer._tokenizer)
    tokenizer, size = trainer._tokenizer, vocabulary_size(trainer.model)
    for name in ("pad_token", "eos_token", "bos_token"):
        if (number := getattr(tokenizer, f"{name}_id")) is not None and number >= size:
            raise ValueError(
                f"The tokenizer's {name} {getattr(tokenizer, name)!r} has the id {number}, but the model's embeddings "
                f"end at {size - 1}: set tokenizer.{name} to a token that the model knows, or call "
                f"model.resize_token_embeddings({len(tokenizer)})."
            )
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset) or trainer._is_vlm or trainer.environment_factories or trainer.rollout_func:
        return
    # Each prompt is looked at only where some may be out of range: some models' tokenizers know tokens that the model
    # does not, and never make them.
    if len(tokenizer) > size:
        for batch in dataset.select_columns("prompt").iter(1000):
            trainer._tokenize_prompts(batch["prompt"])
    elif pa.types.is_string(dataset.features.arrow_schema.field("prompt").type):
        for table in dataset.select_columns("prompt").with_format("arrow").iter(ROWS):
            if pc.any(pc.equal(table["prompt"], "")).as_py():
                trainer._tokenize_prompts([""])
                return


def check_ids(trainer: Any, ids: list[list[int]], prompt_of: Callable[[int], Any], what: str = "prompt"):
    """Prompts, or responses to them, that the model can read.

    Args:
        trainer: with the model.
        ids: token ids of a batch, B lists.
        prompt_of: the prompt of a row, to be shown.
        what: `"prompt"` or `"response"`.

    Raises:
        ValueError: if one has no token, an id beyond the model's vocabulary, or does not fit into the model.
    """
    size = vocabulary_size(trainer.model)
    for index, row in enumerate(ids):
        if len(row) == 0:
            hint = "drop it from the data" if what == "prompt" else "it has to hold the EOS token at least"
            raise ValueError(f"A {what} has no tokens: {hint}. Prompt: {_shortened(prompt_of(index))}")
        if not 0 <= min(row) <= max(row) < size:
            number = max(row) if max(row) >= size else min(row)
            raise ValueError(
                f"A {what} has the token {number}, but the model's embeddings end at {size - 1}: tokenizer, engine and "
                "model do not belong together. Use the model's own tokenizer, or model.resize_token_embeddings. "
                f"Prompt: {_shortened(prompt_of(index))}"
            )
    if what == "prompt":
        longest = max(range(len(ids)), key=lambda index: len(ids[index]))
        _check_room(trainer, len(ids[longest]), prompt_of(longest))


def checked_rollout(rollout_func: Callable | None) -> Callable | None:
    """A `rollout_func` whose prompts and responses are checked, as those of the trainer are."""
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
    args = trainer.args
    fix = "drop long prompts (tic_grpo_trl.data.drop_long_prompts), or lower max_completion_length"
    where = f"Prompt: {_shortened(prompt)}"
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
    what = f"{length} tokens of a prompt + max_completion_length={args.max_completion_length} are {longest}"
    # A table of learned positions ends there; OPT's has two more, and one of another size is another modality's
    names = ("wpe", "embed_positions", "position_embeddings")
    tables = (m for n, m in trainer.model.named_modules() if n.rpartition(".")[2] in names)
    if any(isinstance(m, nn.Embedding) and limit <= m.num_embeddings <= limit + 2 for m in tables):
        raise ValueError(f"{what}, but the model has {limit} learned positions: {fix}. {where}")
    if not getattr(trainer, "_warned_of_length", False):
        trainer._warned_of_length = True
        warnings.warn(
            f"{what}, more than the {limit} positions that the model was made for (max_position_embeddings): what it "
            f"generates beyond them may be worthless. If that is not wanted, {fix}. {where}",
            UserWarning,
            stacklevel=2,
        )


def vocabulary_size(model: Any) -> int:
    """Rows of the model's input embeddings, also where DeepSpeed or FSDP has sharded them."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return size or model.config.get_text_config().vocab_size


def _shortened(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 200 else f"{text[:100]} … {text[-100:]}"
