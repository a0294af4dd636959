"""A learned draft of a block: a small network that says how the noise changes the clean latents.

Where a sampler comes to a step later, the target sees other clean latents than a step before. Given
what it saw last they change by no foreseeable direction, but for the one that the noise gives: the
innovation, times the covariance of what the target still holds possible (Tweedie's second-order
formula). The innovation of a block's every point is known when its noises are drawn. The network
reads it in standard units, beside the clean latents, the point and the target's features at the
last verified point, and says what to add to the clean latents: one forward for the whole block. A
lag reads the noises before it and no other; that is what keeps the exact mode exact (De Bortoli et
al. 2501.05370, section 3). Its last layer is zero at first, so that it begins as the frozen draft.

Knows the target's UNet by its config, some of its weights and the features' width. Does not know
pipelines.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flashdraft import hub
from flashdraft.diffusion.drafts import Block, Past
from flashdraft.diffusion.transitions import Prediction, Transitions
from flashdraft.errors import CheckpointError, DraftMismatch, InvalidParameter, first_line
from flashdraft.files import write_file, write_tensors
from flashdraft.formats.foreign import IMAGE_METHOD
from flashdraft.pretrained import read_config
from flashdraft.process import FLOATS, INTS

__all__ = [
    "METHOD",
    "BlockDraftModel",
    "DraftShape",
    "Identity",
    "LearnedDraft",
    "Seen",
    "feature_channels",
    "frozen_points",
    "identity_of",
    "is_image_draft",
]

METHOD = IMAGE_METHOD  # what a draft's config.json says that it is
_FORMAT = 1
_WEIGHTS = "model.safetensors"
_TRAINED = "give the folder that `flashdraft image-train` wrote"
_FREQUENCIES = 8  # of each noise level's embedding
_SAMPLED = 256  # weights of a UNet that tell its trainings apart
_ROUNDED = 2.0**-7  # relative: between weights in float32 and in bfloat16
_LEAST = 1e-12


# ---- which UNet ----------------------------------------------------------------------------------


class Identity(NamedTuple):
    """Of a UNet. shape: a digest of its config and its weights' names and sizes; some: of its
    weights, from all over it."""

    shape: str
    some: list[float]

    def is_like(self, other: "Identity") -> bool:
        """Whether it is the same training, in whatever dtype."""
        if self.shape != other.shape or len(self.some) != len(other.some):
            return False
        own = torch.tensor(self.some, **FLOATS)
        others = torch.tensor(other.some, **FLOATS)
        room = _ROUNDED * own.abs() + 1e-6
        return bool(((own - others).abs() <= room).all())


def identity_of(unet: Any) -> Identity:
    config = {name: value for name, value in dict(unet.config).items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    weights = dict(sorted(unet.state_dict().items()))
    total = sum(weight.numel() for weight in weights.values())
    stride = max(total // _SAMPLED, 1)
    some: list[float] = []
    passed = 0
    for name, weight in weights.items():
        digest.update(f"{name} {list(weight.shape)}".encode())
        first = -passed % stride
        some += weight.detach().flatten()[first::stride].float().tolist()
        passed += weight.numel()
    return Identity(digest.hexdigest()[:16], some)


def feature_channels(unet: object) -> int:
    """Of what the UNet's last layer reads: the features. Raises InvalidParameter for a UNet whose
    last layer is called something else."""
    last = getattr(unet, "conv_out", None)
    if not isinstance(last, nn.Conv2d):
        got = f"the pipe's {type(unet).__name__} has no last layer `conv_out`"
        hint = "the draft reads that layer's input; take the draft frozen-x0"
        raise InvalidParameter(got, hint=hint, option="draft")
    return last.in_channels


# ---- the network ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DraftShape:
    """Of a network. groups: of its norms, a divisor of the width."""

    latent_channels: int = 4
    feature_channels: int = 40
    width: int = 48
    groups: int = 8
    blocks: int = 3


class Seen(NamedTuple):
    """What is known of the last verified points of n images. level: [n], the logarithm of the noise
    to the signal there; the rest [n, channels, h, w], the point in units of variance one."""

    clean: Tensor
    point: Tensor
    features: Tensor
    level: Tensor


class _Residual(nn.Module):
    """Two convolutions. Between them, what was seen says what of the states counts, and where."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, **FLOATS)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, **FLOATS)
        self.norm2 = nn.GroupNorm(groups, width, **FLOATS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, **FLOATS)
        self.modulation = nn.Conv2d(width, 2 * width, 1, **FLOATS)

    def forward(self, states: Tensor, context: Tensor) -> Tensor:
        """states, context: [m, width, h, w]."""
        hidden = self.conv1(nn.functional.silu(self.norm1(states)))
        scale, shift = self.modulation(nn.functional.silu(context)).chunk(2, dim=1)
        hidden = self.norm2(hidden) * (1 + scale) + shift
        changed: Tensor = self.conv2(nn.functional.silu(hidden))
        return states + changed


