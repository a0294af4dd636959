"""The real model, SmolLM2-135M-Instruct, with its shipped drafter: text equality, and the law of
the verified tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

import flashdraft
from flashdraft import SamplingParams
from flashdraft.decoding.sampling import target_probs
from flashdraft.decoding.verify import verify
from flashdraft.generate import Model
from flashdraft.loading import drafters, load_target
from flashdraft.methods.dflash import DFlashDrafter
from flashdraft.methods.prompt_lookup import PromptLookup
from flashdraft.methods.union import Union
from flashdraft.types import Proposal, Rows

pytestmark = pytest.mark.real_model

PROMPTS = [
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "A farmer has 12 cows and buys 7 more. He sells 5. "
    "How many cows does he have? Reason step by step.",
    "List three uses of copper.",
    "Translate to French: I would like a cup of coffee.",
    "Write a haiku about the sea.",
    "Explain recursion to a child.",
    "What is the capital of Australia, and what is it known for?",
    "Write a SQL query that counts the orders of every customer.",
    "Summarise the story of Romeo and Juliet in two sentences.",
    "You are a pirate. Describe your ship.",
    "If a train travels 60 miles in 1.5 hours, what is its average speed?",
    "Give me a recipe for pancakes.",
    "Write a JavaScript function that checks whether a number is prime.",
    "What are the differences between a list and a tuple in Python?",
    "Write a short e-mail that thanks a colleague for her help.",
]
NUM_DRAWS = 200_000


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """One target, four drafters."""
    target, tokenizer, eos = load_target("smollm2-135m")

    def model(draft: str) -> Model:
        return Model(
            target, tokenizer, drafters(draft, target, "smollm2-135m"), eos=eos, max_rows=4
        )

    return {
        "auto": model("auto"),
        "dflash": model("dflash"),
        "prompt_lookup": model("prompt_lookup"),
        "autoregressive": model("autoregressive"),
    }


def test_the_shipped_drafter_is_the_default(models: dict[str, Model]) -> None:
    drafter = models["auto"].new_drafter()
    assert isinstance(drafter, Union)
    network, lookup = drafter.drafters
    assert isinstance(network, DFlashDrafter)
    assert isinstance(lookup, PromptLookup)
    assert flashdraft.DFlashDraftModel is not None


def test_greedy_text_is_the_plain_text(models: dict[str, Model]) -> None:
    plain = models["autoregressive"].generate(PROMPTS, max_new_tokens=40)
    for method in ("auto", "dflash", "prompt_lookup"):
        results = models[method].generate(PROMPTS, max_new_tokens=40)
        assert [result.tokens for result in results] == [result.tokens for result in plain]
    assert (
        sum(
            result.stats.num_accepted
            for result in models["dflash"].generate(PROMPTS[:4], max_new_tokens=40)
        )
        > 0
    )


def test_seeded_sampled_text_is_the_plain_seeded_text(models: dict[str, Model]) -> None:
    params = [SamplingParams(temperature=1.0, seed=seed, max_new_tokens=40) for seed in range(4)]
    params = [
        params[0],
        replace(params[1], top_p=0.9),
        replace(params[2], top_k=40),
        replace(params[3], min_p=0.05),
    ]
    plain = models["autoregressive"].generate(PROMPTS[:4], params)
    for method in ("auto", "dflash"):
        drafted = models[method].generate(PROMPTS[:4], params)
        assert [result.tokens for result in drafted] == [result.tokens for result in plain]
    other = models["dflash"].generate(
        PROMPTS[:4], [replace(one, seed=one.seed + 100) for one in params]
    )
    assert [result.tokens for result in other] != [result.tokens for result in plain]


def _real_proposal(model: Model, prompt: str) -> tuple[Proposal, Tensor, Tensor]:
    """A DFlash proposal within the prompt's own answer, the target's laws at T = 1, and the draft's
    softmax.

    The place is the first one from the answer's seventh token on where the target is undecided
    about the draft token.
    """
    prompt_tokens = model.encode(prompt)
    answer = model.generate(prompt_tokens, max_new_tokens=40).tokens
    for count in range(6, len(answer)):
        proposal, laws, softmax = _proposal_after(model, [*prompt_tokens, *answer[:count]])
        if 0.05 < laws[0, proposal.tokens[0, 1]] < 0.95:
            return proposal, laws, softmax
    raise AssertionError("no place where the target is undecided")


def _proposal_after(model: Model, tokens: list[int]) -> tuple[Proposal, Tensor, Tensor]:
    drafter = model.new_drafter()
    assert isinstance(drafter, DFlashDrafter)
    cache = model.target.new_cache(1, 512)
    _, features = model.target.prefill(cache, 0, torch.tensor(tokens[:-1]), drafter.layers)
    assert features is not None
    rows = Rows([0], [tokens], [SamplingParams(temperature=1.0)], [len(tokens)])
    drafter.observe(rows, [torch.tensor(tokens[:-1])], [features])
    states: list[Tensor] = []
    scored = drafter.network.scored
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # the drafter keeps its argmax only; the planted fault needs its law
        patch.setattr(
            drafter.network,
            "scored",
            lambda hidden, *rest: states.append(hidden[0]) or scored(hidden, *rest),
        )
        proposal = drafter.propose(rows, 8)
    logits, _ = model.target.forward(
        cache, [0], proposal.tokens, proposal.parents, proposal.sizes, ()
    )
    laws = target_probs(logits, rows.params, proposal.sizes)
    network = drafter.network
    assert network.head is not None
    assert network.vocabulary is not None
    softmax = torch.zeros_like(
        laws[0]
    ).double()  # row i: the law from which node i's child would have been drawn
    softmax[: proposal.num_nodes - 1, network.vocabulary] = (
        network.head(states[0]).double().softmax(-1)
    )
    return proposal, laws[0].double(), softmax


def _pooled(
    proposal: Proposal, laws: Tensor, *others: Tensor, num_draws: int = NUM_DRAWS
) -> tuple[Proposal, list[Tensor]]:
    """The same proposal over fewer tokens: those with 5 expected draws or more, the drafts', and
    one for all the rest.

    Pooling commutes with the rule: a chosen node asks only whether the draw is its own token.
    """
    kept = ((laws * num_draws) >= 5).any(0)
    kept[proposal.tokens[0]] = True
    ids = kept.nonzero()[:, 0]
    small = [
        torch.cat((law[:, ids], law[:, ~kept].sum(1, keepdim=True)), 1) for law in (laws, *others)
    ]
    return replace(proposal, tokens=torch.searchsorted(ids, proposal.tokens)), small


def _draws(
    proposal: Proposal,
    laws: Tensor,
    *,
    seed: int,
    num_draws: int = NUM_DRAWS,
    fault: Tensor | None = None,
) -> Tensor:
    """First and second emitted tokens of many verdicts: [draws, 2]; -1 where a verdict emitted one
    only.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes, out = proposal.num_nodes, []
    for _ in range(20):
        count = num_draws // 20

        def wide(tensor: Tensor, count: int = count) -> Tensor:
            return tensor.expand(count, *tensor.shape[1:])

        shape = wide(proposal.tokens), wide(proposal.parents), wide(proposal.sizes)
        many = Proposal(*shape)
        if fault is not None:
            drawn = torch.ones(1, nodes, dtype=torch.bool)
            drawn[:, 0] = False
            many = Proposal(*shape, probs=wide(fault[None]), drawn=wide(drawn))
        draws = torch.rand(count, nodes, generator=generator, dtype=torch.float64)
        coins = torch.rand(count, nodes, generator=generator, dtype=torch.float64)
        verdict = verify(many, wide(laws[None]), draws, coins)
        first_node = verdict.path[:, 1] if verdict.path.shape[1] > 1 else torch.full((count,), -1)
        second_node = verdict.path[:, 2] if verdict.path.shape[1] > 2 else torch.full((count,), -1)
        tokens = proposal.tokens[0]
        first = torch.where(first_node >= 0, tokens[first_node.clamp(min=0)], verdict.bonus)
        second = torch.where(second_node >= 0, tokens[second_node.clamp(min=0)], verdict.bonus)
        out.append(torch.stack((first, torch.where(first_node >= 0, second, -1)), 1))
    return torch.cat(out)


