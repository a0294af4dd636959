"""Sequential heads in decoding: from a block's states to what is drafted behind which token.

A head goes over a block from left to right along one path, the likeliest, or along several, of
which a tree is made. At every position it says what is likely behind each path's last token, and
carries along what it remembers of the path. Knows states, laws and the modules of models/heads.py
beside one target. Does not know where a block's rows lie, nor which nodes of a tree are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.errors import DraftMismatch
from flashdraft.methods.network import DraftHead, Likely, top
from flashdraft.models import native
from flashdraft.models.heads import (
    CandidateSelector,
    ConfidenceHead,
    GatedMarkovHead,
    MarkovHead,
    RecurrentMarkovHead,
    SwigluHead,
    swiglu,
)
from flashdraft.models.layers import Linear
from flashdraft.process import INTS

__all__ = [
    "BRANCHES",
    "Confidence",
    "Depth",
    "Domino",
    "GatedMarkov",
    "Markov",
    "RecurrentMarkov",
    "Selector",
    "SequentialHead",
    "Step",
    "Swiglu",
    "markov_of",
]

BRANCHES = 8  # tokens of a position that a tree may hold
_LIKELY = 64  # tokens among which a corrected state chooses
_PATHS = 3  # of a depth whose tokens a tree goes on from


class Step(NamedTuple):
    """What a head says of one position, behind each of m paths."""

    candidates: Tensor  # target ids that it was asked about: [rows, n], or [1, n] of all rows
    laws: Tensor  # [rows, m, n] their log-probabilities
    state: Tensor  # [rows, m, size] what it remembers of each path, its last token included


# A position's number in the block; the last tokens of the paths to it [rows, m] and what was
# remembered of them without these tokens [rows, m, size].
Walk = Callable[[int, Tensor, Tensor], Step]


class Depth(NamedTuple):
    """What is drafted at one position."""

    before: Tensor  # [rows, m] last tokens of the paths that were followed to it
    tokens: Tensor  # [rows, m, n] the likeliest tokens behind each of them, likeliest first
    scores: Tensor  # [rows, m, n] their log-probabilities


class SequentialHead:
    """One head beside one target. Subclasses say by `begin` how a block is gone over."""

    state_size = 0  # of what it remembers of a path
    nbytes = 0  # of its weights

    def __init__(self, beside: DraftHead) -> None:
        self.beside = beside

    @property
    def num_paths(self) -> int:
        """Of a depth whose tokens a tree goes on from."""
        return _PATHS

    def begin(self, hidden: Tensor) -> Walk:
        """What goes over blocks of these states [rows, positions, hidden]."""
        raise NotImplementedError

    def chain(self, hidden: Tensor, anchors: Tensor) -> Likely:
        """The likeliest token behind the likeliest, from the anchors [rows] on:
        [rows, positions, 1]."""
        depths = list(self.depths(hidden, anchors, 1))
        tokens = torch.cat([depth.tokens for depth in depths], dim=1)
        scores = torch.cat([depth.scores for depth in depths], dim=1)
        return Likely(tokens, scores)

    def depths(self, hidden: Tensor, anchors: Tensor, num_paths: int) -> Iterator[Depth]:
        """From left to right along the `num_paths` likeliest paths, one of which ends in a token;
        it brings along what is remembered of it."""
        walk = self.begin(hidden)
        num_best = 1 if num_paths == 1 else BRANCHES
        before = anchors[:, None].to(hidden.device)
        reached = hidden.new_zeros(1, 1, 1)  # log-probabilities of the paths [rows, paths, 1]
        state = hidden.new_zeros(len(hidden), 1, self.state_size)
        for k in range(hidden.shape[1]):
            candidates, laws, state = walk(k, before, state)
            best = top(laws, num_best)
            ids = candidates[:, None].expand_as(laws)
            tokens = ids.gather(-1, best.indices)
            yield Depth(before, tokens, best.values)

            if num_paths == 1:
                before = tokens[..., 0]
                continue
            ways = (reached + laws).amax(1)  # to each candidate by the likeliest path
            likeliest = top(ways, num_paths)
            if self.state_size:
                ends = likeliest.indices[:, None].expand(-1, laws.shape[1], -1)
                parents = (reached + laws.gather(-1, ends)).argmax(1)[..., None]
                state = state.gather(1, parents.expand(-1, -1, self.state_size))
            before = ids[:, 0].gather(-1, likeliest.indices)
            reached = likeliest.values[..., None]

    def _packed(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        linear = self.beside.packed(weight, bias)
        self.nbytes += linear.nbytes
        return linear

    def _table(self, rows: Tensor) -> Tensor:
        """Rows that are looked up, as they are."""
        table = rows.detach().to(self.beside.probe)
        self.nbytes += table.nbytes
        return table


# --- Heads that correct states


class Swiglu(SequentialHead):
    """Ours: it corrects the state, whose logits are asked for the likeliest tokens alone."""

    def __init__(self, beside: DraftHead, head: SwigluHead) -> None:
        super().__init__(beside)
        weights = [weight.detach().to(beside.probe) for weight in head.parameters()]
        self.linears = [self._packed(weight) for weight in weights]
        self.tables = self._chain_tables(weights)
        for table in dict.fromkeys(self.tables):  # the first two may be the same one
            self.nbytes += table.nbytes

    def _chain_tables(self, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What `native.chain` reads: the lm_head's rows and embeddings of every draft id, and the
        head's weights. Empty where the kernel cannot be used."""
        beside = self.beside
        if beside.vocabulary is None:
            return ()
        if not beside.plain or not native.usable(beside.probe):
            return ()

        rows = beside.head_rows(torch.arange(len(beside.vocabulary), **INTS))
        embedded = beside.embed(beside.vocabulary)
        if torch.equal(rows, embedded):
            embedded = rows
        return rows, embedded, *weights

    def begin(self, hidden: Tensor) -> Walk:
        drafts = self._likeliest(hidden)
        head_rows = self.beside.head_rows(drafts)
        return functools.partial(self._step, hidden, self.beside.ids(drafts), head_rows)

    def _step(
        self,
        hidden: Tensor,
        ids: Tensor,
        head_rows: Tensor,
        k: int,
        before: Tensor,
        state: Tensor,
    ) -> Step:
        own = hidden[:, k].repeat_interleave(before.shape[1], 0)
        embedded = self.beside.embed(before.flatten())
        states = swiglu(own, embedded, *self.linears).view(*before.shape, -1)
        logits = self.beside.transformed(states @ head_rows[:, k].mT)
        return Step(ids[:, k], logits.log_softmax(-1), state)

    def chain(self, hidden: Tensor, anchors: Tensor) -> Likely:
        if not self.tables:
            return super().chain(hidden, anchors)

        drafts = self._likeliest(hidden)
        embedded = self.beside.embed(anchors)
        laws = native.chain(hidden, embedded, self.tables, drafts)
        best = laws.max(-1, keepdim=True)
        return Likely(self.beside.ids(drafts.gather(-1, best.indices)), best.values)

    def _likeliest(self, hidden: Tensor) -> Tensor:
        """Draft ids [..., n] that the head is asked about: to ask it about all would cost a second
        lm_head."""
        return top(self.beside.logits(hidden), _LIKELY).indices


