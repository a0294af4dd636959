"""Rounds of block speculation against the sampler itself, on a target whose law is known."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from scipy import stats
from torch import Tensor

from flashdraft.diffusion import coupling as coupling_module
from flashdraft.diffusion import sampler as sampler_module
from flashdraft.diffusion.coupling import Coupled, couple
from flashdraft.diffusion.drafts import Draft, ExtrapolatedDraft, FrozenDraft, Past
from flashdraft.diffusion.sampler import Answer, BlockSampler, Decision, Evaluate, Image
from flashdraft.diffusion.transitions import Prediction, Transitions, transitions

WIDTH = 6
CENTRES = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1), device="cpu")
SPREAD = 0.05  # variance around each centre


def mixture(table: Transitions) -> Evaluate:
    """The exact noise prediction for data that are Gaussians around CENTRES."""

    def evaluate(places: list[int], steps: Tensor, points: Tensor) -> Answer:
        alpha = table.alpha[steps].float()[:, None]
        sigma = table.sigma[steps].float()[:, None]
        variance = alpha**2 * SPREAD + sigma**2
        gaps = points[:, None] - alpha[..., None] * CENTRES
        weights = (-(gaps**2).sum(-1) / (2 * variance)).softmax(1)
        likely = CENTRES + (alpha * SPREAD / variance)[..., None] * gaps
        clean = (weights[..., None] * likely).sum(1)
        return Answer((points - alpha * clean) / sigma)

    return evaluate


def images(count: int, seed: int, steps: int) -> list[Image]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        start = torch.randn(WIDTH, generator=draw, device="cpu")
        noises = torch.randn(steps, WIDTH, generator=draw, device="cpu")
        uniforms = torch.rand(steps, generator=draw, device="cpu").tolist()
        made.append(Image(start, noises.__getitem__, uniforms.__getitem__))
    return made


@dataclass
class Ran:
    points: Tensor
    rounds: float  # of an image
    decisions: list[Decision]
    images: list[Image]


def ran(
    table: Transitions, draft: Draft, block: int, count: int, *, seed: int = 0, tol: Any = None
) -> Ran:
    sampler = BlockSampler(table, draft, tol)
    evaluate = mixture(table)
    own = images(count, seed, table.num_steps)
    decisions: list[Decision] = []
    rounds = 0
    while active := [image for image in own if image.step < table.num_steps]:
        done = sampler.round(active, [block] * len(active), evaluate)
        rounds += len(active)
        decisions += done.decisions
    points = torch.stack([image.point for image in own])
    return Ran(points, rounds / count, decisions, own)


def table_of(steps: int, new: Any = DDPMScheduler, eta: float = 0.0, **options: Any) -> Transitions:
    scheduler = new(beta_schedule="scaled_linear", clip_sample=False, **options)
    scheduler.set_timesteps(steps)
    return transitions(scheduler, eta=eta)


class Adversary:
    """Draws every point far off, to a side that turns with the step."""

    name = "adversary"
    needs_features = False

    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Any:
        def predict(lag: int, step: int, point: Tensor) -> Prediction:
            turned = past.said.clean.roll(step)[None] * (1.0 + 0.2 * lag)
            return table.implied(torch.tensor([step]), point, turned)

        return predict


class Perfect:
    """Knows what the target will say."""

    name = "perfect"
    needs_features = False

    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Any:
        evaluate = mixture(table)

        def predict(lag: int, step: int, point: Tensor) -> Prediction:
            steps = torch.tensor([step])
            return table.predicted(steps, point, evaluate([0], steps, point).outputs)

        return predict


class Peeking:
    """Planted: its mean has seen the step's own noise."""

    name = "peeking"
    needs_features = False

    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Any:
        frozen = FrozenDraft().block(table, past, point, noises)

        def predict(lag: int, step: int, point: Tensor) -> Prediction:
            said = frozen(lag, step, point)
            nudge = 0.3 * float(table.deviation[step]) * noises[lag].sign()
            return Prediction(said.clean + nudge, said.noise)

        return predict


