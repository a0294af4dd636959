"""Single tokens as text and bytes, and where each one begins in a text, for tokenizers of bytes and
of pieces.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import byte_tokenizer, piece_tokenizer

from flashdraft.serve.logprobs import completion_logprobs, scored_prompt
from flashdraft.serve.tokens import TokenTexts
from flashdraft.types import TokenLogprob

quick = settings(derandomize=True, deadline=None, max_examples=150)
TOKENIZERS = {"bytes": cache(byte_tokenizer), "pieces": cache(piece_tokenizer)}


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.text(max_size=12))
@quick
def test_the_bytes_of_tokens_are_the_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    texts = TokenTexts(tokenizer)
    joined = b"".join(texts.bytes_of(token) for token in tokens_of(tokenizer, text))
    if kind == "pieces" and text:  # which get a space in front
        joined = joined.removeprefix(b" ")
        text = text.replace("\u2581", " ")
    assert joined == text.encode()


@pytest.mark.parametrize(
    ("kind", "name", "own", "text"),
    [
        ("bytes", "\u0120h", b" h", " h"),
        ("bytes", "\u00c3\u00a9", b"\xc3\xa9", "\u00e9"),
        ("bytes", "\u00c3", b"\xc3", "bytes:\\xc3"),
        ("bytes", "\u0102", b"\x02", "\x02"),
        ("bytes", "<|im_end|>", b"<|im_end|>", "<|im_end|>"),
        ("pieces", "\u2581hi", b" hi", " hi"),
        ("pieces", "\u00e9", b"\xc3\xa9", "\u00e9"),
        ("pieces", "<0xC3>", b"\xc3", "bytes:\\xc3"),
        ("pieces", "<0x41>", b"A", "A"),
        ("pieces", "</s>", b"</s>", "</s>"),
    ],
)
def test_a_token_by_itself(kind: str, name: str, own: bytes, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    token = tokenizer.convert_tokens_to_ids(name)
    texts = TokenTexts(tokenizer)
    assert texts.bytes_of(token) == own
    assert texts.text_of(token) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_id_without_a_token_has_no_text(kind: str) -> None:
    assert TokenTexts(TOKENIZERS[kind]()).text_of(100_000) == ""


def offsets(kind: str, text: str, before: list[int]) -> list[int]:
    """Where the tokens of a text begin, with those before it that are not in it."""
    tokenizer = TOKENIZERS[kind]()
    tokens = [*before, *tokens_of(tokenizer, text)]
    unknown = [None] * len(tokens)
    return [one.offset for one in scored_prompt(tokens, unknown, text, TokenTexts(tokenizer))]


@pytest.mark.parametrize(
    ("kind", "text", "before", "expected"),
    [
        ("bytes", "hi h", [], [0, 2]),
        ("bytes", "hi", [0], [0, 0]),  # <s>
        ("bytes", "a\u00e9b", [], [0, 1, 2]),
        ("bytes", "a\U0001f642b", [], [0, 1, 2, 2, 2, 2]),
        ("bytes", "<s>a", [], [0, 3]),  # where the text says it
        ("pieces", "hi a", [], [0, 2, 3]),
        ("pieces", "hi", [0], [0, 0]),
        ("pieces", "a\u00fcb", [], [0, 0, 1, 2, 2]),
        ("pieces", " a", [], [0, 0, 1]),
        ("pieces", "s", [0], [0, 0, 0]),  # in <s>, too
        ("pieces", "hi", [0, 0], [0, 0, 0]),
    ],
)
def test_where_tokens_begin(kind: str, text: str, before: list[int], expected: list[int]) -> None:
    assert offsets(kind, text, before) == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.text(max_size=12))
@quick
def test_offsets_never_go_back_and_stay_in_the_text(kind: str, text: str) -> None:
    found = offsets(kind, text, [0])
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] <= len(text)


def test_of_two_tokens_with_one_text_the_likelier_is_told() -> None:
    tokenizer = piece_tokenizer()
    texts = TokenTexts(tokenizer)
    letter, byte = tokenizer.convert_tokens_to_ids(["a", "<0x61>"])
    assert texts.text_of(letter) == texts.text_of(byte) == "a"
    top = ((byte, -0.5), (letter, -1.0))
    scored = scored_prompt([letter], [TokenLogprob(letter, -1.0, top)], "a", texts)
    assert completion_logprobs(scored, 2, texts)["top_logprobs"] == [{"a": -0.5}]
