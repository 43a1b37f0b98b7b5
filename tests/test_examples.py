"""The training script end to end through `accelerate launch`, as a user starts it."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tic_grpo_trl.starter import STARTER_MODEL


ROOT = Path(__file__).parent.parent
QUICK = (
    "--per_device_train_batch_size 16 --steps_per_generation 4 --starter_train_size 64 --starter_test_size 16".split()
)
QUICK += "--per_device_eval_batch_size 16 --max_steps 8 --eval_steps 8".split()


def launch(
    *arguments, config="accelerate_configs/cpu.yaml", script="examples/train_tic_grpo.py", accelerate=(), cwd=ROOT
):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / config), *accelerate]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run(
        [*command, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train(output_dir, *arguments, **kwargs):
    recipe = ROOT / "examples/recipes/starter.yaml"
    done = launch("--config", recipe, "--output_dir", output_dir, *arguments, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starter")
    return folder, train(folder, *QUICK)


def test_run_folder_holds_what_the_readme_says(run):
    folder, done = run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 8
    assert 0 < summary["accuracy_before"] < 1
    assert 0 < summary["accuracy_after"] < 1
    assert summary["seconds"] > 0
    assert (summary["arm"], summary["clip_mode"], summary["seed"]) == ("tic_grpo", "up_only", 0)
    assert set(summary["versions"]) == {"tic-grpo-trl", "trl", "transformers", "torch", "accelerate"}
    assert (folder / "curves.png").stat().st_size > 20_000
    assert "tic-grpo" in (folder / "README.md").read_text()
    shown = f"held-out accuracy {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f} after 8 updates"
    assert shown in done.stdout

    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "trajectory_ratio/inner_4/ess" in entry]
    assert len(last) == 2  # K = 4: two rollouts
    assert [entry["step"] for entry in history if "reward" in entry] == [1, 5]


def test_progress_bar_shows_reward_and_effective_sample_size(run):
    _, done = run
    final = done.stderr.replace("\r", "\n")
    assert "reward=" in final
    assert "ess=" in final
    assert "FutureWarning" not in done.stderr
    assert done.stderr.count("settings in force") == 1


def test_saved_model_is_the_trained_one(run):
    folder, _ = run
    trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    start = AutoModelForCausalLM.from_pretrained(STARTER_MODEL).state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in trained.items())
    assert all(value.isfinite().all() for value in trained.values())


def test_own_model_data_reward_and_lora(tmp_path):
    """What a user with another model and data set does, by flags alone."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{a}+{b}+1=?"}], "parity": a % 2} for a in range(8) for b in (2, 3)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_rewards.py").write_text(
        "def parity_reward(completions, parity, **kwargs):\n"
        "    return [float(sum(map(ord, c[0]['content'])) % 2 == p) for c, p in zip(completions, parity)]\n"
    )
    train(
        tmp_path / "out",
        *"--per_device_train_batch_size 8 --num_generations 4 --max_steps 3".split(),
        *"--eval_strategy no --eval_on_start false".split(),
        *"--reward_funcs my_rewards.parity_reward --arm grpo_traj_is --epsilon 0.1 --epsilon_high 0.1".split(),
        *"--use_peft --lora_r 4 --lora_target_modules q_proj v_proj --learning_rate 1e-2".split(),
        *("--model_name_or_path", STARTER_MODEL, "--dataset_name", tmp_path / "data"),
        cwd=tmp_path,
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["accuracy_after"] is None
    assert (summary["arm"], summary["epsilon"], summary["updates"]) == ("grpo_traj_is", 0.1, 3)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(adapter) == 12  # A and B of two projections in three layers
    assert any(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert "rewards/parity_reward/mean" in history[0]


def test_mistakes_end_before_any_training(tmp_path):
    recipe = ("--config", ROOT / "examples/recipes/starter.yaml", "--output_dir", tmp_path / "out")
    wrong_reward = launch(*recipe, "--reward_funcs", "my_rewards.nothing")
    assert wrong_reward.returncode != 0
    assert "--reward_funcs my_rewards.nothing: give an import path" in wrong_reward.stderr
    wrong_option = launch(*recipe, "--epsilon", "0.2")
    assert wrong_option.returncode != 0
    assert "epsilon=0.2 has no effect with clip_mode='up_only'" in wrong_option.stderr
    assert not (tmp_path / "out").exists()


def test_recipe_resumes(tmp_path):
    saving = ["--save_strategy", "steps", "--save_steps", "4"]
    train(tmp_path, *QUICK, *saving)
    whole = load_file(tmp_path / "model.safetensors")
    train(tmp_path, *QUICK, *saving, "--resume_from_checkpoint", tmp_path / "checkpoint-4")
    resumed = load_file(tmp_path / "model.safetensors")
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "reward" in entry] == [1, 5]
    for name, value in resumed.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)


