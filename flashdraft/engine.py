"""The loop: propose, read, verify, commit. It knows no method; plain decoding is the drafter that proposes nothing.

The life of a request: (1) `admit` gives it a row and reads its prompt; (2) the drafter observes the prompt; (3) the
target's first token becomes the anchor. Then every `step`: (4) the drafter proposes a tree behind each anchor; (5) the
target reads all nodes in one pass; (6) `verify` says which path stands; (7) the cache keeps that path and the row commits
its tokens, up to an end-of-text token, a stop string or the token limit, at any offset of a block; (8) the drafter
observes what was committed, or forgets the row if it is finished.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flashdraft.decoding.control import Control
from flashdraft.decoding.sampling import (
    Context,
    Counts,
    adjusted,
    coins,
    draw,
    likeliest,
    logprob,
    precision,
    target_probs,
    uniforms,
)
from flashdraft.decoding.text import TextDecoder
from flashdraft.decoding.tree import alone
from flashdraft.decoding.tree import check as check_proposal
from flashdraft.decoding.verify import follow, verify
from flashdraft.errors import ContextLengthError, InvalidPrompt, UnusableLogits
from flashdraft.models.target import Target
from flashdraft.process import INTS, serial, undisturbed
from flashdraft.types import (
    Chunk,
    Drafter,
    FinishReason,
    Piece,
    Proposal,
    Result,
    Rows,
    SamplingParams,
    Stats,
    Verdict,
    require,
)

__all__ = ["Engine", "Request", "check"]


@dataclass
class Request:
    """What a user sent, as tokens, and what it has become so far."""

    prompt: list[int]
    params: SamplingParams
    decoder: TextDecoder
    eos: frozenset[int] = frozenset()
    index: int = 0  # the caller's number for it
    history: list[int] = field(
        default_factory=list
    )  # prompt and committed tokens; the last one is the anchor
    finish_reason: FinishReason | None = None
    stats: Stats = field(default_factory=Stats)
    logprobs: list[float] = field(
        default_factory=list
    )  # of the committed tokens, if params asks for them

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end the text."""
        return frozenset() if self.params.ignore_eos else self.eos

    @property
    def num_left(self) -> int:
        return self.params.max_new_tokens - (len(self.history) - len(self.prompt))

    def commit(
        self, tokens: Sequence[int], num_drafted: int, logits: Sequence[Tensor] = ()
    ) -> Chunk:
        """Take tokens until one ends the request; the first `num_drafted` were drafted. logits: [vocab] each, for logprobs."""
        pieces = []
        for i, token in enumerate(tokens):
            self.history.append(token)
            own = logprob(logits[i], token) if self.params.logprobs else None
            self.logprobs += [] if own is None else [own]
            if token in self.ends:
                self.finish_reason = "stop"
                text = self.decoder.end(token)
            else:
                text = self.decoder.push(token)
                if self.decoder.stopped:
                    self.finish_reason = "stop"
                elif self.num_left == 0:
                    self.finish_reason = "length"
                    text += self.decoder.flush()
            pieces.append(Piece(text, drafted=i < num_drafted, logprob=own))
            if self.finish_reason is not None:
                break
        self.stats.num_tokens += len(pieces)
        self.stats.num_accepted += sum(piece.drafted for piece in pieces)
        result = None
        if self.finish_reason is not None:
            new, logprobs = (
                tuple(self.history[len(self.prompt) :]),
                tuple(self.logprobs) if self.params.logprobs else None,
            )
            result = Result(self.decoder.text, new, self.finish_reason, self.stats, logprobs)
        return Chunk(self.index, tuple(pieces), tuple(tokens[: len(pieces)]), result)


