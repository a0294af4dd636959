"""How many nodes are read: what pays and no more, over a whole batch, down to none; calibrated,
lossless.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from conftest import admit, tiny_drafter, tiny_target
from torch import Tensor

import flashdraft.decoding.control
from flashdraft.decoding.control import Control
from flashdraft.decoding.text import TextDecoder
from flashdraft.decoding.tree import chain
from flashdraft.engine import Engine, Request
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.types import Drafter, Proposal, Rows, SamplingParams

FLAT = {1: 1.0, 8: 1.07}  # seconds: a node costs a hundredth of a step
STEEP = {1: 1.0, 8: 8.0}  # a node costs a step


def proposal(*confidences: list[float], parents: list[int] | None = None) -> Proposal:
    width = 1 + max(len(row) for row in confidences)
    scores = torch.tensor(
        [
            [0.0, *[float(torch.tensor(c).log()) for c in row], *[0.0] * (width - 1 - len(row))]
            for row in confidences
        ]
    )
    tokens = torch.arange(width).expand(len(confidences), width)
    shape = (chain(width) if parents is None else torch.tensor(parents)).expand(
        len(confidences), width
    )
    return Proposal(tokens, shape, torch.tensor([1 + len(row) for row in confidences]), scores)


def best_by_force(control: Control, made: Proposal, draft: float) -> float:
    """The best rate over every choice of sizes."""
    assert made.scores is not None
    paths = made.scores.exp().cumprod(1).tolist()
    choices: list[list[int]] = [[]]
    for size in made.sizes.tolist():
        choices = [[*c, n] for c in choices for n in range(1, size + 1)]
    rates = [
        sum(sum(paths[r][:n]) for r, n in enumerate(c)) / (control.cost(sum(c)) + draft)
        for c in choices
    ]
    return max(rates)


@pytest.mark.parametrize("seconds", [FLAT, STEEP, {1: 1.0, 2: 1.1, 4: 1.6, 8: 3.0, 16: 6.0}])
def test_the_choice_is_the_best_of_all_choices(seconds: Mapping[int, float]) -> None:
    draw = random.Random(3)
    for _ in range(40):
        control = Control(seconds)
        made = proposal(
            *[[draw.random() for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 3))]
        )
        assert made.scores is not None
        sizes = control.trim(made).tolist()
        paths = made.scores.exp().cumprod(1).tolist()
        rate = sum(sum(paths[r][:n]) for r, n in enumerate(sizes)) / control.cost(sum(sizes))
        assert rate == pytest.approx(best_by_force(control, made, 0.0))
        assert all(1 <= n <= size for n, size in zip(sizes, made.sizes.tolist(), strict=True))


def test_nearly_free_nodes_are_read_and_dear_ones_are_not() -> None:
    sure = proposal([0.9, 0.9, 0.9], [0.9, 0.01, 0.9])
    assert Control(FLAT).trim(sure).tolist() == [4, 2]
    assert Control(STEEP).trim(sure).tolist() == [1, 1]


def test_a_drawn_node_is_not_kept_for_the_sake_of_those_behind_it() -> None:
    """They have seen its token; a chosen node is. The law: tests/test_draft_model.py."""
    control, made = Control({1: 1.0, 2: 1.9, 3: 1.9, 4: 1.9}), proposal([0.8, 0.9, 0.9])
    drawn = torch.tensor([[False, True, True, True]])
    assert control.trim(made).tolist() == [4]
    assert control.trim(replace(made, drawn=drawn)).tolist() == [1]


def test_a_node_is_never_kept_without_its_parent() -> None:
    made = proposal([0.5, 0.9, 0.9, 0.3], parents=[-1, 0, 1, 2, 0])
    for cost in (0.05, 0.2, 0.4, 0.6):
        size = int(Control({1: 1.0, 8: 1.0 + 7 * cost}).trim(made)[0])
        assert set(made.parents[0, 1:size].tolist()) <= set(range(size))


def pause(control: Control, rows: int = 1) -> int:
    """Take plain steps until drafts are wanted; returns how many."""
    steps = 0
    while not control.wants_drafts(rows):
        control.learn(proposal(*[[]] * rows), [[0]] * rows, None, control.cost(rows))
        steps += 1
    return steps


def tries(draft: float, control: Control | None = None, steps: int = 400) -> list[int]:
    """The drafted ones of so many steps; each of them takes `draft` seconds more than a plain one
    and brings nothing.
    """
    control, made, drafted = control or Control({1: 1.0, 8: 1.7}), proposal([0.3]), []
    for step in range(steps):
        if control.wants_drafts(1):
            drafted.append(step)
            control.trim(made)
            control.learn(made, [[0]], draft, draft + control.cost(2))
        else:
            control.learn(proposal([]), [[0]], None, 1.0)
    return drafted


def test_vain_drafting_is_tried_less_and_less_the_less_the_more_it_costs() -> None:
    gaps = [after - before for before, after in zip(tries(0.5), tries(0.5)[1:], strict=False)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 60
    assert 2 <= len(tries(2.0)) < len(tries(0.5)) < len(tries(0.2)) < 20


def test_drafting_that_pays_goes_on() -> None:
    good = Control(FLAT)
    pause(good)
    for _ in range(20):
        assert good.wants_drafts(1)
        made = proposal([0.9, 0.9])
        good.learn(made, [[0, 1, 2]], 0.01, 1.03)
        assert good.trim(made).tolist() == [3]


def test_what_a_large_batch_has_taught_says_nothing_of_one_row() -> None:
    """The table is one row's; several rows' caches cost more, which is learned beside it."""
    control = Control({1: 1.0, 8: 1.7})
    for _ in range(8):
        for rows, late in ((1, 0.0), (4, 2.0)):
            pause(control, rows)
            made = proposal(*[[0.6]] * rows)
            size = torch.tensor([2] * rows)
            control.trim(made)
            control.learn(
                replace(made, sizes=size), [[0, 1]] * rows, 0.1, 0.1 + control.cost(2 * rows) + late
            )
    assert control.wants_drafts(1)
    assert not control.wants_drafts(4)
    assert not control.wants_drafts(64)  # nobody has tried it yet


def test_a_new_text_is_tried_at_once_and_given_up_at_once() -> None:
    control = Control({1: 1.0, 8: 1.7})
    assert tries(0.3, control)[-1] < 390
    assert not control.wants_drafts(1)
    control.begin()
    again = tries(0.3, control, 60)
    assert again[0] == 0
    assert len(again) <= 2
    assert not control.wants_drafts(4)  # of which nothing is known


def drafted_steps(control: Control, num_poor: int, steps: int = 60) -> int:
    """How many of a text's steps are drafted: its first so many proposals are poor, the others
    good, on a machine where a node costs a hundredth of a step and drafting a quarter."""
    drafted = 0
    for _ in range(steps):
        if not control.wants_drafts(1):
            control.learn(proposal([]), [[0]], None, 1.0)
            continue
        drafted += 1
        is_poor = drafted <= num_poor
        made = proposal([0.05, 0.05] if is_poor else [0.9, 0.9])
        control.trim(made)
        control.learn(made, [[0] if is_poor else [0, 1, 2]], 0.24, 1.27)
    return drafted


@pytest.mark.parametrize("is_faulty", [False, True])
def test_a_poor_first_proposal_does_not_end_drafting_for_the_whole_text(
    is_faulty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a text of poor ones, too: how much single proposals differ is another text's."""
    if is_faulty:
        monkeypatch.setattr(flashdraft.decoding.control, "_SPREAD_OF_NEW", 0.0)
    control = Control(FLAT)
    pause(control)
    drafted_steps(control, num_poor=60)
    control.begin()
    drafted = drafted_steps(control, num_poor=2)
    assert (drafted == 60) != is_faulty