# --- Heads that correct logits


class Selector(SequentialHead):
    """DFlash 2's: it chooses among the likeliest tokens of each position by their logit and their
    pair score behind the token before. Trees go on from all of them."""

    def __init__(self, beside: DraftHead, head: CandidateSelector) -> None:
        super().__init__(beside)
        num_choices = beside.config.head_choices
        self.num_choices = min(num_choices, beside.num_drafts)
        self.projection = self._table(head.hidden_projection.weight)
        self.predecessors = self._table(beside.of_targets(head.predecessor_codebook))
        self.successors = self._table(beside.of_targets(head.successor_codebook))

    @property
    def num_paths(self) -> int:
        return self.num_choices

    def begin(self, hidden: Tensor) -> Walk:
        unary, drafts = top(_wide(self.beside.logits(hidden)), self.num_choices)
        ids = self.beside.ids(drafts)
        projected = F.linear(hidden, self.projection)
        factors = projected[:, :, None] * self.successors[ids]  # [rows, positions, n, rank]
        return functools.partial(self._step, ids, unary, factors)

    def _step(
        self, ids: Tensor, unary: Tensor, factors: Tensor, k: int, before: Tensor, state: Tensor
    ) -> Step:
        pairs = self.predecessors[before] @ factors[:, k].mT
        scores = unary[:, k, None] + pairs
        return Step(ids[:, k], scores.log_softmax(-1), state)


