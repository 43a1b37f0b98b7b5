"""Test what is said about a model that does not exist or cannot be read."""

import re
import shutil

import pytest

from tic_grpo_trl.starter import STARTER_MODEL
from tic_grpo_trl.validation.model_path import check_model, missing_model


def test_the_command_of_a_recipe_is_named():
    command = "python make.py --output_dir runs/made"
    said = missing_model("runs/made", command)
    assert said == f"--model_name_or_path runs/made does not exist. This command makes it: {command}"
    assert missing_model(STARTER_MODEL, command) is None


@pytest.mark.parametrize("name", ["./made", "/nowhere/made", "~/made", "runs/2026/made"])
def test_a_path_is_no_hub_id(name):
    assert missing_model(name).startswith(f"--model_name_or_path {name} does not exist.")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-1.7B", "gpt2", STARTER_MODEL])
def test_hub_ids_and_folders_pass(name):
    assert missing_model(name) is None


# The configuration


def refused(name, error=ValueError, **options) -> str:
    """Return the message of an error, which must be one line."""
    with pytest.raises(error, match=f"^--model_name_or_path {re.escape(str(name))}") as raised:
        check_model(str(name), **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_readable_configuration_is_returned(tmp_path):
    assert check_model(STARTER_MODEL, command="python make.py").vocab_size > 0
    assert refused(tmp_path / "made", command="python make.py").endswith("This command makes it: python make.py")


@pytest.mark.parametrize("name", ["foo", "foo/bar"])
def test_a_hub_id_without_the_hub(name):
    assert refused(name, error=ConnectionError) == (
        f"--model_name_or_path {name}: its config.json cannot be read (the hub cannot be reached, because "
        "HF_HUB_OFFLINE is set). Give a local folder or a hub id."
    )


@pytest.mark.parametrize("name", ["runs/starer", "./runs/starer"])
def test_a_mistyped_folder_is_told_the_nearest(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STARTER_MODEL, "runs/starter")
    assert "Did you mean 'runs/starter'? Give a local folder or a hub id." in refused(name)
    assert check_model("runs/starter").model_type


def test_a_folder_that_holds_no_configuration(tmp_path):
    assert "its config.json cannot be read (the folder has none)" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not a valid JSON file" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "Should have a `model_type` key" in refused(tmp_path)
