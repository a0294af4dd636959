"""Hook, bias and penalties: the formula, seeded texts against plain decoding, the law of drawn
trees, log-probabilities, ends.

The plain text comes from the target alone, by a formula that is spelled out here. Wrong rules are
planted and must be seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from conftest import EOS, SHAPE, VOCAB, Table, admit, step, tiny_model, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from toy_engine import METHODS, NEW, PROMPTS, Cheater, Oracle, Tree, letters, made, requests_of, run
from transformers import LlamaConfig
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

import flashdraft.decoding.laws
import flashdraft.engine
from flashdraft.decoding.sampling import Context, Counts, adjusted, draw, logprob, probabilities
from flashdraft.decoding.text import TextDecoder
from flashdraft.engine import Engine, Request
from flashdraft.errors import InvalidParameter
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.models.lean import LeanTarget
from flashdraft.types import Proposal, Result, Rows, SamplingParams

DIGITS = [token for token in range(VOCAB) if letters([token]).isdigit()]


def alternating(tokens: Sequence[int], logits: Tensor) -> Tensor:
    """A grammar: odd and even tokens take turns."""
    logits[tokens[-1] % 2 :: 2] = -math.inf
    return logits


def digits(tokens: Sequence[int], logits: Tensor) -> Tensor:
    return torch.full_like(logits, -math.inf).index_copy_(0, torch.tensor(DIGITS), logits[DIGITS])


ADJUSTMENTS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5},
    "negative": {"frequency_penalty": -1.0, "presence_penalty": -2.0, "repetition_penalty": 0.8},
    "bias": {"logit_bias": {7: 4.0, 40: -100.0, 11: 3.0}},
    "hook": {"logits_processor": alternating},
    "digits": {"logits_processor": digits, "frequency_penalty": 2.0},
    "all": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.9,
        "logit_bias": {8: 2.0, 30: -3.0},
        "logits_processor": alternating,
    },
}


def by_hand(
    logits: Tensor, params: SamplingParams, tokens: Sequence[int], num_prompt: int
) -> Tensor:
    """The documented formula, one number at a time."""
    wanted, new = logits.tolist(), list(tokens[num_prompt:])
    for token, bias in params.logit_bias.items():
        wanted[token] += bias
    for token in set(tokens):
        wanted[token] *= (
            params.repetition_penalty if wanted[token] < 0 else 1 / params.repetition_penalty
        )
    for token in set(new):
        wanted[token] -= params.frequency_penalty * new.count(token) + params.presence_penalty
    result = torch.tensor(wanted, dtype=logits.dtype)
    return params.logits_processor(list(tokens), result) if params.logits_processor else result


# ---------------------------------------------------------------- the formula

HISTORY = [3, 5, 5, 9, 4, 3, 7, 7, 7, 9, 20]


@pytest.mark.parametrize("changes", ADJUSTMENTS.values(), ids=ADJUSTMENTS)
@pytest.mark.parametrize("num_prompt", [1, 5, len(HISTORY)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adjusted_logits_are_the_documented_formula(
    changes: dict[str, Any], num_prompt: int, dtype: torch.dtype
) -> None:
    logits = (
        torch.randn(VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    ).to(dtype)
    before, params = logits.clone(), SamplingParams(**changes)
    result = adjusted(logits, params, tuple(HISTORY), num_prompt)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        result, by_hand(logits.to(result.dtype), params, HISTORY, num_prompt), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(logits, before)
    assert not torch.equal(result, logits.to(result.dtype)) or (
        params.repetition_penalty == 1 and num_prompt == len(HISTORY)
    )


def test_bias_and_repetition_penalty_are_those_of_transformers_in_their_order() -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    biases = {5: 4.0, 9: -4.0, 33: 1.5}
    bias = SequenceBiasLogitsProcessor([[[token], value] for token, value in biases.items()])
    penalty, ids = RepetitionPenaltyLogitsProcessor(1.7), torch.tensor([HISTORY])
    ours = adjusted(logits, SamplingParams(repetition_penalty=1.7, logit_bias=biases), HISTORY, 4)
    torch.testing.assert_close(ours, penalty(ids, bias(ids, logits[None].clone()))[0])
    assert not torch.allclose(ours, bias(ids, penalty(ids, logits[None].clone()))[0])
    alone = adjusted(logits, SamplingParams(repetition_penalty=1.7), HISTORY, 4)
    assert torch.equal(alone, penalty(ids, logits[None].clone())[0])


def test_frequency_and_presence_are_openais_on_generated_tokens_alone() -> None:
    logits = torch.zeros(10)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert adjusted(logits, params, [1, 1, 2, 3, 3, 3, 2], 3).tolist() == [
        0,
        0,
        -0.75,
        -1.25,
        0,
        0,
        0,
        0,
        0,
        0,
    ]
    assert not adjusted(logits, params, [1, 1, 2], 3).any()


def test_nothing_to_change_gives_the_very_same_tensor() -> None:
    logits = torch.zeros(10, dtype=torch.bfloat16)
    plain = SamplingParams(temperature=1.0, top_k=3, logprobs=True)
    assert adjusted(logits, plain, HISTORY, 3) is logits
    assert not plain.adjusts
    assert all(SamplingParams(**changes).adjusts for changes in ADJUSTMENTS.values())


def test_a_mask_stays_whatever_else_is_asked_for() -> None:
    masked = torch.full((10,), -math.inf)
    masked[4] = 1.0
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=-2.0, logit_bias={3: 100.0})
    assert (adjusted(masked, params, [3, 3, 4], 1) > -math.inf).nonzero().tolist() == [[4]]


def test_the_hook_is_last_and_gets_copies() -> None:
    history, logits, seen = [1, 2, 2], torch.zeros(5), list[tuple[list[int], list[float]]]()

    def hook(tokens: Sequence[int], values: Tensor) -> Tensor:
        seen.append((list(tokens), values.tolist()))
        values[:] = 7.0
        tokens.clear()  # type: ignore[attr-defined]
        return values

    result = adjusted(
        logits,
        SamplingParams(logits_processor=hook, logit_bias={4: 1.0}, presence_penalty=1.0),
        history,
        1,
    )
    assert seen == [([1, 2, 2], [0, 0, -1, 0, 1])]
    assert result.tolist() == [7] * 5
    assert history == [1, 2, 2]
    assert not logits.any()


def test_a_hook_may_return_another_dtype() -> None:
    params = SamplingParams(logits_processor=lambda tokens, logits: logits.double())
    assert adjusted(torch.zeros(5), params, [1], 1).dtype == torch.float32


def test_a_network_may_be_the_hook() -> None:
    layer = torch.nn.Linear(5, 5)
    assert not adjusted(
        torch.zeros(5), SamplingParams(logits_processor=lambda _, logits: layer(logits)), [1], 1
    ).requires_grad


@pytest.mark.parametrize(
    "value", [None, torch.zeros(4), torch.full((5,), -math.inf), torch.full((5,), math.nan)]
)
def test_a_hook_without_a_law_is_refused(value: Any) -> None:
    with pytest.raises(InvalidParameter, match="logits_processor returned no law after 2 tokens"):
        adjusted(
            torch.zeros(5), SamplingParams(logits_processor=lambda tokens, logits: value), [1, 2], 1
        )


@pytest.mark.parametrize(
    "wrong",
    [
        *({"repetition_penalty": value} for value in (0, -1.0, 101, math.inf, math.nan, "a", None)),
        *(
            {name: value}
            for name in ("presence_penalty", "frequency_penalty")
            for value in (2.1, -2.1, math.nan, "a")
        ),
        *(
            {"logit_bias": value}
            for value in (
                [3],
                {"3": 1.0},
                {-1: 1.0},
                {True: 1.0},
                {3: math.nan},
                {3: -101},
                {3: "a"},
            )
        ),
        {"logits_processor": 0},
        {"logprobs": 1},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=f"^{next(iter(wrong))} is "):
        SamplingParams(**wrong)


def test_parameters_keep_their_own_bias_and_can_be_hashed() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias, logits_processor=alternating)
    bias[4] = 2.0
    assert params.logit_bias == {3: 1.0}
    assert hash(params) == hash(replace(params))
    assert params != replace(params, logit_bias={})


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    engine = Engine(made("llama"), Autoregressive())
    with pytest.raises(InvalidParameter, match=f"logit_bias .*{VOCAB}"):
        admit(
            engine, requests_of(PROMPTS[:1], [SamplingParams(logit_bias={VOCAB: 1.0, 3: 1.0})])[0]
        )
    assert engine.num_free == 1


# ---------------------------------------------------------------- texts


@functools.cache
def _plain(
    name: str, prompt: tuple[int, ...], params: SamplingParams, kind: str
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    target, text, logprobs = made(name), list(prompt), []
    for _ in range(params.max_new_tokens):
        logits, _ = target.prefill(target.new_cache(1, len(text)), 0, torch.tensor(text), ())
        wanted = by_hand(logits, params, text, len(prompt))
        level = torch.tensor([uniform(params.seed, len(text))], dtype=torch.float64)
        text.append(int(draw(probabilities(wanted, params)[None], level)[0]))
        logprobs.append(float(logits.log_softmax(-1)[text[-1]]))
    return tuple(text[len(prompt) :]), tuple(logprobs)


def plain(
    name: str, prompt: tuple[int, ...], params: SamplingParams
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Tokens and log-probabilities of the target alone; every token from a fresh pass."""
    return _plain(name, prompt, params, repr((params.logit_bias, params.logits_processor)))


