"""FlashDraft: DFlash block-diffusion speculative decoding, from training a drafter to lossless generation.

>>> import flashdraft
>>> model = flashdraft.load("smollm2-135m")
>>> print(model.generate("Why is the sky blue?", max_new_tokens=64).text)
"""

from flashdraft.errors import FlashDraftError
from flashdraft.generate import Model, load
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.types import Chunk, Result, SamplingParams, Stats

__all__ = ["Chunk", "DFlashDraftModel", "FlashDraftError", "Model", "Result", "SamplingParams", "Stats", "load"]
__version__ = "0.1.0"
