"""Evaluate the starter end to end with transformers: samples, resuming, adapters, and the trainer's own Avg@k."""

import json
import multiprocessing
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CPU
from data_files import EVALUATION_EXAMPLES, livecodebench_example, write
from datasets import Dataset
from launching import finish, started
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.evaluation import EvaluationConfig, average_at_k, evaluate
from tic_grpo_trl.evaluation.sampling import Sampling, load_tokenizer, to_answer, transformers_sampler
from tic_grpo_trl.evaluation.scoring import choose_reward, score
from tic_grpo_trl.starter import STARTER_MODEL, exact_match_reward, make_dataset


FLAGS = "--limit 40 --k 3 --batch_size 16 --seed 5".split()  # 120 samples in 8 batches, the last one of 8


def settings(folder, **more):
    return EvaluationConfig(output_dir=str(folder), limit=40, k=3, batch_size=16, seed=5, **more)


def samples_of(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(settings(folder))


def test_every_sample_is_kept_and_counted(run):
    folder, result = run
    samples, one = samples_of(folder), result["sets"]["starter"]
    problems = make_dataset("test", 40)
    assert [(s["problem"].split(":")[0], s["sample"]) for s in samples] == [
        (str(i), j) for i in range(40) for j in range(3)
    ]
    tokenizer = AutoTokenizer.from_pretrained(STARTER_MODEL)
    for i, one_sample in enumerate(samples):
        assert one_sample["prompt"] == problems[i // 3]["prompt"]
        right = exact_match_reward([one_sample["completion"]], [problems[i // 3]["solution"]])
        assert [one_sample["reward"]] == right
        # a token per character, a box counts as one; the end is counted where there is one
        length = len(tokenizer(one_sample["completion"]).input_ids)
        assert one_sample["tokens"] == length + (not one_sample["truncated"])
    # problems have three samples each
    means = [sum(s["reward"] for s in samples[i : i + 3]) / 3 for i in range(0, 120, 3)]
    assert one["average"] == pytest.approx(sum(means) / 40)
    assert list(one["means"].values()) == pytest.approx(means)
    assert 0.15 < one["average"] < 0.55
    assert one["interval"][0] < one["average"] < one["interval"][1]
    assert (one["metric"], one["k"], one["problems"], one["excluded"]) == ("Avg@3", 3, 40, 0)
    assert one["mean_tokens"] == pytest.approx(sum(s["tokens"] for s in samples) / 120)
    assert one["truncated"] == sum(s["truncated"] for s in samples) / 120
    assert len({s["completion"] for s in samples[:3]} | {s["completion"] for s in samples[3:6]}) > 2

    assert json.loads((folder / "results.json").read_text()) == result
    table = f"| Method | starter |\n| --- | --- |\n|  | (Avg@3) |\n| starter | {100 * one['average']:.2f} |\n\n"
    assert (folder / "table.md").read_text().startswith(table)
    assert result["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in result["versions"]["torch"]


def test_a_killed_run_resumes_to_the_same_result(run, tmp_path):
    whole, result = run
    folder, log = tmp_path / "killed", tmp_path / "log.txt"
    child = multiprocessing.get_context("fork").Process(target=evaluate, args=(settings(folder),))
    child.start()
    written, deadline = folder / "samples.jsonl", time.monotonic() + 120
    while not (written.exists() and written.stat().st_size) and time.monotonic() < deadline:
        assert child.is_alive()
        time.sleep(0.005)
    child.kill()
    child.join()
    survived = (folder / "samples.jsonl").read_bytes()
    expected = (whole / "samples.jsonl").read_bytes()
    assert 0 < len(survived) < len(expected)
    assert not (folder / "results.json").exists()

    with started(
        [sys.executable, "-m", "tic_grpo_trl.scripts.evaluate", "--output_dir", folder, *FLAGS], log
    ) as process:
        finish(process, log, 240)
    assert (folder / "samples.jsonl").read_bytes() == expected
    assert json.loads((folder / "results.json").read_text())["sets"] == result["sets"]
    printed = log.read_text()
    done = int(re.search(r"(\d+) of 8 batches already done", printed)[1])
    assert done == survived.count(b"\n") // 16 > 0
    assert (folder / "table.md").read_text() in printed


def test_a_finished_run_samples_nothing(run, monkeypatch):
    folder, result = run
    before = (folder / "samples.jsonl").read_bytes()
    monkeypatch.setattr("tic_grpo_trl.evaluation.run.make_sampler", None)  # would fail if it were called
    assert evaluate(settings(folder)) == result
    assert (folder / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": 0.5}, "sets.starter.temperature: 1.0, now 0.5"),
        ({"max_completion_length": 30}, "sets.starter.max_completion_length: 48, now 30"),
        ({"dtype": "bfloat16"}, "dtype: auto, now bfloat16"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(run, change, says):
    with pytest.raises(ValueError, match=rf"other settings.*{says}"):
        evaluate(settings(run[0], **change))


def test_other_weights_in_the_same_folder_are_refused(tmp_path):
    shutil.copytree(STARTER_MODEL, tmp_path / "model")
    config = {"model_name_or_path": str(tmp_path / "model"), "limit": 4, "k": 1, "output_dir": str(tmp_path / "out")}
    evaluate(EvaluationConfig(**config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"other settings.*weights"):
        evaluate(EvaluationConfig(**config))


def test_mistakes_end_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("tic_grpo_trl.evaluation.run.make_sampler", None)
    folder = tmp_path / "out"
    (tmp_path / "empty.jsonl").touch()
    empty = str(tmp_path / "empty.jsonl")
    for change, error, says in (
        ({"datasets": ["aime26"]}, ValueError, "^--datasets aime26: there is no data set"),
        ({"datasets": ["aime24@nowhere.parquet"]}, FileNotFoundError, "^--datasets aime24.* 'nowhere.parquet'"),
        ({"datasets": [empty]}, ValueError, f"^--datasets {empty}: the file is empty"),
        ({"model_name_or_path": "./nope"}, ValueError, "^--model_name_or_path ./nope does not exist"),
        ({"model_name_or_path": "foo/bar"}, ConnectionError, "^--model_name_or_path foo/bar: its config.json cannot"),
        ({"max_completion_length": 250}, ValueError, r"do not fit into 256 positions: give --max_completion_length 2"),
        ({"reward_func": "nothing.here"}, ValueError, "--reward_func nothing.here: there is no module"),
    ):
        with pytest.raises(error, match=says):
            evaluate(EvaluationConfig(output_dir=str(folder), **change))
    assert not folder.exists()


def test_own_data_and_reward(tmp_path, monkeypatch):
    rows = [
        {"prompt": [{"role": "user", "content": f"{terms}=?"}], "solution": right}
        for terms, right in (("1+2+3", "6"), ("4+4+1", "9"))
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_scores.py").write_text(
        "def with_a_box(completions, solution, log_extra, **kwargs):\n"
        "    log_extra('right', solution)\n"
        "    return [None if s == '9' else float('boxed' in c[0]['content']) for c, s in zip(completions, solution)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = {"datasets": ["mine.jsonl"], "reward_func": "my_scores.with_a_box", "max_completion_length": 40}
    result = evaluate(EvaluationConfig(**config, output_dir=str(tmp_path / "out")))
    one = result["sets"]["mine"]
    assert (one["metric"], one["problems"], one["excluded"]) == ("Avg@1", 1, 1)
    first, second = samples_of(tmp_path / "out")
    assert (first["right"], second["right"], second["reward"]) == ("6", "9", None)
    assert one["average"] == first["reward"] == float("boxed" in first["completion"])


# What is sampled


def prompts_of(tokenizer, size, **kwargs) -> list[list[int]]:
    prompts = make_dataset("test", size, **kwargs)["prompt"]
    return [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]


def test_the_model_s_own_generation_settings_do_not_leak(tmp_path):
    """Qwen3's would: top_k 20, top_p 0.95, temperature 0.6. Its list of ends counts, though."""
    shutil.copytree(STARTER_MODEL, tmp_path / "model")
    path = tmp_path / "model/generation_config.json"
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    newline = tokenizer("\n").input_ids[0]
    own = {"top_k": 1, "top_p": 0.01, "temperature": 0.01, "repetition_penalty": 9.0, "min_new_tokens": 40}
    prompts, seeds = prompts_of(tokenizer, 60), [7] * 60

    def answers(ends, temperature=1.0):
        path.write_text(json.dumps(own | {"do_sample": True, "eos_token_id": ends}))
        sampling = Sampling(temperature, 1.0, 48)
        return transformers_sampler(str(tmp_path / "model"), tokenizer)(prompts, seeds, sampling)

    plain = transformers_sampler(STARTER_MODEL, tokenizer)
    assert answers(tokenizer.eos_token_id) == plain(prompts, seeds, Sampling(1.0, 1.0, 48))
    greedy = answers(tokenizer.eos_token_id, temperature=0.0)
    assert greedy == plain(prompts, seeds, Sampling(0.0, 1.0, 48))
    assert greedy != answers(tokenizer.eos_token_id)
    ended = answers([tokenizer.eos_token_id, newline])
    assert any(answer.text.endswith("\n") for answer in ended)
    assert all("\n" not in answer.text[:-1] for answer in ended)


def test_the_whole_distribution_is_sampled(tmp_path):
    """Of a model for which all 104 tokens are about equally likely: no top-k, and of top-p what was asked for."""
    model = AutoModelForCausalLM.from_pretrained(STARTER_MODEL)
    with torch.no_grad():
        model.model.norm.weight.mul_(1e-3)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(STARTER_MODEL).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    sampler, prompt = transformers_sampler(str(tmp_path), tokenizer), prompts_of(tokenizer, 1)

    def first_tokens(top_p):
        return len({answer.text for answer in sampler(prompt * 1500, [0] * 1500, Sampling(1.0, top_p, 1))})

    assert first_tokens(1.0) > 95
    assert 15 < first_tokens(0.2) < 30


def test_padding_changes_nothing():
    """Greedy answers in one batch of prompts of three and of six terms are those of each prompt alone."""
    tokenizer = load_tokenizer(STARTER_MODEL)
    prompts = prompts_of(tokenizer, 6, term_counts=(3,)) + prompts_of(tokenizer, 6, term_counts=(6,))
    assert len({len(prompt) for prompt in prompts}) == 2
    sampler, greedy = transformers_sampler(STARTER_MODEL, tokenizer), Sampling(0.0, 1.0, 48)
    alone = [answer for prompt in prompts for answer in sampler([prompt], [0], greedy)]
    assert sampler(prompts, [0] * 12, greedy) == alone


def test_ends():
    tokenizer = load_tokenizer(STARTER_MODEL)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = tokenizer("1+2").input_ids
    ended = to_answer([*ids, end, pad, pad], tokenizer, [end])
    assert (ended.text, ended.tokens, ended.truncated) == ("1+2", 4, False)
    cut = to_answer(ids, tokenizer, [end])
    assert (cut.text, cut.tokens, cut.truncated) == ("1+2", 3, True)


def test_truncated_answers_are_counted(tmp_path):
    result = evaluate(EvaluationConfig(limit=6, k=1, max_completion_length=3, output_dir=str(tmp_path)))
    one = result["sets"]["starter"]
    assert (one["truncated"], one["mean_tokens"], one["average"]) == (1, 3, 0)


def test_an_adapter_is_evaluated_on_its_base(tmp_path):
    """With the tokenizer of its base, and with answers of the adapted model."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(STARTER_MODEL), LoraConfig(r=4, target_modules="all-linear")
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter/tokenizer_config.json").exists()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(STARTER_MODEL).save_pretrained(tmp_path / "merged")

    def completions(model):
        config = EvaluationConfig(model_name_or_path=str(model), limit=16, k=1, temperature=0)
        config.output_dir = str(tmp_path / f"{Path(model).name}-out")
        evaluate(config)
        return [sample["completion"] for sample in samples_of(config.output_dir)]

    adapted = completions(tmp_path / "adapter")
    assert adapted == completions(tmp_path / "merged")
    assert adapted != completions(STARTER_MODEL)


def test_the_trainer_s_evaluation_is_the_same_average(tmp_path):
    """`num_generations_eval` samples of each held-out problem: TRL's mean reward is Avg@k of what it sampled."""
    noted: dict[str, list[float]] = {}

    def accuracy(prompts, completions, solution, **kwargs):
        rewards = exact_match_reward(completions, solution)
        for prompt, reward in zip(prompts, rewards, strict=True):
            noted.setdefault(prompt[0]["content"], []).append(reward)
        return rewards

    trainer = TICGRPOTrainer(
        model=STARTER_MODEL,
        reward_funcs=accuracy,
        args=TICGRPOConfig(
            str(tmp_path),
            **CPU,
            num_generations=2,
            num_generations_eval=8,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=40,  # five problems at a time
            max_completion_length=48,
            disable_tqdm=True,
        ),
        train_dataset=make_dataset("train", 8),
        eval_dataset=make_dataset("test", 15),
    )
    logged = trainer.evaluate()
    assert sorted(map(len, noted.values())) == [8] * 15
    average = average_at_k(noted)
    assert 0 < average.value < 1
    assert logged["eval_rewards/accuracy/mean"] == pytest.approx(average.value)
    assert logged["eval_reward"] == pytest.approx(average.value)


def test_each_set_is_scored_by_what_its_solutions_are():
    tests = json.dumps({"tests": [{"input": "2\n", "output": "4\n", "type": "stdin"}], "function": None})
    programs = ["```python\nprint(2 * int(input()))\n```", "```python\nprint(5)\n```"]
    sums = [r"\boxed{\frac{1}{2}}", r"\boxed{0.25}"]
    for source, solution, texts in (("livecodebench", tests, programs), ("math500", "0.5", sums)):
        prompts = [[{"role": "user", "content": "?"}]] * 2
        problems = Dataset.from_dict({"prompt": prompts, "solution": [solution] * 2, "source": [source] * 2})
        columns = {"solution": problems["solution"][:], "source": problems["source"][:]}
        assert score(choose_reward(problems), prompts, texts, columns)[0] == [1.0, 0.0]


def test_the_papers_table_from_copies_of_its_sets(tmp_path):
    """All four columns: 32 samples of AIME's problems, greedy ones of the others, programs in the sandbox."""
    model = tmp_path / "TIC-GRPO"
    shutil.copytree(STARTER_MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    sets = []
    for name, rows in EVALUATION_EXAMPLES.items():
        sets.append(f"{name}@{write(tmp_path / f'{name}.parquet', rows[:2])}")
    sets.append(f"livecodebench@{write(tmp_path / 'livecodebench.jsonl', [livecodebench_example()])}")
    folder = tmp_path / "run"
    result = evaluate(EvaluationConfig(str(model), sets, max_completion_length=8, output_dir=str(folder)))
    found = {name: (one["metric"], one["problems"], one["average"]) for name, one in result["sets"].items()}
    assert found == {
        "aime24": ("Avg@32", 2, 0),
        "aime25": ("Avg@32", 2, 0),
        "math500": ("Avg@1", 2, 0),
        "livecodebench": ("Avg@1", 1, 0),
    }
    samples = samples_of(folder)
    assert len(samples) == 2 * 32 + 2 * 32 + 2 + 1
    assert samples[-1]["code_verdict"] == "no code"
    assert "Answer: $Answer" in samples[0]["prompt"][0]["content"]
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[0] == "| Method | AIME24 | AIME25 | MATH500 | LiveCodeBench |"
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["TIC-GRPO", "0.00", "0.00", "0.00", "0.00"]


def test_own_data_is_evaluated_as_it_is_trained_on(tmp_path, monkeypatch):
    """Plain prompts without instruction and chat template, which a base model lacks; renamed columns; an own reward."""
    model = tmp_path / "model"
    shutil.copytree(STARTER_MODEL, model)
    (model / "chat_template.jinja").unlink()
    write(tmp_path / "sums.jsonl", [{"question": f"{n}+2=?", "result": n + 2, "level": "easy"} for n in range(3)])
    (tmp_path / "my_score.py").write_text(
        "def length(completions, answer, level, **kwargs):\n"
        "    assert level == ['easy'] * 3\n"
        "    return [(len(text) + right) / 100 for text, right in zip(completions, answer)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    own = {"dataset_columns": ["prompt=question", "answer=result"], "reward_func": "my_score.length"}
    settings = (str(model), ["sums.jsonl"])
    evaluate(EvaluationConfig(*settings, output_dir="plain", max_completion_length=8, **own))
    samples = samples_of("plain")
    assert [sample["prompt"] for sample in samples] == ["0+2=?", "1+2=?", "2+2=?"]
    assert [sample["reward"] for sample in samples] == [
        (len(s["completion"]) + n + 2) / 100 for n, s in enumerate(samples)
    ]
    with pytest.raises(ValueError, match="model has no chat template"):
        evaluate(EvaluationConfig(*settings, output_dir="told", instruction="Q: {problem}", **own))
    with pytest.raises(ValueError, match="--reward_func: the data has no column `solution`"):
        evaluate(EvaluationConfig(*settings, output_dir="none", dataset_columns=["prompt=question"]))
