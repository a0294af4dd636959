"""A drafter's folder -> its config and its tensors, every one of them checked.

Knows files, and which tensors belong to which config. Does not know what a key of config.json means
(`parse`), nor which target a drafter fits (`match`).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flashdraft.errors import CheckpointError
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.eagle3 import eagle3_completed, eagle3_names
from flashdraft.formats.foreign import refuse_files
from flashdraft.formats.parse import KINDS
from flashdraft.formats.recognise import recognise
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.formats.weights import MASK_ROW, read_mask_row, read_tensors, shapes_of
from flashdraft.formats.written import config_of
from flashdraft.formats.zlab import Vocabulary
from flashdraft.hub import read_config
from flashdraft.models.heads import HEADS
from flashdraft.process import BOOLS, INTS

__all__ = ["MOST_NODES", "read_draft"]

Tensors = Mapping[str, Tensor]

MOST_NODES = 1024  # of a proposal: its masks and states are square in them

_COPIES = ("embed_tokens.weight", "lm_head.weight")  # of the target's, frozen, in DeepSpec's files


def read_draft(
    folder: Path, vocabulary: Vocabulary | None = None
) -> tuple[DraftConfig, dict[str, Tensor]]:
    """A drafter's config and tensors.

    vocabulary: the target's, for a drafter that tells its mask token by name. Every tensor is there
    with its shape, or CheckpointError says which is not.
    """
    refuse_files(folder)
    where = str(folder)
    written = read_config(folder)
    shapes = shapes_of(folder)
    config = config_of(written, where, shapes, vocabulary)
    _check_block(config, folder)

    tensors = read_tensors(folder, pickled=config.method == "eagle3")
    if config.method == "eagle3":
        tensors = eagle3_names(tensors, where)
        config = eagle3_completed(config, tensors)
    if config.tied_head and "lm_head.weight" in tensors:
        config = replace(config, tied_head=False)
    if config.method == "dflash":
        row = read_mask_row(folder, config.mask_token_id, config.hidden_size)
        if row is not None:
            tensors[MASK_ROW] = row
    _check_tied_head(config, tensors, folder)
    _check_layers(config, folder)
    _check_shapes(config, tensors, folder)
    _check_numbers(tensors, folder)
    _check_heads(config, folder)
    _check_vocabulary(config, tensors, folder)

    is_whole = config.draft_vocab_size is None and not config.raw_tables
    if is_whole and recognise(written, shapes, where).publisher == "DeepSpec":
        for name in _COPIES:
            tensors.pop(name, None)
    return config, tensors


# --- Whether it belongs together


def _check_block(config: DraftConfig, folder: Path) -> None:
    """Raises CheckpointError for blocks without a draft, and for those that no proposal can be."""
    got = f"`{folder}` has block_size {config.block_rows}"
    if config.block_size < 2:
        is_shorter = config.block_rows < config.block_size  # all its rows predict
        least = "1 row or more" if is_shorter else "the anchor and 1 mask or more"
        raise CheckpointError(got, hint=f"a block is {least}")
    if config.block_size > MOST_NODES:
        hint = f"a proposal has {MOST_NODES} nodes at most: mend its config.json"
        raise CheckpointError(got, hint=hint)


def _check_tied_head(config: DraftConfig, tensors: Tensors, folder: Path) -> None:
    if not config.tied_head:
        return
    if "embed_tokens.weight" not in tensors or _is_reduced(config):
        lacks = "tie_word_embeddings is true, but it holds no whole embed_tokens to be its lm_head"
        hint = "a folder with an lm_head.weight or a whole embed_tokens.weight works"
        raise CheckpointError(f"`{folder}`: {lacks}", hint=hint)


def _is_reduced(config: DraftConfig) -> bool:
    """Whether the draft has a vocabulary of its own, which d2t must lead to the target's."""
    return config.draft_vocab_size not in (None, config.vocab_size)


def _check_layers(config: DraftConfig, folder: Path) -> None:
    types = config.layer_types
    unknown = sorted(set(types) - set(KINDS))
    if unknown:
        got = f"`{folder}` has a layer of type {unknown[0]}"
        raise CheckpointError(got, hint="known: full_attention, sliding_attention")

    if types and len(types) != config.num_hidden_layers:
        got = f"`{folder}` has {len(types)} layer_types for {config.num_hidden_layers} layers"
        raise CheckpointError(got, hint="its config.json is damaged")

    if config.sequential_head not in (None, *HEADS):
        got = f"`{folder}` has a sequential head {config.sequential_head!r}, which is not known"
        hint = f"was it written by a newer FlashDraft? known here: {', '.join(HEADS)}"
        raise CheckpointError(got, hint=hint)


