"""A target with its tokenizer and its drafter: `generate`, `stream`, and a session of streams.

The stream is the primitive: `generate` collects it, and the command line and the benchmark read the
same records. All of them run on one loop: the engine's `step`, and the scheduler behind it.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NoReturn, Self, cast

from flashdraft.decoding.control import Control
from flashdraft.decoding.prompt import as_asked, check_text, encoded, is_one
from flashdraft.decoding.text import TextDecoder
from flashdraft.engine import Engine, Request, check
from flashdraft.errors import FlashDraftError, InvalidParameter, InvalidPrompt
from flashdraft.feed import feed, run
from flashdraft.models.target import Target
from flashdraft.pretrained import Tokenizer
from flashdraft.process import new_lock
from flashdraft.scheduler import Scheduler
from flashdraft.types import Chunk, Drafter, Result, SamplingParams

__all__ = ["Model", "Prompt", "Session"]

Turn = dict[str, str]
# One user turn, a conversation, or token ids as they are.
Prompt = str | Sequence[Turn] | Sequence[int]
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None
Options = dict[str, Any]  # fields of SamplingParams by name
_MEASURING = new_lock()  # steps of two threads at once would measure each other


@dataclass(eq=False, repr=False)
class Model:
    """A target, its tokenizer and a drafter, ready to generate.

    new_drafter: every stream has a drafter of its own; the weights are shared. adaptive: as many
    nodes are read as pay, where the target's step times are known. keeps: what several prompts of a
    stream or a session begin with is read once.
    """

    target: Target
    tokenizer: Tokenizer
    new_drafter: Callable[[], Drafter]
    eos: frozenset[int] = field(kw_only=True)
    max_rows: int = field(kw_only=True)
    adaptive: bool = field(default=False, kw_only=True)
    keeps: bool = field(default=True, kw_only=True)

    @cached_property
    def control(self) -> Control | None:
        """Of all streams: what was learned in one serves the next. See Engine."""
        with _MEASURING:
            if "control" in vars(self):  # another thread was first
                return cast(Control | None, vars(self)["control"])
            seconds = self.target.step_seconds if self.adaptive else None
            made = Control(seconds) if seconds else None
            vars(self)["control"] = made
            return made

    def __copy__(self) -> Self:
        return replace(self)

    def __reduce__(self) -> NoReturn:
        got = "a Model cannot be pickled or copied deeply"
        why = "it holds packed weights where they lie in this process"
        hint = "call flashdraft.load in every process that shall generate"
        raise FlashDraftError(f"{got}: {why}", hint=hint)

    def generate(self, prompts: Prompts, params: Params = None, **options: object) -> Any:
        """The Result of one prompt, or a list of Results in the order of a list of prompts.

        params: one for all, or one per prompt; `options` are the fields of SamplingParams, as a
        shorthand. Raises InvalidParameter, InvalidPrompt or ContextLengthError before anything
        runs.
        """
        results: dict[int, Result] = {}
        for chunk in self.stream(prompts, params, **options):
            if chunk.result is not None:
                results[chunk.index] = chunk.result
        ordered = [results[index] for index in sorted(results)]
        return ordered[0] if is_one(prompts) else ordered

    def stream(self, prompts: Prompts, params: Params = None, **options: object) -> Iterator[Chunk]:
        """One Chunk per prompt and step, as they come; a prompt's last one carries its Result."""
        requests = self.requests(prompts, params, **options)
        return _without_errors(feed(self, requests))

    def requests(self, prompts: Prompts, params: Params = None, **options: object) -> list[Request]:
        """Prompts as the engine takes them, numbered from 0.

        Raises InvalidParameter, InvalidPrompt or ContextLengthError.
        """
        batch = cast(list[Prompt], [prompts] if is_one(prompts) else list(prompts))
        params_of_prompts = _params_of_prompts(params, options, len(batch))
        requests = []
        for index, (prompt, own) in enumerate(zip(batch, params_of_prompts, strict=True)):
            requests.append(self.request(prompt, own, index=index))
        for request in requests:
            check(self.target, request)
        return requests

    def engine(self, max_rows: int, *, spare: int = 0) -> Engine:
        """An engine of so many rows, with a drafter of its own. spare: rows to keep texts in."""
        scheduler = Scheduler[Request](max_rows, keeps=self.keeps, spare=spare)
        drafter = self.new_drafter()
        return Engine(self.target, drafter, control=self.control, scheduler=scheduler)

    def session(self) -> "Session":
        """Streams one after another, each beginning with what earlier ones have read."""
        return Session(self)

    def request(self, prompt: Prompt, params: SamplingParams, *, index: int = 0) -> Request:
        """A prompt as the engine takes it."""
        tokens = self.encode(prompt)
        decoder = TextDecoder(self.tokenizer, params.stop)
        return Request(tokens, params, decoder, self.eos, index)

    def encode(self, prompt: Prompt, *, thinking: bool | None = None) -> list[int]:
        """Token ids of a prompt.

        A string becomes one user turn where the tokenizer has a chat template. thinking: the
        template's `enable_thinking`; None leaves it as the template has it. A template without it
        is refused.
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
            turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            return self._checked(encoded(self.tokenizer, self.target.name, turns, **switch))

        if not isinstance(asked, str):
            refused = f"`{self.target.name}` has no chat template for a conversation"
            raise InvalidPrompt(refused, hint="give the prompt as text")
        check_text(asked)
        return self._checked(self.tokenizer.encode(asked, add_special_tokens=True))

    def _checked(self, tokens: list[int]) -> list[int]:
        size = self.target.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise InvalidPrompt(f"token id {token} is outside the vocabulary of {size}")
        return tokens


class Session:
    """Streams of one model, one after another.

    What a finished text has read serves the next one that begins alike: the next turn of a talk
    costs its new tokens only.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._engine = model.engine(model.max_rows)

    def stream(self, prompts: Prompts, params: Params = None, **options: object) -> Iterator[Chunk]:
        """As Model.stream. A stream that is not read to its end has to be closed."""
        requests = self.model.requests(prompts, params, **options)
        return _without_errors(run(self._engine, requests))


def _without_errors(chunks: Generator[Chunk]) -> Iterator[Chunk]:
    """Raises the error of the first request that fails; the others end with it."""
    with closing(chunks):  # now: who holds the error holds this frame, too
        for chunk in chunks:
            if chunk.error is not None:
                raise chunk.error
            yield chunk


def _params_of_prompts(params: Params, options: Options, count: int) -> list[SamplingParams]:
    """One for each of so many prompts. Raises InvalidParameter."""
    known = {option.name for option in fields(SamplingParams)}
    unknown = sorted(options.keys() - known)
    if unknown:
        hint = f"options are {', '.join(sorted(known))}"
        raise InvalidParameter(f"unknown option `{unknown[0]}`", hint=hint)
    if params is not None and options:
        hint = "put them all into one SamplingParams"
        raise InvalidParameter("got both `params` and separate options", hint=hint)

    if params is None:
        return [SamplingParams(**options)] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    is_list = isinstance(params, Sequence)
    if not is_list or not all(isinstance(one, SamplingParams) for one in params):
        hint = "give SamplingParams, one for all or a list with one per prompt, or options by name"
        raise InvalidParameter(f"params is {params!r:.60}", hint=hint)
    if len(params) != count:
        got = f"got {len(params)} SamplingParams for {count} prompts"
        raise InvalidParameter(got, hint="give one for all, or one per prompt")
    return list(params)
