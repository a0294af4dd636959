"""What a target's texts and states depend on, as the notes of answers and features hold it."""

import hashlib
from typing import Any

import torch

from flashdraft import hub
from flashdraft.generate import Model
from flashdraft.process import INTS

__all__ = ["named_target", "target_facts"]


def named_target(name: str) -> dict[str, Any]:
    """A target as notes name it: by what it is called, and by its weights where they lie on this disk."""
    return {"name": name, "id": hub.identity(name)}


def target_facts(model: Model) -> dict[str, Any]:
    """What a target's texts and states depend on besides the prompt and the sampling. Kernels that round nothing are one."""
    template = getattr(model.tokenizer, "chat_template", None)
    digest = "none" if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16]
    embedded = model.target.embed(torch.zeros(1, **INTS))
    kernel = "int8" if model.target.kernel_name == "int8" else "exact"
    dtype = str(embedded.dtype).removeprefix("torch.")
    return {
        "target": named_target(model.target.name),
        "template": digest,
        "kernel": kernel,
        "dtype": dtype,
    }
