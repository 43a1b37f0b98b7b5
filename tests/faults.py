"""Bad numbers injected where they can arise, in real trainers with fixed rollouts.

The marked responses contain the word "e": two of one group, and one of another. Faults hit only them, or a whole
update.
"""

import copy
import math

import torch
from conftest import CPU, TINY_PROMPTS, WORDS, tiny_model, tiny_tokenizer
from datasets import Dataset
from rollouts import SETTINGS, Recorder
from torch import nn
from transformers import TrainerCallback

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer


MARK = WORDS.index("e")
NAN, INF = math.nan, math.inf
ROWS = 16  # of a rollout on one process: two mini-batches of eight
PROMPTS = Dataset.from_dict({"prompt": [text for text in TINY_PROMPTS["prompt"] if "e" not in text]})
MARKED = (1, 2, 9)  # four responses to a group


class States(TrainerCallback):
    """Record weights and optimizer state before and after every update, and the learning rate."""

    def __init__(self):
        self.states, self.rates = [], []

    def now(self, model, optimizer):
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        # ZeRO-3 keeps its share of a parameter beside it; its optimizer has parameters of its own
        state = [getattr(p, "ds_tensor", p) for p in model.parameters()]
        state += [p for group in optimizer.param_groups for p in group["params"]]
        state += [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in state]
        return torch.cat([tensor.detach().float().flatten() for tensor in local])

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before = self.now(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        after = self.now(model, optimizer)
        self.states.append(self.before.shape == after.shape and torch.equal(self.before, after))
        self.rates.append(lr_scheduler.get_last_lr()[0])

    @property
    def moved(self) -> list[bool]:
        """Whether each update changed anything."""
        return [not same for same in self.states]


class Gradients(Recorder):
    """Record the gradients of every update; `None` if it was skipped."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(gradients) if gradients else None)


def marked_rollouts(marked=MARKED, rows=ROWS, sampler=None, seed=0):
    """Return a `rollout_func` and a reward, the same in every rollout; only marked responses contain "e"."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (rows,), generator=generator).tolist()
    prompts = torch.randint(1, MARK, (rows, 2), generator=generator).tolist()
    completions = [[*torch.randint(1, MARK, (n,), generator=generator).tolist(), 0] for n in lengths]
    rewards = torch.rand(rows, generator=generator).tolist()
    for response in marked:
        completions[response][1] = MARK

    def rollout(texts, trainer):
        logprobs = [sampler(ids) for ids in completions[: len(texts)]] if sampler else None
        return {
            "prompt_ids": prompts[: len(texts)],
            "completion_ids": completions[: len(texts)],
            "logprobs": logprobs,
        }

    return rollout, lambda completions, **kwargs: rewards[: len(completions)]


def build(tmp_path, rollouts=None, model=None, callbacks=(), reward=None, leader=None, adjust=None, **config):
    """Build a trainer with AdamW on such rollouts; its `states` and `gradients` show what its updates did."""
    rollouts = rollouts or marked_rollouts()
    torch.manual_seed(0)
    states, gradients = States(), Gradients(leader)
    settings = CPU | SETTINGS | {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.1} | config
    args = TICGRPOConfig(output_dir=str(tmp_path), **settings)
    if adjust:
        adjust(args)
    trainer = TICGRPOTrainer(
        model=tiny_model() if model is None else copy.deepcopy(model),
        reward_funcs=rollouts[1] if reward is None else reward,
        args=args,
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS.select(range(4)),
        processing_class=tiny_tokenizer(),
        rollout_func=rollouts[0],
        callbacks=[states, gradients, *callbacks],
    )
    trainer.states, trainer.gradients = states, gradients
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def poison_embedding(model, value=NAN, when=lambda: True):
    """Replace the marked token's embedding in forward passes for which `when()` is true."""

    def fault(module, args, output):
        return output.masked_fill((args[0] == MARK).unsqueeze(-1), value) if when() else output

    model.get_input_embeddings().register_forward_hook(fault)


def in_training():
    return torch.is_grad_enabled()


def in_scoring():
    return not torch.is_grad_enabled()


def edit_rollouts(trainer, edit):
    """Let `edit(rollout, marked)` change every new rollout; `marked`: (n,) bool."""
    generate = trainer._generate_and_score_completions

    def edited(inputs):
        rollout = generate(inputs)
        if trainer.model.training:
            edit(rollout, (rollout["completion_ids"] == MARK).any(dim=1))
        return rollout

    trainer._generate_and_score_completions = edited


def edit_scores(trainer, edit):
    """Let `edit(logps, marked)` change log-probabilities of the reference; `marked`: (B,) bool."""
    score = trainer.packed_forward.score

    def edited(inputs, batch_size=None, model=None):
        output = score(inputs, batch_size, model)
        if model is trainer.ref_model:
            edit(output.logps, (inputs["completion_ids"] == MARK).any(dim=1))
        return output

    trainer.packed_forward.score = edited


def without_marked(trainer, masked=False):
    """Train without the marked responses: set their advantages to 0, or with `masked` their tokens."""

    def edit(rollout, marked):
        rollout["completion_mask" if masked else "advantages"][marked] = 0

    edit_rollouts(trainer, edit)


def spoil_losses(trainer, updates, value=NAN):
    """Add a constant to the loss of these updates (from 1): the gradients stay fine."""
    close = trainer.guard.close_loss

    def spoiled(loss, *args):
        return close(loss + value if trainer.state.global_step + 1 in updates else loss, *args)

    trainer.guard.close_loss = spoiled


def spoil_gradients(trainer, updates, value=NAN):
    """Make a gradient bad in these updates (from 1): losses and log-probabilities stay fine."""
    forward = trainer.packed_forward._pass

    def add(gradient):
        return gradient + value

    def spoiled(*args, **kwargs):
        output = forward(*args, **kwargs)
        if output.logps.requires_grad and trainer.state.global_step + 1 in updates:
            output.logps.register_hook(add)
        return output

    trainer.packed_forward._pass = spoiled


class Judge(nn.Module):
    """Reward the number of words "a" as a reward model would, with a bad reward for marked responses."""

    def __init__(self, bad=None):
        super().__init__()
        self.bad = bad
        self.judged = []  # without the bad ones
        self.config = type("Config", (), {"_name_or_path": "judge"})()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        rewards = (input_ids == WORDS.index("a")).sum(dim=1, keepdim=True).float()
        self.judged.append(rewards.clone())
        if self.bad is not None:
            rewards[(input_ids == MARK).any(dim=1)] = self.bad
        return type("Output", (), {"logits": rewards})()
