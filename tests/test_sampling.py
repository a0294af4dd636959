import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from conftest import uniform
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flashdraft.decoding.sampling import (
    coins,
    draw,
    likeliest,
    probabilities,
    target_probs,
    total,
    uniforms,
)
from flashdraft.errors import UnusableLogits
from flashdraft.types import SamplingParams

ALMOST_ONE = 1 - 2.0**-53  # the largest uniform
VOCAB = 49152
LAWS = (
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=50),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=1.3, min_p=0.05),
    SamplingParams(temperature=0.8, top_k=200, top_p=0.95, min_p=0.01),
)
quick = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> object:
    """A float sum over one long row is split between threads, one over many rows is not: the trap
    for row-exactness.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def naive_law(logits: list[float], params: SamplingParams) -> list[float]:
    """The documented law, spelled out. Skips examples where a cut falls on a rounding error."""
    if params.temperature == 0:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    kept = dict(enumerate(logits))
    if params.top_k:
        least = sorted(logits, reverse=True)[: params.top_k][-1]
        kept = {token: logit for token, logit in kept.items() if logit >= least}

    def law() -> dict[int, float]:
        weights = {
            token: math.exp((logit - max(logits)) / params.temperature)
            for token, logit in kept.items()
        }
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    mass = 0.0
    for token, probability in sorted(law().items(), key=lambda item: -item[1]):
        assume(params.top_p == 1 or abs(mass - params.top_p) > 1e-9)
        if mass < params.top_p:
            mass, least = mass + probability, logits[token]
    kept = {token: logit for token, logit in kept.items() if logit >= least}
    best = max(law().values())
    assume(all(abs(probability / best - params.min_p) > 1e-9 for probability in law().values()))
    kept = {
        token: kept[token]
        for token, probability in law().items()
        if probability >= params.min_p * best
    }
    return [law().get(token, 0.0) for token in range(len(logits))]


@quick
@given(
    logits=st.lists(st.integers(-30, 30).map(lambda tenths: tenths / 10), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 20]),
    top_p=st.sampled_from([1.0, 0.85, 0.4, 1e-6]),
    min_p=st.sampled_from([0.0, 0.03, 0.4]),
)
def test_probabilities_are_the_documented_law(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    law = probabilities(torch.tensor(logits, dtype=torch.float64), params)
    expected = naive_law(logits, params)
    assert law.dtype == torch.float64
    assert [p > 0 for p in law.tolist()] == [p > 0 for p in expected]
    assert law.tolist() == pytest.approx(expected, abs=1e-12)


def transformers_law(logits: Tensor, params: SamplingParams, order: str) -> Tensor:
    warpers = {
        "temperature": TemperatureLogitsWarper(params.temperature),
        "top_k": TopKLogitsWarper(params.top_k),
        "top_p": TopPLogitsWarper(params.top_p),
        "min_p": MinPLogitsWarper(params.min_p),
    }
    for name in order.split():
        logits = warpers[name](None, logits)
    return logits.softmax(-1)


def test_cuts_come_in_the_order_of_transformers() -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * 2
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.8, min_p=0.1)
    law = probabilities(logits, params)
    same = transformers_law(logits, params, "temperature top_k top_p min_p")
    torch.testing.assert_close(law, same, rtol=1e-5, atol=1e-7)
    assert not torch.equal(
        law > 0, transformers_law(logits, params, "temperature top_p top_k min_p") > 0
    )
    assert not torch.equal(
        law > 0, transformers_law(logits, params, "top_p temperature top_k min_p") > 0
    )


def test_a_nucleus_of_exactly_the_wanted_mass_is_enough() -> None:
    logits = torch.tensor([math.log(2), 0.0, 0.0], dtype=torch.float64)
    assert logits.softmax(-1).tolist() == [0.5, 0.25, 0.25]
    assert probabilities(logits, SamplingParams(temperature=1.0, top_p=0.5)).tolist() == [
        1.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_likeliest_is_the_law_of_temperature_0(dtype: torch.dtype) -> None:
    logits = torch.tensor([[[1.0, 3.0, 3.0, -math.inf], [5.0, 0.0, 1.0, 2.0]]], dtype=dtype)
    assert likeliest(logits).tolist() == [[1, 0]]  # the lowest id among equals
    assert torch.equal(likeliest(logits), probabilities(logits, SamplingParams()).argmax(-1))
    for bad in (math.nan, math.inf):
        with pytest.raises(UnusableLogits, match="a law without mass"):
            likeliest(logits.index_fill(2, torch.tensor([3]), bad))
    with pytest.raises(UnusableLogits, match="a law without mass"):
        likeliest(torch.full_like(logits, -math.inf))


def test_a_long_nucleus_is_found_beyond_the_likeliest_tokens() -> None:
    """Nuclei of 1 to 2700 tokens in one batch: found among 64, among 1024, and among all."""
    scales = torch.tensor([30.0, 3.0, 1.5, 0.1])[:, None]
    logits = (
        torch.randn(4, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        * scales
    )
    law = probabilities(logits, SamplingParams(temperature=1.0, top_p=0.9))
    sizes = (law > 0).sum(-1).tolist()
    ordered = logits.softmax(-1).sort(descending=True).values.cumsum(-1)
    assert sizes == ((ordered < 0.9).sum(-1) + 1).tolist()
    assert sizes[0] < 64 < sizes[1] < 1024 < sizes[2] < sizes[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_greedy_is_a_point_mass_and_the_lowest_id_wins_ties(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 3, 1000, dtype=dtype)
    logits[..., [7, 400, 999]] = 2.5
    law = probabilities(logits, SamplingParams(top_k=5, top_p=0.1, min_p=0.9))
    assert law.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(law, torch.nn.functional.one_hot(torch.full((2, 3), 7), 1000).to(law.dtype))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_the_coldest_temperatures_share_the_mass_among_ties(temperature: float) -> None:
    law = probabilities(
        torch.tensor([-90.0, 80.0, 79.0, 80.0, -math.inf]), SamplingParams(temperature=temperature)
    )
    assert law.tolist() == [0.0, 0.5, 0.0, 0.5, 0.0]


@pytest.mark.parametrize("params", LAWS)
def test_masked_tokens_have_no_mass_and_broken_logits_are_refused(params: SamplingParams) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    logits[:, 100:] = -math.inf
    law = probabilities(logits, params)
    assert law[:, 100:].sum() == 0
    torch.testing.assert_close(law.sum(-1), torch.ones(3))
    for broken in (math.nan, math.inf):
        logits[1, 3] = broken
        with pytest.raises(UnusableLogits, match="without mass"):
            draw(probabilities(logits, params), torch.full((3,), 0.5, dtype=torch.float64))
    with pytest.raises(UnusableLogits, match="without mass"):
        draw(
            probabilities(torch.full((1, 7), -math.inf), params),
            torch.zeros(1, dtype=torch.float64),
        )


def long_logits(vocab: int = VOCAB) -> Tensor:
    scales = torch.linspace(0.3, 12, 16)[:, None]  # from flat to peaked
    return torch.randn(16, vocab, generator=torch.Generator().manual_seed(1)) * scales


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("params", LAWS)
def test_a_law_is_bit_equal_alone_and_in_any_company(params: SamplingParams) -> None:
    logits = long_logits()
    alone = torch.cat([probabilities(logits[i : i + 1], params) for i in range(16)])
    for count in range(1, 17) if params.top_p == 1 else (3, 16):
        assert torch.equal(probabilities(logits[16 - count :], params), alone[16 - count :])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("vocab", [VOCAB, VOCAB + 1])
def test_draws_and_totals_are_bit_equal_alone_and_in_any_company(vocab: int) -> None:
    law = long_logits(vocab).softmax(-1)
    u = uniforms([5], [0], 16)[0]
    tokens = torch.cat([draw(law[i : i + 1], u[i : i + 1]) for i in range(16)])
    masses = torch.cat([total(law[i : i + 1]) for i in range(16)])
    for count in range(1, 17):
        assert torch.equal(draw(law[:count], u[:count]), tokens[:count])
        assert torch.equal(total(law[:count]), masses[:count])


def test_no_order_of_addition_changes_a_total() -> None:
    weights = torch.rand(1, 10_000, generator=torch.Generator().manual_seed(0)) / 10_000
    orders = [torch.randperm(10_000, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    assert len({total(weights[:, order]).item() for order in orders}) == 1
    assert (
        len({weights[:, order].sum().item() for order in orders}) > 1
    )  # a sum of floats is changed
    assert total(weights).item() == pytest.approx(weights.double().sum().item(), rel=1e-7)


def test_target_probs_gives_each_row_its_own_law_and_padding_none() -> None:
    logits = torch.randn(len(LAWS), 4, 50, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([4, 1, 3, 4, 2, 4])
    laws = target_probs(logits, LAWS, sizes)
    for row, params in enumerate(LAWS):
        size = int(sizes[row])
        assert torch.equal(laws[row, :size], probabilities(logits[row, :size], params))
        assert not laws[row, size:].any()
        assert torch.equal(
            target_probs(logits[row : row + 1], [params], sizes[row : row + 1]), laws[row : row + 1]
        )


def naive_draw(probs: list[float], u: float) -> int:
    level, mass = Fraction(u) * sum(map(Fraction, probs)), Fraction(0)
    for token, probability in enumerate(probs):
        mass += Fraction(probability)
        if mass > level:
            return token
    raise AssertionError("no token")


@quick
@given(
    weights=st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any),
    eighths=st.integers(0, 7),
    power=st.integers(3, 30),
)
def test_draw_inverts_the_law_exactly_at_its_steps(
    weights: list[int], eighths: int, power: int
) -> None:
    """Small multiples of powers of 2 are exact, so a uniform that lands on a step must take the
    next token.
    """
    weights.append((-sum(weights)) % 8)  # now an eighth of the whole is a whole number too
    probs = [weight / 2**6 / 2**power for weight in weights]
    for u in (eighths / 8, ALMOST_ONE):
        token = draw(
            torch.tensor([probs], dtype=torch.float64), torch.tensor([u], dtype=torch.float64)
        ).item()
        assert token == naive_draw(probs, u)
        assert probs[int(token)] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_never_takes_a_token_of_zero_mass(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    law = torch.rand(3000, 40, generator=generator, dtype=dtype) ** 12
    law[torch.rand(3000, 40, generator=generator) < 0.5] = 0
    law[:, 17] = 0.5
    law[:, [0, 39]] = 0
    law /= law.sum(-1, keepdim=True)
    for mass in (1.0, 1.001, 1e-9):
        for u in (0.0, 0.3, ALMOST_ONE):
            tokens = draw(law * mass, torch.full((3000,), u, dtype=torch.float64))
            assert (law.gather(1, tokens[:, None]) > 0).all()


def test_draws_follow_the_law_and_no_other() -> None:
    law = torch.tensor([0.05, 0.0, 0.3, 0.25, 0.4])
    u = uniforms(list(range(200)), [0] * 200, 1000).flatten()
    counts = torch.bincount(draw(law.expand(len(u), -1), u), minlength=5)
    assert counts[1] == 0
    observed = counts[law > 0].numpy()
    assert (
        stats.chisquare(
            observed, (law[law > 0] / law.sum() * len(u)).double().numpy(), sum_check=False
        ).pvalue
        > 1e-3
    )
    wrong = torch.tensor([0.05, 0.3, 0.26, 0.39], dtype=torch.float64) * len(u)
    assert stats.chisquare(observed, wrong.numpy()).statistic > 50


MASK = 2**64 - 1


def splitmix(state: int, position: int) -> int:
    """Sebastiano Vigna's public-domain C code, with the 64 bits cut at every line."""
    z = (state + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_reference_generator_gives_its_published_numbers() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [splitmix(1234567, i) for i in range(5)] == published


@quick
@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 2**40), lane=st.integers(-100, 100))
def test_a_uniform_is_the_documented_number_one_by_one_and_many_at_once(
    seed: int, position: int, lane: int
) -> None:
    state = splitmix(splitmix(0, seed), lane & MASK)
    assert uniform(seed, position, lane) == (splitmix(state, position) >> 11) / 2**53
    many = uniforms([seed, 3], [position, 9], 4, lane)
    assert many.dtype == torch.float64
    assert many.tolist() == [
        [uniform(s, p + i, lane) for i in range(4)] for s, p in ((seed, position), (3, 9))
    ]
    assert coins([seed, 3], [position, 9], 4).tolist() == [
        [uniform(s, p, 1 + node) for node in range(4)] for s, p in ((seed, position), (3, 9))
    ]


