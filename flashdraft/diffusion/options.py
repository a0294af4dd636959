"""What the recording of trajectories and the training of a draft on them are told.

A default exists here once; the command line reads the help from here. Imports nothing that the
extra `image` brings: help needs none of it.
"""

from dataclasses import dataclass

from flashdraft.types import HIGHEST, check_options, option, require

__all__ = ["DraftTrainOptions", "RecordOptions"]

_MOST = 2**31 - 1


@dataclass(frozen=True)
class RecordOptions:
    """How the images are made whose trajectories are recorded."""

    steps: int = option(100, "steps of the sampler", least=2, most=100_000)
    guidance: float = option(1.0, "scale of the guidance; 1 is none", least=0)
    eta: float | None = option(None, "noise of ddim's steps; 1 if not given", above=0, most=1)
    batch: int = option(8, "images that are made together", least=1, most=_MOST)
    seed: int = option(0, "of the first image; the next one has the next", least=0, most=HIGHEST)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class DraftTrainOptions:
    """How one run trains a draft."""

    steps: int = option(3000, "optimizer steps", least=1, most=_MOST)
    samples: int = option(24, "blocks a step", least=1, most=_MOST)
    lags: int = option(8, "points of a block", least=1, most=1024)
    lr: float = option(2e-3, "peak learning rate of AdamW", above=0)
    warmup: float = option(
        0.03, "share of the steps spent warming up, from 0 to 1", least=0, most=1
    )
    weight_decay: float = option(0.01, "AdamW's weight decay", least=0)
    clip: float = option(1.0, "largest norm of the gradient", above=0)
    ema: float = option(
        0.995, "decay of the weights' moving average that is measured and kept", least=0, below=1
    )
    held_out: float = option(0.1, "share of the images that are only measured on", above=0, below=1)
    width: int = option(48, "channels of the network", least=8, most=1 << 16)
    blocks: int = option(3, "its residual blocks", least=1, most=1024)
    eval_every: int = option(
        250, "steps between measurements of the accepted steps", least=1, most=_MOST
    )
    save_every: int = option(250, "steps between checkpoints", least=1, most=_MOST)
    seed: int = option(0, "of the first weights and of the blocks", least=0, most=HIGHEST)

    def __post_init__(self) -> None:
        check_options(self)
        require(self.width % 8 == 0, "width", self.width, "a multiple of 8")