def test_free_drafts_are_weighed_without_the_time_of_drafting() -> None:
    """Two networks' times: what pays when it is free does not when it costs a step."""
    control = Control({1: 1.0, 8: 1.7})
    pause(control)
    made = proposal([0.8, 0.8])
    control.trim(made)
    for _ in range(20):
        control.learn(made, [[0]], 1.0, 1.0 + control.cost(3))
    fresh = proposal([0.8, 0.8])
    sizes, gain = control.trim_free(fresh)
    assert sizes.tolist() == [3]
    assert gain == pytest.approx((1 + 0.8 + 0.64) / 1.2, rel=0.05)
    nothing = control.trim_free(proposal([]))
    assert nothing[0].tolist() == [1]
    assert nothing[1] == pytest.approx(1.0, abs=0.05)


def test_drafting_must_gain_more_than_free_drafts_do() -> None:
    control = Control(FLAT)
    pause(control)
    for _ in range(30):
        made = proposal([0.9, 0.9])
        control.trim(made)
        control.learn(made, [[0, 1, 2]], 0.1, 1.13)
    assert control.wants_drafts(1)
    assert control.wants_drafts(1, 1.5)
    assert not control.wants_drafts(1, 4.0)


def test_what_became_of_free_drafts_is_held_against_their_own_confidence() -> None:
    control = Control(FLAT)
    made = proposal([0.9])
    before = control.trim_free(made)[1]
    for _ in range(20):
        control.learn(made, [[0]], None, 1.01)
    assert control.trim_free(made)[1] < 0.7 * before
    assert control.trim(made).tolist() == [2]  # a network's drafts are not blamed