class Markov(SequentialHead):
    """DSpark's vanilla head: a bias over the whole draft vocabulary for the token before."""

    def __init__(self, beside: DraftHead, head: MarkovHead) -> None:
        super().__init__(beside)
        self.before = self._table(beside.of_targets(head.markov_w1.weight))
        self.behind = self._packed(beside.of_drafts(head.markov_w2.weight))

    def begin(self, hidden: Tensor) -> Walk:
        base = _wide(self.beside.logits(hidden))  # capped, if at all: the bias comes on top
        return functools.partial(self._step, hidden, base)

    def _step(self, hidden: Tensor, base: Tensor, k: int, before: Tensor, state: Tensor) -> Step:
        own = hidden[:, k, None].expand(-1, before.shape[1], -1)
        code, state = self._code(self.before[before], own, state)
        bias = _through(self.behind, code)
        logits = base[:, k, None] + bias
        return Step(self.beside.all_ids[None], logits.log_softmax(-1), state)

    def _code(self, embedded: Tensor, own: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What the second table is multiplied by, and the next state. All [rows, m, ...]: W1 of
        the tokens before, the position's own states, and what is remembered."""
        return embedded, state


class GatedMarkov(Markov):
    def __init__(self, beside: DraftHead, head: GatedMarkovHead) -> None:
        super().__init__(beside, head)
        self.gate = self._packed(head.gate_proj.weight, head.gate_proj.bias)

    def _code(self, embedded: Tensor, own: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        gate = _through(self.gate, torch.cat((own, embedded), dim=-1)).sigmoid()
        return gate * embedded, state


class RecurrentMarkov(Markov):
    """With a state of the path's tokens."""

    def __init__(self, beside: DraftHead, head: RecurrentMarkovHead) -> None:
        super().__init__(beside, head)
        self.joint = self._packed(head.joint_proj.weight, head.joint_proj.bias)
        self.state_size = beside.config.head_rank

    def _code(self, embedded: Tensor, own: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat((state, embedded, own), dim=-1)
        gate, candidate, output = _through(self.joint, joined).chunk(3, dim=-1)
        kept = gate.sigmoid()
        state = kept * state + (1 - kept) * candidate.tanh()
        return output.tanh(), state


def markov_of(beside: DraftHead, head: MarkovHead) -> Markov:
    """The kind that the module is of."""
    if isinstance(head, GatedMarkovHead):
        return GatedMarkov(beside, head)
    if isinstance(head, RecurrentMarkovHead):
        return RecurrentMarkov(beside, head)
    return Markov(beside, head)


class Domino(SequentialHead):
    """A GRU reads the path's tokens, from the anchor on, and corrects the logits of all positions
    but the first."""

    def __init__(self, beside: DraftHead, gru: nn.GRU, projection: nn.Sequential) -> None:
        super().__init__(beside)
        inputs, states = gru.parameters()  # it has no biases
        inner, outer = projection.parameters()
        self.inputs = self._packed(inputs)
        self.states = self._packed(states)
        self.inner = self._packed(inner)
        outer_rows = beside.of_targets(outer)
        self.outer = self._packed(outer_rows[beside.all_ids.to(outer_rows.device)])
        self.state_size = gru.hidden_size

    def begin(self, hidden: Tensor) -> Walk:
        base = _wide(self.beside.logits(hidden))
        return functools.partial(self._step, hidden, base)

    def _step(self, hidden: Tensor, base: Tensor, k: int, before: Tensor, state: Tensor) -> Step:
        logits = base[:, k, None].expand(-1, before.shape[1], -1)
        state = self._read(before, state)
        if k > 0:
            own = hidden[:, k, None].expand(-1, before.shape[1], -1)
            inner = _through(self.inner, torch.cat((own, state), dim=-1))
            logits = logits + _through(self.outer, F.silu(inner))
        return Step(self.beside.all_ids[None], logits.log_softmax(-1), state)

    def _read(self, tokens: Tensor, state: Tensor) -> Tensor:
        """The GRU's next state; its thirds are reset, update and new (torch.nn.GRU)."""
        embedded = self.beside.target.embedding_rows(tokens).to(state)
        reset_in, update_in, new_in = _through(self.inputs, embedded).chunk(3, dim=-1)
        reset_by, update_by, new_by = _through(self.states, state).chunk(3, dim=-1)
        reset = (reset_in + reset_by).sigmoid()
        update = (update_in + update_by).sigmoid()
        new = (new_in + reset * new_by).tanh()
        return (1 - update) * new + update * state


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least, so that what is added to them counts."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _through(linear: Linear, x: Tensor) -> Tensor:
    """A linear, which takes [n, in] -> [n, out], on [..., in]."""
    out = linear(x.reshape(-1, x.shape[-1]))
    return out.view(*x.shape[:-1], -1)


# --- How likely drafts are accepted


class Confidence:
    """DSpark's confidence head: what the controller and the trees are told of a position's tokens.

    The likeliest one has the chance that the head gives; the others share what it leaves, in
    proportion to their law, none of them more than the first.
    """

    def __init__(
        self, beside: DraftHead, head: ConfidenceHead, sequential: SequentialHead | None
    ) -> None:
        probe = _wide(beside.probe)
        self.weight = head.proj.weight.detach()[0].to(probe)
        self.bias = head.proj.bias.detach()[0].to(probe)
        self.before: Tensor | None = None  # W1 of the token before, where it is read
        if beside.config.confidence_with_markov:
            if not isinstance(sequential, Markov):
                got = "its confidence head reads the table of a markov head, which it has not"
                raise DraftMismatch(got, hint="its config.json is damaged; fetch it again")
            self.before = sequential.before

    def reweighed(self, scores: Tensor, hidden: Tensor, before: Tensor | None) -> Tensor:
        """scores [..., n]: log-probabilities, likeliest first; hidden [..., hidden]: the position's
        state; before [...]: the tokens before, where positions see each other."""
        read = hidden
        if self.before is not None:
            assert before is not None
            read = torch.cat((hidden, self.before[before.to(hidden.device)]), dim=-1)
        logit = read.to(self.weight) @ self.weight + self.bias
        first = F.logsigmoid(logit)[..., None]
        left = F.logsigmoid(-logit)[..., None]

        others = scores[..., 1:]
        tiny = torch.finfo(scores.dtype).tiny
        left_by_law = (-scores[..., :1].expm1()).clamp(min=tiny).log()
        shared = (left + others - left_by_law).clamp(max=0.0)
        return torch.cat((first, torch.minimum(shared, first)), dim=-1)
