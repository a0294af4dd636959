"""The nouns. Read this first.

A *target* is the large model whose distribution must be kept; a *drafter* proposes tokens. The *anchor* is the last
committed token, which the target has not read yet: node 0 of every *proposal*. The target reads the whole proposal in
one pass and the *verdict* says which path of it was accepted and which *bonus* token follows. A *row* is one sequence
of a batch. *tau* is the number of committed tokens per target pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from flashdraft.errors import InvalidParameter

if TYPE_CHECKING:
    from torch import Tensor

    from flashdraft.models.cache import SlotCache

__all__ = [
    "COUNTS",
    "HIGHEST",
    "SEEDS",
    "Allowed",
    "Chunk",
    "Drafter",
    "FinishReason",
    "LogitsProcessor",
    "Piece",
    "Proposal",
]
__all__ += [
    "Result",
    "Rows",
    "SamplingParams",
    "Stats",
    "Verdict",
    "as_number",
    "check_option",
    "check_options",
    "counted_on",
]
__all__ += ["kind_of", "option", "require", "take_numbers"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Allowed:
    """Which values an option takes: numbers of a range, never NaN nor infinity, or one of `choices`; all of them by default."""

    least: float | None = None
    most: float | None = None
    above: float | None = None  # the range begins behind it
    below: float | None = None  # the range ends before it
    choices: tuple[str, ...] = ()

    def holds(self, number: float) -> bool:
        try:
            is_finite = math.isfinite(number)
        except OverflowError:  # a whole number beyond all floats
            is_finite = False
        if not is_finite:
            return False

        is_too_small = (self.least is not None and number < self.least) or (
            self.above is not None and number <= self.above
        )
        is_too_large = (self.most is not None and number > self.most) or (
            self.below is not None and number >= self.below
        )
        return not is_too_small and not is_too_large

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"

        most = "2**63 - 1" if self.most == HIGHEST else self.most
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {most}"
        if self.least is not None and self.below is None:
            return f"{self.least} or more"

        limits = {"at least": self.least, "above": self.above, "at most": most, "below": self.below}
        return (
            " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
            or "finite"
        )


HIGHEST = 2**63 - 1  # the largest whole number that a tensor holds
SEEDS = Allowed(0, HIGHEST)
COUNTS = Allowed(1, 2**31 - 1)  # of what there is at least one of
_KINDS: dict[type, str] = {int: "an integer", float: "a number", bool: "True or False", str: "text"}


def option(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field that the command line shows as an option, with `text` as its help; `check_options` reads the rest."""
    allowed = Allowed(least, most, above, below, tuple(choices))
    return field(default=default, metadata={"help": text, "allowed": allowed})


def as_number(value: Any) -> Any:
    """The Python number that a scalar of numpy or torch, or an array without dimensions, stands for; all else as it is."""
    is_scalar = getattr(value, "shape", None) == () and callable(getattr(value, "item", None))
    return value.item() if is_scalar else value


def take_numbers(options: Any) -> None:
    """Put Python's own numbers where a dataclass has numpy's or torch's, also inside tuples and lists."""
    for f in fields(options):
        given = getattr(options, f.name)
        taken = as_number(given)
        if type(given) in (tuple, list):
            taken = type(given)(map(as_number, given))
        if taken is not given:
            object.__setattr__(options, f.name, taken)


def check_options(options: Any) -> None:
    """Raises InvalidParameter for a field whose value is of another kind than its annotation says, or is not `Allowed`.

    Numbers of numpy and torch are taken as Python's first. None is right where the default is None.
    """
    take_numbers(options)
    kinds = _kinds_of(type(options))  # type: ignore[arg-type]
    for f in fields(options):
        value = getattr(options, f.name)
        if value is None and f.default is None:
            continue
        several = value if isinstance(value, tuple) else (value,)
        for one in several:
            check_option(f.name, one, kinds[f.name], f.metadata.get("allowed"))


def check_option(name: str, value: Any, kind: type | None, allowed: Allowed | None = None) -> None:
    """Raises InvalidParameter where a value is none of that kind (None: any), or not allowed."""
    words = _KINDS.get(kind) if kind is not None else None
    range_of = "" if allowed is None or allowed == Allowed() else str(allowed)
    if words is not None:
        is_bool = isinstance(value, bool)
        is_of_kind = isinstance(value, kind if kind is not float else (int, float))  # type: ignore[arg-type]
        wanted = f"{words}, {range_of}" if range_of and kind in (int, float) else range_of or words
        require(is_of_kind and (is_bool == (kind is bool)), name, value, wanted)

    if kind in (int, float):
        require((allowed or Allowed()).holds(value), name, value, range_of or "finite")
    elif allowed is not None and allowed.choices:
        require(value in allowed.choices, name, value, range_of)


