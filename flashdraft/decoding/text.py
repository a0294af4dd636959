"""Tokens to text as it streams: whole characters only, and nothing from a stop string on.

Special tokens have no text that is shown, but a stop string may name one, or begin or end inside
one. Knows a tokenizer's `decode`, and what its special tokens are called. Does not know models,
requests or steps.
"""

from collections.abc import Sequence
from itertools import compress

from flashdraft.decoding.ending import Tokenizer, hidden_tokens

__all__ = ["TextDecoder"]

_UNFINISHED = "\ufffd"  # what a tokenizer prints for the first bytes of a character


class TextDecoder:
    """`push` every token in order, then `flush`; the pieces joined are the text.

    `stopped` tells that a stop string ended it. An end-of-text token goes to `end` instead, which
    shows nothing of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False
        self.text = ""  # given out so far
        self._tokens: list[int] = []
        self._start = 0  # tokens before this are left out of the decode window
        self._read = 0  # tokens before this are in the text already
        # texts of special tokens, which only stop strings see
        self._hidden = hidden_tokens(tokenizer) if self.stop else {}
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
        self._shown += [False] * len(hidden)
        return self._give("", final=final)

    def _give(self, new: str, *, final: bool) -> str:
        """Give out what no stop string can touch any more: all but that, if this is `final`.

        Stop strings are looked for twice, in the text with what is hidden in it and in the text
        that is shown.
        """
        whole = self._held + new
        shown = self._shown + [True] * len(new)
        visible = "".join(compress(whole, shown))

        stops = [at for at in map(visible.find, self.stop) if at >= 0]
        stops += [sum(shown[:at]) for at in map(whole.find, self.stop) if at >= 0]
        self.stopped = bool(stops)

        kept = 0
        kept_visible = 0
        if not final:
            kept = _overlap(whole, self.stop)
            kept_visible = _overlap(visible, self.stop)
        first_kept = len(whole) - kept
        end = min(sum(shown[:first_kept]), len(visible) - kept_visible)
        if stops:
            end = min(stops)

        # what is held back begins where what is given out ends
        while first_kept > 0 and sum(shown[:first_kept]) > end:
            first_kept -= 1
        self._held = whole[first_kept:]
        self._shown = shown[first_kept:]
        piece = visible[:end]
        self.text += piece
        return piece


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `stops`."""
    longest = 0
    for stop in stops:
        most = min(len(stop) - 1, len(text))
        for length in range(1, most + 1):
            if text.endswith(stop[:length]):
                longest = max(longest, length)
    return longest
