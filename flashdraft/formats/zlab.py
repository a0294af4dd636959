"""z-lab's DFlash folders (version 1), and what all block drafters' folders share.

A key stands in `dflash_config`, else at the top, else it has its default. Knows keys; does not know
tensors, nor which folder is of which format (`recognise`).
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from flashdraft.errors import CheckpointError
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import Json, part_of
from flashdraft.formats.parse import (
    Fields,
    count_of,
    dtype_of,
    flag_of,
    given,
    layer_ids_of,
    masks_of,
    rope_of,
    scales_of,
    sizes_of,
    spread_layers,
    without_parts,
)

__all__ = ["OWN_FIELDS", "Vocabulary", "own_json", "read", "with_mask_id"]

Vocabulary: TypeAlias = Callable[[], Mapping[str, int]]  # the ids of a target's tokens by name

OWN_FIELDS = {  # of flashdraft_config, with the least that a number may be; None: true or false
    "anchor_first": None,
    "conv_kernel_size": 1,
    "conv_group_size": 1,
    "head_choices": 1,
    "head_states": 1,
    "confidence_head": None,
    "confidence_with_markov": None,
    "raw_tables": None,
}


def read(config: Json, where: str, *, anchor_first: bool = False) -> Fields:
    """The fields of a block drafter without a head, or with one of ours."""
    fields = sizes_of(config, "dflash")
    fields |= masks_of(config, "dflash", where)
    kinds = fields["layer_types"] or ("full_attention",)
    fields["rope_parameters"] = rope_of(_rotating_whole_heads(config), kinds, where)
    fields |= _reads(config, where)
    fields |= scales_of(config, "dflash", where)
    fields["dtype"] = dtype_of(config)
    if anchor_first:
        fields["anchor_first"] = True
        fields["block_size"] += 1  # published: its rows, each of which is a draft
    return fields | _own(config)


def with_mask_id(config: Json, vocabulary: Vocabulary, where: str) -> Json:
    """With the id of a mask token that is told by its name, as SGLang finds it: the one that the
    target's tokenizer has, else the one that it would give to a new token.

    Raises CheckpointError where an id is told, too, and is another token's.
    """
    token = given(config, "mask_token")
    if token is None:
        return config
    if not isinstance(token, str) or not token:
        raise ValueError(f"'mask_token': {token!r}")

    ids = vocabulary()
    found = ids.get(token)
    told = given(config, "mask_token_id")
    if told is None:
        next_id = 1 + max(ids.values())
        return {**config, "mask_token_id": next_id if found is None else found}
    if found is not None and found != count_of("mask_token_id", told, least=0):
        got = f"`{where}` has mask_token_id {told}, but its mask_token {token!r} is {found}"
        raise CheckpointError(got, hint="it is for another tokenizer, or one of the two is wrong")
    return config


def _rotating_whole_heads(config: Json) -> Json:
    """Without what a target says of rotating parts of heads, where z-lab's class passes over it:
    Qwen3's own positions, not scaled, rotate whole heads."""
    rope = {**part_of(config, "rope_scaling"), **part_of(config, "rope_parameters")}
    is_plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    return without_parts(config) if is_plain else config


def _reads(config: Json, where: str) -> Fields:
    """The block, its mask token, and the target's layers whose outputs are features; -1: its
    embeddings."""
    mask = given(config, "mask_token_id")
    layers = given(config, "target_layer_ids")
    num_target_layers = count_of("num_target_layers", config.get("num_target_layers") or 0, least=0)
    if mask is None and given(config, "mask_token") is not None:
        token = given(config, "mask_token")
        got = f"`{where}` names its mask token {token!r}, but not its id"
        hint = (
            "the target's tokenizer knows it: name the target, or put the id into its config.json: "
            "mask_token_id in dflash_config"
        )
        raise CheckpointError(got, hint=hint)
    if mask is None:
        raise KeyError("mask_token_id")
    if layers is None and not num_target_layers:
        raise KeyError("target_layer_ids")

    if layers is None:
        num_layers = count_of("num_hidden_layers", config["num_hidden_layers"])
        layer_ids = spread_layers(num_target_layers, num_layers)
    else:
        layer_ids = layer_ids_of(layers)
    return {
        "block_size": count_of("block_size", given(config, "block_size", 16), least=0),
        "num_target_layers": num_target_layers,
        "mask_token_id": count_of("mask_token_id", mask, least=0),
        "target_layer_ids": layer_ids,
    }


def _own(config: Json) -> Fields:
    """What flashdraft_config says of a head of ours, and of what no published format has."""
    own = part_of(config, "flashdraft_config")
    fields: Fields = {}
    if own.get("sequential_head") is not None:
        fields["sequential_head"] = own["sequential_head"]
        fields["head_rank"] = count_of("head_rank", own.get("head_rank", 64))
    for name, least in OWN_FIELDS.items():
        if name not in own:
            continue
        if least is None:
            fields[name] = bool(flag_of(own, name))
        else:
            fields[name] = count_of(name, own[name], least)
    return fields


def own_json(draft: DraftConfig, *, heads: bool) -> Fields:
    """flashdraft_config: what the published keys beside it do not say.

    heads: whether they say nothing of the layout, the convolutions and the heads.
    """
    own: Fields = {}
    if draft.raw_tables:
        own["raw_tables"] = True
    if not heads:
        return own

    if draft.sequential_head is not None:
        own["sequential_head"] = draft.sequential_head
        own["head_rank"] = draft.head_rank
    usual = draft.without_heads()
    for name in OWN_FIELDS:
        value = getattr(draft, name)
        is_usual = name in ("head_choices", "head_states") and value == getattr(usual, name)
        if value and not is_usual:
            own[name] = value
    return own
