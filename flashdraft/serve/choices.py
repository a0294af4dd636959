"""One answer of a call: the chunks that the engine gave, and their text as a client gets it.

Knows Chunks and the shapes of a message and of a completion's choice. What in a message's text is
content, reasoning or a call, a TurnReader says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from flashdraft.files import Json
from flashdraft.serve.logprobs import (
    Scored,
    chat_logprobs,
    completion_logprobs,
    scored_pieces,
    scored_prompt,
)
from flashdraft.serve.tokens import TokenTexts
from flashdraft.serve.turns import Delta, TurnReader
from flashdraft.types import Chunk, Piece, Result

__all__ = ["ChatChoice", "Choice", "CompletionChoice"]


class Choice(Protocol):
    """What a reply asks of an answer, of a chat or of a completion."""

    index: int
    result: Result | None
    tokens: list[int]

    def take(self, chunk: Chunk) -> Json | None:
        """The choice of the stream's next chunk; None where the step has nothing to show."""

    def whole(self) -> Json:
        """The choice of the body, when the answer is finished."""


@dataclass
class ChatChoice:
    """An answer that is a message. num_top: of how many tokens there are log-probabilities."""

    index: int
    texts: TokenTexts
    reader: TurnReader
    num_top: int | None = None  # None: no log-probabilities are wanted
    content: str = ""
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    result: Result | None = None
    _has_begun: bool = False

    def take(self, chunk: Chunk) -> Json | None:
        self.tokens += chunk.tokens
        self.pieces += chunk.pieces
        self.result = chunk.result
        deltas = self.reader.push(chunk.text)
        if chunk.result is not None:
            deltas += self.reader.end()

        told = self._add(deltas)
        if not self._has_begun:
            self._has_begun = True
            told = {"role": "assistant", "content": "", **told}
        logprobs = self._logprobs(scored_pieces(chunk.tokens, chunk.pieces, 0))
        is_shown = bool(told) or chunk.result is not None or (logprobs and chunk.tokens)
        return self._told({"delta": told}, logprobs) if is_shown else None

    def whole(self) -> Json:
        has_nothing_else = bool(self.calls or self.reasoning) and not self.content
        message: Json = {"role": "assistant", "content": self.content}
        if has_nothing_else:
            message["content"] = None
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        logprobs = self._logprobs(scored_pieces(self.tokens, self.pieces, 0))
        return self._told({"message": message}, logprobs)

    def _add(self, deltas: Sequence[Delta]) -> Json:
        """Take these; they come back as the one delta that a client gets."""
        content = "".join(delta.content for delta in deltas)
        reasoning = "".join(delta.reasoning for delta in deltas)
        self.content += content
        self.reasoning += reasoning
        told: Json = {}
        if content:
            told["content"] = content
        if reasoning:
            told["reasoning_content"] = reasoning

        calls = []
        for delta in deltas:
            if delta.call is not None:
                self.calls.append(delta.call.to_dict())
                calls.append({"index": delta.call.index, **delta.call.to_dict()})
        if calls:
            told["tool_calls"] = calls
        return told

    def _told(self, fields: Json, logprobs: Json | None) -> Json:
        reason = None if self.result is None else self.result.finish_reason
        told = None if reason is None else self.reader.finish_reason(reason)
        return {"index": self.index, **fields, "logprobs": logprobs, "finish_reason": told}

    def _logprobs(self, scored: list[Scored]) -> Json | None:
        if self.num_top is None:
            return None
        return chat_logprobs(scored, self.num_top, self.texts)


@dataclass
class CompletionChoice:
    """An answer that is text. num_top: of how many tokens there are log-probabilities.

    echo: the prompt's text, which is given back in front of the answer. is_scoring: nothing else
    is; the one token that the engine wrote is left out.
    """

    index: int
    texts: TokenTexts
    prompt: list[int]
    num_top: int | None = None  # None: no log-probabilities are wanted
    echo: str = ""
    is_scoring: bool = False
    text: str = ""  # as far as it was given out, with the prompt
    tokens: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    result: Result | None = None
    _has_begun: bool = False

    def take(self, chunk: Chunk) -> Json | None:
        if self.is_scoring:
            chunk = replace(chunk, tokens=(), pieces=())
        self.tokens += chunk.tokens
        self.pieces += chunk.pieces
        self.result = chunk.result

        told = chunk.text
        if not self._has_begun:
            self._has_begun = True
            self.text = self.echo
            told = self.echo + told
        logprobs = self._logprobs(scored_pieces(chunk.tokens, chunk.pieces, len(self.text)))
        self.text += chunk.text
        is_shown = bool(told) or chunk.result is not None or (logprobs and chunk.tokens)
        return self._told(told, logprobs) if is_shown else None

    def whole(self) -> Json:
        assert self.result is not None, "the answer goes on"
        scored = []
        asked = self.result.prompt_logprobs
        if asked is not None:
            scored += scored_prompt(self.prompt, asked, self.echo, self.texts)
        scored += scored_pieces(self.tokens, self.pieces, len(self.echo))
        return self._told(self.text, self._logprobs(scored))

    def _told(self, text: str, logprobs: Json | None) -> Json:
        reason: str | None = None
        if self.result is not None:
            reason = self.result.finish_reason
        if self.is_scoring and reason == "stop":
            reason = "length"  # the token that ended the text is not shown
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scored: list[Scored]) -> Json | None:
        if self.num_top is None:
            return None
        return completion_logprobs(scored, self.num_top, self.texts)
