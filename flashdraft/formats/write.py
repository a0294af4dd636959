"""A drafter's config and tensors -> its folder, whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdraft.errors import CheckpointError, InvalidParameter
from flashdraft.files import output_folder, write_file, write_tensors
from flashdraft.formats.config import DraftConfig
from flashdraft.hub import read_config

__all__ = ["write_draft"]


def write_draft(
    folder: Path, config: DraftConfig, tensors: Mapping[str, Tensor], readme: str | None = None
) -> None:
    """Write a drafter's folder; each file appears whole or not at all, config.json last.

    Raises InvalidParameter where a folder is no drafter's, but has a file of one of these names.
    """
    folder = output_folder(folder)
    _check_free(folder, tensors, readme)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config.dtype)
    stored = {
        n: (t.to(dtype) if t.is_floating_point() else t).contiguous().cpu()
        for n, t in tensors.items()
    }
    if readme is not None:
        write_file(folder / "README.md", readme.encode())
    write_tensors(folder / "model.safetensors", stored)
    write_file(folder / "config.json", (json.dumps(config.to_json(), indent=2) + "\n").encode())


def _check_free(folder: Path, tensors: Mapping[str, Tensor], readme: str | None) -> None:
    """Raises InvalidParameter where a file that is no drafter's would be written over."""
    if (folder / "config.json").exists():
        try:
            DraftConfig.from_json(read_config(folder), str(folder))
        except CheckpointError:
            raise _taken(folder / "config.json") from None
        return
    weights = folder / "model.safetensors"
    if weights.exists():  # config.json comes last: it may be missing after a kill
        try:
            with safe_open(weights, framework="pt") as file:
                is_ours = set(file.keys()) == set(tensors)
        except (SafetensorError, OSError):
            is_ours = False
        if not is_ours:
            raise _taken(weights)
    card = folder / "README.md"
    if readme is not None and card.exists() and not weights.exists() and not _is_card(card):
        raise _taken(card)


def _is_card(path: Path) -> bool:
    return path.read_bytes().startswith(b"---\nlibrary_name: flashdraft")


def _taken(path: Path) -> InvalidParameter:
    return InvalidParameter(
        f"`{path}` is no drafter's and would be written over",
        hint="name another folder for the drafter",
    )
