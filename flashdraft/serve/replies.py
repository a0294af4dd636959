"""What the engine gave out becomes bodies and stream chunks of OpenAI's shape.

Knows Chunks, and what was asked for. Does not know HTTP, models or the engine's thread.
"""

import secrets
import time
from dataclasses import dataclass

from flashdraft.files import Json
from flashdraft.serve.choices import ChatChoice, Choice, CompletionChoice
from flashdraft.serve.protocol import ChatBody
from flashdraft.serve.tokens import TokenTexts
from flashdraft.serve.translate import Call
from flashdraft.serve.usage import Speculation, Usage
from flashdraft.types import Chunk, Stats

__all__ = ["Head", "Reply", "new_head"]


@dataclass(frozen=True)
class Head:
    """What every body and every stream chunk of one call begins with."""

    id: str
    created: int  # seconds since 1970
    model: str
    fingerprint: str | None = None  # of what makes a text: weights, kernel, version

    def of(self, kind: str) -> Json:
        """The first fields of an object of that kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def new_head(call: Call, model: str, fingerprint: str | None = None) -> Head:
    """A head with an id that nobody can guess."""
    prefix = "chatcmpl" if isinstance(call.body, ChatBody) else "cmpl"
    return Head(f"{prefix}-{secrets.token_hex(16)}", int(time.time()), model, fingerprint)


class Reply:
    """The answers of one call: `take` its chunks in their order, then ask for the rest.

    A body that is no stream is `whole`; a stream is what `take` returns, then `last` if usage was
    asked for. Chunk.index is the place of the request in the call.
    """

    def __init__(self, call: Call, head: Head, texts: TokenTexts) -> None:
        self.call = call
        self.head = head
        self.texts = texts
        self.speculation = Speculation()
        self.choices: list[Choice] = []
        for index in range(len(call.requests)):
            self.choices.append(_choice(call, index, texts))

        is_chat = isinstance(call.body, ChatBody)
        self._kind = "chat.completion" if is_chat else "text_completion"
        self._kind_of_chunk = "chat.completion.chunk" if is_chat else "text_completion"

    def take(self, chunk: Chunk) -> Json | None:
        """The stream's next chunk; None where the step has nothing to show."""
        self.speculation.add(chunk)
        told = self.choices[chunk.index].take(chunk)
        shows_drafts = bool(self.call.body.draft_pieces)
        if told is None and not shows_drafts:
            return None

        made = self.head.of(self._kind_of_chunk)
        made["choices"] = [] if told is None else [told]
        if shows_drafts:
            made["flashdraft"] = self._drafts(chunk)
        if self.call.body.wants_running_usage:
            made["usage"] = self._usage_so_far()
        elif self.call.body.wants_usage:
            made["usage"] = None
        return made

    def last(self) -> Json:
        """The stream's last chunk: what it all cost."""
        made = self.head.of(self._kind_of_chunk)
        return made | {"choices": []} | self._costs()

    def whole(self) -> Json:
        """The body, when every answer is finished."""
        made = self.head.of(self._kind)
        made["choices"] = [choice.whole() for choice in self.choices]
        return made | self._costs()

    @property
    def is_large(self) -> bool:
        """Whether `whole` takes long: log-probabilities may be a million of figures."""
        return any(request.params.logprobs for request in self.call.requests)

    @property
    def usage(self) -> Usage:
        """Of what has come so far: an answer counts when it is finished."""
        usage = Usage()
        for choice in self.choices:
            stats = Stats() if choice.result is None else choice.result.stats
            is_first_of_prompt = choice.index % self.call.body.num_answers == 0
            if is_first_of_prompt:
                usage.add_prompt(stats)
            if not self.call.is_scoring:
                usage.add_answer(stats)
        return usage

    def _usage_so_far(self) -> Json:
        usage = Usage()
        each = self.call.body.num_answers
        for request in self.call.requests[::each]:
            usage.num_prompt += len(request.prompt)
        for choice in self.choices:
            usage.num_new += len(choice.tokens)
        return usage.sums()

    def _costs(self) -> Json:
        costs: Json = {"usage": self.usage.body()}
        if self.speculation.accepted:
            costs["metrics"] = {"speculative_decoding": self.speculation.body()}
        return costs

    def _drafts(self, chunk: Chunk) -> Json:
        """What the step did, for whoever shows drafting while it happens."""
        pieces = []
        num_drafted = len(chunk.rejected)
        for piece in chunk.pieces:
            num_drafted += piece.drafted
            origin = "drafted" if piece.drafted else "target"
            pieces.append({"text": piece.text, "origin": origin})
        rejected = [self.texts.text_of(token) for token in chunk.rejected]
        return {
            "index": chunk.index,
            "pieces": pieces,
            "rejected": rejected,
            "num_drafted": num_drafted,
        }


def _choice(call: Call, index: int, texts: TokenTexts) -> Choice:
    request = call.requests[index]
    num_top = request.params.top_logprobs if request.params.logprobs else None
    if call.readers:
        return ChatChoice(index, texts, call.readers[index], num_top)

    echo = call.prompts[index // call.body.num_answers] if call.prompts else ""
    is_scoring = call.is_scoring
    return CompletionChoice(index, texts, request.prompt, num_top, echo=echo, is_scoring=is_scoring)
