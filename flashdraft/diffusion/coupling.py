"""Two Gaussians of one covariance, drawn so that they are the same point as often as can be.

A draft draws x from N(m_p, s^2 I); the target wants a draw of N(m_q, s^2 I). The reflection-maximal
coupling keeps x where that is allowed and reflects its noise where not: what comes out is a draw of
the target's law whatever the draft's mean was, and it is x with the highest chance that any
coupling has (De Bortoli et al. 2501.05370, section 3.2; Bou-Rabee, Eberle and Zimmer 1805.00452).
The condition: both means are functions of what was known before x's noise was drawn. A draft's mean
that is no number is refused, and nothing is reflected: there is no direction to do it in.

Knows tensors. Does not know models, schedules or drafts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Coupled", "acceptance", "couple", "distance"]

SMALLEST = 1e-8  # a deviation below this is none: the step is deterministic
_TINY = torch.finfo(torch.float64).tiny


class Coupled(NamedTuple):
    """sample: [n, ...], a draw of the target's law; accepted: [n] bool, where it is the draft's."""

    sample: Tensor
    accepted: Tensor


def distance(draft_mean: Tensor, target_mean: Tensor, deviation: Tensor) -> Tensor:
    """How far apart the means [n, ...] are, in deviations [n]: [n], float64.

    Infinite where the deviation is none and the means differ, and where one is no number.
    """
    apart = draft_mean.double() - target_mean.double()
    gaps = _norm(apart)
    gaps = torch.where(gaps.isnan(), torch.inf, gaps)
    scale = deviation.double().clamp(min=SMALLEST)
    if_random = gaps / scale
    if_none = torch.where(gaps > 0, torch.inf, 0.0)
    is_random = deviation >= SMALLEST
    return torch.where(is_random, if_random, if_none)


def acceptance(distances: Tensor) -> Tensor:
    """The chance that a draft is accepted: 2 Phi(-d / 2), the overlap of the two laws."""
    chances: Tensor = torch.special.erfc(distances / 8**0.5)
    return chances


def couple(
    noise: Tensor, draft_mean: Tensor, target_mean: Tensor, deviation: Tensor, uniforms: Tensor
) -> Coupled:
    """The target's draw, from the noise that the draft's was made of.

    noise, draft_mean, target_mean: [n, ...]; deviation, uniforms: [n], uniforms in [0, 1). The
    draft is draft_mean + deviation * noise. Sums run over all of a row, in float64. Where the
    deviation is none the target's mean is its draw.
    """
    dtype = target_mean.dtype
    z = noise.double()
    m_p = draft_mean.double()
    m_q = target_mean.double()
    is_random = deviation >= SMALLEST
    s = _wide(deviation.double(), z)

    # The paper's D = (m_p - m_q) / s.
    shift = (m_p - m_q) / s.clamp(min=SMALLEST)
    length = _norm(shift)
    is_far = ~length.isfinite()  # no point is nearer to one mean than to the other
    shift = torch.where(_wide(is_far, z), 0.0, shift)
    length = torch.where(is_far, 0.0, length)

    # Log of the target's density over the draft's, at the draft.
    inner = _sum(z * shift)
    log_ratio = -(inner + length**2 / 2)
    is_below = torch.log1p(-uniforms.double()) <= log_ratio
    is_judged = is_random | (length == 0)
    accepted = is_below & is_judged & ~is_far

    # A refused draw's noise is reflected along e = D / |D|.
    direction = shift / _wide(length, z).clamp(min=_TINY)
    along = _wide(_sum(z * direction), z)
    reflected = z - 2 * along * direction

    step = torch.where(_wide(is_random, z), s, 0.0)
    kept = m_p + step * z
    redrawn = m_q + step * reflected
    sample = torch.where(_wide(accepted, z), kept, redrawn)
    return Coupled(sample.to(dtype), accepted)


def _sum(values: Tensor) -> Tensor:
    rows = values.flatten(1)
    return rows.sum(1)


def _norm(values: Tensor) -> Tensor:
    rows = values.flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """[n] as [n, 1, ...]."""
    num_further = like.dim() - 1
    return values.view(-1, *[1] * num_further)
