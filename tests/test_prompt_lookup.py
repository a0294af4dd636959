"""Prompt lookup against a slow search that reads like its definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdraft.decoding.tree import check
from flashdraft.methods.prompt_lookup import NgramIndex, PromptLookup
from flashdraft.types import Rows, SamplingParams


def lookup(history: Sequence[int], max_ngram: int, count: int) -> list[int]:
    return NgramIndex(max_ngram).draft(history, count)


def slow(history: Sequence[int], max_ngram: int, count: int) -> list[int]:
    """What followed the latest earlier place where the longest known ending of the text stands."""
    for size in range(max_ngram, 0, -1):
        places = [
            i
            for i in range(len(history) - size)
            if history[i : i + size] == history[len(history) - size :]
        ]
        if places and size < len(history):
            return list(history[places[-1] + size :][:count])
    return []


def earliest(history: Sequence[int], max_ngram: int, count: int) -> list[int]:
    for size in range(max_ngram, 0, -1):
        places = [
            i
            for i in range(len(history) - size)
            if history[i : i + size] == history[len(history) - size :]
        ]
        if places:
            return list(history[places[0] + size :][:count])
    return []


PLANTED: dict[str, Callable[[Sequence[int], int, int], list[int]]] = {
    "the earliest place": earliest,
    "the shortest ending": lambda history, _, count: lookup(history, 1, count),
    "the ending itself": lambda history, n, count: lookup([*history, 9], n, count),
    "one token late": lambda history, n, count: lookup(history, n, count + 1)[1:],
    "one token too many": lambda history, n, count: lookup(history, n, count + 1),
}


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    history=st.lists(st.integers(0, 2), min_size=1, max_size=14),
    max_ngram=st.integers(1, 4),
    count=st.integers(0, 5),
)
def test_the_draft_is_what_followed_the_longest_known_ending(
    history: list[int], max_ngram: int, count: int
) -> None:
    assert lookup(history, max_ngram, count) == slow(history, max_ngram, count)


@pytest.mark.parametrize("wrong", PLANTED)
def test_a_wrong_search_differs_somewhere(wrong: str) -> None:
    texts = itertools.product(range(2), repeat=7)
    assert any(PLANTED[wrong](text, 3, 2) != slow(text, 3, 2) for text in texts)


@pytest.mark.parametrize(
    ("history", "draft"),
    [
        ([7], []),
        ([7, 8], []),
        ([5, 6, 7, 8, 9, 5, 6], [7, 8, 9]),
        ([1, 6, 2, 5, 6, 3, 5, 6], [3, 5, 6]),  # the latest of two places
        ([9, 5, 6, 1, 5, 6, 2, 9, 5, 6], [1, 5, 6]),  # three known tokens before two
        ([4, 4, 4], [4]),  # the place may overlap the ending, and the text may end in the draft
    ],
)
def test_drafts_of_known_texts(history: list[int], draft: list[int]) -> None:
    assert lookup(history, 3, 3) == draft


def test_rows_without_a_match_send_their_anchor_alone() -> None:
    histories = [[5, 6, 7, 5], [1, 2, 3], [8, 8, 8, 8]]
    rows = Rows([0, 1, 2], histories, [SamplingParams()] * 3, [1] * 3)
    proposal = PromptLookup(block_size=4).propose(rows, 99)
    check(proposal)
    assert proposal.sizes.tolist() == [4, 1, 2]
    assert proposal.tokens[0].tolist() == [5, 6, 7, 5]
    assert torch.equal(proposal.tokens[:, 0], torch.tensor([5, 3, 8]))


@pytest.mark.parametrize(
    ("block_size", "max_nodes", "width"), [(4, 99, 4), (4, 2, 2), (1, 99, 1), (9, 1, 1)]
)
def test_a_proposal_fits_into_the_block_and_the_budget(
    block_size: int, max_nodes: int, width: int
) -> None:
    rows = Rows([0], [[5, 6, 7, 8, 5]], [SamplingParams()], [5])
    assert PromptLookup(block_size=block_size).propose(rows, max_nodes).num_nodes == width


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    history=st.lists(st.integers(0, 2), min_size=2, max_size=20),
    cuts=st.lists(st.integers(1, 20), max_size=6),
)
def test_an_index_that_grows_with_its_text_finds_what_a_new_one_finds(
    history: list[int], cuts: list[int]
) -> None:
    index = NgramIndex(3)
    for length in sorted({*cuts, len(history)}):
        text = history[:length]
        assert index.draft(text, 4) == slow(text, 3, 4)


def test_an_index_that_forgets_where_it_was_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [list(text) for text in itertools.product(range(2), repeat=7)]

    def found(text: list[int]) -> list[int]:
        index = NgramIndex(3)
        index.draft(text[:4], 4)
        index._num_read += 2  # the planted fault: two tokens are passed over
        return index.draft(text, 4)

    assert any(found(text) != slow(text, 3, 4) for text in texts)


class Counted(list[int]):
    """A text that counts how often it is looked into."""

    looks = 0

    def __getitem__(self, place):  # type: ignore[no-untyped-def,override]
        Counted.looks += 1
        return super().__getitem__(place)


@pytest.mark.parametrize(
    "history", [[7] * 3000, list(range(3000)), [n if n % 2 else 7 for n in range(3000)]]
)
def test_a_step_does_not_walk_the_whole_text(history: list[int]) -> None:
    text, drafter = Counted(history), PromptLookup(block_size=4)
    drafter.propose(Rows([0], [text], [SamplingParams()], [5]), 99)
    Counted.looks = 0
    for token in (7, 8, 9):
        text.append(token)
        drafter.propose(Rows([0], [text], [SamplingParams()], [5]), 99)
    assert 0 < Counted.looks < 60


@pytest.mark.parametrize(
    ("history", "size"),
    [
        ([1, 5, 9, 2, 5], 1),
        ([5, 6, 9, 5, 6], 2),
        ([3, 4, 5, 6, 7, 8, 3, 4, 5, 6, 7], 5),  # the places agree beyond the three looked up
        ([*range(20), *range(15)], 8),  # and no more than eight tokens are told apart
        ([4, 4, 4], 2),
    ],
)
def test_a_match_says_how_far_both_places_agree(history: list[int], size: int) -> None:
    match = NgramIndex(3, len(history)).match(history)
    assert match is not None
    assert match.size == size


def test_longer_matches_are_surer_and_every_right_draft_makes_one_longer() -> None:
    usual = [NgramIndex(3).chance(size) for size in range(1, 12)]
    assert usual == sorted(usual)
    assert usual[7:] == [usual[7]] * 4
    rows = Rows([0], [[5, 6, 7, 8, 9, 5, 6]], [SamplingParams()], [7])
    proposal = PromptLookup(block_size=4).propose(rows, 99)
    assert proposal.scores is not None
    assert proposal.scores[0, 1:].exp().tolist() == pytest.approx(usual[1:4])


def test_a_text_teaches_what_its_own_repeats_are_worth() -> None:
    """The model never goes on as before behind 5; that the prompt did is no sign."""
    prompt = [5, 1, 9, 5, 1, 8, 5, 1, 7]
    text = [5, 2, 5, 3, 5, 4, 5, 6]
    taught = NgramIndex(3, len(prompt))
    taught.match([*prompt, *text])
    untaught = NgramIndex(3, len(prompt) + len(text))
    untaught.match([*prompt, *text])
    assert taught.chance(1) < 0.8 * untaught.chance(1)
    by_prompt = NgramIndex(3)  # the planted fault
    by_prompt.match([*prompt, *text])
    assert by_prompt.chance(1) > taught.chance(1)
    assert untaught.chance(1) == NgramIndex(3).chance(1)


def test_a_slot_that_is_used_again_knows_nothing_of_the_text_before() -> None:
    drafter = PromptLookup(block_size=4)
    rows = Rows([0], [[5, 6, 7, 8, 5, 6]], [SamplingParams()], [2])
    assert drafter.propose(rows, 99).tokens.tolist() == [[6, 7, 8, 5]]
    drafter.end(rows)
    rows = Rows([0], [[1, 2, 3, 4, 9, 9, 9, 9, 5, 6]], [SamplingParams()], [2])
    assert drafter.propose(rows, 99).num_nodes == 1
