"""The first weights of a draft network: random, or copied from the target's last layers.

A copy starts with the target's own attention keys: fc passes the last feature through, so that the context's keys and
values are those of the copied layer, and the draft's norms take over the scale that the target's heads had.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flashdraft import hub
from flashdraft.errors import CheckpointError, InvalidParameter
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.parse import spread_layers
from flashdraft.loading import NETWORKS
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.network import DraftNetwork
from flashdraft.models.layers import ROPE_TYPES
from flashdraft.models.target import Target
from flashdraft.process import FLOATS, undisturbed
from flashdraft.train.features import Sample
from flashdraft.types import require

__all__ = ["copied_from_target", "draft_config", "layers_read", "random_weights", "taken_from"]

MASK_TOKENS = {"smollm2-135m": 16}  # unused ids of the built-in targets' vocabularies
_BLOCKS = {"dflash": 4, "eagle3": 6, "medusa": 5, "draft_model": 2}


def draft_config(
    target: Target,
    *,
    num_layers: int = 3,
    block_size: int | None = None,
    num_features: int = 5,
    mask_token_id: int | None = None,
    method: str = "dflash",
) -> DraftConfig:
    """A draft network of the target's own width and heads that reads `num_features` of its layers, for any family.

    mask_token_id: one that the target never reads or writes; needed unless built in. Raises InvalidParameter for a bad shape.
    method: of eagle3 and medusa only the block size is free.
    """
    config: dict[str, Any] = target.config.to_dict()
    total, vocab = target.num_layers, target.vocab_size
    block_size = _BLOCKS[method] if block_size is None else block_size
    if method != "dflash":
        num_layers, mask_token_id = (
            num_layers if method == "draft_model" else 1,
            0,
        )  # none has masks
    mask = MASK_TOKENS.get(target.name) if mask_token_id is None else mask_token_id
    if mask is None or not 0 <= mask < vocab:
        hint = (
            f"give --mask-token-id: an id below {vocab} that `{target.name}` never reads or writes"
        )
        raise InvalidParameter(f"mask_token_id is {mask}", hint=hint)
    require(
        block_size >= 2, "block_size", block_size, "2 or more: the anchor and at least one mask"
    )
    require(
        1 <= num_layers <= total,
        "num_layers",
        num_layers,
        f"from 1 to {total}, as in `{target.name}`",
    )
    names = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
    )
    shape = {name: config[name] for name in names if config.get(name) is not None}
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention") or rope  # gemma3 has one set for each kind of layer
    if (
        rope.get("rope_type", "default") not in ROPE_TYPES
    ):  # the draft's positions need not be the target's
        rope = {"rope_theta": rope.get("rope_theta", 10000.0)}
    rope = {name: value for name, value in rope.items() if name != "partial_rotary_factor"}
    if "num_attention_heads" in shape and "hidden_size" in shape:
        shape.setdefault("num_key_value_heads", shape["num_attention_heads"])
        shape.setdefault("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    written = int(
        target.config.max_position_embeddings
    )  # the rotary scaling that goes with it says what it means
    limit = min(target.context_length, written)
    special = {"mask_token_id": mask, "target_layer_ids": layers_read(total, method, num_features)}
    shape |= {
        "num_hidden_layers": num_layers,
        "num_target_layers": total,
        "block_size": block_size,
        "dflash_config": special,
    }
    shape |= {"vocab_size": vocab, "max_position_embeddings": limit, "rope_parameters": rope}
    return replace(DraftConfig.from_json(shape, target.name), method=method)


def layers_read(num_target_layers: int, method: str, num_features: int) -> tuple[int, ...]:
    """The target's layers that a draft network reads, all different; num_features: of dflash. Raises InvalidParameter."""
    if method in ("medusa", "draft_model"):
        return (num_target_layers,) if method == "medusa" else ()
    most = max(num_target_layers - 3, 1)
    count = (
        min(3, most) if method == "eagle3" else num_features
    )  # eagle3: low, middle and high, all among dflash's five
    layers = spread_layers(num_target_layers, count) if count >= 1 else ()
    require(
        0 < len(set(layers)) == count, "num_features", count, f"from 1 to {most} for this target"
    )
    return layers


@undisturbed
@torch.random.fork_rng(devices=[])  # what modules draw for themselves is drawn again, by `seed`
def random_weights(config: DraftConfig, seed: int) -> DraftNetwork:
    """Of the config's method: matrices from N(0, 0.02), norms at one; Medusa's heads at zero, as in its paper."""
    model, generator = NETWORKS[config.method](config), torch.Generator("cpu").manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1 and config.method != "medusa":
            torch.nn.init.normal_(parameter, 0.0, 0.02, generator=generator)
    return model