def rows_of(kind: str, temperature: float) -> list[SamplingParams]:
    """A ragged batch: two rows with adjustments, and a greedy one without between them."""
    common, changes = (
        SamplingParams(temperature=temperature, max_new_tokens=NEW, seed=3),
        ADJUSTMENTS[kind],
    )
    return [
        replace(common, **changes),
        replace(common, temperature=0.0),
        replace(common, seed=5, top_k=20, **changes),
    ]


def written(
    name: str, method: str, params: Sequence[SamplingParams], block: int = 4
) -> tuple[list[Result], list[Any]]:
    wanted = [plain(name, prompt, own) for prompt, own in zip(PROMPTS, params, strict=True)]
    texts = [prompt + tokens for prompt, (tokens, _) in zip(PROMPTS, wanted, strict=True)]
    engine = Engine(made(name), METHODS[method](made(name), texts, block), max_rows=len(params))
    return run(engine, requests_of(PROMPTS, params)), wanted


def check_texts(
    name: str, method: str, params: Sequence[SamplingParams], block: int = 4
) -> list[Result]:
    results, wanted = written(name, method, params, block)
    for result, (tokens, _) in zip(results, wanted, strict=True):
        assert result.tokens == tokens
        assert result.logprobs is None
    return results


@pytest.mark.parametrize("method", [method for method in METHODS if method != "drawn"])
@pytest.mark.parametrize("kind", ADJUSTMENTS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_text_is_the_plain_text_in_a_batch_with_and_without_adjustments(
    method: str, kind: str, temperature: float
) -> None:
    check_texts("llama", method, rows_of(kind, temperature))


@pytest.mark.parametrize("method", ["dflash tree", "cheater", "tree"])
@pytest.mark.parametrize("name", ["gemma3", "lean qwen3"])
def test_text_is_the_plain_text_on_other_targets(name: str, method: str) -> None:
    check_texts(name, method, rows_of("all", 0.9), block=7)


@pytest.mark.parametrize("kind", ADJUSTMENTS)
def test_greedy_text_is_the_plain_text_where_drafts_are_drawn(kind: str) -> None:
    check_texts(
        "llama", "drawn", [replace(params, temperature=0.0) for params in rows_of(kind, 0.0)]
    )


@pytest.mark.parametrize("kind", ADJUSTMENTS)
def test_adjustments_change_the_text_and_drafts_are_accepted_and_rejected(kind: str) -> None:
    """Otherwise the tests above would show nothing."""
    for params, prompt in zip(rows_of(kind, 0.0), PROMPTS, strict=True):
        bare = SamplingParams(
            params.temperature, params.top_k, seed=params.seed, max_new_tokens=NEW
        )
        assert (
            plain("llama", prompt, params)[0] != plain("llama", prompt, bare)[0]
        ) == params.adjusts
    for method in ("cheater", "tree"):
        results = [check_texts("llama", method, rows_of(kind, 0.9))[i] for i in (0, 2)]
        assert (
            0
            < sum(r.stats.num_accepted for r in results)
            < sum(r.stats.num_drafted for r in results)
        )


def test_rows_without_adjustments_never_reach_the_nodes_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Engine, "_adjusted", fails)
    check_texts("llama", "tree", [SamplingParams(max_new_tokens=NEW, top_k=5)] * 3)
    with pytest.raises(MemoryError):
        check_texts("llama", "tree", rows_of("bias", 0.0))


