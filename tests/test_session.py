"""Sessions: streams of one model, one after another, that begin with what others have read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from conftest import EOS, LetterTokenizer
from toy_arrivals import METHODS, native_target

from flashdraft.errors import FlashDraftError
from flashdraft.generate import Model, Session
from flashdraft.types import Result, SamplingParams

PROMPT = [3 + 7 * i % 50 for i in range(30)]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)


@pytest.fixture
def model() -> Model:
    tokenizer: Any = LetterTokenizer()
    return Model(
        native_target(),
        tokenizer,
        lambda: METHODS["dflash"]("native"),
        eos=frozenset({EOS}),
        max_rows=2,
    )


def last(session: Session, prompt: Sequence[int], params: SamplingParams = GREEDY) -> Result:
    *_, chunk = session.stream(list(prompt), params)
    assert chunk.result is not None
    return chunk.result


def test_a_turn_costs_its_new_tokens_only(model: Model) -> None:
    session = model.session()
    first = last(session, PROMPT)
    second = last(session, [*PROMPT, *first.tokens, 5])
    assert first.stats.num_cached == 0
    assert second.stats.num_cached == len(PROMPT) + len(first.tokens) - 2
    fresh = model.generate([*PROMPT, *first.tokens, 5], GREEDY)
    assert second.tokens == fresh.tokens
    assert second.stats.accepted_lengths == fresh.stats.accepted_lengths


def test_streams_without_a_session_share_nothing(model: Model) -> None:
    for _ in range(2):
        assert model.generate(PROMPT, GREEDY).stats.num_cached == 0


def test_prompts_of_one_stream_share_what_they_begin_with(model: Model) -> None:
    results = model.generate([[*PROMPT, 5], [*PROMPT, 6], [*PROMPT, 7]], GREEDY)
    assert results[2].stats.num_cached > 0
    for result, tail in zip(results, (5, 6, 7), strict=True):
        assert result.tokens == model.generate([*PROMPT, tail], GREEDY).tokens


def test_a_stream_that_is_left_open_stands_in_the_way_by_name(model: Model) -> None:
    """Else the chunks of both would be taken for one another's."""
    session = model.session()
    left_open = session.stream(PROMPT, GREEDY)
    next(left_open)
    with pytest.raises(FlashDraftError, match="has not ended") as caught:
        next(session.stream([5, 6], GREEDY))
    assert "close" in str(caught.value)
    rest = [chunk.result for chunk in left_open]
    assert rest[-1] is not None
    assert rest[-1].tokens == model.generate(PROMPT, GREEDY).tokens
    assert last(session, [5, 6]).tokens == model.generate([5, 6], GREEDY).tokens


def test_a_closed_stream_leaves_what_it_has_read(model: Model) -> None:
    session = model.session()
    stream: Any = session.stream(PROMPT, GREEDY)
    next(stream)
    stream.close()
    result = last(session, [*PROMPT, 4])
    assert result.stats.num_cached >= len(PROMPT) - 1
    assert result.tokens == model.generate([*PROMPT, 4], GREEDY).tokens


def test_an_error_that_is_held_does_not_hold_the_session(model: Model) -> None:
    """Its traceback holds the frames of the stream; the other request ends all the same."""

    def refuses(tokens: Sequence[int], logits: Any) -> Any:
        raise ValueError("of a hook")

    session = model.session()
    params = [GREEDY, replace(GREEDY, logits_processor=refuses)]
    with pytest.raises(ValueError, match="of a hook") as held:
        list(session.stream([PROMPT, [5, 6, 7]], params))
    assert not session._engine.has_work
    result = last(session, PROMPT)
    assert result.tokens == model.generate(PROMPT, GREEDY).tokens
    assert held.value is not None
