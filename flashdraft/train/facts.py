"""What a target's texts and states depend on, as the notes of answers and features hold it.

Knows a loaded model, or a target's name alone. Does not know who writes a note or compares it.
"""

import hashlib

import torch

from flashdraft import hub
from flashdraft.generate import Model
from flashdraft.process import INTS

__all__ = ["named_target", "target_facts"]


def named_target(name: str) -> dict[str, str | None]:
    """A target as notes name it: what it is called, and its weights where they lie on this disk."""
    return {"name": name, "id": hub.identity(name)}


def target_facts(model: Model) -> dict[str, object]:
    """What a target's texts and states depend on besides the prompt and the sampling.

    Kernels that round nothing count as one, `exact`: they compute the same.
    """
    target = model.target
    kernel = "int8" if target.kernel_name == "int8" else "exact"
    embedded = target.embed(torch.zeros(1, **INTS))
    return {
        "target": named_target(target.name),
        "template": _template_digest(model),
        "kernel": kernel,
        "dtype": str(embedded.dtype).removeprefix("torch."),
    }


def _template_digest(model: Model) -> str:
    """What tells a chat template from every other one; `none` where the tokenizer has none."""
    template = getattr(model.tokenizer, "chat_template", None)
    if template is None:
        return "none"
    return hashlib.sha256(str(template).encode()).hexdigest()[:16]
