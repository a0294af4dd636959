"""Logits become laws, laws become tokens: the only place where either happens.

Knows logits, sampling parameters and uniforms. Does not know models, trees or drafters. Randomness
is explicit and counter-based: a uniform is a function of (seed, absolute position, lane), so a
position's draw is the same whatever was drafted, however it was batched. Lane 0 draws the target's
tokens, lane 1 + i is the acceptance coin of node i, negative lanes are for a drafter's own draws.
Every result row depends on its own input row alone, bit for bit: sums are taken in integers, where
order cannot matter.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import overload

import numpy as np
import torch
from torch import Tensor

from flashdraft.errors import InvalidParameter, UnusableLogits
from flashdraft.process import BOOLS, FLOATS, INTS
from flashdraft.types import SamplingParams, Steered, Steering

__all__ = [
    "Context",
    "Counts",
    "adjusted",
    "coins",
    "draw",
    "likeliest",
    "logprob",
    "precision",
    "probabilities",
    "target_probs",
    "top_logprobs",
    "total",
    "uniforms",
]

_ONE = 2.0**62  # probability 1 in fixed point: room for a sum of nearly 2 below 2**63
_NO_LAW = "a law without mass: the logits are NaN, +inf, or all -inf"
_HEADS = (64, 1024)  # so many likeliest tokens are searched for a top-p set before all are sorted


class Counts:
    """How often each token stands in one row's prompt and text, each token counted once."""

    def __init__(self, vocab_size: int, num_prompt: int) -> None:
        self.num_prompt = num_prompt
        self.num_counted = 0
        self.known = torch.zeros(vocab_size, **BOOLS)  # in the prompt or the text
        self.in_text = torch.zeros(vocab_size, **FLOATS)  # how often, the prompt left out

    def add(self, tokens: Sequence[int]) -> None:
        """The tokens that follow those counted so far."""
        self.known[list(tokens)] = True
        first = max(self.num_prompt - self.num_counted, 0)
        text = torch.tensor(tokens[first:], **INTS)
        self.in_text.index_add_(0, text, torch.ones(len(text), **FLOATS))
        self.num_counted += len(tokens)

    def copy(self) -> "Counts":
        other = Counts(0, self.num_prompt)
        other.num_counted = self.num_counted
        other.known = self.known.clone()
        other.in_text = self.in_text.clone()
        return other


class Context(Sequence[int]):
    """A row's tokens up to a node: the committed ones, then the draft's.

    What is committed is counted once, not again for each node.
    history: the row's own list; what `counts` has counted of it comes first, then `path`.
    """

    def __init__(self, history: list[int], counts: Counts, path: tuple[int, ...] = ()) -> None:
        self.history = history
        self.committed = counts
        self.path = path
        self.num_committed = counts.num_counted

    def __len__(self) -> int:
        return self.num_committed + len(self.path)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        return list(self)[index]

    def __iter__(self) -> Iterator[int]:
        return chain(islice(self.history, self.num_committed), self.path)

    def then(self, token: int) -> "Context":
        return Context(self.history, self.committed, (*self.path, token))

    def counts(self) -> Counts:
        whole = self.committed.copy()
        whole.add(self.path)
        return whole


def _counts_of(history: Sequence[int], num_prompt: int, vocab_size: int) -> Counts:
    if isinstance(history, Context) and history.committed.num_prompt == num_prompt:
        return history.counts()
    counts = Counts(vocab_size, num_prompt)
    counts.add(history)
    return counts


@torch.no_grad()  # a hook may be a network
def adjusted(
    logits: Tensor,
    params: SamplingParams,
    history: Sequence[int],
    num_prompt: int,
    steering: Steering | None = None,
) -> Tensor:
    """The logits after `history` as the request's parameters change them: [vocab] -> [vocab].

    The first `num_prompt` tokens of `history` are the prompt. `probabilities` of the result is the
    law.
    steering: the hook's state behind `history`, where it keeps states; without it such a hook
    changes nothing (a drafter may do with that; the target's own law has it).
    Bias first, then repetition, frequency and presence penalty, then the hook: the order of
    transformers and, but for the hook, of vLLM. The hook is last, so that nothing changes what it
    returns. The very same tensor comes back where `params` changes nothing, otherwise a new one.
    Raises InvalidParameter for a hook's result that gives no law over the vocabulary.
    """
    if not params.adjusts:
        return logits

    logits = logits.to(precision(logits), copy=True)
    if params.logit_bias:
        _bias(logits, params.logit_bias)

    penalises_text = params.frequency_penalty != 0 or params.presence_penalty != 0
    if penalises_text or params.repetition_penalty != 1:
        counts = _counts_of(history, num_prompt, len(logits))
        _penalise(logits, params, counts)

    hook = params.logits_processor
    if isinstance(hook, Steered):
        if steering is not None:
            logits = _checked(steering.masked, logits, len(history))
    elif hook is not None:
        logits = _checked(partial(hook, list(history)), logits, len(history))
    return logits


