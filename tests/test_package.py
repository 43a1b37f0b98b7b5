"""The installed package: what a wheel holds."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "tic_grpo_trl", source / "tic_grpo_trl", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=source, check=True, timeout=120)
    (path,) = (source / "dist").glob("tic_grpo_trl-*.whl")
    return path


def test_wheel_holds_the_starter(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert f"tic_grpo_trl/starter/model/{name}" in names
    assert "tic_grpo_trl/py.typed" in names
    assert not any(name.startswith(("tests", "examples", "research", "runs")) for name in names)


def test_installed_wheel_loads_its_starter_offline(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True, timeout=120)
    code = (
        "import tic_grpo_trl, transformers\n"
        "from tic_grpo_trl.starter import STARTER_MODEL\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(STARTER_MODEL)\n"
        "print(tic_grpo_trl.__file__, model.num_parameters())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1].split() == [str(tmp_path / "tic_grpo_trl" / "__init__.py"), "167040"]