class BlockDraftModel(nn.Module):
    """unet: whose draft it is."""

    def __init__(self, shape: DraftShape, unet: Identity) -> None:
        super().__init__()
        self.shape = shape
        self.unet = unet
        channels = shape.latent_channels
        width = shape.width
        self.innovation_in = nn.Conv2d(channels, width, 3, padding=1, **FLOATS)
        self.features_in = nn.Conv2d(shape.feature_channels, width, 1, **FLOATS)
        self.seen_in = nn.Conv2d(2 * channels, width, 3, padding=1, **FLOATS)
        self.levels_in = nn.Sequential(
            nn.Linear(4 * _FREQUENCIES, width, **FLOATS),
            nn.SiLU(),
            nn.Linear(width, width, **FLOATS),
        )
        residuals = [_Residual(width, shape.groups) for _ in range(shape.blocks)]
        self.residuals = nn.ModuleList(residuals)
        self.norm_out = nn.GroupNorm(shape.groups, width, **FLOATS)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1, **FLOATS)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, seen: Seen, innovations: Tensor, levels: Tensor) -> Tensor:
        """What to add to the clean latents: [n, lags, channels, h, w].

        innovations: [n, lags, channels, h, w], standard normal; levels: [n, lags].
        """
        count, lags = levels.shape
        from_features = self.features_in(seen.features)
        from_latents = self.seen_in(torch.cat([seen.clean, seen.point], dim=1))
        past = (from_features + from_latents).repeat_interleave(lags, 0)
        before = seen.level[:, None].expand(count, lags)
        waves = torch.cat([_waves(levels), _waves(levels - before)], dim=2)
        context = past + self.levels_in(waves.flatten(0, 1))[..., None, None]

        states = self.innovation_in(innovations.flatten(0, 1))
        for block in self.residuals:
            states = block(states, context)
        said = self.conv_out(nn.functional.silu(self.norm_out(states)))
        # The root of the information that the steps add, times a variance that can be left.
        gain = (-2 * levels).exp() - (-2 * before).exp()
        size = gain.clamp(min=_LEAST).sqrt() / (1 + (-2 * levels).exp())
        added: Tensor = said.unflatten(0, (count, lags)) * size[..., None, None, None]
        return added

    def save_pretrained(self, folder: str | Path, *, readme: str | None = None) -> None:
        """config.json and model.safetensors; `readme` is the model card."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"method": METHOD, "format": _FORMAT, **asdict(self.shape)}
        config["unet"] = self.unet._asdict()
        tensors = {name: weight.contiguous() for name, weight in self.state_dict().items()}
        write_tensors(folder / _WEIGHTS, tensors)
        write_file(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())
        if readme is not None:
            write_file(folder / "README.md", readme.encode())

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "BlockDraftModel":
        """A folder, or a hub id. Raises CheckpointError for what is no such draft, ModelNotFound
        for a hub's that cannot be had."""
        folder = _folder_of(str(name))
        config = read_config(folder)
        if config.get("method") != METHOD:
            raise CheckpointError(f"`{name}` holds no image draft", hint=_TRAINED)
        if config.get("format") != _FORMAT:
            got = f"`{name}` has format {config.get('format')}, and this version reads {_FORMAT}"
            raise CheckpointError(got, hint="pip install -U flashdraft")
        try:
            model = cls(_shape_in(config), Identity(**config["unet"]))
            model.load_state_dict(load_file(folder / _WEIGHTS))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            got = f"the image draft in `{name}` is damaged: {first_line(error)}"
            raise CheckpointError(got, hint="fetch or train it again") from None
        return model.eval()


