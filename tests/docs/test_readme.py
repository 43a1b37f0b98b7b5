"""The commands and code of the README and the docs: every flag is known, every file exists, and the example trains."""

import json
import re
import shlex
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import CPU
from datasets import Dataset
from launching import ROOT, run_command
from trl import TrlParser

import tic_grpo_trl
from research.lighteval.runs import LightevalConfig
from tic_grpo_trl import TICGRPOConfig
from tic_grpo_trl.dry_run.plan import plan_for
from tic_grpo_trl.evaluation import EvaluationConfig
from tic_grpo_trl.rollout.schedule import RolloutSchedule
from tic_grpo_trl.scripts.evaluate import TableArguments
from tic_grpo_trl.scripts.launch import Launch
from tic_grpo_trl.scripts.train import parse
from tic_grpo_trl.starter import STARTER_MODEL


PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
TRAIN = "tic_grpo_trl.scripts.train"
EVALUATE = {
    "tic_grpo_trl.scripts.evaluate": (TableArguments, EvaluationConfig),
    "research.lighteval": (LightevalConfig,),
}
# The same by the name of a command
COMMANDS = {TRAIN: "(train|dry-run)", "tic_grpo_trl.scripts.evaluate": "evaluate"}
# What a reader replaces
PLACEHOLDERS = {
    "<address of the first node>": "10.0.0.1",
    "RECIPE ": "starter ",
    "RECIPE.yaml": "examples/recipes/starter.yaml",
    "my_run.yaml": "examples/recipes/starter.yaml",
    "…": "",
}


def commands(module: str, pages=PAGES) -> list[str]:
    """Commands that run a module, also by name, from all shell blocks; not the template with CONFIG and FLAGS."""
    blocks = [
        block for page in pages for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    ]
    text = "\n".join(blocks).replace("\\\n", " ")
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    starts = rf"-m {module}\s" + (rf"|\btic-grpo {COMMANDS[module]}\s" if module in COMMANDS else "")
    lines = [line for line in text.splitlines() if re.search(starts, line) and "CONFIG" not in line]
    return list(dict.fromkeys(lines))


def parsed(line: str):
    """accelerate's arguments, if it launches the script, and the script's, read as a dry run: no GPU is needed."""
    words = shlex.split(line, comments=True)
    if "tic-grpo" in words:
        command = Launch.of(words[words.index("tic-grpo") + 2 :])
        launch, flags = launch_command_parser().parse_args([*command.words(), "-m", TRAIN]), command.training
    else:
        at = words.index(TRAIN)
        flags, launch = words[at + 1 :], None
        if "launch" in words:
            launch = launch_command_parser().parse_args(words[words.index("launch") + 1 : at + 1])
    config_class = plan_for(launch and launch.config_file, launch and launch.num_processes, {})
    return launch, parse([word for word in flags if word != "--dry_run"], config_class)


@pytest.mark.parametrize("line", commands(TRAIN))
def test_training_commands_are_known_to_accelerate_and_the_script(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    launch, _ = parsed(line)
    assert launch is None or (ROOT / launch.config_file).exists()


@pytest.mark.parametrize(("module", "line"), [(module, line) for module in EVALUATE for line in commands(module)])
def test_evaluation_commands_are_known_to_the_script(module, line):
    words = shlex.split(line, comments=True)
    start = words.index(module) + 1 if module in words else words.index("tic-grpo") + 2
    TrlParser(EVALUATE[module]).parse_args_and_config(words[start:])


def test_a_mistyped_flag_is_noticed():
    with pytest.raises(ValueError, match="Unknown flag --steps_per_rollout"):
        parsed(f"accelerate launch --config_file accelerate_configs/cpu.yaml -m {TRAIN} --steps_per_rollout 4")


TRAINING = [
    line for line in commands(TRAIN) if re.search(r"tic-grpo train .*qwen3_(1.7b_h200|1.7b_8gpus|8b_2nodes)", line)
]


@pytest.mark.parametrize("line", TRAINING)
def test_commands_for_gpus_have_the_papers_batches(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, (_, training, _) = parsed(line)
    schedule = RolloutSchedule.of(training, training.topology.processes)
    assert (schedule.update_responses, schedule.prompts, schedule.updates) == (512, 128, 4)
    assert schedule.update_responses // schedule.processes % 16 == 0  # a process's share holds complete groups
    assert (training.max_completion_length, training.learning_rate, training.num_train_epochs) == (18_000, 1e-6, 1)


def test_the_papers_run_is_shown_at_every_scale(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {parsed(line)[1][1].topology.processes for line in TRAINING} == {1, 4, 8, 16}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A folder with the data file and the reward function of the README."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text(blocks("json")[0])
    (tmp_path / "my_rewards.py").write_text(blocks("python")[0])
    return tmp_path


def test_the_first_command_trains_as_printed(own_data):
    (command,) = [block for block in blocks("bash") if "sums.jsonl" in block]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "tic-grpo"
    done = run_command([sys.executable, "-m", "tic_grpo_trl", *words[1:], "--report_to", "none"], own_data)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((own_data / "runs/mine/summary.json").read_text())["updates"] == 3 * 4  # epochs and K


def test_the_trainer_trains_as_printed(own_data, monkeypatch):
    """But for the model, the batch and the settings of this machine."""
    monkeypatch.setattr(tic_grpo_trl, "TICGRPOConfig", lambda *args, **fields: TICGRPOConfig(*args, **fields | SHORT))
    names: dict = {"dataset": Dataset.from_json("sums.jsonl")}
    for code in blocks("python"):
        exec(compile(code.replace("Qwen/Qwen3-0.6B", STARTER_MODEL), "README.md", "exec"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == SHORT["max_steps"]
    assert trainer.reward_func_names == ["correct"]


SHORT = {"responses_per_update": 8, "max_steps": 4, "disable_tqdm": True, "save_strategy": "no", **CPU}
