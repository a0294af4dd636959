"""z-lab's own package, `dflash` 0.1.0: DFlash v1 and DFlash 2.

Reads config.json by z-lab's rules and model.safetensors under its own names; drafts by the target's
embedding and lm_head.
"""

from pathlib import Path

from flashdraft.export.blocks import (
    head_losses,
    network_of,
    refuse_logits,
    refuse_normed,
    refuse_parts,
    target_scale,
)
from flashdraft.export.order import Converted, Exported, Order, write_folder
from flashdraft.export.tables import refuse_tables, without_reduction
from flashdraft.formats.written import json_of

__all__ = ["convert", "export", "told"]

_ENGINE = "z-lab's package"
_SCALED_LOSS = (
    "the scale of its target's embedding, but on MLX: elsewhere that package reads bare rows, and "
    "few drafts are accepted"
)
_RAW_LOSS = (
    "that it reads bare rows of its target's embedding: so does that package but on MLX; other "
    "readers of this folder scale them"
)


def convert(order: Order) -> Converted:
    """The plain folder. Raises CheckpointError for a drafter that it cannot have."""
    refuse_parts(order, _ENGINE, ("dflash", "dflash2"))
    refuse_tables(order, _ENGINE)
    refuse_logits(order, _ENGINE)
    refuse_normed(order, _ENGINE)
    losses = head_losses(order) + without_reduction(order, _ENGINE)
    if target_scale(order) != 1:
        losses += (_RAW_LOSS if order.config.raw_tables else _SCALED_LOSS,)
    config, tensors = network_of(order)
    command = ["dflash", "generate", "transformers", "--model", order.target_name]
    command += ["--draft", str(order.out), "PROMPT"]
    return Converted(json_of(config), tensors, Exported(tuple(command), losses))


def told(order: Order) -> Exported:
    """What a user would be told. Raises CheckpointError."""
    return convert(order).exported


def export(order: Order, folder: Path) -> Exported:
    """config.json and model.safetensors."""
    return write_folder(folder, convert(order))
