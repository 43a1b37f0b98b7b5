"""Test the dry run: what it counts, what it refuses, and that the real run then does just that."""

import json
import re
import subprocess
import sys

import pandas
import pytest
import torch
import yaml
from launching import CONFIGS, ON_CPU, ROOT, environment_of_script, run_script
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, Qwen3Config

from tic_grpo_trl.dry_run.memory import activation_bytes
from tic_grpo_trl.dry_run.plan import GB, Plan, load_model_config, plan_for
from tic_grpo_trl.scripts.train import parse
from tic_grpo_trl.starter import STARTER_MODEL


RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))
STARTER = ROOT / "examples/recipes/starter.yaml"


def planned(*flags, topology=None, processes=None, environ=None, recipe=STARTER):
    """Settings of a recipe, read as the script's dry run reads them."""
    contents = yaml.safe_load(recipe.read_text())
    if "accelerate_config" in contents:
        contents["accelerate_config"] = CONFIGS / f"{contents['accelerate_config']}.yaml"
    file = topology and CONFIGS / f"{topology}.yaml"
    config_class = plan_for(file, processes, {} if environ is None else environ, contents)
    words = ["--config", str(recipe), *flags]
    return parse(words, config_class)[1]


def run_dry(*arguments):
    """The script's dry run by plain `python`: its labels and texts, and what it printed."""
    command = [sys.executable, "-m", "tic_grpo_trl.scripts.train", *arguments, "--dry_run"]
    done = subprocess.run(
        list(map(str, command)), env=environment_of_script(), capture_output=True, text=True, timeout=300, check=False
    )
    return dict(re.findall(r"^  (\w[\w ]*?)  +(.*)$", done.stdout, re.MULTILINE)), done


def shown(plan):
    return dict(plan.lines())


def starter_plan(*flags, topology=None, **kwargs):
    config, note = load_model_config(STARTER_MODEL)
    problems = {"num_prompts": 8000, "longest_prompt": 21} | kwargs
    return Plan(planned(*flags, topology=topology), config, note, **problems)


def test_starter_on_one_process():
    lines = shown(starter_plan(eval_prompts=1000))
    assert lines["topology"] == "cpu.yaml: 1 process, nothing is sharded"
    assert lines["rollout"] == "32 prompts x 8 responses = 256 responses"
    assert lines["updates"].startswith("K = 4 of 64 responses (8 prompts), each in at most 1 pass of 64 responses")
    assert lines["run"] == "200 updates; an epoch of 8,000 prompts is 250 rollouts = 1,000 updates"
    assert lines["tokens"] == "at most 64 x (21 + 48) = 4.42k an update, 17.7k a rollout"
    assert lines["evaluation"] == "1,000 prompts x 1 = 1,000 responses"
    assert lines["weights"].strip() == "0.7 MB"  # 167 thousand parameters of 4 bytes


def test_starter_on_eight_processes_needs_no_eight():
    lines = shown(starter_plan(topology="zero3"))
    assert lines["topology"] == "zero3.yaml: 8 processes, DeepSpeed ZeRO-3"
    assert lines["rollout"] == "256 prompts x 8 responses = 2,048 responses"
    assert lines["run"].endswith("31 rollouts = 124 updates, 64 prompts left over")


