"""Train in two processes in a folder that is locked, and note how each is refused (test_output_lock.py)."""

import sys
from pathlib import Path

from conftest import make_trainer


trainer = make_trainer(Path(sys.argv[1]))
accelerator = trainer.accelerator
try:
    trainer.train()
except ValueError as error:
    noted = f"{accelerator.num_processes}, {accelerator.distributed_type}, {error}"
    (Path(sys.argv[1]) / f"rank-{accelerator.process_index}").write_text(noted)
accelerator.end_training()
