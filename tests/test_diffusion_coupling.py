"""The reflection-maximal coupling: what comes out is the target's law, and it is the draft's point
as often as can be."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from flashdraft.diffusion import coupling
from flashdraft.diffusion.coupling import acceptance, couple, distance

COUNT = 40_000
WIDTH = 3


def slow_coupling(
    noise: np.ndarray, draft: np.ndarray, target: np.ndarray, deviation: float, uniform: float
) -> tuple[np.ndarray, bool]:
    """One row, as De Bortoli et al. 2501.05370 write algorithm 3: by the two densities."""
    point = draft + deviation * noise
    of_draft = stats.multivariate_normal.logpdf(point, draft, deviation**2)
    of_target = stats.multivariate_normal.logpdf(point, target, deviation**2)
    if uniform <= np.exp(min(of_target - of_draft, 0.0)):
        return point, True
    apart = (draft - target) / deviation
    direction = apart / np.linalg.norm(apart)
    return target + deviation * (noise - 2 * (noise @ direction) * direction), False


def drawn(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64, device="cpu")
    uniforms = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    return noise, uniforms


def means(gap: float) -> tuple[Tensor, Tensor]:
    """Of draft and target, so far apart in deviations of 0.5."""
    target = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, device="cpu")
    along = torch.tensor([2.0, 1.0, -2.0], dtype=torch.float64, device="cpu") / 3
    return target + 0.5 * gap * along, target


def coupled(gap: float, seed: int = 0) -> coupling.Coupled:
    noise, uniforms = drawn(COUNT, seed)
    draft, target = means(gap)
    deviation = torch.full([COUNT], 0.5, dtype=torch.float64, device="cpu")
    return couple(noise, draft.expand(COUNT, -1), target.expand(COUNT, -1), deviation, uniforms)


def test_it_does_what_the_slow_definition_does() -> None:
    noise, uniforms = drawn(300)
    draft, target = means(1.2)
    deviation = torch.full([300], 0.5, dtype=torch.float64, device="cpu")
    got = couple(noise, draft.expand(300, -1), target.expand(300, -1), deviation, uniforms)
    for row in range(300):
        point, stood = slow_coupling(
            noise[row].numpy(), draft.numpy(), target.numpy(), 0.5, float(1 - uniforms[row])
        )
        assert bool(got.accepted[row]) == stood
        np.testing.assert_allclose(got.sample[row].numpy(), point, atol=1e-12)
    assert 0 < int(got.accepted.sum()) < 300


def worst_p_value(sample: Tensor) -> float:
    """Of Kolmogorov and Smirnov's test of the target's law, along the axes, along the gap and for
    the length."""
    _, target = means(0.0)
    scaled = ((sample - target) / 0.5).numpy()
    along = scaled @ np.array([2.0, 1.0, -2.0]) / 3
    values = [stats.kstest(axis, "norm").pvalue for axis in (*scaled.T, along)]
    values.append(stats.kstest((scaled**2).sum(1), "chi2", args=(WIDTH,)).pvalue)
    return float(min(values))


@pytest.mark.parametrize("gap", [0.0, 0.3, 1.0, 3.0, 30.0])
def test_the_law_is_the_targets_and_acceptance_the_formulas(gap: float) -> None:
    got = coupled(gap)
    assert worst_p_value(got.sample) > 1e-3
    np.testing.assert_allclose(got.sample.mean(0).numpy(), means(gap)[1].numpy(), atol=0.01)
    np.testing.assert_allclose(np.cov(got.sample.numpy().T), 0.25 * np.eye(WIDTH), atol=0.01)
    chance = float(acceptance(torch.tensor(gap, dtype=torch.float64, device="cpu")))
    assert chance == pytest.approx(2 * stats.norm.cdf(-gap / 2), abs=1e-12)
    assert float(got.accepted.double().mean()) == pytest.approx(chance, abs=0.01)


def without_reflection(noise: Tensor, draft: Tensor, target: Tensor, *rest: Tensor) -> Tensor:
    """Planted: a refused draw is drawn with the same noise."""
    deviation, uniforms = rest
    got = couple(noise, draft, target, deviation, uniforms)
    again = target + 0.5 * noise
    return torch.where(got.accepted[:, None], got.sample, again)


def always_accepted(noise: Tensor, draft: Tensor, *_: Tensor) -> Tensor:
    """Planted: nothing is verified."""
    return draft + 0.5 * noise


@pytest.mark.parametrize("fault", [without_reflection, always_accepted])
def test_a_faulty_coupling_is_seen(fault: Callable[..., Tensor]) -> None:
    noise, uniforms = drawn(COUNT)
    draft, target = means(1.0)
    deviation = torch.full([COUNT], 0.5, dtype=torch.float64, device="cpu")
    sample = fault(noise, draft.expand(COUNT, -1), target.expand(COUNT, -1), deviation, uniforms)
    assert worst_p_value(sample) < 1e-6


NONSENSE = [float("nan"), float("inf"), -float("inf"), 1e308]


def check_refused(nonsense: float) -> None:
    """A draft that is no number, and that the law is the target's."""
    noise, uniforms = drawn(COUNT)
    _, target = means(0.0)
    draft = target.clone()
    draft[1] = nonsense
    deviation = torch.full([COUNT], 0.5, dtype=torch.float64, device="cpu")
    got = couple(noise, draft.expand(COUNT, -1), target.expand(COUNT, -1), deviation, uniforms)
    assert not bool(got.accepted.any())
    assert worst_p_value(got.sample) > 1e-3
    still = couple(
        noise, draft.expand(COUNT, -1), target.expand(COUNT, -1), 0 * deviation, uniforms
    )
    assert torch.equal(still.sample, target.expand(COUNT, -1))


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_a_draft_that_is_no_number_is_refused_and_leaves_the_law(nonsense: float) -> None:
    check_refused(nonsense)


