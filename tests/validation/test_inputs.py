"""Test what happens with each faulty or unusual input that docs/trouble.md lists."""

import math
import warnings

import pytest
import torch
import zoo
from conftest import CPU, TINY_PROMPTS, WORDS, count_a, tiny_model
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

# The settings of TRL's algorithm and of its update phase, for comparisons with it
AS_TRL = {
    "algorithm": "grpo",
    "epsilon_high": 0.2,
    "partition_by_prompt": False,
    "padding_free": False,
    "skip_zero_advantage": False,
    "skip_on_policy_logps": False,
}


def tokenizer(more: int = 0, pad: str | None = "<eos>", eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    words = [*WORDS, *(f"w{i}" for i in range(more))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, padding_side="left", pad_token=pad, eos_token=eos)


def prompts(values) -> Dataset:
    return Dataset.from_dict({"prompt": list(values)})


def stream(values) -> IterableDataset:
    return IterableDataset.from_generator(lambda: ({"prompt": value} for value in values))


def by_place(completions, **kwargs):
    """A reward that differs within every group."""
    return [float(i % 4) for i in range(len(completions))]


def equal(completions, **kwargs):
    return [1.0] * len(completions)


def trainer_of(tmp_path, trl: bool = False, **given):
    """A trainer on the tiny model; `given` are arguments of the trainer and of its configuration."""
    arguments = {
        "model": given.pop("model", None) or tiny_model(num_hidden_layers=1),
        "reward_funcs": given.pop("reward_funcs", by_place),
        "train_dataset": given.pop("train_dataset", TINY_PROMPTS),
        "eval_dataset": given.pop("eval_dataset", None),
        "processing_class": given.pop("processing_class", None) or tokenizer(),
        "rollout_func": given.pop("rollout_func", None),
    }
    trainer_class, config_class = (GRPOTrainer, GRPOConfig) if trl else (TICGRPOTrainer, TICGRPOConfig)
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 0.01,
        "logging_steps": 1,
        "max_steps": 2,
    }
    return trainer_class(args=config_class(str(tmp_path), **CPU | settings | given), **arguments)


