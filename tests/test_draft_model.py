"""A draft LM: texts as without drafts, the target's law with drawn ones, a cache that holds what
was committed and no more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from conftest import SHAPE, VOCAB, Table, admit, requests_of, run, tiny_model, tiny_target
from scipy import stats
from torch import Tensor
from toy_folders import letter_tokenizer
from transformers import LlamaConfig

import flashdraft.engine
import flashdraft.methods.draft_model
from flashdraft.decoding.control import Control
from flashdraft.decoding.sampling import probabilities, uniforms
from flashdraft.decoding.tree import check
from flashdraft.engine import Engine, Request
from flashdraft.errors import DraftMismatch
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.draft_model import DraftModelDrafter, check_tokenizers
from flashdraft.models.cache import SlotCache
from flashdraft.models.hf import HFTarget
from flashdraft.models.lean import LeanTarget
from flashdraft.models.target import Target
from flashdraft.types import Proposal, Result, Rows, SamplingParams

METHOD = flashdraft.methods.draft_model
BLOCK, NEW = 5, 14
PROMPTS = ((5, 9, 7), (9, 8, 30, 4, 11, 7, 8, 40, 22, 13), tuple(range(10, 31)), (33,))
GREEDY = SamplingParams(max_new_tokens=NEW)
SAMPLED = SamplingParams(temperature=0.8, seed=1, max_new_tokens=NEW)
KINDS = {
    "greedy": (GREEDY,) * 4,
    "sampled": tuple(replace(SAMPLED, seed=seed) for seed in range(4)),
    "mixed": (
        replace(SAMPLED, top_p=0.9),
        GREEDY,
        replace(SAMPLED, top_k=9, min_p=0.01),
        replace(SAMPLED, seed=4),
    ),
}


@functools.cache
def network(lean: bool = False, noise: float = 0.01, **shape: Any) -> Target:
    """The target's own network, with noise on its weights: its drafts are right more often than
    not.
    """
    model = tiny_model("llama", config=LlamaConfig(**{**SHAPE, **shape}))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn_like(parameter) * noise * parameter.std(),
                alpha=1.0 if parameter.ndim > 1 else 0.0,
            )
    return (LeanTarget if lean else HFTarget)(model, "small")


@functools.cache
def plain(
    params: tuple[SamplingParams, ...], prompts: tuple[tuple[int, ...], ...] = PROMPTS
) -> list[tuple[int, ...]]:
    engine = Engine(tiny_target("llama"), Autoregressive(), max_rows=1)
    return [result.tokens for result in run(engine, requests_of(prompts, params))]


def texts(
    drafter: Any, params: Sequence[SamplingParams], *, max_rows: int = 4, lean: bool = False
) -> list[Result]:
    return run(
        Engine(tiny_target("llama", lean=lean), drafter, max_rows=max_rows),
        requests_of(PROMPTS, params),
    )


def rows_of(histories: Sequence[Sequence[int]], params: SamplingParams = GREEDY) -> Rows:
    return Rows(
        list(range(len(histories))),
        [list(history) for history in histories],
        [params] * len(histories),
        [1] * len(histories),
    )


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lean", [False, True])
def test_chosen_drafts_leave_greedy_and_seeded_texts_as_they_are(kind: str, lean: bool) -> None:
    for block_size in (2, BLOCK, 9) if kind == "mixed" else (1, BLOCK):
        drafter = DraftModelDrafter(network(lean), block_size=block_size, drawn=False)
        results = texts(drafter, KINDS[kind], max_rows=3, lean=lean)
        assert [result.tokens for result in results] == plain(KINDS[kind])
        drafted, accepted = (
            sum(getattr(r.stats, name) for r in results) for name in ("num_drafted", "num_accepted")
        )
        assert block_size == 1 or 0.05 < accepted / drafted < 0.97
        assert drafter.cache.lengths == [0] * 3


def test_greedy_rows_beside_drawn_ones_write_the_plain_text() -> None:
    results = texts(DraftModelDrafter(network()), KINDS["mixed"])
    assert results[1].tokens == plain(KINDS["mixed"])[1]
    assert all(result.stats.num_accepted > 0 for result in results)


@pytest.mark.parametrize("drawn", [False, True])
def test_the_text_of_a_row_does_not_depend_on_its_neighbours(drawn: bool) -> None:
    params = KINDS["mixed"]
    together, pairs = (
        texts(DraftModelDrafter(network(), drawn=drawn), params, max_rows=n) for n in (4, 2)
    )
    for i, own in enumerate(params):
        engine = Engine(tiny_target("llama"), DraftModelDrafter(network(), drawn=drawn))
        (alone,) = run(engine, requests_of(PROMPTS[i : i + 1], [own]))
        for result in (together[i], pairs[i]):
            assert (result.tokens, result.stats.accepted_lengths) == (
                alone.tokens,
                alone.stats.accepted_lengths,
            )


def test_the_same_seed_gives_the_same_drawn_text_and_another_seed_another() -> None:
    first, again = (
        [r.tokens for r in texts(DraftModelDrafter(network()), KINDS["sampled"])] for _ in range(2)
    )
    others = tuple(replace(own, seed=own.seed + 50) for own in KINDS["sampled"])
    assert first == again
    assert not set(first) & {r.tokens for r in texts(DraftModelDrafter(network()), others)}


def test_drafts_are_the_networks_own_text() -> None:
    """From one forward over the whole text each; the scores are its log-probabilities."""
    drafter = DraftModelDrafter(network())
    proposal = drafter.propose(rows_of(PROMPTS), 9)
    check(proposal)
    assert (proposal.sizes.tolist(), proposal.probs, proposal.drawn) == ([BLOCK] * 4, None, None)
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt]
        for node in range(1, BLOCK):
            with torch.no_grad():
                law = (
                    network()
                    .model(torch.tensor([text]), use_cache=False)
                    .logits[0, -1]
                    .log_softmax(-1)
                )
            text.append(int(law.argmax()))
            assert int(proposal.tokens[row, node]) == text[-1]
            assert float(proposal.scores[row, node]) == pytest.approx(float(law.max()), abs=1e-4)


@pytest.mark.parametrize("max_nodes", [1, 2, 4, 30])
def test_no_proposal_is_larger_than_asked_for(max_nodes: int) -> None:
    proposal = DraftModelDrafter(network()).propose(rows_of(PROMPTS, SAMPLED), max_nodes)
    check(proposal)
    assert proposal.sizes.tolist() == [min(BLOCK, max_nodes)] * 4
    assert (proposal.drawn is None) == (max_nodes == 1)


# ---------------------------------------------------------------- the cache


class Uncut(DraftModelDrafter):
    """The planted fault: a rejected draft stays where it was read."""

    def _unread(self, slot: int, history: list[int]) -> list[int]:
        length = (self.cache.lengths + [0] * 9)[slot]
        unread = super()._unread(slot, history)
        self.cache.lengths[slot] = max(self.cache.lengths[slot], length)
        return unread


def stepped(drafter: DraftModelDrafter, params: Sequence[SamplingParams]) -> Iterator[Engine]:
    engine = Engine(tiny_target("llama"), drafter, max_rows=4)
    for request in requests_of(PROMPTS, [replace(own, max_new_tokens=60) for own in params]):
        admit(engine, request)
    yield engine
    for _ in range(6):
        engine.step()
        yield engine


def trace(drafter: DraftModelDrafter, engine: Engine) -> float:
    """The largest difference between the cache and one that has read the committed tokens alone;
    inf for one that holds more.
    """
    slots, running = list(engine.running), list(engine.running.values())
    rows = Rows(
        slots,
        [one.history for one in running],
        [one.params for one in running],
        [len(one.prompt) for one in running],
    )
    drafter.observe(rows, [torch.empty(0)] * len(slots), None)
    worst = 0.0
    for slot, request in engine.running.items():
        n, fresh = drafter.cache.lengths[slot], drafter.network.new_cache(1, 256)
        if n > len(request.history) - 1:
            return math.inf
        drafter.network.prefill(fresh, 0, torch.tensor(request.history[: max(n, 1)]), ())
        for got, wanted in zip(
            (*drafter.cache.keys, *drafter.cache.values), (*fresh.keys, *fresh.values), strict=True
        ):
            if got is not None:
                assert wanted is not None
                worst = max(
                    worst, float((got[slot, :, :n] - wanted[0, :, :n]).abs().max()) if n else 0.0
                )
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_a_rejected_draft_leaves_no_trace(kind: str) -> None:
    drafter, lengths = DraftModelDrafter(network()), set[int]()
    for engine in stepped(drafter, KINDS[kind]):
        lengths |= {
            n for request in engine.running.values() for n in request.stats.accepted_lengths
        }
        assert trace(drafter, engine) < 1e-9
    assert lengths >= {1, BLOCK}  # all rejected, all accepted


def test_a_rejected_draft_that_stays_is_seen() -> None:
    drafter = Uncut(network())
    assert max(trace(drafter, engine) for engine in stepped(drafter, KINDS["greedy"])) > 0.1


class Blind(DraftModelDrafter):
    """The planted fault: the cache is cut to the right length, whatever it holds."""

    def _unread(self, slot: int, history: list[int]) -> list[int]:
        read = self._read.setdefault(slot, [])
        read[:] = history[: min(len(read), len(history) - 1)]
        return super()._unread(slot, history)


@pytest.mark.parametrize("kind", [DraftModelDrafter, Blind])
def test_a_text_that_went_another_way_is_read_from_where_it_parted(
    kind: type[DraftModelDrafter],
) -> None:
    """As in a union, where another drafter's branch was accepted, or after steps without drafts."""
    drafter, fresh = kind(network()), DraftModelDrafter(network())
    drafted = drafter.propose(rows_of(PROMPTS), 9).tokens.tolist()
    others = [
        [*prompt, *own[1 : 1 + same], 50, 51, 52]
        for prompt, own, same in zip(PROMPTS, drafted, (0, 1, 2, 4), strict=True)
    ]
    right = fresh.propose(rows_of(others), 9)
    proposal = drafter.propose(rows_of(others), 9)
    close = torch.allclose(proposal.scores, right.scores, atol=1e-6)  # type: ignore[arg-type]
    assert (close and torch.equal(proposal.tokens, right.tokens)) == (kind is DraftModelDrafter)


