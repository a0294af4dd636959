"""The law of the engine: a text is the plain text, token for token, whatever drafts and whoever
sits in the batch; sampled from drawn nodes, its law is the target's own. Wrong rules are planted
and must be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Table, requests_of
from scipy import stats
from torch import Tensor
from toy_engine import (
    BLOCKS,
    CHOSEN,
    GREEDY,
    LETTERS,
    METHODS,
    NEW,
    PROMPTS,
    SAMPLED,
    TARGETS,
    Witness,
    check_law,
    generate,
    made,
    plain,
    run,
)

import flashdraft.engine
from flashdraft.decoding.sampling import uniforms
from flashdraft.decoding.text import TextDecoder
from flashdraft.engine import Engine, Request
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.models.cache import SlotCache
from flashdraft.types import Proposal, Rows, SamplingParams, Verdict

# The law.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TARGETS)
def test_greedy_text_is_the_plain_text(name: str, method: str) -> None:
    if method == "autoregressive":
        check_law(name, method, blocks=(1,))
    elif name in ("llama", "gemma3", "lean qwen3") or method in ("cheater", "tree", "drawn"):
        check_law(name, method)
    else:  # nearly nothing of these drafts is accepted, which makes the texts long in coming
        check_law(name, method, blocks=(7,))


@pytest.mark.parametrize("method", CHOSEN)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "lean qwen3"])
def test_seeded_sampled_text_is_the_plain_sampled_text(name: str, method: str) -> None:
    check_law(name, method, SAMPLED, blocks=(4,))


@pytest.mark.parametrize("method", ["quoting", "cheater", "tree", "drawn"])
def test_the_drafters_of_the_tests_have_tokens_accepted_and_rejected(method: str) -> None:
    """Otherwise the tests above would show nothing."""
    results = [
        result
        for block in BLOCKS
        for result in generate("llama", method, PROMPTS, (GREEDY,) * 3, block)[0]
    ]
    drafted, accepted = (
        sum(getattr(r.stats, n) for r in results) for n in ("num_drafted", "num_accepted")
    )
    assert 0.03 < accepted / drafted < 0.97


def test_the_plain_texts_differ_by_prompt_and_by_sampling() -> None:
    texts = {plain("llama", prompt, params) for prompt in PROMPTS for params in (GREEDY, *SAMPLED)}
    assert len(texts) == 12
    assert min(len(set(text)) for text in texts) > 4


@pytest.mark.parametrize("method", ["cheater", "tree", "dflash"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "lean qwen3"])
def test_a_drafter_observes_what_was_committed_with_the_targets_own_features(
    name: str, method: str
) -> None:
    check_observations(name, method)


def check_observations(name: str, method: str) -> None:
    texts = [prompt + plain(name, prompt) for prompt in PROMPTS]
    inner = METHODS[method](made(name), texts, 5)
    layers = inner.layers or (0, 2, 4)
    witness = Witness(inner if method != "dflash" else Autoregressive(), made(name), layers)
    ends = [text[-NEW:][k] for k, text in enumerate(texts, 4)]
    for eos in ((), ends):
        run(Engine(made(name), witness, max_rows=2), requests_of(PROMPTS, (GREEDY,) * 3, eos))
        assert not witness.tokens


# Planted faults of the law.


def accept_everything(proposal: Proposal, law: Tensor, *_: Any) -> Verdict:
    nodes, last = torch.arange(proposal.num_nodes), proposal.sizes - 1
    path = torch.where(nodes < proposal.sizes[:, None], nodes, -1)
    bonus = law[torch.arange(len(last)), last]
    return Verdict(path, last, bonus if bonus.ndim == 1 else bonus.argmax(-1))


def forget_to_cut(patch: pytest.MonkeyPatch) -> None:
    write, keep, written = SlotCache.write, SlotCache.keep, [0]

    def noting(
        self: SlotCache, index: int, row: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        written[0] = keys.shape[1]
        return write(self, index, row, keys, values)

    patch.setattr(SlotCache, "write", noting)
    patch.setattr(SlotCache, "keep", lambda self, row, path: keep(self, row, range(written[0])))


def forget_to_move(patch: pytest.MonkeyPatch) -> None:
    keep = SlotCache.keep
    patch.setattr(SlotCache, "keep", lambda self, row, path: keep(self, row, range(len(path))))


def key_by_step(patch: pytest.MonkeyPatch) -> None:
    """Draws that belong to the place in the step, not to the position in the text."""
    patch.setattr(
        flashdraft.engine,
        "uniforms",
        lambda seeds, starts, count: uniforms(seeds, [len(seeds)] * len(seeds), count),
    )


def one_for_all(patch: pytest.MonkeyPatch) -> None:
    laws = flashdraft.engine.target_probs
    patch.setattr(
        flashdraft.engine,
        "target_probs",
        lambda logits, params, sizes: laws(logits, params[:1] * len(params), sizes),
    )


def observe_the_first_nodes(patch: pytest.MonkeyPatch) -> None:
    collect = Engine._collect

    def first(
        self: Engine, slots: list[int], proposal: Proposal, features: Tensor, paths: list[list[int]]
    ) -> None:
        collect(self, slots, proposal, features, [list(range(len(path))) for path in paths])

    patch.setattr(Engine, "_collect", first)


def roll_features(patch: pytest.MonkeyPatch) -> None:
    """Tokens right, features of the node before."""
    collect = Engine._collect

    def late(
        self: Engine, slots: list[int], proposal: Proposal, features: Tensor, paths: list[list[int]]
    ) -> None:
        collect(self, slots, proposal, features.roll(1, dims=1), paths)

    patch.setattr(Engine, "_collect", late)


def count_what_was_cut(patch: pytest.MonkeyPatch) -> None:
    account = flashdraft.engine._account

    def whole(request: Request, num_drafted: int, num_committed: int) -> None:
        account(request, num_drafted, num_drafted + 1)

    patch.setattr(flashdraft.engine, "_account", whole)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = {
    "everything is accepted": (
        lambda patch: patch.setattr(flashdraft.engine, "follow", accept_everything),
        lambda: check_law("llama", "cheater"),
    ),
    "everything is accepted, sampled": (
        lambda patch: patch.setattr(flashdraft.engine, "verify", accept_everything),
        lambda: check_law("llama", "cheater", SAMPLED),
    ),
    "a random draft is accepted": (
        lambda patch: patch.setattr(flashdraft.engine, "follow", accept_everything),
        lambda: check_law("llama", "dflash"),
    ),
    "the cache is not cut": (forget_to_cut, lambda: check_law("llama", "cheater")),
    "the cache is not cut, lean": (forget_to_cut, lambda: check_law("lean llama", "cheater")),
    "the path is not moved": (forget_to_move, lambda: check_law("llama", "tree")),
    "draws are keyed by step": (key_by_step, lambda: check_law("llama", "cheater", SAMPLED)),
    "one row's sampling for all": (one_for_all, lambda: check_law("llama", "cheater", SAMPLED)),
    "the first nodes are observed": (
        observe_the_first_nodes,
        lambda: check_observations("llama", "tree"),
    ),
    "features are one node late": (roll_features, lambda: check_observations("llama", "cheater")),
    "cut tokens are counted": (count_what_was_cut, lambda: check_law("llama", "cheater")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = FAULTS[fault]
    plain("llama", PROMPTS[0])  # what is right is known before the fault is planted
    for name in ("llama", "lean llama"):
        for params in ((GREEDY,) * 3, SAMPLED):
            [plain(name, prompt, own) for prompt, own in zip(PROMPTS, params, strict=True)]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


# The law of sampled text with drawn nodes.


@dataclass
class DrawnTable:
    """Two drawn siblings and a drawn child of the first, from a draft that is wrong."""

    name: str = "drawn"
    layers: tuple[int, ...] = ()
    caches: tuple[SlotCache, ...] = ()

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(2)
        self.table = torch.randn(4, 4, generator=self.generator, dtype=torch.float64).softmax(-1)

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        anchors = torch.tensor(rows.anchors)
        pair = torch.multinomial(self.table[anchors], 2, generator=self.generator)
        child = torch.multinomial(self.table[pair[:, 0]], 1, generator=self.generator)
        tokens = torch.cat([anchors[:, None], pair, child], 1)
        parents = torch.tensor([[-1, 0, 0, 1]]).expand(len(tokens), -1)
        drawn = torch.tensor([[False, True, True, True]]).expand(len(tokens), -1)
        return Proposal(
            tokens, parents, torch.full((len(tokens),), 4), probs=self.table[tokens], drawn=drawn
        )

    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        pass

    def end(self, rows: Rows) -> None:
        pass


NUM_TEXTS = 4000


def chi_square() -> tuple[float, int]:
    """Of the first three tokens of texts against the target's own law, with its degrees of freedom;
    fixed seeds.

    The first token comes with the prompt. The others are judged in whole trees, as the texts could
    go on.
    """
    target, counts = Table(1, 1.0), torch.zeros(4**3)
    engine = Engine(target, DrawnTable(), max_rows=500)
    waiting = [
        Request(
            [0],
            SamplingParams(temperature=1.0, seed=seed, max_new_tokens=9),
            TextDecoder(LETTERS),
            index=seed,
        )
        for seed in range(NUM_TEXTS)
    ]
    for request in waiting:
        engine.submit(request)
    while engine.has_work:
        engine.step()
        for request in [request for request in engine.running.values() if len(request.history) > 3]:
            a, b, c = request.history[1:4]
            counts[16 * a + 4 * b + c] += 1
            engine.cancel(request.index)
    expected = target.law(SamplingParams(temperature=1.0), 3) * NUM_TEXTS
    assert float(expected.min()) > 5
    return float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1


def test_texts_with_drawn_drafts_have_the_targets_law() -> None:
    distance, degrees = chi_square()
    assert distance < stats.chi2.ppf(1 - 1e-4, degrees)


def coins_that_are_the_draws(
    seeds: Sequence[int], anchors: Sequence[int], num_nodes: int
) -> Tensor:
    return uniforms(seeds, [anchor + 1 for anchor in anchors], 1).expand(-1, num_nodes)


def coins_of_the_row(seeds: Sequence[int], anchors: Sequence[int], num_nodes: int) -> Tensor:
    return uniforms(seeds, anchors, 1, lane=1).expand(-1, num_nodes)


def coins_of_one_side(seeds: Sequence[int], anchors: Sequence[int], num_nodes: int) -> Tensor:
    return torch.full((len(seeds), num_nodes), 0.5, dtype=torch.float64)


@pytest.mark.parametrize("faulty", [coins_that_are_the_draws, coins_of_the_row, coins_of_one_side])
def test_coins_that_are_not_fresh_are_caught(faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashdraft.engine, "coins", faulty)
    distance, degrees = chi_square()
    assert distance > 3 * stats.chi2.ppf(1 - 1e-4, degrees)