def trained(tmp_path, **given):
    """The trainer after its steps, whether its weights moved, and its log."""
    trainer = trainer_of(tmp_path, **given)
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    after = weights(trainer)
    assert all(value.isfinite().all() for value in after.values())
    moved = any(not torch.equal(before[name], after[name]) for name in before)
    return trainer, moved, [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def with_eos_bias(bias: float):
    """The tiny model, with a bias on the token that ends a response."""
    model = tiny_model(num_hidden_layers=1)
    head = nn.Linear(16, len(WORDS))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[0] = bias
    model.lm_head = head
    return model


# Refused before anything is computed


NOT_ENOUGH = "A rollout takes 2 prompts, but the data has only 1, so no update would be made"
REFUSED = {
    "fewer prompts than a rollout": ({"train_dataset": prompts(["a b"])}, NOT_ENOUGH),
    "a stream of fewer": ({"train_dataset": stream(["a b"])}, NOT_ENOUGH),
    "no examples": ({"train_dataset": TINY_PROMPTS.select([])}, "train_dataset is empty"),
    "a stream without examples": ({"train_dataset": stream([])}, "train_dataset is empty"),
    "no prompt column": (
        {"train_dataset": TINY_PROMPTS.rename_column("prompt", "question")},
        r"train_dataset has no column 'prompt', only 'question': rename .* with dataset.rename_column",
    ),
    "a stream without prompts": (
        {"train_dataset": IterableDataset.from_generator(lambda: ({"text": "a"} for _ in range(8)))},
        "train_dataset has no column 'prompt', only 'text'",
    ),
    "a prompt that is None": (
        {"train_dataset": prompts(["a"] * 20 + [None] + ["b"] * 20)},
        "The prompt of example 20 of train_dataset is None: drop such examples",
    ),
    "a conversation without messages": (
        {"train_dataset": prompts([[{"role": "user", "content": "a"}], []] * 8)},
        "The prompt of example 1 of train_dataset is a conversation without messages",
    ),
    "prompts that are numbers": (
        {"train_dataset": prompts(range(16))},
        "Prompt 0 of train_dataset is 0: a prompt must",
    ),
    "prompts of two kinds": (
        {"train_dataset": stream(["a b", [{"role": "user", "content": "a"}]] * 4)},
        "Prompt 1 of train_dataset is a conversation, unlike those before it",
    ),
    "a prompt without tokens": ({"train_dataset": prompts(["a b", "a", ""] * 8)}, "A prompt has no tokens: drop it"),
    "an empty evaluation set": (
        {"eval_dataset": TINY_PROMPTS.select([]), "eval_strategy": "steps", "eval_steps": 1},
        "eval_dataset is empty",
    ),
    "an evaluation without data": ({"eval_on_start": True}, "eval_on_start=True needs data to evaluate on"),
    "one of several without prompts": (
        {
            "eval_dataset": {"sums": TINY_PROMPTS, "code": TINY_PROMPTS.rename_column("prompt", "task")},
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
        "code has no column 'prompt', only 'task'",
    ),
    "a tokenizer without EOS": ({"processing_class": tokenizer(eos=None)}, "has no EOS token.*set tokenizer.eos_token"),
    "a padding token that the model lacks": (
        {"processing_class": tokenizer(4, pad="w3")},
        r"pad_token 'w3' has the id 9, but the model's embeddings end at 5.*model.resize_token_embeddings\(10\)",
    ),
    "a prompt with a token that the model lacks": (
        {"processing_class": tokenizer(4), "train_dataset": prompts(["a b"] * 1200 + ["a w2"])},
        "A prompt has the token 8, but the model's embeddings end at 5.*Prompt: 'a w2'",
    ),
    "no room beside the responses": (
        {"use_vllm": True, "vllm_max_model_length": 3},
        "max_completion_length 4 = 4 tokens, more than vllm_max_model_length 3",
    ),
    "a reference model from nowhere": ({"beta": 0.1}, "beta=0.1 needs a reference model, .* this model has neither"),
    "a group of one": ({"num_generations": 1}, "num_generations=1 must be in"),
    "no reward": ({"reward_funcs": []}, "No reward source provided"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_computed(case, tmp_path, monkeypatch):
    monkeypatch.setattr(Qwen3ForCausalLM, "generate", lambda *args, **kwargs: pytest.fail("too late"))
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **given)


def test_rewards_that_are_none(tmp_path):
    with pytest.raises(TypeError, match=r"reward_funcs contains 0\.5, which is not a reward function"):
        trainer_of(tmp_path, reward_funcs=[count_a, 0.5])


def test_a_model_without_weights(tmp_path):
    with torch.device("meta"):
        model = Qwen3ForCausalLM(tiny_model().config)
    with pytest.raises(ValueError, match=r"The model has no weights: 25 .* on the meta device \(first: model.embed"):
        trainer_of(tmp_path, model=model)


# Refused in the rollout in which they come, before the model reads them


def rollout(prompt_ids, completion_ids):
    """A rollout function that returns these ids for every prompt."""

    def generate(prompts, trainer):
        size = len(prompts)
        logps = [[-1.0] * len(completion_ids)] * size
        return {"prompt_ids": [prompt_ids] * size, "completion_ids": [completion_ids] * size, "logprobs": logps}

    return generate


@pytest.mark.parametrize(
    ("prompt_ids", "completion_ids", "message"),
    [
        ([1, 2], [], "A response has no tokens: it must contain at least the EOS token. Prompt: '"),
        ([1, 2], [3, 6, 0], "A response has the token 6, but the model's embeddings end at 5: the tokenizer or vLLM"),
        ([1, -1], [3, 0], "A prompt has the token -1"),
        ([], [3, 0], "A prompt has no tokens"),
    ],
)
def test_rollouts_that_the_model_cannot_read(prompt_ids, completion_ids, message, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(tmp_path, rollout_func=rollout(prompt_ids, completion_ids))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_engine_with_another_vocabulary(tmp_path, monkeypatch):
    """Tokens of every sampler are checked here, including vLLM's."""
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda self, ids, *rest: ([[7, 0]] * len(ids), None))
    with pytest.raises(ValueError, match=r"A response has the token 7, .* does not match the model.* Prompt: '"):
        trainer_of(tmp_path).train()


def test_prompts_over_the_learned_positions(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=6, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=0))
    fits = prompts(["a " * 12] * 8)
    assert trained(tmp_path, model=model, train_dataset=fits, max_steps=1)[1]
    with pytest.raises(ValueError, match=r"A prompt of 14 tokens .* make 18, but the model has 16 learned positions"):
        trainer_of(tmp_path, model=model, train_dataset=prompts(["a " * 14] * 8)).train()


def test_prompts_over_what_the_model_was_made_for(tmp_path):
    with pytest.warns(UserWarning, match=r"A prompt of 62 tokens .* more than the 64 positions") as caught:
        _, moved, _ = trained(tmp_path, train_dataset=prompts(["a " * 62] * 8))
    assert moved
    assert len([w for w in caught if "drop_long_prompts" in str(w.message)]) == 1


def test_learned_positions_of_another_modality(tmp_path):
    """This model's audio tower has a table of positions, its language model has rotary ones and a smaller limit."""
    model = zoo.tiny_model("moss_transcribe_diarize", max_position_embeddings=16)
    with pytest.warns(UserWarning, match=r"A prompt of 14 tokens .* more than the 16 positions"):
        assert trained(tmp_path, model=model, train_dataset=prompts(["a " * 14] * 8), max_steps=1)[1]


# Trained on


def test_responses_that_end_at_once(tmp_path):
    _, _, log = trained(tmp_path, model=with_eos_bias(1e4), steps_per_generation=2)
    assert log[0]["completions/mean_length"] == 1
    assert [entry["loss"] for entry in log] == [0.0, 0.0]


@pytest.mark.parametrize("update_phase", ["ours", "TRL's"])
def test_responses_that_are_all_truncated(tmp_path, update_phase):
    options = {} if update_phase == "ours" else {"padding_free": False, "skip_zero_advantage": False}
    _, moved, log = trained(tmp_path, model=with_eos_bias(-1e4), **options)
    assert moved
    assert log[0]["completions/clipped_ratio"] == 1
    for loss_type in ("grpo", "dr_grpo", "dapo", "bnpo"):  # nothing is left of the batch, no normaliser is 0
        masked = {"mask_truncated_completions": True, "loss_type": loss_type, "max_steps": 1}
        _, moved, log = trained(tmp_path, model=with_eos_bias(-1e4), **masked, **options)
        assert not moved
        assert (log[0]["loss"], log[0]["grad_norm"]) == (0.0, 0.0)


@pytest.mark.parametrize("algorithm", ["tic_grpo", "gspo"])
def test_responses_of_one_token(tmp_path, algorithm):
    _, moved, log = trained(tmp_path, algorithm=algorithm, max_completion_length=1, steps_per_generation=2)
    assert moved
    assert log[0]["completions/max_length"] == 1


def test_rewards_that_are_all_equal(tmp_path):
    """Without a gradient the weights stay, or shrink by weight decay as in TRL."""
    trainer, moved, log = trained(tmp_path, reward_funcs=equal, max_steps=8)
    assert not moved
    assert all(entry["frac_reward_zero_std"] == 1 for entry in log)
    before = weights(trainer_of(tmp_path))
    trainer, moved, _ = trained(tmp_path, reward_funcs=equal, weight_decay=0.1, lr_scheduler_type="constant")
    assert moved
    for name, value in weights(trainer).items():
        factor = 1.0 if "norm" in name else (1 - 0.01 * 0.1) ** 2
        torch.testing.assert_close(value, before[name] * factor)


def test_rewards_that_become_equal(tmp_path):
    """The optimizer's momentum keeps moving the weights, exactly as in TRL's trainer."""
    ends = []
    for trl in (False, True):
        calls = []

        def settles(completions, calls=calls, **kwargs):
            calls.append(1)
            return by_place(completions) if len(calls) == 1 else equal(completions)

        options = {"scale_rewards": "group"} | ({} if trl else AS_TRL)
        trainer = trainer_of(tmp_path, trl=trl, reward_funcs=settles, max_steps=3, **options)
        trainer.train()
        ends.append(weights(trainer))
        assert [entry["frac_reward_zero_std"] for entry in trainer.state.log_history[:3]] == [0, 1, 1]
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


def test_groups_of_two(tmp_path):
    for scale_rewards in ("none", "group"):
        _, moved, log = trained(tmp_path, num_generations=2, scale_rewards=scale_rewards)
        assert moved
        assert log[0]["frac_reward_zero_std"] == 0


@pytest.mark.parametrize(("kind", "scale_rewards"), [("sync", "none"), ("async", "group"), ("sync", "batch")])
def test_none_for_all(tmp_path, kind, scale_rewards):
    def nothing(completions, **kwargs):
        return [None] * len(completions)

    async def judge(completions, **kwargs):
        return [None] * len(completions)

    function = nothing if kind == "sync" else judge
    _, moved, log = trained(tmp_path, reward_funcs=function, scale_rewards=scale_rewards, max_steps=1)
    assert not moved
    assert math.isnan(log[0]["reward"] if log[0]["reward"] is not None else math.nan)
    assert (log[0]["loss"], log[0]["grad_norm"]) == (0.0, 0.0)


def test_none_for_all_but_one(tmp_path):
    """The only reward of a group is its own baseline."""

    def first(completions, **kwargs):
        return [1.0] + [None] * (len(completions) - 1)

    for scale_rewards in ("none", "group"):
        _, moved, log = trained(tmp_path, reward_funcs=first, scale_rewards=scale_rewards, max_steps=1)
        assert not moved
        assert log[0]["reward"] == 1.0


def test_a_tokenizer_without_padding(tmp_path):
    trainer, moved, _ = trained(tmp_path, processing_class=tokenizer(pad=None))
    assert moved
    assert trainer.processing_class.pad_token == "<eos>"


def test_a_tokenizer_that_knows_more_than_the_model(tmp_path):
    """Such a tokenizer is fine as long as no prompt contains one of these tokens."""
    assert trained(tmp_path, processing_class=tokenizer(4))[1]


@pytest.mark.parametrize("conversational", [False, True])
def test_a_stream_with_half_a_surrogate_pair(tmp_path, conversational):
    """JSON can contain half a surrogate pair, which no encoding has."""
    texts = ["a b", "c \ud83d d", "b a"] * 8
    values = [[{"role": "user", "content": text}] if conversational else text for text in texts]
    reader = tokenizer()
    reader.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"cannot encode prompt \d+ of a batch, .*c \\ud83d d.*correct it"):
        trained(tmp_path, train_dataset=stream(values), processing_class=reader)


def test_an_evaluation_set_smaller_than_a_batch(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "max_steps": 1}
    trainer, _, _ = trained(tmp_path, eval_dataset=TINY_PROMPTS.select([0]), **options)
    rewards = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert rewards == [1.5]


def test_a_stream(tmp_path):
    """Examples that were checked before the first step are not lost."""
    seen = []

    def note(prompts, **kwargs):
        seen.extend(prompts)
        return by_place(prompts)

    given = {"train_dataset": stream(["a", "b", "c", "d"]), "shuffle_dataset": False}
    assert trained(tmp_path, reward_funcs=note, **given)[1]
    assert seen == ["a"] * 4 + ["b"] * 4 + ["c"] * 4 + ["d"] * 4
