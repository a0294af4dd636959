"""Who looks at the images of a benchmark: features for the distance between sets, and how well an
image agrees with its prompt.

The Frechet distance of the real Inception's features is called FID, and a real CLIP's score
CLIPScore; both are torchmetrics', and need weights that it fetches. Another network's figures have
that network's name. Knows torchmetrics. Does not know pipes or results.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flashdraft
from flashdraft.bench.judge import Judge
from flashdraft.diffusion.models import BUILTIN_PIPES
from flashdraft.errors import FlashDraftError, InvalidParameter, first_line

__all__ = ["Judges", "Look", "load_judges"]

INCEPTION = "inception"
NONE = "none"
_ASSETS = Path(flashdraft.__file__).with_name("assets")
_WIDTH = 2048  # of Inception's features, as FID has it
_EXTRA = "pip install 'flashdraft[image]'"


class Look(NamedTuple):
    """features: [n], None where nothing is compared; agreement: of image and prompt, None where
    that cannot be said of this prompt."""

    features: Tensor | None
    agreement: float | None


class Judges:
    """distance, agreement: what the figures are called; None: there are none."""

    def __init__(self, features: str, clip: str | None, device: str) -> None:
        """features: `inception`, a judge's folder, or `none`. Raises FlashDraftError."""
        self.distance: str | None = None
        self.agreement: str | None = None
        self._device = device
        self._judge: Judge | None = None
        self._inception: nn.Module | None = None
        self._clip: Any = None
        if features == INCEPTION:
            self._inception = _inception().to(device)
            self.distance = "FID"
        elif features != NONE:
            self._judge = Judge.from_pretrained(Path(features)).to(device)
            self.distance = f"Frechet distance of {self._judge.name}'s features"
            self.agreement = f"as {self._judge.name} sees it"
        if clip is not None:
            self._clip = _clip_score(clip).to(device)
            self.agreement = "CLIPScore"
        if self.distance is not None:
            _metric(_Given(1))  # whether there is torchmetrics

    @torch.no_grad()
    def look(self, picture: Tensor, prompt: str) -> Look:
        """At one picture [channels, h, w] in [0, 1]."""
        one = picture[None].float().to(self._device)
        colours = one.expand(-1, 3, -1, -1)
        in_bytes = (colours * 255).round().byte()
        features = None
        agreement = None
        if self._inception is not None:
            features = self._inception(in_bytes)[0].cpu()
        if self._judge is not None:
            features = self._judge(one)[0].cpu()
            asked = self._judge.asked_for(prompt)
            if asked is not None:
                agreement = float(self._judge.named(one)[0] == asked)
        if self._clip is not None:
            agreement = float(self._clip(in_bytes, [prompt]))
        return Look(features, agreement)

    def apart(self, made: list[Tensor], real: list[Tensor]) -> float | None:
        """The Frechet distance of sets of features, by torchmetrics; None of less than two."""
        if len(made) < 2 or len(real) < 2:
            return None
        metric = _metric(_Given(len(made[0])))
        metric.update(torch.stack(real), real=True)
        metric.update(torch.stack(made), real=False)
        return float(metric.compute())


class _Given(nn.Module):
    """A feature extractor for what are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features.double()


def load_judges(features: str, clip: str | None, model: str, device: str) -> Judges:
    """features: `auto` is the judge that is shipped for a built-in model, or none."""
    if features == "auto":
        folder = _ASSETS / f"{model}-judge"
        is_shipped = model in BUILTIN_PIPES and folder.is_dir()
        features = str(folder) if is_shipped else NONE
    if features not in (INCEPTION, NONE) and not Path(features).is_dir():
        hint = f"features is {INCEPTION}, {NONE}, auto, or a judge's folder"
        raise InvalidParameter(f"no folder `{features}`", hint=hint, option="features")
    return Judges(features, clip, device)


def _metric(feature: int | nn.Module) -> Any:
    """torchmetrics' FrechetInceptionDistance: of the real Inception, or of an extractor."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        got = f"distances between sets of images need torchmetrics: {first_line(error)}"
        raise FlashDraftError(got, hint=f"{_EXTRA}, or give --features none") from None
    return FrechetInceptionDistance(feature=feature)


def _inception() -> nn.Module:
    hint = "pip install torch-fidelity, where its weights can be fetched; or --features none"
    try:
        network: nn.Module = _metric(_WIDTH).inception
    except FlashDraftError:
        raise
    except Exception as error:  # what is missing, or the network's own errors
        raise FlashDraftError(f"no Inception: {first_line(error)}", hint=hint) from None
    return network


def _clip_score(clip: str) -> Any:
    hint = "clip is the folder or the hub id of a CLIP model"
    try:
        from torchmetrics.multimodal import CLIPScore

        name: Any = clip  # torchmetrics' types know a few of them, its code takes any
        return CLIPScore(model_name_or_path=name)
    except Exception as error:  # torchmetrics', transformers' and the hub's
        got = f"no CLIP `{clip}`: {first_line(error)}"
        raise InvalidParameter(got, hint=hint, option="clip") from None