@dataclass
class Counting:
    """A network that notes the text behind every token it reads."""

    inner: Target
    read: list[tuple[int, ...]] = field(default_factory=list)
    passes: int = 0
    texts: dict[int, list[int]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def note(self, cache: SlotCache, slot: int, tokens: Sequence[int]) -> None:
        text = self.texts[slot] = [*self.texts.get(slot, [])[: cache.lengths[slot]], *tokens]
        self.read += [(slot, *text[: i + 1]) for i in range(len(text) - len(tokens), len(text))]

    def prefill(self, cache: SlotCache, slot: int, tokens: Tensor, layers: Any) -> Any:
        self.note(cache, slot, tokens.tolist())
        return self.inner.prefill(cache, slot, tokens, layers)

    def forward(
        self,
        cache: SlotCache,
        slots: Sequence[int],
        tokens: Tensor,
        parents: Any,
        sizes: Tensor,
        layers: Any,
    ) -> Any:
        self.passes += 1
        for slot, own, size in zip(slots, tokens.tolist(), sizes.tolist(), strict=True):
            self.note(cache, slot, own[:size])
        return self.inner.forward(cache, slots, tokens, parents, sizes, layers)


class Forgetful(DraftModelDrafter):
    """The planted fault: its own drafts are not kept."""

    def _unread(self, slot: int, history: list[int]) -> list[int]:
        del self._read.setdefault(slot, [])[max(len(self._read[slot]) - 2, 0) :]
        return super()._unread(slot, history)


@pytest.mark.parametrize("kind", [DraftModelDrafter, Forgetful])
def test_no_token_is_read_twice_and_a_drafted_one_costs_one_pass(
    kind: type[DraftModelDrafter],
) -> None:
    counting = Counting(network())
    drafter = kind(counting)  # type: ignore[arg-type]
    engine = Engine(tiny_target("llama"), drafter, max_rows=4)
    for request in requests_of(PROMPTS, KINDS["mixed"]):
        admit(engine, request)
    assert [len(drafter._read.get(slot, [])) for slot in range(4)][1:3] == [
        len(PROMPTS[1]) - 1,
        len(PROMPTS[2]) - 1,
    ]
    for step in range(1, 5):
        engine.step()
        assert counting.passes == step * (BLOCK - 1)
    assert (len(counting.read) == len(set(counting.read))) == (kind is DraftModelDrafter)


def test_long_prompts_are_read_in_chunks_and_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashdraft.models.target.PREFILL_CHUNK", 16)
    prompts = (tuple(3 + i * i % 50 for i in range(70)), PROMPTS[0])
    drafter = DraftModelDrafter(network(), drawn=False)
    engine = Engine(tiny_target("llama"), drafter, max_rows=2)
    assert [r.tokens for r in run(engine, requests_of(prompts, [GREEDY] * 2))] == plain(
        (GREEDY,) * 2, prompts
    )


def test_rows_that_join_and_leave_write_what_they_write_alone() -> None:
    limits = (14, 3, 9, 1, 12)
    prompts = (*PROMPTS, (50, 44))
    params = [
        replace(own, max_new_tokens=n)
        for own, n in zip((*KINDS["mixed"], GREEDY), limits, strict=True)
    ]
    for drawn in (False, True):
        drafter = DraftModelDrafter(network(), drawn=drawn)
        engine = Engine(tiny_target("llama"), drafter, max_rows=2)
        rounds = [[r.tokens for r in run(engine, requests_of(prompts, params))] for _ in range(3)]
        assert rounds[0] == rounds[1] == rounds[2]
        assert drafter.cache.lengths == [0, 0]
        assert not drafter._read
        fresh = [
            run(Engine(tiny_target("llama"), DraftModelDrafter(network(), drawn=drawn)), [r])[0]
            for r in requests_of(prompts, params)
        ]
        assert rounds[0] == [result.tokens for result in fresh]


def test_a_draft_that_failed_can_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = DraftModelDrafter(network())
    engine = Engine(tiny_target("llama"), drafter, max_rows=4)
    for request in requests_of(PROMPTS, KINDS["greedy"]):
        admit(engine, request)
    forward, calls = HFTarget.forward, [0]

    def fails_once(self: HFTarget, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryError
        return forward(self, *args)

    monkeypatch.setattr(HFTarget, "forward", fails_once)
    with pytest.raises(MemoryError):
        engine.step()
    rows = dict(engine.running)
    while engine.running:
        engine.step()
    assert [tuple(rows[i].history[len(prompt) :]) for i, prompt in enumerate(PROMPTS)] == plain(
        KINDS["greedy"]
    )


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("limit", [8, 12, 24, 25, 26, 27, 28, 256])
def test_a_row_beyond_the_networks_positions_goes_on_without_drafts(limit: int) -> None:
    small = network(True, max_position_embeddings=limit)  # its table of positions ends there
    results = texts(DraftModelDrafter(small, drawn=False), KINDS["mixed"], max_rows=3)
    assert [result.tokens for result in results] == plain(KINDS["mixed"])
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert (result.stats.num_drafted > 0) == (len(prompt) + BLOCK - 1 <= limit)
    drafter = DraftModelDrafter(small)
    sizes = drafter.propose(
        rows_of([[5] * (limit - BLOCK + 2), [5] * (limit - BLOCK + 3), [5]], SAMPLED), 9
    ).sizes
    assert sizes.tolist() == [BLOCK, 1, BLOCK]


def test_without_the_limit_a_block_beyond_the_positions_is_drafted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = network(True, max_position_embeddings=12)
    assert DraftModelDrafter(small).propose(rows_of([[5] * 12]), 9).sizes.tolist() == [1]
    monkeypatch.setattr(DraftModelDrafter, "_fits", lambda self, position, unread: True)
    assert DraftModelDrafter(small).propose(rows_of([[5] * 12]), 9).sizes.tolist() == [BLOCK]


def test_the_end_of_the_positions_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    drafter = DraftModelDrafter(network(True, max_position_embeddings=12))
    drafter.propose(rows_of([[5] * 8]), 9)
    assert not caplog.records
    for _ in range(2):
        drafter.propose(rows_of([[5] * 12]), 9)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["the draft model `small` has 12 positions: behind them nothing is drafted"]


def test_a_smaller_vocabulary_drafts_what_it_knows() -> None:
    """Rows of larger vocabularies are padding: the same tokenizer, other sizes of the embedding."""
    small = network(vocab_size=40)
    for drawn in (False, True):
        drafter = DraftModelDrafter(small, vocab_size=VOCAB, drawn=drawn)
        proposal = drafter.propose(rows_of([PROMPTS[0], [5, 40, 6], [5, 39]], SAMPLED), 9)
        assert proposal.sizes.tolist() == [BLOCK, 1, BLOCK]
        assert int(proposal.tokens.max()) < 40
        assert not drawn or float(proposal.probs[..., 40:].max()) == 0
        results = texts(DraftModelDrafter(small, vocab_size=VOCAB, drawn=drawn), KINDS["mixed"])
        assert drawn or [result.tokens for result in results] == plain(KINDS["mixed"])


# ---------------------------------------------------------------- tokenizers


@dataclass
class Words:
    words: list[str]

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def test_a_draft_with_another_tokenizer_is_refused_with_the_reason() -> None:
    target, small = tiny_target("llama"), network()
    check_tokenizers(letter_tokenizer(), letter_tokenizer(), target, small)
    check_tokenizers(Words(["a", "b"]), Words(["a", "b"]), target, network(vocab_size=40))
    with pytest.raises(
        DraftMismatch, match=r"token 1 is 'x' to `small`, but 'b' to `llama`"
    ) as raised:
        check_tokenizers(Words(["a", "b", "c"]), Words(["a", "x", "y"]), target, small)
    assert "smaller model of the family of `llama`" in str(raised.value.hint)
    with pytest.raises(
        DraftMismatch, match=r"token 0 is '\u2581a' to `small`, but '\u0120a' to `llama`"
    ):
        check_tokenizers(Words(["\u0120a", "b"]), Words(["\u2581a", "b"]), target, small)


@dataclass
class Vocabulary:
    ids: dict[str, int]

    def get_vocab(self) -> dict[str, int]:
        return self.ids


def test_tokens_that_one_of_the_two_lacks_do_no_harm_and_moved_ones_do() -> None:
    target, small = tiny_target("llama"), network()
    check_tokenizers(Words(["a", "b"]), Words(["a", "b", "[PAD2]"]), target, small)
    check_tokenizers(Words(["a", "b", "[PAD2]"]), Words(["a", "b"]), target, small)
    check_tokenizers(Words(["a"]), Words(["a"]), target, network(vocab_size=99))
    check_tokenizers(Vocabulary({"a": 0, "x": 7}), Vocabulary({"a": 0, "y": 8}), target, small)
    with pytest.raises(DraftMismatch, match=r"'b' is token 5 to `small`, but 1 to `llama`"):
        check_tokenizers(Vocabulary({"a": 0, "b": 1}), Vocabulary({"a": 0, "b": 5}), target, small)
    with pytest.raises(DraftMismatch, match="no token in common"):
        check_tokenizers(Vocabulary({"a": 0}), Vocabulary({"b": 1}), target, small)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_larger_vocabulary_drafts_nothing_that_the_target_lacks(drawn: bool) -> None:
    wide = network(vocab_size=99)
    proposal = DraftModelDrafter(wide, vocab_size=VOCAB, drawn=drawn).propose(
        rows_of(PROMPTS, SAMPLED), 9
    )
    uncut = DraftModelDrafter(wide, drawn=drawn).propose(rows_of(PROMPTS, SAMPLED), 9)
    assert int(proposal.tokens.max()) < VOCAB <= int(uncut.tokens.max())
    assert not drawn or proposal.probs.shape[-1] == VOCAB  # type: ignore[union-attr]
    results = texts(DraftModelDrafter(wide, vocab_size=VOCAB, drawn=drawn), KINDS["mixed"])
    assert drawn or [result.tokens for result in results] == plain(KINDS["mixed"])


# ---------------------------------------------------------------- the law of drawn drafts

RUNS, FEWER, LETTERS = 20_000, 4_000, 4
SEEN = 100  # chi-square above its degrees of freedom: at most 30 with the right rule
HOT = SamplingParams(temperature=1.0, max_new_tokens=9)
LAWS = {
    "plain": HOT,
    "top_k": replace(HOT, top_k=2),
    "top_p": replace(HOT, temperature=1.3, top_p=0.8),
}
JUMP = {1: 1.0, 2: 1.65, 3: 1.7, 4: 1.75}  # a second token is dear, more of them are not


@dataclass
class Alone:
    """The controller of many engines of one row each, new in every step."""

    seconds: dict[int, float]
    kind: type[Control] = Control

    def wants_drafts(self, rows: int, gain: float = 1.0) -> bool:
        return True

    def trim(self, proposal: Proposal) -> Tensor:
        names, known = (
            ("tokens", "parents", "sizes", "scores", "drawn"),
            dict[tuple[float, ...], Tensor](),
        )
        sizes, whole = [], [getattr(proposal, name) for name in names]
        for i, scores in enumerate(map(tuple, proposal.scores.tolist())):  # type: ignore[union-attr]
            if scores not in known:
                known[scores] = self.kind(self.seconds).trim(
                    Proposal(*(t[i : i + 1] for t in whole[:4]), drawn=whole[4][i : i + 1])
                )
            sizes.append(known[scores])
        return torch.cat(sizes)

    def learn(self, *_: Any) -> None:
        pass


@functools.cache
def known_law(logits: tuple[float, ...], *cuts: float) -> Tensor:
    return probabilities(torch.tensor(logits), SamplingParams(*cuts))  # type: ignore[arg-type]


def remembered(logits: Tensor, own: SamplingParams) -> Tensor:
    return known_law(tuple(logits.tolist()), own.temperature, own.top_k, own.top_p)


class Mute:
    """A decoder of no text."""

    text, stopped = "", False

    def push(self, token: int) -> str:
        return ""


def excess(
    patch: pytest.MonkeyPatch,
    kind: str = "plain",
    *,
    runs: int = FEWER,
    control: Any = None,
    drafter: Any = DraftModelDrafter,
) -> tuple[float, float]:
    """Chi-square of the first three tokens of seeded texts against the target's law: above its
    degrees of freedom, and p.

    Every text begins at token 0, in a row of its own of one engine.
    """
    target, params = Table(1, 1.5), LAWS[kind]
    patch.setattr(METHOD, "probabilities", remembered)  # for time
    patch.setattr(
        flashdraft.engine, "target_probs", lambda logits, own, sizes: probabilities(logits, params)
    )
    engine = Engine(target, drafter(Table(11, 1.5), block_size=4), max_rows=runs)  # type: ignore[arg-type]
    engine.control = control
    engine.drafter.cache.reserve(0, rows=runs)  # type: ignore[attr-defined]
    for seed in range(runs):
        engine.running[seed] = Request([0], replace(params, seed=seed), Mute(), history=[0])  # type: ignore[arg-type]
    counts, accepted = torch.zeros(LETTERS**3), 0
    while engine.running:
        engine.step()
        for slot in [slot for slot, request in engine.running.items() if len(request.history) > 3]:
            request = engine.running.pop(slot)
            a, b, c = request.history[1:4]
            counts[16 * a + 4 * b + c] += 1
            accepted += request.stats.num_accepted
    assert accepted > runs / 4
    expected = target.law(params, 3) * runs
    assert not counts[expected == 0].any()
    likely = expected > 0
    distance = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    degrees = int(likely.sum()) - 1
    return distance - degrees, float(stats.chi2.sf(distance, degrees))


@pytest.mark.parametrize("kind", LAWS)
def test_texts_with_drawn_drafts_have_the_law_of_the_target(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert excess(monkeypatch, kind, runs=RUNS)[1] > 1e-4


def test_texts_of_adaptive_length_have_the_law_of_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert excess(monkeypatch, runs=RUNS, control=Alone(JUMP))[1] > 1e-4


def argmax_as_if_drawn(laws: Tensor, level: Tensor) -> Tensor:
    return laws.argmax(-1)


class WrongPosition(DraftModelDrafter):
    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        proposal = super().propose(rows, max_nodes)
        law = proposal.probs.roll(1, dims=1)  # type: ignore[union-attr]
        law[law.sum(-1) == 0] = 1 / LETTERS
        return replace(proposal, probs=law)


class Uncut_law(DraftModelDrafter):  # noqa: N801
    """Judges by the law before the cuts what was drawn after them."""

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        proposal = super().propose(rows, max_nodes)
        return replace(proposal, probs=Table(11, 1.5).logits[proposal.tokens].softmax(-1).float())


class OwnScores(DraftModelDrafter):
    """Scores of the drawn tokens themselves."""

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        proposal = super().propose(rows, max_nodes)
        own = proposal.probs[:, :-1].gather(2, proposal.tokens[:, 1:, None])[..., 0]  # type: ignore[index]
        return replace(proposal, scores=torch.cat([torch.zeros_like(own[:, :1]), own.log()], 1))


class LooksAhead(Control):
    """Takes any node for the sake of those behind it, as is right for chosen ones."""

    def trim(self, proposal: Proposal) -> Tensor:
        return super().trim(replace(proposal, drawn=None))


def levels_of_the_target(
    seeds: Sequence[int], starts: Sequence[int], count: int, lane: int
) -> Tensor:
    return uniforms(seeds, [start - lane for start in starts], count)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], tuple[float, float]]] = {
    "an argmax judged as if drawn": lambda patch: (
        patch.setattr(METHOD, "draw", argmax_as_if_drawn),
        excess(patch),
    )[1],
    "the law of another position": lambda patch: excess(patch, drafter=WrongPosition),
    "the law before top-k": lambda patch: excess(patch, "top_k", drafter=Uncut_law),
    "the target's own uniforms": lambda patch: (
        patch.setattr(METHOD, "uniforms", levels_of_the_target),
        excess(patch),
    )[1],
    "trimmed by the token's own score": lambda patch: excess(
        patch, control=Alone(JUMP), drafter=OwnScores
    ),
    "trimmed for the sake of later nodes": lambda patch: excess(
        patch, control=Alone(JUMP, LooksAhead)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_of_the_law_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    distance, p = FAULTS[fault](monkeypatch)
    assert distance > SEEN, (distance, p)


def test_scores_are_known_before_the_tokens_are_drawn() -> None:
    """Another seed draws other tokens;
    where the text before a node is the same, so is its score.
    """
    histories = [PROMPTS[1]] * 40
    params = [replace(SAMPLED, temperature=2.0, seed=seed) for seed in range(40)]
    rows = Rows(list(range(40)), [list(h) for h in histories], params, [1] * 40)
    proposal = DraftModelDrafter(network()).propose(rows, BLOCK)
    by_text: dict[tuple[int, ...], set[float]] = {}
    for own, scores in zip(proposal.tokens.tolist(), proposal.scores.tolist(), strict=True):
        for node in range(1, BLOCK):
            by_text.setdefault(tuple(own[:node]), set()).add(round(scores[node], 5))
    assert all(len(values) == 1 for values in by_text.values())
    assert len({tuple(own) for own in proposal.tokens.tolist()}) > 20
    assert not math.isclose(min(map(min, by_text.values())), 0.0)
