"""How far sets of pictures are from one another, by features of each picture.

The Frechet distance is that of two normal laws with the features' means and covariances (Heusel et
al. 1706.08500, equation 6); only of the real Inception's features is it called FID. MMD is the
squared maximum mean discrepancy under a Gaussian kernel (Gretton et al. 2012, equation 5). How far
two sets of one law come to be apart, swaps of pairs tell. Knows features. Does not know pictures,
prompts or models.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flashdraft.process import DOUBLES, INTS

__all__ = ["Spread", "frechet", "frechet_spread", "mmd_spread"]

_BLOCK = 64  # swaps that are measured in one product


class Spread(NamedTuple):
    """How far apart two sets are, and how far they are with pairs swapped at random: [swaps]."""

    value: float
    swapped: Tensor

    @property
    def chance(self) -> float:
        """Of sets of one law to be so far apart, or farther."""
        count = int((self.swapped >= self.value).sum())
        return (1 + count) / (1 + len(self.swapped))

    def quantile(self, share: float) -> float:
        return float(self.swapped.quantile(share))


def frechet(left: Tensor, right: Tensor) -> float:
    """Of features [n, d] and [m, d]."""
    left = left.double()
    right = right.double()
    gap = left.mean(0) - right.mean(0)
    first = torch.atleast_2d(left.T.cov())
    second = torch.atleast_2d(right.T.cov())
    roots = torch.linalg.eigvals(first @ second).sqrt().real
    squared = gap @ gap + first.trace() + second.trace() - 2 * roots.sum()
    return float(squared)


def frechet_spread(left: Tensor, right: Tensor, *, swaps: int = 500, seed: int = 0) -> Spread:
    """Of features [n, d] each. A pair, such as two pictures of one prompt, is left[i], right[i]."""
    distances = []
    for swap in _swaps(len(left), swaps, seed):
        own = swap[:, None]
        one = torch.where(own, right, left)
        other = torch.where(own, left, right)
        distances.append(frechet(one, other))
    return Spread(frechet(left, right), torch.tensor(distances, **DOUBLES))


def mmd_spread(left: Tensor, right: Tensor, *, swaps: int = 500, seed: int = 0) -> Spread:
    """The same, of values [n, ...]; the kernel is as wide as the median distance of all."""
    count = len(left)
    both = torch.cat([left.flatten(1), right.flatten(1)]).float()
    squares = torch.cdist(both, both) ** 2
    kernel = torch.exp(-squares / _median(squares))

    signs = torch.ones(swaps + 1, count, dtype=kernel.dtype, device=kernel.device)
    signs[1:][_swaps(count, swaps, seed)] = -1
    signs = torch.cat([signs, -signs], dim=1) / count
    values = []
    for own in signs.split(_BLOCK):
        values.append(((own @ kernel) * own).double().sum(1))
    found = torch.cat(values)
    return Spread(float(found[0]), found[1:])


def _median(squares: Tensor) -> Tensor:
    """Of the distances between different values: of so many that it does not take long."""
    step = max(len(squares) // 1000, 1)
    some = squares[::step, ::step]
    return some[some > 0].median()


def _swaps(count: int, swaps: int, seed: int) -> Tensor:
    """[swaps, count], bool: which pairs are swapped."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(2, [swaps, count], generator=generator, **INTS) == 1
