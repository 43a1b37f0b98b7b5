"""Train in a folder and wait in the middle of the first update (test_output_lock.py)."""

import sys
import time
from pathlib import Path

from conftest import make_trainer
from transformers import TrainerCallback


class Wait(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        (Path(args.output_dir) / "waits").touch()
        time.sleep(600)


make_trainer(Path(sys.argv[1]), callbacks=[Wait()]).train()
