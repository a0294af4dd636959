"""FlashDraft: DFlash speculative decoding, from training a drafter to lossless generation.

>>> import flashdraft
>>> model = flashdraft.load("smollm2-135m")
>>> print(model.generate("Why is the sky blue?", max_new_tokens=64).text)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from flashdraft.errors import FlashDraftError
from flashdraft.types import Chunk, Result, SamplingParams, Stats

if TYPE_CHECKING:
    from flashdraft.decoding.grammar import Grammar
    from flashdraft.generate import Model
    from flashdraft.loading import load
    from flashdraft.methods.dflash import DFlashDraftModel

__all__ = [
    "Chunk",
    "DFlashDraftModel",
    "FlashDraftError",
    "Grammar",
    "Model",
    "Result",
    "SamplingParams",
    "Stats",
    "load",
]
__version__ = "0.1.0"

_HEAVY = {
    "DFlashDraftModel": "flashdraft.methods.dflash",
    "Grammar": "flashdraft.decoding.grammar",
    "Model": "flashdraft.generate",
    "load": "flashdraft.loading",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What needs torch is imported at its first use: `flashdraft --help` answers at once."""
        if name not in _HEAVY:
            raise AttributeError(f"module `flashdraft` has no attribute {name!r}")
        return getattr(import_module(_HEAVY[name]), name)
