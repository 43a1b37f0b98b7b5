"""The model, rollouts and trainers of the benchmark. The trainers are equal except for their class."""

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer


UPDATES = 4  # per rollout, K
MICRO_BATCH = 8  # responses
GROUP = 8  # responses per prompt
SETTINGS = {  # of every trainer
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "shuffle_dataset": False,
}


@dataclass(frozen=True)
class Scale:
    """Sizes of a run.

    Attributes:
        model: fields of `Qwen3Config`.
        responses: responses per rollout.
        mean, longest: mean and maximum tokens per response.
        prompt: minimum and maximum tokens per prompt.
        pairs: runs of each trainer per case; `equal_pairs` for the case with equal lengths, whose runs are short.
        limit_runs: runs of the strictly necessary work, each next to one of ours.
        factors: factors of the growth figure; `trl_factors` are those at which TRL is also timed; `growth_runs` is the
            number of our runs at the factor 1, with fewer above.
        loss_responses, loss_width, loss_runs: responses, tokens per response and runs when timing the loss alone.
        shared_prompts: tokens per prompt in the cases of shared prompts; `shared_growth` adds those of their figure.
    """

    model: dict[str, Any]
    responses: int = 64
    mean: int = 37
    longest: int = 562
    prompt: tuple[int, int] = (8, 16)
    pairs: int = 3
    equal_pairs: int = 9
    limit_runs: int = 7
    factors: tuple[int, ...] = (1, 2, 4, 8)
    trl_factors: tuple[int, ...] = (1,)
    growth_runs: int = 4
    loss_responses: int = 16
    loss_width: int = 16_384
    loss_runs: int = 25
    shared_prompts: tuple[int, ...] = (256, 64, 8)
    shared_growth: tuple[int, ...] = (8, 64, 256, 512, 1024)


