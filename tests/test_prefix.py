"""The prefix cache: a text that begins as another did is as good as a fresh one, drafts included.

As good means equal: tokens, text, accepted lengths, and every draft with its score.
"""

from __future__ import annotations

import random
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from toy_arrivals import METHODS, Crowd, check_caches, engine_of, request_of, run, target_of

from flashdraft.engine import Engine, Request
from flashdraft.errors import UnusableLogits
from flashdraft.methods.dflash import DFlashDrafter
from flashdraft.methods.eagle3 import Eagle3Drafter
from flashdraft.models.cache import SlotCache
from flashdraft.types import Chunk, Proposal, Result, Rows, SamplingParams

TALKS = [("native", method) for method in METHODS]
TALKS += [("llama", method) for method in ("dflash tree", "eagle3", "draft_model")]
TALKS += [("gemma3", "dflash"), ("mistral-sliding", "eagle3 tree"), ("lean qwen3", "union")]
PROMPT = tuple(3 + 7 * i % 50 for i in range(30))
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, seed=4)
QUESTION = (11, 5, 40)


@dataclass
class Noted:
    """A drafter whose drafts are noted: by history, the tokens behind it and how sure they are."""

    inner: Any
    drafts: dict[tuple[int, ...], tuple[list[int], list[float]]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        proposal: Proposal = self.inner.propose(rows, max_nodes)
        sizes = proposal.sizes.tolist()
        for row, (history, size) in enumerate(zip(rows.histories, sizes, strict=True)):
            nodes = slice(1, size)
            scores = [] if proposal.scores is None else proposal.scores[row, nodes].tolist()
            self.drafts[tuple(history)] = (proposal.tokens[row, nodes].tolist(), scores)
        return proposal


class Pair:
    """One engine whose rows are used again, and a fresh one for every request."""

    def __init__(self, name: str, method: str, **options: Any) -> None:
        self.name = name
        self.method = method
        self.drafter = Noted(METHODS[method](name))
        self.engine = engine_of(name, self.drafter, **{"max_rows": 3, "chunk": 7, **options})

    def fresh(self, request: Request) -> tuple[Result, Noted]:
        drafter = Noted(METHODS[self.method](self.name))
        engine = engine_of(self.name, drafter, keeps=False)
        own = request_of(request.prompt, request.params, request.index, drafting=request.drafting)
        return run(engine, [own])[0], drafter

    def check(self, requests: Sequence[Request], results: Sequence[Result]) -> None:
        """Text, drafts with their scores, and accepted lengths are those of fresh rows."""
        check_caches(self.engine)
        for request, result in zip(requests, results, strict=True):
            where = (self.name, self.method, request.index)
            wanted, noted = self.fresh(request)
            assert result.tokens == wanted.tokens, where
            assert result.text == wanted.text, where
            if request.drafting == "off":
                continue
            assert result.stats.accepted_lengths == wanted.stats.accepted_lengths, where
            assert result.stats.tau == wanted.stats.tau
            assert result.stats.num_drafted == wanted.stats.num_drafted
            for history, (tokens, scores) in noted.drafts.items():
                own_tokens, own_scores = self.drafter.drafts[history]
                count = len(tokens)  # neighbours with more tokens left let it draft more
                assert own_tokens[:count] == tokens, where
                assert own_scores[: len(scores)] == pytest.approx(scores, abs=1e-5), where

    def run(self, *requests: Request) -> list[Result]:
        results = run(self.engine, requests)
        self.check(requests, results)
        return results

    def until(self, wanted: Callable[[Engine], bool]) -> list[Chunk]:
        """Step until something is so."""
        chunks = []
        for _ in range(100):
            if wanted(self.engine):
                return chunks
            chunks += self.engine.step()
        raise AssertionError("it never came to that")

    def finish(self) -> dict[int, Result]:
        found = {}
        while self.engine.has_work:
            for chunk in self.engine.step():
                assert chunk.error is None, chunk.error
                if chunk.result is not None:
                    found[chunk.index] = chunk.result
        return found


def turns(pair: Pair, params: SamplingParams = GREEDY) -> None:
    """A talk of three turns, each of which costs its new tokens only."""
    history: tuple[int, ...] = PROMPT
    held = 0
    for index in range(3):
        (result,) = pair.run(request_of(history, params, index))
        assert result.stats.num_cached == max(held - 1, 0)
        held = len(history) + len(result.tokens) - 1  # all but the last token
        history = (*history, *result.tokens, *QUESTION)


@pytest.mark.parametrize(("name", "method"), TALKS)
def test_a_talk_goes_on_as_if_it_were_read_anew(name: str, method: str) -> None:
    turns(Pair(name, method))


@pytest.mark.parametrize("method", METHODS)
def test_a_seeded_talk_goes_on_as_if_it_were_read_anew(method: str) -> None:
    turns(Pair("native", method), SAMPLED)


@pytest.mark.parametrize("method", METHODS)
def test_a_system_prompt_is_read_once(method: str) -> None:
    pair = Pair("native", method)
    pair.run(request_of([*PROMPT, 9, 8], GREEDY))
    for index, tail in enumerate(((4, 4), (5,), (9, 8, 7)), 1):
        (result,) = pair.run(request_of([*PROMPT, *tail], GREEDY, index))
        assert result.stats.num_cached >= len(PROMPT) - 1


@pytest.mark.parametrize("method", METHODS)
def test_answers_to_one_prompt_read_it_once(method: str) -> None:
    """The others are copied while the first is read or runs, before its drafter knows all of it."""
    pair = Pair("native", method, max_rows=4)
    requests = [
        request_of(PROMPT, replace(SAMPLED, seed=seed), seed, drafting=drafting)
        for seed, drafting in enumerate(("off", "auto", "on", "auto", "off", "auto"))
    ]
    results = pair.run(*requests)
    assert [result.stats.num_cached > 0 for result in results] == [False] + [True] * 5
    num_read = sum(len(PROMPT) - result.stats.num_cached for result in results)
    assert num_read <= len(PROMPT) + 5 * 17


@pytest.mark.parametrize("method", METHODS)
def test_a_running_row_gives_what_its_drafter_has_not_seen_yet(method: str) -> None:
    pair = Pair("native", method)
    first = request_of(PROMPT, GREEDY, 0, drafting="off")
    pair.engine.submit(first)
    pair.until(lambda engine: len(first.history) > len(PROMPT) + 6)
    second = request_of([*first.history[:-2], 3], GREEDY, 1)
    pair.engine.submit(second)
    results = pair.finish()
    assert results[1].stats.num_cached == len(second.prompt) - 2
    pair.check([first, second], [results[0], results[1]])


@pytest.mark.parametrize("method", METHODS)
def test_texts_that_end_within_a_block_are_taken_over(method: str) -> None:
    """By a stop string, or by an end of text, at every place."""
    pair = Pair("native", method)
    whole = pair.run(request_of(PROMPT, GREEDY))[0].tokens
    for index, place in enumerate(range(1, 9), 1):
        ending = request_of(PROMPT, replace(GREEDY, ignore_eos=False), index)
        ending = replace(ending, eos=frozenset({whole[place]}))
        (ended,) = run(pair.engine, [ending])
        assert ended.tokens == whole[: whole.index(whole[place]) + 1]
        (result,) = pair.run(request_of([*PROMPT, *ended.tokens, *QUESTION], GREEDY, 100 + index))
        assert result.stats.num_cached >= len(PROMPT) + len(ended.tokens) - 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how_far", ["in the prompt", "in the text"])
def test_a_cancelled_row_is_taken_over(method: str, how_far: str) -> None:
    pair = Pair("native", method)
    first = request_of([*PROMPT, 7], GREEDY, 0)
    pair.engine.submit(first)
    if how_far == "in the prompt":
        pair.until(
            lambda engine: any(own.num_read > 9 for own in engine.scheduler.reading.values())
        )
    else:
        pair.until(lambda engine: len(first.history) > len(first.prompt) + 3)
    pair.engine.cancel(0)
    check_caches(pair.engine)
    (result,) = pair.run(request_of([*PROMPT, 8], GREEDY, 1))
    assert result.stats.num_cached >= 12


@pytest.mark.parametrize("name", ["native", "llama"])
def test_plain_steps_between_drafted_ones_leave_drafts_as_they_are(name: str) -> None:
    """A controller that says no for a while, and a row that begins with such a text."""

    class SaysNo:
        says = False

        def begin(self) -> None: ...

        def wants_drafts(self, rows: int, gain: float = 1.0) -> bool:
            return self.says

        def trim(self, proposal: Proposal) -> Any:
            return proposal.sizes

        def learn(self, *_: Any) -> None: ...

    for method in ("dflash", "eagle3", "medusa", "union of two caches"):
        control = SaysNo()
        pair = Pair(name, method, control=control)
        first = request_of(PROMPT, GREEDY, 0)
        (result,) = run(pair.engine, [first])
        assert result.stats.num_drafted == 0
        control.says = True
        (second,) = pair.run(request_of([*PROMPT, *result.tokens, 4], GREEDY, 1))
        assert second.stats.num_cached == len(PROMPT) + len(result.tokens) - 2


# ---- what the prompt's own tokens are worth ------------------------------------------------------


@pytest.mark.parametrize("name", ["native", "llama", "gemma3"])
@pytest.mark.parametrize("chunk", [3, 64])
def test_the_log_probabilities_of_a_prompt_are_the_targets_own(name: str, chunk: int) -> None:
    pair = Pair(name, "dflash", chunk=chunk)
    run(pair.engine, [request_of(PROMPT, GREEDY)])
    params = replace(GREEDY, prompt_logprobs=True, logprobs=True, top_logprobs=3)
    (result,) = run(pair.engine, [request_of(PROMPT, params, 1)])
    assert result.stats.num_cached == 0  # what is taken over has no logits any more

    target = target_of(name)
    cache = target.new_cache(1, 64)
    states, _ = target.read(cache, [0], [torch.tensor(PROMPT)], ())
    with torch.inference_mode():
        laws = target.lm_head(states[0]).double().log_softmax(-1)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    for place, own in enumerate(result.prompt_logprobs[1:], 1):
        assert own is not None
        law = laws[place - 1]
        assert own.token == PROMPT[place]
        assert own.logprob == pytest.approx(float(law[own.token]), abs=1e-4)
        best = law.topk(3)
        assert [token for token, _ in own.top] == best.indices.tolist()
        assert [value for _, value in own.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    (again,) = run(pair.engine, [request_of(PROMPT, replace(GREEDY, logprobs=True), 2)])
    assert again.stats.num_cached == len(PROMPT) - 1
    assert again.logprobs == pytest.approx(result.logprobs, abs=1e-5)


# ---- what must leave nothing ---------------------------------------------------------------------


def test_a_row_without_a_law_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in its own row, nor in one that would begin with it."""
    pair = Pair("lean qwen3", "dflash")
    right = pair.engine.target._read
    bad = 59

    def poisoned(cache: SlotCache, slots: Any, tokens: Any, *rest: Any) -> Any:
        hidden, features = right(cache, slots, tokens, *rest)
        for row, slot in enumerate(slots):
            if bad in tokens[row].tolist():
                hidden[row] = torch.nan
                for tensor in cache._tensors():
                    tensor[slot].fill_(torch.nan)
        return hidden, features

    with monkeypatch.context() as patch:
        patch.setattr(pair.engine.target, "_read", poisoned)
        for index, prompt in enumerate(([*PROMPT, bad, *PROMPT], [*PROMPT, bad, *PROMPT])):
            pair.engine.submit(request_of(prompt, GREEDY, index))
        chunks = []
        while pair.engine.has_work:
            chunks += pair.engine.step()
    assert [type(chunk.error) for chunk in chunks] == [UnusableLogits] * 2
    assert not pair.engine.scheduler.kept
    (result,) = pair.run(request_of(PROMPT, GREEDY, 5))
    assert result.stats.num_cached == 0


def broken(kind: type[BaseException]) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise kind("on purpose")

    return fails


@pytest.mark.parametrize("where", ["resume", "observe", "propose", "forward", "keep", "lm_head"])
@pytest.mark.parametrize(
    ("method", "kind"), [("dflash", KeyboardInterrupt), ("union of two caches", MemoryError)]
)
def test_a_step_that_breaks_off_leaves_no_row_half_done(
    method: str, where: str, kind: type[BaseException]
) -> None:
    """Whoever goes on afterwards, and whoever begins with what is kept, writes the right text."""
    for when in range(2):
        pair = Pair("lean llama", method, chunk=16)
        run(pair.engine, [request_of(PROMPT, GREEDY, 0)])
        running = request_of([9, 9, *PROMPT[:8]], GREEDY, 1)
        pair.engine.submit(running)
        pair.until(lambda engine: bool(engine.running))
        coming = request_of([*PROMPT, 4, 4], GREEDY, 2)
        pair.engine.submit(coming)

        owner: Any = pair.drafter.inner
        if where in ("forward", "lm_head"):
            owner = pair.engine.target
        if where == "keep":
            owner = pair.engine._cache
        right = getattr(owner, where)
        calls = [when]

        def sometimes(*args: Any, right: Any = right, calls: list[int] = calls) -> Any:
            calls[0] -= 1
            if calls[0] == -1:
                raise kind("on purpose")
            return right(*args)

        results: dict[int, Result] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, where, sometimes)
            for _ in range(40):
                try:
                    chunks = pair.engine.step()
                except (MemoryError, KeyboardInterrupt):
                    continue
                for chunk in chunks:
                    if chunk.result is not None:
                        results[chunk.index] = chunk.result
        assert not pair.engine.has_work
        for request in (running, coming):
            if request.index in results:
                wanted, _ = pair.fresh(request)
                assert results[request.index].tokens == wanted.tokens, (where, when)
        later = [
            request_of([*PROMPT, 4, 4, 7], GREEDY, 3),
            request_of([9, 9, *PROMPT[:8], 9], GREEDY, 4),
            request_of([*PROMPT, 5], GREEDY, 5),
        ]
        for request, result in zip(later, run(pair.engine, later), strict=True):
            wanted, _ = pair.fresh(request)
            assert result.tokens == wanted.tokens, (where, when)
        check_caches(pair.engine)


def test_a_drafter_that_cannot_begin_a_row_fails_that_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = Pair("native", "dflash")
    run(pair.engine, [request_of(PROMPT, GREEDY, 0)])
    other = request_of([7, 8, 9], GREEDY, 1)
    pair.engine.submit(other)
    pair.until(lambda engine: bool(engine.running))
    with monkeypatch.context() as patch:
        patch.setattr(DFlashDrafter, "resume", broken(MemoryError))
        pair.engine.submit(request_of([*PROMPT, 4], GREEDY, 2))
        chunks = pair.engine.step()
    assert [type(chunk.error) for chunk in chunks if chunk.index == 2] == [MemoryError]
    pair.check([other], [pair.finish()[1]])


def test_a_drafter_that_cannot_follow_does_not_stop_a_cancel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = Pair("native", "dflash")
    request = request_of(PROMPT, GREEDY, 0, drafting="off")
    pair.engine.submit(request)
    pair.until(lambda engine: len(request.history) > len(PROMPT) + 2)
    with monkeypatch.context() as patch:
        patch.setattr(DFlashDrafter, "observe", broken(MemoryError))
        pair.engine.cancel(0)
    check_caches(pair.engine)
    assert not pair.engine.has_work
    (result,) = pair.run(request_of(PROMPT, GREEDY, 1))
    assert result.stats.num_cached == 0


# ---- short prompts, full contexts, few rows ------------------------------------------------------


@pytest.mark.parametrize("method", ["dflash", "eagle3 tree", "medusa", "draft_model"])
def test_prompts_of_one_token_and_answers_of_one(method: str) -> None:
    pair = Pair("native", method)
    one = replace(GREEDY, max_new_tokens=1)
    pair.run(*[request_of([5], one, index) for index in range(4)])
    pair.run(*[request_of([5], GREEDY, index) for index in range(4, 8)])
    pair.run(*[request_of([5, 6], one, index) for index in range(8, 10)])


@pytest.mark.parametrize("name", ["native", "llama", "gemma3"])
def test_a_text_may_fill_the_context_beside_others(name: str) -> None:
    length = target_of(name).context_length
    pair = Pair(name, "dflash", chunk=2 * length)
    prompt = [3 + i * i % 50 for i in range(length - 5)]
    full = replace(GREEDY, max_new_tokens=5)
    pair.run(
        request_of(prompt, full, 0), request_of([5, 6], GREEDY, 1), request_of(PROMPT, GREEDY, 2)
    )
    (result,) = pair.run(request_of([*prompt[:-1], 7], full, 3))
    assert result.stats.num_cached > length - 30


def test_compiled_rows_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static caches, whose last slots take what padding writes."""
    from conftest import tiny_model

    from flashdraft.models import compiled
    from flashdraft.models.lean import LeanTarget

    monkeypatch.setattr(compiled.torch, "compile", lambda function, **_: function)
    target = LeanTarget(tiny_model("llama"), "compiled", kernel="compiled")
    made: dict[str, Any] = {}
    for kind in ("used", "fresh"):
        engine = engine_of("llama", METHODS["prompt_lookup"]("llama"), max_rows=3, chunk=7)
        made[kind] = Engine(target, METHODS["prompt_lookup"]("llama"), scheduler=engine.scheduler)
    made["used"].prepare(200)
    prompts = [PROMPT, (*PROMPT, 4), (*PROMPT, 4, 9), (5, 6)]
    requests = [request_of(prompt, GREEDY, index) for index, prompt in enumerate(prompts)]
    results = Crowd(made["used"], random.Random(0)).run(requests)
    for index, prompt in enumerate(prompts):
        made["fresh"].forget_kept()
        (wanted,) = run(made["fresh"], [request_of(prompt, GREEDY, index)])
        assert results[index].tokens == wanted.tokens


# ---- memory --------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that lie in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_room_that_is_needed_is_given_back_to_the_system() -> None:
    cache = SlotCache(2, 4, 4096, blocked=True)
    keys = torch.ones(4, 4096, 64)
    for row in range(4):
        for layer in range(2):
            cache.write(layer, row, keys, keys)
        cache.keep(row, range(4096))
    row_nbytes = cache.nbytes // 4
    before = resident()
    for row in (1, 2):
        cache.free(row)
        cache.give_back(row)
    assert before - resident() > 2 * 0.9 * row_nbytes
    for row in (0, 3):
        for tensor in cache._tensors():
            assert bool((tensor[row] == 1).all())


def test_kept_rows_go_when_their_room_is_needed() -> None:
    pair = Pair("native", "dflash", max_rows=4, max_tokens=330)
    for index in range(4):
        pair.run(request_of([index + 3, *PROMPT], GREEDY, index))
    assert pair.engine.scheduler.num_kept <= 330
    long = request_of([9, *range(3, 53), *range(3, 53)], replace(GREEDY, max_new_tokens=100), 9)
    pair.engine.submit(long)
    pair.engine.step()
    scheduler = pair.engine.scheduler
    assert scheduler.num_promised + scheduler.num_kept <= 330
    check_caches(pair.engine)
    assert pair.engine.token_nbytes > 0
    pair.engine.cancel(9)
    pair.engine.forget_kept()
    assert pair.engine._cache.lengths == [0] * 4


# ---- planted faults ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["keep", "resume"])
def test_rows_that_a_broken_step_left_half_done_are_seen(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "_changed", lambda self, before: [])
    with pytest.raises((AssertionError, RuntimeError)):
        test_a_step_that_breaks_off_leaves_no_row_half_done("dflash", where, KeyboardInterrupt)


def test_a_drafter_whose_context_is_not_taken_over_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forgets(self: Any, source: int, slot: int, count: int) -> int:
        self.cache.reserve(0, rows=max(source, slot) + 1)
        self.cache.free(slot)
        return count

    monkeypatch.setattr(DFlashDrafter, "resume", forgets)
    with pytest.raises(AssertionError):
        turns(Pair("native", "dflash"))


def test_a_pair_that_is_not_forgotten_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def keeps_its_state(self: Any, source: int, slot: int, count: int) -> int:
        held: int = self.cache.resume(slot, source, count)
        if source in self._states:
            self._states[slot] = self._states[source]
        return held

    monkeypatch.setattr(Eagle3Drafter, "resume", keeps_its_state)
    with pytest.raises((AssertionError, RuntimeError)):
        turns(Pair("native", "eagle3"))


def test_what_a_drafter_has_not_seen_must_be_shown_first(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Engine._observe

    def late(self: Engine, slots: Sequence[int]) -> None:
        if len(slots) == 1 and self.scheduler.reading:
            return
        right(self, slots)

    monkeypatch.setattr(Engine, "_observe", late)
    with pytest.raises(AssertionError):
        test_a_running_row_gives_what_its_drafter_has_not_seen_yet("dflash")
