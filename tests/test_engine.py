"""The law of the engine: a text is the plain text, token for token, whatever drafts and whoever
sits in the batch.

The plain text comes from the target alone: every token from a fresh pass over the whole text before
it, without drafts, batches or rollbacks. Then the engine's bookkeeping, at every offset of a block.
Wrong rules are planted and must be seen.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from conftest import (
    FAMILIES,
    VOCAB,
    LetterTokenizer,
    Table,
    requests_of,
    tiny_drafter,
    tiny_model,
    tiny_target,
    uniform,
)
from scipy import stats
from torch import Tensor
from transformers import GPT2Config

import flashdraft.engine
from flashdraft.decoding.sampling import draw, probabilities, uniforms
from flashdraft.decoding.text import TextDecoder
from flashdraft.engine import Engine, Request
from flashdraft.errors import ContextLengthError, InvalidPrompt
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.prompt_lookup import PromptLookup
from flashdraft.models.cache import SlotCache
from flashdraft.models.hf import HFTarget
from flashdraft.models.target import Target
from flashdraft.types import Chunk, Drafter, Proposal, Result, Rows, SamplingParams, Stats, Verdict

NEW = 14
BLOCKS = (2, 4, 7)
PROMPTS = ((5, 9, 7), (9, 8, 30, 4, 11, 7, 8, 40, 22, 13), tuple(range(10, 31)))
TARGETS = [*FAMILIES, "lean llama", "lean qwen3"]
GREEDY = SamplingParams(max_new_tokens=NEW)
SAMPLED = (
    SamplingParams(temperature=0.8, seed=1, max_new_tokens=NEW),
    SamplingParams(temperature=0.8, top_p=0.9, seed=2, max_new_tokens=NEW),
    SamplingParams(temperature=0.8, top_k=20, min_p=0.01, seed=3, max_new_tokens=NEW),
)
LETTERS = LetterTokenizer()


def made(name: str) -> Target:
    return tiny_target(name.removeprefix("lean "), lean=name.startswith("lean "))


@functools.cache
def plain(name: str, prompt: tuple[int, ...], params: SamplingParams = GREEDY) -> tuple[int, ...]:
    """The new tokens of the target alone. Hugging Face's forward without a cache; the lean target
    reads all anew.
    """
    target, text = made(name), list(prompt)
    for _ in range(params.max_new_tokens):
        tokens = torch.tensor(text)
        if isinstance(target, HFTarget):
            with torch.no_grad():
                logits = target.model(tokens[None], use_cache=False).logits[0, -1]
        else:
            logits, _ = target.prefill(target.new_cache(1, len(text)), 0, tokens, ())
        level = torch.tensor([uniform(params.seed, len(text))], dtype=torch.float64)
        text.append(int(draw(probabilities(logits, params)[None], level)[0]))
    return tuple(text[len(prompt) :])


def letters(tokens: Iterable[int]) -> str:
    return LETTERS.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


# ---------------------------------------------------------------- drafters that know the future


@dataclass
class Oracle:
    """What a drafter of the tests knows: the texts that will come."""

    texts: Sequence[tuple[int, ...]]  # prompts with their plain continuations
    name: str = "oracle"
    layers: tuple[int, ...] = ()
    caches: tuple[SlotCache, ...] = ()

    def future(self, history: Sequence[int]) -> list[int]:
        known = [text for text in self.texts if text[: len(history)] == tuple(history)]
        return list(known[0][len(history) :]) if known else []

    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        pass

    def end(self, rows: Rows) -> None:
        pass


def padded(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


@dataclass
class Cheater(Oracle):
    """A chain whose first nodes are right: as many as `right` says for the anchor's position; then
    wrong ones.
    """

    block_size: int = 4
    right: Callable[[int], int] = lambda position: 99

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        chains = []
        for history, position in zip(rows.histories, rows.positions, strict=True):
            future = self.future(history)[: min(self.block_size, max_nodes) - 1]
            right = self.right(position)
            wrong = [(token + 1) % VOCAB for token in future[right:]]
            chains.append([history[-1], *future[:right], *wrong])
        tokens = padded(chains)
        parents = torch.arange(-1, tokens.shape[1] - 1).expand(len(chains), -1)
        return Proposal(tokens, parents, torch.tensor([len(chain) for chain in chains]))


@dataclass
class Tree(Oracle):
    """Random trees of chosen nodes, some of them on the right path, scattered over the slots."""

    block_size: int = 4

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        grown = [
            self.grow(history, max_nodes, random.Random(len(history))) for history in rows.histories
        ]
        sizes = torch.tensor([len(tokens) for tokens, _ in grown])
        return Proposal(
            padded([tokens for tokens, _ in grown]),
            padded([parents for _, parents in grown]),
            sizes,
        )

    def grow(
        self, history: Sequence[int], max_nodes: int, luck: random.Random
    ) -> tuple[list[int], list[int]]:
        future, tokens, parents, right = self.future(history), [history[-1]], [-1], {0: 0}
        for node in range(1, min(luck.randint(1, 2 * self.block_size), max_nodes)):
            parent = luck.choice([luck.randrange(node), max(right)])
            siblings = [tokens[i] for i in range(node) if parents[i] == parent]
            true = (
                future[right[parent]] if parent in right and right[parent] < len(future) else None
            )
            token = luck.choice([t for t in range(VOCAB) if t != true and t not in siblings])
            if true is not None and true not in siblings and luck.random() < 0.6:
                token, right[node] = true, right[parent] + 1
            tokens.append(token)
            parents.append(parent)
        return tokens, parents


@dataclass
class Drawn(Oracle):
    """Trees of drawn nodes: half of the mass lies on the right token, siblings come without
    replacement.
    """

    block_size: int = 4
    luck: random.Random = field(default_factory=lambda: random.Random(0))

    def law(self, future: Sequence[int]) -> Tensor:
        law = torch.full((VOCAB,), 0.5 / VOCAB, dtype=torch.float64)
        if future:
            law[future[0]] += 0.5
        return law / law.sum()

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        size = min(self.block_size, max_nodes)
        shape = [-1] + [self.luck.randrange(max(0, node - 2), node) for node in range(1, size)]
        tokens = torch.tensor(rows.anchors)[:, None].repeat(1, size)
        probs = torch.zeros(len(rows), size, VOCAB, dtype=torch.float64)
        for row, history in enumerate(rows.histories):
            futures = {0: self.future(history)}
            for node in range(size):
                probs[row, node] = self.law(futures[node])
                left = probs[row, node].clone()
                for child in (i for i in range(size) if shape[i] == node):
                    token = self.luck.choices(range(VOCAB), left.tolist())[0]
                    left[token] = 0
                    tokens[row, child] = token
                    futures[child] = futures[node][1:] if futures[node][:1] == [token] else []
        drawn = torch.arange(size).expand(len(rows), -1) > 0
        sizes = torch.tensor([self.luck.randint(1, size) for _ in rows.slots])
        return Proposal(
            tokens, torch.tensor(shape).expand(len(rows), -1), sizes, probs=probs, drawn=drawn
        )


@dataclass
class Quoting(Oracle):
    """Prompt lookup in histories that begin with the text to come, every fifth token changed: an
    edit of a file.
    """

    block_size: int = 4

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        texts = [[*history, *self.future(history)] for history in rows.histories]
        changed = [
            [(token + (i % 5 == 0)) % VOCAB for i, token in enumerate(text)] for text in texts
        ]
        quoted = [[*text, *history] for text, history in zip(changed, rows.histories, strict=True)]
        return PromptLookup(block_size=self.block_size).propose(
            replace(rows, histories=quoted), max_nodes
        )


@dataclass
class Witness:
    """Looks over a drafter's shoulder: what it observes is what was committed, in order, with the
    target's own features.
    """

    inner: Drafter
    target: Target
    layers: tuple[int, ...] = (0, 2, 4)
    caches: tuple[SlotCache, ...] = ()
    name: str = "witness"
    tokens: dict[int, list[int]] = field(default_factory=dict)
    features: dict[int, list[Tensor]] = field(default_factory=dict)
    proposals: list[Proposal] = field(default_factory=list)

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        for slot, history in zip(rows.slots, rows.histories, strict=True):
            assert self.tokens[slot] == history[:-1]
        self.proposals.append(self.inner.propose(rows, max_nodes))
        return self.proposals[-1]

    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        assert features is not None
        for slot, own, seen in zip(rows.slots, tokens, features, strict=True):
            assert len(own) == len(seen)
            self.tokens.setdefault(slot, []).extend(own.tolist())
            self.features.setdefault(slot, []).append(seen)

    def end(self, rows: Rows) -> None:
        for slot, history in zip(rows.slots, rows.histories, strict=True):
            tokens, features = self.tokens.pop(slot), torch.cat(self.features.pop(slot))
            assert tokens == history[: len(tokens)]  # nothing that an end of text cut off
            _, wanted = self.target.prefill(
                self.target.new_cache(1, len(tokens)), 0, torch.tensor(tokens), self.layers
            )
            assert wanted is not None
            assert torch.allclose(features, wanted, atol=1e-6), float(
                (features - wanted).abs().max()
            )


Method = Callable[[Target, Sequence[tuple[int, ...]], int], Drafter]
METHODS: dict[str, Method] = {
    "autoregressive": lambda target, texts, block: Autoregressive(),
    "prompt_lookup": lambda target, texts, block: PromptLookup(block_size=block),
    "quoting": lambda target, texts, block: Quoting(texts, block_size=block),
    "dflash": lambda target, texts, block: tiny_drafter(target, block_size=block),
    "dflash tree": lambda target, texts, block: tiny_drafter(
        target, block_size=block, tree_nodes=2 * block
    ),
    "cheater": lambda target, texts, block: Cheater(
        texts, block_size=block, right=lambda position: position % (block + 1)
    ),
    "tree": lambda target, texts, block: Tree(texts, block_size=block),
    "drawn": lambda target, texts, block: Drawn(texts, block_size=block),
}
CHOSEN = [method for method in METHODS if method != "drawn"]


# ---------------------------------------------------------------- running


def run(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    """All requests, each as soon as a row is free; every chunk is checked on the way."""
    chunks: dict[int, list[Chunk]] = {request.index: [] for request in requests}
    waiting = list(requests)
    while waiting or engine.running:
        while waiting and engine.num_free:
            first = engine.admit(waiting.pop(0))
            chunks[first.index].append(first)
        if engine.running:
            for chunk in engine.step():
                chunks[chunk.index].append(chunk)
    assert engine.num_free == engine.max_rows
    assert engine._cache.lengths == [0] * engine.max_rows
    return [checked(request, chunks[request.index]) for request in requests]


def checked(request: Request, chunks: Sequence[Chunk]) -> Result:
    """The result, if the chunks add up to it and its statistics count exactly them."""
    result = chunks[-1].result
    assert result is not None
    assert all(chunk.result is None for chunk in chunks[:-1])
    assert all(len(chunk.pieces) == len(chunk.tokens) >= 1 for chunk in chunks)
    assert result.tokens == tuple(token for chunk in chunks for token in chunk.tokens)
    assert result.text == "".join(chunk.text for chunk in chunks)
    assert len(result.tokens) <= request.params.max_new_tokens
    counts, passes = result.stats, [len(chunk.tokens) for chunk in chunks[1:]]
    assert counts.num_prompt_tokens == len(request.prompt)
    assert counts.num_tokens == len(result.tokens)
    assert counts.target_passes == len(passes)
    assert counts.accepted_lengths == passes
    assert counts.tau == (sum(passes) / len(passes) if passes else 1.0)
    assert (
        counts.num_accepted
        == sum(piece.drafted for chunk in chunks for piece in chunk.pieces)
        <= counts.num_drafted
    )
    assert not any(piece.drafted for piece in chunks[0].pieces)
    assert set(counts.seconds) == (
        {"prefill", "draft", "target", "host"} if passes else {"prefill"}
    )
    assert counts.decode_seconds == pytest.approx(
        sum(counts.seconds.values()) - counts.seconds["prefill"]
    )
    return result


def generate(
    name: str,
    method: str,
    prompts: Sequence[tuple[int, ...]],
    params: Sequence[SamplingParams],
    block: int,
) -> tuple[list[Result], list[tuple[int, ...]]]:
    """What the engine writes with this method, and what the target writes alone."""
    wanted = [plain(name, prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    texts = [prompt + text for prompt, text in zip(prompts, wanted, strict=True)]
    engine = Engine(made(name), METHODS[method](made(name), texts, block), max_rows=len(prompts))
    return run(engine, requests_of(prompts, params)), wanted


def check_law(
    name: str,
    method: str,
    params: Sequence[SamplingParams] = (GREEDY,) * 3,
    blocks: Iterable[int] = BLOCKS,
) -> None:
    for prompts, block in [(PROMPTS[1:2], 4), *((PROMPTS, block) for block in blocks)]:
        own = params[1:2] if len(prompts) == 1 else params
        results, wanted = generate(name, method, prompts, own, block)
        for prompt, result, tokens in zip(prompts, results, wanted, strict=True):
            assert result.tokens == tokens, (method, prompt, block)
            assert result.text == letters(tokens)
            assert result.finish_reason == "length"


# ---------------------------------------------------------------- the law


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


# ---------------------------------------------------------------- planted faults of the law


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

    def whole(stats: Stats, num_drafted: int, num_committed: int, parts: dict[str, float]) -> None:
        account(stats, num_drafted, num_drafted + 1, parts)

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


# ---------------------------------------------------------------- where a text ends


PROMPT = PROMPTS[1]
LONG = replace(GREEDY, max_new_tokens=24)


def cheat(
    block: int, params: SamplingParams = GREEDY, eos: Iterable[int] = (), right: int = 99
) -> Result:
    """One greedy request whose drafter is right in the first `right` nodes of every block."""
    text = PROMPT + plain("llama", PROMPT, LONG)
    engine = Engine(made("llama"), Cheater([text], block_size=block, right=lambda _: right))
    return run(engine, requests_of([PROMPT], [params], eos))[0]


def offset(k: int, block: int) -> int:
    """Where in its block the new token `k` stands, if all drafts are right; the first one comes
    with the prompt.
    """
    return (k - 1) % block


def check_eos_at_every_offset(block: int) -> None:
    text, offsets = plain("llama", PROMPT, LONG), set()
    absent = next(token for token in range(VOCAB) if token not in text)
    for k in range(1, len(text) - block):
        if text[k] in text[:k]:
            continue
        result = cheat(block, LONG, eos=[text[k], absent])
        assert result.tokens == text[: k + 1], k
        assert result.text == letters(text[:k])
        assert result.finish_reason == "stop"
        assert result.stats.num_accepted == k - 1 - (k - 1) // block + (
            offset(k, block) < block - 1
        ), k
        offsets.add(offset(k, block))
    assert offsets == set(range(block))


def check_stop_at_every_offset(block: int) -> None:
    text, offsets = plain("llama", PROMPT, LONG), set()
    for length in (1, 3):
        for k in range(length, len(text)):
            stop = letters(text[k - length + 1 : k + 1])
            if len(stop) < length or stop in letters(text[:k]):
                continue
            result = cheat(block, replace(LONG, stop=(stop, "not in the text")))
            assert result.tokens == text[: k + 1], (k, stop)
            assert result.text == letters(text[: k - length + 1])
            assert result.finish_reason == "stop"
            offsets.add((length, offset(k, block)))
    assert offsets == {(length, place) for length in (1, 3) for place in range(block)}


def check_every_limit(block: int) -> None:
    text = plain("llama", PROMPT, LONG)
    for limit in range(1, 13):
        result = cheat(block, replace(GREEDY, max_new_tokens=limit))
        assert result.tokens == text[:limit]
        assert result.text == letters(text[:limit])
        assert result.finish_reason == "length"
        assert result.stats.target_passes == -(-(limit - 1) // block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "check", [check_eos_at_every_offset, check_stop_at_every_offset, check_every_limit]
)
def test_a_text_ends_where_it_must_at_every_offset_of_a_block(
    check: Callable[[int], None], block: int
) -> None:
    check(block)


def whole_block(
    self: Request, tokens: Sequence[int], num_drafted: int, logits: Sequence[Tensor]
) -> Chunk:
    """Looks for the end after the block, not in it."""
    chunks = [commit(self, [token], int(i < num_drafted)) for i, token in enumerate(tokens)]
    pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
    ended = next((chunk.result for chunk in chunks if chunk.result is not None), None)
    result = (
        None
        if ended is None
        else replace(ended, tokens=tuple(self.history[len(self.prompt) :]), text=self.decoder.text)
    )
    return Chunk(self.index, pieces, tuple(tokens), result)


commit = Request.commit


def pushes_eos(
    self: Request, tokens: Sequence[int], num_drafted: int, logits: Sequence[Tensor]
) -> Chunk:
    """The end-of-text token's own text leaks."""
    chunk = commit(self, tokens, num_drafted)
    if chunk.result is None or chunk.tokens[-1] not in self.eos:
        return chunk
    self.decoder.push(chunk.tokens[-1])
    return replace(chunk, result=replace(chunk.result, text=self.decoder.text))


