"""A run's checkpoints: whole or not there, whatever happens while they are written.

A checkpoint is filled in `.tmp-save`, every file and the folder are synced, state.json (which lists the others' sizes) comes
last, and one rename puts it in place. Older ones go only after that. Tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flashdraft.checkpoint import write_file, write_tensors
from flashdraft.errors import FlashDraftError

__all__ = ["full_disk_named", "last_checkpoint", "load_checkpoint", "save_checkpoint"]

_KEPT = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)


def save_checkpoint(folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """`groups`: name of a file -> its tensors. Raises FlashDraftError for a full disk; the last whole one stays."""
    scratch, final = folder / ".tmp-save", folder / f"step-{step:07d}"
    with full_disk_named(folder, f"`{final}`"):
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            for name, tensors in groups.items():
                write_tensors(scratch / f"{name}.safetensors", {key: tensor.contiguous() for key, tensor in tensors.items()})
            sizes = {path.name: path.stat().st_size for path in scratch.glob("*.safetensors")}
            write_file(scratch / "state.json", json.dumps({**state, "step": step, "files": sizes}).encode())
            _sync(scratch)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of an earlier run
            os.replace(scratch, final)
            _sync(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    whole = [path for path in sorted(folder.glob("step-*")) if _is_whole(path)]
    for old in folder.glob("step-*"):
        if old < whole[-_KEPT:][0]:  # whole, damaged, or half gone: a kill while it was removed
            shutil.rmtree(old)


@contextmanager
def full_disk_named(folder: Path, what: str) -> Iterator[None]:
    """Turns a full disk, met while `what` is written, into a FlashDraftError that names the last checkpoint of `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) not in _FULL and not any(f"os error {number})" in str(error) for number in _FULL):
            raise
        last = last_checkpoint(folder)
        hint = f"make room and run it again: it goes on from {last.name}" if last else "make room and run it again"
        raise FlashDraftError(f"the disk is full: {what} was not written", hint=hint) from None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole one; damaged ones are passed over."""
    return next((path for path in sorted(folder.glob("step-*"), reverse=True) if _is_whole(path)), None)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save_checkpoint` was given."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return {name.removesuffix(".safetensors"): load_file(path / name) for name in state["files"]}, state


def _is_whole(path: Path) -> bool:
    try:
        sizes = json.loads((path / "state.json").read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
