"""DFlash 2's folders (z-lab's, incoai's; NeMo's with all keys at the top): v1's keys, and those of
the convolutions and of the candidate selector.

Knows keys; does not know tensors.
"""

from flashdraft.formats import zlab
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import Json
from flashdraft.formats.parse import Fields, count_of, given

__all__ = ["dress", "fits", "keys_of", "read"]

# Published key -> ours. Either key of a pair asks for the other one.
_CONVOLUTIONS = {"conv_kernel_size": "conv_kernel_size", "conv_group_size": "conv_group_size"}
_SELECTOR = {"selector_rank": "head_rank", "selector_top_k": "head_choices"}


def read(config: Json, where: str, *, anchor_first: bool = False) -> Fields:
    """The fields of a drafter with convolutions, a selector, or both."""
    fields = zlab.read(config, where, anchor_first=anchor_first)
    fields |= _pair(config, _CONVOLUTIONS)
    selector = _pair(config, _SELECTOR)
    if selector:
        fields |= selector
        fields["sequential_head"] = "selector"

    group_size = fields.get("conv_group_size")
    if group_size and fields["hidden_size"] % group_size:
        raise ValueError(f"'conv_group_size': {group_size!r}")
    return fields


def _pair(config: Json, keys: dict[str, str]) -> Fields:
    if all(given(config, key) is None for key in keys):
        return {}

    fields: Fields = {}
    for key, name in keys.items():
        value = given(config, key)
        if value is None:
            raise KeyError(key)
        fields[name] = count_of(key, value)
    return fields


def fits(draft: DraftConfig) -> bool:
    """Whether this format says all of it."""
    is_known = draft.sequential_head in (None, "selector") and not draft.confidence_head
    return is_known and bool(draft.conv_kernel_size or draft.sequential_head)


def keys_of(draft: DraftConfig) -> Fields:
    """The keys that version 1 does not have."""
    keys: Fields = {}
    if draft.conv_kernel_size:
        for key, name in _CONVOLUTIONS.items():
            keys[key] = getattr(draft, name)
    if draft.sequential_head is not None:
        for key, name in _SELECTOR.items():
            keys[key] = getattr(draft, name)
    return keys


def dress(draft: DraftConfig, config: Fields) -> None:
    """Make version 1's config.json one of DFlash 2: block_size is nested there."""
    config["architectures"] = ["DFlash2DraftModel"]
    del config["block_size"]
    config["dflash_config"] = {
        "block_size": draft.block_rows,
        **config["dflash_config"],
        **keys_of(draft),
    }
    if draft.anchor_first:
        config["sample_from_anchor"] = True