def uniformity(values: Tensor) -> float:
    """Chi-square over 256 bins, as a p-value."""
    return float(stats.chisquare(torch.histc(values, 256, 0, 1).numpy()).pvalue)


def independence(left: Tensor, right: Tensor) -> float:
    """Chi-square over 16 x 16 bins, as a p-value."""
    cells = (left * 16).long() * 16 + (right * 16).long()
    return float(stats.chisquare(torch.bincount(cells.flatten(), minlength=256).numpy()).pvalue)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(
            lambda seeds, starts: uniforms(seeds, [s + 1 for s in starts], 200), id="next position"
        ),
        pytest.param(
            lambda seeds, starts: uniforms([s + 1 for s in seeds], starts, 200), id="next seed"
        ),
        pytest.param(lambda seeds, starts: uniforms(seeds, starts, 200, lane=1), id="next lane"),
        pytest.param(lambda seeds, starts: uniforms(seeds, starts, 200, lane=-1), id="draft lane"),
        pytest.param(
            lambda seeds, starts: uniforms([s + 1 for s in seeds], [s - 1 for s in starts], 200),
            id="diagonal",
        ),
        pytest.param(lambda seeds, starts: coins(seeds, starts, 200), id="coins"),
    ],
)
def test_neighbouring_uniforms_are_uniform_and_independent(
    other: Callable[[list[int], list[int]], Tensor],
) -> None:
    seeds, starts = list(range(1000)), [10] * 1000
    values = uniforms(seeds, starts, 200)
    assert values.min() >= 0
    assert values.max() < 1
    assert uniformity(other(seeds, starts)) > 1e-3
    assert independence(values, other(seeds, starts)) > 1e-3
    assert (
        independence(values, values) < 1e-12
    )  # what a hash that ignores a word, or adds seed and position, would show
    assert uniformity(values**1.05) < 1e-12