class Engine:
    """Rows that are decoded together. `target` and `drafter` keep their own caches; a row has the same place in all of them."""

    def __init__(
        self, target: Target, drafter: Drafter, *, max_rows: int = 1, control: Control | None = None
    ) -> None:
        """control: says how many nodes are read; None: all of them."""
        self.target, self.drafter, self.max_rows, self.control = target, drafter, max_rows, control
        self._unseen: dict[
            int, list[tuple[Tensor, Tensor | None]]
        ] = {}  # by row: tokens, features that wait for the drafter
        self._counts: dict[int, Counts] = {}  # by row: of those with penalties
        self.running: dict[int, Request] = {}  # by row
        self._cache = target.new_cache(max_rows, 256)
        self._part: dict[str, float] = {}

    @property
    def num_free(self) -> int:
        return self.max_rows - len(self.running)

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values: the target's and the drafter's."""
        return self._cache.nbytes + sum(cache.nbytes for cache in self.drafter.caches)

    @undisturbed
    def admit(self, request: Request) -> Chunk:
        """Read the prompt and commit the first token. There must be a free row; a Request runs once."""
        check(self.target, request)
        assert self.num_free, "no free row"
        slot = next(i for i in range(self.max_rows) if i not in self.running)
        request.history = list(request.prompt)
        request.stats = Stats(num_prompt_tokens=len(request.prompt))
        self._part = {}
        self._cache.reserve(len(request.prompt) + 64, later=request.params.max_new_tokens)
        if self.control is not None and not self.running:
            self.control.begin()
        self.running[slot] = request
        try:
            first, logits = self._prefill(slot, request)
        except UnusableLogits:
            raise self._unusable([slot]) from None
        except BaseException:
            self._release([slot])  # what it has left in the caches would change the row's next text
            raise
        request.stats.seconds = dict(self._part)
        chunk = request.commit(first.tolist(), 0, [logits])
        if request.finish_reason is not None:
            self._release([slot])
        return chunk

    @undisturbed
    def step(self) -> list[Chunk]:
        """One target pass over every running row."""
        self._part = {}
        slots, requests = list(self.running), list(self.running.values())
        rows = self._rows(slots)
        limits = torch.tensor([request.num_left for request in requests], **INTS)
        drafted = self.control is None or self.control.wants_drafts(len(slots))
        with self._timed("draft"):
            proposal = alone(rows.anchors)
            if drafted:
                self._observe()
                proposal = _cut(self.drafter.propose(rows, int(limits.max())), limits)
                if self.control is not None:
                    proposal = _cut(proposal, self.control.trim(proposal))
            self._cache.reserve(max(self._cache.lengths) + proposal.num_nodes)
            check_proposal(proposal)  # a faulty drafter would change the law in silence
        with self._timed("target"):
            tree = proposal.tokens, proposal.parents, proposal.sizes
            logits, features = self.target.forward(self._cache, slots, *tree, self.drafter.layers)
        with self._timed("host"):
            try:
                verdict = self._judge(proposal, logits, rows)
            except UnusableLogits:
                likeliest_finite = logits.amax(-1).isfinite()
                bad = [
                    not all(own[:size])
                    for own, size in zip(
                        likeliest_finite.tolist(), proposal.sizes.tolist(), strict=True
                    )
                ]
                raise self._unusable(
                    [slot for slot, is_bad in zip(slots, bad, strict=True) if is_bad] or slots
                ) from None
            paths = [[node for node in path if node >= 0] for path in verdict.path.tolist()]
            for slot, path in zip(slots, paths, strict=True):
                self._cache.keep(slot, path)
            drafts, bonus = proposal.tokens.tolist(), verdict.bonus.tolist()
            texts = [
                [*map(own.__getitem__, path[1:]), last]
                for own, path, last in zip(drafts, paths, bonus, strict=True)
            ]
            read = [
                list(logits[i, path]) if requests[i].params.logprobs else []
                for i, path in enumerate(paths)
            ]
            chunks = [
                request.commit(text, len(text) - 1, own)
                for request, text, own in zip(requests, texts, read, strict=True)
            ]
        with self._timed("draft"):
            self._collect(slots, proposal, features, paths)
            if drafted:
                self._observe()
        if self.control is not None:
            self.control.learn(
                proposal, paths, self._part["draft"] if drafted else None, sum(self._part.values())
            )
        for i, request in enumerate(requests):
            _account(request.stats, int(proposal.sizes[i]) - 1, len(chunks[i].tokens), self._part)
        self._release([slot for slot in slots if self.running[slot].finish_reason is not None])
        return chunks

    def abort(self, index: int) -> None:
        """Forget the running request with this number, if there is one."""
        self._release([slot for slot, request in self.running.items() if request.index == index])

    def _unusable(self, slots: Sequence[int]) -> UnusableLogits:
        """Forget these rows, whose logits give no law, and what they have left in the caches; the error that says so."""
        read = max(len(self.running[slot].history) for slot in slots)
        for slot in slots:
            for cache in (self._cache, *self.drafter.caches):
                if slot < cache.rows:
                    cache.wipe(slot)
        self._release(list(slots))

        kernel = self.target.kernel
        hint = "its weights are damaged, or its config belongs to others: fetch the model again"
        if "float16" in kernel and "bfloat16" not in kernel:
            hint = "float16 is too narrow for many models: give --dtype bfloat16 or float32"
        got = f"the logits of `{self.target.name}` ({kernel}) are NaN, infinite, or all -inf after {read} tokens"
        return UnusableLogits(got, hint=hint)

    def _rows(self, slots: list[int]) -> Rows:
        own = [self.running[slot] for slot in slots]
        return Rows(
            slots, [r.history for r in own], [r.params for r in own], [len(r.prompt) for r in own]
        )

    def _prefill(self, slot: int, request: Request) -> tuple[Tensor, Tensor]:
        """Read the prompt, show it to the drafter and draw the token after it: [1], and the target's logits for it, [vocab]."""
        rows, params = self._rows([slot]), request.params
        with self._timed("prefill"):
            tokens = torch.tensor(request.prompt, **INTS)
            logits, features = self.target.prefill(self._cache, slot, tokens, self.drafter.layers)
            self.drafter.observe(rows, [tokens], None if features is None else [features])
            wanted = adjusted(logits, params, request.prompt, len(request.prompt))
            law = target_probs(wanted[None, None], [params], torch.ones(1, **INTS))[:, 0].cpu()
            return draw(law, uniforms([params.seed], [len(request.prompt)], 1)[:, 0]), logits

    @serial(lambda self: self._cache.blocked)  # the next step is our kernels'
    def _judge(self, proposal: Proposal, logits: Tensor, rows: Rows) -> Verdict:
        if any(params.adjusts for params in rows.params):
            logits = self._adjusted(proposal, logits, rows)
        any_drawn = proposal.drawn is not None and bool(proposal.drawn.any())
        if not any_drawn and all(params.temperature == 0 for params in rows.params):
            return follow(proposal, likeliest(logits))
        seeds = [params.seed for params in rows.params]
        law = target_probs(
            logits, rows.params, proposal.sizes
        ).cpu()  # where proposals and uniforms are
        draws = uniforms(seeds, [position + 1 for position in rows.positions], proposal.num_nodes)
        return verify(
            proposal,
            law,
            draws,
            coins(seeds, rows.positions, proposal.num_nodes) if any_drawn else None,
        )

    def _adjusted(self, proposal: Proposal, logits: Tensor, rows: Rows) -> Tensor:
        """`adjusted` at every node of the rows that ask for it, by the row's history and the node's own path.

        Nodes that no text can reach (behind a token without mass, or an end of text) keep their logits; no hook sees them.
        """
        wanted = logits.to(precision(logits), copy=True)
        for row in (row for row, params in enumerate(rows.params) if params.adjusts):
            tokens, parents = proposal.tokens[row].tolist(), proposal.parents[row].tolist()
            paths = {-1: self._context(rows, row)}
            ends = self.running[rows.slots[row]].ends
            for node in range(int(proposal.sizes[row])):
                above, token = parents[node], tokens[node]
                if node == 0 or (
                    above in paths and token not in ends and wanted[row, above, token] > -math.inf
                ):
                    paths[node] = paths[above].then(token)
                    wanted[row, node] = adjusted(
                        logits[row, node], rows.params[row], paths[node], rows.num_prompts[row]
                    )
        return wanted

    def _context(self, rows: Rows, row: int) -> Context:
        """The row's tokens before its anchor, each counted once in the life of the request."""
        slot, history = rows.slots[row], rows.histories[row]
        counts = self._counts.get(slot)
        if counts is None:
            counts = self._counts[slot] = Counts(self.target.vocab_size, rows.num_prompts[row])
        counts.add(history[counts.num_counted : len(history) - 1])
        return Context(history, counts)

    def _collect(
        self, slots: list[int], proposal: Proposal, features: Tensor | None, paths: list[list[int]]
    ) -> None:
        """What was committed in rows that go on, for the drafter."""
        for i, slot in enumerate(slots):
            if self.running[slot].finish_reason is None:
                path = (
                    slice(len(paths[i])) if paths[i][-1] < len(paths[i]) else paths[i]
                )  # a view where nothing was left out
                seen = proposal.tokens[i, path], None if features is None else features[i, path]
                self._unseen.setdefault(slot, []).append(seen)

    def _observe(self) -> None:
        """Show it to the drafter; while that is not asked to draft, it waits."""
        if self._unseen:
            waiting, self._unseen = self._unseen, {}
            tokens = [torch.cat([part for part, _ in parts]) for parts in waiting.values()]
            states = [[part for _, part in parts if part is not None] for parts in waiting.values()]
            features = [torch.cat(own) for own in states] if self.drafter.layers else None
            self.drafter.observe(self._rows(list(waiting)), tokens, features)

    def _release(self, slots: list[int]) -> None:
        for slot in slots:
            rows = self._rows([slot])
            del self.running[slot]
            self._unseen.pop(slot, None)
            self._counts.pop(slot, None)
            self._cache.free(slot)
            self.drafter.end(rows)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._part[part] = self._part.get(part, 0.0) + time.perf_counter() - started


