"""Checkpoint folders that are there entirely or not at all, and what in one of them is damaged or does not fit.

A checkpoint is written under `<run>/.saving/` and gets its name, `<run>/checkpoint-<step>`, when it is complete and on
the disk. Its manifest, written last, lists the other files and their sizes, so that one that was cut later is noticed.
"""

import errno
import json
import os
import pickle
import re
import shutil
from collections import defaultdict, deque
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints


STAGING = ".saving"
MANIFEST = "manifest.json"
PACKAGES = ("tic-grpo-trl", "trl", "transformers", "torch", "accelerate")
# Names in `.saving` of a checkpoint that is complete, one that a new one of the same step replaces, one to be deleted
DONE, REPLACED, DOOMED = ".done", ".old", ".trash"

Shapes = dict[str, tuple[int, ...]]


# Writing


def publish(folder: Path, target: Path, settings: dict[str, Any]):
    """Give a checkpoint that all processes have written its place in the run's folder.

    Two processes may call this for the same folder, as those of two nodes that share a disk do; the first one does it.

    Args:
        folder: in `.saving`, named like `target`.
        target: what it becomes; an older checkpoint there is replaced.
        settings: what the manifest says about the run, JSON-ready.
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
    versions = {package: version(package) for package in PACKAGES}
    manifest = {"files": sizes, "settings": settings, "versions": versions}
    (done / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (done / MANIFEST, *(path for path in done.rglob("*") if path.is_dir()), done):
        _flush(path)
    if target.exists():
        target.rename(replaced)
    done.rename(target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(run_dir: Path):
    """Finish what a kill between two steps of [`publish`] has left: a complete checkpoint without its name."""
    for path in sorted((run_dir / STAGING).glob("checkpoint-*")):
        target = run_dir / path.stem
        if (
            path.suffix in (DONE, REPLACED)
            and (path / MANIFEST).exists()
            and not target.exists()
            and not find_damage(path)
        ):
            with suppress(FileNotFoundError):  # another node's process was faster
                path.rename(target)
    with suppress(OSError):  # it does not exist, or holds something
        (run_dir / STAGING).rmdir()


def clear(run_dir: Path):
    """Delete what earlier, interrupted saves have left in `.saving`."""
    shutil.rmtree(run_dir / STAGING, ignore_errors=True)


def rotate(run_dir: Path, limit: int | None, best: str | None):
    """Delete the oldest checkpoints beyond `limit`, never the newest and the best one; each at once or not at all.

    Args:
        run_dir: the folder of the checkpoints.
        limit: `save_total_limit`; `None` or 0: no limit.
        best: path of the best checkpoint, if known.
    """
    if not limit:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(str(run_dir), use_mtime=True)]
    kept = {checkpoints[-1]} | ({Path(best)} if best else set())
    excess = max(len(checkpoints) - max(limit, len(kept)), 0)
    for path in [path for path in checkpoints if path not in kept][:excess]:
        doomed = run_dir / STAGING / (path.name + DOOMED)
        doomed.parent.mkdir(exist_ok=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _flush(path: Path):
    """Onto the disk: a name that survives a power cut must not lead to an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(descriptor)


# Reading


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, -1 for any other name."""
    found = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(found[1]) if found else -1


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def newest_if_any(resume: str | bool | None, run_dir: Path) -> str | bool | None:
    """What `--resume_from_checkpoint` asks for in a script that is started with the same command again and again.

    Args:
        resume: the flag: a path, or `True` or the text "true" for the newest checkpoint.
        run_dir: the run's folder.

    Returns:
        `None` where the newest checkpoint is asked for before there is one; the flag as it is otherwise.
    """
    if str(resume).lower() != "true":
        return resume
    # In this order: another process may just be moving one from here to there.
    begun = [path for path in (run_dir / STAGING).glob("checkpoint-*") if path.suffix in (DONE, REPLACED)]
    return True if begun or checkpoints_in(run_dir) else None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, or an empty one where there is none: TRL's own checkpoints, and those of before."""
    path = checkpoint / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {"files": {}, "settings": {}}


def find_damage(checkpoint: Path) -> str | None:
    """What is missing or cut in a checkpoint, part of a sentence; `None` if nothing is.

    Args:
        checkpoint: its folder. Without a manifest only the weights and the trainer's state can be judged.
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
    if not (checkpoint / "trainer_state.json").is_file():
        return "trainer_state.json is missing"
    try:
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (ValueError, TypeError):
        return "trainer_state.json cannot be read"
    for path in weight_files(checkpoint):
        try:
            shapes_in(path)
        except (SafetensorError, OSError) as error:
            return f"{path.name} cannot be read ({error})"
    return None


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files of the weights: an adapter's, or those of a whole model."""
    return sorted(checkpoint.glob("adapter_model*.safetensors")) or sorted(checkpoint.glob("model*.safetensors"))


