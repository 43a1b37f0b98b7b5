"""The tables of `log_completions`: each response's trajectory ratio, and how many tables are kept."""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from trl.trainer.utils import strip_images_from_messages

from ..checkpoint.storage import restore_containers
from ..config import TICGRPOConfig
from ..forward.responses import loss_mask


class _NoRatio(float):
    """A NaN that a console shows as nothing, and that files and trackers store as a missing number.

    TRL prints `str` of each entry and stores the same entries as a column of floats, so it has to be both.
    """

    def __str__(self) -> str:
        return ""


NO_RATIO = _NoRatio("nan")


@dataclass
class CompletionsTable:
    """
    Add a column `trajectory_ratio` to TRL's table of completions.

    It holds w' = P_θ/P_old of each response as of its latest update, and nothing for responses that have not been
    trained on. Like TRL's columns, it keeps the last `generation_batch_size` entries. Evaluations have a table of their
    own, without this column.
    """

    args: TICGRPOConfig
    accelerator: Accelerator
    logs: Callable[[], dict[str, Any]]  # returns TRL's table by column

    def __post_init__(self):
        self.is_logged = self.args.log_completions  # without a table, nothing is done here
        self._folder = Path(str(self.args.output_dir)) / "completions"
        self._responses = 0  # in the table so far, those that it has dropped included
        self._ratios: list[tuple[torch.Tensor, torch.Tensor]] = []  # (numbers, R) of the current update
        self._evaluates = False
        self._written: int | None = None  # step at which training wrote the table, if nothing was added since

    def add_responses(self, rollout: dict[str, Any], count: int):
        """Number the responses of a rollout across all processes, as its column `sample`."""
        if not self.is_logged:
            return
        self._written = None
        counts = gather_object([count])
        first = self._responses + sum(counts[: self.accelerator.process_index])
        self._responses += sum(counts)
        self._column.extend([NO_RATIO] * sum(counts))
        rollout["sample"] = torch.arange(first, first + count, device=self.accelerator.device)

    def add_ratios(self, inputs: dict[str, Any], log_ratios: torch.Tensor):
        """Note the log-ratios R, (B,), of a micro-batch."""
        if self.is_logged and "sample" in inputs:  # a rollout from before they were logged has no numbers
            is_real = loss_mask(inputs).any(dim=1)
            self._ratios.append((torch.where(is_real, inputs["sample"], -1), log_ratios))

    def close_update(self):
        """Write the ratios of an update into the table."""
        if not self._ratios:
            return
        columns = (torch.cat(column) for column in zip(*self._ratios, strict=True))
        numbers, log_ratios = (self.accelerator.gather(column).tolist() for column in columns)
        self._ratios.clear()
        self._written = None
        column = self._column
        first = self._responses - len(column)
        for number, log_ratio in zip(numbers, log_ratios, strict=True):
            if number >= first:
                column[number - first] = float(f"{math.exp(min(log_ratio, 700.0)):.4g}")

    def is_due(self, step: int) -> bool:
        """Return whether TRL is to print and write its table: always in an evaluation, otherwise once a step."""
        if not self.is_logged or self._evaluates:
            return self.is_logged
        self._restore()
        latest, self._written = self._written, step
        return step != latest

    @contextmanager
    def of_evaluation(self, name: str, step: int) -> Iterator[None]:
        """Give an evaluation an empty table, which TRL saves as `completions_<step>.parquet`; rename it to
        `<name>_<step>.parquet`, and put the table of the training responses and its file back."""
        if not self.is_logged:
            yield
            return
        if not self._evaluates:
            self._restore()
        logs, file = self.logs(), self._folder / f"completions_{step:05d}.parquet"
        training, kept = dict(logs), file.with_suffix(".training")
        for column, values in training.items():
            is_list = isinstance(values, deque)
            logs[column] = deque(maxlen=values.maxlen) if is_list else defaultdict(values.default_factory)
        writes = self.accelerator.is_main_process
        if keeps := writes and file.exists():
            file.rename(kept)
        evaluates, self._evaluates = self._evaluates, True  # of several sets, each has an evaluation within the whole
        try:
            yield
        finally:
            self._evaluates = evaluates
            logs.update(training)
            if writes and file.exists():
                file.rename(self._folder / f"{name.replace('/', '_')}_{step:05d}.parquet")
            if keeps:
                kept.rename(file)

    def _restore(self):
        """Put back the training tables of a run that was killed in an evaluation."""
        if self.accelerator.is_main_process:
            for kept in self._folder.glob("*.training"):
                kept.rename(kept.with_suffix(".parquet"))

    def rotate(self, step: int):
        """Delete the oldest tables of training and of each evaluation beyond `completions_total_limit`; those after
        `step` don't count, a resumed run writes them again."""
        limit = self.args.completions_total_limit
        if not self.is_logged or limit is None or not self.accelerator.is_main_process:
            return
        tables: dict[str, dict[int, Path]] = defaultdict(dict)
        for path in self._folder.glob("*.parquet"):
            name, _, number = path.stem.rpartition("_")
            if number.isdigit():
                tables[name][int(number)] = path
        for of_name in tables.values():
            for written in sorted(at for at in of_name if at <= step)[:-limit]:
                of_name[written].unlink()

    @property
    def _column(self) -> Any:
        return self.logs()["extra"]["trajectory_ratio"]

    def state_dict(self) -> dict[str, Any]:
        """Return the table, without images, on the main process, which writes it."""
        if not self.is_logged or not self.accelerator.is_main_process:
            return {"responses": self._responses}
        logs = dict(self.logs())
        for name in ("prompt", "completion"):
            logs[name] = [strip_images_from_messages(messages) for messages in logs[name]]
        logs["extra"] = logs["extra"] | {"trajectory_ratio": [float(ratio) for ratio in self._column]}
        return {"responses": self._responses, "logs": logs | {"images": [None] * len(logs["images"])}}

    def load_state_dict(self, state: dict[str, Any]):
        self._responses = state["responses"]
        logs = self.logs()
        logs.update(restore_containers(logs, state.get("logs", {})))
        for index, ratio in enumerate(self._column):
            if ratio is None or math.isnan(ratio):
                self._column[index] = NO_RATIO
