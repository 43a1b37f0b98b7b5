"""Started by test_soak.py: a long run of a minute model, whose memory, processor time and disk are noted as it goes."""

import ctypes
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from conftest import make_trainer, tiny_model
from transformers import TrainerCallback


EVERY, COUNT_EVERY = 10, 100  # steps between two samples of memory and time, and of the objects that are alive
LIBC = ctypes.CDLL(None)


def size_of(value) -> int:
    """Bytes that malloc hands out for a nest of lists and dictionaries: 8 more than asked, in multiples of 16."""
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return -(-(sys.getsizeof(value) + 8) // 16) * 16 + sum(map(size_of, inner))


def bytes_below(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class Watch(TrainerCallback):
    """Memory and processor time every few steps, and what lies on disk after every save."""

    def __init__(self):
        self.samples: list[dict] = []
        self.saves: list[dict] = []
        self.process = psutil.Process()

    def memory(self) -> int:
        return self.process.memory_info().rss

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % EVERY:
            return
        sample = {"step": state.global_step, "seconds": time.process_time(), "all_memory": self.memory()}
        if hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)  # free memory that the allocator keeps: a lot after a save, which writes a long text
        sample["memory"] = self.memory()
        # What was logged stays in memory, as transformers has it: it has to be told from a leak.
        sample |= {"logged": sum(map(size_of, state.log_history[-EVERY:])), "files": self.process.num_fds()}
        if state.global_step % COUNT_EVERY == 0:
            gc.collect()
            objects = gc.get_objects()  # without those that were frozen
            sample |= {"objects": len(objects), "tensors": sum(issubclass(type(o), torch.Tensor) for o in objects)}
        self.samples.append(sample)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir)
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        history = "trainer_state.json"  # holds what was logged so far
        self.saves.append(
            {
                "step": state.global_step,
                "checkpoints": [path.name for path in checkpoints],
                "state": [bytes_below(path) - (path / history).stat().st_size for path in checkpoints],
                "tables": bytes_below(folder / "completions"),
                "temporary": len(list(Path(tempfile.gettempdir()).iterdir())),
                "events": bytes_below(folder / "runs"),
                "history": (checkpoints[-1] / history).stat().st_size,
                "rest": sorted(p.name for p in folder.iterdir() if p not in checkpoints),
            }
        )


folder, steps = Path(sys.argv[1]), int(sys.argv[2])
watch = Watch()
trainer = make_trainer(
    folder / "out",
    tiny_model(hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4),
    callbacks=[watch],
    per_device_train_batch_size=2,
    num_generations=2,
    steps_per_generation=4,
    max_completion_length=4,
    max_steps=steps,
    learning_rate=1e-6,  # the policy stays as it is, so that every step has the same work to do
    log_completions=True,
    num_completions_to_print=1,
    save_strategy="steps",
    save_steps=steps // 10 - 2,  # at the end of a rollout and within one
    save_total_limit=2,
    report_to="tensorboard",
)
gc.collect()
gc.freeze()  # `train()` collects garbage, which otherwise walks through all modules that are imported
trainer.train()
noted = {
    "samples": watch.samples,
    "saves": watch.saves,
    "updates": [entry["step"] for entry in trainer.state.log_history if "loss" in entry],
    "rollouts": [entry["step"] for entry in trainer.state.log_history if "reward" in entry],
    "metrics": [len(entry) for entry in trainer.state.log_history if "loss" in entry],
}
(folder / "soak.json").write_text(json.dumps(noted))
