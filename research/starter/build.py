"""Build a starter model from scratch: a character tokenizer, a tiny Qwen3 and supervised training on sums.

    python -m research.starter.build --output_dir runs/starter-model
    python -m research.starter.build --output_dir runs/long-tail-model --task long_tail

The supervised training leaves room for reinforcement learning. Phase 1 teaches the chain style well. Its direct answers
are random guesses within two of the correct sum, so about one in five is correct. Phase 2 continues briefly with mostly
direct answers. The resulting model is correct about one time in three, and would be correct nearly nine times in ten if
it wrote its steps down.

Training uses only problems of the `train` split, with the loss on answer tokens only. One thread and one seed give the
same weights bit for bit.
"""

import argparse
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tic_grpo_trl.starter.task import BOX, exact_match_reward, make_prompt, sample_problem

from .answer_styles import STYLES, format_answer, running_sums, style_of
from .courses import COURSES, Course


PAD, UNKNOWN, START, END = "<|endoftext|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
CHARACTERS = ["\n", *map(chr, range(32, 127))]  # newline and printable ASCII: 96
WORDS = ["system", "user", "assistant", BOX]  # one token each, so that prompts and answers stay short
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

STARTER = COURSES["starter"]
BATCH_SIZE = 64
GUESS_ERROR = 2  # direct answers are off by at most this
CHAIN_LR, REMIX_LR = 5e-3, 1e-3  # peaks of phases 1 and 2
WARMUP_STEPS = 50  # of phase 1; both phases then decay linearly to a twentieth of their learning rate


def build_tokenizer(num_positions: int = STARTER.num_positions) -> PreTrainedTokenizerFast:
    """Build a character tokenizer of 104 tokens: a BPE without merges, four words and ChatML's four special tokens."""
    vocab = {token: i for i, token in enumerate([PAD, UNKNOWN, START, END, *CHARACTERS])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, normalized=False) for token in (PAD, UNKNOWN, START, END)])
    core.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=num_positions,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build a Qwen3 of 167,040 float32 parameters, initialized from torch's global generator."""
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        initializer_range=0.05,  # a model this narrow learns faster from it than from the usual 0.02
        dtype="float32",
        bos_token_id=None,
        **tokens,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**tokens)
    return model


def make_batch(
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    mix: tuple[float, float, float],
    course: Course = STARTER,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Make one supervised batch of training problems, answered in styles drawn from `mix`.

    Returns:
        The course's micro-batches, each `input_ids` and `labels`, both (B, T), padded on the right; labels are -100 on
        prompt and padding.
    """
    examples = []
    for _ in range(BATCH_SIZE):
        terms = sample_problem(rng, "train", course.sample_num_terms(rng))
        style = rng.choices(STYLES, mix)[0]
        if style == "direct":
            sums = [max(0, sum(terms) + rng.randint(-GUESS_ERROR, GUESS_ERROR))]
        else:
            sums = running_sums(terms, rng, course.wrong_step_rate)
        prompt: Any = tokenizer.apply_chat_template(make_prompt(terms), add_generation_prompt=True, return_dict=False)
        examples.append((prompt, tokenizer(format_answer(terms, style, sums) + END).input_ids))
    if course.micro_batches > 1:
        examples.sort(key=lambda example: len(example[0]) + len(example[1]))
    size = BATCH_SIZE // course.micro_batches
    return [pad(examples[i : i + size], tokenizer.pad_token_id) for i in range(0, BATCH_SIZE, size)]


def pad(examples: list[tuple[list[int], list[int]]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_ids` and `labels`, both (B, T), of prompts and answers; labels are -100 on prompt and padding."""
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id)  # (B, T)
    labels = torch.full((len(examples), longest), -100)  # (B, T)
    for i, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        input_ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return input_ids, labels