def _bias(logits: Tensor, bias: Mapping[int, float]) -> None:
    """In place."""
    tokens = torch.tensor(list(bias), dtype=torch.int64, device=logits.device)
    added = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    logits[tokens] += added


def _penalise(logits: Tensor, params: SamplingParams, counts: Counts) -> None:
    """In place. Repetition, then frequency and presence."""
    penalty = params.repetition_penalty
    if penalty != 1:
        known = counts.known.to(logits.device)
        changed = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits.copy_(torch.where(known, changed, logits))

    if params.frequency_penalty != 0 or params.presence_penalty != 0:
        in_text = counts.in_text.to(logits)
        taken = params.frequency_penalty * in_text + params.presence_penalty
        logits.copy_(torch.where(in_text > 0, logits - taken, logits))


def _checked(change: Callable[[Tensor], Tensor], logits: Tensor, num_tokens: int) -> Tensor:
    """What the user's hook makes of the logits. Raises InvalidParameter where that is no law."""
    if not bool(logits.amax().isfinite()):
        raise UnusableLogits(_NO_LAW)  # which is not the hook's doing

    changed = change(logits)
    is_law = (
        isinstance(changed, Tensor)
        and changed.shape == logits.shape
        and bool(changed.amax().isfinite())
    )
    if not is_law:
        got = f"logits_processor returned no law after {num_tokens} tokens"
        wanted = f"return logits [{len(logits)}] without NaN or +inf, and not -inf for every token"
        raise InvalidParameter(got, hint=wanted)
    return changed.to(logits)


def logprob(logits: Tensor, token: int) -> float:
    """The natural logarithm of a token's probability by the model's own logits [vocab].

    One token at a time, so that company changes no bit.
    """
    return float(logits.to(precision(logits)).log_softmax(-1)[token])