@undisturbed
def taken_from(config: DraftConfig, donor: DraftNetwork, seed: int) -> DraftNetwork:
    """A network for one target that starts from another one's drafter: every tensor of the same shape, the others random.

    A sequential head comes along where the vocabulary is the same. Raises InvalidParameter where no layer fits.
    """
    theirs, c = donor.state_dict(), donor.config
    if c.sequential_head is not None and c.vocab_size == config.vocab_size:
        head: dict[str, Any] = {"sequential_head": c.sequential_head, "head_rank": c.head_rank}
        config = replace(config, draft_vocab_size=c.draft_vocab_size, **head)
    model = random_weights(config, seed)
    if config.draft_vocab_size is not None:
        model.extras = {name: donor.extras[name] for name in ("d2t", "t2d")}
    state = model.state_dict()
    fits = {name for name in state if name in theirs and theirs[name].shape == state[name].shape}
    if not any(name.endswith("proj.weight") for name in fits):
        got = f"that drafter's layers are {c.hidden_size} wide, these {config.hidden_size}"
        raise InvalidParameter(
            got,
            hint="start from a drafter of the same hidden size, or with --init target or random",
        )
    for name in fits:
        state[name].copy_(theirs[name])
    return model


@undisturbed
@torch.no_grad()
def copied_from_target(
    config: DraftConfig, target: str, sample: Sample | None, seed: int
) -> DraftNetwork:
    """Draft layers from the target's own; dflash wants a `sample` to calibrate the scale of queries and keys."""
    model = random_weights(config, seed)
    if config.method == "medusa":
        return model
    total, count = config.num_target_layers, config.num_hidden_layers
    if config.method == "draft_model":  # the first ones and the last ones
        first = (count + 1) // 2
        model.load_state_dict(
            _layers_of(target, config, [*range(first), *range(total - count + first, total)])
        )
        return model
    copied = _layers_of(target, replace(config, method="dflash"), range(total - count, total))
    if config.method == "eagle3":
        _copy_eagle3(model, copied)
        return model
    assert isinstance(model, DFlashDraftModel)
    assert sample is not None
    last = sample.features[:, -config.hidden_size :].float()
    unit = last / last.pow(2).mean(-1, keepdim=True).add(config.rms_norm_eps).sqrt()
    model.fc.weight[:, -config.hidden_size :] += torch.eye(config.hidden_size, **FLOATS)
    for n in range(config.num_hidden_layers):
        norm = copied.pop(f"layers.{n}.input_layernorm.weight")
        for name in (
            "q",
            "k",
            "v",
        ):  # the context bypasses input_layernorm, so its scale moves into them
            weight = copied[f"layers.{n}.self_attn.{name}_proj.weight"].mul_(norm)
            if name != "v":
                scale = (unit @ weight.T).pow(2).mean().sqrt()
                copied[f"layers.{n}.self_attn.{name}_norm.weight"] = scale.expand(config.head_dim)
    model.load_state_dict(copied, strict=False)
    return model


def _copy_eagle3(model: Any, copied: dict[str, Tensor]) -> None:
    """The target's last layer: it reads the last feature in the state's half of its input, and little of the embedding yet."""
    hidden, state = model.config.hidden_size, model.state_dict()
    model.fc.weight[:, -hidden:] += torch.eye(hidden, **FLOATS)
    for name, weight in copied.items():
        own = state[
            "norm.weight" if name == "norm.weight" else f"midlayer.{name.removeprefix('layers.0.')}"
        ]
        own[..., -weight.shape[-1] :] = weight
    state["midlayer.hidden_norm.weight"].copy_(copied["layers.0.input_layernorm.weight"])


def _layers_of(target: str, config: DraftConfig, chosen: Sequence[int]) -> dict[str, Tensor]:
    """These layers of the target in float32 under the draft's names. Raises CheckpointError where shapes differ."""
    folder, shapes, tensors = hub.resolve(target), config.shapes(), dict[str, Tensor]()
    names = {"model.norm.weight": "norm.weight"}  # theirs -> ours
    for name in shapes:
        if name.endswith(("proj.weight", "layernorm.weight")):
            _, n, rest = name.split(".", 2)
            names[f"model.layers.{chosen[int(n)]}.{rest}"] = name
    if isinstance(folder, Path) and hub.read_config(folder).get("quantization_config"):
        got = f"`{folder}` is quantised: its layers cannot be copied as they lie"
        raise CheckpointError(got, hint="start from --init random")
    for path in sorted(folder.glob("*.safetensors")) if isinstance(folder, Path) else ():
        with safe_open(path, framework="pt") as file:
            tensors |= {
                names[name]: file.get_tensor(name).float()
                for name in names.keys() & set(file.keys())
            }
    if any(
        name not in tensors or tuple(tensors[name].shape) != shapes[name] for name in names.values()
    ):
        lacking = f"`{folder}` has no llama-shaped layers of the draft's size to copy"
        raise CheckpointError(lacking, hint="start from --init random")
    return tensors
