"""A drafter's folder on one screen: what it is, what its network is like, what it reads.

Knows formats and configs. Does not know files, targets, nor who can run it.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import Json
from flashdraft.formats.recognise import Format

__all__ = ["Line", "sheet"]

_LAYOUTS = {
    "fill-in": "row k of a block predicts the token at its own place",
    "anchor-first": "row k of a block predicts the token behind its own place",
}


class Line(NamedTuple):
    label: str
    text: str


def sheet(form: Format, config: DraftConfig, tensors: Mapping[str, Tensor]) -> list[Line]:
    """What is told of a drafter, a line each."""
    lines = [Line("format", form.name)]
    if form.layout:
        lines.append(Line("layout", f"{form.layout}: {_LAYOUTS[form.layout]}"))
    lines.append(Line("proposal", _proposal(config)))
    lines.append(Line("network", _network(config, tensors)))
    if config.method == "dflash":
        lines.append(Line("attention", _attention(config)))
    if config.method != "medusa":
        lines.append(Line("positions", _positions(config)))
    if config.method == "dflash":
        lines.append(Line("head", _head(config)))
    if config.method in ("dflash", "eagle3"):
        lines.append(Line("reads", _reads(config)))
    lines.append(Line("vocabulary", _vocabulary(config, tensors)))
    return lines


def _proposal(config: DraftConfig) -> str:
    count = config.block_size - 1
    drafts = "1 draft" if count == 1 else f"{count} drafts"
    if config.method != "dflash":
        return f"{drafts} behind the anchor"
    return f"{drafts} behind the anchor, by one pass over a block of {config.block_rows}"


def _network(config: DraftConfig, tensors: Mapping[str, Tensor]) -> str:
    count = 0
    nbytes = 0
    for tensor in tensors.values():
        count += tensor.numel()
        nbytes += tensor.nbytes
    size = f"{count / 1e6:.1f} M parameters, {nbytes / 2**20:.1f} MiB in {config.dtype}"
    if config.method == "medusa":
        return f"{config.block_size - 1} heads of {config.hidden_size}; {size}"

    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    plural = "" if config.num_hidden_layers == 1 else "s"
    layers = f"{config.num_hidden_layers} layer{plural} of {config.hidden_size}"
    shape = f"{heads} heads of {config.head_dim}, {groups} of keys, MLP {config.intermediate_size}"
    return f"{layers}, {shape}; {size}"


def _attention(config: DraftConfig) -> str:
    """Layers of one kind in a row are told together."""
    parts = []
    previous = None
    count = 0
    for mask in [*config.masks, None]:
        if mask != previous and previous is not None:
            window = "full" if previous.window is None else f"window {previous.window}"
            way = "causal in a block" if previous.causal else "both ways in a block"
            parts.append(f"{count} x {window}, {way}")
            count = 0
        previous = mask
        count += 1
    return "; ".join(parts)


def _positions(config: DraftConfig) -> str:
    parts = []
    for kind, rope in config.ropes.items():
        theta = f"theta {rope['rope_theta']:g}"
        scaling = rope.get("rope_type", "default")
        told = theta if scaling == "default" else f"{scaling}, {theta}"
        parts.append(told if len(config.ropes) == 1 else f"{kind}: {told}")
    return f"rotary, {'; '.join(parts)}; trained to {config.trained_length}"


def _head(config: DraftConfig) -> str:
    kind = config.sequential_head
    rank = config.head_rank
    parts = []
    if config.conv_kernel_size:
        taps = f"{config.conv_kernel_size} taps, groups of {config.conv_group_size}"
        parts.append(f"convolutions along a block ({taps})")
    if kind == "selector":
        parts.append(f"candidate selector of rank {rank} over {config.head_choices} a row")
    elif kind == "domino":
        parts.append(f"Domino's GRU of {config.head_states}, rank {rank}")
    elif kind is not None:
        name = kind.replace("_", " ")
        parts.append(f"{name} of rank {rank}")
    if config.confidence_head:
        parts.append("confidence of every row")
    return ", ".join(parts) if parts else "none: drafts do not see each other"


def _reads(config: DraftConfig) -> str:
    layers = ", ".join(map(str, config.target_layer_ids))
    depth = config.num_target_layers or "unknown"
    if not layers:
        return "three of its target's layers, the usual ones"
    return f"the outputs of layers {layers} (from 0) of a target with {depth}"


def _vocabulary(config: DraftConfig, tensors: Mapping[str, Tensor]) -> str:
    told = f"{config.vocab_size} tokens"
    drafted = config.draft_vocab_size
    if drafted not in (None, config.vocab_size):
        told += f", {drafted} of them drafted"
    if config.method == "dflash":
        told += f"; mask token {config.mask_token_id}"

    own = []
    if "embed_tokens.weight" in tensors:
        own.append("embedding")
    if "lm_head.weight" in tensors:
        own.append("lm_head")
    whose = f"its own {' and '.join(own)}" if own else "the target's embedding and lm_head"
    return f"{told}; {whose}"


def summary(config: Json) -> str:
    """Of a folder that is no drafter: the language model that its config.json describes."""
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else config
    classes = config.get("architectures") or ["a model of no class"]
    return f"{classes[0]}, model_type {inner.get('model_type')}"