def _check_shapes(config: DraftConfig, tensors: Tensors, folder: Path) -> None:
    """Every tensor of this config is there with its shape, and no other."""
    vocab_size = config.vocab_size
    rows = config.draft_vocab_size or vocab_size
    required = tensor_shapes(config)
    optional: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (vocab_size, config.hidden_size),
        "lm_head.weight": (rows, config.hidden_size),
        "d2t": (rows,),
        "t2d": (vocab_size,),
        MASK_ROW: (config.hidden_size,),
    }

    if "d2t" in tensors and config.draft_vocab_size is None:
        got = f"`{folder}` holds d2t, but its config.json has no draft_vocab_size"
        hint = f"put draft_vocab_size {len(tensors['d2t'])} into it, or fetch it again"
        raise CheckpointError(got, hint=hint)

    expected = dict(required)
    for name, shape in optional.items():
        if name in tensors or (name == "d2t" and _is_reduced(config)):
            expected[name] = shape
    for name, shape in expected.items():
        if name not in tensors:
            hint = "the folder is incomplete, or of another method"
            raise CheckpointError(f"`{folder}` lacks the tensor {name}", hint=hint)
        found = tuple(tensors[name].shape)
        if found != shape:
            got = f"{name} has shape {list(found)}, its config.json asks for {list(shape)}"
            raise CheckpointError(got, hint="the two do not belong together")

    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        got = f"`{folder}` has a tensor {unknown[0]}, unknown to {config.method}"
        raise CheckpointError(got, hint="it is of another method")


def _check_numbers(tensors: Tensors, folder: Path) -> None:
    """Raises CheckpointError for weights that are no numbers as they lie: packed ones, or what a
    failed training left."""
    for name, tensor in tensors.items():
        if name in ("d2t", "t2d"):
            continue
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            got = f"`{folder}` holds {name} as {dtype}"
            raise CheckpointError(got, hint="quantised drafters are not read")

        is_float8 = tensor.element_size() == 1  # torch cannot compare them
        wide = tensor.float() if is_float8 else tensor
        if not _is_finite(wide):
            got = f"{name} of `{folder}` holds infinite numbers, or none at all (NaN)"
            hint = "its training failed, or the file is damaged: fetch or write it again"
            raise CheckpointError(got, hint=hint)


def _is_finite(tensor: Tensor) -> bool:
    """By the least and the largest number, which is five times as quick as asking for each."""
    if not tensor.numel():
        return True
    least, most = tensor.aminmax()  # NaN where there is one
    return bool(least.isfinite()) and bool(most.isfinite())


def _check_heads(config: DraftConfig, folder: Path) -> None:
    """Raises CheckpointError for heads that no attention can have."""
    if config.method == "medusa":  # it has no attention
        return

    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    if heads % groups:
        got = f"`{folder}` has num_attention_heads {heads} for num_key_value_heads {groups}"
        raise CheckpointError(got, hint="the first must be a multiple of the second")
    if config.head_dim % 2:
        got = f"`{folder}` has head_dim {config.head_dim}"
        raise CheckpointError(got, hint="rotary positions turn pairs: it must be even")


def _check_vocabulary(config: DraftConfig, tensors: Tensors, folder: Path) -> None:
    """Raises CheckpointError where a token of the draft's vocabulary is none of the target's, and
    where d2t and t2d tell two vocabularies."""
    offsets = tensors.get("d2t")
    if offsets is None:
        _check_whole(tensors, folder)
        return

    hint = "fetch or write it again"
    if offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool:
        dtype = str(offsets.dtype).removeprefix("torch.")
        raise CheckpointError(f"`{folder}` holds d2t as {dtype}, not as whole numbers", hint=hint)

    ids = offsets.long() + torch.arange(len(offsets), **INTS)
    beyond = ids[(ids < 0) | (ids >= config.vocab_size)]
    if len(beyond):
        got = f"d2t leads to token {int(beyond[0])} of a vocabulary of {config.vocab_size}"
        raise CheckpointError(f"`{folder}` is damaged: {got}", hint=hint)

    known = tensors.get("t2d")
    if known is None:
        return
    told = torch.zeros(config.vocab_size, **BOOLS)
    told[ids] = True
    differing = (known != 0) != told
    if bool(differing.any()):
        got = f"d2t and t2d differ in whether token {int(differing.int().argmax())} is drafted"
        hint = "d2t holds ids less the numbers of their rows, t2d says which ids: write both again"
        raise CheckpointError(f"`{folder}` is damaged: {got}", hint=hint)


def _check_whole(tensors: Tensors, folder: Path) -> None:
    """Raises CheckpointError where t2d leaves tokens out, and no d2t says the order of the rest."""
    known = tensors.get("t2d")
    if known is None or bool((known != 0).all()):
        return
    num_drafted = int((known != 0).sum())
    got = f"`{folder}` holds t2d with {num_drafted} of {len(known)} tokens, but no d2t"
    hint = (
        "which row of its lm_head is which token stands in d2t alone: fetch the whole folder, or "
        "take t2d out if all tokens are drafted"
    )
    raise CheckpointError(got, hint=hint)