# ---------------------------------------------------------------- planted faults


def nodes_by(path_of: Callable[[list[int]], list[int]]) -> Callable[..., Tensor]:
    """The engine's rule, with a node's path (the anchor not counted) spoilt by `path_of`."""

    def wrong(self: Engine, proposal: Proposal, logits: Tensor, rows: Rows) -> Tensor:
        wanted = logits.clone()
        for row, params in enumerate(rows.params):
            paths: dict[int, list[int]] = {0: []}
            for node in range(int(proposal.sizes[row])):
                if node:
                    paths[node] = [
                        *paths[int(proposal.parents[row, node])],
                        int(proposal.tokens[row, node]),
                    ]
                history = [*rows.histories[row], *path_of(paths[node])]
                wanted[row, node] = flashdraft.decoding.laws.adjusted(
                    logits[row, node], params, history, rows.num_prompts[row]
                )
        return wanted

    return wrong


def counting(count: Callable[[int], int]) -> Callable[..., Tensor]:
    return lambda logits, params, history, num_prompt, *_: adjusted(
        logits, params, history, count(num_prompt)
    )


def prompt_alone_forgotten(
    logits: Tensor, params: SamplingParams, history: Sequence[int], num_prompt: int, *_: Any
) -> Tensor:
    return logits if len(history) == num_prompt else adjusted(logits, params, history, num_prompt)


