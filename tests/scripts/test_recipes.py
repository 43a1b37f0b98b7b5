"""The papers' recipe end to end on files with the real schemas, and the data flags of the training script."""

import json
import logging
import re

import pandas
import pytest
import yaml
from data_files import EVALUATION_EXAMPLES, aime_examples, dapo_original, write
from launching import CONFIGS, ROOT, run_script
from trl import ModelConfig, TrlParser

from tic_grpo_trl import TICGRPOConfig
from tic_grpo_trl.rewards import code_reward, math_reward
from tic_grpo_trl.scripts import train
from tic_grpo_trl.starter import STARTER_MODEL, exact_match_reward


RECIPES = ROOT / "examples/recipes"
CPU = "--use_cpu --bf16 false --output_dir unused".split()


def load(*flags):
    """Load data and rewards as the script does for these flags."""
    parser = TrlParser((train.TrainArguments, TICGRPOConfig, ModelConfig))
    script_args, training_args, _ = parser.parse_args_and_config([*CPU, *map(str, flags)])
    data = train.load_data(script_args, training_args)
    return *data, train.reward_functions(script_args, training_args, data[0])


def test_papers_run_end_to_end(tmp_path):
    """The recipe's mixture, years, lengths, reward and AIME24 Avg@k, with a model and batch sizes for a CPU."""
    sums = [(f"{a}+{b}+2=?", str(a + b + 2)) for a in range(9) for b in (1, 4)]
    dapo = write(tmp_path / "dapo.parquet", dapo_original([*sums, ("1+" * 200 + "1=?", "201"), sums[0]]))
    aime = write(tmp_path / "aime.csv", aime_examples(1983, 2022, 2023, 2024))
    aime24 = write(tmp_path / "aime24.jsonl", EVALUATION_EXAMPLES["aime24"])
    done = run_script(
        *("--config", RECIPES / "qwen3_1.7b_h200.yaml", "--model_name_or_path", STARTER_MODEL),
        *("--dataset_name", f"dapo_math_17k@{dapo}+aime_1983_2022@{aime}", "--eval_dataset_name", f"aime24@{aime24}"),
        *("--instruction", "{problem}", "--max_prompt_length", 64, "--output_dir", tmp_path / "out"),
        *"--use_vllm false --use_cpu --bf16 false --gradient_checkpointing false --report_to none".split(),
        *"--num_generations 4 --per_device_train_batch_size 4 --responses_per_update 8".split(),
        *"--max_completion_length 32 --learning_rate 1e-4".split(),
        *"--num_generations_eval 8 --eval_steps 4 --responses_per_eval_batch 24 --save_strategy no".split(),
        config=CONFIGS / "single_gpu.yaml",
        flags="--num_processes 1 --mixed_precision no".split(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 21 prompts dropped: over 64 tokens" in done.stderr  # 18 sums, a long one, AIME 1983 and 2022
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["global_step"] == 2 * 4  # 20 prompts, 8 a rollout, K = 4
    evaluations = [entry for entry in state["log_history"] if "eval_rewards/math_reward/mean" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 4, 8]
    rollouts = [entry for entry in state["log_history"] if "rewards/math_reward/mean" in entry]
    assert [entry["step"] for entry in rollouts] == [1, 5]
    assert {"math_reward/no_answer", "math_reward/timeout"} <= set(rollouts[0])
    tables = [pandas.read_parquet(path) for path in sorted((tmp_path / "out/completions").glob("*.parquet"))]
    trained = pandas.concat(tables)  # one table per step, including AIME24's responses
    prompts = [messages[0]["content"] for messages in trained["prompt"]]
    assert len(set(prompts) - {"P0", "P1"}) == 16  # two rollouts of 8 prompts, no prompt twice
    assert 0 < trained["math_reward"].mean() < 1
    ratios = [value for entry in state["log_history"] for name, value in entry.items() if name.endswith("/log_std")]
    assert max(ratios) > 0  # the policy has moved
    assert "extracted_answer" in trained.columns
    assert "2023" not in "".join(prompts)
    card = (tmp_path / "out/README.md").read_text()
    assert f"| training data | dapo_math_17k@{dapo}+" in card


@pytest.mark.parametrize("name", ["qwen3_1.7b_h200", "qwen3_1.7b_8gpus", "qwen3_8b_2nodes"])
def test_every_value_of_the_papers_has_its_source(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    settings = yaml.safe_load(text)
    assert settings["dataset_name"] == "dapo_math_17k+aime_1983_2022"
    assert settings["algorithm"] == "tic_grpo"
    assert "soft_punish_cache" not in settings  # v5, Training Configuration: off
    for key in ("algorithm", "model_name_or_path", "dataset_name", "max_prompt_length", "eval_dataset_name"):
        assert re.search(rf"^{key}: .*  # (v5|the authors' run)", text, re.MULTILINE), key
    for key in ("max_completion_length", "num_train_epochs", "learning_rate", "lr_scheduler_type", "temperature"):
        assert re.search(rf"^{key}: .*  # (v5|the authors' run|verl)", text, re.MULTILINE), key
    assert (settings["learning_rate"], settings["num_generations"], settings["num_train_epochs"]) == (1e-6, 16, 1)
    assert (settings["responses_per_update"], settings["updates_per_rollout"]) == (512, 4)


def test_eight_gpus_take_the_papers_run():
    """Only where it runs and how much memory it has differ from the recipe for one GPU."""
    one, eight = (yaml.safe_load((RECIPES / f"qwen3_1.7b_{name}.yaml").read_text()) for name in ("h200", "8gpus"))
    differ = {name for name in one | eight if one.get(name) != eight.get(name)}
    assert differ == {
        *("accelerate_config", "num_processes", "gpu_memory", "vllm_gpu_memory_utilization", "output_dir"),
    }


@pytest.mark.parametrize(("name", "papers"), [("1.7b_carry_over", "1.7b_h200"), ("8b_carry_over", "8b_2nodes")])
def test_the_papers_runs_with_carry_over_differ_in_nothing_else(name, papers):
    carried, waiting = (yaml.safe_load((RECIPES / f"qwen3_{each}.yaml").read_text()) for each in (name, papers))
    differ = {name for name in carried | waiting if carried.get(name) != waiting.get(name)}
    assert differ == {"algorithm", "epsilon_high", "max_carry_over", "oversampling", "output_dir"}


def test_the_default_reward_is_what_the_solutions_ask_for(tmp_path):
    assert load("--train_size", 16)[2] == [exact_match_reward]
    assert load("--dataset_name", "few_shot_sums", "--train_size", 16)[2] == [exact_match_reward]
    sums = write(tmp_path / "sums.csv", [{"question": "1+1", "answer": 2}, {"question": "1+2", "answer": 3}])
    columns = ("--dataset_name", sums, "--dataset_columns", "prompt=question", "solution=answer")
    dataset, evaluation, rewards = load(*columns)
    assert (dataset["solution"][:], evaluation, rewards) == ([2, 3], None, [math_reward])
    tests = json.dumps({"tests": [{"input": "1", "output": "1", "type": "stdin"}], "function": None})
    programs = write(tmp_path / "programs/train.jsonl", [{"prompt": "Echo.", "solution": tests}])
    assert load("--dataset_name", programs.parent)[2] == [code_reward]
    assert load(*columns, "--reward_funcs", "tic_grpo_trl.rewards.answer_format_reward")[2][0].__name__ == (
        "answer_format_reward"
    )
    bare = write(tmp_path / "bare/train.jsonl", [{"prompt": "Hello"}])
    with pytest.raises(ValueError, match="the data has no column `solution`; name your own reward function"):
        load("--dataset_name", bare.parent)


def test_soft_overlong_punishment_is_that_of_dapo(tmp_path):
    *_, rewards = load("--train_size", 16, "--soft_punish_cache", 8, "--max_completion_length", 48)
    assert len(rewards) == 2
    ids = [[0] * n for n in (40, 44, 48, 49)]
    assert rewards[1](completion_ids=ids) == [0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="--soft_punish_cache 48 must be between 0 and max_completion_length 48"):
        load("--train_size", 16, "--soft_punish_cache", 48, "--max_completion_length", 48)


def test_evaluation_data_is_not_for_training(tmp_path):
    aime24 = write(tmp_path / "aime24.jsonl", EVALUATION_EXAMPLES["aime24"])
    with pytest.raises(ValueError, match="aime24 is for evaluation, not for training"):
        load("--dataset_name", f"aime24@{aime24}")
    aime = write(tmp_path / "aime.csv", aime_examples(1983, 1984))
    steps = "--eval_strategy steps --eval_steps 1 --num_generations_eval 1".split()
    with pytest.raises(ValueError, match="has no held-out data; add --eval_dataset_name, such as aime24"):
        load("--dataset_name", f"aime_1983_2022@{aime}", *steps)
    dataset, evaluation, _ = load(
        "--dataset_name", f"aime_1983_2022@{aime}", *steps, "--eval_dataset_name", f"aime24@{aime24}"
    )
    assert (len(dataset), len(evaluation)) == (2, 3)


def test_own_files_with_own_columns_train_and_evaluate(tmp_path):
    train = write(tmp_path / "train.csv", [{"question": f"{n}+1", "answer": n + 1} for n in range(4)])
    held_out = write(tmp_path / "held_out.csv", [{"question": "9+1", "answer": 10}])
    steps = "--eval_strategy steps --eval_steps 1 --num_generations_eval 1".split()
    columns = ("--dataset_columns", "prompt=question", "solution=answer")
    dataset, evaluation, _ = load("--dataset_name", train, "--eval_dataset_name", held_out, *columns, *steps)
    assert (dataset["solution"][:], evaluation["solution"][:]) == ([1, 2, 3, 4], [10])


def test_starter_evaluates_on_its_own_held_out_sums(caplog):
    with caplog.at_level(logging.INFO):
        dataset, evaluation, _ = load(
            *"--train_size 16 --test_size 8 --eval_strategy steps --eval_steps 1 --num_generations_eval 1".split()
        )
    assert (len(dataset), len(evaluation)) == (16, 8)
    assert not {str(prompt) for prompt in dataset["prompt"]} & {str(prompt) for prompt in evaluation["prompt"]}
