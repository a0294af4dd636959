"""The loop: place, read, propose, verify, commit.

It knows no method; plain decoding is the drafter that proposes nothing.

The life of a request: (1) `submit` lets it wait; (2) the scheduler gives it a row, which begins
with what another row has already read of the same text; (3) every `step` reads a part of the
prompts that are not read yet, and the drafter observes it; (4) behind the last part the target's
first token becomes the anchor. Then every step: (5) the drafter proposes a tree behind each anchor;
(6) the target reads all nodes in one pass; (7) `verify` says which path stands; (8) the cache keeps
that path and the row commits its tokens, up to an end-of-text token, a stop string or the token
limit, at any offset of a block; (9) the drafter observes what was committed. A finished row is
forgotten, or kept for requests that begin alike.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flashdraft.decoding.control import Control
from flashdraft.decoding.forced import num_certain, with_forced
from flashdraft.decoding.laws import Reading, adjusted_nodes
from flashdraft.decoding.sampling import coins, draw, likeliest, target_probs, uniforms
from flashdraft.decoding.tree import alone, spread
from flashdraft.decoding.tree import check as check_proposal
from flashdraft.decoding.verify import follow, verify
from flashdraft.errors import UnusableLogits
from flashdraft.models.cache import SlotCache
from flashdraft.models.target import Target
from flashdraft.process import BOOLS, INTS, serial, undisturbed
from flashdraft.request import Drafting, Request, check
from flashdraft.scheduler import Part, Placement, Scheduler
from flashdraft.types import Chunk, Drafter, Proposal, Rows, Steering, Verdict

__all__ = ["Drafting", "Engine", "Request", "check"]

_WAITING = 256  # tokens that a row may have committed and the drafter not observed
_SCORED = 64  # prompt tokens whose log-probabilities are asked for at a time


class _Seen(NamedTuple):
    """What a row committed in one step and the drafter has not observed yet."""

    tokens: Tensor  # [n]
    features: Tensor | None  # [n, layers * hidden]


class _Failed(Exception):
    """Some rows of a step cannot go on, and why; nothing of the step is committed."""

    def __init__(self, errors: dict[int, Exception]) -> None:
        self.errors = errors  # by row


class Engine:
    """Rows that are decoded together.

    `target` and `drafter` keep their own caches; a row has the same place in all of them.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        *,
        max_rows: int = 1,
        control: Control | None = None,
        scheduler: Scheduler[Request] | None = None,
    ) -> None:
        """control: says how many nodes are read; None: all of them.

        scheduler: None stands for one of `max_rows` rows that keeps nothing.
        """
        self.target = target
        self.drafter = drafter
        self.control = control
        self.scheduler = scheduler or Scheduler[Request](max_rows)
        self._cache = target.new_cache(self.scheduler.num_rows, 256)
        self.scheduler.can_give = self._cache.can_give
        self._ended: dict[int, Request] = {}  # by row, those whose rows are kept
        self._unseen: dict[int, list[_Seen]] = {}  # by row, waiting for the drafter
        self._readings: dict[int, Reading] = {}  # by row, of those whose logits are changed
        self._part: dict[str, float] = {}  # seconds of this step, by part

    @property
    def running(self) -> dict[int, Request]:
        """By row: the requests whose prompts are read."""
        return self.scheduler.running

    @property
    def waiting(self) -> Sequence[Request]:
        """Those that have no row yet, the next one first."""
        return self.scheduler.waiting

    @property
    def num_free(self) -> int:
        return self.scheduler.num_free

    @property
    def max_rows(self) -> int:
        return self.scheduler.max_rows

    @property
    def has_work(self) -> bool:
        """Whether requests wait or run."""
        return self.scheduler.has_work

    @property
    def num_tokens(self) -> int:
        """Tokens that the target's cache holds, those of kept rows included."""
        return sum(self._cache.lengths)

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values: the target's and the drafter's."""
        return sum(cache.nbytes for cache in self._caches)

    @property
    def token_nbytes(self) -> int:
        """Bytes of keys and values a token, in all caches that something was written to."""
        return sum(cache.slot_nbytes for cache in self._caches)

    @property
    def row_nbytes(self) -> int:
        """Bytes that a row may take whatever its length: running states, of rows that were used."""
        return sum(cache.row_nbytes for cache in self._caches)

    @property
    def _caches(self) -> tuple[SlotCache, ...]:
        return (self._cache, *self.drafter.caches)

    # ---- what a caller does ----------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Let it wait for a row. Raises what `check` raises."""
        check(self.target, request)
        self.scheduler.submit(request)

    def cancel(self, index: int) -> None:
        """Forget the request with this number, waiting or running, if there is one."""
        self.scheduler.withdraw(index)
        row = self.scheduler.row_of(index)
        if row is None:
            return
        try:
            self._finish([row])
        except Exception:  # of a drafter that cannot follow: nothing of the row is kept
            self._drop([row])

    @undisturbed
    def step(self) -> list[Chunk]:
        """Read a part of the prompts, and decode one step in the rows that ran before.

        Where it raises, as a drafter or an interrupt may, no row is left half done: those that it
        had changed are forgotten, and the others stand where they stood.
        """
        before = {row: len(request.history) for row, request in self.running.items()}
        try:
            return self._stepped(list(before))
        except BaseException:
            self._drop(self._changed(before))
            raise

    def _stepped(self, ran: list[int]) -> list[Chunk]:
        self._part = {}
        chunks = self._place()
        chunks += self._read_prompts()
        if ran:
            chunks += self._decode(ran)
        return chunks

    def _changed(self, before: Mapping[int, int]) -> list[int]:
        """The rows that a broken step has changed. before: of those that ran, tokens of the text.

        A row is whole where its cache holds what is read of its prompt, or all but its anchor.
        """
        changed = []
        held = self._cache.lengths
        for row, own in self.scheduler.reading.items():
            if held[row] != own.num_read:
                changed.append(row)
        for row, request in self.running.items():
            length = len(request.history)
            if before.get(row) != length or held[row] != length - 1:
                changed.append(row)
        return changed

    def prepare(self, slots: int) -> None:
        """Make room for so many tokens in every row, so that no step has to stop for it."""
        self._cache.reserve(slots)
        for cache in self.drafter.caches:
            cache.reserve(slots, rows=self.scheduler.num_rows)

    def forget_kept(self) -> None:
        """Give back the rows that are kept for requests that begin alike."""
        self.scheduler.kept.clear()
        self._clear(list(self._ended))

    # ---- prompts ---------------------------------------------------------------------------------

    def _place(self) -> list[Chunk]:
        """Give rows to the requests whose turn it is; returns the ends of those that fail."""
        failed = []
        while placement := self.scheduler.place():
            request, row, source, _ = placement
            request.begin()
            if self.control is not None and len(self.scheduler.requests()) == 1:
                self.control.begin()
            if source is not None:
                self._observe([source])
            try:
                self._begin(placement)
            except Exception as error:  # no memory, or a drafter's: it is this request's alone
                failed.append(self._failed(row, error))
        self._clear(self.scheduler.crowded_out())
        return failed

    def _begin(self, placement: Placement[Request]) -> None:
        """Let a row begin with what another one has already read of its prompt."""
        request, row, source, num_wanted = placement
        num_prompt = len(request.prompt)
        self._cache.reserve(num_prompt + 64, later=request.params.max_new_tokens)
        if row != source:
            self._clear([row])

        num_shared = 0
        if source is not None:
            num_shared = self._resumed(source, row, num_wanted)
        if source is None or num_shared == 0:
            self._clear([row])
        else:
            self._cache.take(row, source, num_shared)
            self._ended.pop(row, None)

        request.stats.num_cached = num_shared
        self.scheduler.resumed(row, num_shared)

    def _resumed(self, source: int, row: int, num_wanted: int) -> int:
        """With how many of a row's tokens another can begin in both caches; the drafter's holds
        them."""
        while True:
            num_given = self._cache.can_give(source, num_wanted)
            num_taken = self.drafter.resume(source, row, num_given)
            if num_taken >= num_given:
                return num_given
            num_wanted = num_taken

    @torch.inference_mode()
    def _read_prompts(self) -> list[Chunk]:
        """Read the next part of every prompt in one pass; those that are read commit a token."""
        parts = self.scheduler.parts()
        if not parts:
            return []

        rows = [part.row for part in parts]
        requests = [self.scheduler.reading[row].request for row in rows]
        try:
            with self._timed("prefill"):
                states = self._read(parts, requests)
        except Exception as error:  # of a drafter, or no memory: it is these requests' alone
            return self._all_failed(dict.fromkeys(rows, error))
        except BaseException:
            self._drop(rows)  # what they have left in the caches would change other texts
            raise

        num_read = sum(part.end - part.start for part in parts)
        self.scheduler.took(num_read, self._part["prefill"])
        chunks = []
        for part, request, own in zip(parts, requests, states, strict=True):
            request.stats.add("prefill", self._part["prefill"])
            if not bool(own.isfinite().all()):  # before others begin with it
                chunks.append(self._failed(part.row, self._unusable(part.end)))
            elif self.scheduler.read(part):
                chunks.append(self._first(part.row, request, own[-1]))
        return chunks

    def _read(self, parts: Sequence[Part], requests: Sequence[Request]) -> list[Tensor]:
        """The final states [n, hidden] of every part; the drafter observes them all."""
        texts = []
        histories = []  # with the token behind what is read, as if it were the anchor
        for part, request in zip(parts, requests, strict=True):
            own = request.prompt[part.start : part.end]
            texts.append(torch.tensor(own, **INTS))
            histories.append(request.prompt[: part.end + 1])

        slots = [part.row for part in parts]
        longest = max(len(text) for text in texts)
        self._make_room(slots, longest)
        states, features = self.target.read(self._cache, slots, texts, self.drafter.layers)
        rows = replace(self._rows(slots), histories=histories)
        self.drafter.observe(rows, texts, features)
        for part, request, own_states in zip(parts, requests, states, strict=True):
            if request.params.prompt_logprobs:
                self._score(request, part.start, own_states)
        return states

    def _make_room(self, slots: Sequence[int], count: int) -> None:
        """For so many tokens behind what each of these rows holds."""
        held = max(self._cache.lengths[slot] for slot in slots)
        self._cache.reserve(held + count)

    def _score(self, request: Request, start: int, states: Tensor) -> None:
        """The log-probabilities of the prompt's tokens behind these states [n, hidden]."""
        for some in states.split(_SCORED):
            request.read(start, self.target.lm_head(some).cpu())
            start += len(some)

    def _first(self, slot: int, request: Request, state: Tensor) -> Chunk:
        """Draw the token behind the prompt. state: [hidden], of the prompt's last token."""
        started = time.perf_counter()
        params = request.params
        num_prompt = len(request.prompt)
        try:
            logits = self.target.lm_head(state)
            wanted = logits
            if params.adjusts:
                reading = Reading(params, request.prompt, request.eos)
                self._readings[slot] = reading
                wanted = reading.first(logits, request.prompt)
            law = target_probs(wanted[None, None], [params], torch.ones(1, **INTS))[:, 0].cpu()
            first = draw(law, uniforms([params.seed], [num_prompt], 1)[:, 0])
        except UnusableLogits:
            return self._failed(slot, self._unusable(num_prompt))
        except Exception as error:  # of a hook
            return self._failed(slot, error)

        chunk = request.commit(first.tolist(), 0, [logits])
        request.stats.add("prefill", time.perf_counter() - started)
        if request.finish_reason is not None:
            self._finish([slot])
        return chunk

    # ---- a step of the rows that run -------------------------------------------------------------

    def _decode(self, slots: list[int]) -> list[Chunk]:
        """One target pass over these rows."""
        self._part = {}
        requests = [self.running[slot] for slot in slots]
        rows = self._rows(slots)
        rows.steering = [self._steering(slot) for slot in slots]

        with self._timed("draft"):
            proposal, is_drafted = self._propose(rows, requests)
            self._make_room(slots, proposal.num_nodes)
            check_proposal(proposal)  # a faulty drafter would change the law in silence
        with self._timed("target"):
            tree = proposal.tokens, proposal.parents, proposal.sizes
            logits, features = self.target.forward(self._cache, slots, *tree, self.drafter.layers)
        with self._timed("host"):
            try:
                verdict = self._judge(proposal, logits, rows)
            except _Failed as failed:
                return self._all_failed(failed.errors)
            paths = [_without_padding(path) for path in verdict.path.tolist()]
            chunks = self._commit(requests, proposal, paths, verdict, logits)
            kept = self._keep(slots, paths)
        with self._timed("draft"):
            self._collect(slots, proposal, features, kept)
            if is_drafted:
                self._observe(slots)

        if self.control is not None:
            draft_seconds = self._part["draft"] if is_drafted else None
            step_seconds = sum(self._part.values())
            self.control.learn(proposal, paths, draft_seconds, step_seconds)
        num_drafted = (proposal.sizes - 1).tolist()
        for request, count, chunk in zip(requests, num_drafted, chunks, strict=True):
            _account(request, count, len(chunk.tokens))
            for part, seconds in self._part.items():
                request.stats.add(part, seconds)
        ended = [slot for slot in slots if self.running[slot].finish_reason is not None]
        self._finish(ended)
        return chunks

    def _propose(self, rows: Rows, requests: Sequence[Request]) -> tuple[Proposal, bool]:
        """What the drafter proposes and what hooks force, cut to what each row has left and to what
        pays; and whether drafting took time."""
        limits = torch.tensor([request.num_left for request in requests], **INTS)
        places = [place for place, request in enumerate(requests) if request.drafting != "off"]
        free, gain = self._propose_free(rows, places, limits)
        if not self._wants_drafts(requests, places, gain):
            return _cut(with_forced(free, rows.steering), limits), False

        most = int(limits[places].max())
        of_some = self._propose_some(rows, places, most)
        proposal = spread(of_some, places, rows.anchors)
        proposal = _cut(with_forced(proposal, rows.steering), limits)
        if self.control is None:
            return proposal, True

        pays = self.control.trim(proposal)
        pays = torch.maximum(pays, num_certain(proposal, rows.steering))
        as_many_as_pay = [request.drafting == "auto" for request in requests]
        is_trimmed = torch.tensor(as_many_as_pay, **BOOLS)
        return _cut(proposal, torch.where(is_trimmed, pays, proposal.sizes)), True

    def _propose_free(
        self, rows: Rows, places: Sequence[int], limits: Tensor
    ) -> tuple[Proposal, float]:
        """What pays of the free part's proposal for the rows in these places, and what the step
        promises by it, to plain decoding."""
        nothing = alone(rows.anchors)
        part: Drafter | None = getattr(self.drafter, "free_part", None)  # it may not inherit one
        if part is None or self.control is None or not places:
            return nothing, 1.0

        some = self._some(rows, places)
        proposal = part.propose(some, int(limits[places].max()))
        proposal = _cut(spread(proposal, places, rows.anchors), limits)
        sizes, gain = self.control.trim_free(proposal)
        return _cut(proposal, sizes), gain

    def _wants_drafts(
        self, requests: Sequence[Request], places: Sequence[int], gain: float
    ) -> bool:
        """Whether this step drafts for the rows in these places, though it takes time."""
        if self.control is None or not places:
            return bool(places)
        is_asked_for = any(request.drafting == "on" for request in requests)
        return is_asked_for or self.control.wants_drafts(len(requests), gain)

    def _propose_some(self, rows: Rows, drafted: Sequence[int], most: int) -> Proposal:
        """The drafter's own for the rows in these places, of at most so many nodes each."""
        self._observe([rows.slots[place] for place in drafted])
        return self.drafter.propose(self._some(rows, drafted), most)

    def _some(self, rows: Rows, places: Sequence[int]) -> Rows:
        some = self._rows([rows.slots[place] for place in places])
        some.steering = [rows.steering[place] for place in places]
        return some

    def _commit(
        self,
        requests: Sequence[Request],
        proposal: Proposal,
        paths: Sequence[Sequence[int]],
        verdict: Verdict,
        logits: Tensor,
    ) -> list[Chunk]:
        """Every row takes the drafts on its path, and the target's own token after them."""
        chunks = []
        sizes = proposal.sizes.tolist()
        rows = zip(requests, proposal.tokens.tolist(), paths, verdict.bonus.tolist(), strict=True)
        for i, (request, nodes, path, bonus) in enumerate(rows):
            drafts = [nodes[node] for node in path[1:]]
            own = list(logits[i, path]) if request.params.logprobs else []
            rejected = _rejected(nodes[: sizes[i]], path)
            chunk = request.commit([*drafts, bonus], len(drafts), own, rejected)
            chunks.append(chunk)
        return chunks

    def _keep(self, slots: Sequence[int], paths: Sequence[list[int]]) -> list[list[int]]:
        """Commit every row's path to the cache, no further than its text goes; returns that."""
        kept = []
        for slot, path in zip(slots, paths, strict=True):
            num_left = len(self.running[slot].history) - self._cache.lengths[slot]
            assert num_left > 0, "the cache holds more than the text"
            own = path[:num_left]
            self._cache.keep(slot, own)
            kept.append(own)
        return kept

    def _judge(self, proposal: Proposal, logits: Tensor, rows: Rows) -> Verdict:
        """Which part of the proposal stands. Raises _Failed for rows whose logits give no law."""
        try:
            return self._verdict(proposal, logits, rows)
        except UnusableLogits:
            blamed = _not_finite(proposal, logits, rows) or rows.slots
            errors: dict[int, Exception] = {}
            for slot in blamed:
                errors[slot] = self._unusable(len(self.running[slot].history))
            raise _Failed(errors) from None

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
        """The logits as the rows' parameters change them, at every node that a text can reach.

        Raises _Failed for rows whose hook raises.
        """
        readings = [self._readings.get(slot) for slot in rows.slots]
        errors: dict[int, Exception] = {}
        wanted = adjusted_nodes(proposal, logits, rows.histories, readings, errors)
        if errors:
            by_slot = {rows.slots[row]: error for row, error in errors.items()}
            raise _Failed(by_slot)
        return wanted

    def _steering(self, slot: int) -> Steering | None:
        """The state of the row's hook behind its anchor, if it keeps one."""
        reading = self._readings.get(slot)
        return None if reading is None else reading.behind(self.running[slot].history)

    # ---- what the drafter observes ---------------------------------------------------------------

    def _collect(
        self,
        slots: Sequence[int],
        proposal: Proposal,
        features: Tensor | None,
        paths: Sequence[Sequence[int]],
    ) -> None:
        """Keep what was committed in rows that go on or are kept, for the drafter."""
        late = []
        for i, (slot, path) in enumerate(zip(slots, paths, strict=True)):
            is_finished = self.running[slot].finish_reason is not None
            if is_finished and not self.scheduler.keeps:
                continue
            leaves_none_out = path[-1] < len(path)
            places = slice(len(path)) if leaves_none_out else path  # a slice copies nothing
            own = None if features is None else features[i, places]
            waiting = self._unseen.setdefault(slot, [])
            waiting.append(_Seen(proposal.tokens[i, places], own))
            if is_finished or len(waiting) >= _WAITING:
                late.append(slot)
        self._observe(late)

    def _observe(self, slots: Sequence[int]) -> None:
        """Show the drafter what it has not seen of these rows; while nothing is drafted, it
        waits."""
        waiting = [slot for slot in slots if slot in self._unseen]
        if not waiting:
            return
        tokens = []
        features = []
        for slot in waiting:
            parts = self._unseen.pop(slot)
            tokens.append(torch.cat([part.tokens for part in parts]))
            states = [part.features for part in parts if part.features is not None]
            if states:
                features.append(torch.cat(states))
        shown = features if self.drafter.layers else None
        self.drafter.observe(self._rows(waiting), tokens, shown)

    # ---- leaving ---------------------------------------------------------------------------------

    def _failed(self, slot: int, error: Exception) -> Chunk:
        """The request in this row ends here, with nothing of it kept."""
        index = self.scheduler.requests()[slot].index
        self._drop([slot])
        return Chunk(index, (), (), error=error)

    def _all_failed(self, errors: Mapping[int, Exception]) -> list[Chunk]:
        """errors: by row."""
        return [self._failed(slot, error) for slot, error in errors.items()]

    def _drop(self, slots: Sequence[int]) -> None:
        """Forget these rows. What they have left in the caches may be no numbers: it is wiped."""
        for slot in slots:
            for cache in self._caches:
                if slot < cache.rows:
                    cache.wipe(slot)
            self._unseen.pop(slot, None)
            self._ended[slot] = self.scheduler.requests()[slot]
            self.scheduler.finish(slot, [])
            self._readings.pop(slot, None)
        self._clear(slots)

    def _finish(self, slots: Sequence[int]) -> None:
        """These rows' requests have ended; what was read stays where that is wanted."""
        keeps = self.scheduler.keeps
        if keeps:
            self._observe(slots)
        for slot in slots:
            request = self.scheduler.requests()[slot]
            tokens: list[int] = []
            if keeps:
                tokens = request.history[: self._cache.lengths[slot]]
            self._ended[slot] = request
            self.scheduler.finish(slot, tokens)
            self._unseen.pop(slot, None)
            self._readings.pop(slot, None)
            if not tokens:
                self._clear([slot])
        self._clear(self.scheduler.crowded_out())

    def _clear(self, slots: Sequence[int]) -> None:
        """Free these rows in all caches."""
        for slot in slots:
            request = self._ended.pop(slot, None)
            if request is None:
                continue
            self._cache.free(slot)
            self.drafter.end(_rows_of({slot: request}))
            for cache in self._caches:
                if slot < cache.rows and self.scheduler.keeps:
                    cache.give_back(slot)

    def _unusable(self, num_read: int) -> UnusableLogits:
        """The error of a row whose logits give no law behind so many tokens."""
        kernel = self.target.kernel
        hint = "its weights are damaged, or its config belongs to others: fetch the model again"
        if "float16" in kernel and "bfloat16" not in kernel:
            hint = "float16 is too narrow for many models: give --dtype bfloat16 or float32"
        where = f"the logits of `{self.target.name}` ({kernel})"
        got = f"{where} are NaN, infinite, or all -inf after {num_read} tokens"
        return UnusableLogits(got, hint=hint)

    def _rows(self, slots: Sequence[int]) -> Rows:
        requests = self.scheduler.requests()
        return _rows_of({slot: requests[slot] for slot in slots})

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._part[part] = self._part.get(part, 0.0) + time.perf_counter() - started