@pytest.mark.parametrize(
    ("faulty", "check"),
    [
        (whole_block, check_eos_at_every_offset),
        (whole_block, check_stop_at_every_offset),
        (pushes_eos, check_eos_at_every_offset),
    ],
)
def test_a_leak_at_the_end_is_caught(
    faulty: Any, check: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Request, "commit", faulty)
    with pytest.raises(AssertionError):
        check(4)


def test_one_token_too_many_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    left = Request.num_left
    monkeypatch.setattr(Request, "num_left", property(lambda self: left.fget(self) + 1))
    with pytest.raises(AssertionError):
        check_every_limit(4)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_stop_string_that_had_only_begun_is_text(reason: str) -> None:
    text = plain("llama", PROMPT)
    k = next(k for k in range(5, NEW) if text[k] not in text[:k])
    params = replace(
        GREEDY,
        stop=(letters(text[k - 1 : k]) + "!",),
        max_new_tokens=k if reason == "length" else NEW,
    )
    result = cheat(7, params, eos=text[k : k + 1])
    assert result.text == letters(text[:k])
    assert result.finish_reason == reason


def test_an_end_of_text_token_may_be_ignored() -> None:
    text = plain("llama", PROMPT, LONG)
    result = cheat(4, replace(LONG, ignore_eos=True), eos=[text[3]])
    assert (result.tokens, result.finish_reason) == (text, "length")