def test_a_machine_that_slows_down_slows_plain_steps_too() -> None:
    """Long after the last plain step: the time that all drafted steps now take is no argument
    against drafting.
    """
    control, made, drafted = Control({1: 1.0, 8: 1.7}), proposal([0.8]), 0
    pause(control)
    for i in range(400):
        slow = min(i / 300, 0.9)
        if control.wants_drafts(1):
            drafted += 1
            control.trim(made)
            control.learn(made, [[0, 1]], 0.1, 1.2 + slow)
        else:
            control.learn(proposal([]), [[0]], None, 1.0 + slow)
    assert 380 < drafted < 400


def test_a_machine_that_changes_after_a_long_time_is_noticed() -> None:
    """Where all steps take longer, a node more is a smaller share of one."""
    control, made = Control(STEEP), proposal([0.9])
    for count, seconds, size in ((2000, 1.0, 1), (100, 1.8, 2)):
        for _ in range(count):
            control.learn(proposal([]), [[0]], None, seconds)
        assert control.trim(made).tolist() == [size]


def drafts_after_a_slow_start() -> int:
    """Drafted ones among the last 40 of 300 steps, where the first plain steps were slow and
    drafting really loses.
    """
    control, made, drafted = Control({1: 1.0, 8: 1.7}), proposal([0.6]), []
    for step in range(300):
        drafted.append(control.wants_drafts(1))
        if drafted[-1]:
            control.trim(made)
            control.learn(made, [[0, 1] if step % 2 else [0]], 0.5, 1.7)
        else:
            control.learn(proposal([]), [[0]], None, 1.0 if step > 2 else 1.8)
    return sum(drafted[260:])


def test_a_plain_step_now_and_then_shows_that_drafting_does_not_pay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert drafts_after_a_slow_start() <= 4
    monkeypatch.setattr(flashdraft.decoding.control, "_LOOK", 1000)
    assert drafts_after_a_slow_start() == 40


def test_a_step_that_was_held_up_for_long_says_little() -> None:
    control, made = Control({1: 1.0, 8: 1.07}), proposal([0.9, 0.9])
    pause(control)
    for step in range(40):
        if control.wants_drafts(1):
            control.trim(made)
            late = 100.0 if step == 20 else 0.0
            control.learn(made, [[0, 1, 2]], 0.1 + late, 1.13 + 2 * late)
        assert control.wants_drafts(1), step


