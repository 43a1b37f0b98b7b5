"""Train while the process that started this one ends (test_interruption_processes.py)."""

import os
import sys
import time
from pathlib import Path

from conftest import make_trainer
from transformers import TrainerCallback


folder, parent = Path(sys.argv[1]), os.getppid()


class LoseParent(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        (folder / "pid").write_text(str(os.getpid()))
        while os.getppid() == parent:
            time.sleep(0.05)


make_trainer(folder, callbacks=[LoseParent()], max_steps=2).train()
(folder / "finished").touch()
