"""What the tests of carry-over share: models whose responses have lengths of their own, and rollouts with versions."""

import torch
from conftest import WORDS, logps, tiny_model


SHORT, LONG = "abc", "de"  # the last word of a prompt tells how long its responses are


def talkative_model(**overrides):
    """A model whose responses have 12 tokens on average; one in ten has more than 30."""
    model = tiny_model(max_position_embeddings=128, **overrides)
    with torch.no_grad():
        model.lm_head.weight[0] = 0
    return model


def model_with_lengths():
    """A model whose next token depends on the last one alone: it stays among SHORT, and ends soon, or among LONG."""
    model = tiny_model(max_position_embeddings=128)
    transitions = torch.full((len(WORDS), len(WORDS)), 1e-4)  # rows: the last token
    for words, ends in ((SHORT, 0.4), (LONG, 0.01)):
        ids = [WORDS.index(word) for word in words]
        for last in ids:
            transitions[last, 0] = ends
            transitions[last, ids] = (1 - ends) / len(ids)
    transitions[0] = 1
    width = model.config.hidden_size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), width))
        # the norm in front of the head makes a vector of ones and zeros √width times as long
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, : len(WORDS)] = transitions.log().T / width**0.5
    return model


def logps_by_version(models, rollout, process=lambda logits: logits):
    """Log-probabilities of a rollout's tokens under each of some models, (versions, n, T), from the plain logits;
    `process` makes of these what was sampled from."""

    def scored(model):
        handle = model.lm_head.register_forward_hook(lambda module, inputs, logits: process(logits))
        try:
            with torch.no_grad():
                return logps(model, rollout)
        finally:
            handle.remove()

    return torch.stack([scored(model) for model in models])


def generate(trainer):
    """The next rollout of a trainer with carry-over, which need not be training."""
    trainer.model.train()
    trainer.state.max_steps = trainer.args.max_steps
    rollout = trainer._generate_and_score_completions(trainer.carry_over.collect(trainer._metrics["train"]))
    trainer.state.global_step += int(trainer.schedule.updates)
    return rollout
