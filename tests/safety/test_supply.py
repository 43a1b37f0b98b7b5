"""Code, pickles and credentials: nothing foreign runs that comes with a model, data or checkpoint; no token is kept."""

import builtins
import io
import json
import os
import pickle
import shutil
import sys
import zipfile

import pandas as pd
import pytest
import torch
import transformers.dynamic_module_utils
import yaml
from conftest import make_trainer, tiny_model, tiny_tokenizer
from launching import QUICK, ROOT, run_script
from trl import ModelConfig, TrlParser
from wandb_files import wandb_records

from tic_grpo_trl import TICGRPOConfig
from tic_grpo_trl.data import load_problems
from tic_grpo_trl.dry_run.plan import load_model_config
from tic_grpo_trl.evaluation import EvaluationConfig, evaluate
from tic_grpo_trl.safety.credentials import credentials_in, hide_credentials, without_credentials
from tic_grpo_trl.scripts import train as train_script


# Code that comes with a model or with data


def test_no_setting_trusts_remote_code():
    assert TICGRPOConfig("unused", use_cpu=True).trust_remote_code is False
    assert EvaluationConfig().trust_remote_code is False
    for recipe in (ROOT / "examples/recipes").glob("*.yaml"):
        assert "trust_remote_code" not in yaml.safe_load(recipe.read_text()), recipe


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """What foreign code makes when it runs. It runs on nobody's nod: no question is asked on the terminal."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    return tmp_path / "it-ran"


@pytest.fixture
def model_with_code(tmp_path, marker, request):
    """`model` or `tokenizer`, and a folder where that is of a class that comes with it."""
    folder = tmp_path / "foreign"
    tiny_model(max_position_embeddings=128).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    name = {"model": "config.json", "tokenizer": "tokenizer_config.json"}[request.param]
    changed = json.loads((folder / name).read_text())
    if request.param == "model":
        changed |= {"model_type": "own", "architectures": ["OwnModel"]}
        changed["auto_map"] = {"AutoConfig": "code_of_it.OwnConfig", "AutoModelForCausalLM": "code_of_it.OwnModel"}
    else:
        changed |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "code_of_it.OwnTokenizer"]}}
    (folder / name).write_text(json.dumps(changed))
    (folder / "code_of_it.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM\n"
        f"Path({str(marker)!r}).touch()\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnModel(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    return request.param, folder


def train_by_script(folder, tmp_path, *flags):
    quick = "--use_cpu --bf16 false --report_to none --max_steps 1 --save_strategy no --disable_tqdm true".split()
    quick += "--per_device_train_batch_size 4 --num_generations 2 --max_completion_length 2 --train_size 8".split()
    flags = [*quick, "--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "out"), *flags]
    parser = TrlParser((train_script.TrainArguments, TICGRPOConfig, ModelConfig))
    parsed = parser.parse_args_and_config(flags)
    train_script.train(train_script.build_trainer(*parsed), parsed[0].dataset_name)


def evaluate_folder(folder, tmp_path, **settings):
    evaluate(
        EvaluationConfig(
            str(folder),
            output_dir=str(tmp_path / "evaluation"),
            backend="transformers",
            limit=1,
            k=1,
            max_completion_length=2,
            **settings,
        )
    )


ENTRANCES = {
    "training": (train_by_script, ("--trust_remote_code",), {}),
    "training, prompts measured": (
        lambda folder, tmp_path, *flags: train_by_script(folder, tmp_path, "--max_prompt_length", "64", *flags),
        ("--trust_remote_code",),
        {},
    ),
    "evaluation": (evaluate_folder, (), {"trust_remote_code": True}),
}


@pytest.mark.usefixtures("cheap_garbage_collection")
@pytest.mark.parametrize(
    ("model_with_code", "entrance"),
    [*(("model", entrance) for entrance in ENTRANCES), ("tokenizer", "training"), ("tokenizer", "evaluation")],
    indirect=["model_with_code"],
)
def test_code_of_a_model_runs_only_where_it_was_asked_for(entrance, model_with_code, tmp_path, marker):
    (kind, folder), (enter, flags, settings) = model_with_code, ENTRANCES[entrance]
    if kind == "model":
        with pytest.raises(ValueError, match=r"(?s)contains custom code .*trust_remote_code=True"):
            enter(folder, tmp_path)
        assert not (tmp_path / "out").exists()
    else:  # there is a class of transformers' own, which does as well
        enter(folder, tmp_path)
    assert not marker.exists()
    enter(folder, tmp_path, *flags, **settings)
    assert marker.exists()


@pytest.mark.parametrize("model_with_code", ["model"], indirect=True)
def test_dry_run_reads_no_configuration_by_code(model_with_code, marker):
    _, folder = model_with_code
    with pytest.raises(ValueError, match="contains custom code"):
        load_model_config(str(folder))
    assert not marker.exists()
    assert load_model_config(str(folder), trust_remote_code=True)[0].model_type == "own"
    assert marker.exists()


@pytest.mark.usefixtures("own_cache")
def test_loader_script_of_a_data_set_does_not_run(tmp_path, marker):
    folder = tmp_path / "sums"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (folder / "sums.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    columns = {"prompt": "question", "solution": "answer"}
    assert load_problems(str(folder), columns=columns)["solution"][:] == ["2"]
    assert not marker.exists()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")  # a card, as in a copy from the hub
    with pytest.raises(ValueError, match=r"scripts are no longer supported, but found sums\.py"):
        load_problems(str(folder), columns=columns)
    assert not marker.exists()


# Pickles


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's checkpoint within a rollout."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, save_strategy="steps", save_steps=2, max_steps=2, steps_per_generation=4)
    trainer.train()
    return folder / "checkpoint-2"


UNREAD = ["training_args.bin"]
READ = ["optimizer.pt", "rng_state.pth", "scheduler.pt", "tic_grpo_state_0.pt"]


def replace(path, value):
    """Another file in a checkpoint, which does not look damaged."""
    torch.save(value, path)
    manifest = path.with_name("manifest.json")
    sizes = json.loads(manifest.read_text())
    sizes["files"][path.name] = path.stat().st_size
    manifest.write_text(json.dumps(sizes))


@pytest.mark.usefixtures("cheap_garbage_collection")
@pytest.mark.parametrize("name", [*READ, *UNREAD, "pytorch_model.bin"])
def test_pickle_in_a_checkpoint_does_not_run(name, saved, tmp_path):
    assert sorted(p.name for p in saved.iterdir() if p.suffix in (".pt", ".pth", ".bin")) == sorted(READ + UNREAD)
    folder, made = tmp_path / "run" / saved.name, tmp_path / "it-ran"
    shutil.copytree(saved, folder)
    replace(folder / name, Attack(made))
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        sizes = json.loads((folder / "manifest.json").read_text())
        del sizes["files"]["model.safetensors"]
        (folder / "manifest.json").write_text(json.dumps(sizes))
    trainer = make_trainer(tmp_path / "run", max_steps=3, steps_per_generation=4)
    if name in UNREAD:
        trainer.train(resume_from_checkpoint=str(folder))
        assert trainer.state.global_step == 3
    else:
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            trainer.train(resume_from_checkpoint=str(folder))
    assert not made.exists()
    torch.load(folder / name, weights_only=False)  # the attack is real
    assert made.exists()


# Credentials


def test_credentials_are_found_at_any_depth():
    values = {
        "token": "t1",
        "hub_token": None,
        "inner": [{"api_key": "t2", "n": 1}],
        "pad_token": "<pad>",
        "password": 7,
    }
    assert credentials_in(values) == {"t1", "t2"}
    shown = without_credentials(values)
    assert shown == values | {"token": None, "inner": [{"api_key": None, "n": 1}], "password": None}
    assert values["token"] == "t1"


def test_settings_show_no_token_and_keep_it(tmp_path):
    kwargs = {"token": "hf_inner", "dtype": torch.float32}
    args = TICGRPOConfig(str(tmp_path), hub_token="hf_outer", model_init_kwargs=kwargs, use_cpu=True)
    for shown in (repr(args), str(args), f"{args}", args.to_json_string(), pickle.dumps(args).decode("latin-1")):
        assert "hf_" not in shown
        assert "learning_rate" in shown
    assert (args.hub_token, args.model_init_kwargs["token"]) == ("hf_outer", "hf_inner")
    command = ["--hub_token", "hf_outer", "--model_init_kwargs={'token': 'hf_inner'}", "--max_steps", "3"]
    assert hide_credentials(command, args)[1::2] == ["<hidden>", "--max_steps"]
    assert hide_credentials(command, args)[2] == "--model_init_kwargs={'token': '<hidden>'}"


PLANTED = {
    "HF_TOKEN": "hf_PLANTEDhub00000000000000000000000",
    "WANDB_API_KEY": "PLANTEDwandb" + 28 * "0",
    "OPENAI_API_KEY": "sk-PLANTEDjudge",
    "JUDGE_PASSWORD": "PLANTEDpassword",
}


def contents(path):
    """All bytes of a file, unpacked where it is packed."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        yield pd.read_parquet(path).to_json().encode()
    elif path.suffix == ".wandb":
        yield from (record.SerializeToString() for record in wandb_records(path))
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            yield from (packed.read(name) for name in packed.namelist())