def check(target: Target, request: Request) -> None:
    """Raises InvalidPrompt, InvalidParameter or ContextLengthError for a request that could never run."""
    if not request.prompt:
        raise InvalidPrompt("the prompt is empty", hint="give at least one token of text")
    highest = max(request.params.logit_bias, default=0)
    require(
        highest < target.vocab_size,
        "logit_bias",
        f"{{{highest}: ...}}",
        f"by token ids below {target.vocab_size}",
    )
    asked, limit = request.params.max_new_tokens, target.context_length
    if len(request.prompt) + asked > limit:
        wanted = f"the prompt has {len(request.prompt)} tokens and {asked} new ones were asked for"
        room = limit - len(request.prompt)
        hint = f"shorten the prompt, or ask for at most {room} new tokens"
        if room < 1:
            hint = f"shorten the prompt by {1 - room} tokens or more"
        raise ContextLengthError(
            f"{wanted}, but the context of `{target.name}` holds {limit}", hint=hint
        )


def _cut(proposal: Proposal, limits: Tensor) -> Proposal:
    """No more nodes in a row than it has tokens left: what lies beyond could never be committed."""
    sizes = torch.minimum(proposal.sizes, limits)
    width = int(sizes.max())
    if width == proposal.num_nodes:
        return replace(proposal, sizes=sizes)
    scores, probs, drawn = (
        None if t is None else t[:, :width]
        for t in (proposal.scores, proposal.probs, proposal.drawn)
    )
    return Proposal(
        proposal.tokens[:, :width], proposal.parents[:, :width], sizes, scores, probs, drawn
    )


def _account(stats: Stats, num_drafted: int, num_committed: int, parts: dict[str, float]) -> None:
    stats.target_passes += 1
    stats.num_drafted += num_drafted
    stats.accepted_lengths.append(num_committed)
    for part, seconds in parts.items():
        stats.seconds[part] = stats.seconds.get(part, 0.0) + seconds