def _folder_of(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir() and name.strip():
        if not (path / "config.json").is_file():
            got = f"`{name}` holds no image draft: it has no config.json"
            raise CheckpointError(got, hint=_TRAINED)
        return path
    if path.exists() or name.count("/") != 1:
        raise CheckpointError(f"`{name}` is no folder of an image draft", hint=_TRAINED)
    found = hub.resolve(name)
    assert isinstance(found, Path), "only files of one suffix are anything else"
    return found


def _shape_in(config: Mapping[str, Any]) -> DraftShape:
    known = {field.name: config[field.name] for field in fields(DraftShape)}
    return DraftShape(**known)


def is_image_draft(folder: Path) -> bool:
    """Whether a folder's config.json says that."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        return bool(read_config(folder).get("method") == METHOD)
    except CheckpointError:
        return False


def _waves(values: Tensor) -> Tensor:
    """[n, lags, 2 * _FREQUENCIES]"""
    powers = torch.arange(_FREQUENCIES, dtype=values.dtype, device=values.device)
    angles = values[..., None] * 2.0 ** (powers - 3)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


# ---- the draft -----------------------------------------------------------------------------------


class LearnedDraft:
    """A Draft by a BlockDraftModel."""

    name = "learned"
    needs_features = True

    def __init__(self, model: BlockDraftModel) -> None:
        self.model = model.eval()

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "LearnedDraft":
        """As BlockDraftModel.from_pretrained."""
        return cls(BlockDraftModel.from_pretrained(name))

    def check(self, unet: object) -> None:
        """Raises DraftMismatch where the draft was trained for another UNet, InvalidParameter for
        one without features."""
        feature_channels(unet)
        if not self.model.unet.is_like(identity_of(unet)):
            got = "the draft was trained for another UNet than this pipe's"
            raise DraftMismatch(got, hint="train one for it: flashdraft image-train")

    @torch.no_grad()
    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Block:
        assert past.features is not None, "the target's features were not kept"
        self.model.to(point.device)  # a pipe goes to another one, or its models lie elsewhere
        lags = len(noises)
        last = torch.tensor([past.step], **INTS)
        steps = past.step + 1 + torch.arange(lags, **INTS)[None]
        # As wide as the target's prediction: clipped latents and their noise are no point.
        alpha = float(table.alpha[past.step])
        sigma = float(table.sigma[past.step])
        seen_point = alpha * past.said.clean + sigma * past.said.noise
        clean = past.said.clean[None].float()
        points = frozen_points(table, point[None], clean, steps, noises[None])
        seen = seen_at(table, last, clean, seen_point[None].float(), past.features[None].float())
        added = self.model(seen, *innovations(table, seen, last, steps, points))[0]
        drafted = clean + added

        def predict(lag: int, step: int, point: Tensor) -> Prediction:
            return table.implied(torch.tensor([step], **INTS), point, drafted[lag, None])

        return predict


def seen_at(
    table: Transitions, last: Tensor, clean: Tensor, point: Tensor, features: Tensor
) -> Seen:
    """last: [n], steps; point: [n, ...], as the sampler has it before them."""
    alpha = table.alpha[last]
    sigma = table.sigma[last]
    unit = 1 / (alpha**2 + sigma**2).sqrt()
    level = (sigma / alpha).log()
    return Seen(clean, _times(unit, point), features, level.to(point))


def innovations(
    table: Transitions, seen: Seen, last: Tensor, steps: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Of points [n, lags, ...] before steps [n, lags], and the noise levels there [n, lags].

    A point is as good as alpha / sigma^2 times it, the information in it. That grows by the clean
    latents times what the steps add to the signal-to-noise ratio, and by a noise of that variance:
    the innovation, here divided by its deviation. (So it is exactly for samplers that draw all of
    the noise which the schedule has: DDPM, DDIM with eta 1, SDE-DPM-Solver++, Euler ancestral.)
    """
    alpha = table.alpha
    sigma = table.sigma
    unit = (alpha**2 + sigma**2).sqrt()
    weight = alpha / sigma**2
    ratio = (alpha / sigma) ** 2
    gain = (ratio[steps] - ratio[last][:, None]).clamp(min=_LEAST)
    deviation = gain.sqrt()
    before = _times((weight * unit)[last], seen.point)[:, None]
    told = _times(gain, seen.clean[:, None])
    moved = _times(weight[steps], points) - before - told
    levels = (sigma[steps] / alpha[steps]).log()
    return _times(1 / deviation, moved), levels.to(points)


def frozen_points(
    table: Transitions, start: Tensor, clean: Tensor, steps: Tensor, noises: Tensor
) -> Tensor:
    """[n, lags, ...]: where the frozen draft comes to from `start` [n, ...], before steps [n,
    lags], by the noises [n, lags, ...] of those before each."""
    points = [start]
    for lag in range(steps.shape[1] - 1):
        own = steps[:, lag]
        mean = table.mean(own, points[-1], table.implied(own, points[-1], clean))
        points.append(mean + _times(table.deviation[own], noises[:, lag]))
    return torch.stack(points, dim=1)


def _times(factors: Tensor, values: Tensor) -> Tensor:
    """Factors [n] or [n, lags] times values [n, ...] or [n, lags or 1, ...]."""
    dims = values.dim() - factors.dim()
    return factors.to(values).view(*factors.shape, *[1] * dims) * values
