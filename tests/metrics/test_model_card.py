"""The model card of a run: which model it started from, in words."""

import pytest
from conftest import CPU, make_trainer, tiny_model

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.starter import STARTER_MODEL, exact_match_reward, make_dataset


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{folder}/runs/my-model", "the model in the local folder `my-model`"),
        ("Qwen/Qwen3-1.7B", "[Qwen/Qwen3-1.7B](https://huggingface.co/Qwen/Qwen3-1.7B)"),
        ("", "a model without a name"),
    ],
)
def test_the_base_model_is_named_in_words(tmp_path, name, words):
    (tmp_path / "runs/my-model").mkdir(parents=True)
    model = tiny_model()
    model.config._name_or_path = name.format(folder=tmp_path)
    make_trainer(tmp_path / "out", model).create_model_card()
    card = (tmp_path / "out/README.md").read_text()
    assert f"This model is a fine-tuned version of {words}.\n" in card
    assert "None" not in card
    assert str(tmp_path) not in card


def test_the_starter_is_named_in_words(tmp_path):
    args = TICGRPOConfig(str(tmp_path / "out"), **CPU, per_device_train_batch_size=8)
    trainer = TICGRPOTrainer(STARTER_MODEL, exact_match_reward, args, train_dataset=make_dataset("train", 8))
    assert round(sum(parameter.numel() for parameter in trainer.model.parameters()), -3) == 167_000
    trainer.create_model_card()
    words = "the starter, a 167k-parameter model included in tic-grpo-trl"
    assert f"This model is a fine-tuned version of {words}.\n" in (tmp_path / "out/README.md").read_text()