def _p_value(counts: Tensor, law: Tensor) -> float:
    """Chi-square against `law`; cells with an expectation under 5 are pooled."""
    expected = law / law.sum() * counts.sum()
    small = expected < 5
    observed = torch.cat((counts[~small].double(), counts[small].sum()[None].double()))
    wanted = torch.cat((expected[~small], expected[small].sum()[None]))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    return float(chi2.sf(statistic, max(len(wanted) - 1, 1)))


@pytest.mark.parametrize("index", range(8))
def test_verified_tokens_have_the_targets_law(models: dict[str, Model], index: int) -> None:
    proposal, laws, _ = _real_proposal(models["dflash"], PROMPTS[index])
    proposal, (laws,) = _pooled(proposal, laws)
    vocab = laws.shape[1]
    tokens = _draws(proposal, laws, seed=index)
    counts = torch.bincount(tokens[:, 0], minlength=vocab)
    assert _p_value(counts, laws[0]) > 1e-4
    accepted = tokens[:, 1] >= 0  # depth 2: the law after the first draft token
    assert int(accepted.sum()) > 5000
    assert _p_value(torch.bincount(tokens[accepted, 1], minlength=vocab), laws[1]) > 1e-4


def test_the_planted_fault_is_caught(models: dict[str, Model]) -> None:
    """An argmax draft judged by the drafter's softmax, as if it had been drawn from it; a tenth of
    the draws shows it.
    """
    caught = []
    for index, prompt in enumerate(PROMPTS[:8]):
        proposal, laws, softmax = _real_proposal(models["dflash"], prompt)
        proposal, (laws, softmax) = _pooled(proposal, laws, softmax, num_draws=20_000)
        faulty = _draws(proposal, laws, seed=index, num_draws=20_000, fault=softmax)
        caught.append(
            _p_value(torch.bincount(faulty[:, 0], minlength=laws.shape[1]), laws[0]) < 1e-12
        )
    assert sum(caught) >= 6, (
        caught
    )  # a draft that happens to be as sure as the target shows nothing
