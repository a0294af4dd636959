"""A draft LM made of its target: some of its layers, and its embedding, which need not be stored twice. Folders only."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from flashdraft.checkpoint import write_file, write_tensors
from flashdraft.errors import CheckpointError, first_line
from flashdraft.hub import read_config
from flashdraft.types import require

__all__ = ["cut_target", "draft_lm"]

_EMBEDDING, _HEAD, _LAYERS = "model.embed_tokens.weight", "lm_head.weight", "model.layers."


def cut_target(folder: Path, out: Path, keep: Sequence[int], *, embedding: bool = True) -> None:
    """Write the model of `folder` with only its layers `keep`, in that order, as a Hugging Face folder; config.json comes last.

    embedding: False leaves it out of the file, which `draft_lm` alone can then load. Raises InvalidParameter for a wrong layer.
    """
    config, tensors = read_config(folder), dict[str, Tensor]()
    total, kinds = config.get("num_hidden_layers", 0), config.get("layer_types")
    require(bool(keep) and all(0 <= i < total for i in keep), "keep", list(keep), f"layers from 0 to {total - 1}")
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    if not (ends := [name.removeprefix(f"{_LAYERS}0.") for name in tensors if name.startswith(f"{_LAYERS}0.")]):
        raise CheckpointError(f"`{folder}` holds no tensor {_LAYERS}0", hint="only models of the llama kind can be cut")
    left_out = [_LAYERS] + [_EMBEDDING] * (not embedding) + [_HEAD] * bool(config.get("tie_word_embeddings"))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(left_out))}
    for i, layer in enumerate(keep):
        kept |= {f"{_LAYERS}{i}.{end}": tensors[f"{_LAYERS}{layer}.{end}"].clone() for end in ends}
    config |= {"num_hidden_layers": len(keep)} | ({"layer_types": [kinds[layer] for layer in keep]} if kinds else {})
    weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json", "config.json")
    shutil.copytree(folder, out, ignore=weights, dirs_exist_ok=True)
    write_tensors(out / "model.safetensors", kept)
    write_file(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def draft_lm(folder: Path, embedding: Tensor) -> Any:
    """The Hugging Face model of a folder by `cut_target`, in the dtype of `embedding`, the target's own [vocab, hidden].

    That serves where the file holds none, as the head too if the two are tied. Raises CheckpointError for a damaged folder.
    """
    try:
        config, tensors = AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
        weights = {_EMBEDDING: embedding} | {name: tensor.to(embedding) for name, tensor in tensors.items()}
        model = AutoModelForCausalLM.from_config(config, dtype=embedding.dtype)
        model.load_state_dict(({_HEAD: weights[_EMBEDDING]} if config.tie_word_embeddings else {}) | weights, assign=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot load `{folder}`: {first_line(error)}", hint="cut the target again") from None
    return model.eval()
