"""Requests come and go at any step, beside any others: each writes what it writes alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from conftest import VOCAB
from toy_arrivals import METHODS, Crowd, alone, engine_of, request_of

from flashdraft.engine import Request
from flashdraft.models.cache import SlotCache
from flashdraft.scheduler import Scheduler
from flashdraft.types import SamplingParams

HEADS: tuple[tuple[int, ...], ...] = (
    (),
    tuple(range(3, 12)),
    tuple(3 + 7 * i % 50 for i in range(40)),
    tuple(3 + i * i % 50 for i in range(90)),
)
PARAMS = (
    SamplingParams(max_new_tokens=11, logprobs=True),
    SamplingParams(max_new_tokens=1),
    SamplingParams(max_new_tokens=6, temperature=0.8, seed=3, logprobs=True),
    SamplingParams(max_new_tokens=17, temperature=1.1, top_p=0.9, seed=7),
    SamplingParams(max_new_tokens=9, repetition_penalty=1.3, stop=("cd",)),
    SamplingParams(max_new_tokens=5, prompt_logprobs=True),
)
SHAPES: tuple[dict[str, Any], ...] = (
    {"max_rows": 1, "chunk": 64},
    {"max_rows": 2, "chunk": 3, "max_tokens": 420},
    {"max_rows": 3, "chunk": 1, "keeps": False},
    {"max_rows": 3, "chunk": 7, "max_tokens": 600},
    {"max_rows": 4, "chunk": 64, "spare": 2},
)


def crowd(luck: random.Random, count: int, num_owners: int = 2) -> list[Request]:
    """Prompts that often begin alike, also with a whole earlier prompt."""
    prompts: list[list[int]] = []
    requests = []
    for index in range(count):
        tail = [luck.randrange(3, VOCAB) for _ in range(luck.choice((1, 1, 3, 8)))]
        prompt = [*luck.choice(HEADS), *tail]
        if prompts and luck.random() < 0.4:
            prompt = luck.choice(prompts) + luck.choice(([], tail))
        prompts.append(prompt)
        owner = str(luck.randrange(num_owners))
        drafting = luck.choice(("auto", "auto", "on", "off"))
        params = luck.choice(PARAMS)
        requests.append(request_of(prompt, params, index, owner=owner, drafting=drafting))
    return requests


def check_crowd(
    name: str,
    method: str,
    shape: dict[str, Any],
    *,
    seed: int = 0,
    count: int = 12,
    cancel: float = 0.05,
    make: Callable[[Any], Any] = lambda drafter: drafter,
) -> int:
    """Returns how many tokens of prompts were not read anew."""
    luck = random.Random(seed)
    engine = engine_of(name, make(METHODS[method](name)), **shape)
    requests = crowd(luck, count)
    mine = Crowd(engine, luck)
    results = mine.run(requests, cancel=cancel)
    assert results.keys() | mine.cancelled == set(range(count))

    num_cached = 0
    for index, result in results.items():
        request = requests[index]
        where = (name, method, shape, index)
        wanted = alone(name, method, request)
        assert result.tokens == wanted.tokens, where
        assert result.text == wanted.text, where
        assert result.finish_reason == wanted.finish_reason, where
        check_numbers(name, result.logprobs, wanted.logprobs)
        if wanted.prompt_logprobs is not None:
            assert result.prompt_logprobs is not None
            own = [each.logprob for each in result.prompt_logprobs if each is not None]
            others = [each.logprob for each in wanted.prompt_logprobs if each is not None]
            assert len(own) == len(request.prompt) - 1
            check_numbers(name, own, others)
        num_cached += result.stats.num_cached
        assert result.stats.num_cached < len(request.prompt)

    engine.forget_kept()
    assert not any(engine._cache.lengths)
    for cache in engine.drafter.caches:
        assert not any(cache.lengths)
    return num_cached


def check_numbers(name: str, own: Sequence[float] | None, wanted: Sequence[float] | None) -> None:
    """Log-probabilities: bit for bit where the kernels are row-exact."""
    if own is None or wanted is None:
        assert own is wanted
    elif name == "native":
        assert list(own) == list(wanted)
    else:
        assert own == pytest.approx(wanted, abs=1e-9)


CASES = []
for number, method_name in enumerate(
    METHODS
):  # each method in three of the five, all of them often
    CASES += [(method_name, SHAPES[(number + turn) % len(SHAPES)]) for turn in (0, 2, 3)]


@pytest.mark.parametrize(("method", "shape"), CASES, ids=str)
def test_a_text_is_the_text_alone_bit_for_bit(method: str, shape: dict[str, Any]) -> None:
    num_cached = check_crowd("native", method, shape)
    if shape["max_rows"] > 1:
        assert (num_cached > 0) == shape.get("keeps", True)


@pytest.mark.parametrize("method", ["dflash tree", "eagle3", "draft_model drawn", "union"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "lean qwen3"])
def test_texts_of_other_targets_are_the_texts_alone(name: str, method: str) -> None:
    shape = SHAPES[3] if name != "gemma3" else SHAPES[1]
    assert check_crowd(name, method, shape, seed=5, count=8) > 0


def test_much_is_cancelled_and_nothing_of_it_stays() -> None:
    for seed in range(3):
        check_crowd("native", "dflash", SHAPES[3], seed=seed, count=20, cancel=0.5)


# ---- planted faults ------------------------------------------------------------------------------


def several() -> None:
    """A few crowds, of which some go wrong with a fault."""
    for seed in range(4):
        check_crowd("native", "dflash", {"max_rows": 3, "chunk": 7}, seed=seed)


def caught() -> None:
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        several()


def test_a_prefix_of_one_token_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Scheduler._longest_match

    def wrong(self: Any, request: Any) -> Any:
        match = right(self, request)
        if match.row not in self.kept or match.num_shared + 2 > len(request.prompt) - 1:
            return match
        return match._replace(
            num_shared=min(match.num_shared + 2, len(self.kept[match.row].tokens))
        )

    monkeypatch.setattr(Scheduler, "_longest_match", wrong)
    caught()


def test_a_copy_of_another_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SlotCache.take

    def wrong(self: SlotCache, row: int, source: int, count: int) -> None:
        right(self, row, row, 0)
        self.lengths[row] = count

    monkeypatch.setattr(SlotCache, "take", wrong)
    caught()


def test_what_lies_behind_the_prefix_in_a_row_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kept row that is taken over must be cut."""
    right = SlotCache.take

    def wrong(self: SlotCache, row: int, source: int, count: int) -> None:
        held = self.lengths[row]
        right(self, row, source, count)
        if row == source:
            self.lengths[row] = held

    monkeypatch.setattr(SlotCache, "take", wrong)
    caught()