def narrow_norm(values: Tensor) -> Tensor:
    """Planted: what is no number passes for a distance."""
    return torch.linalg.vector_norm(values, dim=1).nan_to_num(0.0, 1.0)


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_a_coupling_that_takes_it_for_a_number_is_seen(
    nonsense: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coupling, "_norm", narrow_norm)
    with pytest.raises(AssertionError):
        check_refused(nonsense)


def test_a_target_that_is_no_number_is_never_the_draft() -> None:
    """The draft's point must not stand for what is unknown."""
    noise, uniforms = drawn(100)
    draft, target = means(0.0)
    deviation = torch.full([100], 0.5, dtype=torch.float64, device="cpu")
    got = couple(
        noise, draft.expand(100, -1), target.expand(100, -1) * torch.nan, deviation, uniforms
    )
    assert not bool(got.accepted.any())
    assert bool(got.sample.isnan().all())


def test_equal_means_are_always_accepted() -> None:
    got = coupled(0.0)
    assert bool(got.accepted.all())


def test_without_noise_the_targets_mean_is_the_draw() -> None:
    noise, uniforms = drawn(4)
    draft, target = means(1.0)
    draft, target = draft.expand(4, -1).clone(), target.expand(4, -1).clone()
    draft[3] = target[3]
    deviation = torch.tensor([0.0, 1e-9, 0.5, 0.0], dtype=torch.float64, device="cpu")
    got = couple(noise, draft, target, deviation, uniforms)
    np.testing.assert_array_equal(got.sample[[0, 1, 3]].numpy(), target[[0, 1, 3]].numpy())
    assert got.accepted.tolist()[:2] == [False, False]
    assert bool(got.accepted[3])
    apart = distance(draft, target, deviation).tolist()
    assert apart[0] == apart[1] == float("inf")
    assert apart[2] == pytest.approx(1.0)
    assert apart[3] == 0.0


def test_large_latents_in_float16_are_summed_in_full() -> None:
    """A difference of 1e-3 in each of 65,536 numbers is 0.256 deviations."""
    noise = torch.zeros(1, 4, 128, 128, dtype=torch.float16, device="cpu")
    draft = torch.full_like(noise, 1e-3)
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    assert float(distance(draft, noise, one)) == pytest.approx(0.256, rel=1e-3)
