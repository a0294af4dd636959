"""A target with its tokenizer and its drafter: `generate` and `stream`.

The stream is the primitive: `generate` collects it, and the command line and the benchmark read the same records.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

from flashdraft.decoding.control import Control
from flashdraft.decoding.prompt import as_asked, is_one, rendered
from flashdraft.decoding.text import TextDecoder
from flashdraft.engine import Engine, Request, check
from flashdraft.errors import FlashDraftError, InvalidParameter, InvalidPrompt
from flashdraft.models.target import Target
from flashdraft.process import new_lock
from flashdraft.types import Chunk, Drafter, SamplingParams

__all__ = ["Model", "Prompt"]

Prompt = (
    str | Sequence[dict[str, str]] | Sequence[int]
)  # one user turn, a conversation, or token ids as they are
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None
_MEASURING = new_lock()  # steps of two threads at once would measure each other


@dataclass(eq=False, repr=False)
class Model:
    """A target, its tokenizer and a drafter, ready to generate."""

    target: Target
    tokenizer: Any
    new_drafter: Callable[
        [], Drafter
    ]  # every stream has a drafter of its own; the weights are shared
    eos: frozenset[int] = field(kw_only=True)
    max_rows: int = field(kw_only=True)
    adaptive: bool = field(
        default=False, kw_only=True
    )  # as many nodes are read as pay, where the target's step times are known

    @cached_property
    def control(self) -> Control | None:
        """Of all streams: what was learned in one serves the next. See Engine."""
        with _MEASURING:
            if "control" not in vars(self):  # another thread may have been first
                seconds = self.target.step_seconds if self.adaptive else None
                vars(self)["control"] = Control(seconds) if seconds else None
            made: Control | None = vars(self)["control"]
            return made

    def __copy__(self) -> Self:
        return replace(self)

    def __reduce__(self) -> Any:
        got = "a Model cannot be pickled or copied deeply: it holds packed weights where they lie in this process"
        raise FlashDraftError(got, hint="call flashdraft.load in every process that shall generate")

    def generate(self, prompts: Prompts, params: Params = None, **options: Any) -> Any:
        """The Result of one prompt, or a list of Results in the order of a list of prompts.

        params: one for all, or one per prompt; `options` are the fields of SamplingParams, as a shorthand.
        Raises InvalidParameter, InvalidPrompt or ContextLengthError before anything runs.
        """
        results = {
            c.index: c.result
            for c in self.stream(prompts, params, **options)
            if c.result is not None
        }
        ordered = [results[index] for index in sorted(results)]
        return ordered[0] if is_one(prompts) else ordered

    def stream(self, prompts: Prompts, params: Params = None, **options: Any) -> Iterator[Chunk]:
        """One Chunk per prompt and step, as they come; a prompt's last one carries its Result."""
        batch = [prompts] if is_one(prompts) else list(prompts)
        rows = min(self.max_rows, max(len(batch), 1))
        engine = Engine(self.target, self.new_drafter(), max_rows=rows, control=self.control)
        pairs: Any = zip(batch, _params(params, options, len(batch)), strict=True)
        requests = [self.request(prompt, one, index=i) for i, (prompt, one) in enumerate(pairs)]
        for request in requests:
            check(self.target, request)
        return _run(engine, requests)

    def request(self, prompt: Prompt, params: SamplingParams, *, index: int = 0) -> Request:
        """A prompt as the engine takes it."""
        return Request(
            self.encode(prompt), params, TextDecoder(self.tokenizer, params.stop), self.eos, index
        )

    def encode(self, prompt: Prompt, *, thinking: bool | None = None) -> list[int]:
        """Token ids of a prompt; a string becomes one user turn where the tokenizer has a chat template.

        thinking: the template's `enable_thinking`; None leaves it as the template has it. A template without it is refused.
        """
        asked = as_asked(prompt)
        if not isinstance(asked, str) and isinstance(asked[0], int):
            return self._checked(asked)

        template = getattr(self.tokenizer, "chat_template", None)
        if thinking is not None and "enable_thinking" not in str(template):
            refused = f"the chat template of `{self.target.name}` has no `enable_thinking`"
            raise InvalidPrompt(refused, hint="leave `thinking` out of the prompts")
        if template:
            switch = {} if thinking is None else {"enable_thinking": thinking}
            turns: Any = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            text = rendered(self.tokenizer, self.target.name, turns, **switch)
            return self._tokens(text, add_special_tokens=False)
        if not isinstance(asked, str):
            raise InvalidPrompt(
                f"`{self.target.name}` has no chat template for a conversation",
                hint="give the prompt as text",
            )
        return self._tokens(asked, add_special_tokens=True)

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidPrompt(
                "the prompt holds half a character (a lone surrogate)", hint="send text in UTF-8"
            ) from None
        return self._checked(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _checked(self, tokens: list[int]) -> list[int]:
        if wrong := [token for token in tokens if not 0 <= token < self.target.vocab_size]:
            raise InvalidPrompt(
                f"token id {wrong[0]} is outside the vocabulary of {self.target.vocab_size}"
            )
        return tokens


def _run(engine: Engine, requests: list[Request]) -> Iterator[Chunk]:
    waiting = list(reversed(requests))
    try:
        while waiting or engine.running:
            while waiting and engine.num_free:
                yield engine.admit(waiting.pop())
            if engine.running:
                yield from engine.step()
    finally:  # a caller that stops listening frees its rows
        for request in requests:
            engine.abort(request.index)


def _params(params: Params, options: dict[str, Any], count: int) -> list[SamplingParams]:
    known = {field.name for field in fields(SamplingParams)}
    if unknown := sorted(set(options) - known):
        raise InvalidParameter(
            f"unknown option `{unknown[0]}`", hint=f"options are {', '.join(sorted(known))}"
        )
    if params is not None and options:
        raise InvalidParameter(
            "got both `params` and separate options", hint="put them all into one SamplingParams"
        )
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams(**options)] * count
    if not isinstance(params, Sequence) or not all(
        isinstance(one, SamplingParams) for one in params
    ):
        hint = "give SamplingParams, one for all or a list with one per prompt, or options by name"
        raise InvalidParameter(f"params is {params!r:.60}", hint=hint)
    if len(params) != count:
        got = f"got {len(params)} SamplingParams for {count} prompts"
        raise InvalidParameter(got, hint="give one for all, or one per prompt")
    return list(params)