def test_a_table_of_a_busy_machine_is_seen_through() -> None:
    """Steps take half of what the table says; drafting, at its true price, pays no more."""
    control, made, drafted = Control({1: 2.0, 8: 3.4}), proposal([0.5]), 0
    for step in range(150):
        if control.wants_drafts(1):
            drafted += step >= 50
            control.trim(made)
            control.learn(made, [[0, 1]], 0.7, 2.1)
        else:
            control.learn(proposal([]), [[0]], None, 1.0)
    assert drafted <= 4


def test_what_a_node_really_takes_is_learned() -> None:
    """The table was measured in quiet: nodes are free by it, and take a third of a step beside
    others' work.
    """
    control = Control({1: 1.0, 8: 1.0})
    pause(control)
    sizes = []
    for step in range(60):
        made = proposal([0.9, 0.9, 0.9] if step % 4 else [0.9])
        size = int(control.trim(made)[0])
        made = replace(made, sizes=torch.tensor([size]))
        control.learn(made, [list(range(size))], 0.1, 1.1 + 0.33 * (size - 1))
        sizes.append(size)
    assert sizes[1] == 4
    assert control.trim(proposal([0.9, 0.3, 0.9, 0.9])).tolist() == [2]


def test_no_step_is_believed_to_take_less_than_a_plain_one() -> None:
    control = Control(FLAT)
    for count in range(400):
        made = proposal([0.9] * (4 if count % 2 else 1))
        control.learn(made, [[0]], 0.01, 0.4 if count % 2 else 1.1)
        control.learn(proposal([]), [[0]], None, 1.0)
    assert control.trim(proposal([0.999] * 30)).tolist() == [31]


def test_the_poorest_drafter_is_tried_on_the_next_text() -> None:
    control = Control(FLAT)
    assert len(tries(2.0, control, 900)) < 10
    control.begin()
    assert control.wants_drafts(1)
    for _ in range(20):
        control.trim(proposal([0.9] * 4))
        control.learn(proposal([0.9] * 4), [[0, 1, 2, 3, 4]], 0.01, 1.05)
    assert control.wants_drafts(1)


def test_texts_mix_in_a_batch_so_that_a_new_one_changes_less() -> None:
    made, dear = proposal(*[[0.3]] * 16), Control({1: 1.0, 16: 2.5, 32: 4.0})
    counts = []
    for _ in range(30):
        dear.begin()
        pause(dear, 16)
        dear.trim(made)
        dear.learn(made, [[0]] * 16, 0.6, 0.6 + dear.cost(32))
        counts.append(pause(dear, 16))
    assert counts.count(0) == 1  # a try that cost little is followed by another one at once
    assert 50 < counts[-1] < 1000


def test_a_slow_first_draft_does_not_condemn_the_drafter() -> None:
    control, made, drafted = Control(FLAT), proposal([0.9, 0.9]), []
    for step in range(90):
        if step % 30 == 0:
            control.begin()
        drafted.append(control.wants_drafts(1))
        if drafted[-1]:
            control.trim(made)
            late = 0.0 if sum(drafted) > 1 else 50.0
            control.learn(made, [[0, 1, 2]], 0.1 + late, 1.13 + late)
        else:
            control.learn(proposal([]), [[0]], None, 1.0)
    assert sum(drafted[60:]) > 25


def test_one_poor_proposal_among_good_ones_is_no_reason_to_pause() -> None:
    control = Control({1: 1.0, 8: 1.7})
    pause(control)
    for confidence in (0.9, 0.9, 0.9, 0.01, 0.9):
        assert control.wants_drafts(1)
        made = proposal([confidence] * 3)
        control.learn(made, [[0, 1, 2, 3] if confidence > 0.5 else [0]], 0.2, 1.5)
        control.trim(made)
    assert control.wants_drafts(1)


