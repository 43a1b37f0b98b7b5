"""A run folder that can be resumed: settings, and one line per sample, written batch by batch."""

import json
import os
from pathlib import Path
from typing import Any


class SampleStore:
    """Store the samples of a run in `samples.jsonl`, next to the `settings.json` that determine them.

    Only complete batches count. If a run was killed while it wrote a batch, the partial batch is removed.

    Args:
        folder: run folder; created if it does not exist.
        settings: everything that determines the samples, JSON-serializable.
        batches: number of samples of each batch, in order.

    Raises:
        ValueError: if the folder contains a run with other settings, or samples without settings.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], batches: list[int]):
        self.path = Path(folder, "samples.jsonl")
        self._check(Path(folder, "settings.json"), settings)
        self.samples: list[dict[str, Any]] = []
        self.batches_done = 0
        self._resume(batches)

    def _check(self, path: Path, settings: dict[str, Any]) -> None:
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            before = json.loads(path.read_text())
            if different := differences(before, settings):
                raise ValueError(
                    f"{path.parent} contains a run with other settings ({'; '.join(different)}): give another "
                    "--output_dir, or remove that folder"
                )
        elif self.path.exists():
            raise ValueError(f"{path.parent} contains samples without settings: give another --output_dir")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(settings, indent=2) + "\n")

    def _resume(self, batches: list[int]) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # incomplete
        kept = 0
        for size in batches:
            if kept + size > len(lines):
                break
            kept += size
            self.batches_done += 1
        self.samples = [json.loads(line) for line in lines[:kept]]
        if self.path.exists():
            os.truncate(self.path, sum(map(len, lines[:kept])))

    def add(self, samples: list[dict[str, Any]]) -> None:
        """Append a complete batch, and return once it is on disk."""
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(sample) + "\n" for sample in samples).encode())
            file.flush()
            os.fsync(file.fileno())
        self.samples += samples
        self.batches_done += 1


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """List the differences of two JSON values, such as `aime24.k: 32, now 16`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        return [
            text
            for key in keys
            for text in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == now else [f"{name}: {before}, now {now}"]


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that other processes, or a later run, see either all of it or nothing."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
