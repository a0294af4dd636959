"""What the tests of the engine share: the plain text, drafters that know the future, and a run
whose every chunk is checked.

The plain text comes from the target alone: every token from a fresh pass over the whole text before
it, without drafts, batches or rollbacks.
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
    requests_of,
    step,
    tiny_drafter,
    tiny_target,
    uniform,
)
from torch import Tensor

from flashdraft.decoding.sampling import draw, probabilities
from flashdraft.engine import Engine, Request
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.prompt_lookup import PromptLookup
from flashdraft.models.cache import SlotCache
from flashdraft.models.hf import HFTarget
from flashdraft.models.target import Target
from flashdraft.types import Chunk, Drafter, Proposal, Result, Rows, SamplingParams

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


# Drafters that know the future.


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


# Running.


def run(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    """All requests, each as soon as a row is free; every chunk is checked on the way."""
    chunks: dict[int, list[Chunk]] = {request.index: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for chunk in step(engine):
            chunks[chunk.index].append(chunk)
    assert engine.num_free == engine.max_rows
    engine.forget_kept()
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


# One prompt and a drafter that is right for so long.


PROMPT = PROMPTS[1]
LONG = replace(GREEDY, max_new_tokens=24)


def cheat(
    block: int, params: SamplingParams = GREEDY, eos: Iterable[int] = (), right: int = 99
) -> Result:
    """One greedy request whose drafter is right in the first `right` nodes of every block."""
    text = PROMPT + plain("llama", PROMPT, LONG)
    engine = Engine(made("llama"), Cheater([text], block_size=block, right=lambda _: right))
    return run(engine, requests_of([PROMPT], [params], eos))[0]
