"""Reports of bad numbers: kept for the final error, and logged less and less often."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from ..forward.responses import response_count
from .non_finite import CheckedNumbers, describe_responses, response_text


logger = get_logger(__name__)

KEPT = 4  # reports of each process


class NumberReports:
    """Keep and log reports of bad numbers; `step` returns the number of optimizer steps made."""

    def __init__(self, accelerator: Accelerator, tokenizer: Any, step: Callable[[], int]):
        self.accelerator, self.tokenizer, self.step = accelerator, tokenizer, step
        self._kept: deque[str] = deque(maxlen=KEPT)
        self._count = 0

    def add(self, text: str):
        """Keep a report, and log it if it is the 1st, 2nd, 4th, 8th … of this process."""
        who = f"process {self.accelerator.process_index} of {self.accelerator.num_processes}"
        self._kept.append(f"On {who}, step {self.step() + 1}: {text}")
        self._count += 1
        if self._count & (self._count - 1) == 0:
            logger.warning(self._kept[-1], main_process_only=False)

    def add_responses(self, inputs: dict[str, Any], numbers: list[CheckedNumbers]):
        """Report which responses of a rollout or micro-batch have which bad numbers."""
        self.add("Non-finite numbers: " + "\n".join(describe_responses(inputs, numbers, self.tokenizer)))

    def add_losses(self, losses: list[tuple[torch.Tensor, dict[str, Any]]], norm: float):
        """Report the first bad loss of this process's passes, or on the main process the norm if all are finite."""
        for index, (loss, inputs) in enumerate(losses):
            if not loss.isfinite():
                largest = int(inputs["advantages"].abs().reshape(response_count(inputs), -1).amax(dim=1).argmax())
                where = f"pass {index + 1} of {len(losses)}, whose largest advantage is that of"
                text = response_text(inputs, largest, self.tokenizer)
                self.add(f"Non-finite numbers: loss {float(loss):g} in {where}\n{text}")
                return
        if self.accelerator.is_main_process:
            self.add(f"Non-finite numbers: gradient norm {norm:g}.")

    def gather(self) -> list[str]:
        """Return the kept reports of all processes."""
        return gather_object(list(self._kept))
