"""The first weights of a draft network: random, or copied from the target's last layers.

A copy starts with the target's own attention keys: fc passes the last feature through, so that the context's keys and
values are those of the copied layer, and the draft's norms take over the scale that the target's heads had.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from flashdraft import hub
from flashdraft.checkpoint import DraftConfig
from flashdraft.errors import CheckpointError
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.train.features import Sample

__all__ = ["copied_from_target", "random_weights"]

_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_PROJECTIONS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def random_weights(config: DraftConfig, seed: int) -> DFlashDraftModel:
    """Matrices from N(0, 0.02), norms at one."""
    model = DFlashDraftModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


@torch.no_grad()
def copied_from_target(config: DraftConfig, target: str, sample: Sample, seed: int) -> DFlashDraftModel:
    """Draft layers from the target's last ones; `sample` calibrates the scale of queries and keys."""
    model = random_weights(config, seed)
    folder = hub.resolve(target)
    tensors = _layers(folder, config) if isinstance(folder, Path) else {}
    last = sample.features[:, -config.hidden_size :].float()
    unit = last / last.pow(2).mean(-1, keepdim=True).add(config.rms_norm_eps).sqrt()
    model.fc.weight[:, -config.hidden_size :] += torch.eye(config.hidden_size)
    state = model.state_dict()
    for n in range(config.num_hidden_layers):
        prefix = f"model.layers.{config.num_target_layers - config.num_hidden_layers + n}."
        norms = {name: tensors[prefix + name + ".weight"] for name in ("input_layernorm", "post_attention_layernorm")}
        for name in _PROJECTIONS:
            weight = tensors[prefix + name + ".weight"].clone()
            if name in _PROJECTIONS[:3]:  # the context bypasses input_layernorm, so its scale moves into q, k and v
                weight *= norms["input_layernorm"]
            state[f"layers.{n}.{name}.weight"].copy_(weight)
            if name in _PROJECTIONS[:2]:
                heads = (unit @ weight.T).view(len(unit), -1, config.head_dim)
                scale = heads.pow(2).mean().sqrt()
                state[f"layers.{n}.{name.replace('proj', 'norm')}.weight"].fill_(float(scale))
        state[f"layers.{n}.post_attention_layernorm.weight"].copy_(norms["post_attention_layernorm"])
    state["norm.weight"].copy_(tensors["model.norm.weight"])
    return model


def _layers(folder: Path, config: DraftConfig) -> dict[str, Tensor]:
    """The target's last layers in float32. Raises CheckpointError where its shapes are not the draft's."""
    tensors: dict[str, Tensor] = {}
    first = config.num_target_layers - config.num_hidden_layers
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                parts = name.split(".")
                if name == "model.norm.weight" or (parts[:2] == ["model", "layers"] and int(parts[2]) >= first):
                    tensors[name] = file.get_tensor(name).float()
    wanted = f"model.layers.{first}.self_attn.q_proj.weight"
    shape = (config.num_attention_heads * config.head_dim, config.hidden_size)
    if wanted not in tensors or tuple(tensors[wanted].shape) != shape:
        raise CheckpointError(f"`{folder}` has no llama-shaped layers of the draft's size to copy", hint="start from --init random")
    return tensors
