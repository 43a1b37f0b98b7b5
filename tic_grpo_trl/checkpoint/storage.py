"""Checkpoint folders that exist completely or not at all, and checks for damaged or mismatched ones.

A checkpoint is written under `<run>/.saving/`. When it is complete and on the disk, it is renamed to
`<run>/checkpoint-<step>`. Its manifest, written last, lists the other files and their sizes, which reveals a file that
is truncated later.
"""

import errno
import json
import os
import pickle
import re
import shutil
from collections import Counter, defaultdict, deque
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints


STAGING = ".saving"
MANIFEST = "manifest.json"
PACKAGES = ("tic-grpo-trl", "trl", "transformers", "torch", "accelerate")
DONE, REPLACED = ".done", ".old"  # suffixes in `.saving`: of a complete checkpoint, of one that it replaces

Shapes = dict[str, tuple[int, ...]]


def publish(folder: Path, target: Path, settings: dict[str, Any]):
    """Complete a checkpoint that all processes have written to `folder` in `.saving`, and move it to `target`.

    An older checkpoint there is replaced. Of two nodes that share a disk and both call this, the first one does it.
    """
    done, replaced = (folder.with_name(folder.name + suffix) for suffix in (DONE, REPLACED))
    try:
        folder.rename(done)
    except FileNotFoundError:
        return
    files = [path for path in sorted(done.rglob("*")) if path.is_file()]
    for path in files:
        _flush(path)
    sizes = {path.relative_to(done).as_posix(): path.stat().st_size for path in files}
    manifest = {"files": sizes, "settings": settings, "versions": {name: version(name) for name in PACKAGES}}
    (done / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (done / MANIFEST, *(path for path in done.rglob("*") if path.is_dir()), done):
        _flush(path)
    if target.exists():
        target.rename(replaced)
    done.rename(target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(path: Path):
    """Write a file or folder to the disk, so that no name survives a power cut without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # not supported by the file system
            raise
    finally:
        os.close(descriptor)


def _unfinished(run_dir: Path) -> list[Path]:
    """Return the folders in `.saving` that [`publish`] was moving when it was killed."""
    return sorted(path for path in (run_dir / STAGING).glob("checkpoint-*") if path.suffix in (DONE, REPLACED))


def recover(run_dir: Path):
    """Finish a [`publish`] that was killed: give a complete checkpoint its name."""
    for path in _unfinished(run_dir):
        target = run_dir / path.stem
        if (path / MANIFEST).exists() and not target.exists() and not find_damage(path):
            with suppress(FileNotFoundError):  # another node's process was faster
                path.rename(target)
    with suppress(OSError):  # it does not exist, or is not empty
        (run_dir / STAGING).rmdir()


def rotate(run_dir: Path, limit: int | None, best: str | None):
    """Delete the oldest checkpoints beyond `save_total_limit`, but never the newest or the best one."""
    if not limit:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(str(run_dir), use_mtime=True)]
    kept = {checkpoints[-1]} | ({Path(best)} if best else set())
    excess = max(len(checkpoints) - max(limit, len(kept)), 0)
    for path in [path for path in checkpoints if path not in kept][:excess]:
        (run_dir / STAGING).mkdir(exist_ok=True)
        shutil.rmtree(path.rename(run_dir / STAGING / path.name), ignore_errors=True)  # never seen half deleted


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name, -1 for any other name."""
    found = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(found[1]) if found else -1


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def newest_if_any(resume: str | bool | None, run_dir: Path) -> str | bool | None:
    """Return the flag `resume`, or `None` if it asks for the newest checkpoint ("true") and there is none yet."""
    if str(resume).lower() != "true":
        return resume
    # In this order: another process may be moving one from here to there.
    return True if _unfinished(run_dir) or checkpoints_in(run_dir) else None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest, or an empty one for a checkpoint without, such as TRL's own."""
    path = checkpoint / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {"files": {}, "settings": {}}


def find_damage(checkpoint: Path) -> str | None:
    """Describe what is missing or truncated in a checkpoint, as part of a sentence; `None` if nothing is.

    Without a manifest, only the weights and the trainer's state can be checked.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return f"{state.name} is missing"
    try:
        TrainerState.load_from_json(str(state))
    except (ValueError, TypeError):
        return f"{state.name} cannot be read"
    for path in weight_files(checkpoint):
        try:
            _shapes_in(path)
        except (SafetensorError, OSError) as error:
            return f"{path.name} cannot be read ({error})"
    return None


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the safetensors files of an adapter, or else of a whole model."""
    return sorted(checkpoint.glob("adapter_model*.safetensors")) or sorted(checkpoint.glob("model*.safetensors"))


def _shapes_in(path: Path) -> Shapes:
    """Read the names and shapes of tensors from the header of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def find_mismatch(checkpoint: Path, model: Any) -> str | None:
    """Describe how weights differ from an unwrapped model's in name or shape, part of a sentence; `None` if they fit.

    Weights outside safetensors files, such as shards of ZeRO-3, are not compared.
    """
    files = weight_files(checkpoint)
    if not files:
        return None
    is_adapter = files[0].name.startswith("adapter_model")
    if is_adapter != hasattr(model, "peft_config"):
        kinds = ("a whole model", "an adapter")
        return f"it holds {kinds[is_adapter]}, while this run trains {kinds[not is_adapter]}"
    found = {name: shape for path in files for name, shape in _shapes_in(path).items()}
    expected, optional = _shapes_on_disk(model)
    for name, shape in found.items():
        if name not in expected:
            if is_adapter and ("embed_tokens" in name or "lm_head" in name):
                continue  # PEFT adds them if the vocabulary was enlarged
            return f"it has {name}, which this model does not have"
        if shape != expected[name]:
            return f"the shape of {name} is {shape} in the checkpoint and {expected[name]} in the model"
    missing = [name for name in expected if name not in found and name not in optional]
    return f"it lacks {missing[0]}, which this model has" if missing else None


def _shapes_on_disk(model: Any) -> tuple[Shapes, set[str]]:
    """Return the names and shapes that `save_pretrained` would write, and the names that it may leave out."""
    tensors = {name: value for name, value in model.state_dict(keep_vars=True).items() if torch.is_tensor(value)}
    blank = {
        name: torch.empty(getattr(value, "ds_shape", value.shape), dtype=value.dtype, device="meta")
        for name, value in tensors.items()
    }
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        adapter = model.active_adapters[0]
        saved = get_peft_model_state_dict(model, blank, adapter, save_embedding_layers=False)
        return {name: tuple(value.shape) for name, value in saved.items()}, set()

    counts = Counter(id(value) for value in tensors.values())
    tied = {name for name, value in tensors.items() if counts[id(value)] > 1}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or []]
    shapes = {name: tuple(value.shape) for name, value in revert_weight_conversion(model, blank).items()}
    return shapes, {name for name in shapes if name in tied or any(pattern.search(name) for pattern in ignored)}


def load_renamed(checkpoint: Path, trainer: Any) -> bool:
    """Load weights whose names on disk are not the model's, as in mixtures of experts; return whether they are such."""
    model = trainer.model
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or hasattr(model, "peft_config"):
        return False
    names = model.state_dict().keys()
    if all(name in names for path in weight_files(checkpoint) for name in _shapes_in(path)):
        return False  # transformers finds them all
    model.load_state_dict(type(model).from_pretrained(str(checkpoint), dtype=model.dtype).state_dict())
    return True


def without_tied(loaded: Any, model: Any) -> Any:
    """Remove from the result of `load_state_dict` the missing keys whose tensors were loaded under another name."""
    tensors = model.state_dict(keep_vars=True)
    found = {id(value) for name, value in tensors.items() if name not in loaded.missing_keys}
    return loaded._replace(missing_keys=[name for name in loaded.missing_keys if id(tensors.get(name)) not in found])


def to_plain(value: Any) -> Any:
    """Convert a value to what `torch.load(weights_only=True)` reads; unknown objects become their `repr`."""
    if torch.is_tensor(value):
        return value.detach()
    if isinstance(value, np.generic | np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, dict):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | deque):
        return (tuple if isinstance(value, tuple) else list)(to_plain(item) for item in value)
    kinds: tuple[Any, ...] = (bool, int, float, str, bytes)  # and their subclasses
    convert = next((kind for kind in kinds if isinstance(value, kind)), repr)
    return None if value is None else convert(value)


def restore_containers(current: Any, saved: Any) -> Any:
    """Return `saved` in containers like those of `current`: dicts with a default, lists of limited length."""
    if isinstance(current, deque):
        return deque(saved, current.maxlen)
    if not isinstance(current, dict):
        return saved
    default = current.default_factory if isinstance(current, defaultdict) else None
    new = default() if default else None
    kept = {key: restore_containers(current.get(key, new), item) for key, item in saved.items()}
    return defaultdict(default, kept) if isinstance(current, defaultdict) else kept


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read the state of a process, or raise a ValueError; tensors that were on a device return to this process's."""
    restore: Any = torch.serialization.default_restore_location
    try:
        return torch.load(
            path,
            weights_only=True,
            map_location=lambda storage, place: storage if place == "cpu" else restore(storage, str(device)),
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