def shapes_in(path: Path) -> Shapes:
    """Names and shapes of the tensors in a safetensors file, from its header alone."""
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def find_mismatch(checkpoint: Path, model: PreTrainedModel | Any) -> str | None:
    """How the weights of a checkpoint differ from a model's in name or shape, part of a sentence; `None`: they fit.

    Args:
        checkpoint: its folder. Weights that no safetensors file holds, such as shards of ZeRO-3, are not compared.
        model: not wrapped, with or without an adapter. Its parameters may be distributed by ZeRO-3.
    """
    files = weight_files(checkpoint)
    if not files:
        return None
    is_adapter = files[0].name.startswith("adapter_model")
    if is_adapter != hasattr(model, "peft_config"):
        mine, theirs = ("a whole model", "an adapter") if is_adapter else ("an adapter", "a whole model")
        return f"it holds {theirs}, while this run trains {mine}"
    found = {name: shape for path in files for name, shape in shapes_in(path).items()}
    expected, optional = _shapes_on_disk(model)
    for name, shape in found.items():
        if name not in expected:
            if is_adapter and ("embed_tokens" in name or "lm_head" in name):
                continue  # which PEFT adds where the vocabulary was enlarged
            return f"it has {name}, which this model has not"
        if shape != expected[name]:
            return f"{name} is {shape} there and {expected[name]} here"
    missing = [name for name in expected if name not in found and name not in optional]
    return f"it lacks {missing[0]}, which this model has" if missing else None


def _shapes_on_disk(model: Any) -> tuple[Shapes, set[str]]:
    """Names and shapes that `save_pretrained` would write, and those names which it may leave out."""
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

    from transformers.core_model_loading import revert_weight_conversion

    names = defaultdict(list)
    for name, value in tensors.items():
        names[id(value)].append(name)
    tied = {name for aliases in names.values() if len(aliases) > 1 for name in aliases}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or []]
    shapes = {name: tuple(value.shape) for name, value in revert_weight_conversion(model, blank).items()}
    return shapes, {name for name in shapes if name in tied or any(pattern.search(name) for pattern in ignored)}


def load_renamed(checkpoint: Path, model: Any) -> bool:
    """Load weights that have other names on disk than in the model, as those of mixtures of experts do.

    transformers would find none of them and go on with the weights that the model has.

    Args:
        checkpoint: its folder.
        model: to load them into.

    Returns:
        Whether there were such names. If not, nothing was loaded.
    """
    if hasattr(model, "peft_config"):
        return False
    names = model.state_dict().keys()
    if all(name in names for path in weight_files(checkpoint) for name in shapes_in(path)):
        return False
    saved: Any = type(model).from_pretrained(str(checkpoint), dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True


# The state of a process


def to_plain(value: Any) -> Any:
    """Any value made of tensors, numbers, texts, `None` and containers of these; of anything else its `repr`.

    What `torch.load(weights_only=True)` reads.
    """
    if value is None or torch.is_tensor(value):
        return value if value is None else value.detach()
    if isinstance(value, np.generic | np.ndarray):
        return to_plain(value.tolist())
    kinds: tuple[Any, ...] = (bool, int, float, str, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_plain(item) for item in value)
    if isinstance(value, list | deque):
        return [to_plain(item) for item in value]
    return repr(value)


def restore_containers(current: Any, saved: Any) -> Any:
    """`saved` in containers of the kinds that `current` has: dictionaries with a default, lists of limited length."""
    if isinstance(current, deque):
        return deque(saved, current.maxlen)
    if not isinstance(current, dict):
        return saved
    default = current.default_factory if isinstance(current, defaultdict) else None
    kept = {
        key: restore_containers(current.get(key, default() if default else None), item) for key, item in saved.items()
    }
    return defaultdict(default, kept) if isinstance(current, defaultdict) else kept


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read the state of a process, its tensors where they were: on the CPU, or on the device that is this process's.

    Raises:
        ValueError: if the file cannot be read.
    """
    restore: Any = torch.serialization.default_restore_location
    try:
        return torch.load(
            path,
            weights_only=True,
            map_location=lambda storage, place: storage if place == "cpu" else restore(storage, str(device)),
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