@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, max_new_tokens=1)])
def test_a_text_may_end_with_its_first_token(params: SamplingParams) -> None:
    text = plain("llama", PROMPT)
    result = cheat(4, params, eos=text[:1] if params is GREEDY else ())
    assert result.tokens == text[:1]
    assert result.finish_reason == ("stop" if params is GREEDY else "length")
    assert (result.stats.target_passes, result.stats.tau) == (0, 1.0)


def test_nothing_accepted_is_plain_decoding() -> None:
    result = cheat(4, right=0)
    assert result.tokens == plain("llama", PROMPT)
    assert (result.stats.num_accepted, result.stats.tau) == (0, 1.0)
    assert result.stats.accepted_lengths == [1] * (NEW - 1)


def test_tau_counts_committed_tokens_per_pass_and_nothing_that_was_cut() -> None:
    result = cheat(
        7, replace(GREEDY, max_new_tokens=10)
    )  # 1 with the prompt, 7 in the first pass, 2 left
    assert result.stats.accepted_lengths == [7, 2]
    assert result.stats.tau == 4.5
    assert result.stats.num_accepted == 6 + 1
    text = plain("llama", PROMPT)
    k = next(k for k in range(3, 7) if text[k] not in text[:k])
    result = cheat(7, eos=[text[k]])  # the rest of the block was right, too, but does not count
    assert result.stats.accepted_lengths == [k]
    assert (result.stats.tau, result.stats.num_accepted, result.stats.num_drafted) == (k, k, 6)
    assert result.to_dict() == {
        "text": letters(text[:k]),
        "tokens": list(text[: k + 1]),
        "finish_reason": "stop",
        "tau": k,
    }


