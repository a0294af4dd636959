"""z-lab's own package, `dflash`: DFlash v1 and DFlash 2.

Reads config.json by z-lab's rules and model.safetensors under its own names, and nothing besides.
"""

from dataclasses import replace
from pathlib import Path

from flashdraft.export.order import Exported, Order, refused
from flashdraft.formats.write import write_draft

__all__ = ["export"]


def export(order: Order, folder: Path) -> Exported:
    """config.json and model.safetensors, plain. Raises CheckpointError."""
    config = order.config
    if config.method != "dflash":
        hint = "it runs DFlash v1 and DFlash 2; `--to vllm` takes EAGLE-3"
        raise refused(order, "z-lab's package", f"it is a drafter of {config.method}", hint=hint)

    plain = replace(config, draft_vocab_size=None, sequential_head=None)
    known = plain.shapes()
    tensors = {name: tensor for name, tensor in order.tensors.items() if name in known}
    write_draft(folder, plain, tensors)
    return Exported(("python", "-m", "dflash"))
