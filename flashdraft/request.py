"""A request: what a user sent, as tokens, and what it has become so far.

Knows tokens, their text and where it ends. Does not know rows, caches or who drafts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from flashdraft.decoding.sampling import logprob, top_logprobs
from flashdraft.decoding.text import TextDecoder
from flashdraft.errors import ContextLengthError, InvalidPrompt
from flashdraft.models.target import Target
from flashdraft.types import (
    Chunk,
    FinishReason,
    Piece,
    Result,
    SamplingParams,
    Stats,
    TokenLogprob,
    require,
)

__all__ = ["Drafting", "Request", "check"]

Drafting = Literal["auto", "on", "off"]  # as many drafts as pay; all of them; none

_NODES = 64  # slots that a proposal may need behind the text


@dataclass
class Request:
    """A prompt and how it is answered; it runs once."""

    prompt: list[int]
    params: SamplingParams
    decoder: TextDecoder
    eos: frozenset[int] = frozenset()
    index: int = 0  # the caller's number for it
    owner: str = ""  # whose it is: rows of different owners share nothing
    drafting: Drafting = "auto"
    history: list[int] = field(default_factory=list)  # prompt, committed tokens; last: the anchor
    finish_reason: FinishReason | None = None
    stats: Stats = field(default_factory=Stats)
    logprobs: list[float] = field(default_factory=list)  # of the committed tokens, if asked for
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # likewise

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end the text."""
        return frozenset() if self.params.ignore_eos else self.eos

    @property
    def num_left(self) -> int:
        return self.params.max_new_tokens - (len(self.history) - len(self.prompt))

    @property
    def most_tokens(self) -> int:
        """The slots of a cache that it may come to need."""
        return len(self.prompt) + self.params.max_new_tokens + _NODES

    @property
    def shares(self) -> bool:
        """Whether it may begin with what another row has read: whose logits are gone."""
        return not self.params.prompt_logprobs

    def begin(self) -> None:
        """It has got a row."""
        self.history = list(self.prompt)
        self.stats = Stats(num_prompt_tokens=len(self.prompt))
        self.prompt_logprobs = [None] if self.params.prompt_logprobs else []

    def commit(
        self,
        tokens: Sequence[int],
        num_drafted: int,
        logits: Sequence[Tensor] = (),
        rejected: Sequence[int] = (),
    ) -> Chunk:
        """Take tokens until one ends the request; the first `num_drafted` of them were drafted.

        logits: [vocab] each, those that the tokens were drawn from; read only for logprobs.
        rejected: the drafted tokens that do not stand.
        """
        pieces = []
        for i, token in enumerate(tokens):
            self.history.append(token)
            own = None
            top: tuple[tuple[int, float], ...] = ()
            if self.params.logprobs:
                own = logprob(logits[i], token)
                top = top_logprobs(logits[i], self.params.top_logprobs)
                self.logprobs.append(own)
            text = self._text_of(token)
            pieces.append(Piece(text, drafted=i < num_drafted, logprob=own, top=top))
            if self.finish_reason is not None:
                break

        self.stats.num_tokens += len(pieces)
        self.stats.num_accepted += min(len(pieces), num_drafted)
        taken = tuple(tokens[: len(pieces)])
        return Chunk(self.index, tuple(pieces), taken, self._result(), tuple(rejected))

    def read(self, first: int, logits: Tensor) -> None:
        """Note the log-probabilities of prompt tokens.

        logits: [n, vocab], behind the tokens from number `first` on.
        """
        for place, own in enumerate(logits, first + 1):
            if place == len(self.prompt):
                return
            token = self.prompt[place]
            top = top_logprobs(own, self.params.top_logprobs)
            self.prompt_logprobs.append(TokenLogprob(token, logprob(own, token), top))

    def _text_of(self, token: int) -> str:
        """The text that this token completes; says in `finish_reason` whether it is the last."""
        if token in self.ends:
            self.finish_reason = "stop"
            return self.decoder.end(token)

        text = self.decoder.push(token)
        if self.decoder.stopped:
            self.finish_reason = "stop"
        elif self.num_left == 0:
            self.finish_reason = "length"
            text += self.decoder.flush()
        return text

    def _result(self) -> Result | None:
        """None as long as the request goes on."""
        if self.finish_reason is None:
            return None
        tokens = tuple(self.history[len(self.prompt) :])
        logprobs = tuple(self.logprobs) if self.params.logprobs else None
        of_prompt = tuple(self.prompt_logprobs) if self.params.prompt_logprobs else None
        text = self.decoder.text
        return Result(text, tokens, self.finish_reason, self.stats, logprobs, of_prompt)


def check(target: Target, request: Request) -> None:
    """Refuse a request that could never run.

    Raises InvalidPrompt, InvalidParameter or ContextLengthError.
    """
    if not request.prompt:
        raise InvalidPrompt("the prompt is empty", hint="give at least one token of text")
    highest = max(request.params.logit_bias, default=0)
    allowed = f"by token ids below {target.vocab_size}"
    require(highest < target.vocab_size, "logit_bias", f"{{{highest}: ...}}", allowed)

    num_prompt = len(request.prompt)
    asked = request.params.max_new_tokens
    limit = target.context_length
    if num_prompt + asked > limit:
        room = limit - num_prompt
        hint = f"shorten the prompt, or ask for at most {room} new tokens"
        if room < 1:
            hint = f"shorten the prompt by {1 - room} tokens or more"
        wanted = f"the prompt has {num_prompt} tokens and {asked} new ones were asked for"
        got = f"{wanted}, but the context of `{target.name}` holds {limit}"
        raise ContextLengthError(got, hint=hint)
