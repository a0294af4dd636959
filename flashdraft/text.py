"""Tokens to text as it streams: whole characters only, and nothing from a stop string on. Knows a tokenizer's `decode` alone."""

from collections.abc import Sequence
from typing import Any

__all__ = ["TextDecoder"]

_UNFINISHED = "\ufffd"  # what a tokenizer prints for the first bytes of a character


class TextDecoder:
    """`push` every token in order, then `flush`; the pieces joined are the text. `stopped` tells that a stop string ended it."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, tuple(stop), False
        self.text = ""  # given out so far
        self._tokens: list[int] = []
        self._start = 0  # tokens before this are left out of the decode window
        self._read = 0  # tokens before this are in the text already
        self._held = ""  # decoded, but it may be the beginning of a stop string

    def push(self, token: int) -> str:
        """The text that is certain now, often one word; empty while a character or a possible stop string is unfinished."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        known = self._decode(self._start, self._read)
        whole = self._decode(self._start, len(self._tokens))
        if whole.endswith(_UNFINISHED):
            return ""
        if len(whole) > len(known):  # a window that began with a token without text would lose the next word's space
            self._start = self._read
        self._read = len(self._tokens)
        return self._give(whole[len(known) :], final=False)

    def flush(self) -> str:
        """What is still held back; call it once, after the last token."""
        if self.stopped:
            return ""
        known = self._decode(self._start, self._read)
        return self._give(self._decode(self._start, len(self._tokens))[len(known) :], final=True)

    def _decode(self, first: int, last: int) -> str:
        window = self._tokens[first:last]
        return str(self.tokenizer.decode(window, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _give(self, new: str, *, final: bool) -> str:
        pending = self._held + new
        found = [at for at in map(pending.find, self.stop) if at >= 0]
        self.stopped = bool(found)
        keep = 0 if final else _overlap(pending, self.stop)
        end = min(found, default=len(pending) - keep)
        piece, self._held = pending[:end], pending[end:]
        self.text += piece
        return piece


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `stops`."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