# ---------------------------------------------------------------- rows come and go


CROWD = (*PROMPTS, (33, 4), tuple(range(50, 20, -2)))
LIMITS = (14, 3, 9, 1, 12)


def crowd_params() -> list[SamplingParams]:
    return [
        replace(params, max_new_tokens=limit)
        for params, limit in zip((GREEDY, *SAMPLED, GREEDY), LIMITS, strict=True)
    ]


def check_crowd(method: str, rows: int, rounds: int = 1) -> None:
    params = crowd_params()
    wanted = [plain("llama", prompt, own) for prompt, own in zip(CROWD, params, strict=True)]
    drafter = METHODS[method](made("llama"), [p + t for p, t in zip(CROWD, wanted, strict=True)], 4)
    engine = Engine(made("llama"), drafter, max_rows=rows)
    for _ in range(rounds):
        results = run(engine, requests_of(CROWD, params))
        assert [result.tokens for result in results] == wanted
        assert all(cache.lengths == [0] * cache.rows for cache in drafter.caches)


@pytest.mark.parametrize("method", CHOSEN)
def test_rows_that_join_and_leave_write_what_they_write_alone(method: str) -> None:
    check_crowd(method, rows=2)


@pytest.mark.parametrize("method", CHOSEN)
def test_a_used_engine_writes_what_a_fresh_one_writes(method: str) -> None:
    check_crowd(method, rows=3, rounds=3)


