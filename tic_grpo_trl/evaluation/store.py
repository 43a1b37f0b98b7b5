"""A run folder that can be gone on with: settings, and one line per sample, written batch by batch."""

import json
import os
from pathlib import Path
from typing import Any


class SampleStore:
    """Samples of a run in `samples.jsonl`, next to the `settings.json` that decided them.

    A batch counts once it is whole: what a run that was killed wrote of another is cut off.

    Args:
        folder: of the run; made where it does not exist.
        settings: whatever decides the samples, JSON-ready.
        batches: number of samples of each batch, in order.

    Raises:
        ValueError: where the folder holds a run with other settings, or samples without settings.
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
                    f"{path.parent} holds a run with other settings ({'; '.join(different)}): give another "
                    "--output_dir, or remove that folder"
                )
        elif self.path.exists():
            raise ValueError(f"{path.parent} holds samples without settings: give another --output_dir")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(settings, indent=2) + "\n")

    def _resume(self, batches: list[int]) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # torn
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
        """Append a whole batch; it is on the disk when this returns."""
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(sample) + "\n" for sample in samples).encode())
            file.flush()
            os.fsync(file.fileno())
        self.samples += samples
        self.batches_done += 1


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, as texts such as `aime24.k: 32, now 16`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        return [
            text
            for key in keys
            for text in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == now else [f"{name}: {before}, now {now}"]


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there with all of its text or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