def test_no_token_is_written_anywhere(tmp_path, monkeypatch):
    recipe = yaml.safe_load((ROOT / "examples/recipes/starter.yaml").read_text())
    recipe |= {"report_to": ["wandb", "trackio", "tensorboard"], "run_name": "SHOWN", "project": "sums"}
    recipe |= {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "steps", "save_steps": 1}
    recipe |= {"log_completions": True, "logging_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "tmp").mkdir()
    places = {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "TRACKIO_DIR": tmp_path / "trackio"}
    for name, value in (PLANTED | places | {"TMPDIR": tmp_path / "tmp", "ACCELERATE_LOG_LEVEL": "DEBUG"}).items():
        monkeypatch.setenv(name, str(value))
    done = run_script(
        *("--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "out", *QUICK, "--max_steps", "2"),
        *("--hub_token", "hf_PLANTEDflag", "--model_init_kwargs", '{"token": "hf_PLANTEDinner"}'),
        *("--log_level", "debug"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "stdout").write_text(done.stdout)
    (tmp_path / "stderr").write_text(done.stderr)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    leaks = {path for path in files for content in contents(path) if b"PLANTED" in content}
    assert not leaks
    # the search sees what is there to be seen
    shown = {path.relative_to(tmp_path).parts[0] for path in files for part in contents(path) if b"SHOWN" in part}
    assert {"recipe.yaml", "out", "wandb", "trackio"} <= shown
    names = {path.name for path in files}
    assert {"training_args.bin", "README.md", "summary.json", "trainer_state.json", "debug.log"} <= names
    assert {"completions_00001.parquet", "optimizer.pt", "sums.db"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    with zipfile.ZipFile(io.BytesIO((tmp_path / "out/training_args.bin").read_bytes())) as packed:
        assert any(b"SHOWN" in packed.read(name) for name in packed.namelist())
