"""DSpark's folders, and DeepSpec's plain DFlash, which is the same without heads.

DeepSpec has all keys at the top, in a copy of the target's config: what the copy says of windows
and of parts of heads means nothing. SpecForge has them in `dflash_config`. Blocks are anchor-first
unless a flag says no (`recognise`). Knows keys; does not know tensors.
"""

from flashdraft.errors import CheckpointError
from flashdraft.formats import zlab
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import Json
from flashdraft.formats.parse import Fields, count_of, given, without_parts

__all__ = ["HEAD_TYPES", "dress", "fits", "keys_of", "read"]

HEAD_TYPES = {"vanilla": "markov", "gated": "markov_gated", "rnn": "markov_rnn"}

_OF_TARGET = ("sliding_window", "use_sliding_window", "max_window_layers")
_NUM_ANCHORS = 512  # DeepSpec's class asks for it; only its training reads it


def read(config: Json, where: str, *, anchor_first: bool = True) -> Fields:
    """The fields of a drafter with a Markov head, a confidence head, both or none."""
    if "dflash_config" not in config:
        config = _without_target(config, where)
    fields = zlab.read(config, where, anchor_first=anchor_first)

    rank = count_of("markov_rank", given(config, "markov_rank", 0), least=0)
    if rank:
        kind = str(given(config, "markov_head_type", "vanilla")).lower()
        if kind not in HEAD_TYPES:
            raise ValueError(f"'markov_head_type': {kind!r}")
        fields["sequential_head"] = HEAD_TYPES[kind]
        fields["head_rank"] = rank

    has_confidence = _flag(config, "enable_confidence_head")
    with_markov = has_confidence and _flag(config, "confidence_head_with_markov")
    if with_markov and not rank:
        got = f"`{where}` has confidence_head_with_markov, but markov_rank 0"
        raise CheckpointError(got, hint="its config.json contradicts itself: fetch it again")
    fields["confidence_head"] = has_confidence
    fields["confidence_with_markov"] = with_markov
    return fields


def _flag(config: Json, name: str) -> bool:
    value = given(config, name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name!r}: {value!r}")
    return value


def _without_target(config: Json, where: str) -> Fields:
    """DeepSpec's config without the keys of its target that mean nothing to the draft."""
    kinds = set(config.get("layer_types") or ())
    if kinds - {"full_attention"}:
        got = f"`{where}` has layers of {sorted(kinds)[-1]}, which DeepSpec's format has not"
        hint = "all its layers see everything; SpecForge's, with dflash_config, may have windows"
        raise CheckpointError(got, hint=hint)
    flat = without_parts(config)
    for name in _OF_TARGET:
        flat.pop(name, None)
    return flat


def fits(draft: DraftConfig) -> bool:
    """Whether this format says all of it."""
    kind = draft.sequential_head
    has_heads = kind in HEAD_TYPES.values() or (kind is None and draft.confidence_head)
    is_plain = kind is None and draft.anchor_first
    return (has_heads or is_plain) and not draft.conv_kernel_size


def keys_of(draft: DraftConfig) -> Fields:
    """The keys that version 1 does not have."""
    rank = draft.head_rank if draft.sequential_head is not None else 0
    keys: Fields = {"markov_rank": rank}
    for kind, name in HEAD_TYPES.items():
        if draft.sequential_head == name:
            keys["markov_head_type"] = kind
    keys["enable_confidence_head"] = draft.confidence_head
    if draft.confidence_head:
        keys["confidence_head_with_markov"] = draft.confidence_with_markov
    return keys


def dress(draft: DraftConfig, config: Fields) -> None:
    """Make version 1's config.json DeepSpec's, all at the top; or SpecForge's, where it says what
    DeepSpec's cannot: windows, causality, scales."""
    special = config["dflash_config"]
    config["block_size"] = draft.block_rows
    config["tie_word_embeddings"] = False
    if not draft.anchor_first:
        config["sample_from_anchor"] = False

    is_bidirectional = all(mask.window is None and not mask.causal for mask in draft.masks)
    has_scales = len(special) > 2  # more than the mask token and the layers
    if is_bidirectional and draft.causal is None and not has_scales:
        config["architectures"] = ["Qwen3DSparkModel"]
        del config["dflash_config"]
        del config["use_sliding_window"]
        config |= special | keys_of(draft) | {"num_anchors": _NUM_ANCHORS}
        return
    config["architectures"] = ["DSparkDraftModel"]
    config["dflash_config"] = {**special, "projector_type": "dspark", **keys_of(draft)}
