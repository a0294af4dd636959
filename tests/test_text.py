"""Streamed text against the whole decode: no half character, nothing from a stop string on, nothing
lost, nothing taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import flashdraft.decoding.text
from flashdraft import hub
from flashdraft.decoding.text import TextDecoder

TEXTS = (
    "Hello, world!  Two spaces,\n\n\tand a tab.",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🫠🫠 and 𐍈𐍈",
    "漢字かな交じり文、中文字符與標點。한국어도",
    "naïve café “quotes” … Ω≈ç√∫µ≤≥÷",
    "مرحبا بالعالم שלום हिन्दी ไทย",
    "mixed 漢a字b🫠c",
)
quick = settings(derandomize=True, deadline=None, max_examples=80)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The built-in model's byte-level tokenizer, which splits rare characters over several
    tokens.
    """
    return AutoTokenizer.from_pretrained(hub.builtin("smollm2-135m"))


def pieces(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """One piece a token, and the last one from the flush."""
    decoder = TextDecoder(tokenizer, stop)
    given_out = [decoder.push(token) for token in tokens]
    given_out.append(decoder.flush())
    assert decoder.text == "".join(given_out)
    return given_out


def whole(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def check_characters_are_whole(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.encode(text)
    given_out = pieces(tokenizer, tokens)
    assert "".join(given_out) == text
    assert not any("\ufffd" in piece for piece in given_out)
    assert given_out[-1] == ""  # complete text needs no flush


def check_nothing_is_lost(tokenizer: Any, tokens: Sequence[int]) -> None:
    assert "".join(pieces(tokenizer, tokens)) == whole(tokenizer, tokens)


@pytest.mark.real_model
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_hold_whole_characters_and_join_to_the_text(tokenizer: Any, text: str) -> None:
    check_characters_are_whole(tokenizer, text)


@pytest.mark.real_model
@quick
@given(text=st.text(max_size=30))
def test_any_text_gives_its_whole_decode(tokenizer: Any, text: str) -> None:
    check_nothing_is_lost(tokenizer, tokenizer.encode(text))


@pytest.mark.real_model
@quick
@given(tokens=st.lists(st.integers(0, 49151), max_size=30))
def test_any_tokens_give_their_whole_decode(tokenizer: Any, tokens: list[int]) -> None:
    check_nothing_is_lost(tokenizer, tokens)


@pytest.mark.real_model
def test_characters_of_the_test_are_split_over_tokens(tokenizer: Any) -> None:
    """Otherwise the tests above would show nothing."""
    tokens = tokenizer.encode("🫠漢")
    assert len(tokens) > 2
    with pytest.raises(AssertionError):
        assert "".join(whole(tokenizer, [token]) for token in tokens) == "🫠漢"


@pytest.mark.real_model
def test_an_unfinished_character_is_held_back_and_shown_as_such_at_the_end(tokenizer: Any) -> None:
    tokens = tokenizer.encode("ok 🫠")[:-1]
    given_out = pieces(tokenizer, tokens)
    assert "".join(given_out[:-1]).rstrip() == "ok"
    assert "".join(given_out) == whole(tokenizer, tokens)
    assert "\ufffd" in given_out[-1]


@pytest.mark.real_model
def test_special_tokens_leave_no_text(tokenizer: Any) -> None:
    hello, world = tokenizer.encode("hello"), tokenizer.encode(" world")
    assert "".join(pieces(tokenizer, [1, *hello, 2, 0, *world, 2])) == "hello world"


@pytest.mark.real_model
@pytest.mark.parametrize("stop", [[], [" wor"], ["<|im_end|> w"]])
def test_special_tokens_that_are_shown_are_text(tokenizer: Any, stop: list[str]) -> None:
    hello, world = tokenizer.encode("hello"), tokenizer.encode(" world")
    decoder = TextDecoder(tokenizer, stop, shown=["<|im_end|>"])
    for token in [1, *hello, 2, 0, *world]:
        decoder.push(token)
    decoder.flush()
    text = "hello<|im_end|> world"
    assert decoder.text == (text[: text.index(stop[0])] if stop else text)


@pytest.mark.real_model
@pytest.mark.parametrize("stop", ["🫠", "字b", "\n\n", "漢a字b", "b🫠c"])
def test_a_stop_string_that_spans_tokens_ends_the_text_before_it(tokenizer: Any, stop: str) -> None:
    text = "one\n\ntwo 漢a字b🫠c three"
    given_out = pieces(tokenizer, tokenizer.encode(text), [stop])
    assert "".join(given_out) == text[: text.index(stop)]


@pytest.mark.real_model
def test_a_character_split_over_tokens_can_be_a_stop_string_at_the_very_start(
    tokenizer: Any,
) -> None:
    decoder = TextDecoder(tokenizer, ["🫠"])
    tokens = tokenizer.encode("🫠 rest")
    stopped = [(decoder.push(token), decoder.stopped)[1] for token in tokens]
    assert decoder.text == decoder.flush() == ""
    assert stopped.index(True) < len(tokens) - 1


@pytest.mark.parametrize(
    "planted", ["token by token", "without the window", "half characters", "no flush"]
)
@pytest.mark.real_model
def test_a_planted_fault_of_decoding_is_caught(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    def token_by_token(self: TextDecoder, token: int) -> str:
        return self._give(whole(self.tokenizer, [token]), final=False)

    def without_window(self: TextDecoder, token: int) -> str:
        self._tokens.append(token)
        self._start, self._read = (
            self._read,
            len(self._tokens),
        )  # whether or not a character is finished
        return self._give(self._decode(self._start, self._read), final=False)

    text = "mixed 漢a🫠"
    unfinished = tokenizer.encode(text)[:-1]
    if planted == "token by token":
        monkeypatch.setattr(TextDecoder, "push", token_by_token)
    elif planted == "without the window":
        monkeypatch.setattr(TextDecoder, "push", without_window)
    elif planted == "half characters":
        monkeypatch.setattr(flashdraft.decoding.text, "_UNFINISHED", "\x00")
    else:
        monkeypatch.setattr(TextDecoder, "flush", lambda self: "")
        with pytest.raises(AssertionError):
            check_nothing_is_lost(tokenizer, unfinished)
        return
    with pytest.raises(AssertionError):
        check_characters_are_whole(tokenizer, text)


class Syllables:
    """A tokenizer whose token i is the i-th syllable; no special tokens."""

    WORDS = ("a", "b", "ab", "ba", "aab", "c", "")

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        return "".join(self.WORDS[token] for token in ids)


def check_stops(tokens: Sequence[int], stops: Sequence[str]) -> None:
    """After every token: what is out is the text less its longest end that begins a stop, or all
    before the first stop.
    """
    syllables, text, out = Syllables(), "", ""
    decoder = TextDecoder(syllables, stops)
    for token in tokens:
        out += decoder.push(token)
        text += syllables.WORDS[token]
        found = [text.index(stop) for stop in stops if stop in text]
        assert decoder.stopped == bool(found)
        if found:
            text = text[: min(found)]
            assert out == text
            break
        held = [
            n
            for n in range(len(text) + 1)
            for stop in stops
            if n < len(stop) and text.endswith(stop[:n])
        ]
        assert out == text[: len(text) - max(held, default=0)]
    out += decoder.push(0) + decoder.flush() if decoder.stopped else decoder.flush()
    assert out == decoder.text == text


@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    tokens=st.lists(st.integers(0, len(Syllables.WORDS) - 1), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop_and_holds_back_no_more_than_it_must(
    tokens: list[int], stops: list[str]
) -> None:
    check_stops(tokens, stops)


def check_all_stops() -> None:
    check_stops([0, 0, 2, 5, 1], ["abc"])  # a false start: aaab, then c
    check_stops([5, 4, 1, 0], ["b", "aab"])  # both end here; the one that begins first counts
    check_stops([5, 4, 1, 0], ["aab", "b"])
    check_stops([5, 0, 0], ["aab"])  # held back to the end
    check_stops([2, 5], ["a"])  # at the very start


@pytest.mark.parametrize(
    "planted", ["nothing is held", "first of the list", "longest hold lost", "goes on"]
)
def test_a_planted_fault_of_stopping_is_caught(
    monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    check_all_stops()
    give = TextDecoder._give

    def first_of_the_list(self: TextDecoder, new: str, *, final: bool) -> str:
        stops, pending = self.stop, self._held + new
        self.stop = next(((stop,) for stop in stops if stop in pending), stops)
        return give(self, new, final=final)

    def goes_on(self: TextDecoder, new: str, *, final: bool) -> str:
        piece = give(self, new, final=final)
        self.stopped = False
        return piece

    if planted == "nothing is held":
        monkeypatch.setattr(flashdraft.decoding.text, "_overlap", lambda text, stops: 0)
    elif planted == "longest hold lost":
        monkeypatch.setattr(
            flashdraft.decoding.text,
            "_overlap",
            lambda text, stops: int(any(text[-1:] == stop[0] for stop in stops)),
        )
    else:
        monkeypatch.setattr(
            TextDecoder, "_give", first_of_the_list if planted == "first of the list" else goes_on
        )
    with pytest.raises(AssertionError):
        check_all_stops()


def test_nothing_is_held_without_stop_strings() -> None:
    assert pieces(Syllables(), [0, 1, 2]) == ["a", "b", "ab", ""]


def test_a_long_stop_string_is_compared_no_further_than_the_text_goes() -> None:
    class Text(str):
        compared = 0

        def endswith(self, *end: Any) -> bool:
            Text.compared += 1
            return super().endswith(*end)

    assert flashdraft.decoding.text._overlap(Text("xab"), ["ab" * 50_000, "zz"]) == 2
    assert Text.compared == 4


def test_a_partial_stop_is_given_out_at_the_end() -> None:
    assert pieces(Syllables(), [5, 0, 0], ["aab"]) == ["c", "", "", "aa"]


class Metaspace:
    """Words that bring their own space, which is dropped at the start of what is decoded
    (SentencePiece); 0 is special.
    """

    WORDS = ("", " a", " b", "c", " d")

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        return "".join(self.WORDS[token] for token in ids).removeprefix(" ")


@settings(derandomize=True, deadline=None)
@given(tokens=st.lists(st.integers(0, 4), max_size=8))
def test_a_space_that_a_word_brings_is_kept_inside_the_text(tokens: list[int]) -> None:
    check_nothing_is_lost(Metaspace(), tokens)