def _rows_of(requests: Mapping[int, Request]) -> Rows:
    """As a drafter sees them. requests: by row."""
    own = requests.values()
    return Rows(
        slots=list(requests),
        histories=[request.history for request in own],
        params=[request.params for request in own],
        num_prompts=[len(request.prompt) for request in own],
    )


def _not_finite(proposal: Proposal, logits: Tensor, rows: Rows) -> list[int]:
    """The slots of the rows with a node whose logits give no law."""
    bad = []
    is_finite = logits.amax(-1).isfinite().tolist()
    sizes = proposal.sizes.tolist()
    for slot, of_nodes, size in zip(rows.slots, is_finite, sizes, strict=True):
        if not all(of_nodes[:size]):
            bad.append(slot)
    return bad


def _without_padding(path: Sequence[int]) -> list[int]:
    return [node for node in path if node >= 0]


def _rejected(nodes: Sequence[int], path: Sequence[int]) -> list[int]:
    """The tokens of the nodes that are not on the path."""
    if len(path) == len(nodes):
        return []
    accepted = set(path)
    rejected = []
    for node, token in enumerate(nodes):
        if node not in accepted:
            rejected.append(token)
    return rejected


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


def _account(request: Request, num_drafted: int, num_committed: int) -> None:
    stats = request.stats
    stats.target_passes += 1
    stats.num_drafted += num_drafted
    stats.accepted_lengths.append(num_committed)
