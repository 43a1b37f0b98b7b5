"""Evaluate on lighteval's sets by running lighteval in its own environment, with the same results and table."""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import load_dataset

from tic_grpo_trl.evaluation.run_folder import summarize, write_atomically, write_results
from tic_grpo_trl.evaluation.table import Result


@dataclass
class LightevalConfig:
    """Configure an evaluation by lighteval. The help text of each field describes it."""

    model_name_or_path: str = field(metadata={"help": "Model folder or hub id."})
    tasks: list[str] = field(
        default_factory=lambda: ["livecodebench=lcb:codegeneration_release_v6"],
        metadata={"help": "lighteval tasks as SET=TASK, where SET is the name in the results."},
    )
    name: str = field(default="", metadata={"help": "Name of the row in the table. Default: the model's name."})
    lighteval: str = field(
        default="lighteval", metadata={"help": "lighteval executable, which may be in another environment."}
    )
    backend: Literal["accelerate", "vllm"] = field(default="accelerate", metadata={"help": "lighteval's backend."})
    dtype: str = field(default="bfloat16", metadata={"help": "Data type of the weights."})
    max_completion_length: int = field(default=18_000, metadata={"help": "Longest answer in tokens."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt plus answer in tokens. Default: the model's limit."}
    )
    batch_size: int = field(default=1, metadata={"help": "Batch size of the backend accelerate."})
    custom_tasks: str | None = field(default=None, metadata={"help": "Python file with your own tasks."})
    limit: int | None = field(default=None, metadata={"help": "Use only this many problems of each task."})
    output_dir: str = field(default="", metadata={"help": "Run folder. Default: runs/evaluation/NAME-lighteval."})

    def __post_init__(self):
        self.name = self.name or Path(self.model_name_or_path).name
        self.output_dir = self.output_dir or str(Path("runs/evaluation", f"{self.name}-lighteval"))
        for task in self.tasks:
            if not all(task.partition("=")):
                raise ValueError(f"--tasks {task}: give SET=TASK, such as livecodebench=lcb:codegeneration_release_v6")

    def command(self, scratch: Path) -> list[str]:
        """Return the command line that runs all tasks greedily in the folder `scratch`.

        lighteval caches answers under the model's name, or in the model's folder if its path is absolute, and would
        reuse them after the weights change. A new name and cache for every run prevents that.
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
    """Run lighteval greedily, and write and return results as `evaluate` does, without lengths.

    lighteval runs LiveCodeBench's programs itself, with a time limit but **without a sandbox**.
    """
    folder = Path(config.output_dir)
    before = set(folder.glob("details/**/*.parquet"))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            command = config.command(Path(scratch))
            subprocess.run(command, check=True, cwd=scratch)
    except FileNotFoundError as error:
        raise ValueError(
            f"--lighteval {config.lighteval}: no such program; install lighteval in its own environment"
        ) from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"lighteval exited with status {error.returncode}: see its messages above") from error
    details = sorted(set(folder.glob("details/**/*.parquet")) - before)
    sets: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    for task in config.tasks:
        name, _, task_name = task.partition("=")
        found = [path for path in details if path.name.startswith(f"details_{task_name}|")]
        if len(found) != 1:
            raise ValueError(f"{task}: lighteval wrote {len(found)} details files to {folder}/details, expected one")
        task_samples = list(read_details(found[0], name))
        samples += task_samples
        sets[name] = summarize(task_samples, 1)
    result: Result = {"name": config.name, "sets": sets, "settings": vars(config) | {"command": command}}
    write_atomically(folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    write_results(folder, result)
    return result


def read_details(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield one sample for each problem of a task, in the data set's order: prompt, completion and reward."""
    stored = load_dataset("parquet", data_files=str(path), split="train")
    for detail in sorted(stored, key=lambda detail: int(detail["doc"]["id"])):  # lighteval shuffles them
        metrics, texts = detail["metric"], detail["model_response"]["text"]
        if len(set(metrics.values())) != 1 or len(texts) != 1:
            raise ValueError(
                f"{name}: lighteval reports {', '.join(metrics)} for {len(texts)} samples: give a task with one metric "
                "and one sample per problem"
            )
        yield {
            "set": name,
            "problem": detail["doc"]["id"],
            "sample": 0,
            "prompt": detail["doc"]["query"],
            "completion": texts[0],
            "reward": next(iter(metrics.values())),
        }
