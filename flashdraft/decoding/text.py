"""Tokens to text as it streams: whole characters only, and nothing from a stop string on.

Special tokens have no text that is shown, but a stop string may name one, or begin or end inside
one. Knows a tokenizer's `decode`, and what its special tokens are called. Does not know models,
requests or steps.
"""

from collections.abc import Collection, Sequence
from itertools import compress

from flashdraft.decoding.ending import Tokenizer, hidden_tokens

__all__ = ["TextDecoder"]

_UNFINISHED = "\ufffd"  # what a tokenizer prints for the first bytes of a character


class TextDecoder:
    """`push` every token in order, then `flush`; the pieces joined are the text.

    `stopped` tells that a stop string ended it. An end-of-text token goes to `end` instead, which
    shows nothing of it.

    shown: texts of special tokens that are shown all the same.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), shown: Collection[str] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.shown = frozenset(shown)
        self.stopped = False
        self.text = ""  # given out so far
        self._tokens: list[int] = []
        self._start = 0  # tokens before this are left out of the decode window
        self._read = 0  # tokens before this are in the text already
        # texts of special tokens, which only stop strings see, apart from those in `shown`
        self._hidden = hidden_tokens(tokenizer) if self.stop or self.shown else {}
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self._shown: list[bool] = []  # by character of `_held`: False inside a special token

    def push(self, token: int) -> str:
        """The text that is certain now, often one word.

        Empty while a character or a possible stop string is unfinished.
        """
        if self.stopped:
            return ""
        self._tokens.append(token)
        known = self._decode(self._start, self._read)
        whole = self._decode(self._start, len(self._tokens))
        if whole.endswith(_UNFINISHED):
            return self._hide(token, final=False)

        # the next window begins with what is new in this one, unless that has no text: a window
        # that begins with a token without text loses the next word's space
        if len(whole) > len(known):
            self._start = self._read
        self._read = len(self._tokens)
        piece = self._give(whole[len(known) :], final=False)
        return piece + self._hide(token, final=False)

    def end(self, token: int) -> str:
        """What is still held back when this end-of-text token has come.

        A stop string may end with it.
        """
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
        whole = self._decode(self._start, len(self._tokens))
        return whole[len(known) :]

    def _decode(self, first: int, last: int) -> str:
        window = self._tokens[first:last]
        text = self.tokenizer.decode(
            window, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _hide(self, token: int, *, final: bool) -> str:
        """Take a token's hidden text, if it has one.

        Stop strings see it behind what is held back.
        """
        if self.stopped:
            return ""
        hidden = self._hidden.get(token, "")
        if not hidden and not final:
            return ""
        self._held += hidden
        self._shown += [hidden in self.shown] * len(hidden)
        return self._give("", final=final)

    def _give(self, new: str, *, final: bool) -> str:
        """Give out what no stop string can touch any more; all there is, if nothing follows.

        Stop strings are looked for twice: in the whole text, special tokens included, and in the
        text that is visible.
        """
        whole = self._held + new
        shown = self._shown + [True] * len(new)
        visible = "".join(compress(whole, shown))

        first_held = len(whole)
        end = len(visible)
        if not final:  # the last characters may be the beginning of a stop string
            first_held -= _overlap(whole, self.stop)
            end = min(sum(shown[:first_held]), end - _overlap(visible, self.stop))
        stops_at = self._first_stop(whole, shown, visible)
        self.stopped = stops_at is not None
        if stops_at is not None:
            end = stops_at

        # what is held back begins where what is given out ends
        while first_held > 0 and sum(shown[:first_held]) > end:
            first_held -= 1
        self._held = whole[first_held:]
        self._shown = shown[first_held:]
        piece = visible[:end]
        self.text += piece
        return piece

    def _first_stop(self, whole: str, shown: list[bool], visible: str) -> int | None:
        """How many visible characters come before the first stop string; None: there is none."""
        found = []
        for stop in self.stop:
            at = visible.find(stop)
            if at >= 0:
                found.append(at)
            at = whole.find(stop)
            if at >= 0:
                found.append(sum(shown[:at]))
        return min(found, default=None)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `stops`."""
    longest = 0
    for stop in stops:
        most = min(len(stop) - 1, len(text))
        for length in range(1, most + 1):
            if text.endswith(stop[:length]):
                longest = max(longest, length)
    return longest
