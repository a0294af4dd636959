"""An answer's text -> its reasoning, its content and its calls of tools, as it streams.

Knows the marks of thinking (<think>) and the two common wire forms of calls: Hermes' and Qwen's
<tool_call> with JSON inside, and Llama's bare JSON, also behind <|python_tag|>. Does not know
models, tokens, templates or HTTP.
"""

import re
from collections.abc import Collection
from typing import Literal, NamedTuple

from flashdraft.serve.tools import Call, ObjectEnd, could_be_call, read_call
from flashdraft.types import FinishReason

__all__ = ["MARKS", "THINK", "THOUGHT", "Delta", "Turn", "TurnReader"]

THINK, THOUGHT = "<think>", "</think>"
_CALL, _CALLED = "<tool_call>", "</tool_call>"
_PYTHON = "<|python_tag|>"
MARKS = (THINK, THOUGHT, _CALL, _CALLED, _PYTHON)
_BETWEEN_CALLS = re.compile(r"\s*(?:;\s*)?")  # of bare JSON


class Delta(NamedTuple):
    """What a piece of text adds to the answer. Most have one part; where all are empty, nothing."""

    raw: str  # the model's own text; those of all deltas, joined, are the whole of it
    content: str = ""
    reasoning: str = ""
    call: Call | None = None


class Turn(NamedTuple):
    """A whole answer."""

    content: str | None  # None: there are only calls, or only thoughts
    reasoning: str | None
    calls: tuple[Call, ...]


