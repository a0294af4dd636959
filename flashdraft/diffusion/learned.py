"""A learned draft of a block: a small network that corrects the frozen clean latents.

One forward for the whole block. For every lag it reads the point to which the frozen draft would
come with the block's noises before that lag (and no other: that is what keeps the exact mode
exact), the clean latents that the target saw last, the target's features at that point, and the
noise levels of both; what it says is added to the clean latents. Its last layer is zero at first,
so that it begins as the frozen draft (De Bortoli et al. 2501.05370, section 3.3, with the target's
features in place of a second model).

Knows the target's UNet by its config and by the features' width. Does not know pipelines.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from flashdraft.diffusion.drafts import Block, FrozenDraft, Past
from flashdraft.diffusion.transitions import Prediction, Transitions
from flashdraft.errors import CheckpointError, DraftMismatch
from flashdraft.process import FLOATS, INTS

__all__ = ["BlockDraftModel", "LearnedDraft", "unet_identity"]

_FREQUENCIES = 8  # of each noise level's embedding


class _Residual(nn.Module):
    """Two convolutions whose input is shifted and scaled by what is known of the noise levels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, **FLOATS)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, **FLOATS)
        self.modulation = nn.Linear(width, 2 * width, **FLOATS)
        self.norm2 = nn.GroupNorm(groups, width, **FLOATS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, **FLOATS)

    def forward(self, states: Tensor, levels: Tensor) -> Tensor:
        hidden = self.conv1(nn.functional.silu(self.norm1(states)))
        scale, shift = self.modulation(levels)[..., None, None].chunk(2, dim=1)
        hidden = self.norm2(hidden) * (1 + scale) + shift
        changed: Tensor = self.conv2(nn.functional.silu(hidden))
        return states + changed


class BlockDraftModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The network. unet: `unet_identity` of the target that it was trained for."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_channels: int = 4,
        feature_channels: int = 40,
        width: int = 48,
        groups: int = 8,
        blocks: int = 3,
        unet: str = "",
        flashdraft_format: int = 1,
    ) -> None:
        super().__init__()
        self.features_in = nn.Conv2d(feature_channels, width, 1, **FLOATS)
        self.points_in = nn.Conv2d(3 * latent_channels, width, 3, padding=1, **FLOATS)
        self.levels_in = nn.Sequential(
            nn.Linear(4 * _FREQUENCIES, width, **FLOATS),
            nn.SiLU(),
            nn.Linear(width, width, **FLOATS),
        )
        self.residuals = nn.ModuleList(_Residual(width, groups) for _ in range(blocks))
        self.norm_out = nn.GroupNorm(groups, width, **FLOATS)
        self.conv_out = nn.Conv2d(width, latent_channels, 3, padding=1, **FLOATS)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self, points: Tensor, clean: Tensor, features: Tensor, level: Tensor, seen_level: Tensor
    ) -> Tensor:
        """What to add to the clean latents: [n, channels, h, w].

        points: [n, ...], where the frozen draft comes to, in units of variance one; clean: [n,
        ...], what the target saw last, features: [n, feature_channels, h, w], there; level,
        seen_level: [n], logarithms of the noise to the signal at the points, and where the target
        saw last.
        """
        moved = points - clean
        states = self.points_in(torch.cat([points, clean, moved], dim=1))
        states = states + self.features_in(features)
        levels = self.levels_in(torch.cat([_waves(level), _waves(level - seen_level)], dim=1))
        for block in self.residuals:
            states = block(states, levels)
        added: Tensor = self.conv_out(nn.functional.silu(self.norm_out(states)))
        return added


def _waves(values: Tensor) -> Tensor:
    """[n, 2 * _FREQUENCIES]"""
    powers = torch.arange(_FREQUENCIES, dtype=values.dtype, device=values.device)
    angles = values[:, None] * 2.0 ** (powers - 3)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class LearnedDraft:
    """A Draft by a BlockDraftModel."""

    name = "learned"
    needs_features = True

    def __init__(self, model: BlockDraftModel) -> None:
        self.model = model.eval()
        self._frozen = FrozenDraft()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LearnedDraft":
        """A folder, or a hub id. Raises CheckpointError for what is no such draft."""
        try:
            model = BlockDraftModel.from_pretrained(folder)
        except Exception as error:
            got = f"`{folder}` holds no image draft: {error}"
            hint = "give the folder that `flashdraft image-train` wrote"
            raise CheckpointError(got.splitlines()[0], hint=hint) from None
        return cls(model)

    def check(self, unet: Any) -> None:
        """Raises DraftMismatch where the draft was trained for another UNet."""
        own = self.model.config.unet
        if own != unet_identity(unet):
            got = "the draft was trained for another UNet than this pipe's"
            raise DraftMismatch(got, hint="train one for it: flashdraft image-train")

    @torch.no_grad()
    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Block:
        assert past.features is not None, "the target's features were not kept"
        first = past.step + 1
        points = self.frozen_points(table, past, point, noises)
        steps = torch.arange(first, first + len(noises), **INTS)
        added = self.added(table, past, steps, points)
        clean = past.said.clean + added

        def predict(lag: int, step: int, point: Tensor) -> Prediction:
            return table.implied(torch.tensor([step], **INTS), point, clean[lag, None])

        return predict

    def frozen_points(
        self, table: Transitions, past: Past, point: Tensor, noises: Tensor
    ) -> Tensor:
        """[lags, ...]: where the frozen draft comes to by the noises before each lag."""
        predict = self._frozen.block(table, past, point, noises)
        points = [point]
        for lag in range(len(noises) - 1):
            step = past.step + 1 + lag
            steps = torch.tensor([step], **INTS)
            said = predict(lag, step, points[-1][None])
            mean = table.mean(steps, points[-1][None], said, None)[0]
            points.append(mean + float(table.deviation[step]) * noises[lag])
        return torch.stack(points)

    def added(self, table: Transitions, past: Past, steps: Tensor, points: Tensor) -> Tensor:
        """What the network adds to the clean latents at these points [lags, ...]."""
        count = len(points)
        model = self.model
        assert past.features is not None
        features = past.features[None].to(model.dtype).expand(count, -1, -1, -1)
        clean = past.said.clean[None].to(model.dtype).expand(count, -1, -1, -1)
        unit = unit_scale(table, steps).to(points).view(-1, 1, 1, 1)
        level = log_level(table, steps).to(points)
        seen = log_level(table, torch.tensor([past.step], **INTS)).to(points)
        said: Tensor = model(
            (points * unit).to(model.dtype), clean, features, level, seen.expand(count)
        )
        return said.float()


def log_level(table: Transitions, steps: Tensor) -> Tensor:
    """[n]: the logarithm of the noise to the signal before these steps."""
    return (table.sigma[steps] / table.alpha[steps]).log()


def unit_scale(table: Transitions, steps: Tensor) -> Tensor:
    """[n]: times a point it has about variance one."""
    return 1 / (table.alpha[steps] ** 2 + table.sigma[steps] ** 2).sqrt()


def unet_identity(unet: Any) -> str:
    """Of a UNet's config and weights: a digest that another training or size changes."""
    config = {name: value for name, value in dict(unet.config).items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(unet.state_dict().items()):
        some = weight.detach().flatten()[:: max(weight.numel() // 16, 1)][:16]
        digest.update(name.encode())
        digest.update(some.float().cpu().numpy().round(3).tobytes())
    return digest.hexdigest()[:16]