def test_cpu_config_is_known_to_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "accelerate_configs" / "cpu.yaml"
    loaded = load_config_from_file(str(path))
    assert loaded.use_cpu is True
    assert loaded.num_processes == 1
    assert all(hasattr(loaded, key) for key in yaml.safe_load(path.read_text()))


def in_two_processes(worker, tmp_path):
    """What a script of tests/workers noted in two real processes (DDP over gloo)."""
    config = tmp_path / "ddp.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\n"
        "mixed_precision: 'no'\nnum_machines: 1\nmachine_rank: 0\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = launch(
        tmp_path, config=config, script=f"tests/workers/{worker}.py", accelerate=("--main_process_port", port)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["num_processes"] == 2
    # what accelerate makes of MULTI_GPU on CPU: DDP over gloo
    assert result["distributed_type"] == "DistributedType.MULTI_CPU"
    return result


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    result = in_two_processes("ratio_metrics", tmp_path_factory.mktemp("ddp"))
    assert len(result["logged"]) == 4
    return result


def test_partition_by_prompt_over_processes(two_processes):
    prompts = [[tuple(p) for rank in ranks for p in rank] for ranks in two_processes["prompts"]]  # per mini-batch
    for first, second in (prompts[:2], prompts[2:]):  # the two mini-batches of a rollout
        assert not set(first) & set(second)
        assert len(set(first) | set(second)) == 8
        assert set(Counter(first + second).values()) == {4}


@pytest.fixture(scope="module")
def spanning(tmp_path_factory):
    """Runs in which two rows of a process make half of a group of four in every mini-batch."""
    return in_two_processes("partition", tmp_path_factory.mktemp("partition"))["cases"]


def flat(ranks):
    return [row for rank in ranks for row in rank]


@pytest.mark.parametrize(
    ("case", "mini_batches", "reuse", "rows_of_a_process"),
    [
        ("one micro-batch", 4, 1, 8),
        ("accumulation and reuse", 4, 2, 8),
        ("rollout cut inside a group", 3, 1, 6),
    ],
)
def test_groups_that_span_processes(spanning, case, mini_batches, reuse, rows_of_a_process):
    """No prompt in two mini-batches of a rollout, whole groups over the processes, every row once and unchanged."""
    run = spanning[case]
    windows, rollouts, per_rollout = run["windows"], run["generated"], mini_batches * reuse
    assert run["messages"] == []
    assert len(windows) == len(run["logged"]) == per_rollout * len(rollouts)
    for number, rollout in enumerate(rollouts):
        # the sampler hands the groups out in the order of the processes, where 6 rows are one and a half
        of_all = flat(rollout)
        groups = [[row["prompt"] for row in of_all[i : i + 4]] for i in range(0, len(of_all), 4)]
        assert all(group == [group[0]] * 4 for group in groups)
        assert [len(rank) for rank in rollout] == [rows_of_a_process] * 2

        own = windows[number * per_rollout : (number + 1) * per_rollout]
        used = {row["tag"]: row for row in of_all}
        for first in range(0, per_rollout, mini_batches):
            one_pass = own[first : first + mini_batches]
            assert [[len(rank) for rank in window] for window in one_pass] == [[2, 2]] * mini_batches
            rows = [flat(window) for window in one_pass]
            assert sorted(row["tag"] for window in rows for row in window) == sorted(used)  # every row once
            for window in rows:
                assert len({tuple(row["prompt"]) for row in window}) == 1  # one whole group: four rows
                rewards = [row["completion"].count(1) / 4 for row in window]  # count_a
                mean = sum(rewards) / 4
                assert [row["advantage"] for row in window] == pytest.approx([r - mean for r in rewards], abs=1e-6)
            assert len({tuple(window[0]["prompt"]) for window in rows}) == mini_batches  # disjoint
            assert [[row["tag"] for row in w] for w in rows] == [
                [row["tag"] for row in flat(w)] for w in own[:mini_batches]
            ]
        for row in (row for window in own for row in flat(window)):
            assert row | {"gap": 0.0} == used[row["tag"]]  # what was generated, value for value
            assert row["gap"] < 1e-5  # and its old log-probabilities are those of the model that generated it
    for step, entry in enumerate(run["logged"]):
        if step % per_rollout == 0:  # the weights have not moved yet
            assert max(abs(entry["trajectory_ratio/log_min"]), abs(entry["trajectory_ratio/log_max"])) < 1e-5
        else:
            assert entry["trajectory_ratio/log_std"] > 1e-4
    assert run["parameters"][0] == run["parameters"][1]
    assert run["moved"]


