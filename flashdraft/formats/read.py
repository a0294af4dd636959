"""A drafter's folder -> its config and its tensors, every one of them checked."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdraft.errors import CheckpointError
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import refuse_files, refuse_tensors
from flashdraft.hub import read_config
from flashdraft.models.layers import HEADS
from flashdraft.pretrained import foreign_file
from flashdraft.process import INTS

__all__ = ["read_draft"]


def read_draft(folder: Path) -> tuple[DraftConfig, dict[str, Tensor]]:
    """A drafter's config and tensors; every tensor is there with its shape, or CheckpointError says which is not."""
    refuse_files(folder)
    written = read_config(folder)
    config = DraftConfig.from_json(written, str(folder))
    if config.block_size < 2:
        raise CheckpointError(
            f"`{folder}` has block_size {config.block_size}",
            hint="a block is the anchor and 1 mask or more",
        )
    tensors = _read_tensors(folder, pickled=config.method == "eagle3")
    refuse_tensors(tensors, str(folder))
    config = _told_by_tensors(config, written, tensors, folder)
    kinds, count = config.layer_types, config.num_hidden_layers
    if odd := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise CheckpointError(
            f"`{folder}` has a layer of type {odd[0]}",
            hint="known: full_attention, sliding_attention",
        )
    if kinds and len(kinds) != count:
        raise CheckpointError(
            f"`{folder}` has {len(kinds)} layer_types for {count} layers",
            hint="its config.json is damaged",
        )
    if config.sequential_head not in (None, *HEADS):
        named = f"a sequential head {config.sequential_head!r}"
        raise CheckpointError(
            f"`{folder}` has {named}, which is not known", hint=f"known: {', '.join(HEADS)}"
        )
    h, v, rows = config.hidden_size, config.vocab_size, config.draft_vocab_size or config.vocab_size
    wanted, optional = (
        config.shapes(),
        {"embed_tokens.weight": (v, h), "lm_head.weight": (rows, h), "d2t": (rows,), "t2d": (v,)},
    )
    reduced = config.draft_vocab_size not in (None, config.vocab_size)
    for name, shape in (
        wanted | {n: s for n, s in optional.items() if n in tensors or (n == "d2t" and reduced)}
    ).items():
        if name not in tensors:
            raise CheckpointError(
                f"`{folder}` lacks the tensor {name}",
                hint="the folder is incomplete, or of another method",
            )
        if tuple(tensors[name].shape) != shape:
            got = f"shape {list(tensors[name].shape)}, its config.json asks for {list(shape)}"
            raise CheckpointError(f"{name} has {got}", hint="the two do not belong together")
    if unknown := sorted(set(tensors) - set(wanted) - set(optional)):
        raise CheckpointError(
            f"`{folder}` has a tensor {unknown[0]}, unknown to {config.method}",
            hint="it is of another method",
        )
    _check_numbers(tensors, str(folder))
    _check_heads(config, str(folder))
    if "d2t" in tensors:
        leads = tensors["d2t"].long() + torch.arange(len(tensors["d2t"]), **INTS)
        if bad := [int(token) for token in leads if not 0 <= token < config.vocab_size]:
            found = f"d2t leads to token {bad[0]} of a vocabulary of {config.vocab_size}"
            raise CheckpointError(f"`{folder}` is damaged: {found}", hint="fetch or write it again")
    return config, tensors


def _told_by_tensors(
    config: DraftConfig, written: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> DraftConfig:
    """What config.json leaves out and the tensors' shapes say: heads; and whether a tied head has what it is tied to."""
    norm, keys = (
        tensors.get("layers.0.self_attn.q_norm.weight"),
        tensors.get("layers.0.self_attn.k_proj.weight"),
    )
    if norm is not None and norm.ndim == 1 and written.get("head_dim") is None:
        config = replace(config, head_dim=len(norm))
    if (
        keys is not None
        and keys.ndim == 2
        and config.method == "dflash"
        and written.get("num_key_value_heads") is None
    ):
        config = replace(config, num_key_value_heads=len(keys) // config.head_dim)
    if config.tied_head and "lm_head.weight" in tensors:
        config = replace(config, tied_head=False)
    reduced = config.draft_vocab_size not in (None, config.vocab_size)
    if config.tied_head and ("embed_tokens.weight" not in tensors or reduced):
        lacks = "tie_word_embeddings is true, but it holds no whole embed_tokens to be its lm_head"
        raise CheckpointError(
            f"`{folder}`: {lacks}",
            hint="a folder with an lm_head.weight or a whole embed_tokens.weight works",
        )
    return config


def _check_heads(config: DraftConfig, where: str) -> None:
    """Raises CheckpointError for heads that no attention can have."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if config.method == "medusa":  # it has none
        return
    if heads % groups:
        got = f"`{where}` has num_attention_heads {heads} for num_key_value_heads {groups}"
        raise CheckpointError(got, hint="the first must be a multiple of the second")
    if config.head_dim % 2:
        raise CheckpointError(
            f"`{where}` has head_dim {config.head_dim}",
            hint="rotary positions turn pairs: it must be even",
        )


def _read_tensors(folder: Path, *, pickled: bool) -> dict[str, Tensor]:
    """All tensors of a folder, without the prefix `model.`; pickled: SafeAILab's .bin files are read, too, tensors only."""
    files = sorted(folder.glob("*.safetensors")) or (
        sorted(folder.glob("pytorch_model*.bin")) if pickled else []
    )
    if not files:
        raise CheckpointError(
            f"`{folder}` holds no .safetensors file",
            hint="pickled weights are not read; convert them",
        )
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in _tensors_of(path).items():
            bare = name.removeprefix("model.")
            if bare in tensors:
                got = f"`{folder}` holds {bare} twice, the second time in {path.name}"
                raise CheckpointError(got, hint="move the weights that are old out of the folder")
            tensors[bare] = tensor
    return tensors


def _tensors_of(path: Path) -> dict[str, Tensor]:
    found = foreign_file(path)
    if found is not None:
        raise CheckpointError(f"`{path}` is {found[0]}", hint=found[1])
    try:
        if path.suffix == ".bin":
            return _unpickled(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"`{path}` is damaged: {error}", hint="it may be cut short; fetch or write it again"
        ) from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Tensors by name, and nothing else: what would run code is refused by torch."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:  # its own words recommend to run the code
        hint = "pickles can run code, which never runs here: take the drafter as safetensors"
        raise CheckpointError(
            f"`{path}` holds more than tensors, or is no pickle", hint=hint
        ) from None
    is_plain = isinstance(loaded, dict) and all(
        isinstance(tensor, Tensor) for tensor in loaded.values()
    )
    if not is_plain:
        raise CheckpointError(
            f"`{path}` is no dictionary of tensors by name",
            hint="save its state_dict, or safetensors",
        )
    return dict(loaded)


def _check_numbers(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError for weights that are no numbers as they lie: packed ones, or what a failed training left."""
    for name, tensor in tensors.items():
        if name in ("d2t", "t2d"):
            continue
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"`{where}` holds {name} as {dtype}", hint="quantised drafters are not read"
            )
        wide = tensor if tensor.element_size() > 1 else tensor.float()
        if not wide.isfinite().all():
            got = f"{name} of `{where}` holds infinite numbers, or none at all (NaN)"
            raise CheckpointError(
                got, hint="its training failed, or the file is damaged: fetch or write it again"
            )
