"""A sampler's noises, seen ahead of the sampler.

A block needs the noises of steps that the pipe's loop has not come to. They are drawn from copies
of its generators; the generators themselves draw a step's noise when the loop takes the step, as
they would alone. Whoever else draws from them in between is noticed, and whatever ends the loop
early leaves them where the sampler alone would.

Knows generators. Does not know samplers or pipelines.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashdraft.process import DOUBLES

__all__ = ["Noises"]


class Noises:
    """Of one loop, all images.

    draws: by step, whether the sampler draws anything. like: [images, ...], in whose shape, dtype
    and device it draws; dtype: where it is another. generator: as the pipe was given it.
    """

    def __init__(
        self,
        draws: Sequence[bool],
        like: Tensor,
        generator: object,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._draws = draws
        self._like = like
        self._dtype = like.dtype if dtype is None else dtype
        self._generator = generator
        self._own = _generators(generator, like.device)
        self._ahead: list[torch.Generator] = []
        self._drawn: dict[int, Tensor] = {}  # [images, ...], by step
        self._next = 0  # step that is drawn next, ahead
        self._look_from_here()
        uniforms = []
        for seed in _seeds(self._own, len(like)):
            coins = torch.Generator("cpu").manual_seed(seed)
            own = torch.rand(len(draws), generator=coins, **DOUBLES)
            uniforms.append(own)
        self._uniforms = torch.stack(uniforms)

    def of(self, step: int, place: int) -> Tensor:
        """What the step will take: [...], float32; zeros where nothing is drawn."""
        while self._next <= step:
            if self._draws[self._next]:
                self._drawn[self._next] = self._draw(self._ahead)
            self._next += 1
        noise = self._drawn.get(step)
        if noise is None:
            return torch.zeros_like(self._like[place], dtype=torch.float32)
        return noise[place].float()

    def uniform(self, step: int, place: int) -> float:
        """In [0, 1), of the step's coin."""
        return float(self._uniforms[place, step])

    def take(self, step: int) -> bool:
        """The step is taken: its noise is drawn where the sampler draws it. Whether it is the one
        that was seen ahead; if not, somebody else has drawn, and `of` says the new ones."""
        if not self._draws[step]:
            return True
        drawn = self._draw(self._own)
        seen = self._drawn.get(step)
        if seen is not None and torch.equal(seen, drawn):
            return True
        self._drawn = {step: drawn}
        self._next = step + 1
        self._look_from_here()
        return False

    def forget(self, step: int) -> None:
        """What lies behind."""
        self._drawn.pop(step, None)

    def _look_from_here(self) -> None:
        copies: dict[int, torch.Generator] = {}
        self._ahead = []
        for own in self._own:
            if id(own) not in copies:  # entries of a list may be one generator
                copy = torch.Generator(own.device)
                copy.set_state(own.get_state())
                copies[id(own)] = copy
            self._ahead.append(copies[id(own)])

    def _draw(self, generators: list[torch.Generator]) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        like = self._like
        is_list = isinstance(self._generator, list)
        noise: Tensor = randn_tensor(
            like.shape,
            generator=generators if is_list else generators[0],
            device=like.device,
            dtype=self._dtype,
        )
        return noise


def _generators(generator: Any, device: torch.device) -> list[torch.Generator]:
    """Those that are drawn from; torch's own where none is given."""
    if isinstance(generator, list):
        return [own if own is not None else _torchs_own(device) for own in generator]
    return [_torchs_own(device) if generator is None else generator]


def _torchs_own(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        own: torch.Generator = torch.cuda.default_generators[index]
        return own
    return torch.default_generator


def _seeds(generators: list[torch.Generator], count: int) -> list[int]:
    """Of the coins, by image: from the generators' states, of which nothing is drawn. An image with
    a generator of its own has the coins that it would have alone."""
    if len(generators) != count:
        generators = [generators[0]] * count
    seen: Counter[bytes] = Counter()
    seeds = []
    for own in generators:
        state = own.get_state().cpu().numpy().tobytes()
        digest = hashlib.sha256(state + seen[state].to_bytes(8, "little"))
        seen[state] += 1
        key = digest.digest()[:7]
        seeds.append(int.from_bytes(key, "little"))
    return seeds
