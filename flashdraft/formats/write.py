"""A drafter's config and tensors -> its folder, whole or not at all.

Knows files. Does not know what the config's keys mean, nor whose the tensors are.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdraft.errors import CheckpointError, InvalidParameter
from flashdraft.files import output_folder, write_file, write_tensors
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.weights import MASK_FILE, MASK_ROW
from flashdraft.formats.written import config_of, json_of
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
    stored = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        stored[name] = tensor.contiguous().cpu()
    row = stored.pop(MASK_ROW, None)
    text = json.dumps(json_of(config), indent=2) + "\n"

    if readme is not None:
        write_file(folder / "README.md", readme.encode())
    write_tensors(folder / "model.safetensors", stored)
    _write_mask_row(folder / MASK_FILE, row, config.mask_token_id)
    write_file(folder / "config.json", text.encode())


def _write_mask_row(path: Path, row: Tensor | None, mask_token_id: int) -> None:
    """As others read it: a pickled dictionary. The one of a drafter before is removed."""
    if row is None:
        path.unlink(missing_ok=True)
        return

    content = io.BytesIO()
    torch.save({"mask_token_id": mask_token_id, "embedding": row}, content)
    write_file(path, content.getvalue())


def _check_free(folder: Path, tensors: Mapping[str, Tensor], readme: str | None) -> None:
    """Raises InvalidParameter where a file that is no drafter's would be written over."""
    written = folder / "config.json"
    if written.exists():
        try:
            config_of(read_config(folder), str(folder))
        except CheckpointError:
            raise _taken(written) from None
        return

    weights = folder / "model.safetensors"
    if weights.exists():  # config.json comes last: it may be missing after a kill
        if not _holds(weights, tensors):
            raise _taken(weights)
        return

    card = folder / "README.md"
    if readme is not None and card.exists() and not _is_card(card):
        raise _taken(card)


def _holds(weights: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has tensors of these names, and no others."""
    try:
        with safe_open(weights, framework="pt") as file:
            return set(file.keys()) == set(tensors)
    except (SafetensorError, OSError):
        return False


def _is_card(path: Path) -> bool:
    return path.read_bytes().startswith(b"---\nlibrary_name: flashdraft")


def _taken(path: Path) -> InvalidParameter:
    got = f"`{path}` is no drafter's and would be written over"
    return InvalidParameter(got, hint="name another folder for the drafter")
