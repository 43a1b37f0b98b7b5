"""Shared pieces: everything offline, on CPU, with real (tiny) models."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import copy
import gc
import itertools
import logging

import datasets
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer


torch.set_num_threads(1)

WORDS = ["<eos>", "a", "b", "c", "d", "e"]


@pytest.fixture(scope="session", autouse=True)
def temporary_files_of_children(tmp_path_factory):
    """Processes that end without cleaning up, such as workers with wandb's folders, leave nothing outside pytest's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("children")))
        yield


@pytest.fixture(scope="module")
def cheap_garbage_collection():
    """`train()` collects garbage, which otherwise walks through all modules that are imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )


def tiny_model(seed: int = 0, **overrides) -> Qwen3ForCausalLM:
    """A Qwen3 over six tokens whose policy is far from uniform."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        **{
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        | overrides
    )
    return Qwen3ForCausalLM(config)


def tiny_moe_model() -> Qwen3MoeForCausalLM:
    """A mixture of four experts over the same tokens."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def tiny_vision_model() -> Qwen2VLForConditionalGeneration:
    """A model that reads images: token 8 stands for a piece of one, between 10 and 11."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 12,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=8,
        video_token_id=9,
        vision_start_token_id=10,
        vision_end_token_id=11,
    )
    return Qwen2VLForConditionalGeneration(config)


def drifted(model, drift: float, seed: int = 1):
    """A copy whose weight matrices moved by noise of `drift` times their own root mean square."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += drift * parameter.square().mean().sqrt() * noise.to(parameter)
    return moved


def count_a(completions, **kwargs):
    """Reward: share of the words "a" in the completion."""
    return [text.split().count("a") / 4 for text in completions]


# 32 prompts, all different, of two and three words
TINY_PROMPTS = Dataset.from_dict(
    {"prompt": [" ".join(p) for n in (2, 3) for p in itertools.product(WORDS[1:], repeat=n)][:32]}
)

# The update phase as TRL has it, for comparisons bit by bit
TRL_UPDATE_PHASE = {"padding_free": False, "skip_zero_advantage": False, "skip_on_policy_logps": False}

CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}


def make_trainer(tmp_path, model=None, trl: bool = False, callbacks=None, **config):
    """A trainer on the tiny model; `trl=True` builds TRL's own GRPOTrainer instead."""
    trainer_class, config_class = (GRPOTrainer, GRPOConfig) if trl else (TICGRPOTrainer, TICGRPOConfig)
    peft_config = config.pop("peft_config", None)
    args = config_class(
        output_dir=str(tmp_path),
        **CPU
        | {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "disable_tqdm": True,
            "save_strategy": "no",
            "learning_rate": 0.1,
            "logging_steps": 1,
            "max_steps": 4,
        }
        | ({} if trl else {"log_all_ratio_metrics": True})
        | config,
    )
    return trainer_class(
        model=tiny_model() if model is None else model,
        reward_funcs=count_a,
        args=args,
        train_dataset=TINY_PROMPTS,
        eval_dataset=TINY_PROMPTS.select(range(4)),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def batch(model, lengths=(5, 2, 6, 1), seed: int = 3, old_drift: float = 0.3, **extra):
    """Loss inputs as the parent builds them: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(seed)
    size, prompt_length, width = len(lengths), 3, max(lengths)
    prompt_ids = torch.randint(1, len(WORDS), (size, prompt_length), generator=generator)
    prompt_mask = torch.ones_like(prompt_ids)
    prompt_mask[0, 0] = 0
    completion_ids = torch.randint(1, len(WORDS), (size, width), generator=generator)
    completion_mask = torch.zeros_like(completion_ids)
    for row, length in enumerate(lengths):
        completion_mask[row, :length] = 1
        completion_ids[row, length - 1 :] = 0
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.0, -0.7, 0.0, 0.4, -1.3, 0.2, 0.9, -0.1][:size]),
        "num_items_in_batch": completion_mask.sum(),
    }
    inputs["old_per_token_logps"] = logps(drifted(model, old_drift), inputs).detach()
    return inputs | extra


def logps(model, inputs) -> torch.Tensor:
    """Per-token log-probabilities from the plain logits, (B, T): the test's own path."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].size(1)
    # Only the test's path: call the class's forward, so that TRL's patch of the instance plays no part.
    logits = type(model).forward(model, input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
    return logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)


def loss_and_gradients(trainer, inputs):
    """The trainer's own training loss of one micro-batch and its gradients by parameter name."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def relative_error(actual: dict, expected: dict) -> float:
    """‖actual − expected‖ / ‖expected‖ over all parameters."""
    assert actual.keys() == expected.keys()
    difference = sum((actual[n].double() - expected[n].double()).square().sum() for n in expected)
    return float((difference / sum(g.double().square().sum() for g in expected.values())).sqrt())


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """What `datasets` caches of a test's files goes away with them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def messages(caplog):
    """A function that returns what the package has logged so far."""
    caplog.set_level(logging.INFO, logger="tic_grpo_trl")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("tic_grpo_trl")]