def test_what_was_accepted_corrects_what_is_claimed() -> None:
    boaster, modest = Control({1: 1.0, 8: 3.1}), Control({1: 1.0, 8: 3.1})
    for _ in range(200):
        boaster.learn(proposal([0.9, 0.9]), [[0]], 0.0, 1.6)
        modest.learn(proposal([0.2, 0.2]), [[0, 1, 2]], 0.0, 1.6)
    assert boaster.trim(proposal([0.9, 0.9])).tolist() == [1]
    assert modest.trim(proposal([0.2, 0.2])).tolist() == [3]


def test_no_plain_step_is_believed_to_take_no_time() -> None:
    """The filter may be led below nothing, as by a machine that was busy while it was measured."""
    control = Control({1: 1.0, 8: 1.7})
    made = proposal([0.9] * 3)
    control._batch(1).beyond = [-1.5, 0.5, 0.0]
    for _ in range(50):
        control.trim(made)
        control.learn(made, [[0, 1]], 0.1, 0.2)
        control._batch(1).beyond[0] = -1.5
        assert isinstance(control.wants_drafts(1), bool)
        assert control._batch(1).unsure > 0


def losses(control: Control, steps: int) -> float:
    """What drafting loses in so many steps, in plain ones, where each promises much and brings
    nothing."""
    made = proposal(*[[0.9] * 3] * 8)
    lost = 0.0
    for _ in range(steps):
        if control.wants_drafts(8):
            control.trim(made)
            control.learn(made, [[0]] * 8, 1.0, 3.0)
            lost += 2.0
        else:
            control.learn(proposal(*[[]] * 8), [[0]] * 8, None, 1.0)
    return lost


def test_what_drafting_lost_must_be_earned_before_the_next_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However much the proposals promise, a batch loses one per cent and what it had at first."""
    monkeypatch.setattr(flashdraft.decoding.control._Batch, "promised", lambda *_: None)
    seconds = {8: 1.0, 32: 1.9}
    assert 2.0 <= losses(Control(seconds), 1000) <= 1.0 + 10.0 + 2.0
    monkeypatch.setattr(flashdraft.decoding.control, "_ALLOWED", 10.0)
    assert losses(Control(seconds), 1000) > 500


def test_a_drafter_without_scores_is_judged_by_its_acceptance() -> None:
    silent = Proposal(torch.arange(4)[None], chain(4)[None], torch.tensor([4]))
    control = Control({1: 1.0, 8: 3.1})
    assert control.trim(silent).tolist() == [4]
    for _ in range(200):
        control.learn(silent, [[0, 1]], 0.0, 1.9)
    assert control.trim(silent).tolist() == [2]


def test_what_a_drafted_step_really_takes_counts_against_it() -> None:
    """The same proposals pay by the table of the target's times, and do not beside what the host
    takes for them.
    """
    seconds = {1: 1.0, 8: 1.7}
    for late, pauses in ((0.0, False), (1.5, True)):
        control, made = Control(seconds), proposal([0.6])
        for _ in range(40):
            control.learn(made, [[0]], None, 1.0)
            control.learn(made, [[0, 1]], 0.1, 1.2 + late)
            control.trim(made)
        assert control.wants_drafts(1) is not pauses


class Timed:
    """A target whose steps are said to take these times."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.target = tiny_target("llama", lean=True)
        self.step_seconds = seconds

    def __getattr__(self, name: str) -> object:
        return getattr(self.target, name)


