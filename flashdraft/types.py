"""The nouns. Read this first.

A *target* is the large model whose distribution must be kept; a *drafter* proposes tokens. The *anchor* is the last
committed token, which the target has not read yet: node 0 of every *proposal*. The target reads the whole proposal in
one pass and the *verdict* says which path of it was accepted and which *bonus* token follows. A *row* is one sequence
of a batch. *tau* is the number of committed tokens per target pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

from flashdraft.errors import InvalidParameter

if TYPE_CHECKING:
    from torch import Tensor

    from flashdraft.cache import SlotCache

__all__ = ["Chunk", "Drafter", "FinishReason", "LogitsProcessor", "Piece", "Proposal", "Result", "Rows"]
__all__ += ["SamplingParams", "Stats", "Verdict", "as_number", "check_options", "option", "require", "take_numbers"]

FinishReason = Literal["stop", "length"]


def option(default: Any, text: str, *, least: int | None = None, choices: Sequence[str] = ()) -> Any:
    """A dataclass field that the command line shows as an option, with `text` as its help; `check_options` reads the rest."""
    return field(default=default, metadata={"help": text, "least": least, "choices": choices})


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
    """Raises InvalidParameter for a field that is no integer from its `least` up, or none of its `choices`.

    Numbers of numpy and torch are taken as Python's first.
    """
    take_numbers(options)
    for f in fields(options):
        value, least, choices = getattr(options, f.name), f.metadata.get("least"), f.metadata.get("choices")
        for one in value if isinstance(value, tuple) else (value,) if value is not None or f.default is not None else ():
            require(least is None or (type(one) is int and one >= least), f.name, one, f"{least} or more")
            require(not choices or one in choices, f.name, one, f"one of {', '.join(choices or ())}")


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raises InvalidParameter where a value is not `ok`."""
    if not ok:
        raise InvalidParameter(f"{name} is {value!r}", hint=f"{name} must be {allowed}")


class LogitsProcessor(Protocol):
    """The hook that masks or changes the logits of a node, as a grammar does: a function of its arguments and nothing else."""

    def __call__(self, tokens: Sequence[int], logits: Tensor, /) -> Tensor:
        """Logits [vocab] after prompt, text and draft up to the node; -inf forbids, one token must stay. Both may be changed."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends. Raises InvalidParameter for a value outside its range."""

    temperature: float = option(0.0, "0 is greedy")
    top_k: int = option(0, "keep the k likeliest tokens; 0 keeps all", least=0)
    top_p: float = option(1.0, "keep the smallest set of tokens with at least this mass")
    min_p: float = option(0.0, "drop tokens below this fraction of the likeliest one's probability")
    seed: int = option(0, "the same seed gives the same text, with any drafter that draws none of its drafts")
    max_new_tokens: int = option(256, "the text ends after this many tokens", least=1)
    stop: tuple[str, ...] = option((), "the text ends before this string; may be given several times")
    ignore_eos: bool = option(False, "go on after an end-of-text token")
    repetition_penalty: float = option(1.0, "divide positive logits of tokens in prompt and text, multiply negative ones")
    presence_penalty: float = option(0.0, "subtract this from the logits of tokens in the text; -2 to 2")
    frequency_penalty: float = option(0.0, "subtract this once for every time that a token is in the text; -2 to 2")
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # by token id, added to its logit
    logits_processor: LogitsProcessor | None = field(default=None, hash=False)
    logprobs: bool = False  # log-probabilities of the tokens, by the target's law before any of these fields changed it

    def __post_init__(self) -> None:
        if isinstance(self.stop, Sequence):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        check_options(self)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            require(isinstance(getattr(self, name), (int, float)), name, getattr(self, name), "a number")
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.min_p < 1, "min_p", self.min_p, "at least 0 and below 1")
        require(type(self.seed) is int and 0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2**63 - 1")
        require(0.01 <= self.repetition_penalty <= 100, "repetition_penalty", self.repetition_penalty, "from 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "from -2 to 2")
        if isinstance(self.logit_bias, Mapping):
            plain = {as_number(token): as_number(bias) for token, bias in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", plain)
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else [(None, None)]
        numbers = all(type(t) is int and t >= 0 and isinstance(b, (int, float)) and -100 <= b <= 100 for t, b in pairs)
        require(numbers, "logit_bias", self.logit_bias, "numbers from -100 to 100 by token id")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        hook = self.logits_processor
        require(hook is None or callable(hook), "logits_processor", hook, "a function of tokens and logits")
        require(isinstance(self.logprobs, bool), "logprobs", self.logprobs, "True or False")
        strings = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        require(strings, "stop", self.stop, "non-empty strings")

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
    scores: Tensor | None = None  # [rows, nodes] log-confidence, fixed before the node's own token was drawn
    probs: Tensor | None = None  # [rows, nodes, vocab] law from which node i's CHILDREN were drawn; None: none was drawn
    drawn: Tensor | None = None  # [rows, nodes] bool; False: chosen (argmax, top-k, n-gram), a point mass

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
    layers: tuple[int, ...] = ()  # features it wants: id = output of block id; the number of layers = the final normed state
    caches: tuple[SlotCache, ...] = ()  # its own caches, counted in the memory report

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        """At most `max_nodes` nodes a row, the anchor included; the anchor alone where it has nothing to say."""

    def observe(self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None) -> None:
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
    accepted_lengths: list[int] = field(default_factory=list)  # committed tokens of every target pass
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
    logprobs: tuple[float, ...] | None = None  # of every token, natural logarithms; None: not asked for

    def to_dict(self) -> dict[str, Any]:
        facts = {"text": self.text, "tokens": list(self.tokens), "finish_reason": self.finish_reason, "tau": self.stats.tau}
        return facts if self.logprobs is None else facts | {"logprobs": list(self.logprobs)}
