"""Structured output: a JSON schema, a regular expression, texts to choose from, or a grammar says
which text may be written.

The grammars are compiled and matched by llguidance (extra `serve`), which is imported when the
first one is made. This file knows tokenizers and tokens; it does not know models or drafters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Self, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from flashdraft.errors import FlashDraftError, InvalidParameter
from flashdraft.files import parse_json
from flashdraft.pretrained import Tokenizer
from flashdraft.process import new_lock
from flashdraft.types import Steering

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

__all__ = ["Grammar", "Kind", "Schema", "grammar_of", "prepare"]

Kind = Literal["json", "regex", "choice", "grammar"]
Schema = Mapping[str, object]

# What is refused before it is compiled; what is too large beyond that shows while it is.
MOST_BYTES = 256 * 1024  # of a schema, an expression or a grammar, as text
MOST_NODES = 20_000  # objects, lists, keys and values of a schema; texts to choose from

# As `json.dumps` writes; a model has little to choose then, and no endless blanks.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_SPACING = {"whitespace_flexible": True}

# Of the lexer, in expressions that it makes, and in states. By default they are 1,000,000, 200,000
# and 250,000, and the first token of (a{1000}){1000} takes 6 seconds; with these it takes 70 ms,
# and a schema of 1,000 fields still passes.
_FIRST_FUEL = 50_000
_STEP_FUEL = 50_000
_MOST_STATES = 50_000
_NUM_TRIED = 4  # tokens of a text that are tried when a grammar is made

_LOCK = new_lock()
_READERS: WeakKeyDictionary[Tokenizer, LLTokenizer] = WeakKeyDictionary()


class Grammar:
    """What a text must be, for one tokenizer: give it as SamplingParams.logits_processor.

    It is compiled when it is made; equal ones are compiled once. The text ends where the grammar
    may end: there, and only there, the model's end-of-text tokens are allowed. Any number of texts
    may share one, in any thread.
    """

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        """source: as llguidance writes grammars; the class methods make it.

        Raises InvalidParameter for one that cannot be compiled or is too large.
        """
        self._reader = _reader_of(tokenizer)
        self._start = _compiled(self._reader, source)

    @classmethod
    def json_object(cls, tokenizer: Tokenizer) -> Self:
        """Any JSON object."""
        return cls.json_schema(tokenizer, {"type": "object"})

    @classmethod
    def json_schema(
        cls, tokenizer: Tokenizer, schema: Schema | str, *, any_spacing: bool = False
    ) -> Self:
        """A JSON value that keeps to a schema, or to one as JSON text.

        Keys come in the schema's order. any_spacing: blanks and new lines wherever JSON has them;
        else they are those of `json.dumps`.
        """
        text = schema if isinstance(schema, str) else _as_json(schema)
        _check_size(text)
        _check_schema(text)

        matcher = _library().LLMatcher
        spacing = _ANY_SPACING if any_spacing else _SPACING
        try:
            source = matcher.grammar_from_json_schema(text, defaults=spacing)
        except ValueError as error:  # of the schema's own "x-guidance"
            raise _refused(_in_one_line(error)) from None
        return cls(tokenizer, source)

    @classmethod
    def regex(cls, tokenizer: Tokenizer, pattern: str) -> Self:
        """A text that matches a regular expression from its beginning to its end.

        The syntax is that of Rust's regex crate, without look-around and back references.
        """
        _check_size(pattern)
        return cls(tokenizer, _library().LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def choice(cls, tokenizer: Tokenizer, texts: Sequence[str]) -> Self:
        """One of these texts."""
        if isinstance(texts, str) or not texts or not all(texts):
            raise _refused("`choice` is a list of texts, and none of them is empty")
        if len(texts) > MOST_NODES:
            raise _refused(f"{len(texts)} texts to choose from; {MOST_NODES} are allowed")
        quoted = [json.dumps(text, ensure_ascii=False) for text in texts]
        lark = f"start: {' | '.join(quoted)}"
        _check_size(lark)
        return cls(tokenizer, _library().LLMatcher.grammar_from_lark(lark))

    @classmethod
    def lark(cls, tokenizer: Tokenizer, grammar: str) -> Self:
        """A text of a context-free grammar, in Lark's syntax (its rule `start`) or in GBNF
        (`root`).
        """
        _check_size(grammar)
        try:
            source = _library().grammar_from("grammar", grammar)
        except ValueError as error:
            raise _refused(_in_one_line(error)) from None
        return cls(tokenizer, source)

    def begin(self, ends: frozenset[int], /) -> Steering:
        """The state before a text. ends: the tokens that end a text of this model."""
        # A copy: a matcher that one thread asks is locked to all others.
        return _Matched(self._start.deep_copy(), self._reader, ends)


def grammar_of(tokenizer: Tokenizer, kind: Kind, source: object) -> Grammar:
    """The Grammar that an API asks for by these words; see Grammar's methods.

    source: a JSON schema (an object, or text) for "json", texts for "choice", else text. Compiling
    takes milliseconds, and up to a second for the first one of a tokenizer (see `prepare`); so call
    it outside the engine's thread. Raises InvalidParameter with the reason in one line, and
    FlashDraftError where llguidance is not installed.
    """
    if kind == "json" and isinstance(source, (Mapping, str)):
        return Grammar.json_schema(tokenizer, source)
    if kind == "choice" and isinstance(source, Sequence) and not isinstance(source, str):
        return Grammar.choice(tokenizer, [str(text) for text in source])
    if kind == "regex" and isinstance(source, str):
        return Grammar.regex(tokenizer, source)
    if kind == "grammar" and isinstance(source, str):
        return Grammar.lark(tokenizer, source)
    raise _refused(f"a grammar of kind {kind!r} is not made from {type(source).__name__}")


def prepare(tokenizer: Tokenizer) -> None:
    """Read a tokenizer's vocabulary for the grammars to come, which holds up all threads a second.

    A server does so before it answers anybody. What is wrong with it shows when a grammar is made.
    """
    with suppress(FlashDraftError):
        _reader_of(tokenizer)


# ---- states --------------------------------------------------------------------------------------


class _Matched:
    """A matcher behind some text; see `Steering`. Its own, and nobody changes it."""

    def __init__(
        self, matcher: LLMatcher, reader: LLTokenizer, ends: frozenset[int], num_tokens: int = 0
    ) -> None:
        self._matcher = matcher
        self._reader = reader
        self._ends = ends
        self._num_tokens = num_tokens
        self._next: dict[int, Steering] = {}  # by token: what was asked for once
        self._forced: Sequence[int] | None = None

    def then(self, token: int, /) -> Steering:
        known = self._next.get(token)
        if known is None:
            known = self._made(token)
            self._next[token] = known
        return known

    def _made(self, token: int) -> Steering:
        if token in self._ends:
            return _Ended(self._ends)
        copy = self._matcher.deep_copy()
        copy.consume_token(token)  # where it may not, the copy holds an error from now on
        return _Matched(copy, self._reader, self._ends, self._num_tokens + 1)

    def masked(self, logits: Tensor, /) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.zeros(max(len(logits), len(bits) * 8), bool)
        allowed[: len(bits) * 8] = np.unpackbits(bits, bitorder="little")
        may_end = bool(allowed[self._reader.eos_tokens].any())
        allowed[self._reader.eos_tokens] = False
        allowed = allowed[: len(logits)]
        allowed[list(self._ends)] = may_end
        if not allowed.any():
            raise self._stuck("no token is allowed")

        forbidden = torch.from_numpy(~allowed).to(logits.device)
        return logits.masked_fill_(forbidden, -torch.inf)

    def allows(self, token: int, /) -> bool:
        if token in self._ends:
            return self._matcher.is_accepting()
        forced = self.forced()
        if forced:
            return token == forced[0]
        return self._matcher.validate_tokens([token]) == 1

    def forced(self) -> Sequence[int]:
        if self._forced is None:
            self._forced = self._find_forced()
        return self._forced

    def _find_forced(self) -> Sequence[int]:
        if self._matcher.is_error():
            return ()
        if self._matcher.is_stopped():  # nothing can follow but the end
            return tuple(self._ends) if len(self._ends) == 1 else ()
        return tuple(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise self._stuck(_in_one_line(self._matcher.get_error()))

    def _stuck(self, why: str) -> InvalidParameter:
        got = f"the grammar cannot go on after {self._num_tokens} tokens of text: {why}"
        hint = "make the grammar simpler"
        return InvalidParameter(got, hint=hint, option="logits_processor")


class _Ended:
    """Behind an end of text; where a request ignores that, more ends follow."""

    def __init__(self, ends: frozenset[int]) -> None:
        self._ends = ends

    def then(self, token: int, /) -> Steering:
        return self

    def masked(self, logits: Tensor, /) -> Tensor:
        ends = list(self._ends)
        allowed = logits[ends]
        logits.fill_(-torch.inf)
        logits[ends] = allowed
        return logits

    def allows(self, token: int, /) -> bool:
        return token in self._ends

    def forced(self) -> Sequence[int]:
        return ()


# ---- compiling -----------------------------------------------------------------------------------


def _library() -> ModuleType:
    """Raises FlashDraftError where llguidance is not installed."""
    try:
        import llguidance
    except ImportError:
        got = "structured output needs llguidance, which is not installed"
        raise FlashDraftError(got, hint="pip install 'flashdraft[serve]'") from None
    return llguidance


def _reader_of(tokenizer: Tokenizer) -> LLTokenizer:
    """The tokenizer as llguidance reads it, once. Raises InvalidParameter where it cannot."""
    _library()
    from llguidance import hf

    with _LOCK:
        reader = _READERS.get(tokenizer)
        if reader is None:
            try:
                reader = hf.from_tokenizer(cast(Any, tokenizer))
            except Exception as error:  # whatever it finds in a tokenizer's file
                got = f"this tokenizer cannot be read for grammars: {_in_one_line(error)}"
                raise InvalidParameter(got, hint="structured output needs a fast one") from None
            _READERS[tokenizer] = reader
    return reader


@lru_cache(maxsize=64)
def _compiled(reader: LLTokenizer, source: str) -> LLMatcher:
    """The matcher before a text; only copies of it go on. Raises InvalidParameter."""
    library = _library()
    limits: LLParserLimits = library.LLParserLimits(
        initial_lexer_fuel=_FIRST_FUEL,
        step_lexer_fuel=_STEP_FUEL,
        max_lexer_states=_MOST_STATES,
        verbose_errors=False,
    )
    matcher: LLMatcher = library.LLMatcher(reader, source, log_level=0, limits=limits)
    _try(matcher.deep_copy())
    return matcher


def _try(matcher: LLMatcher) -> None:
    """Take the first tokens of some text. Raises InvalidParameter where that is too much.

    What is too large mostly shows here already, and not to the engine.
    """
    for _ in range(_NUM_TRIED):
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise _refused(_in_one_line(matcher.get_error()))
        allowed = np.unpackbits(bits, bitorder="little").nonzero()[0]
        if not len(allowed):
            raise _refused("no token can follow")
        if matcher.is_stopped():
            return
        matcher.consume_token(int(allowed[0]))


def _refused(why: str) -> InvalidParameter:
    hint = "correct it, or make it smaller"
    return InvalidParameter(f"the grammar is refused: {why}", hint=hint, option="logits_processor")


def _in_one_line(message: object) -> str:
    """The cause, where the library draws a picture of the place around it."""
    text = str(message).replace("<non-verbose/>", "")
    *_, cause = text.split("\nerror: ")
    words = cause.split()
    return " ".join(words)[:300]


def _as_json(schema: object) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refused(f"the schema is no JSON: {_in_one_line(error)}") from None


def _check_size(text: str) -> None:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise _refused("it holds half a character (a lone surrogate)") from None
    if num_bytes > MOST_BYTES:
        raise _refused(f"it has {num_bytes} bytes; {MOST_BYTES} are allowed")


def _check_schema(text: str) -> None:
    try:
        schema = parse_json(text)
    except ValueError as error:
        raise _refused(f"the schema is no JSON: {_in_one_line(error)}") from None
    if not isinstance(schema, dict):
        raise _refused("a JSON schema is an object")

    count = 0
    waiting: list[object] = [schema]
    while waiting:
        node = waiting.pop()
        count += 1
        if isinstance(node, dict):
            count += len(node)
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
    if count > MOST_NODES:
        raise _refused(f"the schema has {count} keys and values; {MOST_NODES} are allowed")