@pytest.mark.parametrize("method", METHODS)
def test_no_proposal_is_larger_than_what_may_still_be_written(method: str) -> None:
    texts = [prompt + plain("llama", prompt) for prompt in PROMPTS]
    drafter = Recording(METHODS[method](made("llama"), texts, 7))
    run(Engine(made("llama"), drafter, max_rows=3), requests_of(PROMPTS, (GREEDY,) * 3))
    assert drafter.proposals


@dataclass
class Recording:
    """A drafter whose proposals are kept."""

    inner: Any
    proposals: list[tuple[list[int], list[list[int]]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        proposal = self.inner.propose(rows, max_nodes)
        assert proposal.num_nodes <= max_nodes
        self.proposals.append((rows.anchors, proposal.tokens.tolist()))
        return proposal


def check_used_drafter() -> None:
    """A text is right whatever drafts; that a used drafter is as good as a new one shows in its
    proposals.
    """
    drafter = Recording(tiny_drafter(made("llama")))
    engine = Engine(made("llama"), drafter)
    run(engine, requests_of([PROMPTS[2]], [GREEDY]))
    for prompt in PROMPTS:
        drafter.proposals.clear()
        run(engine, requests_of([prompt], [GREEDY]))
        fresh = Recording(tiny_drafter(made("llama")))
        run(Engine(made("llama"), fresh), requests_of([prompt], [GREEDY]))
        assert drafter.proposals == fresh.proposals


def test_a_used_drafter_proposes_what_a_fresh_one_proposes() -> None:
    check_used_drafter()


def keep_the_first_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlotCache, "free", lambda self, row: self.lengths.__setitem__(row, 1))


@pytest.mark.parametrize(
    "check",
    [lambda: check_crowd("cheater", 2), lambda: check_crowd("dflash", 2), check_used_drafter],
)
def test_a_row_that_is_not_freed_is_caught(
    check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_the_first_slot(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_a_drafter_that_does_not_forget_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny_drafter(made("llama"))), "end", lambda self, rows: None)
    with pytest.raises(AssertionError):
        check_used_drafter()


def test_the_caches_grow_while_rows_run() -> None:
    """The first row's slots move when a prompt comes that is longer than all of them."""
    long = tuple(3 + i * i % 50 for i in range(220))
    params = [GREEDY, replace(GREEDY, max_new_tokens=36)]
    engine = Engine(made("llama"), tiny_drafter(made("llama")), max_rows=2)
    short, late = requests_of([PROMPTS[0], long], params)
    chunks = [engine.admit(short), *engine.step()]
    before = engine._cache.slots
    engine.admit(late)
    assert engine._cache.slots > before
    while engine.running:
        chunks += engine.step()
    tokens = {
        index: tuple(token for c in chunks if c.index == index for token in c.tokens)
        for index in (0, 1)
    }
    assert tokens[0] == plain("llama", PROMPTS[0])
    assert tuple(late.history[len(long) :]) == plain("llama", long, params[1])


@pytest.mark.parametrize("method", ["cheater", "dflash"])
def test_an_aborted_row_is_free_at_once_and_leaves_the_others_alone(method: str) -> None:
    texts = [prompt + plain("llama", prompt) for prompt in PROMPTS]
    drafter = METHODS[method](made("llama"), texts, 4)
    engine = Engine(made("llama"), drafter, max_rows=2)
    gone, stays, comes = requests_of(PROMPTS, (GREEDY,) * 3)
    for request in (gone, stays):
        engine.admit(request)
    engine.step()
    engine.abort(77)  # nobody's number
    assert engine.num_free == 0
    engine.abort(gone.index)
    assert engine.num_free == 1
    assert engine._cache.lengths[0] == 0
    assert all(cache.lengths[0] == 0 for cache in drafter.caches)
    engine.admit(comes)
    while engine.running:
        assert gone.index not in [chunk.index for chunk in engine.step()]
    for request, prompt in ((stays, PROMPTS[1]), (comes, PROMPTS[2])):
        assert tuple(request.history[len(prompt) :]) == plain("llama", prompt)
    assert len(gone.history) < len(PROMPTS[0]) + NEW
    engine.abort(stays.index)  # finished already


@pytest.mark.parametrize("where", ["observe", "propose"])
def test_a_failure_leaves_nothing_behind(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An admission that fails frees its row; a step that fails can be run again."""
    drafter = tiny_drafter(made("llama"))
    engine = Engine(made("llama"), drafter, max_rows=2)
    first, second = requests_of(PROMPTS[:2], (GREEDY,) * 2)
    engine.admit(first)

    def fails(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(drafter), where, fails)
        with pytest.raises(MemoryError):
            engine.admit(second) if where == "observe" else engine.step()
    assert engine._cache.lengths == [len(PROMPTS[0]), 0]
    assert drafter.cache.lengths[1:] in ([], [0])
    engine.admit(requests_of(PROMPTS[1:2], [GREEDY], first=1)[0])
    rows = dict(engine.running)
    while engine.running:
        engine.step()
    for row, prompt in enumerate(PROMPTS[:2]):
        assert tuple(rows[row].history[len(prompt) :]) == plain("llama", prompt)


@pytest.mark.parametrize("name", ["llama", "lean llama"])
def test_a_wide_proposal_beside_a_long_row_finds_room(name: str) -> None:
    long = tuple(3 + i * i % 50 for i in range(184))
    params = [replace(GREEDY, max_new_tokens=5), replace(GREEDY, max_new_tokens=100)]
    texts = [prompt + plain(name, prompt) for prompt in (long, PROMPTS[0])]
    results = run(
        Engine(made(name), Tree(texts, block_size=99), max_rows=2),
        requests_of([long, PROMPTS[0]], params),
    )
    assert results[0].tokens == plain(name, long)[:5]
    assert results[1].tokens[:NEW] == plain(name, PROMPTS[0])


# ---------------------------------------------------------------- refusals and limits


def test_an_empty_prompt_is_refused() -> None:
    engine = Engine(made("llama"), Autoregressive())
    with pytest.raises(InvalidPrompt, match="the prompt is empty"):
        engine.admit(requests_of([()], [GREEDY])[0])
    assert engine.num_free == 1


@pytest.mark.parametrize(("length", "asked"), [(256, 1), (250, 7), (400, 1)])
def test_a_text_beyond_the_context_is_refused(length: int, asked: int) -> None:
    engine = Engine(made("llama"), Autoregressive())
    with pytest.raises(
        ContextLengthError, match=f"{length} tokens and {asked} new .* holds 256"
    ) as raised:
        engine.admit(requests_of([(5,) * length], [replace(GREEDY, max_new_tokens=asked)])[0])
    room = 256 - length
    assert (f"at most {room} new" if room > 0 else f"by {1 - room} tokens") in str(
        raised.value.hint
    )
    assert engine.num_free == 1


@functools.cache
def gpt2() -> HFTarget:
    """Learned positions: one beyond the last is an error, not a number."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return HFTarget(tiny_model("", config=config), "gpt2")


@pytest.mark.parametrize("target", [lambda: made("llama"), lambda: made("lean llama"), gpt2])
def test_a_text_may_fill_the_context_to_its_last_position(target: Callable[[], Target]) -> None:
    """Beside a row that goes on, so that the full one is padded."""
    model, texts = target(), []
    prompts = [tuple(3 + i * i % 50 for i in range(model.context_length - NEW)), PROMPTS[0]]
    params = [GREEDY, replace(GREEDY, max_new_tokens=40)]
    for drafter in (
        Autoregressive(),
        tiny_drafter(model, block_size=7, max_position_embeddings=512),
    ):
        results = run(Engine(model, drafter, max_rows=2), requests_of(prompts, params))
        texts.append([result.tokens for result in results])
    assert texts[0] == texts[1]
    assert [len(tokens) for tokens in texts[0]] == [NEW, 40]


def test_a_draft_with_fewer_positions_than_its_target_drafts_on_and_the_texts_stay() -> None:
    drafter = Recording(tiny_drafter(made("llama"), block_size=4, max_position_embeddings=16))
    results = run(Engine(made("llama"), drafter, max_rows=3), requests_of(PROMPTS, (GREEDY,) * 3))
    assert [result.tokens for result in results] == [plain("llama", prompt) for prompt in PROMPTS]
    assert all(
        result.stats.num_drafted > 0 for result in results
    )  # the last prompt alone has more positions


def test_a_faulty_proposal_is_an_error_and_not_a_text() -> None:
    class TwoRoots(Tree):
        def propose(self, rows: Rows, max_nodes: int) -> Proposal:
            tokens = torch.tensor([[rows.anchors[0], 5, 6]])
            return Proposal(tokens, torch.tensor([[-1, 0, -1]]), torch.tensor([3]))

    engine = Engine(made("llama"), TwoRoots([]))
    engine.admit(requests_of([PROMPT], [GREEDY])[0])
    with pytest.raises(AssertionError, match="a second root"):
        engine.step()


# ---------------------------------------------------------------- the law of sampled text with
# drawn nodes


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
    while waiting or engine.running:
        while waiting and engine.num_free:
            engine.admit(waiting.pop())
        engine.step()
        for request in [request for request in engine.running.values() if len(request.history) > 3]:
            a, b, c = request.history[1:4]
            counts[16 * a + 4 * b + c] += 1
            engine.abort(request.index)
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
