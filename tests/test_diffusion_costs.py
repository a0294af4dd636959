"""Costs of the target's batches: measured in few calls, kept, and told apart."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from toy_diffusion import CLEAN, toy_pipe, toy_unet

from flashdraft.diffusion import costs as costs_module
from flashdraft.diffusion.costs import (
    FLAT,
    Costs,
    KeptCosts,
    OwnSeconds,
    facts_of,
    given_costs,
    measure,
)
from flashdraft.diffusion.pipeline import SpeculativeDiffusion
from flashdraft.errors import InvalidParameter


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(KeptCosts, "_held", {})
    return tmp_path / "cache"


class Machine:
    """Calls that take seconds of a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.rows: list[int] = []
        monkeypatch.setattr(costs_module.time, "perf_counter", lambda: self.now)

    def call(self, rows: int) -> None:
        self.now += self.seconds(rows)
        self.rows.append(rows)


# ---- a table -------------------------------------------------------------------------------------


def test_costs_lie_on_lines_between_what_is_known_and_beyond() -> None:
    costs = Costs({1: 1.0, 4: 4.0, 2: 3.0})
    got = [costs(rows) for rows in (1, 2, 3, 4, 8)]
    assert got == pytest.approx([1.0, 3.0, 3.5, 4.0, 6.0])
    assert Costs({4: 2.0})(1) == 2.0


def test_of_one_number_of_rows_the_others_are_as_dear_by_row() -> None:
    assert Costs({2: 1.0})(8) == 4.0


def test_more_rows_never_cost_less() -> None:
    costs = Costs({1: 1.0, 2: 0.9, 4: 1.5, 8: 1.4})
    assert [costs(rows) for rows in (1, 2, 4, 8, 99)] == [1.0, 1.0, 1.5, 1.5, 1.5]


def test_what_has_no_room_is_never_chosen() -> None:
    assert Costs({1: 1.0, 8: 1.0}, most=15)(16) == math.inf


def test_costs_that_a_user_gives() -> None:
    assert given_costs("measured") is None
    assert given_costs("flat") is FLAT
    assert FLAT(1) == FLAT(1000)
    own = given_costs({1: 0.5, 3: 1.5})
    assert own is not None
    assert own(2) == 1.0


@pytest.mark.parametrize("given", ["cheap", {}, {0: 1.0}, {1: 0.0}, {1: math.nan}, None, 3])
def test_costs_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(InvalidParameter, match="costs") as caught:
        given_costs(given)
    assert "flat" in str(caught.value.hint)


# ---- measuring -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("single", "singles"), [(0.01, 50), (1.0, 8), (20.0, 8)])
def test_measuring_costs_some_tens_of_single_calls_where_rows_are_dear(
    single: float, singles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, lambda rows: single * rows)
    costs = measure(machine.call, 2)
    assert list(costs.known) == [2, 4, 8]
    assert machine.now <= singles * 2 * single
    assert costs(64) == pytest.approx(64 * single)  # on a line


def test_where_rows_are_cheap_all_sizes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda rows: 0.03 + 0.001 * max(rows - 16, 0))
    costs = measure(machine.call, 1)
    assert list(costs.known) == [1, 2, 4, 8, 16, 32]
    assert costs(32) == pytest.approx(0.046)
    assert machine.now < 50 * 0.03


def test_a_burst_of_other_work_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda rows: 0.01 * rows)
    usual = machine.seconds
    machine.seconds = lambda rows: usual(rows) * (30 if len(machine.rows) in (8, 9) else 1)
    assert measure(machine.call, 1)(2) == pytest.approx(0.02)

    # Planted: one turn alone would have kept it.
    monkeypatch.setattr(costs_module, "_PASSES", 1)
    machine.rows.clear()
    machine.seconds = lambda rows: usual(rows) * (30 if len(machine.rows) == 3 else 1)
    assert measure(machine.call, 1)(2) > 0.1


def test_numbers_of_rows_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda rows: 0.01 * rows)
    measure(machine.call, 1)
    assert machine.rows == [1, 1, 2, 2, 4, 4] + [1, 2, 4] * 4


def test_what_memory_cannot_hold_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(rows: int) -> float:
        if rows > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.01

    machine = Machine(monkeypatch, seconds)
    costs = measure(machine.call, 2)
    assert list(costs.known) == [2, 4, 8]
    assert costs.most == 15
    with pytest.raises(RuntimeError, match="memory"):
        measure(machine.call, 16)


def test_another_error_of_the_target_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(rows: int) -> float:
        if rows > 1:
            raise RuntimeError("shapes differ")
        return 0.01

    with pytest.raises(RuntimeError, match="shapes differ"):
        measure(Machine(monkeypatch, seconds).call, 1)


def test_a_target_that_compiles_each_shape_is_asked_for_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch, lambda rows: 0.01)
    machine.seconds = lambda rows: 0.01 if rows in machine.rows or rows == 1 else 60.0
    measure(machine.call, 1)
    assert set(machine.rows) == {1, 2}


def test_seconds_of_ours_are_learned_by_point() -> None:
    own = OwnSeconds()
    assert own(8) == 0.0
    for points in (2, 4, 8) * 20:
        own.take(points, 0.001 * (points + 5))
    assert own(16) == pytest.approx(0.021)


# ---- kept ----------------------------------------------------------------------------------------

FACTS = {"unet": "of a test", "threads": 1}


def kept(facts: Any = FACTS) -> KeptCosts:
    return KeptCosts(facts)


def no_call(rows: int) -> None:
    raise AssertionError("measured again")


