"""The nouns. Read this first.

A *target* is the large model whose distribution must be kept; a *drafter* proposes tokens. The
*anchor* is the last committed token, which the target has not read yet: node 0 of every *proposal*.
The target reads the whole proposal in one pass and the *verdict* says which path of it was accepted
and which *bonus* token follows. A *row* is one sequence of a batch. *tau* is the number of
committed tokens per target pass.
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
    NamedTuple,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from flashdraft.errors import InvalidParameter

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
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
    "Result",
    "Rows",
    "SamplingParams",
    "Stats",
    "Steered",
    "Steering",
    "TokenLogprob",
    "Verdict",
    "as_number",
    "check_option",
    "check_options",
    "counted_on",
    "kind_of",
    "option",
    "require",
    "take_numbers",
]

FinishReason = Literal["stop", "length", "abort"]  # abort: ended from outside


@dataclass(frozen=True)
class Allowed:
    """Which values an option takes: numbers of a range, or one of `choices`; all by default.

    A range never holds NaN or infinity.
    """

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

        if self.least is not None and number < self.least:
            return False
        if self.above is not None and number <= self.above:
            return False
        if self.most is not None and number > self.most:
            return False
        return self.below is None or number < self.below

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"

        most = "2**63 - 1" if self.most == HIGHEST else self.most
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {most}"
        if self.least is not None and self.below is None:
            return f"{self.least} or more"

        limits = {"at least": self.least, "above": self.above, "at most": most, "below": self.below}
        words = [f"{word} {limit}" for word, limit in limits.items() if limit is not None]
        return " and ".join(words) or "finite"


HIGHEST = 2**63 - 1  # the largest whole number that a tensor holds
SEEDS = Allowed(0, HIGHEST)
COUNTS = Allowed(1, 2**31 - 1)  # of what there is at least one of
_KINDS: dict[type, str] = {int: "an integer", float: "a number", bool: "True or False", str: "text"}


def option(
    default: object,
    text: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field that the command line shows as an option, with `text` as its help.

    The rest says which values are allowed; `check_options` reads it.
    """
    allowed = Allowed(least, most, above, below, tuple(choices))
    return field(default=default, metadata={"help": text, "allowed": allowed})


def as_number(value: Any) -> Any:
    """The Python number that a scalar of numpy or torch stands for; all else as it is.

    An array without dimensions is a scalar, too.
    """
    has_no_dimensions = getattr(value, "shape", None) == ()
    if has_no_dimensions and callable(getattr(value, "item", None)):
        return value.item()
    return value


def take_numbers(options: DataclassInstance) -> None:
    """Put Python's own numbers where a dataclass has numpy's or torch's.

    Also inside tuples and lists.
    """
    for f in fields(options):
        given = getattr(options, f.name)
        taken = as_number(given)
        if type(given) in (tuple, list):
            taken = type(given)(map(as_number, given))
        if taken is not given:
            object.__setattr__(options, f.name, taken)


def check_options(options: DataclassInstance) -> None:
    """Raises InvalidParameter for a field of another kind than its annotation says.

    Or for one whose value is not `Allowed`. Numbers of numpy and torch are taken as Python's first.
    None is right where the default is None.
    """
    take_numbers(options)
    kinds = _kinds_of(type(options))
    for f in fields(options):
        value = getattr(options, f.name)
        if value is None and f.default is None:
            continue
        kind, takes_several = kinds[f.name]
        several = value if takes_several and isinstance(value, tuple) else (value,)
        for one in several:
            check_option(f.name.rstrip("_"), one, kind, f.metadata.get("allowed"))


def check_option(name: str, value: Any, kind: type | None, allowed: Allowed | None = None) -> None:
    """Raises InvalidParameter where a value is none of that kind (None: any), or not allowed."""
    range_of = "" if allowed is None or allowed == Allowed() else str(allowed)
    if kind in _KINDS:
        words = _KINDS[kind]
        wanted = range_of or words
        if range_of and kind in (int, float):
            wanted = f"{words}, {range_of}"
        require(_is_of_kind(value, kind), name, value, wanted)

    if kind in (int, float):
        is_in_range = (allowed or Allowed()).holds(value)
        require(is_in_range, name, value, range_of or "finite")
    elif allowed is not None and allowed.choices:
        require(value in allowed.choices, name, value, range_of)


