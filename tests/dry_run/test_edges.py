"""Test rare cases: vLLM in a dry run, a gated data set, weights that are made once."""

import json

import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from test_plan import GB, Plan, plan_for, planned, shown
from transformers import Qwen3Config

from research.study import __main__ as study
from research.study import runs
from tic_grpo_trl.data import load_problems
from tic_grpo_trl.evaluation.scoring import is_tests
from tic_grpo_trl.starter import STARTER_MODEL


SMALL = Qwen3Config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
)


@pytest.mark.parametrize(
    ("problem", "raised", "says"),
    [
        (DatasetNotFoundError("no access"), FileNotFoundError, "it needs a login .*consent .*no access"),
        (ValueError("Config name is missing: a, b"), ValueError, "cannot load 'someone/sums' .*missing: a, b.*config"),
    ],
)
def test_hub_data_that_is_there_but_cannot_be_had(problem, raised, says, monkeypatch):
    def refuse(*_, **__):
        raise problem

    monkeypatch.setattr("tic_grpo_trl.data.sources.load_dataset", refuse)
    with pytest.raises(raised, match=rf"(?s)someone/sums.*{says}") as error:
        load_problems("someone/sums")
    assert type(error.value) is raised
    assert error.value.__cause__ is problem


@pytest.mark.parametrize(
    ("flags", "memory", "says"),
    [
        ((), None, "0.25 of the GPU"),
        (("--vllm_enable_sleep_mode", "true"), None, "0.25 of the GPU while it generates"),
        (("--vllm_enable_sleep_mode", "true"), 100 * GB, "0.25 of the GPU while it generates  bf16 weights"),
    ],
)
def test_dry_run_names_an_engine_whose_memory_is_not_counted(flags, memory, says):
    engine = "--use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.25".split()
    line = shown(Plan(planned(*engine, *flags), SMALL, longest_prompt=21, gpu_memory=memory))["vLLM"]
    assert line.startswith(says)
    assert ("bf16" in line) == (memory is not None)


def test_dry_run_of_every_process_but_the_first_says_nothing():
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    assert plan_for(None, None, launched) is None  # no class to read the settings with
    assert not launched  # nothing is left that would start a group of processes


@pytest.mark.parametrize(
    ("solution", "expected"), [('{"tests": []}', True), ('{"answer": 1}', False), ("{1, 2}", False), ("42", False)]
)
def test_what_looks_like_json_may_be_a_set(solution, expected):
    assert is_tests(solution) is expected


def test_weights_that_runs_start_from_are_made_once_and_by_one_thread(tmp_path, monkeypatch, capsys):
    made, threads = [], [4]

    def build(folder, **settings):
        made.append((folder, settings["start"], torch.get_num_threads()))
        folder.mkdir()
        (folder / "starter_card.json").write_text(json.dumps({}))

    monkeypatch.setattr(runs, "build", build)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert runs.start_model("starter", tmp_path) == STARTER_MODEL
    assert runs.start_model("long", tmp_path) == runs.start_model("long", tmp_path) == str(tmp_path / "long-start")
    assert made == [(tmp_path / "long-start", STARTER_MODEL, 1)]
    assert threads == [4, 1, 4]
    assert capsys.readouterr().out.count("two minutes") == 1


def test_tuned_study_refuses_an_algorithm_without_a_grid_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "execute_all", lambda *_: pytest.fail("a run was started"))
    args = study.StudyArguments(plan="tuned", algorithms=["tic_grpo", "gspo", "mine"], output_dir=tmp_path)
    with pytest.raises(ValueError, match="--algorithms mine: choose from tic_grpo, "):
        study.tune(args)
