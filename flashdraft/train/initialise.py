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
from flashdraft.checkpoint import DraftConfig, spread_layers
from flashdraft.errors import CheckpointError, InvalidParameter
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.train.features import Sample

__all__ = ["copied_from_target", "draft_config", "feature_layers", "random_weights"]

MASK_TOKENS = {"smollm2-135m": 16}  # unused ids of the built-in targets' vocabularies
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_PROJECTIONS = (*_ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def draft_config(
    target: str, *, num_layers: int = 3, block_size: int = 4, num_features: int = 5, mask_token_id: int | None = None
) -> DraftConfig:
    """A draft network of the target's own width, heads and rotary positions that reads `num_features` of its layers.

    mask_token_id: an id that the target never reads or writes; known for the built-in targets, else it must be given.
    Raises InvalidParameter for a shape that cannot be, and CheckpointError for a target that is not llama-shaped.
    """
    files = hub.resolve(target)
    if not isinstance(files, Path):
        raise CheckpointError(f"`{target}` is a GGUF file without a Hugging Face config", hint="give the model's original folder")
    config = hub.read_config(files)
    config = config.get("text_config") or config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if lacking := [key for key in keys if key not in config]:
        raise CheckpointError(
            f"the config.json of `{target}` lacks {lacking[0]}", hint="a draft takes the shape of a llama-like target"
        )
    total = int(config["num_hidden_layers"])
    mask = MASK_TOKENS.get(target) if mask_token_id is None else mask_token_id
    if mask is None or not 0 <= mask < config["vocab_size"]:
        hint = f"give --mask-token-id: an id below {config['vocab_size']} that `{target}` never reads or writes"
        raise InvalidParameter(f"mask_token_id is {mask}", hint=hint)
    if block_size < 2:
        raise InvalidParameter(f"block_size is {block_size}", hint="a block is the anchor and at least one mask: 2 or more")
    if not 1 <= num_layers <= total:
        raise InvalidParameter(f"num_layers is {num_layers}", hint=f"num_layers must be from 1 to {total}, as in `{target}`")
    optional = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
    rotary = ("rope_parameters", "rope_scaling", "rope_theta")
    shape = {key: config[key] for key in (*keys, *optional, *rotary) if config.get(key) is not None}
    special = {"mask_token_id": mask, "target_layer_ids": feature_layers(total, num_features)}
    shape |= {"num_hidden_layers": num_layers, "num_target_layers": total, "block_size": block_size, "dflash_config": special}
    return DraftConfig.from_json(shape, target)


def feature_layers(num_target_layers: int, num_features: int) -> tuple[int, ...]:
    """`spread_layers`, all different. Raises InvalidParameter where the target has not as many to spread over."""
    layers = spread_layers(num_target_layers, num_features) if num_features >= 1 else ()
    if len(set(layers)) != num_features or not layers:
        most = max(num_target_layers - 3, 1)
        raise InvalidParameter(f"num_features is {num_features}", hint=f"num_features must be from 1 to {most} for this target")
    return layers


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
            if name in _ATTENTION:  # the context bypasses input_layernorm, so its scale moves into q, k and v
                weight *= norms["input_layernorm"]
            state[f"layers.{n}.{name}.weight"].copy_(weight)
            if name in _ATTENTION[:2]:
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
    shapes = config.shapes()
    layers = [
        (f"layers.{n}.{name}.weight", f"model.layers.{first + n}.{name}.weight")
        for n in range(config.num_hidden_layers)
        for name in _PROJECTIONS
    ]
    if any(theirs not in tensors or tuple(tensors[theirs].shape) != shapes[ours] for ours, theirs in layers):
        raise CheckpointError(
            f"`{folder}` has no llama-shaped layers of the draft's size to copy", hint="start from --init random"
        )
    return tensors