def top_logprobs(logits: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens by the model's own logits [vocab], and their logprobs."""
    if count == 0:
        return ()
    laws = logits.to(precision(logits)).log_softmax(-1)
    best = laws.topk(min(count, len(laws)))
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The law that `params` makes of `logits`: [..., vocab] -> the same shape.

    In float32; in float64 for float64 logits.

    Temperature first, then top-k, top-p within what top-k left, and min-p, in the order of
    transformers (vLLM takes min-p first, which changes only the mass that top-p sees). Cuts are by
    value: tokens tied with the last one kept are kept. Temperature 0 is a point mass at the
    likeliest token, the lowest id among equals, whatever the cuts. Logits may be -inf (a mask), not
    +inf or NaN: those make a row of NaN, which `draw` refuses.
    """
    dtype = precision(logits)
    if params.temperature == 0:
        return _point_mass(logits, dtype)

    logits = logits.to(dtype)
    # The maximum goes first and the divisor stays normal, so that no temperature, however small,
    # makes 0 / 0 or inf - inf.
    divisor = max(params.temperature, torch.finfo(torch.float32).tiny)
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(divisor)
    if 0 < params.top_k < scaled.shape[-1]:
        last_kept = scaled.topk(params.top_k).values[..., -1:]
        scaled.masked_fill_(scaled < last_kept, -math.inf)
    if params.top_p < 1:
        law = scaled.softmax(-1)
        scaled.masked_fill_(law < _nucleus_floor(law, params.top_p), -math.inf)
    if params.min_p > 0:
        floor = math.log(params.min_p)  # the likeliest token stands at 0
        scaled.masked_fill_(scaled < floor, -math.inf)
    return scaled.softmax(-1)


def _point_mass(logits: Tensor, dtype: torch.dtype) -> Tensor:
    best = logits.max(-1, keepdim=True)
    one = (best.values * 0 + 1).to(dtype)  # NaN where the best logit is not finite
    law = torch.zeros(logits.shape, dtype=dtype, device=logits.device)
    return law.scatter_(-1, best.indices, one)


def target_probs(logits: Tensor, params: Sequence[SamplingParams], sizes: Tensor) -> Tensor:
    """The law after every node [rows, nodes, vocab], each row by its own `params`.

    Zeros at padding, beyond `sizes` [rows].
    """
    is_one_whole_row = len(params) == 1 and sizes.tolist() == [logits.shape[1]]
    if is_one_whole_row:  # no second copy in the case where every millisecond is seen
        return probabilities(logits, params[0])

    laws = torch.zeros(logits.shape, dtype=precision(logits), device=logits.device)
    for row, (own, size) in enumerate(zip(params, sizes.tolist(), strict=True)):
        laws[row, :size] = probabilities(logits[row, :size], own)
    return laws


def likeliest(logits: Tensor) -> Tensor:
    """The law of temperature 0 as tokens: [..., vocab] -> [...] int64.

    Refuses what `draw` refuses.
    """
    has_numpy_kind = logits.dtype in (torch.float32, torch.float64)
    if logits.device.type == "cpu" and has_numpy_kind:
        # numpy's argmax is 8 times faster, and calls no team of threads
        numbers = logits.numpy()
        places = numbers.argmax(-1)
        largest = np.take_along_axis(numbers, places[..., None], -1)
        best = torch.from_numpy(places)
        usable = bool(np.isfinite(largest).all())
    else:
        best = logits.argmax(-1)
        usable = bool(logits.gather(-1, best[..., None]).isfinite().all())
    if not usable:
        raise UnusableLogits(_NO_LAW)
    return best


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the law: the first token whose cumulative mass exceeds `uniform * total mass`.

    It is never one of zero mass; less than 2**-62 counts as zero.
    probs: [rows, vocab], not negative, of any positive mass up to about 1.
    uniforms: [rows] float64 in [0, 1).
    Returns [rows] int64. Raises UnusableLogits for a row without mass (NaN logits end here).
    """
    cumulative = _fixed(probs).cumsum(-1)
    mass = cumulative[:, -1:]
    if not bool((mass > 0).all()):
        raise UnusableLogits(_NO_LAW)
    # below the mass: (1 - 2**-53) x rounds to less than x
    level = (uniforms[:, None] * mass.double()).long()
    return torch.searchsorted(cumulative, level, right=True)[:, 0]


def total(weights: Tensor) -> Tensor:
    """The mass of each row, the same whatever other rows are there.

    weights: [..., vocab] -> [..., 1], same dtype.
    """
    return (_fixed(weights).sum(-1, keepdim=True).double() / _ONE).to(weights.dtype)


def uniforms(seeds: Sequence[int], starts: Sequence[int], count: int, lane: int = 0) -> Tensor:
    """Numbers in [0, 1) of 53 random bits: [rows, count] float64.

    The one at [r, i] is a function of (seeds[r], starts[r] + i, lane) only, by splitmix64 (Steele,
    Lea and Flood, OOPSLA 2014): output `position` of the generator whose state hashes seed and
    lane.
    """
    positions = _column(starts) + torch.arange(count, **INTS)
    return _hash(_column(seeds), torch.tensor(lane, **INTS), positions)


def coins(seeds: Sequence[int], anchors: Sequence[int], num_nodes: int) -> Tensor:
    """The acceptance coins of drawn nodes: [rows, nodes] float64.

    The one at [r, i] is the uniform of (seeds[r], anchors[r], lane 1 + i).

    anchors: the anchors' absolute positions. They only grow, so no coin is tossed twice; keyed by
    the position of the anchor plus the node's index, a coin that rejected a sibling could come back
    in the next step.
    """
    lanes = torch.arange(1, num_nodes + 1, **INTS)
    return _hash(_column(seeds), lanes, _column(anchors))


def precision(logits: Tensor) -> torch.dtype:
    """In which laws are computed: float64 for float64 logits, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _nucleus_floor(law: Tensor, top_p: float) -> Tensor:
    """The smallest probability inside the top-p set of each row. law: [..., vocab] -> [..., 1]."""
    flat = law.reshape(-1, law.shape[-1])
    vocab_size = flat.shape[1]
    whole = _fixed(flat).sum(-1, keepdim=True)
    wanted = (whole.double() * top_p).long().minimum(whole)
    floor = torch.empty_like(flat[:, :1])
    rows = torch.arange(len(flat), dtype=torch.int64, device=law.device)  # still without a floor
    for head in (*_HEADS, vocab_size):
        largest = flat[rows].topk(min(head, vocab_size)).values
        mass_so_far = _fixed(largest).cumsum(-1)
        last = (mass_so_far < wanted[rows]).sum(-1, keepdim=True)
        found = last[:, 0] < largest.shape[1]
        floor[rows[found]] = largest[found].gather(1, last[found])
        rows = rows[~found]
    return floor.reshape(*law.shape[:-1], 1)


def _fixed(probs: Tensor) -> Tensor:
    """Probabilities as integers.

    Adding them is exact, so that no batch, thread or device changes a sum.
    """
    return (probs * _ONE).long()


def _column(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, **INTS).reshape(-1, 1)


def _hash(seed: Tensor, lane: Tensor, position: Tensor) -> Tensor:
    """53 bits of (seed, lane, position), which broadcast, as a number in [0, 1). int64 wraps."""
    state = _step(seed * 0, seed)
    state = _step(state, lane)
    bits = (_step(state, position) >> 11) & (2**53 - 1)
    return bits.double() * 2.0**-53


def _step(state: Tensor, word: Tensor) -> Tensor:
    """Output number `word` of splitmix64 started at `state`; the masks make the shifts logical."""
    z = state + (word + 1) * (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ ((z >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return z ^ ((z >> 31) & (2**33 - 1))
