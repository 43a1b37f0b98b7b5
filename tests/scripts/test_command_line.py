"""Flags, YAML files, help and errors of the commands."""

import os
import signal
import sys
import time

import pytest
from launching import CONFIGS, QUICK, ROOT, launch_command, run_command, started

from tic_grpo_trl import ALGORITHMS
from tic_grpo_trl.scripts import evaluate, recipes, train
from tic_grpo_trl.scripts.command_line import short_errors, split_flags
from tic_grpo_trl.starter import TASKS


CPU = "--use_cpu --bf16 false --output_dir unused".split()


def refused(capsys, main, *words) -> str:
    """Run a command that refuses its settings, and return its only line."""
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--algoritm grpo", "Unknown flag --algoritm. Did you mean '--algorithm'?"),
        ("--learning-rat 1", "Did you mean '--learning_rate'?"),
        ("--learn 1e-5", "Unknown flag --learn"),  # a prefix is not an abbreviation
        ("starter", "'starter' is not a flag"),
        ("--algorithm tic_grop", "Unknown algorithm 'tic_grop'. Did you mean 'tic_grpo'?"),
        ("--max_steps many", "--max_steps"),
        ("--config startr", "Did you mean 'starter'?"),
        ("--config nowhere/my.yaml", "--config nowhere/my.yaml: there is no such file or recipe"),
        ("--config", "expected one argument"),
        ("--generation_kwargs {bad", "--generation_kwargs {bad: this is no valid JSON"),
        ("--learning_rate=-1", "learning_rate=-1.0 must be in [0, inf)"),
        ("--use_vllm true --dataset_name starter", "pip install 'tic-grpo-trl[vllm]'"),
        ("--accelerate_config zero3", "--accelerate_config is for `tic-grpo train`"),
        ("--num_processes 2", "--num_processes is for `tic-grpo train`"),
    ],
)
def test_errors_of_the_command_line_are_one_line(words, wanted, capsys):
    assert wanted in refused(capsys, train.main, *words.split())


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("lerning_rate: 1", "Unknown key 'lerning_rate' in the file of --config. Did you mean 'learning_rate'?"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("a: [1", "this is no valid YAML"),
        ("only text", "this file must have lines of the form `name: value`"),
        ("dry_run: true", "give it as a flag, --dry_run"),
        ("clip_mode: twosided", "Did you mean 'two_sided'?"),
    ],
)
def test_errors_of_a_yaml_file_are_one_line(content, wanted, tmp_path, capsys):
    (tmp_path / "my.yaml").write_text(content + "\n")
    assert wanted in refused(capsys, train.main, "--config", str(tmp_path / "my.yaml"))


def test_dry_run_and_evaluation_refuse_in_the_same_way(capsys):
    assert "Did you mean '--algorithm'?" in refused(capsys, train.main, "--dry_run", "--algoritm", "grpo")
    assert "Did you mean 'zero3'?" in refused(capsys, train.main, "--dry_run", "--accelerate_config", "zero9")
    assert "Did you mean '--datasets'?" in refused(capsys, evaluate.main, "--dataset", "aime24")


def test_one_line_under_the_launcher_from_every_process(tmp_path):
    """Both processes fail; the first speaks, and torchrun ends the other before it would."""
    command = [*launch_command(CONFIGS / "multi_gpu.yaml", "--num_processes", 2, "--mixed_precision", "no", "--cpu")]
    command += ["-m", "tic_grpo_trl.scripts.train", "--algorithm", "tic_grop", "--output_dir", tmp_path / "run"]
    done = run_command(command, ROOT)
    assert done.returncode != 0
    assert done.stderr.count("error: Unknown algorithm 'tic_grop'") == 1
    assert "train.py" not in done.stderr  # no traceback of ours


def test_an_output_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "run").write_text("")
    with pytest.raises(SystemExit) as exit_:
        train.main(["--config", "starter", "--output_dir", str(tmp_path / "run")])
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: --output_dir {tmp_path / 'run'}")
    assert "File exists" in last