def least_p_value(left: Tensor, right: Tensor) -> float:
    """Of two-sample tests along the axes, of the lengths and of the distances to the centres."""
    values = []
    for axis in range(WIDTH):
        values.append(stats.ks_2samp(left[:, axis], right[:, axis]).pvalue)
    for centre in (*CENTRES, torch.zeros(WIDTH)):
        near = [(points - centre).norm(dim=1) for points in (left, right)]
        values.append(stats.ks_2samp(*near).pvalue)
    return float(min(values))


COUNT = 800
STEPS = 12


@pytest.fixture(scope="module")
def plain() -> Tensor:
    """The sampler alone, all images at once: many, so that the others may be few."""
    table = table_of(STEPS)
    evaluate = mixture(table)
    draw = torch.Generator().manual_seed(99)
    points = torch.randn(16 * COUNT, WIDTH, generator=draw, device="cpu")
    for step in range(STEPS):
        steps = torch.full([len(points)], step)
        said = table.predicted(steps, points, evaluate([], steps, points).outputs)
        noise = torch.randn(points.shape, generator=draw, device="cpu")
        points = table.mean(steps, points, said) + float(table.deviation[step]) * noise
    return points


@pytest.mark.parametrize(
    ("draft", "block", "count"),
    [(FrozenDraft(), 6, COUNT), (Adversary(), 3, COUNT), (Perfect(), 6, COUNT // 2)],
)
def test_exact_mode_draws_from_the_samplers_law(
    draft: Draft, block: int, count: int, plain: Tensor
) -> None:
    got = ran(table_of(STEPS), draft, block, count)
    assert least_p_value(got.points, plain) > 1e-3
    if draft.name == "frozen-x0":
        assert got.rounds < STEPS / 1.5


def unverified(noise: Tensor, draft: Tensor, target: Tensor, *rest: Tensor) -> Coupled:
    """Planted: everything stands."""
    deviation, _ = rest
    sample = draft + deviation.view(-1, 1).float() * noise
    return Coupled(sample, torch.ones(len(noise), dtype=torch.bool))


def test_an_unverified_draft_is_seen(monkeypatch: pytest.MonkeyPatch, plain: Tensor) -> None:
    monkeypatch.setattr(sampler_module, "couple", unverified)
    got = ran(table_of(STEPS), FrozenDraft(), 6, COUNT // 4)
    assert least_p_value(got.points, plain) < 1e-6


def test_a_draft_that_sees_its_own_noise_is_seen(plain: Tensor) -> None:
    got = ran(table_of(STEPS), Peeking(), 6, COUNT // 4)
    assert least_p_value(got.points, plain) < 1e-3


def test_a_block_of_one_step_is_the_sampler() -> None:
    table = table_of(STEPS)
    evaluate = mixture(table)
    for image, own in zip(
        images(5, 3, STEPS), ran(table, Adversary(), 1, 5, seed=3).points, strict=True
    ):
        point = image.point
        for step in range(STEPS):
            steps = torch.tensor([step])
            said = table.predicted(steps, point[None], evaluate([0], steps, point[None]).outputs)
            mean = table.mean(steps, point[None], said)[0]
            point = mean + float(table.deviation[step]) * image.noise_of(step)
        torch.testing.assert_close(own, point, rtol=1e-5, atol=1e-5)


def deterministic(order: int) -> Transitions:
    if order == 1:
        return table_of(50, DDIMScheduler)
    scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    scheduler.set_timesteps(50)
    return transitions(scheduler)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "2m"])
def test_single_steps_are_rounds_of_blocks_of_one(name: str) -> None:
    """The short way of `single` comes to the same points, pasts and predictions."""
    tables = {"ddpm": table_of(STEPS), "ddim": deterministic(1), "2m": deterministic(2)}
    table = tables[name]
    tol = None if table.is_random else 0.0
    sampler = BlockSampler(table, FrozenDraft(), tol)
    evaluate = mixture(table)
    short, long = images(3, 0, table.num_steps), images(3, 0, table.num_steps)
    for step in range(table.num_steps):
        points = torch.stack([image.point for image in short])
        answer = evaluate([0, 1, 2], torch.full([3], step), points)
        singles = sampler.single(short, points, answer)
        done = sampler.round(long, [1] * 3, evaluate)
        for place in range(3):
            committed = done.committed[place][0]
            torch.testing.assert_close(singles.results[place], committed.result)
            torch.testing.assert_close(singles.clean[place], committed.clean)
            past, other = short[place].past, long[place].past
            assert past is not None
            assert other is not None
            assert (past.step, past.step_before) == (other.step, other.step_before)
            torch.testing.assert_close(past.said.noise, other.said.noise)
    assert [image.step for image in short] == [table.num_steps] * 3


def is_always_accepted() -> bool:
    """A perfect draft."""
    got = ran(table_of(STEPS), Perfect(), STEPS, 50)
    has_stood = all(one.stood for one in got.decisions)
    assert has_stood == (got.rounds == 2.0)  # the first step has nothing to draft from
    return has_stood


def test_a_perfect_draft_is_always_accepted() -> None:
    assert is_always_accepted()


def judged_by_another_row(noise: Tensor, draft: Tensor, target: Tensor, *rest: Tensor) -> Coupled:
    """Planted."""
    return couple(noise, draft, target.roll(1, dims=0), *rest)


def mean_of_another_step(
    table: Transitions, steps: Any, points: Tensor, said: Prediction, before: Any = None
) -> Tensor:
    """Planted: where points are of different steps their coefficients are those of a later one."""
    if isinstance(steps, Tensor):
        steps = (steps + 1).clamp(max=table.num_steps - 1)
    return own_mean(table, steps, points, said, before)


own_mean = Transitions.mean


@pytest.mark.parametrize("fault", [judged_by_another_row, mean_of_another_step])
def test_a_round_in_disorder_is_seen_by_a_perfect_draft(
    fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault is judged_by_another_row:
        monkeypatch.setattr(sampler_module, "couple", fault)
    else:
        monkeypatch.setattr(Transitions, "mean", fault)
    assert not is_always_accepted()


def test_every_round_commits_a_step_of_every_image() -> None:
    table = table_of(STEPS)
    own = images(20, 0, STEPS)
    sampler = BlockSampler(table, Adversary(), None)
    for done in range(STEPS):
        assert min(image.step for image in own) >= done
        active = [image for image in own if image.step < STEPS]
        if active:
            made = sampler.round(active, [8] * len(active), mixture(table))
            assert all(committed for committed in made.committed)
    assert all(image.step == STEPS for image in own)


def test_acceptance_is_what_the_formula_says() -> None:
    got = ran(table_of(30), FrozenDraft(), 8, 250)
    bins: dict[int, list[Decision]] = {}
    for one in got.decisions:
        bins.setdefault(int(5 * one.predicted), []).append(one)
    seen = 0
    for own in bins.values():
        if len(own) < 200:
            continue
        seen += 1
        stood = sum(one.stood for one in own) / len(own)
        hoped = sum(one.predicted for one in own) / len(own)
        assert stood == pytest.approx(hoped, abs=4 * math.sqrt(0.25 / len(own)))
    assert seen >= 3


class Nonsense:
    """Says NaN."""

    name = "nonsense"
    needs_features = False

    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Any:
        def predict(lag: int, step: int, point: Tensor) -> Prediction:
            nothing = torch.full_like(point, torch.nan)
            return Prediction(nothing, nothing)

        return predict


def check_nonsense(tol: float | None) -> None:
    """Refused in every round, without a trace: what is left is the sampler alone."""
    table = table_of(STEPS) if tol is None else table_of(STEPS, DDIMScheduler)
    alone = ran(table, FrozenDraft(), 1, 20, tol=tol)
    got = ran(table, Nonsense(), 6, 20, tol=tol)
    assert got.rounds == STEPS
    torch.testing.assert_close(got.points, alone.points, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tol", [None, 0.1])
def test_a_draft_that_says_nan_is_the_sampler_alone(
    tol: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_nonsense(tol)

    # Planted: NaN passes for a small distance.
    for module in (sampler_module, coupling_module):
        monkeypatch.setattr(module, "_norm", lambda values: values.norm(dim=1).nan_to_num(0.0))
    with pytest.raises(AssertionError):
        check_nonsense(tol)


def changed_predictions(draft: Draft, changed: int) -> list[int]:
    """Lags of whose points something else is predicted where the noise of one lag is another."""
    table = table_of(STEPS)
    said = Prediction(CENTRES[0], CENTRES[1])
    past = Past(2, said, 1, Prediction(CENTRES[2], CENTRES[3]))
    noises = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    others = noises.clone()
    others[changed] -= 2 * noises[changed]
    start = CENTRES[4]
    block = draft.block(table, past, start, noises)
    other_block = draft.block(table, past, start, others)
    lags = []
    for lag in range(5):
        own = block(lag, 3 + lag, start[None])
        other = other_block(lag, 3 + lag, start[None])
        is_same = torch.equal(own.clean, other.clean) and torch.equal(own.noise, other.noise)
        if not is_same:
            lags.append(lag)
    return lags


@pytest.mark.parametrize("changed", range(5))
def test_a_mean_knows_nothing_of_its_own_and_later_noises(changed: int) -> None:
    """Causality: another noise of step k changes no mean up to that of step k."""
    for draft in (FrozenDraft(), ExtrapolatedDraft()):
        assert changed_predictions(draft, changed) == []
    assert changed_predictions(Peeking(), changed) == [changed]


# ---- tolerance mode ------------------------------------------------------------------------------


def check_sequential(order: int) -> None:
    """Tolerance 0, against the sampler alone."""
    table = deterministic(order)
    points = torch.stack([image.point for image in images(10, 0, 50)])
    evaluate = mixture(table)
    before = torch.zeros_like(points)
    for step in range(50):
        said = table.predicted(step, points, evaluate([], torch.tensor([step]), points).outputs)
        points = table.mean(step, points, said, before)
        before = said.clean
    got = ran(table, ExtrapolatedDraft(), 8, 10, tol=0.0)
    torch.testing.assert_close(got.points, points, rtol=1e-5, atol=1e-5)
    assert sum(image.defect for image in got.images) == 0.0


@pytest.mark.parametrize("order", [1, 2])
def test_tolerance_zero_is_the_sequential_sampler(order: int) -> None:
    check_sequential(order)


@pytest.mark.parametrize("fault", ["accepts", "forgets"])
def test_a_tolerance_that_is_none_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: any defect is within it; the prediction of the step before is not known."""
    order = 1
    if fault == "accepts":
        monkeypatch.setattr(sampler_module, "_norm", lambda values: torch.zeros(len(values)))
    else:
        order = 2
        monkeypatch.setattr(BlockSampler, "_before", lambda *_: None)
    with pytest.raises(AssertionError):
        check_sequential(order)


@pytest.mark.parametrize("order", [1, 2])
def test_tolerance_trades_rounds_for_a_defect_that_is_told(order: int) -> None:
    table = deterministic(order)
    alone = ran(table, FrozenDraft(), 1, 20).points
    errors = []
    rounds = []
    for tol in (0.001, 0.005, 0.05):
        got = ran(table, ExtrapolatedDraft(), 8, 20, tol=tol)
        errors.append(float((got.points - alone).norm() / alone.norm()))
        rounds.append(got.rounds)
        assert all(one.stood == (one.defect <= tol) for one in got.decisions)
        for image in got.images:
            assert 0 < image.defect <= 50 * tol
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[1] < 50 / 2
    assert errors == sorted(errors)
    assert errors[1] < 0.05


def test_an_image_that_has_few_steps_left_takes_no_more() -> None:
    table = table_of(STEPS)
    (image,) = images(1, 0, STEPS)
    image.step = STEPS - 2
    image.past = Past(STEPS - 3, Prediction(CENTRES[0], CENTRES[1]))
    done = BlockSampler(table, Perfect(), None).round([image], [100], mixture(table))
    assert image.step == STEPS
    assert done.num_points == 2