def _is_of_kind(value: object, kind: type) -> bool:
    """Whole numbers count as floats; True and False are no numbers."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)


def kind_of(hint: object) -> type | None:
    """int, float, bool or str, if an annotation asks for one of these; else None.

    For several of them in a tuple or a list, and for one or None, it is the same.
    """
    origin = get_origin(hint)
    if origin in (tuple, list):
        return kind_of(get_args(hint)[0])
    if origin in (Union, UnionType):
        parts = [part for part in get_args(hint) if part is not type(None)]
        return kind_of(parts[0]) if len(parts) == 1 else None
    return hint if hint in _KINDS else None


class _Kind(NamedTuple):
    """What an annotation asks for."""

    kind: type | None  # see `kind_of`
    takes_several: bool  # a tuple of them


@cache
def _kinds_of(options: type) -> dict[str, _Kind]:
    kinds = {}
    for name, hint in get_type_hints(options).items():
        kinds[name] = _Kind(kind_of(hint), get_origin(hint) is tuple)
    return kinds


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raises InvalidParameter where a value is not `ok`."""
    if not ok:
        got = f"{name} is {_shown(value)}"
        raise InvalidParameter(got, hint=f"{name} must be {allowed}", option=name)


def _shown(value: object) -> str:
    """A value's repr, of a few words at most."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def counted_on(seed: int, number: int) -> int:
    """The seed of number `number` of a row that begins with `seed`.

    Behind the largest seed comes 0.
    """
    return (seed + number) % (HIGHEST + 1)


class LogitsProcessor(Protocol):
    """The hook that masks or changes the logits of a node, as a grammar does.

    A function of its arguments and nothing else.
    """

    def __call__(self, tokens: Sequence[int], logits: Tensor, /) -> Tensor:
        """Logits [vocab] after prompt, text and draft up to the node.

        -inf forbids, one token must stay. Both arguments may be changed.
        """


class Steering(Protocol):
    """What a hook of the other form keeps of one text: a state that never changes.

    Every node of a tree has its own, made from its parent's. It is a function of the tokens so far
    and nothing else.
    """

    def then(self, token: int, /) -> Steering:
        """The state behind one token more; this one stays as it is, for the token's siblings.

        It may be asked for the same token again, and should then give the same object. It does not
        raise: what is wrong shows in `masked`.
        """

    def masked(self, logits: Tensor, /) -> Tensor:
        """Logits [vocab] as this state changes them; -inf forbids. The argument may be changed.

        Raises InvalidParameter where the hook cannot go on.
        """

    def allows(self, token: int, /) -> bool:
        """False only where the token is forbidden. For drafts, and quicker than `masked`."""

    def forced(self) -> Sequence[int]:
        """The tokens that follow for certain: each is the only one that is allowed. Often none."""


@runtime_checkable
class Steered(Protocol):
    """The hook with a memory, as of a grammar: it reads every token once, not again at each node.

    It is asked about drafts that are then rejected, and about a node only where its own law behind
    the parent allows it.
    """

    def begin(self, ends: frozenset[int], /) -> Steering:
        """The state behind a prompt. ends: the tokens that end a text of this model."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    Raises InvalidParameter for a value outside its range.
    """

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
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # by token id
    logits_processor: LogitsProcessor | Steered | None = field(default=None, hash=False)
    logprobs: bool = False  # of the tokens, by the target's law before these fields changed it
    top_logprobs: int = 0  # of so many of the likeliest tokens, too
    prompt_logprobs: bool = False  # the same of the prompt's tokens

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, Sequence):
            object.__setattr__(self, "stop", tuple(self.stop))
        are_strings = isinstance(self.stop, tuple) and all(
            isinstance(one, str) and one for one in self.stop
        )
        require(are_strings, "stop", self.stop, "non-empty strings")
        check_options(self)

        bias = self.logit_bias
        if isinstance(bias, Mapping):
            bias = {as_number(token): as_number(added) for token, added in bias.items()}
        require(_is_bias(bias), "logit_bias", bias, "numbers from -100 to 100 by token id")
        object.__setattr__(self, "logit_bias", bias)

        require(0 <= self.top_logprobs <= 100, "top_logprobs", self.top_logprobs, "from 0 to 100")
        hook = self.logits_processor
        is_usable = hook is None or callable(hook) or isinstance(hook, Steered)
        allowed = "a function of tokens and logits, or a Grammar"
        require(is_usable, "logits_processor", hook, allowed)

    def numbered(self, number: int) -> SamplingParams:
        """The same for prompt number `number`: seeds count on."""
        return replace(self, seed=counted_on(self.seed, number))

    @property
    def adjusts(self) -> bool:
        """Whether `sampling.adjusted` changes logits."""
        penalises = (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )
        return penalises or bool(self.logit_bias) or self.logits_processor is not None


def _is_bias(given: object) -> bool:
    if not isinstance(given, Mapping):
        return False
    for token, added in given.items():
        is_token = type(token) is int and token >= 0
        is_in_range = isinstance(added, (int, float)) and -100 <= added <= 100
        if not is_token or not is_in_range:
            return False
    return True


@dataclass(frozen=True)
class Proposal:
    """What a drafter sends to the target: for every row a tree of tokens, rooted at the anchor.

    Parents come before their children.
    """

    tokens: Tensor  # [rows, nodes] int64; node 0 is the anchor
    parents: Tensor  # [rows, nodes] int64; -1 at the anchor, elsewhere a smaller index
    sizes: Tensor  # [rows] int64, at least 1; nodes beyond a row's size are padding
    # [rows, nodes] log-confidence, fixed before the node's own token was drawn
    scores: Tensor | None = None
    # [rows, nodes, vocab] law from which node i's CHILDREN were drawn; None: none was drawn
    probs: Tensor | None = None
    # [rows, nodes] bool; False: chosen (argmax, top-k, n-gram), a point mass
    drawn: Tensor | None = None

    @property
    def num_nodes(self) -> int:
        return int(self.tokens.shape[1])


@dataclass(frozen=True)
class Verdict:
    """What the target accepted, from the anchor down, and the token that follows."""

    path: Tensor  # [rows, 1 + depth] int64 node indices, anchor (0) first, -1 beyond the row's end
    num_accepted: Tensor  # [rows] drafted nodes on the path, the anchor not counted
    bonus: Tensor  # [rows] int64: the token after the last node of the path


@dataclass
class Rows:
    """The rows of one step, as a drafter may see them."""

    slots: list[int]  # row index in every cache
    histories: list[list[int]]  # prompt and committed tokens; the last one is the anchor
    params: list[SamplingParams]
    num_prompts: list[int]  # how many tokens of each history are the prompt's
    # Behind each anchor, where a hook keeps states; no entries: none does, or nobody drafts.
    steering: Sequence[Steering | None] = ()

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
    """A decoding method: it proposes, observes what was committed, forgets finished rows.

    By default it keeps nothing.
    """

    name: str
    # features it wants: id = output of block id; the number of layers = the final normed state
    layers: tuple[int, ...] = ()
    caches: tuple[SlotCache, ...] = ()  # its own caches, counted in the memory report
    is_free: bool = False  # proposing takes next to no time: it has no network
    # One of its parts that is free, where others are not: steps whose time the whole would waste
    # read what that proposes.
    free_part: Drafter | None = None

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        """At most `max_nodes` nodes a row, the anchor included.

        The anchor alone where it has nothing to say.
        """

    def resume(self, source: int, slot: int, count: int) -> int:
        """A text begins in `slot` with the first `count` tokens that were observed in `source`.

        source: maybe `slot` itself; it stays as it is otherwise. The new text has one more token
        in common with the old one. Returns how many tokens `slot` holds now, at most `count`: what
        comes behind them will be observed anew. A drafter without this verb begins with none.
        """
        return 0

    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        """Tokens that the target has read for good, oldest first.

        Prompt chunks and accepted paths alike.

        tokens: per row [n] int64, at the positions that follow the last ones observed.
        features: per row [n, len(layers) * hidden]; None if the drafter asked for no layers.
        """
        return

    def end(self, rows: Rows) -> None:
        """These rows are finished; their places will be used again."""
        return


@dataclass
class Stats:
    """What one request cost. Times are of whole steps, shared by every row of the batch."""

    num_prompt_tokens: int = 0
    num_cached: int = 0  # tokens of the prompt that were taken over from another row
    num_tokens: int = 0  # committed new tokens: exactly those in the result
    target_passes: int = 0  # after the prefill
    num_drafted: int = 0
    num_accepted: int = 0
    accepted_lengths: list[int] = field(default_factory=list)  # tokens of every target pass
    seconds: dict[str, float] = field(default_factory=dict)  # by part: prefill, draft, target, host

    @property
    def tau(self) -> float:
        """Tokens committed after the first one per target pass after the prefill.

        1 for plain decoding.
        """
        return (self.num_tokens - 1) / self.target_passes if self.target_passes else 1.0

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @property
    def decode_seconds(self) -> float:
        return sum(self.seconds.values()) - self.seconds.get("prefill", 0.0)


class TokenLogprob(NamedTuple):
    """What the target's own law says of one token of a text: natural logarithms."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens instead of it, if asked for


@dataclass(frozen=True)
class Piece:
    """The text that one token completed.

    Empty while a character or a possible stop string is unfinished.
    """

    text: str
    drafted: bool  # the drafter proposed the token; False: the target's own bonus token
    logprob: float | None = None  # of the token; None: not asked for
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their logprobs, if asked for


@dataclass(frozen=True)
class Chunk:
    """What one step added to one request; `result` or `error` comes with the last one."""

    index: int  # which prompt of the call
    pieces: tuple[Piece, ...]
    tokens: tuple[int, ...]
    result: Result | None = None
    rejected: tuple[int, ...] = ()  # drafted tokens that the target did not accept
    error: Exception | None = None  # why the request ended without a result; others go on

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
    logprobs: tuple[float, ...] | None = None  # of every token, natural logarithms; None: not asked
    # Of every token of the prompt but the first, whose place holds None; None: not asked.
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def to_dict(self) -> dict[str, object]:
        facts: dict[str, object] = {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "tau": self.stats.tau,
        }
        if self.logprobs is not None:
            facts["logprobs"] = list(self.logprobs)
        return facts
