"""What the tests of arrivals and of prefixes share: row-exact targets of toy size, a drafter of
every method, and an engine whose requests come and go by chance.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from conftest import (
    EOS,
    SHAPE,
    LetterTokenizer,
    requests_of,
    tiny_drafter,
    tiny_model,
    tiny_target,
)
from test_rivals import network
from transformers import LlamaConfig

from flashdraft.engine import Engine, Request
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.draft_model import DraftModelDrafter
from flashdraft.methods.prompt_lookup import PromptLookup
from flashdraft.methods.union import Union
from flashdraft.models.lean import LeanTarget
from flashdraft.models.target import Target
from flashdraft.scheduler import Scheduler
from flashdraft.types import Chunk, Drafter, Result, SamplingParams

NATIVE_SHAPE = {**SHAPE, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
LETTERS = LetterTokenizer()


@functools.cache
def native_target() -> LeanTarget:
    """By our kernels, which are row-exact: a text's bits do not depend on its neighbours."""
    model = tiny_model("llama", dtype=torch.float32, config=LlamaConfig(**NATIVE_SHAPE))
    target = LeanTarget(model, "native", kernel="compact")
    assert target.decoder.native
    assert target.row_exact
    return target


def target_of(name: str) -> Target:
    if name == "native":
        return native_target()
    return tiny_target(name.removeprefix("lean "), lean=name.startswith("lean "))


@functools.cache
def small_model(name: str) -> Target:
    """A draft LM that is often right: the target's own weights with some noise."""
    is_native = name == "native"
    config = LlamaConfig(**NATIVE_SHAPE if is_native else SHAPE)
    dtype = torch.float32 if is_native else torch.float64
    model = tiny_model("llama", dtype=dtype, config=config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.01 * parameter.std())
    return LeanTarget(model, "small", kernel="compact" if is_native else "torch")


def _draft_model(name: str, **options: Any) -> Drafter:
    return DraftModelDrafter(small_model(name), **options)


def _rival(name: str, method: str, **options: Any) -> Drafter:
    drafter: Drafter = network(method).drafters(target_of(name))(**options)
    return drafter


METHODS: dict[str, Callable[[str], Drafter]] = {
    "plain": lambda name: Autoregressive(),
    "dflash": lambda name: tiny_drafter(target_of(name)),
    "dflash tree": lambda name: tiny_drafter(target_of(name), tree_nodes=9),
    "eagle3": lambda name: _rival(name, "eagle3"),
    "eagle3 tree": lambda name: _rival(name, "eagle3", tree_nodes=9),
    "medusa": lambda name: _rival(name, "medusa"),
    "draft_model": lambda name: _draft_model(name, drawn=False),
    "draft_model drawn": lambda name: _draft_model(name, drawn=True),
    "prompt_lookup": lambda name: PromptLookup(block_size=4),
    "union": lambda name: Union(tiny_drafter(target_of(name)), PromptLookup()),
    "union of two caches": lambda name: Union(
        _rival(name, "eagle3"), _draft_model(name, drawn=False)
    ),
}
CHOSEN = [method for method in METHODS if method != "draft_model drawn"]


def engine_of(
    name: str, drafter: Drafter, *, max_rows: int = 1, control: Any = None, **options: Any
) -> Engine:
    """options: the scheduler's; rows are kept unless these say otherwise."""
    scheduler = Scheduler[Request](max_rows, **{"keeps": True, **options})
    return Engine(target_of(name), drafter, control=control, scheduler=scheduler)


def request_of(
    prompt: Sequence[int], params: SamplingParams, index: int = 0, **options: Any
) -> Request:
    """options: fields of Request."""
    (request,) = requests_of([prompt], [params], (EOS,), index)
    return replace(request, **options)


def alone(name: str, method: str, request: Request) -> Result:
    """What a fresh engine of one row writes. Drafts that are chosen change no text, so there the
    plain one is asked; drawn ones have a text of their own.
    """
    params = request.params
    is_drafted = request.drafting != "off" and params.temperature > 0
    is_drawn = method == "draft_model drawn" and is_drafted
    return _alone(name, tuple(request.prompt), params, method if is_drawn else "plain")


@functools.cache
def _alone(name: str, prompt: tuple[int, ...], params: SamplingParams, method: str) -> Result:
    engine = Engine(target_of(name), METHODS[method](name))
    return run(engine, [request_of(prompt, params)])[0]


def run(engine: Engine, requests: Iterable[Request]) -> list[Result]:
    """Every result, in the order in which requests came."""
    wanted = list(requests)
    results: dict[int, Result] = {}
    for request in wanted:
        engine.submit(request)
    while engine.has_work:
        for chunk in engine.step():
            if chunk.error is not None:
                raise chunk.error
            if chunk.result is not None:
                results[chunk.index] = chunk.result
    return [results[request.index] for request in wanted]


def check_caches(engine: Engine) -> None:
    """The target's cache holds what is read; a drafter's holds no more than that."""
    scheduler = engine.scheduler
    held = dict.fromkeys(range(scheduler.num_rows), 0)
    for row, own in scheduler.reading.items():
        held[row] = own.num_read
    for row, request in scheduler.running.items():
        held[row] = len(request.history) - 1
    for row, kept in scheduler.kept.items():
        held[row] = len(kept.tokens)
    assert engine._cache.lengths == list(held.values())
    for row in set(held) - scheduler.requests().keys() - scheduler.kept.keys():
        for cache in engine.drafter.caches:
            assert row >= cache.rows or cache.lengths[row] == 0
    assert engine._ended.keys() == scheduler.kept.keys()
    assert engine._unseen.keys() <= scheduler.running.keys()


@dataclass
class Crowd:
    """Requests that come, and some of which go, at random steps of one engine."""

    engine: Engine
    luck: random.Random
    cancelled: set[int] = field(default_factory=set)
    chunks: dict[int, list[Chunk]] = field(default_factory=dict)

    def run(self, requests: Sequence[Request], *, cancel: float = 0.0) -> dict[int, Result]:
        """Results by index, of all that were not cancelled."""
        coming = list(requests)
        results: dict[int, Result] = {}
        unfinished: list[int] = []
        while coming or self.engine.has_work:
            for _ in range(self.luck.choice((0, 0, 1, 1, 3))):
                if coming:
                    request = coming.pop(0)
                    self.engine.submit(request)
                    unfinished.append(request.index)
            if unfinished and self.luck.random() < cancel:
                index = unfinished.pop(self.luck.randrange(len(unfinished)))
                self.engine.cancel(index)
                self.cancelled.add(index)
            check_caches(self.engine)
            for chunk in self.engine.step():
                assert chunk.error is None, chunk.error
                assert chunk.index not in self.cancelled
                self.chunks.setdefault(chunk.index, []).append(chunk)
                if chunk.result is not None:
                    unfinished.remove(chunk.index)
                    results[chunk.index] = chunk.result
        check_caches(self.engine)
        return results
