"""A task for lighteval: the starter's sums, from the local folder that the environment variable SUMS names."""

import os

from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def prompt(line, task_name=None):
    return Doc(task_name=task_name, query=line["problem"], choices=[line["answer"]], gold_index=0)


TASKS_TABLE = [
    LightevalTaskConfig(
        name="sums",
        prompt_function=prompt,
        hf_repo=os.environ["SUMS"],
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        few_shots_split=None,
        few_shots_select=None,
        generation_size=48,
        metrics=[Metrics.avg_at_n_math(sample_params={"n": 1})],
        stop_sequence=[],
        version=0,
    )
]