def test_a_tracker_without_a_login(tmp_path):
    environment = {"WANDB_MODE": "online", "HOME": str(tmp_path), "WANDB_API_KEY": ""}
    changed = [f"{name}={value}" for name, value in environment.items()]
    flags = ["--config", "starter", "--output_dir", "run", "--report_to", "wandb", *QUICK]
    done = run_command(["env", *changed, sys.executable, "-m", "tic_grpo_trl", "train", *flags], tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: No API key configured.")
    assert "Traceback" not in done.stderr


def test_a_reward_that_fails_shows_its_own_lines_alone(tmp_path):
    (tmp_path / "rewards.py").write_text("def broken(completions, **kwargs):\n    return 1 / len([])\n")
    flags = ["--output_dir", "run", "--reward_funcs", "rewards.broken", *QUICK, "--eval_on_start", "false"]
    done = run_command([sys.executable, "-m", "tic_grpo_trl", "train", "--config", "starter", *flags], tmp_path)
    assert done.returncode == 1
    assert "return 1 / len([])" in done.stderr
    assert "transformers/trainer.py" not in done.stderr


def test_ctrl_c_while_libraries_load_ends_quietly(tmp_path):
    command, log = [sys.executable, "-m", "tic_grpo_trl", "train", "--config", "starter"], tmp_path / "log.txt"
    with started(command, log, cwd=tmp_path) as process:
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (-signal.SIGINT, 128 + signal.SIGINT)
    assert "Traceback" not in log.read_text()


def test_one_line_from_the_script_itself(tmp_path):
    """Run as a module, its name is `__main__`."""
    done = run_command([sys.executable, "-m", "tic_grpo_trl.scripts.train", "--load_in_4bit", "true", *CPU], tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --load_in_4bit without --use_peft")
    assert "Traceback" not in done.stderr


def test_flags_and_recipe_reach_the_dataclasses(tmp_path):
    words = ["--config=starter", *CPU, "--learning-rate", "2e-4"]
    script_args, training_args, model_args = train.parse(words, train.TICGRPOConfig)
    assert (training_args.learning_rate, training_args.max_steps) == (2e-4, 200)  # flag before file
    assert script_args.dataset_name == "starter"
    assert model_args.model_name_or_path is None


@pytest.mark.parametrize(
    ("flags", "dataset", "model", "longest", "held_out"),
    [
        ("--config starter", "starter", "starter", 48, 1000),
        ("--config starter --starter_task long_tail", "long_tail", "long_tail", 416, 300),
        ("--config=starter --starter-task=long_tail --test_size 20", "long_tail", "long_tail", 416, 20),
        (
            "--starter_task long_tail --dataset_name few_shot_sums --max_completion_length 40",  # given flags win
            *("few_shot_sums", "long_tail", 40, 300),
        ),
    ],
)
def test_the_starters_task_sets_what_is_not_given(flags, dataset, model, longest, held_out):
    script_args, training_args, model_args = train.parse([*flags.split(), *CPU], train.TICGRPOConfig)
    assert (script_args.dataset_name, script_args.test_size) == (dataset, held_out)
    assert training_args.max_completion_length == longest
    assert train.model_name(script_args, model_args) == TASKS[model].model
    model_args.model_name_or_path = "mine"
    assert train.model_name(script_args, model_args) == "mine"


@pytest.mark.parametrize(
    ("flags", "task", "name"),
    [
        ("--dataset_name long_tail", "starter", "long_tail"),
        ("--config starter --dataset_name long_tail", "starter", "long_tail"),
        ("--starter_task long_tail --dataset_name starter", "long_tail", "starter"),
    ],
)
def test_data_of_another_task_than_the_models_are_refused(flags, task, name):
    script_args, _, model_args = train.parse([*flags.split(), *CPU], train.TICGRPOConfig)
    with pytest.raises(ValueError, match=f"^--dataset_name {name}: .* task {task}; set --starter_task {name}, or give"):
        train.model_name(script_args, model_args)
    model_args.model_name_or_path = "mine"
    assert train.model_name(script_args, model_args) == "mine"


def test_an_unknown_task_of_the_starter():
    with pytest.raises(ValueError, match=r"starter_task.*'sums' \(choose from '?starter'?, '?long_tail'?\)"):
        train.parse(["--starter_task", "sums", *CPU], train.TICGRPOConfig)


def test_split_flags_takes_both_spellings():
    words = ["--num-processes", "2", "--config=a.yaml", "--learning_rate", "-1", "--num_process", "3"]
    others, found = split_flags(words, "config", "num_processes")
    assert found == {"config": "a.yaml", "num_processes": "2"}
    assert others == ["--learning_rate", "-1", "--num_process", "3"]


def test_help_shows_the_common_flags_and_help_all_every_one(capsys):
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as exit_:
            train.main([flag])
        assert exit_.value.code is None
        shown[flag] = capsys.readouterr().out
    assert all(f"--{name} " in shown["--help"] for of_section in train.SECTIONS.values() for name in of_section)
    assert all(name in shown["--help"] for name in ALGORITHMS)
    assert "--adam_beta2" not in shown["--help"]
    assert "--adam_beta2" in shown["--help-all"]
    assert len(shown["--help"].splitlines()) < 60


def test_defects_keep_their_traceback():
    def defect():
        raise ValueError("not about a setting")

    with pytest.raises(ValueError, match="not about"), short_errors():
        defect()
    with pytest.raises(ValueError, match="no such"), short_errors(lambda: False):  # training has begun
        recipes.recipe_path("nowhere")


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("TIC_GRPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such file or recipe"), short_errors():
        recipes.recipe_path("nowhere")


def test_commands_of_the_module(tmp_path):
    def run(*words):
        return run_command([sys.executable, "-m", "tic_grpo_trl", *words], tmp_path)

    assert "dry-run" in run().stdout
    wrong = run("trian")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    wrong = run("recipes", "startre")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: startre: there is no such recipe or accelerate config. Did you mean 'starter'?\n",
    )
    plan = run("dry-run", "--config", "starter", "--max_steps", "12")
    assert plan.returncode == 0, plan.stderr
    assert "12 updates" in plan.stdout
    assert os.listdir(tmp_path) == []
