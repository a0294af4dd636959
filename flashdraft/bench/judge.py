"""A small classifier of pictures, which judges what others made: its features are compared between
sets of pictures, and its verdict is whether a picture shows what its prompt asked for.

What it says is about its own few kinds of pictures. It is no Inception, and no CLIP: its figures
are never called FID or CLIP score. Knows pictures and words. Does not know pipelines or metrics.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flashdraft.errors import CheckpointError
from flashdraft.files import write_file, write_tensors
from flashdraft.process import FLOATS

__all__ = ["Judge"]

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_FORMAT = 1


class Judge(nn.Module):
    """Convolutions to `num_features` numbers a picture, and from these to one of `classes`.

    classes: a word each. side: of its pictures, in pixels; others are scaled to it. name: what it
    is called in a table.
    """

    def __init__(
        self, name: str, classes: Sequence[str], *, side: int = 32, num_features: int = 64
    ) -> None:
        super().__init__()
        self.name = name
        self.classes = tuple(classes)
        self.side = side
        self.num_features = num_features
        self.layers = nn.Sequential(
            *_convolution(1, 16, 1),
            *_convolution(16, 32, 2),
            *_convolution(32, 32, 1),
            *_convolution(32, 64, 2),
            *_convolution(64, 64, 2),
            nn.Flatten(),
        )
        width = 64 * (side // 8) ** 2
        self.to_features = nn.Linear(width, num_features, **FLOATS)
        self.to_classes = nn.Linear(num_features, len(classes), **FLOATS)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Judge":
        """Raises CheckpointError for a folder that holds none."""
        hint = "give a folder that recipes/image_judge.py wrote"
        try:
            config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            sizes = {"side": config["side"], "num_features": config["num_features"]}
            judge = cls(config["name"], config["classes"], **sizes)
            judge.load_state_dict(load_file(folder / _WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            got = f"`{folder}` holds no judge: {error}"
            raise CheckpointError(got.splitlines()[0], hint=hint) from None
        return judge.eval()

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "flashdraft_judge": _FORMAT,
            "name": self.name,
            "classes": list(self.classes),
            "side": self.side,
            "num_features": self.num_features,
        }
        write_tensors(folder / _WEIGHTS, self.state_dict())
        write_file(folder / _CONFIG, (json.dumps(config, indent=2) + "\n").encode())

    def forward(self, pictures: Tensor) -> Tensor:
        """Features [n, num_features] of pictures [n, channels, h, w] in [0, 1]."""
        grey = pictures.float().mean(1, keepdim=True)
        if grey.shape[-2:] != (self.side, self.side):
            size = (self.side, self.side)
            grey = nn.functional.interpolate(grey, size=size, mode="bilinear", antialias=True)
        features: Tensor = self.to_features(self.layers(2 * grey - 1))
        return features

    def scores(self, pictures: Tensor) -> Tensor:
        """[n, classes], logarithms of what is likely, up to a constant."""
        scores: Tensor = self.to_classes(nn.functional.silu(self(pictures)))
        return scores

    @torch.no_grad()
    def named(self, pictures: Tensor) -> list[str]:
        """The class of every picture [n, channels, h, w] in [0, 1]."""
        return [self.classes[place] for place in self.scores(pictures).argmax(1).tolist()]

    def asked_for(self, prompt: str) -> str | None:
        """The one class that a prompt names; None where it names none or several."""
        words = prompt.lower().replace(",", " ").split()
        named = [word for word in self.classes if word in words]
        return named[0] if len(named) == 1 else None


def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, **FLOATS),
        nn.GroupNorm(8, outputs, **FLOATS),
        nn.SiLU(),
    ]