def kind_of(hint: Any) -> type | None:
    """int, float, bool or str, if an annotation asks for one of these, for several in a tuple or a list, or for one or None."""
    if get_origin(hint) in (tuple, list):
        return kind_of(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        parts = [part for part in get_args(hint) if part is not type(None)]
        return kind_of(parts[0]) if len(parts) == 1 else None
    return hint if hint in _KINDS else None


@cache
def _kinds_of(options: type) -> dict[str, type | None]:
    hints = get_type_hints(options)
    return {name: kind_of(hint) for name, hint in hints.items()}


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raises InvalidParameter where a value is not `ok`."""
    if not ok:
        raise InvalidParameter(
            f"{name} is {_shown(value)}", hint=f"{name} must be {allowed}", option=name
        )


def _shown(value: object) -> str:
    """A value's repr, of a few words at most."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def counted_on(seed: int, number: int) -> int:
    """The seed of number `number` of a row that begins with `seed`; behind the largest seed comes 0."""
    return (seed + number) % (HIGHEST + 1)


class LogitsProcessor(Protocol):
    """The hook that masks or changes the logits of a node, as a grammar does: a function of its arguments and nothing else."""

    def __call__(self, tokens: Sequence[int], logits: Tensor, /) -> Tensor:
        """Logits [vocab] after prompt, text and draft up to the node; -inf forbids, one token must stay. Both may be changed."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends. Raises InvalidParameter for a value outside its range."""

    temperature: float = option(0.0, "0 is greedy", least=0)
    top_k: int = option(0, "keep the k likeliest tokens; 0 keeps all", least=0, most=HIGHEST)
    top_p: float = option(
        1.0, "keep the smallest set of tokens with at least this mass", above=0, most=1
    )
    min_p: float = option(
        0.0, "drop tokens below this fraction of the likeliest one's probability", least=0, below=1
    )
    seed: int = option(
        0,
        "the same seed gives the same text, with any drafter that draws none of its drafts",
        least=0,
        most=HIGHEST,
    )
    max_new_tokens: int = option(256, "the text ends after this many tokens", least=1, most=HIGHEST)
    stop: tuple[str, ...] = option(
        (), "the text ends before this string; may be given several times"
    )
    ignore_eos: bool = option(False, "go on after an end-of-text token")
    repetition_penalty: float = option(
        1.0,
        "divide positive logits of tokens in prompt and text, multiply negative ones",
        least=0.01,
        most=100,
    )
    presence_penalty: float = option(
        0.0, "subtract this from the logits of tokens in the text; -2 to 2", least=-2, most=2
    )
    frequency_penalty: float = option(
        0.0,
        "subtract this once for every time that a token is in the text; -2 to 2",
        least=-2,
        most=2,
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, hash=False
    )  # by token id, added to its logit
    logits_processor: LogitsProcessor | None = field(default=None, hash=False)
    logprobs: bool = False  # log-probabilities of the tokens, by the target's law before any of these fields changed it

    def __post_init__(self) -> None:
        if isinstance(self.stop, Sequence):
            object.__setattr__(
                self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
            )
        strings = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        require(strings, "stop", self.stop, "non-empty strings")
        check_options(self)

        if isinstance(self.logit_bias, Mapping):
            plain = {as_number(token): as_number(bias) for token, bias in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", plain)
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else [(None, None)]
        numbers = all(
            type(t) is int and t >= 0 and isinstance(b, (int, float)) and -100 <= b <= 100
            for t, b in pairs
        )
        require(numbers, "logit_bias", self.logit_bias, "numbers from -100 to 100 by token id")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

        hook = self.logits_processor
        require(
            hook is None or callable(hook),
            "logits_processor",
            hook,
            "a function of tokens and logits",
        )

    def numbered(self, number: int) -> SamplingParams:
        """The same for prompt number `number`: seeds count on."""
        return replace(self, seed=counted_on(self.seed, number))

    @property
    def adjusts(self) -> bool:
        """Whether `sampling.adjusted` changes logits."""
        penalties = self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty
        return any(penalties) or bool(self.logit_bias) or self.logits_processor is not None


@dataclass(frozen=True)
class Proposal:
    """What a drafter sends to the target: for every row a tree of tokens whose root is the anchor, parents before children."""

    tokens: Tensor  # [rows, nodes] int64; node 0 is the anchor
    parents: Tensor  # [rows, nodes] int64; -1 at the anchor, elsewhere a smaller index; a chain is -1, 0, 1, 2, ...
    sizes: Tensor  # [rows] int64, at least 1; nodes beyond a row's size are padding
    scores: Tensor | None = (
        None  # [rows, nodes] log-confidence, fixed before the node's own token was drawn
    )
    probs: Tensor | None = (
        None  # [rows, nodes, vocab] law from which node i's CHILDREN were drawn; None: none was drawn
    )
    drawn: Tensor | None = (
        None  # [rows, nodes] bool; False: chosen (argmax, top-k, n-gram), a point mass
    )

    @property
    def num_nodes(self) -> int:
        return int(self.tokens.shape[1])


@dataclass(frozen=True)
class Verdict:
    """What the target accepted: node indices from the anchor down, and the token that follows them."""

    path: Tensor  # [rows, 1 + depth] int64 node indices, anchor (0) first, -1 beyond the row's end
    num_accepted: Tensor  # [rows] drafted nodes on the path, the anchor not counted
    bonus: Tensor  # [rows] int64: the token after the last node of the path


@dataclass
class Rows:
    """The rows of one step, as a drafter may see them: their places in the caches and their histories."""

    slots: list[int]  # row index in every cache
    histories: list[list[int]]  # prompt and committed tokens; the last one is the anchor
    params: list[SamplingParams]
    num_prompts: list[int]  # how many tokens of each history are the prompt's

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def anchors(self) -> list[int]:
        return [history[-1] for history in self.histories]

    @property
    def positions(self) -> list[int]:
        """Absolute position of each anchor: the number of tokens that the target has read."""
        return [len(history) - 1 for history in self.histories]


class Drafter(Protocol):
    """Every decoding method: it proposes, observes what was committed, forgets a finished row; by default it keeps nothing."""

    name: str
    layers: tuple[
        int, ...
    ] = ()  # features it wants: id = output of block id; the number of layers = the final normed state
    caches: tuple[SlotCache, ...] = ()  # its own caches, counted in the memory report

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        """At most `max_nodes` nodes a row, the anchor included; the anchor alone where it has nothing to say."""

    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        """Tokens that the target has read for good (prompt chunks and accepted paths alike), oldest first.

        tokens: per row [n] int64, at the positions that follow the last ones observed.
        features: per row [n, len(layers) * hidden]; None if the drafter asked for no layers.
        """
        return

    def end(self, rows: Rows) -> None:
        """These rows are finished; their places will be used again."""
        return


@dataclass
class Stats:
    """What one request cost. Times are seconds of the whole step, shared by every row of its batch."""

    num_prompt_tokens: int = 0
    num_tokens: int = 0  # committed new tokens: exactly those in the result
    target_passes: int = 0  # after the prefill
    num_drafted: int = 0
    num_accepted: int = 0
    accepted_lengths: list[int] = field(
        default_factory=list
    )  # committed tokens of every target pass
    seconds: dict[str, float] = field(default_factory=dict)  # by part: prefill, draft, target, host

    @property
    def tau(self) -> float:
        """Tokens committed after the first one per target pass after the prefill; 1 for plain decoding."""
        return (self.num_tokens - 1) / self.target_passes if self.target_passes else 1.0

    @property
    def decode_seconds(self) -> float:
        return sum(self.seconds.values()) - self.seconds.get("prefill", 0.0)


@dataclass(frozen=True)
class Piece:
    """The text that one token completed; empty while a character or a possible stop string is unfinished."""

    text: str
    drafted: bool  # the drafter proposed the token; False: the target's own bonus token
    logprob: float | None = None  # of the token; None: not asked for


@dataclass(frozen=True)
class Chunk:
    """What one step added to one request; `result` comes with the last one."""

    index: int  # which prompt of the call
    pieces: tuple[Piece, ...]
    tokens: tuple[int, ...]
    result: Result | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Result:
    """A finished request."""

    text: str
    tokens: tuple[int, ...]  # new tokens, an end-of-text token included
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[float, ...] | None = (
        None  # of every token, natural logarithms; None: not asked for
    )

    def to_dict(self) -> dict[str, Any]:
        facts = {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "tau": self.stats.tau,
        }
        return facts if self.logprobs is None else facts | {"logprobs": list(self.logprobs)}
