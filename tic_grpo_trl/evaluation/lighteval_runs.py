"""Sets that lighteval brings, run by lighteval itself in an environment of its own, in the same results and table."""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import load_dataset

from .statistics import average_at_k
from .store import write_whole
from .table import Result, results_table


@dataclass
class LightevalConfig:
    """Settings of an evaluation by lighteval.

    Args:
        model_name_or_path (`str`): model folder or hub id.
        tasks (`list[str]`): lighteval's tasks, each as SET=TASK, where SET is the name in the results.
        name (`str`): the row's name in the table; the model's by default.
        lighteval (`str`): its executable, which may be another environment's.
        backend (`str`): lighteval's own: `accelerate` or `vllm`.
        dtype (`str`): of the weights.
        max_completion_length (`int`): longest answer in tokens.
        max_length (`int`, *optional*): positions for prompt and answer; the model's by default.
        batch_size (`int`): of the back end `accelerate`.
        custom_tasks (`str`, *optional*): file with tasks of your own.
        limit (`int`, *optional*): only so many problems of each task.
        output_dir (`str`): run folder; `runs/evaluation/NAME-lighteval` by default.
    """

    model_name_or_path: str = field(metadata={"help": "Model folder or hub id."})
    tasks: list[str] = field(
        default_factory=lambda: ["livecodebench=lcb:codegeneration_release_v6"],
        metadata={"help": "lighteval's tasks as SET=TASK, where SET is the name in the results."},
    )
    name: str = field(default="", metadata={"help": "The row's name in the table. Default: the model's."})
    lighteval: str = field(default="lighteval", metadata={"help": "lighteval's executable."})
    backend: Literal["accelerate", "vllm"] = field(default="accelerate", metadata={"help": "lighteval's back end."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the weights."})
    max_completion_length: int = field(default=18_000, metadata={"help": "Longest answer in tokens."})
    max_length: int | None = field(default=None, metadata={"help": "Positions. Default: the model's."})
    batch_size: int = field(default=1, metadata={"help": "Of the back end accelerate."})
    custom_tasks: str | None = field(default=None, metadata={"help": "File with tasks of your own."})
    limit: int | None = field(default=None, metadata={"help": "Only so many problems of each task."})
    output_dir: str = field(default="", metadata={"help": "Run folder. Default: runs/evaluation/NAME-lighteval."})

    def __post_init__(self):
        self.name = self.name or Path(self.model_name_or_path).name
        self.output_dir = self.output_dir or str(Path("runs/evaluation", f"{self.name}-lighteval"))
        for task in self.tasks:
            if not all(task.partition("=")):
                raise ValueError(f"--tasks {task}: give SET=TASK, such as livecodebench=lcb:codegeneration_release_v6")

    def command(self, scratch: Path) -> list[str]:
        """The command line that runs all tasks, greedily, from the folder `scratch`.

        lighteval keeps answers under the model's name, in the model's own folder where that is an absolute path, and
        would give those of older weights again: it gets another name and place for every run.
        """
        name = self.model_name_or_path
        if Path(name).is_dir():
            (scratch / "model").symlink_to(Path(name).resolve())
            name = "model"
        model: dict[str, Any] = {"model_name": name, "dtype": self.dtype, "cache_dir": scratch / "cache"}
        length = "max_length" if self.backend == "accelerate" else "max_model_length"
        model |= {length: self.max_length} if self.max_length else {}
        model |= {"batch_size": self.batch_size} if self.backend == "accelerate" else {}
        generation = f"{{temperature:0,max_new_tokens:{self.max_completion_length}}}"
        program = Path(self.lighteval)
        command = [str(program.resolve()) if program.exists() else self.lighteval, self.backend]
        command += [",".join(f"{key}={value}" for key, value in model.items()) + f",generation_parameters={generation}"]
        command += [",".join(f"{task.partition('=')[2]}|0" for task in self.tasks)]
        command += ["--output-dir", str(Path(self.output_dir).resolve()), "--save-details"]
        command += ["--custom-tasks", str(Path(self.custom_tasks).resolve())] if self.custom_tasks else []
        return command + (["--max-samples", str(self.limit)] if self.limit else [])


def evaluate_by_lighteval(config: LightevalConfig) -> Result:
    """Runs lighteval and writes `samples.jsonl`, `results.json` and `table.md` as `evaluate` does.

    Answers are greedy. LiveCodeBench's programs run in lighteval's own runner, which limits their time and shields them
    from accidents: it is **not** a sandbox.

    Args:
        config: model, tasks and settings.

    Returns:
        The content of `results.json`, as of `evaluate`; lengths are not known.

    Raises:
        ValueError: where lighteval is not there, fails or leaves no details, or a task has not one metric from 0 to 1.
    """
    folder = Path(config.output_dir)
    before = set(folder.glob("details/**/*.parquet"))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            command = config.command(Path(scratch))
            subprocess.run(command, check=True, cwd=scratch)
    except FileNotFoundError as error:
        raise ValueError(
            f"--lighteval {config.lighteval}: there is no such program: install lighteval in an environment of its own"
        ) from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"lighteval ended with status {error.returncode}: see its messages above") from error
    details = sorted(set(folder.glob("details/**/*.parquet")) - before)
    sets: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    for task in config.tasks:
        name, _, task_name = task.partition("=")
        found = [path for path in details if path.name.startswith(f"details_{task_name}|")]
        if len(found) != 1:
            raise ValueError(f"{task}: lighteval left {len(found)} files of details, expected one in {folder}/details")
        rows = list(read_details(found[0], name))
        samples += rows
        sets[name] = summarize_details(name, rows)
    result: Result = {"name": config.name, "sets": sets, "settings": vars(config) | {"command": command}}
    write_whole(folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    write_whole(folder / "results.json", json.dumps(result, indent=2) + "\n")
    write_whole(folder / "table.md", results_table([result]))
    return result


def read_details(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """One line for each problem of a task, in the data set's order: prompt, completion and reward.

    Raises:
        ValueError: for metrics that differ or several samples of a problem, where it is not clear what to report.
    """
    rows = load_dataset("parquet", data_files=str(path), split="train")
    for row in sorted(rows, key=lambda row: int(row["doc"]["id"])):  # lighteval shuffles them
        metrics, texts = row["metric"], row["model_response"]["text"]
        if len(set(metrics.values())) != 1 or len(texts) != 1:
            raise ValueError(
                f"{name}: lighteval reports {', '.join(metrics)} of {len(texts)} samples: give a task with one metric "
                "and one sample of each problem"
            )
        yield {
            "set": name,
            "problem": row["doc"]["id"],
            "sample": 0,
            "prompt": row["doc"]["query"],
            "completion": texts[0],
            "reward": next(iter(metrics.values())),
        }


def summarize_details(name: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A set's part of `results.json`."""
    average = average_at_k({sample["problem"]: [sample["reward"]] for sample in samples})
    return {
        "average": average.value,
        "metric": "Avg@1",
        "interval": list(average.interval),
        "sampling_error": None,
        "problems": average.problems,
        "excluded": average.excluded,
        "k": 1,
        "truncated": None,
        "mean_tokens": None,
        "means": average.means,
    }