class TurnReader:
    """Reads one answer, once.

    For a stream: `push` every piece of text, then `end`; each gives the deltas that are certain by
    now. For a whole answer: `read`. Then `finish_reason` says how it ended. Make one with
    `talk.reader`, and let the text come from `talk.decoder`: some tokenizers hide the marks.

    However the text is cut into pieces, the parts joined are the same. Half a mark, and a call that
    is not yet whole, is held back; what turns out to be no call is content, as it was written.
    White space next to a mark is only in `raw`.

    names: of the functions that were offered; without any, no text is a call. thinks: whether a
    <think> block at the beginning is reasoning; elsewhere it is content. opened: the prompt itself
    ended with <think>.
    """

    def __init__(
        self, *, names: Collection[str] = (), thinks: bool = False, opened: bool = False
    ) -> None:
        self.names = frozenset(names)
        self.num_calls = 0
        self._state: Literal["opening", "reasoning", "content"] = "content"
        if thinks or opened:
            self._state = "opening"
        self._opened = opened
        self._held = ""
        self._trims = False  # white space that comes now stands behind a mark
        self._may_be_bare = True  # JSON that comes now may be a call without a mark
        self._object: ObjectEnd | None = None  # of the call that is held

    def push(self, text: str) -> list[Delta]:
        """What is certain when this text has come."""
        self._held += text
        return self._read(final=False)

    def end(self) -> list[Delta]:
        """The rest; call it once, behind the last text."""
        return self._read(final=True)

    def read(self, text: str) -> Turn:
        """The whole answer at once."""
        deltas = [*self.push(text), *self.end()]
        content = "".join(delta.content for delta in deltas)
        reasoning = "".join(delta.reasoning for delta in deltas)
        calls = tuple(delta.call for delta in deltas if delta.call is not None)
        is_without = not content and bool(calls or reasoning)
        return Turn(None if is_without else content, reasoning or None, calls)

    def finish_reason(self, reason: FinishReason) -> str:
        """What a client is told, where the engine's own reason is this one."""
        return "tool_calls" if self.num_calls and reason == "stop" else reason

    def _read(self, *, final: bool) -> list[Delta]:
        deltas = []
        while self._held:
            delta = self._next(final=final)
            if delta is None:
                break
            self._held = self._held[len(delta.raw) :]
            if delta.raw:
                deltas.append(delta)
        return deltas

    def _next(self, *, final: bool) -> Delta | None:
        """The next delta of what is held, empty where only the state changes; None: wait."""
        if self._state == "opening":
            return self._open(final=final)
        if self._trims:
            return self._trim()
        if self._state == "reasoning":
            return self._reason(final=final)
        return self._tell(final=final)

    def _open(self, *, final: bool) -> Delta | None:
        """Whether the answer begins with <think>."""
        text = self._held.lstrip()
        begins = text.startswith(THINK)
        if not begins and not final and THINK.startswith(text):
            return None

        self._state = "reasoning" if begins or self._opened else "content"
        self._trims = self._state == "reasoning"
        length = len(self._held) - len(text) + len(THINK)
        return Delta(self._held[:length] if begins else "")

    def _trim(self) -> Delta:
        length = len(self._held) - len(self._held.lstrip())
        self._trims = length == len(self._held)
        return Delta(self._held[:length])

    def _reason(self, *, final: bool) -> Delta | None:
        before, mark, _ = self._held.partition(THOUGHT)
        if mark:
            self._state = "content"
            self._trims = True
            return Delta(before + mark, reasoning=before.rstrip())
        if final:
            return Delta(before, reasoning=before.rstrip())

        certain = _without_beginning(before, (THOUGHT,)).rstrip()
        return Delta(certain, reasoning=certain) if certain else None

    # --- content ----------------------------------------------------------------------------------

    def _tell(self, *, final: bool) -> Delta | None:
        """Content up to the next call, or that call."""
        if not self.names:
            return Delta(self._held, content=self._held)

        first = _num_spaces(self._held)
        for mark in (_CALL, _PYTHON):
            if self._held.startswith(mark, first):
                return self._call(mark, first + len(mark), final=final)
        if self._may_be_bare:
            between = _BETWEEN_CALLS.match(self._held) if self.num_calls else None
            brace = between.end() if between else first
            if self._held.startswith("{", brace):
                return self._call("", brace, final=final)
            if brace == len(self._held) and not final:
                return None
        return self._say(final=final)

    def _say(self, *, final: bool) -> Delta | None:
        places = [self._held.find(mark) for mark in (_CALL, _PYTHON)]
        found = [place for place in places if place >= 0]
        text = self._held
        if found:
            text = text[: min(found)].rstrip()
        elif not final:
            text = _without_beginning(text, (_CALL, _PYTHON)).rstrip()
        if not text:
            return None
        if self.num_calls and text.isspace():  # the end of an answer of calls
            return Delta(text)
        self._may_be_bare = False
        return Delta(text, content=text)

    def _call(self, mark: str, start: int, *, final: bool) -> Delta | None:
        """The call that stands behind the mark, or what was held for one as content.

        start: the place behind the mark, in what is held.
        """
        brace = start + _num_spaces(self._held[start:])
        may_begin = brace == len(self._held) or self._held[brace] == "{"
        if not may_begin or not could_be_call(self._held[brace:], self.names):
            return self._no_call(mark, start)
        if brace == len(self._held):
            return self._no_call(mark, start) if final else None

        if self._object is None:
            self._object = ObjectEnd(brace)
        self._object.look(self._held)
        end = self._object.end
        if self._object.is_broken or (end is None and final):
            return self._no_call(mark, start)
        if end is None:
            return None

        call = read_call(self._held[brace:end], self.names, self.num_calls)
        closed = _closed(self._held, end) if mark == _CALL else end
        if call is None or closed is None:
            return self._no_call(mark, start)
        is_certain = mark != _CALL or self._held[:closed].endswith(_CALLED)
        if not is_certain and not final:
            return None

        self._object = None
        self._may_be_bare = True
        self.num_calls += 1
        return Delta(self._held[:closed], call=call)

    def _no_call(self, mark: str, start: int) -> Delta:
        """The mark, or the brace where there is none, is content; the rest is looked at again."""
        self._object = None
        self._may_be_bare = False
        text = self._held[: start if mark else start + 1]
        return Delta(text, content=text)


def _num_spaces(text: str) -> int:
    """How much white space it begins with."""
    return len(text) - len(text.lstrip())


def _closed(text: str, end: int) -> int | None:
    """The place behind </tool_call>, which follows the object that ends at `end`.

    All of the text where it ends before that; None where something else follows.
    """
    behind = text[end:].lstrip()
    if behind.startswith(_CALLED):
        return len(text) - len(behind) + len(_CALLED)
    return len(text) if _CALLED.startswith(behind) else None


def _without_beginning(text: str, marks: Collection[str]) -> str:
    """The text without an end of it that may be the beginning of a mark."""
    longest = 0
    for mark in marks:
        for length in range(1, len(mark)):
            if text.endswith(mark[:length]):
                longest = max(longest, length)
    return text[: len(text) - longest]
