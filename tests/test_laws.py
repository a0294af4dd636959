"""Hooks with a memory: the text is that of a hook without one, with every drafter; each token is
read once; wrong states are seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import EOS, VOCAB, requests_of, run, tiny_target
from torch import Tensor
from toy_engine import METHODS, PROMPTS, made
from toy_hooks import NEW, NUM_FREE, Sum, Sums, by_residue, plain, steered

from flashdraft.decoding.laws import Reading, adjusted_nodes
from flashdraft.decoding.sampling import adjusted
from flashdraft.engine import Engine
from flashdraft.errors import InvalidParameter
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.draft_model import DraftModelDrafter
from flashdraft.types import Proposal, Result, SamplingParams, Steered, Steering


def written(method: str, params: Sequence[SamplingParams]) -> list[Result]:
    futures = []
    for prompt, result in zip(PROMPTS, plain(params), strict=True):
        futures.append(prompt + result.tokens)
    drafter = METHODS[method](made("llama"), futures, 4)
    return run_with(drafter, params)


def run_with(drafter: object, params: Sequence[SamplingParams]) -> list[Result]:
    engine = Engine(made("llama"), drafter, max_rows=3)  # type: ignore[arg-type]
    results = run(engine, requests_of(PROMPTS, params, {EOS}))
    assert not engine._readings  # a row's state goes with it
    return results


def check_texts(method: str, temperature: float, state: type[Sum] = Sum) -> list[Result]:
    params = steered(temperature, state=state)
    results = written(method, params)
    for own, wanted in zip(results, plain(params), strict=True):
        assert own.tokens == wanted.tokens
        assert own.finish_reason == wanted.finish_reason
    return results


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("method", [method for method in METHODS if method != "drawn"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_text_is_that_of_a_hook_without_memory(method: str, temperature: float) -> None:
    first, _, last = check_texts(method, temperature)
    assert first.finish_reason == last.finish_reason == "stop"
    assert first.tokens[-1] == EOS


def test_greedy_text_is_the_same_where_drafts_are_drawn() -> None:
    check_texts("drawn", 0.0)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_draft_model_that_does_not_know_the_state_costs_no_text(drawn: bool) -> None:
    drafter = DraftModelDrafter(tiny_target("llama"), drawn=drawn)
    params = steered(0.0)
    results = run_with(drafter, params)
    assert [one.tokens for one in results] == [one.tokens for one in plain(params)]
    assert sum(one.stats.num_accepted for one in results) > 0


def test_drafts_are_accepted_and_rejected() -> None:
    """Otherwise the tests above would show nothing."""
    for method in ("cheater", "tree"):
        first, _, last = check_texts(method, 0.9)
        accepted = first.stats.num_accepted + last.stats.num_accepted
        drafted = first.stats.num_drafted + last.stats.num_drafted
        assert 0 < accepted < drafted


def test_a_text_that_goes_on_behind_its_end_keeps_the_hook() -> None:
    params = [replace(one, ignore_eos=True) for one in steered(0.0)]
    first, _, last = run_with(Autoregressive(), params)
    for result in (first, last):
        assert len(result.tokens) == NEW
        assert result.tokens[NUM_FREE:] == (EOS,) * (NEW - NUM_FREE)


def test_no_token_of_a_text_is_read_more_often_than_once_a_node() -> None:
    """Plain decoding reads each committed token once where states remember what follows them, and
    at most twice where they do not: never all again.
    """
    params = steered(0.0)
    run_with(Autoregressive(), params)
    hook = params[0].logits_processor
    assert isinstance(hook, Sums)
    (begun,) = hook.begun
    length = NUM_FREE + 1
    assert len(begun.reads) <= 3 * length


# ---------------------------------------------------------------- planted faults


class Shared(Sum):
    """A state that is changed where a copy was due."""

    def then(self, token: int) -> Steering:
        self.total += token
        self.length += 1
        return self


class Twice(Sum):
    """Every token is read twice."""

    def then(self, token: int) -> Steering:
        return replace(self, total=self.total + 2 * token, length=self.length + 1)


class Deaf(Sum):
    """A node has the state of its parent."""

    def then(self, token: int) -> Steering:
        return replace(self, length=self.length + 1)


@pytest.mark.parametrize("fault", [Shared, Twice, Deaf])
@pytest.mark.parametrize("method", ["cheater", "tree"])
def test_a_wrong_state_is_seen(fault: type[Sum], method: str) -> None:
    with pytest.raises((AssertionError, InvalidParameter)):
        check_texts(method, 0.9, fault)


def sibling_states(
    proposal: Proposal,
    logits: Tensor,
    histories: Sequence[list[int]],
    readings: Sequence[Reading | None],
    errors: dict[int, Exception],
) -> Tensor:
    """The walk with the state of the node before instead of the parent's."""
    as_chain = torch.arange(-1, proposal.num_nodes - 1).expand_as(proposal.parents)
    wrong = replace(proposal, parents=as_chain)
    return adjusted_nodes(wrong, logits, histories, readings, errors)


def test_the_state_of_a_sibling_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashdraft.engine.adjusted_nodes", sibling_states)
    with pytest.raises((AssertionError, InvalidParameter)):
        check_texts("tree", 0.9)


# ---------------------------------------------------------------- the walk itself


def test_only_nodes_that_a_text_can_reach_are_changed() -> None:
    """Behind a forbidden token, and behind an end of text, logits stay as they are."""
    params = SamplingParams(logits_processor=Sums())
    reading = Reading(params, [4, 4], frozenset({EOS}))
    history = [4, 4, 11]  # sum of the text: 11, so that 1, 6, 11, ... are forbidden
    tokens = torch.tensor([[11, 6, 7, 8, EOS, 9]])
    parents = torch.tensor([[-1, 0, 0, 1, 0, 2]])
    proposal = Proposal(tokens, parents, torch.tensor([5]))
    logits = torch.randn(1, 6, VOCAB, generator=torch.Generator().manual_seed(0))
    wanted = adjusted_nodes(proposal, logits, [history], [reading], {})
    changed = [node for node in range(6) if not torch.equal(wanted[0, node], logits[0, node])]
    assert changed == [0, 2]
    behind_seven = by_residue(18, 2, frozenset({EOS}))
    assert (wanted[0, 2] > -math.inf).nonzero()[:, 0].tolist() == behind_seven


def test_a_row_without_a_reading_keeps_its_logits() -> None:
    proposal = Proposal(torch.tensor([[5]]), torch.tensor([[-1]]), torch.tensor([1]))
    logits = torch.randn(1, 1, VOCAB)
    assert torch.equal(adjusted_nodes(proposal, logits, [[5]], [None], {}), logits)


def test_a_hook_with_a_memory_changes_nothing_where_its_state_is_not_known() -> None:
    params = SamplingParams(logits_processor=Sums())
    logits = torch.randn(VOCAB)
    assert isinstance(params.logits_processor, Steered)
    assert torch.equal(adjusted(logits, params, [1, 2], 1), logits)


def test_a_state_without_a_law_is_refused() -> None:
    nothing = Sum(frozenset(), by_residue, length=NUM_FREE)
    params = SamplingParams(logits_processor=Sums())
    with pytest.raises(InvalidParameter, match="no law after 2 tokens"):
        adjusted(torch.zeros(VOCAB), params, [1, 2], 1, nothing)
