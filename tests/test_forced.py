"""Forced tokens are drafted with every method: texts stay, passes are saved, and no wrong word of a
hook can change a text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import EOS, VOCAB, requests_of, run, tiny_target
from toy_engine import METHODS, PROMPTS, made
from toy_hooks import NUM_FREE, Sum, by_residue, by_script, plain, steered

from flashdraft.decoding.control import Control
from flashdraft.decoding.forced import MOST_FORCED, num_certain, with_forced
from flashdraft.decoding.tree import Nodes, alone, check, planted
from flashdraft.engine import Drafting, Engine
from flashdraft.errors import InvalidParameter
from flashdraft.methods.draft_model import DraftModelDrafter
from flashdraft.types import Drafter, Proposal, Result, SamplingParams

ENDS = frozenset({EOS})


def state_behind(*text: int) -> Sum:
    return Sum(ENDS, by_script, sum(text), len(text))


def forced_behind(*text: int) -> list[int]:
    return list(state_behind(*text).forced())


def row(proposal: Proposal, index: int = 0) -> tuple[list[int], list[int]]:
    size = int(proposal.sizes[index])
    check(proposal)
    return proposal.tokens[index, :size].tolist(), proposal.parents[index, :size].tolist()


# ---------------------------------------------------------------- one proposal


def test_what_the_anchor_forces_is_drafted_where_nobody_drafts() -> None:
    first, second = forced_behind(9)
    changed = with_forced(alone([9]), [state_behind(9)])
    assert row(changed) == ([9, first, second], [-1, 0, 1])


def test_a_draft_that_agrees_goes_on_behind_the_forced_tokens() -> None:
    first, second = forced_behind(9)
    free = next(t for t in range(3, VOCAB) if state_behind(9, first, second).allows(t))
    drafted = Nodes([first, second, free], [0, 1, 2], [-0.5, -0.1, -0.2])
    changed = with_forced(planted([9], [drafted]), [state_behind(9)])
    behind = forced_behind(9, first, second, free)
    assert row(changed) == ([9, first, second, free, *behind], [-1, 0, 1, 2, 3, 4])
    assert changed.scores is not None
    assert changed.scores[0].tolist() == pytest.approx([0, 0, 0, -0.2, 0, 0])


def test_a_forbidden_draft_and_what_stands_behind_it_give_way() -> None:
    first, second = forced_behind(9)
    other = next(t for t in range(3, VOCAB) if t != first)
    drafted = Nodes([other, 7, first], [0, 1, 0], [-0.1, -0.1, -0.9])
    changed = with_forced(planted([9], [drafted]), [state_behind(9)])
    assert row(changed) == ([9, first, second], [-1, 0, 1])


def test_every_branch_of_a_tree_gets_what_is_forced_behind_it() -> None:
    anchor = (5, *forced_behind(5))  # what follows is free
    allowed = [t for t in range(3, VOCAB) if state_behind(*anchor).allows(t)]
    forbidden = next(t for t in range(3, VOCAB) if t not in allowed)
    one, other = allowed[:2]
    drafted = Nodes([one, forbidden, other, 8], [0, 0, 0, 2], [-0.5] * 4)
    changed = with_forced(planted([anchor[-1]], [drafted]), [state_behind(*anchor)])
    left = forced_behind(*anchor, one)
    right = forced_behind(*anchor, other)
    tokens = [anchor[-1], one, *left, other, *right]
    assert row(changed) == (tokens, [-1, 0, 1, 2, 0, 4, 5])


def test_the_end_is_drafted_where_nothing_else_can_follow() -> None:
    state = Sum(ENDS, by_script, 100, NUM_FREE)
    assert row(with_forced(alone([9]), [state])) == ([9, EOS], [-1, 0])


def test_rows_without_a_hook_keep_what_was_drafted() -> None:
    drafted = planted([9, 4], [Nodes([8], [0], [-0.3]), Nodes([7, 6, 5], [0, 1, 0], [-0.1] * 3)])
    assert with_forced(drafted, [None, None]) is drafted
    assert with_forced(drafted, ()) is drafted
    changed = with_forced(drafted, [state_behind(9), None])
    assert row(changed, 1) == row(drafted, 1)
    assert row(changed, 0)[0] == [9, *forced_behind(9)]


def test_unknown_confidence_stays_unknown() -> None:
    drafted = replace(planted([9], [Nodes([8], [0], [0.0])]), scores=None)
    assert with_forced(drafted, [state_behind(9)]).scores is None


def drawn_rows() -> Proposal:
    """Two rows whose second node is drawn."""
    probs = torch.full((2, 2, VOCAB), 1 / VOCAB)
    drawn = torch.tensor([[False, True], [False, True]])
    nodes = Nodes([8], [0], [-0.3])
    return replace(planted([9, 9], [nodes, nodes]), probs=probs, drawn=drawn)


def test_drawn_nodes_stay_whatever_token_they_have_unless_the_anchor_forces_one() -> None:
    is_free = state_behind(1, 2, 3)
    assert not is_free.forced()
    before = drawn_rows()
    changed = with_forced(before, [state_behind(9), is_free])
    assert row(changed, 0)[0] == [9, *forced_behind(9)]
    assert row(changed, 1) == row(before, 1)
    assert changed.drawn is not None
    assert changed.drawn.tolist() == [[False] * 3, [False, True, False]]
    assert changed.probs is not None
    assert before.probs is not None
    assert torch.equal(changed.probs[1, :2], before.probs[1])


def endless(total: int, length: int, ends: frozenset[int]) -> list[int]:
    return [3 + length % 2] if length < 1000 else [7, 8]


def test_a_row_gets_no_more_than_its_room() -> None:
    changed = with_forced(alone([9]), [Sum(ENDS, endless)])
    assert changed.num_nodes == 1 + MOST_FORCED
    assert row(changed)[1] == list(range(-1, MOST_FORCED))


# ---------------------------------------------------------------- texts


def written(drafter: Drafter, params: Sequence[SamplingParams]) -> list[Result]:
    engine = Engine(made("llama"), drafter, max_rows=3)
    return run(engine, requests_of(PROMPTS, params, {EOS}))


def check_texts(method: str, temperature: float, state: type[Sum] = Sum) -> list[Result]:
    params = steered(temperature, by_script, state)
    wanted = plain(params)
    futures = [prompt + one.tokens for prompt, one in zip(PROMPTS, wanted, strict=True)]
    results = written(METHODS[method](made("llama"), futures, 4), params)
    assert [one.tokens for one in results] == [one.tokens for one in wanted]
    return results


@pytest.mark.parametrize("method", [method for method in METHODS if method != "drawn"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_text_is_the_plain_text(method: str, temperature: float) -> None:
    first, _, last = check_texts(method, temperature)
    assert first.finish_reason == last.finish_reason == "stop"


def test_greedy_text_is_the_plain_text_where_drafts_are_drawn() -> None:
    check_texts("drawn", 0.0)


def test_every_forced_token_saves_a_pass_where_nothing_else_drafts() -> None:
    """Three of the ten tokens are free, and the first of these comes with the prompt."""
    for result in check_texts("autoregressive", 0.0)[::2]:
        assert len(result.tokens) == NUM_FREE + 1
        assert result.stats.target_passes == 3
        assert result.stats.num_accepted == result.stats.num_drafted == 7


def test_drawn_drafts_of_a_draft_model_go_with_forced_tokens() -> None:
    drafter = DraftModelDrafter(tiny_target("llama"))
    results = written(drafter, steered(0.9, by_script))
    for result in results[::2]:
        total = 0
        for length, token in enumerate(result.tokens):
            assert token in by_script(total, length, ENDS)
            total += token


@pytest.mark.parametrize("seconds", [{1: 1.0, 8: 1.1}, {1: 1.0, 8: 90.0}])
@pytest.mark.parametrize("drafting", ["auto", "on", "off"])
def test_forced_tokens_are_read_whatever_the_controller_thinks_of_drafts(
    seconds: dict[int, float], drafting: Drafting
) -> None:
    params = steered(0.0, by_script)
    drafter = METHODS["dflash"](made("llama"), (), 4)
    engine = Engine(made("llama"), drafter, max_rows=3, control=Control(seconds))
    requests = requests_of(PROMPTS, params, {EOS})
    for request in requests:
        request.drafting = drafting
    results = run(engine, requests)
    assert [one.tokens for one in results] == [one.tokens for one in plain(params)]
    for result in results[::2]:
        assert result.stats.target_passes <= 3


def test_only_what_the_anchor_forces_is_certain() -> None:
    drafted = planted([9, 4, 9], [Nodes([8], [0], [-0.3])] * 3)
    steering = [state_behind(9), None, state_behind(1, 2, 3)]
    proposal = with_forced(drafted, steering)
    assert num_certain(proposal, steering).tolist() == [3, 1, 1]
    assert num_certain(alone([9, 4, 9]), steering).tolist() == [1, 1, 1]


# ---------------------------------------------------------------- planted faults


class Liar(Sum):
    """Says of wrong tokens that they are forced."""

    def forced(self) -> Sequence[int]:
        return [token % (VOCAB - 4) + 3 for token in super().forced()]

    def allows(self, token: int) -> bool:
        return True


class Chatty(Sum):
    """Takes what it likes best for forced, where others are allowed, too."""

    def forced(self) -> Sequence[int]:
        return self.allowed()[:1]


@pytest.mark.parametrize("state", [Liar, Chatty])
@pytest.mark.parametrize("method", ["autoregressive", "cheater", "tree"])
def test_wrong_forced_tokens_cost_passes_and_no_text(state: type[Sum], method: str) -> None:
    results = check_texts(method, 0.9, state)
    rejected = [one.stats.num_drafted - one.stats.num_accepted for one in results]
    assert rejected[0] + rejected[2] > 0


class Forgetful(Sum):
    """Its states behind forced tokens are those before them."""

    def then(self, token: int) -> Sum:
        is_forced = list(self.forced())[:1] == [token]
        if is_forced and token not in self.ends:
            return replace(self, length=self.length + 1)
        return replace(self, total=self.total + token, length=self.length + 1)


def test_a_state_that_passes_over_forced_tokens_is_seen() -> None:
    with pytest.raises((AssertionError, InvalidParameter)):
        check_texts("autoregressive", 0.0, Forgetful)


def test_the_toy_scripts_leave_free_and_forced_places() -> None:
    """Otherwise the tests above would show nothing."""
    sizes = [len(by_script(17, length, ENDS)) for length in range(NUM_FREE + 1)]
    assert [size == 1 for size in sizes] == [*itertools.islice(itertools.cycle((0, 1, 1)), 9), True]
    assert by_residue(17, 3, ENDS) == by_script(17, 3, ENDS)


def test_a_controller_that_drops_certain_nodes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "flashdraft.engine.num_certain", lambda p, steering: torch.ones_like(p.sizes)
    )
    monkeypatch.setattr(Control, "wants_drafts", lambda self, rows, gain: True)
    with pytest.raises(AssertionError):
        test_forced_tokens_are_read_whatever_the_controller_thinks_of_drafts({1: 1, 8: 90}, "auto")