FULL = Scale(
    model={
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
)
QUICK = Scale(
    model={
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    mean=6,
    longest=60,
    prompt=(2, 4),
    pairs=1,
    equal_pairs=1,
    limit_runs=1,
    factors=(1, 2),
    growth_runs=1,
    loss_width=256,
    loss_runs=2,
    shared_prompts=(16,),
    shared_growth=(8, 16),
)


def make_model(scale: Scale) -> Qwen3ForCausalLM:
    """Make a Qwen3 with random float32 weights, the same for every call."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **scale.model, max_position_embeddings=32_768, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0
    )
    return Qwen3ForCausalLM(config).float()


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of `vocabulary` made-up words. It only decodes, because rollouts are token ids."""
    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0", padding_side="left")


def skewed_lengths(count: int, mean: int, longest: int, seed: int = 0) -> list[int]:
    """Draw log-normal lengths with exactly this mean, one of them exactly `longest`.

    The others are drawn with the median 0.6·mean and the matching spread, limited to 8·mean (and below `longest`),
    scaled to the remaining sum and rounded. Single tokens then make the sum exact.

    Args:
        count: number of lengths.
        mean, longest: mean and maximum in tokens.
        seed: random seed.

    Returns:
        `count` lengths in tokens; the longest is the fourth.
    """
    generator = torch.Generator().manual_seed(seed)
    median, cut = 0.6 * mean, min(8 * mean, longest - 1)
    spread = math.sqrt(2 * math.log(mean / median))
    draws = (median * (spread * torch.randn(count - 1, generator=generator)).exp()).clamp(max=cut)
    total = count * mean - longest
    lengths = (draws * total / draws.sum()).round().clamp(2, cut).int().tolist()
    index = 0
    while (missing := total - sum(lengths)) != 0:
        if 2 < lengths[index] + missing // abs(missing) <= cut:
            lengths[index] += missing // abs(missing)
        index = (index + 1) % len(lengths)
    return [*lengths[:3], longest, *lengths[3:]]


@dataclass
class Rollout:
    """Responses as returned by generation, and their rewards.

    Attributes:
        prompt_ids, completion_ids: token ids, one list per response; `GROUP` consecutive responses share their prompt.
        rewards: one per response.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    rewards: list[float]

    @property
    def tokens(self) -> int:
        """Number of real tokens, including prompts."""
        return sum(map(len, self.prompt_ids)) + sum(map(len, self.completion_ids))

    def shared_minibatches(self, seed: int) -> list[tuple[int, int]]:
        """Count the responses and their unique tokens per mini-batch of whole groups, in the order of our shuffle."""
        torch.manual_seed(seed)
        groups = torch.randperm(len(self.rewards) // GROUP).view(UPDATES, -1).tolist()
        batches = [[i for group in batch for i in range(group * GROUP, (group + 1) * GROUP)] for batch in groups]
        prompts = [sum(len(self.prompt_ids[group * GROUP]) - 1 for group in batch) for batch in groups]
        own = [sum(1 + len(self.completion_ids[i]) for i in batch) for batch in batches]
        return [(len(batch), sum(each)) for batch, *each in zip(batches, prompts, own, strict=True)]

    def active_minibatches(self, seed: int) -> list[tuple[int, int]]:
        """Count active responses and their tokens per mini-batch, in the order of TRL's shuffle."""
        torch.manual_seed(seed)
        order = torch.randperm(len(self.rewards)).view(UPDATES, -1).tolist()
        groups = [self.rewards[i - i % GROUP : i - i % GROUP + GROUP] for i in range(len(self.rewards))]
        active = [[i for i in batch if len(set(groups[i])) > 1] for batch in order]
        return [(len(b), sum(len(self.prompt_ids[i]) + len(self.completion_ids[i]) for i in b)) for b in active]


def make_rollout(scale: Scale, lengths: Sequence[int], zero_advantage_groups: int, seed: int = 0) -> Rollout:
    """Make a rollout of random tokens with the given completion lengths.

    Args:
        scale: sizes.
        lengths: tokens per response, including the end-of-sequence token.
        zero_advantage_groups: number of groups, from the last, with equal rewards and so advantages of exactly 0. In
            the others, every second response gets 1 and the rest 0, so no advantage is 0.
        seed: random seed of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, scale.model["vocab_size"], (count,), generator=generator).tolist()

    fewest, most = scale.prompt
    groups = len(lengths) // GROUP
    prompts = [tokens(fewest + i % (most - fewest + 1)) for i in range(groups)]
    rewards = [0.0 if i // GROUP >= groups - zero_advantage_groups else float(i % 2) for i in range(len(lengths))]
    return Rollout(
        prompt_ids=[prompts[i // GROUP] for i in range(len(lengths))],
        completion_ids=[[*tokens(length - 1), 0] for length in lengths],
        rewards=rewards,
    )


class Replay:
    """Replay the warm-up rollout and then the measured one to either trainer."""

    def __init__(self, rollouts: Sequence[Rollout], seed: int):
        self.rollouts = iter(rollouts)
        self.seed = seed
        self.served: Rollout

    def generate(self, prompts, trainer):
        """Return the next rollout (TRL's `rollout_func`), and seed the shuffle that follows."""
        self.served = next(self.rollouts)
        assert len(prompts) == len(self.served.rewards)
        torch.manual_seed(self.seed)
        return {
            "prompt_ids": self.served.prompt_ids,
            "completion_ids": self.served.completion_ids,
            "logprobs": None,
        }

    def reward(self, completions, **kwargs):
        """Return the rewards of the rollout (TRL's reward signature)."""
        return self.served.rewards


def make_trainer(
    kind: str,
    scale: Scale,
    model: Qwen3ForCausalLM,
    rollout: Rollout,
    seed: int = 0,
    lora: bool = False,
    **options: Any,
):
    """Make a trainer of `2·UPDATES` steps: a warm-up rollout of two tokens per response, then `rollout`.

    Args:
        kind: `"trl"` for TRL's trainer with DAPO's loss, `"ours"` for this package's trainer with the same loss
            (algorithm `grpo`) and shuffle, or the name of an algorithm for this package's trainer with its defaults.
        scale: sizes.
        model: model to copy and train.
        rollout: measured rollout.
        seed: random seed of the shuffle and of LoRA's weights.
        lora: whether to train adapters of rank 16 on every linear layer instead of the model.
        options: fields of this package's configuration; by default responses are shuffled as by TRL.
    """
    responses = len(rollout.rewards)
    trainer_class: Any
    args: Any
    settings: dict[str, Any] = {
        **SETTINGS,
        "logging_steps": 1,
        "seed": seed,
        "max_steps": 2 * UPDATES,
        "num_generations": GROUP,
        "per_device_train_batch_size": MICRO_BATCH,
        "steps_per_generation": responses // MICRO_BATCH,
        "gradient_accumulation_steps": responses // MICRO_BATCH // UPDATES,
        "max_completion_length": max(map(len, rollout.completion_ids)),
    }
    dapo: dict[str, Any] = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "scale_rewards": "none"}
    folder = tempfile.gettempdir()  # nothing is saved
    if kind == "trl":
        trainer_class, args = GRPOTrainer, GRPOConfig(folder, **settings, **dapo)
    elif kind == "ours":
        trainer_class = TICGRPOTrainer
        args = TICGRPOConfig(folder, **settings, algorithm="grpo", **{"partition_by_prompt": False} | options)
        assert all(getattr(args, name) == value for name, value in dapo.items())
    else:
        trainer_class, args = TICGRPOTrainer, TICGRPOConfig(folder, **settings, algorithm=kind, **options)
    warm_up = make_rollout(scale, [2] * responses, zero_advantage_groups=0)
    warm_up.rewards = rollout.rewards
    replay = Replay([warm_up, rollout], seed)
    torch.manual_seed(seed)
    trainer = trainer_class(
        model=copy.deepcopy(model),
        reward_funcs=replay.reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"w{i}" for i in range(2 * responses // GROUP)]}),
        processing_class=make_tokenizer(scale.model["vocab_size"]),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        rollout_func=replay.generate,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
