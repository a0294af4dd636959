"""One answer of a call: the chunks that the engine gave, and their text as a client gets it.

Knows Chunks and the shapes of a message and of a completion's choice. Does not know what is in a
text: a `Parser` tells its content, reasoning and calls apart.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from flashdraft.serve.logprobs import (
    Scored,
    chat_logprobs,
    completion_logprobs,
    scored_pieces,
    scored_prompt,
)
from flashdraft.serve.tokens import TokenTexts
from flashdraft.types import Chunk, Piece, Result

__all__ = ["ChatChoice", "Choice", "CompletionChoice", "Delta", "Parser", "Plain"]

Json = dict[str, Any]


@dataclass(frozen=True)
class Delta:
    """What a piece of a model's text adds to a message."""

    content: str = ""
    reasoning: str = ""
    # {index, id, type, function: {name, arguments}}; a later one of the same index adds arguments
    calls: tuple[Json, ...] = ()

    def then(self, later: "Delta") -> "Delta":
        return Delta(
            self.content + later.content,
            self.reasoning + later.reasoning,
            self.calls + later.calls,
        )

    def body(self) -> Json:
        """In the shape of a stream's `delta`; {} where it adds nothing."""
        fields: Json = {}
        if self.content:
            fields["content"] = self.content
        if self.reasoning:
            fields["reasoning_content"] = self.reasoning
        if self.calls:
            fields["tool_calls"] = list(self.calls)
        return fields


class Parser(Protocol):
    """Tells content, reasoning and calls of one answer apart, as its text comes."""

    def push(self, text: str, /) -> Delta:
        """What is certain with this text."""

    def end(self) -> Delta:
        """What was held back; the text is over."""


class Plain:
    """The parser of a text that is all content."""

    def push(self, text: str, /) -> Delta:
        return Delta(content=text)

    def end(self) -> Delta:
        return Delta()


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
    parser: Parser
    num_top: int | None = None  # None: no log-probabilities are wanted
    message: Delta = Delta()
    tokens: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    result: Result | None = None
    _has_begun: bool = False

    def take(self, chunk: Chunk) -> Json | None:
        self.tokens += chunk.tokens
        self.pieces += chunk.pieces
        self.result = chunk.result
        delta = self.parser.push(chunk.text)
        if chunk.result is not None:
            delta = delta.then(self.parser.end())
        self.message = self.message.then(delta)

        told = delta.body()
        is_first = not self._has_begun
        self._has_begun = True
        if is_first:
            told = {"role": "assistant", "content": "", **told}
        logprobs = self._logprobs(scored_pieces(chunk.tokens, chunk.pieces, 0))
        is_shown = bool(told) or chunk.result is not None or (logprobs and chunk.tokens)
        if not is_shown:
            return None
        return self._told({"delta": told}, logprobs)

    def whole(self) -> Json:
        message = self.message
        calls = _joined(message.calls)
        told: Json = {"role": "assistant", "content": message.content}
        if calls and not message.content:
            told["content"] = None
        if message.reasoning:
            told["reasoning_content"] = message.reasoning
        if calls:
            told["tool_calls"] = calls
        logprobs = self._logprobs(scored_pieces(self.tokens, self.pieces, 0))
        return self._told({"message": told}, logprobs)

    def _told(self, fields: Json, logprobs: Json | None) -> Json:
        reason: str | None = None if self.result is None else self.result.finish_reason
        if reason == "stop" and self.message.calls:
            reason = "tool_calls"
        return {"index": self.index, **fields, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scored: list[Scored]) -> Json | None:
        if self.num_top is None:
            return None
        return chat_logprobs(scored, self.num_top, self.texts)


def _joined(calls: tuple[Json, ...]) -> list[Json]:
    """The calls that these deltas make together."""
    joined: dict[int, Json] = {}
    for call in calls:
        function = call.get("function", {})
        known = joined.get(call["index"])
        if known is None:
            empty = {"name": "", "arguments": ""}
            joined[call["index"]] = {
                "id": call["id"],
                "type": "function",
                "function": empty | function,
            }
        else:
            known["function"]["arguments"] += function.get("arguments", "")
    return list(joined.values())


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
            reason = "length" if self.is_scoring else self.result.finish_reason
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scored: list[Scored]) -> Json | None:
        if self.num_top is None:
            return None
        return completion_logprobs(scored, self.num_top, self.texts)
