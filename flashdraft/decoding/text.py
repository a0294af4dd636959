"""Tokens to text as it streams: whole characters only, and nothing from a stop string on.

Special tokens have no text that is shown, but a stop string may name one, or begin or end inside one. Knows a tokenizer's
`decode`, and what its special tokens are called.
"""

from collections.abc import Sequence
from typing import Any

from flashdraft.decoding.ending import hidden_tokens

__all__ = ["TextDecoder"]

_UNFINISHED = "\ufffd"  # what a tokenizer prints for the first bytes of a character


class TextDecoder:
    """`push` every token in order, then `flush`; the pieces joined are the text. `stopped` tells that a stop string ended it.

    An end-of-text token goes to `end` instead, which shows nothing of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, tuple(stop), False
        self.text = ""  # given out so far
        self._tokens: list[int] = []
        self._start = 0  # tokens before this are left out of the decode window
        self._read = 0  # tokens before this are in the text already
        self._hidden = (
            hidden_tokens(tokenizer) if self.stop else {}
        )  # texts of special tokens, which only stop strings see
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self._shown: list[bool] = []  # by character of `_held`: False inside a special token

    def push(self, token: int) -> str:
        """The text that is certain now, often one word; empty while a character or a possible stop string is unfinished."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        known = self._decode(self._start, self._read)
        whole = self._decode(self._start, len(self._tokens))
        if whole.endswith(_UNFINISHED):
            return self._hide(token, final=False)
        if len(whole) > len(
            known
        ):  # a window that began with a token without text would lose the next word's space
            self._start = self._read
        self._read = len(self._tokens)
        piece = self._give(whole[len(known) :], final=False)
        return piece + self._hide(token, final=False)

    def end(self, token: int) -> str:
        """What is still held back when this end-of-text token has come; a stop string may end with it."""
        if self.stopped:
            return ""
        piece = self._give(self._unread(), final=False)
        return piece + self._hide(token, final=True)

    def flush(self) -> str:
        """What is still held back; call it once, after the last token."""
        if self.stopped:
            return ""
        return self._give(self._unread(), final=True)

    def _unread(self) -> str:
        """The text of the tokens that `push` could not make whole characters of."""
        known = self._decode(self._start, self._read)
        return self._decode(self._start, len(self._tokens))[len(known) :]

    def _decode(self, first: int, last: int) -> str:
        window = self._tokens[first:last]
        return str(
            self.tokenizer.decode(
                window, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _hide(self, token: int, *, final: bool) -> str:
        """Take a token's hidden text, if it has one, which stop strings see behind what is held back."""
        hidden = "" if self.stopped else self._hidden.get(token, "")
        self._held += hidden
        self._shown += [False for _ in hidden]
        return self._give("", final=final) if hidden or (final and not self.stopped) else ""

    def _give(self, new: str, *, final: bool) -> str:
        """Give out what no stop string can touch any more."""
        whole = self._held + new
        shown = [*self._shown, *(True for _ in new)]
        visible = "".join(
            character for character, is_shown in zip(whole, shown, strict=True) if is_shown
        )
        found = [at for at in map(visible.find, self.stop) if at >= 0]
        found += [sum(shown[:at]) for at in map(whole.find, self.stop) if at >= 0]

        self.stopped = bool(found)
        kept = 0 if final else _overlap(whole, self.stop)
        kept_visible = 0 if final else _overlap(visible, self.stop)
        first_kept = len(whole) - kept
        end = (
            min(*found, len(visible))
            if found
            else min(sum(shown[:first_kept]), len(visible) - kept_visible)
        )

        piece = visible[:end]
        while first_kept > 0 and sum(shown[:first_kept]) > end:
            first_kept -= 1
        self._held, self._shown = whole[first_kept:], shown[first_kept:]
        self.text += piece
        return piece


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `stops`."""
    return max(
        (
            n
            for stop in stops
            for n in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:n])
        ),
        default=0,
    )
