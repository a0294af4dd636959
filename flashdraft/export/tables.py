"""A drafter's own embedding, lm_head and reduced vocabulary, as far as an engine can have them.

Knows which of them are the target's own rows. Does not know any engine.
"""

import torch
from torch import Tensor

from flashdraft.export.order import Order, TargetShape, refused
from flashdraft.export.target_tables import embedding_of, head_of
from flashdraft.process import INTS

__all__ = [
    "EMBEDDING",
    "HEAD",
    "own_tables",
    "refuse_tables",
    "target_ids",
    "with_head",
    "without_reduction",
]

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
_REDUCTION = ("d2t", "t2d")


def own_tables(order: Order) -> dict[str, Tensor]:
    """The tables in its file that are not the target's own rows.

    Without a target to look at: all that are there.
    """
    found: dict[str, Tensor] = {}
    for name in (EMBEDDING, HEAD):
        table = order.tensors.get(name)
        if table is None:
            continue
        ids = target_ids(order) if name == HEAD else torch.arange(len(table), **INTS)
        if order.target is None or not _is_copy(table, order.target, name, ids):
            found[name] = table
    return found


def refuse_tables(order: Order, engine: str) -> None:
    """Raises CheckpointError where a drafter has tables of its own, for engines that give it the
    target's."""
    for name in own_tables(order):
        why = f"it has a {name} of its own, and that engine gives drafters the target's"
        hint = "`--to vllm` keeps it"
        if order.target is None:
            hint += "; if it is a copy of the target's, say --target"
        raise refused(order, engine, why, hint=hint)


def without_reduction(order: Order, engine: str) -> tuple[str, ...]:
    """What is said where an engine drafts from the whole vocabulary by the target's lm_head.

    Raises CheckpointError where it has an lm_head of its own over the reduced one.
    """
    reduced = order.config.draft_vocab_size
    if reduced is None:
        return ()
    if HEAD in own_tables(order):
        why = f"its lm_head is over {reduced} tokens of its own choice"
        raise refused(order, engine, why, hint="`--to vllm` keeps a reduced vocabulary")
    return (
        f"its reduced vocabulary of {reduced} tokens: drafts come from all "
        f"{order.config.vocab_size}, which costs time, not acceptance",
    )


def with_head(order: Order) -> dict[str, Tensor]:
    """d2t, and the lm_head's rows over the reduced vocabulary: its own, or the target's."""
    head = order.tensors.get(HEAD)
    if head is None:
        assert order.target is not None  # the caller's to check
        head = head_of(order.target)[target_ids(order)]
        head = head.to(order.tensors["norm.weight"].dtype)
    found = {name: order.tensors[name] for name in _REDUCTION if name in order.tensors}
    found[HEAD] = head
    return found


def target_ids(order: Order) -> Tensor:
    """Of the lm_head's rows."""
    offsets = order.tensors.get("d2t")
    if offsets is None:
        return torch.arange(len(order.tensors[HEAD]), **INTS)
    return offsets.long() + torch.arange(len(offsets), **INTS)


def _is_copy(table: Tensor, target: TargetShape, name: str, ids: Tensor) -> bool:
    known = ids < target.vocab_size
    theirs = head_of(target) if name == HEAD else embedding_of(target)
    rows = theirs[ids[known]]
    return torch.equal(table[known].to(rows.dtype), rows)
