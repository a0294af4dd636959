"""What will the target say of the next points? Drafts of a block of denoising steps.

A draft names a prediction (x0, eps) for every point of a block before the target has seen any of
them. What makes the exact mode exact: a prediction may depend on the committed point and on noises
of EARLIER steps of the block, never on the noise of its own step (De Bortoli et al. 2501.05370,
section 3).

Knows predictions and transitions. Does not know targets, pipelines or couplings.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flashdraft.diffusion.transitions import Prediction, Transitions

__all__ = ["Block", "Draft", "ExtrapolatedDraft", "FrozenDraft", "Past"]


@dataclass(frozen=True)
class Past:
    """What the target said of the last two points of one image that it has read and kept. [...]

    features: [channels, h, w], its hidden state at the last of them, where a draft needs that.
    """

    step: int
    said: Prediction
    step_before: int | None = None
    said_before: Prediction | None = None
    features: Tensor | None = None

    def then(self, step: int, said: Prediction, features: Tensor | None = None) -> "Past":
        """After one point more."""
        return Past(step, said, self.step, self.said, features)


class Block(Protocol):
    """The predictions of one block of one image."""

    def __call__(self, lag: int, step: int, point: Tensor) -> Prediction:
        """lag: steps since the block's first point; point: [1, ...]. Lags come in order."""


class Draft(Protocol):
    """Something that predicts blocks."""

    name: str
    needs_features: bool  # of the target, in `Past`

    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Block:
        """The block that begins at this point [...], a step behind its past. noises: [lags, ...],
        which its steps will take: a lag's prediction must not depend on its own, nor on later
        ones."""


class FrozenDraft:
    """Every point of the block is predicted to come from the clean latents that the target saw
    last. Free of charge."""

    name = "frozen-x0"
    needs_features = False

    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Block:
        del point, noises
        clean = past.said.clean[None]

        def predict(lag: int, step: int, point: Tensor) -> Prediction:
            del lag
            return table.implied(step, point, clean)

        return predict


class ExtrapolatedDraft:
    """The predicted noise goes on as a straight line through its last two values, in the logarithm
    of the noise level: for samplers without noise (tolerance mode)."""

    name = "extrapolated"
    needs_features = False

    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Block:
        del point, noises
        log_level = (table.sigma / table.alpha).log()
        start = past.said.noise
        slope = torch.zeros_like(start)
        if past.said_before is not None and past.step_before is not None:
            run = float(log_level[past.step] - log_level[past.step_before])
            slope = (start - past.said_before.noise) / run

        def predict(lag: int, step: int, point: Tensor) -> Prediction:
            del lag
            ahead = float(log_level[step] - log_level[past.step])
            if math.isinf(ahead):  # from noise alone, where the line has no slope yet
                ahead = 0.0
            noise = (start + ahead * slope)[None]
            return table.from_noise(step, point, noise)

        return predict
