"""How a pipe's loop makes one output of the UNet's rows with and without the text.

Knows classifier-free guidance (Ho and Salimans 2207.12598) and its rescaling (Lin et al.
2305.08891, section 3.4), as Stable Diffusion's pipelines have them. Does not know samplers.
"""

from typing import Any

import torch
from torch import Tensor

from flashdraft.errors import InvalidParameter

__all__ = ["Guidance", "are_close", "number"]

_CLOSE = 1e-3  # relative: two ways to compute one float32 output
_CLOSE_NARROW = 2e-2  # of float16 and bfloat16


class Guidance:
    """That of one loop."""

    def __init__(self, pipe: object) -> None:
        self._pipe = pipe
        self._fitted: float | None = None

    def now(self) -> tuple[float, float]:
        """Scale and rescale, which a callback may change.

        Raises InvalidParameter where they are not one for all images.
        """
        if self._fitted is not None:
            return self._fitted, 0.0
        scale = number(getattr(self._pipe, "_guidance_scale", 1.0), "guidance_scale")
        rescale = number(getattr(self._pipe, "_guidance_rescale", 0.0), "guidance_rescale")
        return scale, rescale

    def of(self, raw: Tensor) -> Tensor:
        """The outputs [m, ...] that the loop makes of the UNet's [branches, m, ...]."""
        if len(raw) == 1:
            return raw[0]
        scale, rescale = self.now()
        without, with_text = raw
        guided: Tensor = without + scale * (with_text - without)
        if rescale > 0:
            dims = list(range(1, guided.dim()))
            ratio = with_text.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
            guided = rescale * (guided * ratio) + (1 - rescale) * guided
        return guided

    def explains(self, raw: Tensor, output: Tensor) -> bool:
        """Whether the loop's output [m, ...] is made like this; with the scale that fits best where
        the pipe does not say its own."""
        if are_close(self.of(raw), output):
            return True
        if len(raw) == 2:
            self._fitted = _fitted_scale(raw, output)
        return are_close(self.of(raw), output)


def _fitted_scale(raw: Tensor, output: Tensor) -> float:
    without, with_text = raw.double()
    apart = with_text - without
    scale = (apart * (output.double() - without)).sum() / (apart**2).sum()
    return float(scale)


def are_close(ours: Tensor, given: Tensor, times: float = 1.0) -> bool:
    """Whether they are one output, in the given one's precision, or `times` that far from it."""
    is_narrow = given.dtype in (torch.float16, torch.bfloat16)
    reach = times * (_CLOSE_NARROW if is_narrow else _CLOSE)
    gap = torch.linalg.vector_norm(ours.float() - given.float())
    return bool(gap <= reach * torch.linalg.vector_norm(given.float()))


def number(value: Any, name: str) -> float:
    """Raises InvalidParameter for a setting that is not one for all images of a batch."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise InvalidParameter(
        f"{name} is not one number for all images of a batch",
        hint="draw images of different settings one by one",
        option=name,
    )
