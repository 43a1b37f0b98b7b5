"""The files in accelerate_configs/: accelerate reads every one as it is meant, and each says when to choose it."""

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from launching import CONFIGS


FILES = sorted(CONFIGS.glob("*.yaml"))
# sections of a file, and the group of launch arguments that knows their keys
SECTIONS = {"deepspeed_config": "DeepSpeed Arguments", "fsdp_config": "FSDP Arguments"}


def known_keys(section):
    (group,) = (group for group in launch_command_parser()._action_groups if group.title == SECTIONS[section])
    return {action.dest for action in group._group_actions}


def unknown_keys(config):
    """Keys inside a section that accelerate would carry along and never read."""
    return [
        key
        for section, values in config.items()
        if isinstance(values, dict)
        for key in values
        if key not in known_keys(section)
    ]


def launch_arguments(path, *flags):
    """What `accelerate launch` makes of a file and its own flags."""
    args = launch_command_parser().parse_args(["--config_file", str(path), *flags, "script.py"])
    return _validate_launch_command(args)[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    loaded = load_config_from_file(str(path))  # raises for an unknown key outside the sections
    written = yaml.safe_load(path.read_text())
    assert all(hasattr(loaded, key) for key in written)
    assert unknown_keys(written) == []
    args = vars(launch_arguments(path))
    for key, value in {**written, **written.get("deepspeed_config", {}), **written.get("fsdp_config", {})}.items():
        if key not in ("compute_environment", "distributed_type", *SECTIONS):
            assert args[key] == value, key
    assert args["use_deepspeed"] == ("zero" in path.stem)
    assert args["use_fsdp"] == ("fsdp" in path.stem)
    assert args["multi_gpu"] == (path.stem == "multi_gpu")


def test_a_misspelt_key_is_found(tmp_path):
    assert unknown_keys({"deepspeed_config": {"zero_stage": 3, "offload_optimizer": "cpu"}}) == ["offload_optimizer"]
    assert unknown_keys({"fsdp_config": {"fsdp_version": 2, "fsdp_reshard": True}}) == ["fsdp_reshard"]
    path = tmp_path / "wrong.yaml"
    path.write_text("distributed_type: 'NO'\nnum_procs: 2\n")
    with pytest.raises(ValueError, match="num_procs"):
        load_config_from_file(str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_line_wins_over_the_file(path):
    """As it has to where a file for GPUs is tried out on a CPU."""
    args = launch_arguments(path, "--num_processes", "2", "--mixed_precision", "no")
    assert (args.num_processes, args.mixed_precision) == (2, "no")


def test_cpu_config_is_known_to_accelerate():
    loaded = load_config_from_file(str(CONFIGS / "cpu.yaml"))
    assert loaded.use_cpu is True
    assert loaded.num_processes == 1
