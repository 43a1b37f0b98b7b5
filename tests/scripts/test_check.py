"""`tic-grpo check` on this machine."""

import importlib.metadata

import pytest
import torch

from tic_grpo_trl.rewards.isolation import sandbox_report
from tic_grpo_trl.scripts import check
from tic_grpo_trl.version import requirements


def test_report_names_versions_devices_and_the_sandbox(capsys):
    check.main([])
    out = capsys.readouterr().out
    for name in requirements():
        (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{name} ")]
        assert importlib.metadata.version(name) in line
    assert ("GPU: none" in out) == (not torch.accelerator.is_available())
    assert str(sandbox_report()).splitlines()[0] in out


def test_a_library_outside_the_allowed_versions_is_an_error(monkeypatch, capsys):
    versions = {"transformers": "4.0.0", "peft": None}
    real = check.installed
    monkeypatch.setattr(check, "installed", lambda name: versions.get(name, "") if name in versions else real(name))
    with pytest.raises(SystemExit) as exit_:
        check.main([])
    assert exit_.value.code == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    for name in versions:
        assert f"pip install '{requirements()[name]}'" in lines[name]


def test_missing_libraries_say_what_that_means(monkeypatch):
    monkeypatch.setattr(check, "installed", lambda name: None)
    lines = list(check.describe_libraries())
    assert any("tic-grpo-trl[vllm]" in line for line in lines)
    assert any("tic-grpo-trl[deepspeed]" in line for line in lines)