class Halves(Drafter):
    """Half of what it proposes is right; it remembers every token and feature that it was shown."""

    name, layers = "halves", (1,)

    def __init__(self, text: list[int]) -> None:
        self.text, self.seen, self.calls = text, list[int](), list[int]()

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        self.calls += [len(rows.histories[0])] * (max_nodes > 1)
        at, width = len(rows.histories[0]), min(4, max_nodes)
        tokens = [rows.anchors[0], *(self.text[at + i] if i < 1 else 0 for i in range(width - 1))]
        scores = torch.tensor([[0.0, -0.1, -2.0, -2.0][:width]])
        return Proposal(torch.tensor([tokens]), chain(width)[None], torch.tensor([width]), scores)

    def observe(self, rows: Rows, tokens: list[Tensor], features: list[Tensor] | None) -> None:  # type: ignore[override]
        assert features is not None
        assert [len(f) for f in features] == [len(t) for t in tokens]
        self.seen += tokens[0].tolist()
        assert self.seen == rows.histories[0][: len(self.seen)]


class Silent:
    eos_token_id = None

    def decode(self, *_: object, **__: object) -> str:
        return ""


def finished(
    engine: Engine, prompts: list[list[int]], temperature: float = 0.0, tokens: int = 40
) -> list[Request]:
    requests = []
    for index, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=temperature, seed=index, max_new_tokens=tokens, ignore_eos=True
        )
        requests.append(Request(prompt, params, TextDecoder(Silent()), index=index))
        admit(engine, requests[-1])
    while engine.running:
        engine.step()
    return requests


def text_of(engine: Engine, prompt: list[int]) -> list[int]:
    return finished(engine, [prompt], tokens=200)[0].history


@pytest.mark.parametrize(("seconds", "drafted"), [(FLAT, True), ({1: 1e-9, 8: 8e-9}, False)])
def test_texts_are_plain_and_the_drafter_misses_nothing(
    seconds: Mapping[int, float], drafted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that it is tried again after some 25 steps.
    monkeypatch.setattr(flashdraft.decoding.control, "_GAIN_DRIFT", 4e-3)
    monkeypatch.setattr(flashdraft.decoding.control, "_ALLOWED", 0.2)
    prompt = [3, 7, 11, 5]
    plain = text_of(Engine(tiny_target("llama", lean=True), Autoregressive()), prompt)
    target: object = Timed(seconds)
    drafter = Halves([*plain, 0, 0, 0, 0])
    engine = Engine(target, drafter, control=Control(seconds))  # type: ignore[arg-type]
    assert text_of(engine, prompt) == plain
    pauses = [
        after - before for before, after in zip(drafter.calls, drafter.calls[1:], strict=False)
    ]
    assert (max(pauses) < 10) == drafted
    assert len(pauses) > 3
    assert drafter.seen == plain[: len(drafter.seen)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_adaptive_rows_of_a_batch_write_their_plain_texts(temperature: float) -> None:
    prompts = [[3, 7, 11, 5], [9, 4], [8, 8, 8, 21, 30, 2 + 4]]
    plain = tiny_target("llama", lean=True)
    texts = []
    for drafter, control in ((Autoregressive(), None), (tiny_drafter(plain), Control(FLAT))):
        engine = Engine(plain, drafter, max_rows=3, control=control)
        texts.append([request.history for request in finished(engine, prompts, temperature)])
    assert texts[0] == texts[1]


def test_without_step_times_every_node_is_read() -> None:
    model = Model(
        tiny_target("llama"), Silent(), Autoregressive, eos=frozenset(), max_rows=1, adaptive=True
    )
    assert model.control is None


def test_what_one_text_teaches_serves_the_next() -> None:
    drafter = Halves([0] * 300)
    model = Model(
        Timed({1: 1e-9, 8: 8e-9}),
        Silent(),
        lambda: drafter,
        eos=frozenset(),
        max_rows=1,
        adaptive=True,
    )  # type: ignore[arg-type]
    first_drafts = []
    for _ in range(4):
        drafter.seen.clear()
        drafter.calls.clear()
        model.generate([3, 7, 11, 5], max_new_tokens=30, ignore_eos=True)
        first_drafts.append(drafter.calls[0])
    assert model.control is model.control
    assert max(first_drafts[1:]) < first_drafts[0]  # what a plain step takes is known
    assert replace(model, new_drafter=Autoregressive).control is not model.control
