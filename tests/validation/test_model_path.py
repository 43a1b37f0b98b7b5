"""Test what is said about a model folder that does not exist."""

import pytest

from tic_grpo_trl.starter import STARTER_MODEL
from tic_grpo_trl.validation.model_path import missing_model


def test_the_command_of_a_recipe_is_named():
    command = "python make.py --output_dir runs/made"
    said = missing_model("runs/made", command)
    assert said == f"model_name_or_path runs/made does not exist. This command makes it: {command}"
    assert missing_model(STARTER_MODEL, command) is None


@pytest.mark.parametrize("name", ["./made", "/nowhere/made", "~/made", "runs/2026/made"])
def test_a_path_is_no_hub_id(name):
    assert missing_model(name).startswith(f"model_name_or_path {name} does not exist. Give a folder")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-1.7B", "gpt2", STARTER_MODEL])
def test_hub_ids_and_folders_pass(name):
    assert missing_model(name) is None
