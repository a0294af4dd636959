"""Domino's folders (2605.29707; SpecForge's): v1's keys, and those of the GRU that corrects logits
by the tokens before.

`shift_label` says whether the anchor's row predicts, too (`recognise`); a block has `block_size`
rows either way, and one draft fewer. Knows keys; does not know tensors.
"""

from flashdraft.errors import CheckpointError
from flashdraft.formats import zlab
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import Json
from flashdraft.formats.parse import Fields, count_of, given

__all__ = ["dress", "fits", "read"]


def read(config: Json, where: str, *, anchor_first: bool = False) -> Fields:
    """The fields of a drafter whose first draft is as the network says, and the others corrected.

    Raises CheckpointError for other lengths of what is not corrected.
    """
    # SpecForge's default is none; SGLang, the one that serves it, takes 1 alone.
    uncorrected = count_of(
        "pure_draft_prefix_len", given(config, "pure_draft_prefix_len", 0), least=0
    )
    if uncorrected != 1:
        got = f"`{where}` is a Domino drafter with pure_draft_prefix_len {uncorrected}"
        hint = "1 is read, as SGLang serves it; SpecForge, which trained it, runs the others"
        raise CheckpointError(got, hint=hint)

    fields = zlab.read(config, where)
    fields["anchor_first"] = anchor_first
    fields["sequential_head"] = "domino"
    fields["head_states"] = _size(config, "gru_hidden_dim")
    fields["head_rank"] = _size(config, "emb_dim")
    return fields


def _size(config: Json, name: str) -> int:
    value = given(config, name)
    if value is None:
        raise KeyError(name)
    return count_of(name, value)


def fits(draft: DraftConfig) -> bool:
    """Whether this format says all of it."""
    is_bare = not draft.conv_kernel_size and not draft.confidence_head
    return draft.sequential_head == "domino" and is_bare


def dress(draft: DraftConfig, config: Fields) -> None:
    """Make version 1's config.json one of Domino's, as SpecForge exports it."""
    config["dflash_config"] = {
        **config["dflash_config"],
        "projector_type": "domino",
        "shift_label": draft.anchor_first,
        "pure_draft_prefix_len": 1,
        "gru_hidden_dim": draft.head_states,
        "emb_dim": draft.head_rank,
    }
