"""The README's commands and arithmetic: accelerate and the script know every flag, and every batch is the papers'."""

import re
import shlex

import pytest
from accelerate.commands.launch import launch_command_parser
from launching import ROOT
from trl import ModelConfig, TrlParser

from tic_grpo_trl.dry_run.plan import plan_for
from tic_grpo_trl.rollout.schedule import RolloutSchedule
from tic_grpo_trl.scripts.train import TrainArguments


README = (ROOT / "README.md").read_text()
SCRIPT = "tic_grpo_trl.scripts.train"


def commands():
    """The lines of all shell blocks that launch the script, without placeholders and comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.replace("…", "").replace("<address of the first node>", "10.0.0.1") for line in lines if SCRIPT in line
    ]


# not the template with CONFIG, FLAGS and RECIPE
LAUNCHED = [line for line in commands() if "CONFIG" not in line]


def parsed(line):
    """accelerate's arguments and the script's, the latter as its dry run reads them: no GPU is needed."""
    words = shlex.split(line, comments=True)
    words = words[words.index("launch") + 1 :]
    at = words.index(SCRIPT)
    launch = launch_command_parser().parse_args(words[: at + 1])
    topology = ["--accelerate_config", launch.config_file]
    topology += ["--num_processes", str(launch.num_processes)] if launch.num_processes else []
    flags = [*words[at + 1 :], *topology]
    classes = (TrainArguments, plan_for(flags, {}), ModelConfig)
    return launch, TrlParser(classes).parse_args_and_config(flags)


def test_there_are_commands_for_every_scale():
    assert len(LAUNCHED) >= 5
    configs = {re.search(r"accelerate_configs/(\w+)\.yaml", line).group(1) for line in LAUNCHED}
    assert configs >= {"single_gpu", "zero2", "zero3", "zero3_two_nodes"}


@pytest.mark.parametrize("line", LAUNCHED)
def test_commands_are_known_to_accelerate_and_the_script(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    launch, (_, training, _) = parsed(line)
    assert (ROOT / launch.config_file).exists()
    assert training.steps_per_generation == 4 * training.gradient_accumulation_steps  # K


def test_a_mistyped_flag_is_noticed():
    with pytest.raises(ValueError, match="not used"):
        parsed(f"accelerate launch {SCRIPT} --steps_per_rollout 4")


def test_batches_are_the_papers():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", README, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 8, 16]
    for gpus, rows_per_pass, accumulation, steps in (map(int, row) for row in rows):
        share = rows_per_pass * accumulation
        assert share * gpus == 32 * 16  # responses of an update
        assert steps / accumulation == 128 / 32  # K
        assert share % 16 == 0  # whole groups


PAPERS = [line for line in LAUNCHED if "recipes/qwen3_1.7b_h200" in line or "recipes/qwen3_8b_2nodes" in line]


@pytest.mark.parametrize("line", PAPERS)
def test_commands_for_gpus_have_the_papers_batches(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, (_, training, _) = parsed(line)
    batches = RolloutSchedule.of(training, training.topology.processes)
    assert (batches.update_responses, batches.prompts, batches.updates) == (512, 128, 4)
    assert batches.update_responses // batches.processes % 16 == 0  # a process's share holds whole groups
    assert (training.max_completion_length, training.learning_rate, training.num_train_epochs) == (18_000, 1e-6, 1)


def test_the_papers_run_is_shown_at_every_scale():
    assert {parsed(line)[1][1].topology.processes for line in PAPERS} == {1, 4, 8, 16}