def test_processes_alone_are_counted_once(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("use_cpu: true\noutput_dir: unused\n")
    assert shown(Plan(planned(recipe=recipe, processes=4), None))["topology"] == "4 processes, DDP"
    assert shown(Plan(planned(recipe=recipe), None))["topology"] == "1 process, nothing is sharded"


def test_epochs_count_where_no_number_of_updates_is_given():
    lines = shown(starter_plan("--max_steps", "-1", "--num_train_epochs", "1.5"))
    assert lines["run"].startswith("1,500 updates;")


def test_updates_that_span_rollouts_and_split_groups_are_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("use_cpu: true\noutput_dir: unused\n")
    flags = "--gradient_accumulation_steps 3 --steps_per_generation 4".split()
    spanning = Plan(planned(*flags, recipe=recipe), None)
    assert "make steps_per_generation a multiple" in shown(spanning)["updates"]
    assert "groups are split" in shown(starter_plan("--per_device_train_batch_size", "4"))["updates"]
    assert "on-policy" in shown(starter_plan("--updates_per_rollout", "1"))["updates"]


def test_responses_in_flight_are_counted_with_carry_over():
    assert "in flight" not in shown(starter_plan())
    lines = starter_plan("--max_carry_over", "2", "--oversampling", "1.5").lines()
    assert dict(lines)["in flight"] == (
        "at most 48 prompts x 8 responses, each at most 2 rollouts late; the behaviour policy is the sampler"
    )
    changed = starter_plan("--max_carry_over", "1", "--num_iterations", "2").lines()
    order = [label for label, _ in changed]
    assert order[:7] == ["topology", "model", "rollout", "in flight", "updates", "batch", "run"]
    assert "on-policy" not in shown(starter_plan("--max_carry_over", "1", "--updates_per_rollout", "1"))["updates"]


def test_unknown_data_leaves_the_rest():
    assert shown(starter_plan(num_prompts=None))["run"].startswith("200 updates, the length of an epoch is unknown")


def test_launched_topology_is_read_and_nothing_is_started():
    environ = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere", "HOME": "/"}
    environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    args = planned(environ=environ)
    assert (args.topology.processes, args.topology.zero_stage, args.world_size) == (4, 2, 4)
    assert args.distributed_state.num_processes == 1
    assert set(environ) == {"MASTER_ADDR", "HOME"}
    assert plan_for(None, None, {"RANK": "1", "WORLD_SIZE": "4"}) is None


def test_batch_sizes_are_checked_before_trl_sees_them():
    with pytest.raises(ValueError, match=r"Nearest: per_device_train_batch_size 63 or 70; .*num_generations 4 or 8\."):
        planned("--num_generations", "7", "--updates_per_rollout", "1")


def test_a_flag_wins_over_the_launcher_and_the_launcher_over_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("accelerate_config: zero3\nnum_processes: 2\nuse_cpu: true\noutput_dir: unused\n")
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "4"}

    def topology(**chosen):
        chosen = planned(recipe=recipe, **chosen).topology
        return chosen.kind, chosen.processes

    assert topology() == ("DeepSpeed ZeRO-3", 2)
    assert topology(processes=6) == ("DeepSpeed ZeRO-3", 6)
    assert topology(environ=dict(launched)) == ("FSDP2", 4)
    assert topology(environ=dict(launched), topology="zero2") == ("DeepSpeed ZeRO-2", 8)
    assert topology(topology="multi_gpu", processes=3) == ("DDP", 3)
    recipe.write_text("use_cpu: true\noutput_dir: unused\n")
    assert topology() == ("nothing is sharded", 1)
    assert topology(processes=2) == ("DDP", 2)