def take_step(model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, lr: float, batch: list[tuple]) -> float:
    """Take one optimizer step on the mean over all answer tokens of the micro-batches, and return that loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    counts = [(labels != -100).sum().item() for _, labels in batch]
    total = 0.0
    for (input_ids, labels), count in zip(batch, counts, strict=True):
        mean = model(input_ids, labels=labels).loss  # attention is causal, so right padding needs no mask
        loss = mean * (count / sum(counts))
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


@torch.no_grad()
def measure(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: datasets.Dataset,
    seed: int,
    max_new_tokens: int = STARTER.max_new_tokens,
) -> dict:
    """Sample one answer per problem at temperature 1 and score it.

    Args:
        model: the model, left in evaluation mode.
        tokenizer: its tokenizer.
        problems: P problems of `make_dataset`.
        seed: seeds torch's global generator.
        max_new_tokens: longest answer, in tokens.

    Returns:
        `accuracy`, `mean_tokens` (end token included), and under `styles` the `share` and `accuracy` of each style.
    """
    torch.manual_seed(seed)
    model.eval()
    styles: list[str] = []
    rewards: list[float] = []
    num_tokens = 0
    for start in range(0, len(problems), 500):
        part = problems[start : start + 500]
        inputs: Any = tokenizer.apply_chat_template(
            part["prompt"], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(
            input_ids=inputs["input_ids"],  # (P, T)
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=max_new_tokens,
        )
        answer_ids = output[:, inputs["input_ids"].shape[1] :]  # (P, at most max_new_tokens)
        answers = tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
        num_tokens += (answer_ids != tokenizer.pad_token_id).sum().item()
        rewards += exact_match_reward(answers, part["solution"])
        styles += map(style_of, answers)
    right = Counter(style for style, reward in zip(styles, rewards, strict=True) if reward == 1.0)
    return {
        "accuracy": round(sum(rewards) / len(rewards), 4),
        "mean_tokens": round(num_tokens / len(rewards), 2),
        "styles": {
            style: {"share": round(count / len(rewards), 4), "accuracy": round(right[style] / count, 4)}
            for style, count in sorted(Counter(styles).items())
        },
    }


def build(
    output_dir: str | Path, seed: int = 0, task: str = "starter", start: str | Path | None = None, **changes: Any
) -> dict:
    """Train a starter and save model, tokenizer and `starter_card.json` to `output_dir`.

    This seeds torch's global generator. Results are bit-identical only with `torch.set_num_threads(1)`.

    Args:
        output_dir: folder to write to.
        seed: seed of the initial weights and the training problems.
        task: key of `COURSES`.
        start: model folder to continue from, such as the starter itself for longer problems; fresh weights if `None`.
        changes: fields of the task's [`Course`] and their values, such as `chain_steps=300`.

    Returns:
        The content of the card.
    """
    course = replace(COURSES[task], **changes)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer(course.num_positions)
    model = build_model(tokenizer) if start is None else Qwen3ForCausalLM.from_pretrained(start)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    problems = course.held_out_problems()
    card: dict = {"seed": seed, "parameters": model.num_parameters(), "held_out_problems": course.held_out}
    phases = (
        ("chain", course.chain_steps, CHAIN_LR, WARMUP_STEPS, course.chain_mix),
        ("remix", course.remix_steps, REMIX_LR, 1, course.remix),
    )
    for name, steps, peak_lr, warmup, mix in phases:
        model.train()
        for step in range(1, steps + 1):
            lr = peak_lr * min(step / warmup, 1.0, 1.05 - step / steps)
            loss = take_step(model, optimizer, lr, make_batch(tokenizer, rng, mix, course))
            if step % 100 == 0:
                print(f"{name} {step}/{steps} loss {loss:.3f}", flush=True)
        card[f"after_{name}"] = {"steps": steps, **measure(model, tokenizer, problems, seed, course.max_new_tokens)}
        print(json.dumps(card[f"after_{name}"]), flush=True)
    card["versions"] = {lib.__name__: lib.__version__ for lib in (torch, transformers, tokenizers, datasets)}
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    Path(output_dir, "starter_card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a starter model from scratch.")
    parser.add_argument("--output_dir", required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and the training problems")
    parser.add_argument("--task", default="starter", choices=list(COURSES), help="what the model is trained on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    build(args.output_dir, args.seed, args.task)


if __name__ == "__main__":
    main()
