"""What a model has to be like for the rules for whole mini-batches."""

import pytest
from conftest import make_trainer, tiny_model

from tic_grpo_trl.validation.inputs import check_loaded


BY_TOKEN = {"algorithm": "grpo", "steps_per_generation": 2}
EXACT = {"algorithm": "vcpo", "baseline_norms": "gradients"}
RULES = [{"scale_lr_by_ess": True}, {"advantage_baseline": "minimum_variance"}]


def test_exact_norms_of_a_model_with_images_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, **EXACT)
    check_loaded(trainer)
    trainer._is_vlm = True
    with pytest.raises(ValueError, match=r"^baseline_norms='gradients' .* with images: set baseline_norms='tokens'\.$"):
        check_loaded(trainer)
    trainer.args.baseline_norms = "tokens"
    check_loaded(trainer)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))
def test_the_ratios_that_a_rule_reads_need_a_model_without_dropout(tmp_path, rule):
    """Also where the weight is that of a token."""
    noisy = tiny_model(attention_dropout=0.1)
    make_trainer(tmp_path, noisy, disable_dropout=False, **BY_TOKEN)
    with pytest.raises(ValueError, match=r"Dropout is active.*attention_dropout.*set disable_dropout=True"):
        make_trainer(tmp_path, noisy, disable_dropout=False, **BY_TOKEN | rule)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))
def test_the_noise_of_the_ratios_that_a_rule_reads_is_measured(tmp_path, rule):
    trainer = make_trainer(tmp_path, bf16=True, max_steps=1, **BY_TOKEN | rule)
    trainer.train()
    assert trainer.state.log_history[0]["trajectory_ratio/noise_floor"] > 0