def test_a_number_of_processes_that_cannot_be_is_refused(tmp_path):
    launched = {"WORLD_SIZE": "4"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_processes: 0\nuse_cpu: true\noutput_dir: unused\n")
    for chosen in ({"processes": 0}, {"processes": 0, "environ": launched}, {"topology": "zero3", "processes": 0}):
        with pytest.raises(ValueError, match=r"^num_processes 0: give a whole number"):
            planned(**chosen)
    with pytest.raises(ValueError, match=r"^num_processes 0: give a whole number"):
        planned(recipe=recipe)


@pytest.mark.parametrize(
    ("recipe", "flags", "topology", "processes", "says"),
    [
        ("starter", "", None, None, None),
        ("starter", "", "zero3", None, "512 responses per update, 8 times the recipe's 64"),
        ("starter", "--per_device_train_batch_size 32", "multi_gpu", 2, None),
        (
            "starter",
            "--updates_per_rollout 8 --per_device_train_batch_size 48",
            None,
            None,
            "48 responses per update instead of the recipe's 64; K = 8 instead of the recipe's 4",
        ),
        ("starter", "--num_iterations 2", None, None, "K = 8 instead of the recipe's 4"),
        ("qwen3_1.7b_h200", "", "zero2", 8, None),
        ("qwen3_1.7b_8gpus", "", None, 4, None),
        ("qwen3_1.7b_8gpus", "--responses_per_update 4096", None, None, "4,096 responses per update, 8 times"),
    ],
)
def test_batches_other_than_the_recipes_are_named(recipe, flags, topology, processes, says):
    path = ROOT / f"examples/recipes/{recipe}.yaml"
    lines = shown(Plan(planned(*flags.split(), topology=topology, processes=processes, recipe=path), None))
    assert lines.get("batch", "").startswith(says) if says else "batch" not in lines


def test_a_recipe_without_a_topology_is_compared_on_the_planned_one(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("per_device_train_batch_size: 8\nuse_cpu: true\noutput_dir: unused\n")
    assert "batch" not in shown(Plan(planned(recipe=recipe, processes=4), None))
    changed = shown(Plan(planned("--per_device_train_batch_size", "16", recipe=recipe, processes=4), None))
    assert changed["batch"] == "64 responses per update, 2 times the recipe's 32"
    recipe.write_text("responses_per_update: 64\nper_device_train_batch_size: 48\noutput_dir: unused\n")
    needs_the_flag = shown(Plan(planned("--per_device_train_batch_size", "16", recipe=recipe), None))
    assert "batch" not in needs_the_flag


def test_evaluations_that_repeat_prompts_are_named():
    papers = ROOT / "examples/recipes/qwen3_1.7b_h200.yaml"

    def evaluation(*flags, prompts=30, processes=8):
        args = planned(*flags, recipe=papers, topology="multi_gpu", processes=processes)
        return shown(Plan(args, None, eval_prompts=prompts))["evaluation"]

    assert evaluation() == "30 prompts x 32 = 960 responses"
    assert evaluation("--responses_per_eval_batch", "7680") == (
        "30 prompts x 32 = 960 responses; 7,680 are generated, because the batches of 8 processes x 960 are filled up "
        "with repeats. Set responses_per_eval_batch to 960"
    )
    starter = shown(Plan(planned(topology="zero2"), None, eval_prompts=1000))["evaluation"]  # 8 x 500
    assert starter.endswith("filled up with repeats. Set per_device_eval_batch_size to 125")
    # batches of 8 x 60 responses: 31 prompts need a third one
    repeated = evaluation("--responses_per_eval_batch", "480", prompts=31)
    assert repeated.endswith("1,440 are generated, because the batches of 8 processes x 60 are filled up with repeats")


SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
BIG = Qwen3Config(
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
)


def test_a_model_has_its_published_size():
    assert Plan(planned(), BIG).size.trained / 1e9 == pytest.approx(1.72, rel=2e-3)


def test_without_the_model_only_memory_is_missing():
    config, note = load_model_config("nobody/nothing")
    assert config is None
    lines = shown(Plan(planned(), None, note, num_prompts=8000, gpu_memory=GB))
    assert lines["rollout"] == "32 prompts x 8 responses = 256 responses"
    says = (
        "memory not estimated: --model_name_or_path nobody/nothing: its config.json cannot be read .*HF_HUB_OFFLINE is"
    )
    assert re.match(says, note)
    assert lines["model"] == note
    assert not {"memory", "weights", "activations", "sum"} & set(lines)


def test_a_name_that_is_like_a_local_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/starter").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--model_name_or_path runs/starer: .*Did you mean 'runs/starter'"):
        load_model_config("runs/starer")
    with pytest.raises(ValueError, match=r"--model_name_or_path \./nope does not exist"):
        load_model_config("./nope")


def test_memory_that_is_not_there_is_refused_with_a_batch_that_fits(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("use_cpu: true\noutput_dir: unused\n")
    flags = "--per_device_train_batch_size 16 --gradient_accumulation_steps 2 --steps_per_generation 8".split()
    flags += "--gradient_checkpointing true --max_completion_length 2048".split()
    with pytest.raises(ValueError, match=r"GB of each GPU, which has 40") as refused:
        Plan(planned(*flags, recipe=recipe), BIG, gpu_memory=40 * GB)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    size, window, steps = (int(re.search(rf"{name} (\d+)", str(refused.value)).group(1)) for name in names)
    assert (size * window, size * steps) == (32, 128)
    flags = [
        word for name, value in zip(names, (size, window, steps), strict=True) for word in (f"--{name}", str(value))
    ]
    flags += "--gradient_checkpointing true --max_completion_length 2048".split()
    fitting = Plan(planned(*flags, recipe=recipe), BIG, gpu_memory=40 * GB)
    assert sum(fitting.memory().values()) <= 40 * GB < sum(fitting.memory(2 * size).values())
    with pytest.raises(ValueError, match="a topology that shards more"):
        Plan(planned("--gradient_checkpointing", "true"), BIG, gpu_memory=20 * GB)


def test_a_batch_that_fits_is_proposed_by_what_was_given(tmp_path):
    flags = "--per_device_train_batch_size 16 --gradient_checkpointing true --max_completion_length 2048".split()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: unused\n")

    def proposal(*more):
        with pytest.raises(ValueError, match="Nearest: ") as refused:
            Plan(planned(*flags, *more, recipe=recipe), BIG, gpu_memory=40 * GB)
        return str(refused.value).partition("Nearest: ")[2]

    given = ["--responses_per_update", "64"]
    assert proposal(*given, "--updates_per_rollout", "4") == "per_device_train_batch_size 8."
    assert proposal(*given) == "per_device_train_batch_size 8 with steps_per_generation 8."
    assert proposal("--updates_per_rollout", "4") == (
        "per_device_train_batch_size 8 with gradient_accumulation_steps 2."
    )


def test_share_of_the_engine():
    flags = "--use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.25".split()
    plan = Plan(planned(*flags), BIG, longest_prompt=21, gpu_memory=100 * GB)
    assert plan.memory()["vLLM"] == 25 * GB
    # keys and values of a token: 2 x 28 layers x 8 heads x 128 numbers of 2 bytes; weights 2 bytes each
    tokens = int((25 * GB - 2 * plan.size.trained) / (2 * 28 * 8 * 128 * 2))
    assert f"{tokens / 1e3:.0f}k tokens ({tokens // 69} responses of full length)" in shown(plan)["vLLM"]
    asleep = Plan(planned(*flags, "--vllm_enable_sleep_mode", "true"), BIG, gpu_memory=100 * GB)
    assert "vLLM" not in asleep.memory()
    with pytest.raises(ValueError, match=r"Nearest: vllm_gpu_memory_utilization 0\.04\."):
        Plan(planned(*flags[:-1], "0.03"), BIG, gpu_memory=100 * GB)


def test_deepspeed_computes_in_bfloat16_and_adapters_split_the_counts():
    args = planned("--bf16", "true", topology="zero2")
    plan = Plan(args, BIG, gpu_memory=1000 * GB)
    assert plan.memory()["weights"] == 2 * plan.size.trained
    assert plan.size.stream == 2 * 2048
    adapter = LoraConfig(r=8, target_modules="all-linear")
    lora = Plan(planned("--bf16", "true"), BIG, peft_config=adapter)
    assert "of 1.73B parameters are trained" in shown(lora)["model"]
    assert (lora.autocast, lora.size.stream) == (True, 4 * 2048)
    assert not Plan(planned("--bf16", "true"), BIG, weight_dtype=torch.bfloat16).autocast


def test_activations_are_those_of_the_longest_responses():
    plan = starter_plan("--gradient_checkpointing", "true")
    assert plan.longest_response == 69
    assert plan.memory()["activations"] == activation_bytes(plan.size, 64 * 69, True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_dry_run(recipe, tmp_path):
    """On the recipe's own topology, with the model's configuration in a local folder."""
    topology = yaml.safe_load(recipe.read_text())["accelerate_config"]
    flags = ["--output_dir", tmp_path / "out"]
    if recipe.stem != "starter":
        (SMOLLM2 if recipe.stem == "smollm2_135m" else BIG).save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(STARTER_MODEL).save_pretrained(tmp_path / "model")
        flags += ["--model_name_or_path", tmp_path / "model"]
    lines, done = run_dry("--config", recipe, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert lines["topology"].startswith(f"{topology}.yaml")
    assert lines["updates"].startswith("K = 4 of ")
    assert {"model", "rollout", "run", "tokens", "weights", "gradients", "AdamW", "activations", "sum"} <= set(lines)
    assert "batch" not in lines
    if recipe.stem.startswith("qwen3_") and "lora" not in recipe.stem:  # the papers' batches
        assert lines["rollout"] == "128 prompts x 16 responses = 2,048 responses"
        assert lines["updates"].startswith("K = 4 of 512 responses (32 prompts)")
        assert "(2,000 + 18,000)" in lines["tokens"]
    assert ("in flight" in lines) == recipe.stem.endswith("_carry_over")
    assert not (tmp_path / "out").exists()


def test_real_run_does_what_the_dry_run_said(tmp_path):
    """One epoch of the starter: prompts, responses, updates and tokens of the plan against the run's own records."""
    flags = "--train_size 40 --test_size 16 --per_device_train_batch_size 8 --gradient_accumulation_steps 2".split()
    flags += "--num_iterations 2 --max_steps -1 --num_train_epochs 1 --eval_steps 100".split()
    flags += "--per_device_eval_batch_size 16 --num_generations_eval 2 --log_completions".split()
    arguments = ("--config", STARTER, "--output_dir", tmp_path, *flags)
    said, _ = run_dry(*arguments)
    # 8 x 8 = 64 responses = 8 prompts; 40 prompts = 5 rollouts; each 8/2 mini-batches, twice
    assert said["rollout"] == "8 prompts x 8 responses = 64 responses"
    assert said["updates"].startswith("K = 8 of 16 responses (2 prompts)")
    assert said["run"] == "40 updates; an epoch of 40 prompts is 5 rollouts = 40 updates"
    assert said["evaluation"] == "16 prompts x 2 = 32 responses"

    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 40
    rollouts = [entry for entry in state["log_history"] if "reward" in entry]
    assert len(rollouts) == 5
    most = 64 * (int(re.search(r"\((\d+) \+", said["tokens"]).group(1)) + 48)
    assert 0 < rollouts[0]["num_tokens"] <= most
    assert max(int(k) for k in re.findall(r"inner_(\d+)/ess", json.dumps(state["log_history"]))) == 8
    tables = sorted((tmp_path / "completions").glob("*.parquet"))
    assert {len(pandas.read_parquet(table)) for table in tables} == {64, 32}  # of rollouts and of the evaluation


def test_launched_by_accelerate_only_the_first_process_speaks():
    done = run_script("--config", STARTER, "--dry_run", config=CONFIGS / "zero3.yaml", flags=ON_CPU)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("topology         as launched: 2 processes, DeepSpeed ZeRO-3") == 1
    assert "64 prompts x 8 responses = 512 responses" in done.stdout


def test_refusals_of_the_script(tmp_path):
    out = ("--output_dir", tmp_path / "out")
    _, done = run_dry("--config", STARTER, "--per_device_train_batch_size", "3", *out)
    assert done.returncode == 2
    assert "per_device_train_batch_size 3 x" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    late = tmp_path / "late.yaml"
    late.write_text("dry_run: true\nuse_cpu: true\nbf16: false\n")
    assert "give it as a flag, --dry_run" in run_script("--config", late, *out).stderr
    assert not (tmp_path / "out").exists()


def test_the_command_that_makes_a_model_is_named(tmp_path):
    """In the dry run beside the batches; the real run ends with it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {tmp_path}/made\nmodel_command: python make.py\noutput_dir: {tmp_path}/out\n"
    )
    says = f"--model_name_or_path {tmp_path}/made does not exist. This command makes it: python make.py"
    lines, _ = run_dry("--config", recipe, "--use_cpu", "--bf16", "false")
    assert lines["model"] == f"memory not estimated: {says}"
    assert lines["rollout"] == "1 prompt x 8 responses = 8 responses"
    done = run_script("--config", recipe, "--use_cpu", "--bf16", "false")
    assert done.returncode != 0
    assert says in done.stderr
    assert not (tmp_path / "out/config.json").exists()