def test_exchanged_prompts_are_in_random_order_and_rows_padded(spanning):
    runs = [spanning[case] for case in ("one micro-batch", "accumulation and reuse", "rollout cut inside a group")]
    order = [min(row["tag"] for row in flat(window)) for window in runs[0]["windows"]]
    assert order[:4] != sorted(order[:4])
    assert [tag[1:] for tag in order[:4]] != [tag[1:] for tag in order[4:]]
    # the processes did hold rows of different widths; ids are padded with the pad token
    assert any(a != b for run in runs for a, b in zip(*run["widths"], strict=True))
    assert all(padding == [5] for run in runs for padding in run["padding"])


def test_a_run_resumed_inside_a_rollout_generates_and_exchanges_anew(spanning):
    run = spanning["resumed"]
    (rollout,) = run["generated"]
    assert len(run["windows"]) == 2  # of the 8 updates, 6 were done
    prompts = [{tuple(row["prompt"]) for row in flat(window)} for window in run["windows"]]
    assert [len(of_window) for of_window in prompts] == [1, 1]
    assert prompts[0] != prompts[1]
    tags = [row["tag"] for window in run["windows"] for row in flat(window)]
    assert len(set(tags)) == 8
    assert set(tags) < {row["tag"] for row in flat(rollout)}
    assert run["parameters"][0] == run["parameters"][1]


def test_rows_that_cannot_be_exchanged_are_named_and_responses_shuffled(spanning):
    """Only one process holds the obstacle; both take the other path."""
    run = spanning["rows that stay"]
    (message,) = run["messages"]
    assert "the rollout holds pictures, which cannot be exchanged" in message
    assert "Make per_device_train_batch_size * gradient_accumulation_steps a multiple of num_generations" in message
    (rollout,) = run["generated"]
    for rank in range(2):
        stayed = sorted(row["tag"] for window in run["windows"] for row in window[rank])
        assert stayed == sorted(row["tag"] for row in rollout[rank])
    assert any(len({tuple(row["prompt"]) for row in flat(window)}) > 1 for window in run["windows"])
    assert run["parameters"][0] == run["parameters"][1]


def test_ratio_metrics_are_global_over_processes(two_processes):
    """What rank 0 logs is computed from the rows of both."""
    result = two_processes
    for step, (logged, rows) in enumerate(zip(result["logged"], result["rows"], strict=True)):
        assert len(rows) == 2
        log_ratio = torch.tensor([row[1] for rank in rows for row in rank], dtype=torch.float64)
        assert len(log_ratio) == 16
        w = log_ratio.exp()
        assert logged["trajectory_ratio/ess"] == pytest.approx(
            (w.sum() ** 2 / (16 * w.square().sum())).item(), rel=1e-6
        )
        assert logged["trajectory_ratio/log_max"] == pytest.approx(log_ratio.max().item(), rel=1e-6)
        k = step % 2 + 1
        assert logged[f"trajectory_ratio/inner_{k}/log_std"] == pytest.approx(
            log_ratio.std(correction=0).item(), rel=1e-6, abs=1e-12
        )
        if k == 2:  # the ranks hold different rows, so one rank's figure would be wrong
            assert [row[1] for row in rows[0]] != [row[1] for row in rows[1]]
