"""Log-probabilities in the shapes of OpenAI's two APIs.

Knows single tokens as text. A token without a log-probability (a prompt's first) has null.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flashdraft.files import Json
from flashdraft.serve.tokens import TokenTexts
from flashdraft.types import Piece, TokenLogprob

__all__ = ["Scored", "chat_logprobs", "completion_logprobs", "scored_pieces", "scored_prompt"]

LEAST = -9999.0  # what -inf is told as: JSON has no infinity


class Scored(NamedTuple):
    """One token of a text and what the target's law says of it."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, in their order
    offset: int  # characters of the text before it


def scored_pieces(tokens: Sequence[int], pieces: Sequence[Piece], offset: int) -> list[Scored]:
    """The tokens of an answer; their text begins at that character."""
    scored = []
    for token, piece in zip(tokens, pieces, strict=True):
        scored.append(Scored(token, piece.logprob, piece.top, offset))
        offset += len(piece.text)
    return scored


def scored_prompt(
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    text: str,
    texts: TokenTexts,
) -> list[Scored]:
    """The tokens of a prompt with that text."""
    scored = []
    offsets = _offsets(tokens, text, texts)
    for token, own, offset in zip(tokens, logprobs, offsets, strict=True):
        if own is None:
            scored.append(Scored(token, None, (), offset))
        else:
            scored.append(Scored(token, own.logprob, own.top, offset))
    return scored


def _offsets(tokens: Sequence[int], text: str, texts: TokenTexts) -> Iterator[int]:
    """Where each token begins in the text, in characters.

    What the tokenizer put around it (a beginning of text, the space before the first word) has no
    room in it.
    """
    parts = [texts.bytes_of(token) for token in tokens]
    whole = text.encode()
    joined = b"".join(parts)
    start = max(joined.find(whole), 0)
    if joined.endswith(whole):
        start = len(joined) - len(whole)

    place = 0  # in `joined`
    offset = 0
    for part in parts:
        yield offset
        first = max(place - start, 0)
        place += len(part)
        offset += _num_begun(whole[first : max(place - start, 0)])


def _num_begun(part: bytes) -> int:
    """How many characters of UTF-8 begin in these bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in part)


def chat_logprobs(scored: Sequence[Scored], num_top: int, texts: TokenTexts) -> Json:
    """In the shape of chats: one object a token."""
    content = []
    for one in scored:
        top = [_chat_token(token, value, texts) for token, value in one.top[:num_top]]
        content.append(_chat_token(one.token, one.logprob, texts) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(token: int, logprob: float | None, texts: TokenTexts) -> Json:
    return {
        "token": texts.text_of(token),
        "logprob": _told(logprob),
        "bytes": list(texts.bytes_of(token)),
    }


def completion_logprobs(scored: Sequence[Scored], num_top: int, texts: TokenTexts) -> Json:
    """In the shape of completions: one list a fact. top_logprobs is null where none is wanted."""
    tokens = []
    token_logprobs = []
    offsets = []
    top_logprobs = []
    for one in scored:
        tokens.append(texts.text_of(one.token))
        token_logprobs.append(_told(one.logprob))
        offsets.append(one.offset)
        top_logprobs.append(_top(one, num_top, texts))
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs if num_top else None,
        "text_offset": offsets,
    }


def _top(one: Scored, num_top: int, texts: TokenTexts) -> dict[str, float] | None:
    """The likeliest tokens by their text, and the token itself if it is none of them.

    Of two tokens with one text the likelier is told.
    """
    if one.logprob is None:
        return None
    likeliest: dict[str, float] = {}
    for token, logprob in (*one.top[:num_top], (one.token, one.logprob)):
        likeliest.setdefault(texts.text_of(token), max(logprob, LEAST))
    return likeliest


def _told(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
