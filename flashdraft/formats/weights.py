"""The files of a drafter's folder that hold its weights -> tensors under their bare names.

Names that publishers dress differently are made the same here. Knows files, and how names are
dressed. Does not know formats, nor which tensors belong together.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdraft.errors import CheckpointError
from flashdraft.pretrained import foreign_file

__all__ = [
    "MASK_FILE",
    "MASK_ROW",
    "Shape",
    "Shapes",
    "read_mask_row",
    "read_tensors",
    "shapes_of",
    "told_by_shapes",
]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # of tensors, by their bare names
MASK_ROW = "mask_embedding"  # a row that stands for the mask token's embedding

MASK_FILE = "mask_embedding.pt"  # where it lies beside the weights
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PREFIXES = ("model.", "logit_head.")  # the second of early DSpark and Domino folders
_CODEBOOKS = (  # saved again by z-lab's class they are called .weight
    "candidate_selector.predecessor_codebook",
    "candidate_selector.successor_codebook",
)


def bare_name(name: str) -> str:
    """A tensor's name as the formats have it."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    short = name.removesuffix(".weight")
    return short if short in _CODEBOOKS else name


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors of all safetensors files, which are not read; nothing of damaged files, which
    `read_tensors` names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    shapes[bare_name(name)] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError, RuntimeError):
            return {}
    return shapes


def told_by_shapes(shapes: Shapes) -> dict[str, int]:
    """Sizes of a block drafter's network, under the names of config.json, as far as its tensors
    say them."""
    norm = shapes.get("norm.weight", ())
    head_norm = shapes.get("layers.0.self_attn.q_norm.weight", ())
    if len(norm) != 1 or len(head_norm) != 1 or not head_norm[0]:
        return {}

    told = {"hidden_size": norm[0], "head_dim": head_norm[0]}
    heads = {"num_attention_heads": "q_proj", "num_key_value_heads": "k_proj"}
    for name, projection in heads.items():
        rows = shapes.get(f"layers.0.self_attn.{projection}.weight", ())
        if rows:
            told[name] = rows[0] // head_norm[0]
    rows = shapes.get("layers.0.mlp.gate_proj.weight", ())
    if rows:
        told["intermediate_size"] = rows[0]
    norms = [name for name in shapes if name.endswith(".input_layernorm.weight")]
    told["num_hidden_layers"] = len(norms)
    vocabulary = shapes.get("t2d", ()) or shapes.get("embed_tokens.weight", ())
    if vocabulary:
        told["vocab_size"] = vocabulary[0]
    return told


def read_tensors(folder: Path, *, pickled: bool) -> dict[str, Tensor]:
    """All tensors of a folder by their bare names.

    pickled: SafeAILab's .bin files are read, too, tensors only.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files and pickled:
        files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        hint = "its weights are missing: fetch or write it again"
        pickles = [path for path in folder.iterdir() if path.suffix in _PICKLES]
        if any(path.name != MASK_FILE for path in pickles):
            hint = "pickled weights are not read; convert them"
        raise CheckpointError(f"`{folder}` holds no .safetensors file", hint=hint)

    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in _tensors_of(path).items():
            bare = bare_name(name)
            if bare in tensors:
                got = f"`{folder}` holds {bare} twice, the second time in {path.name}"
                raise CheckpointError(got, hint="move the weights that are old out of the folder")
            tensors[bare] = tensor
    return tensors


def read_mask_row(folder: Path, mask_token_id: int, hidden_size: int) -> Tensor | None:
    """The row [hidden] that stands for the mask token's embedding, where a folder has one.

    Published as a pickled tensor, or as a dictionary that has it as `embedding` beside
    `mask_token_id`. Raises CheckpointError for what is neither, and for rows a position.
    """
    path = folder / MASK_FILE
    if not path.exists():
        return None

    row = _loaded(path)
    if isinstance(row, Mapping):
        told = row.get("mask_token_id", mask_token_id)
        if told != mask_token_id:
            got = f"`{path}` is of the mask token {told}, its config.json's is {mask_token_id}"
            raise CheckpointError(got, hint="the two do not belong together")
        rows = row.get("per_position")
        if rows is not None and rows is not False:
            got = f"`{path}` has a row a position, which is not supported"
            raise CheckpointError(got, hint="one row for the mask token is read")
        row = row.get("embedding", row.get(MASK_ROW))
    if isinstance(row, Tensor) and row.is_floating_point() and row.numel() == hidden_size:
        return row.reshape(hidden_size)

    hint = "it is one tensor, or a dictionary with mask_token_id and embedding"
    raise CheckpointError(f"`{path}` holds no row of {hidden_size} numbers", hint=hint)


def _tensors_of(path: Path) -> dict[str, Tensor]:
    found = foreign_file(path)
    if found is not None:
        what, hint = found
        raise CheckpointError(f"`{path}` is {what}", hint=hint)
    if path.suffix == ".bin":
        return _unpickled(path)

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _damaged(path, error) from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Tensors by name, and nothing else."""
    loaded = _loaded(path)
    is_dict = isinstance(loaded, dict)
    if not is_dict or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        got = f"`{path}` is no dictionary of tensors by name"
        raise CheckpointError(got, hint="save its state_dict, or safetensors")
    return dict(loaded)


def _loaded(path: Path) -> Any:
    """What a pickle holds: tensors, numbers, lists; what would run code is refused by torch."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:  # its own words recommend to run the code
        got = f"`{path}` holds more than tensors, or is no pickle"
        hint = "pickles can run code, which never runs here: take the drafter as safetensors"
        raise CheckpointError(got, hint=hint) from None
    except (OSError, RuntimeError, EOFError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    hint = "it may be cut short; fetch or write it again"
    return CheckpointError(f"`{path}` is damaged: {error}", hint=hint)
