"""The loop: propose, read, verify, commit.

It knows no method; plain decoding is the drafter that proposes nothing.

The life of a request: (1) `admit` gives it a row and reads its prompt; (2) the drafter observes the
prompt; (3) the target's first token becomes the anchor. Then every `step`: (4) the drafter proposes
a tree behind each anchor; (5) the target reads all nodes in one pass; (6) `verify` says which path
stands; (7) the cache keeps that path and the row commits its tokens, up to an end-of-text token, a
stop string or the token limit, at any offset of a block; (8) the drafter observes what was
committed, or forgets the row if it is finished.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flashdraft.decoding.control import Control
from flashdraft.decoding.forced import with_forced
from flashdraft.decoding.laws import Reading, adjusted_nodes
from flashdraft.decoding.sampling import coins, draw, likeliest, logprob, target_probs, uniforms
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
    Steering,
    Verdict,
    require,
)

__all__ = ["Drafting", "Engine", "Request", "check"]

Drafting = Literal["auto", "on", "off"]  # as many drafts as pay; all of them; none


@dataclass
class Request:
    """What a user sent, as tokens, and what it has become so far."""

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
        """Take tokens until one ends the request; the first `num_drafted` of them were drafted.

        logits: [vocab] each, those that the tokens were drawn from; read only for logprobs.
        """
        pieces = []
        for i, token in enumerate(tokens):
            self.history.append(token)
            own = None
            if self.params.logprobs:
                own = logprob(logits[i], token)
                self.logprobs.append(own)
            text = self._text_of(token)
            pieces.append(Piece(text, drafted=i < num_drafted, logprob=own))
            if self.finish_reason is not None:
                break

        self.stats.num_tokens += len(pieces)
        self.stats.num_accepted += min(len(pieces), num_drafted)
        taken = tuple(tokens[: len(pieces)])
        return Chunk(self.index, tuple(pieces), taken, self._result())

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
        return Result(self.decoder.text, tokens, self.finish_reason, self.stats, logprobs)


class _Seen(NamedTuple):
    """What a row committed in one step and the drafter has not observed yet."""

    tokens: Tensor  # [n]
    features: Tensor | None  # [n, layers * hidden]


class Engine:
    """Rows that are decoded together.

    `target` and `drafter` keep their own caches; a row has the same place in all of them.
    """

    def __init__(
        self, target: Target, drafter: Drafter, *, max_rows: int = 1, control: Control | None = None
    ) -> None:
        """control: says how many nodes are read; None: all of them."""
        self.target = target
        self.drafter = drafter
        self.max_rows = max_rows
        self.control = control
        self.running: dict[int, Request] = {}  # by row
        self._cache = target.new_cache(max_rows, 256)
        self.waiting: list[Request] = []
        self._unseen: dict[int, list[_Seen]] = {}  # by row, waiting for the drafter
        self._readings: dict[int, Reading] = {}  # by row, of those whose logits are changed
        self._part: dict[str, float] = {}  # seconds of this step, by part

    @property
    def num_free(self) -> int:
        return self.max_rows - len(self.running)

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values: the target's and the drafter's."""
        return self._cache.nbytes + sum(cache.nbytes for cache in self.drafter.caches)

    @property
    def has_work(self) -> bool:
        """Whether requests wait or run."""
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> None:
        """Let it wait for a row. Raises what `check` raises."""
        check(self.target, request)
        self.waiting.append(request)

    def cancel(self, index: int) -> None:
        """Forget the request with this number, waiting or running, if there is one."""
        self.waiting = [request for request in self.waiting if request.index != index]
        self.abort(index)

    def step(self) -> list[Chunk]:
        """Read prompts of requests that wait, as there are rows for them, and decode one step."""
        chunks = []
        while self.waiting and self.num_free:
            chunks.append(self.admit(self.waiting.pop(0)))
        if self.running:
            chunks += self._decode()
        return chunks

    @undisturbed
    def admit(self, request: Request) -> Chunk:
        """Read the prompt and commit the first token.

        There must be a free row; a Request runs once.
        """
        check(self.target, request)
        assert self.num_free, "no free row"
        slot = next(i for i in range(self.max_rows) if i not in self.running)
        num_prompt = len(request.prompt)
        request.history = list(request.prompt)
        request.stats = Stats(num_prompt_tokens=num_prompt)
        self._part = {}
        self._cache.reserve(num_prompt + 64, later=request.params.max_new_tokens)
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
    def _decode(self) -> list[Chunk]:
        """One target pass over every running row."""
        self._part = {}
        slots = list(self.running)
        requests = list(self.running.values())
        rows = self._rows(slots)
        rows.steering = [self._steering(slot) for slot in slots]
        is_drafted = self.control is None or self.control.wants_drafts(len(slots))

        with self._timed("draft"):
            proposal = self._propose(rows, requests, is_drafted)
            self._cache.reserve(max(self._cache.lengths) + proposal.num_nodes)
            check_proposal(proposal)  # a faulty drafter would change the law in silence
        with self._timed("target"):
            tree = proposal.tokens, proposal.parents, proposal.sizes
            logits, features = self.target.forward(self._cache, slots, *tree, self.drafter.layers)
        with self._timed("host"):
            verdict = self._judge(proposal, logits, rows)
            paths = [_without_padding(path) for path in verdict.path.tolist()]
            for slot, path in zip(slots, paths, strict=True):
                self._cache.keep(slot, path)
            chunks = self._commit(requests, proposal, paths, verdict, logits)
        with self._timed("draft"):
            self._collect(slots, proposal, features, paths)
            if is_drafted:
                self._observe()

        if self.control is not None:
            draft_seconds = self._part["draft"] if is_drafted else None
            self.control.learn(proposal, paths, draft_seconds, sum(self._part.values()))
        num_drafted = (proposal.sizes - 1).tolist()
        for request, drafted, chunk in zip(requests, num_drafted, chunks, strict=True):
            _account(request.stats, drafted, len(chunk.tokens), self._part)
        finished = [slot for slot in slots if self.running[slot].finish_reason is not None]
        self._release(finished)
        return chunks

    def _propose(self, rows: Rows, requests: list[Request], is_drafted: bool) -> Proposal:
        """What the drafter proposes and what hooks force, cut to what each row has left and to what
        pays.
        """
        limits = torch.tensor([request.num_left for request in requests], **INTS)
        proposal = alone(rows.anchors)
        if is_drafted:
            self._observe()
            proposal = self.drafter.propose(rows, int(limits.max()))
        proposal = _cut(with_forced(proposal, rows.steering), limits)
        if is_drafted and self.control is not None:
            proposal = _cut(proposal, self.control.trim(proposal))
        return proposal

    def _commit(
        self,
        requests: list[Request],
        proposal: Proposal,
        paths: list[list[int]],
        verdict: Verdict,
        logits: Tensor,
    ) -> list[Chunk]:
        """Every row takes the drafts on its path, and the target's own token after them."""
        chunks = []
        rows = zip(requests, proposal.tokens.tolist(), paths, verdict.bonus.tolist(), strict=True)
        for i, (request, nodes, path, bonus) in enumerate(rows):
            drafts = [nodes[node] for node in path[1:]]
            own = list(logits[i, path]) if request.params.logprobs else []
            chunks.append(request.commit([*drafts, bonus], len(drafts), own))
        return chunks

    def abort(self, index: int) -> None:
        """Forget the running request with this number, if there is one."""
        self._release([slot for slot, request in self.running.items() if request.index == index])

    def _unusable(self, slots: Sequence[int]) -> UnusableLogits:
        """Forget these rows, whose logits give no law; returns the error that says so.

        What they have left in the caches is wiped.
        """
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
        where = f"the logits of `{self.target.name}` ({kernel})"
        got = f"{where} are NaN, infinite, or all -inf after {read} tokens"
        return UnusableLogits(got, hint=hint)

    def _rows(self, slots: list[int]) -> Rows:
        own = [self.running[slot] for slot in slots]
        return Rows(
            slots=slots,
            histories=[request.history for request in own],
            params=[request.params for request in own],
            num_prompts=[len(request.prompt) for request in own],
        )

    def _prefill(self, slot: int, request: Request) -> tuple[Tensor, Tensor]:
        """Read the prompt, show it to the drafter and draw the token after it.

        Returns the token, [1], and the target's logits for it, [vocab].
        """
        params = request.params
        num_prompt = len(request.prompt)
        with self._timed("prefill"):
            tokens = torch.tensor(request.prompt, **INTS)
            logits, features = self.target.prefill(self._cache, slot, tokens, self.drafter.layers)
            own = None if features is None else [features]
            self.drafter.observe(self._rows([slot]), [tokens], own)
            wanted = logits
            if params.adjusts:
                reading = Reading(params, request.prompt, request.eos)
                self._readings[slot] = reading
                wanted = reading.first(logits, request.prompt)
            law = target_probs(wanted[None, None], [params], torch.ones(1, **INTS))[:, 0].cpu()
            first = draw(law, uniforms([params.seed], [num_prompt], 1)[:, 0])
        return first, logits

    def _judge(self, proposal: Proposal, logits: Tensor, rows: Rows) -> Verdict:
        """Which part of the proposal stands. Rows whose logits give no law are forgotten first."""
        try:
            return self._verdict(proposal, logits, rows)
        except UnusableLogits:
            bad = []
            is_finite = logits.amax(-1).isfinite().tolist()
            sizes = proposal.sizes.tolist()
            for slot, of_nodes, size in zip(rows.slots, is_finite, sizes, strict=True):
                if not all(of_nodes[:size]):
                    bad.append(slot)
            raise self._unusable(bad or rows.slots) from None

    @serial(lambda self: self._cache.blocked)  # the next step is our kernels'
    def _verdict(self, proposal: Proposal, logits: Tensor, rows: Rows) -> Verdict:
        if any(params.adjusts for params in rows.params):
            logits = self._adjusted(proposal, logits, rows)
        any_drawn = proposal.drawn is not None and bool(proposal.drawn.any())
        all_greedy = all(params.temperature == 0 for params in rows.params)
        if all_greedy and not any_drawn:
            return follow(proposal, likeliest(logits))

        seeds = [params.seed for params in rows.params]
        next_positions = [position + 1 for position in rows.positions]
        law = target_probs(logits, rows.params, proposal.sizes).cpu()  # where the uniforms are
        draws = uniforms(seeds, next_positions, proposal.num_nodes)
        tossed = coins(seeds, rows.positions, proposal.num_nodes) if any_drawn else None
        return verify(proposal, law, draws, tossed)

    def _adjusted(self, proposal: Proposal, logits: Tensor, rows: Rows) -> Tensor:
        """The logits as the rows' parameters change them, at every node that a text can reach."""
        readings = [self._readings.get(slot) for slot in rows.slots]
        return adjusted_nodes(proposal, logits, rows.histories, readings)

    def _steering(self, slot: int) -> Steering | None:
        """The state of the row's hook behind its anchor, if it keeps one."""
        reading = self._readings.get(slot)
        return None if reading is None else reading.behind(self.running[slot].history)

    def _collect(
        self, slots: list[int], proposal: Proposal, features: Tensor | None, paths: list[list[int]]
    ) -> None:
        """Keep what was committed in rows that go on, for the drafter."""
        for i, (slot, path) in enumerate(zip(slots, paths, strict=True)):
            if self.running[slot].finish_reason is not None:
                continue
            leaves_none_out = path[-1] < len(path)
            places = slice(len(path)) if leaves_none_out else path  # a slice copies nothing
            own = None if features is None else features[i, places]
            seen = _Seen(proposal.tokens[i, places], own)
            self._unseen.setdefault(slot, []).append(seen)

    def _observe(self) -> None:
        """Show it to the drafter; while that is not asked to draft, it waits."""
        if not self._unseen:
            return
        waiting = self._unseen
        self._unseen = {}
        tokens = []
        features = []
        for parts in waiting.values():
            tokens.append(torch.cat([part.tokens for part in parts]))
            states = [part.features for part in parts if part.features is not None]
            if states:
                features.append(torch.cat(states))
        shown = features if self.drafter.layers else None
        self.drafter.observe(self._rows(list(waiting)), tokens, shown)

    def _release(self, slots: list[int]) -> None:
        for slot in slots:
            rows = self._rows([slot])
            del self.running[slot]
            self._unseen.pop(slot, None)
            self._readings.pop(slot, None)
            self._cache.free(slot)
            self.drafter.end(rows)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._part[part] = self._part.get(part, 0.0) + time.perf_counter() - started


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


def _without_padding(path: list[int]) -> list[int]:
    return [node for node in path if node >= 0]


def _cut(proposal: Proposal, limits: Tensor) -> Proposal:
    """No more nodes in a row than it has tokens left: what lies beyond could never be committed."""
    sizes = torch.minimum(proposal.sizes, limits)
    width = int(sizes.max())
    if width == proposal.num_nodes:
        return replace(proposal, sizes=sizes)
    return Proposal(
        tokens=proposal.tokens[:, :width],
        parents=proposal.parents[:, :width],
        sizes=sizes,
        scores=_columns(proposal.scores, width),
        probs=_columns(proposal.probs, width),
        drawn=_columns(proposal.drawn, width),
    )


def _columns(values: Tensor | None, width: int) -> Tensor | None:
    return None if values is None else values[:, :width]


def _account(stats: Stats, num_drafted: int, num_committed: int, parts: dict[str, float]) -> None:
    stats.target_passes += 1
    stats.num_drafted += num_drafted
    stats.accepted_lengths.append(num_committed)
    for part, seconds in parts.items():
        stats.seconds[part] = stats.seconds.get(part, 0.0) + seconds
