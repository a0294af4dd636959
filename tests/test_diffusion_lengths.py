"""How long a block is: what is learned of drafts, and what that makes of seconds."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from test_diffusion_sampler import (
    COUNT,
    STEPS,
    Adversary,
    Perfect,
    images,
    least_p_value,
    mixture,
    plain,
    ran,
    table_of,
)
from torch import Tensor

from flashdraft.diffusion import lengths as lengths_module
from flashdraft.diffusion.costs import Costs
from flashdraft.diffusion.drafts import Draft, ExtrapolatedDraft, FrozenDraft
from flashdraft.diffusion.lengths import Lengths
from flashdraft.diffusion.pace import Pace
from flashdraft.diffusion.sampler import BlockSampler, Decision, Image
from flashdraft.diffusion.transitions import Transitions

__all__ = ["plain"]

Seconds = Callable[[int], float]


def flat(length: int) -> float:
    return 1.0


def linear(length: int) -> float:
    return float(length)


# ---- the choice ----------------------------------------------------------------------------------


class Chances(Lengths):
    """With chances that are given."""

    def __init__(self, table: Transitions, chances: list[list[float]]) -> None:
        super().__init__(table, None)
        self.chances = chances

    def chance(self, step: int, lag: int) -> float:
        return self.chances[step][lag]


def expected(chances: list[list[float]], step: int, length: int) -> float:
    """Committed steps of a block, by its definition: over all places where it may end."""
    total = 0.0
    for ended in range(length):
        stood = math.prod(chances[step + lag][lag] for lag in range(ended))
        refused = 1.0 if ended + 1 == length else 1 - chances[step + ended][ended]
        total += (ended + 1) * stood * refused
    return total


def best_of_all(chances: list[list[float]], step: int, seconds: Seconds) -> int:
    rates = {1: 1.03 / seconds(1)}
    for length in range(2, min(len(chances) - step, 32) + 1):
        rates[length] = expected(chances, step, length) / seconds(length)
    return max(rates, key=lambda length: (rates[length], -length))


def drawn_case(seed: int) -> tuple[list[list[float]], Seconds]:
    draw = random.Random(seed)
    usual = draw.choice((0.3, 0.7, 0.95))
    chances = []
    for _ in range(24):
        chances.append([usual ** draw.uniform(0.3, 2.0) for _ in range(32)])
    base, row = draw.uniform(0.2, 8.0), draw.uniform(0.0, 1.0)
    costs = Costs({rows: base + row * rows for rows in (1, 2, 4, 8, 16)})
    return chances, costs


@pytest.mark.parametrize("seed", range(40))
def test_the_best_length_is_the_one_that_brute_force_finds(seed: int) -> None:
    chances, seconds = drawn_case(seed)
    lengths = Chances(table_of(24), chances)
    for step in (1, 9, 20, 23):
        got = lengths.best(step, seconds)
        wanted = best_of_all(chances, step, seconds)
        rates = [expected(chances, step, one) / seconds(one) for one in (got, wanted)]
        assert got == wanted or rates[0] == pytest.approx(rates[1], rel=0.02)  # hopeless ones


def test_a_choice_that_counts_rounds_alone_is_seen() -> None:
    """Planted: seconds are not looked at."""
    wrong = 0
    for seed in range(40):
        chances, seconds = drawn_case(seed)
        blind = Chances(table_of(24), chances).best(9, flat)
        rate = expected(chances, 9, blind) / seconds(blind)
        wanted = best_of_all(chances, 9, seconds)
        wrong += rate < 0.98 * expected(chances, 9, wanted) / seconds(wanted)
    assert wrong > 10


# ---- what is learned -----------------------------------------------------------------------------


def learned(
    table: Transitions, draft: Draft, block: int, count: int = 60, tol: Any = None
) -> tuple[Lengths, list[Decision]]:
    """From images of fixed blocks, and the decisions of others."""
    lengths = Lengths(table, tol)
    lengths.learn(ran(table, draft, block, count, tol=tol).decisions)
    return lengths, ran(table, draft, block, count, seed=7, tol=tol).decisions


@pytest.mark.parametrize("mode", ["exact", "tolerance"])
def test_what_is_predicted_of_a_lag_is_what_becomes_of_it(mode: str) -> None:
    table = table_of(40) if mode == "exact" else table_of(40, DDIMScheduler)
    draft: Draft = FrozenDraft() if mode == "exact" else ExtrapolatedDraft()
    tol = None if mode == "exact" else 0.01
    lengths, decisions = learned(table, draft, 8, tol=tol)
    by_lag: dict[int, list[Decision]] = {}
    for one in decisions:
        by_lag.setdefault(one.lag, []).append(one)
    checked = 0
    for lag, own in by_lag.items():
        if len(own) < 150:
            continue
        checked += 1
        hoped = sum(lengths.chance(one.step, lag) for one in own) / len(own)
        stood = sum(one.stood for one in own) / len(own)
        assert hoped == pytest.approx(stood, abs=0.12)
    assert checked >= 3


def test_nothing_is_learned_of_a_step_without_noise() -> None:
    table = table_of(12)
    assert table.deviation[-1] == 0
    lengths = Lengths(table, None)
    lengths.learn([Decision(11, 0, False, 0.0, 0.0)])
    assert lengths.best(1, flat) > 1  # as if nothing were known


def rounds_of(table: Transitions, draft: Draft, seconds: Seconds, tol: Any = None) -> list[int]:
    """Of images one after the other, as long as `Lengths` says."""
    lengths = Lengths(table, tol)
    sampler = BlockSampler(table, draft, tol)
    evaluate = mixture(table)
    counts = []
    for image in images(16, 5, table.num_steps):
        count = 0
        while image.step < table.num_steps:
            length = lengths.choose(image.step, seconds)
            lengths.learn(sampler.round([image], [length], evaluate).decisions)
            count += 1
        counts.append(count)
    return counts


@pytest.mark.parametrize("mode", ["exact", "tolerance"])
def test_where_rows_cost_nothing_it_takes_as_few_rounds_as_the_best_fixed_block(mode: str) -> None:
    table = table_of(40) if mode == "exact" else table_of(40, DDIMScheduler)
    draft: Draft = FrozenDraft() if mode == "exact" else ExtrapolatedDraft()
    tol = None if mode == "exact" else 0.01
    fixed = {}
    for block in (1, 2, 4, 8, 16):
        fixed[block] = ran(table, draft, block, 16, seed=5, tol=tol).rounds
    counts = rounds_of(table, draft, flat, tol)
    assert sum(counts) / len(counts) <= 1.05 * min(fixed.values())
    assert min(fixed.values()) < 0.7 * fixed[1]


def test_where_each_row_costs_as_much_there_are_single_steps() -> None:
    counts = rounds_of(table_of(40), FrozenDraft(), linear)
    assert counts == [40] * 16


def test_a_useless_draft_is_left_alone_and_tried_again_now_and_then() -> None:
    """A call of two rows costs half as much again: a draft that never stands is given up, and
    costs little from then on; one that gets better is taken up."""

    def seconds(length: int) -> float:
        return 0.5 + 0.5 * length

    table = table_of(400)
    lengths = Lengths(table, None)
    useless = [Decision(step, 0, False, 1e-6, 0.0) for step in range(1, 398, 4)]
    lengths.learn(useless)
    chosen = [lengths.choose(step, seconds) for step in range(1, 399)]
    tried = len(chosen) - chosen.count(1)
    assert 1 <= tried <= 398 // 32
    assert sum(map(seconds, chosen)) < 1.02 * len(chosen)

    for _ in range(20):
        lengths.learn([Decision(step, 0, True, 0.99, 0.0) for step in range(1, 398, 4)])
    assert lengths.best(200, seconds) > 1


def test_where_no_block_could_pay_none_is_tried() -> None:
    table = table_of(400)
    lengths = Lengths(table, None)
    assert {lengths.choose(step, linear) for step in range(1, 399)} == {1}


# ---- lengths leave the law alone -----------------------------------------------------------------


def drawn_with(choose: Callable[[Lengths, Image], int], draft: Draft, count: int) -> Tensor:
    table = table_of(STEPS)
    lengths = Lengths(table, None)
    sampler = BlockSampler(table, draft, None)
    evaluate = mixture(table)
    own = images(count, 3, STEPS)
    for _ in range(STEPS):
        active = [image for image in own if image.step < STEPS]
        if active:
            chosen = [choose(lengths, image) for image in active]
            lengths.learn(sampler.round(active, chosen, evaluate).decisions)
    return torch.stack([image.point for image in own])


def as_learned(lengths: Lengths, image: Image) -> int:
    return lengths.choose(image.step, lambda length: 1.0 + 0.1 * length)


def peeking(lengths: Lengths, image: Image) -> int:
    """Planted: a block goes on where the noise of its steps points to one side."""
    length = 1
    while image.step + length < STEPS and image.noise_of(image.step + length - 1)[0] > 0:
        length += 1
    return length


def test_lengths_that_hang_on_the_past_leave_the_law_alone(plain: Tensor) -> None:
    assert least_p_value(drawn_with(as_learned, FrozenDraft(), COUNT), plain) > 1e-3


def test_lengths_that_hang_on_noises_to_come_are_seen(plain: Tensor) -> None:
    assert least_p_value(drawn_with(peeking, Adversary(), COUNT // 2), plain) < 1e-3


def test_a_scale_that_is_fitted_to_outputs_is_one_scale() -> None:
    pace = Pace(None)
    sampler = BlockSampler(table_of(20), FrozenDraft(), None)
    known = pace.lengths(sampler, (6.50000001, 0.0))
    assert pace.lengths(sampler, (6.4999999, 0.0)) is known
    assert pace.lengths(sampler, (6.51, 0.0)) is not known


def test_what_is_known_is_bounded() -> None:
    """A server sees ever other scales of guidance."""
    pace = Pace(None)
    sampler = BlockSampler(table_of(20), FrozenDraft(), None)
    first = pace.lengths(sampler, (1.0, 0.0))
    for scale in range(2, 67):
        last = pace.lengths(sampler, (float(scale), 0.0))
    assert pace.lengths(sampler, (66.0, 0.0)) is last
    assert pace.lengths(sampler, (1.0, 0.0)) is not first


def test_a_perfect_draft_has_the_longest_blocks() -> None:
    table = table_of(40)
    lengths, _ = learned(table, Perfect(), 8, 3)
    assert lengths.best(2, flat) == 32
    assert lengths.best(30, flat) == 10
    assert lengths_module.Lengths(table, None, most=4).best(2, flat) == 4