def test_a_row_of_another_owner_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would change no text: what is taken over is counted."""
    prompt = [*HEADS[2], 5]
    for owner, num_cached in (("one", len(prompt) - 1), ("another", 0)):
        engine = engine_of("native", METHODS["dflash"]("native"), max_rows=2)
        Crowd(engine, random.Random(0)).run([request_of(prompt, PARAMS[0], 0, owner="one")])
        (result,) = (
            Crowd(engine, random.Random(0))
            .run([request_of(prompt, PARAMS[0], 1, owner=owner)])
            .values()
        )
        assert result.stats.num_cached == num_cached


# ---- the real model ------------------------------------------------------------------------------


@pytest.mark.real_model
def test_the_real_model_writes_what_it_writes_alone() -> None:
    """Talks of one system prompt, greedy and seeded, that come while others are read and run."""
    import flashdraft

    model = flashdraft.load("smollm2-135m")
    system = {"role": "system", "content": "You are a terse assistant. " * 12}
    asked = ["Why is the sky blue?", "Name three metals.", "Count from 1 to 9.", "What is rain?"]
    params = [
        SamplingParams(max_new_tokens=24, temperature=temperature, seed=seed, logprobs=True)
        for seed, temperature in enumerate((0.0, 0.9, 0.0, 1.0))
    ]
    requests = []
    wanted = []
    for index, (question, own) in enumerate(zip(asked, params, strict=True)):
        prompt = model.encode([system, {"role": "user", "content": question}])
        requests.append(model.request(prompt, own, index=index))
        wanted.append(model.generate(prompt, own))

    engine = model.engine(3)
    engine.scheduler.chunk = 50
    assert engine.scheduler.keeps
    results = Crowd(engine, random.Random(1)).run(requests)
    for index, result in results.items():
        assert result.tokens == wanted[index].tokens
        assert result.logprobs == wanted[index].logprobs
    assert results[3].stats.num_cached > 60