NODES, PROMPT = (Engine, "_adjusted"), (flashdraft.decoding.laws, "adjusted")
Fault = tuple[tuple[Any, str], Callable[..., Any]]
FAULTS: dict[str, Fault] = {
    "a node without its ancestors": (NODES, nodes_by(lambda path: [])),
    "a node without itself": (NODES, nodes_by(lambda path: path[:-1])),
    "a node without the nodes between": (NODES, nodes_by(lambda path: path[-1:])),
    "no node": (NODES, lambda self, proposal, logits, rows: logits),
    "the prompt counts as text": (PROMPT, counting(lambda num_prompt: 0)),
    "the first token counts as prompt": (PROMPT, counting(lambda num_prompt: num_prompt + 1)),
    "the first token": (PROMPT, prompt_alone_forgotten),
}
HARSH = {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.8}


def harsh(temperature: float) -> list[SamplingParams]:
    """Repetitive texts, which a repetition makes different at once."""
    bias = {"logit_bias": {5: 40.0, 9: 38.0, 30: 36.0}}
    return [replace(params, **{**HARSH, **bias}) for params in rows_of("bias", temperature)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_rule_of_the_faults_without_a_fault_is_right(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_texts("llama", "cheater", harsh(temperature))
    monkeypatch.setattr(*NODES, nodes_by(lambda path: path))
    check_texts("llama", "cheater", harsh(temperature))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_changes_a_text(
    fault: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, wrong = FAULTS[fault]
    for prompt, params in zip(PROMPTS, harsh(temperature), strict=True):
        plain("llama", prompt, params)
    monkeypatch.setattr(*where, wrong)
    with pytest.raises(AssertionError):
        check_texts("llama", "cheater", harsh(temperature), block=7)


# ---------------------------------------------------------------- grammars


@dataclass
class Strict:
    """A grammar that fails when it is asked about a text that it forbade, or that has ended; it may
    end after `least` tokens.
    """

    num_prompt: int
    least: int = 99

    def __call__(self, tokens: Sequence[int], logits: Tensor) -> Tensor:
        new = tokens[self.num_prompt - 1 :]
        if EOS in new[1:]:
            raise MemoryError("asked about what follows the end")
        if any(a % 2 == b % 2 for a, b in pairwise(new)):
            raise MemoryError("asked about a text that was forbidden")
        kept = logits[EOS].clone()
        alternating(tokens, logits)
        logits[EOS] = kept + 30 if len(new) > self.least else -math.inf
        return logits


def grammar_rows(least: int = 99) -> list[SamplingParams]:
    rows = rows_of("hook", 0.0)
    return [
        replace(own, logits_processor=Strict(len(p), least))
        for own, p in zip(rows, PROMPTS, strict=True)
    ]


@pytest.mark.parametrize("method", ["cheater", "tree", "dflash", "dflash tree"])
def test_a_grammar_holds_and_is_never_asked_about_what_it_forbade(method: str) -> None:
    for result, prompt in zip(
        check_texts("llama", method, grammar_rows(), block=7), PROMPTS, strict=True
    ):
        path = [prompt[-1], *result.tokens]
        assert all(a % 2 != b % 2 for a, b in pairwise(path))
    for result in check_texts("llama", method, rows_of("digits", 0.9))[::2]:
        assert result.text.isdigit()


def test_a_rule_that_asks_about_every_node_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    check_texts("llama", "tree", grammar_rows(), block=7)
    monkeypatch.setattr(*NODES, nodes_by(lambda path: path))
    with pytest.raises(MemoryError, match="forbidden"):
        check_texts("llama", "tree", grammar_rows(), block=7)


@pytest.mark.parametrize("least", [1, 2, 3, 4, 5])
def test_a_grammar_that_ended_is_never_asked_again(
    least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter goes on behind the end of the text, in every row."""
    params = grammar_rows(least)
    short = [replace(own, max_new_tokens=least + 1) for own in params]
    ended = [plain("llama", prompt, own)[0] for prompt, own in zip(PROMPTS, short, strict=True)]
    assert all(tokens.index(EOS) == least for tokens in ended)
    texts = [prompt + tokens + (7, 8, 9, 10) for prompt, tokens in zip(PROMPTS, ended, strict=True)]

    def results() -> list[Result]:
        return run(
            Engine(made("llama"), Cheater(texts, block_size=7), max_rows=3),
            requests_of(PROMPTS, params, [EOS]),
        )

    assert [(result.tokens, result.finish_reason) for result in results()] == [
        (tokens, "stop") for tokens in ended
    ]
    monkeypatch.setattr(Request, "ends", frozenset())
    with pytest.raises(MemoryError, match="the end"):
        results()


def test_a_hook_that_fails_frees_its_row_at_once_or_on_request() -> None:
    def late(tokens: Sequence[int], logits: Tensor) -> Tensor:
        return logits if len(tokens) < 6 else torch.full_like(logits, -math.inf)

    engine, params = (
        Engine(made("llama"), Autoregressive(), max_rows=2),
        SamplingParams(logits_processor=late, max_new_tokens=9),
    )
    with pytest.raises(InvalidParameter, match="after 10 tokens"):
        admit(engine, requests_of(PROMPTS[1:2], [params])[0])
    assert engine.num_free == 2
    admit(engine, requests_of(PROMPTS[:1], [params])[0])
    with pytest.raises(InvalidParameter, match="after 6 tokens"):
        [step(engine) for _ in range(4)]
    engine.cancel(0)
    assert engine.num_free == 2


# ---------------------------------------------------------------- the law of drawn and chosen nodes

UNION = ((0, "chosen"), (0, "drawn"), (1, "drawn"), (2, "chosen"), (2, "drawn"))
CHAIN = ((0, "drawn"), (1, "chosen"), (2, "drawn"))


def no_sum_of_two(tokens: Sequence[int], logits: Tensor) -> Tensor:
    logits[sum(tokens[-2:]) % 4] = -math.inf
    return logits


LAWS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "penalties": {"repetition_penalty": 3.0, "presence_penalty": 1.2, "frequency_penalty": 1.6},
    "penalties, cut": {
        "presence_penalty": 1.5,
        "frequency_penalty": 1.5,
        "top_p": 0.9,
        "logit_bias": {1: 0.7},
    },
    "hook": {"logits_processor": no_sum_of_two},
}
SHORT, NUM_TEXTS = [2, 1, 0], 1500


@dataclass
class Mixed(Oracle):
    """Chosen and drawn nodes from a wrong table of the last token, as a drafter must make them."""

    shape: Sequence[tuple[int, str]] = UNION

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(2)
        self.table = torch.randn(4, 4, generator=self.generator, dtype=torch.float64).softmax(-1)

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        tokens = torch.tensor(rows.anchors)[:, None].repeat(1, len(self.shape) + 1)
        probs = torch.zeros(*tokens.shape, 4, dtype=torch.float64)
        for node, (parent, kind) in enumerate(self.shape, 1):
            law = self.table[tokens[:, parent]]
            chosen = [
                i
                for i, other in enumerate(self.shape, 1)
                if other == (parent, "chosen") and i < node
            ]
            for sibling in chosen:
                law = law.scatter(1, tokens[:, sibling, None], 0.0)
            if kind == "drawn":
                probs[:, parent] = law / law.sum(1, keepdim=True)
            tokens[:, node] = (
                law.argmax(1)
                if kind == "chosen"
                else torch.multinomial(law, 1, generator=self.generator)[:, 0]
            )
        parents = torch.tensor([-1, *(parent for parent, _ in self.shape)]).expand(len(tokens), -1)
        drawn = torch.tensor([False, *(kind == "drawn" for _, kind in self.shape)]).expand(
            len(tokens), -1
        )
        return Proposal(
            tokens,
            parents,
            torch.full((len(tokens),), len(self.shape) + 1),
            probs=probs,
            drawn=drawn,
        )


def joint(target: Table, params: SamplingParams) -> Tensor:
    """The law of the first three tokens after SHORT, from the formula."""
    law = torch.zeros(4, 4, 4, dtype=torch.float64)
    for text in product(range(4), repeat=3):
        law[text] = 1.0
        for n, token in enumerate(text):
            history = [*SHORT, *text[:n]]
            law[text] *= probabilities(
                by_hand(target.logits[history[-1]], params, history, len(SHORT)), params
            )[token]
    return law.flatten()


def remembering(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same rule, computed once for every history: the table's logits are functions of it."""
    known: dict[Any, Tensor] = {}

    def again(
        logits: Tensor, params: SamplingParams, history: Sequence[int], num_prompt: int, *_: Any
    ) -> Tensor:
        key = (*history, num_prompt)
        return (
            known[key]
            if key in known
            else known.setdefault(key, rule(logits, params, history, num_prompt))
        )

    return again


def chi_square(
    shape: Sequence[tuple[int, str]], changes: dict[str, Any], patch: pytest.MonkeyPatch
) -> tuple[float, float]:
    """Of the first three tokens of texts against the law, and the level that one in 10,000 right
    rules exceeds; fixed seeds.
    """
    laws = flashdraft.decoding.laws
    patch.setattr(laws, "adjusted", remembering(laws.adjusted))
    target, counts = Table(1, 1.0), torch.zeros(64)
    engine = Engine(target, Mixed([], shape=shape), max_rows=500)
    params = SamplingParams(temperature=1.0, max_new_tokens=12, **changes)
    waiting = [
        Request(SHORT, replace(params, seed=i), TextDecoder(None), index=i)
        for i in range(NUM_TEXTS)
    ]
    for request in waiting:
        request.decoder.push = lambda token: ""  # type: ignore[method-assign]
        engine.submit(request)
    while engine.has_work:
        engine.step()
        for request in [
            request for request in engine.running.values() if len(request.history) >= len(SHORT) + 3
        ]:
            a, b, c = request.history[len(SHORT) :][:3]
            counts[16 * a + 4 * b + c] += 1
            engine.cancel(request.index)
    expected = joint(target, params) * NUM_TEXTS
    likely = expected >= 5
    assert float(expected.sum()) == pytest.approx(NUM_TEXTS)
    assert not counts[expected == 0].any(), "a text without mass"
    groups = [
        (counts[likely], expected[likely]),
        (counts[~likely].sum()[None], expected[~likely].sum()[None]),
    ]
    distance = sum(float(((a - b) ** 2 / b).sum()) for a, b in groups if float(b.sum()) > 0)
    return distance, float(stats.chi2.ppf(1 - 1e-4, int(likely.sum())))


@pytest.mark.parametrize("shape", [UNION, CHAIN], ids=["tree", "chain"])
@pytest.mark.parametrize("law", LAWS)
def test_texts_with_chosen_and_drawn_drafts_have_the_adjusted_law(
    law: str, shape: Sequence[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    distance, level = chi_square(shape, LAWS[law], monkeypatch)
    assert distance < level


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if "between" not in fault]
)  # that one shows in the fourth token
def test_a_planted_fault_changes_the_law(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, wrong = FAULTS[fault]
    monkeypatch.setattr(*where, wrong)
    distance, level = chi_square(CHAIN, LAWS["penalties"], monkeypatch)
    assert distance > 2 * level


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("method", METHODS)
def test_logprobs_are_those_of_the_target_before_anything_changed_its_law(method: str) -> None:
    params = [
        replace(own, logprobs=i != 1)
        for i, own in enumerate(rows_of("all", 0.0 if method == "drawn" else 0.9))
    ]
    if method == "drawn":
        params = [replace(own, temperature=0.0) for own in params]
    results, wanted = written("llama", method, params)
    for result, own, (tokens, logprobs) in zip(results, params, wanted, strict=True):
        assert result.tokens == tokens
        assert (result.logprobs is not None) == own.logprobs == ("logprobs" in result.to_dict())
        if result.logprobs is not None:
            assert result.logprobs == pytest.approx(logprobs, abs=1e-9)
            assert result.to_dict()["logprobs"] == list(result.logprobs)


SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # what the C++ kernels take


def exact_logprobs(drafter: Callable[[list[Any]], Any]) -> list[Any]:
    target = LeanTarget(
        tiny_model("", dtype=torch.float32, config=LlamaConfig(**{**SHAPE, **SIZES})),
        "row-exact llama",
    )
    assert target.row_exact
    params = [replace(own, logprobs=True) for own in rows_of("all", 0.9)]
    requests = requests_of(PROMPTS, params)
    engine, chunks = Engine(target, drafter(PROMPTS), max_rows=3), []
    chunks += [admit(engine, request) for request in requests]
    while engine.running:
        chunks += engine.step()
    pieces = [[p.logprob for c in chunks if c.index == i for p in c.pieces] for i in range(3)]
    ends = [
        chunk.result for chunk in sorted(chunks, key=lambda c: c.index) if chunk.result is not None
    ]
    assert [list(result.logprobs or ()) for result in ends] == pieces
    return [(result.tokens, result.logprobs) for result in ends]


def test_logprobs_are_equal_bit_for_bit_on_row_exact_kernels() -> None:
    expected = exact_logprobs(lambda prompts: Autoregressive())
    texts = [prompt + tokens for prompt, (tokens, _) in zip(PROMPTS, expected, strict=True)]
    assert (
        exact_logprobs(
            lambda prompts: Cheater(texts, block_size=7, right=lambda position: position % 4)
        )
        == expected
    )
    assert exact_logprobs(lambda prompts: Tree(texts, block_size=5)) == expected


def test_logprobs_of_the_wrong_nodes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Request.commit
    monkeypatch.setattr(
        Request, "commit", lambda self, tokens, n, logits, *_: commit(self, tokens, n, logits[::-1])
    )
    with pytest.raises(AssertionError):
        test_logprobs_are_those_of_the_target_before_anything_changed_its_law("cheater")


def test_logprobs_of_half_precision_are_computed_in_float32() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    assert logprob(logits, 1) == pytest.approx(
        -1 - math.log(1 + math.exp(-1) + math.exp(-2)), abs=1e-6
    )


def test_nothing_is_computed_where_no_logprobs_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flashdraft.request.logprob", None)
    check_texts("llama", "cheater", rows_of("all", 0.9))


# ---------------------------------------------------------------- where an adjusted text ends

ENDING = {
    "temperature": 0.9,
    "repetition_penalty": 2.0,
    "presence_penalty": 1.0,
    "logit_bias": {0: -90.0, 1: -90.0, EOS: -90.0},
}
LONG = SamplingParams(**ENDING, seed=3, max_new_tokens=24, logprobs=True)
DRAFTS: dict[str, Callable[[list[tuple[int, ...]], int], Any]] = {
    "chain": lambda texts, block: Cheater(texts, block_size=block),
    "tree": lambda texts, block: Tree(texts, block_size=block),
}


def one(kind: str, block: int, params: SamplingParams, eos: Iterable[int] = ()) -> Result:
    texts = [PROMPTS[1] + plain("llama", PROMPTS[1], LONG)[0]]
    return run(
        Engine(made("llama"), DRAFTS[kind](texts, block)), requests_of(PROMPTS[1:2], [params], eos)
    )[0]


@pytest.mark.parametrize(("kind", "block"), [("chain", 2), ("chain", 4), ("chain", 7), ("tree", 4)])
def test_an_adjusted_sampled_text_ends_where_it_must_at_every_offset(kind: str, block: int) -> None:
    tokens, logprobs = plain("llama", PROMPTS[1], LONG)
    text, offsets = letters(tokens), set()
    assert len(text) == len(tokens)
    for k in range(len(tokens)):
        limited = one(kind, block, replace(LONG, max_new_tokens=k + 1))
        results = [(limited, "length", k + 1)]
        if tokens[k] not in tokens[:k]:
            offsets.add((k - 1) % block)
            results.append((one(kind, block, LONG, eos=[tokens[k]]), "stop", k))
            results.append((one(kind, block, replace(LONG, stop=text[k])), "stop", k))
        for result, reason, shown in results:
            assert (result.tokens, result.text, result.finish_reason) == (
                tokens[: k + 1],
                text[:shown],
                reason,
            )
            assert result.logprobs == pytest.approx(logprobs[: k + 1], abs=1e-9)
    assert offsets == set(range(block))


# ---------------------------------------------------------------- long texts


@given(
    history=st.lists(st.integers(0, 5), min_size=2, max_size=12),
    num_prompt=st.integers(1, 6),
    cut=st.integers(1, 12),
    path=st.lists(st.integers(0, 5), max_size=4),
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_tokens_counted_step_by_step_are_penalised_like_a_list_of_them(
    history: list[int], num_prompt: int, cut: int, path: list[int]
) -> None:
    logits = torch.randn(6, generator=torch.Generator().manual_seed(len(history)))
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25)
    counts = Counts(6, num_prompt)
    counts.add(history[:cut])
    counts.add(history[cut:])
    context = Context(history, counts)
    for token in path:
        context = context.then(token)
    assert list(context) == [*history, *path]
    assert len(context) == len(history) + len(path)
    assert torch.equal(
        adjusted(logits, params, context, num_prompt),
        adjusted(logits, params, [*history, *path], num_prompt),
    )


class Walked(list[int]):
    """A text that counts the tokens which are read of it."""

    read = 0

    def __getitem__(self, place):  # type: ignore[no-untyped-def,override]
        found = super().__getitem__(place)
        Walked.read += len(found) if isinstance(place, slice) else 1
        return found

    def __iter__(self):  # type: ignore[no-untyped-def]
        Walked.read += len(self)
        return super().__iter__()


def test_penalties_of_a_step_do_not_walk_the_whole_text() -> None:
    target = Table(1, 1.0)
    engine = Engine(target, Autoregressive(), max_rows=1)
    params = SamplingParams(max_new_tokens=400, repetition_penalty=1.2, frequency_penalty=0.1)
    request = Request(SHORT, params, TextDecoder(None))
    request.decoder.push = lambda token: ""  # type: ignore[method-assign]
    admit(engine, request)
    request.history = Walked(request.history)
    for _ in range(300):
        engine.step()
    Walked.read = 0
    engine.step()
    assert Walked.read < 20