def test_a_table_is_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda rows: 0.01 * rows)
    first = kept().measure(machine.call, 1)
    (path,) = cache.iterdir()
    assert path == kept().path
    monkeypatch.setattr(KeptCosts, "_held", {})  # as in another process
    again = kept().read(1)
    assert again is not None
    assert again.known == pytest.approx(first.known)
    assert kept(FACTS | {"threads": 2}).read(1) is None


def test_larger_steps_are_measured_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two branches of guidance, a batch of prompts: their blocks are more rows than were known."""
    machine = Machine(monkeypatch, lambda rows: 0.01 * rows)
    kept().measure(machine.call, 1)
    assert kept().read(2) is not None
    assert kept().read(8) is None
    kept().measure(machine.call, 8)
    both = kept().read(8)
    assert both is not None
    assert list(both.known) == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"facts": {}, "seconds": {"1": 1.0, "2": 1.0}, "most": null}',
        '{"facts": FACTS, "seconds": {"1": 1.0, "2": -1.0}, "most": null}',
        '{"facts": FACTS, "seconds": {"1": 1.0, "two": 1.0}, "most": null}',
        '{"facts": FACTS, "seconds": [1.0], "most": null}',
        '{"facts": FACTS, "seconds": {"1": 1.0, "2": 1.0}, "most": "all"}',
        '{"facts": FACTS, "seconds": {"1": 1.0, "2"',
        b"\xff\xfe\x00",
    ],
)
def test_a_file_that_is_damaged_or_foreign_is_measured_again(
    content: str | bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, lambda rows: 0.01 * rows)
    cache.mkdir()
    if isinstance(content, str):
        content = content.replace("FACTS", json.dumps(FACTS)).encode()
    kept().path.write_bytes(content)
    assert kept().read(1) is None
    kept().measure(machine.call, 1)
    monkeypatch.setattr(KeptCosts, "_held", {})
    assert kept().read(1) is not None


def test_a_cache_that_cannot_be_written_is_no_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder would be")
    machine = Machine(monkeypatch, lambda rows: 0.01 * rows)
    kept().measure(machine.call, 1)
    assert kept().read(1) is not None  # in this process


def test_whatever_changes_the_seconds_has_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = toy_unet()
    sample = torch.zeros(2, 4, 8, 8, device="cpu")
    text = torch.zeros(2, 8, 16, device="cpu")
    tables = [
        facts_of(unet, sample, [text]),
        facts_of(unet, sample[..., :4], [text]),
        facts_of(unet, sample.half(), [text]),
        facts_of(unet, sample, [text[:, :4]]),
        facts_of(toy_unet(9), sample, [text]),
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    tables.append(facts_of(unet, sample, [text]))
    assert len({kept(facts).path for facts in tables}) == len(tables)
    assert facts_of(unet, sample[:1], [text[:1]]) == facts_of(unet, sample, [text])


# ---- in a pipe -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return toy_pipe(tmp_path_factory.mktemp("toy"))


def drawn(pipe: Any, seed: int = 0, **options: Any) -> Tensor:
    """Latents."""
    generator = torch.Generator("cpu").manual_seed(seed)
    asked = {"prompt": "abc", "num_inference_steps": 8, "output_type": "latent"} | options
    images: Tensor = pipe(**asked, generator=generator).images
    return images


def test_the_first_loop_measures_and_tells_it_apart(pipe: Any, cache: Path) -> None:
    pipe.scheduler = DDPMScheduler(clip_sample=False, **CLEAN)
    fast = SpeculativeDiffusion(pipe)
    drawn(fast)
    stats = fast.last_stats
    assert stats is not None
    assert stats.measuring > 0
    assert stats.seconds > 0
    assert "measuring" in str(stats)
    (path,) = cache.iterdir()
    assert {"2", "4"} <= json.loads(path.read_text())["seconds"].keys()  # two branches

    for other in (fast, SpeculativeDiffusion(pipe)):
        drawn(other)
        assert other.last_stats is not None
        assert other.last_stats.measuring == 0
        assert "measuring" not in str(other.last_stats)


@pytest.mark.parametrize("options", [{"block": 3}, {"costs": "flat"}, {"costs": {1: 1.0}}])
def test_nothing_is_measured_where_nothing_asks(
    options: dict[str, Any], pipe: Any, cache: Path
) -> None:
    pipe.scheduler = DDPMScheduler(clip_sample=False, **CLEAN)
    fast = SpeculativeDiffusion(pipe, **options)
    drawn(fast)
    assert fast.last_stats is not None
    assert fast.last_stats.measuring == 0
    assert not cache.exists()


def test_measuring_changes_no_image(pipe: Any) -> None:
    pipe.scheduler = DDIMScheduler(clip_sample=False, **CLEAN)
    stock = drawn(pipe)
    fast = SpeculativeDiffusion(pipe, mode="tolerance", tol=0.0)
    torch.testing.assert_close(drawn(fast), stock, rtol=1e-5, atol=1e-5)
    assert fast.last_stats is not None
    assert fast.last_stats.measuring > 0


@pytest.mark.parametrize("dear", [True, False])
def test_what_is_measured_makes_the_choice(
    dear: bool, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images, branches of guidance and steps of a block are rows alike."""
    seen: list[int] = []

    def fake(call: Callable[[int], object], rows_a_step: int) -> Costs:
        seen.append(rows_a_step)
        return Costs({1: 1.0, 99: 99.0 if dear else 1.0})

    monkeypatch.setattr(costs_module, "measure", fake)
    pipe.scheduler = DDPMScheduler(clip_sample=False, **CLEAN)
    fast = SpeculativeDiffusion(pipe)
    drawn(fast, guidance_scale=3.0, num_images_per_prompt=3)
    stats = fast.last_stats
    assert stats is not None
    assert seen == [6]
    if dear:
        assert (stats.rounds, stats.rows) == (8, 8 * 6)
    else:
        assert stats.rounds < 8
