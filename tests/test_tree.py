from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashdraft.decoding.tree import ancestors, best_first, chain, check, depths, independent
from flashdraft.types import Proposal


@st.composite
def forests(draw: st.DrawFn) -> Tensor:
    """Rows of trees; a -1 behind the anchor is padding that has no parent."""
    num_nodes = draw(st.integers(1, 9))
    row = st.tuples(st.just(-1), *(st.integers(-1, node - 1) for node in range(1, num_nodes)))
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))


def climb(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [node, *climb(parents, parents[node])]


@settings(derandomize=True, deadline=None)
@given(parents=forests())
def test_nodes_see_themselves_and_their_ancestors_and_nothing_else(parents: Tensor) -> None:
    visible, depth = ancestors(parents), depths(parents)
    for row, own in enumerate(parents.tolist()):
        for node in range(len(own)):
            assert sorted(climb(own, node)) == visible[row, node].nonzero()[:, 0].tolist()
            assert depth[row, node] == len(climb(own, node)) - 1


def test_a_chain_sees_everything_before_it() -> None:
    parents = chain(5)
    assert parents.tolist() == [-1, 0, 1, 2, 3]
    assert depths(parents[None]).tolist() == [[0, 1, 2, 3, 4]]
    assert torch.equal(ancestors(parents[None])[0], torch.ones(5, 5, dtype=torch.bool).tril())


def test_parents_in_a_circle_end_the_climb() -> None:
    assert ancestors(torch.tensor([[-1, 2, 1]])).shape == (1, 3, 3)


def paths_by_force(scores: list[list[float]]) -> list[float]:
    """The log-probability of every path of any depth, likeliest first."""
    paths, level = list[float](), [0.0]
    for depth in scores:
        level = [path + own for path in level for own in depth]
        paths += level
    return sorted(paths, reverse=True)


@settings(derandomize=True, deadline=None)
@given(
    scores=st.lists(st.lists(st.floats(-5, -0.01), min_size=1, max_size=3), min_size=1, max_size=4),
    count=st.integers(1, 40),
)
def test_best_first_holds_the_likeliest_paths_and_every_prefix_is_a_tree(
    scores: list[list[float]], count: int
) -> None:
    scores = [sorted(depth, reverse=True) for depth in scores]
    names = [[10 * depth + rank for rank in range(len(own))] for depth, own in enumerate(scores)]
    tokens, parents, own = best_first(-1, independent(-1, names, scores), count)
    whole = [0.0]
    for parent, score in zip(parents, own, strict=True):
        whole.append(whole[parent] + score)  # a parent stands before its child
    wanted = paths_by_force(scores)[:count]
    assert whole[1:] == pytest.approx(wanted)
    shape = torch.tensor([[-1, *parents]])
    check(Proposal(torch.tensor([[99, *tokens]]), shape, torch.tensor([1 + len(tokens)])))
    assert depths(shape)[0].tolist()[1:] == [1 + token // 10 for token in tokens]


def test_one_token_a_depth_makes_a_chain() -> None:
    laws = independent(9, [[5], [6], [7]], [[-1.0], [-0.1], [-2.0]])
    assert best_first(9, laws, 2) == ([5, 6], [0, 1], [-1.0, -0.1])


def test_every_branch_goes_on_by_its_own_token() -> None:
    laws = [
        {9: ([1, 2, 5], [-0.5, -0.6, -9.0])},
        {1: ([3, 4], [-2.0, -2.1]), 2: ([4, 3], [-0.1, -3.0])},
    ]
    assert best_first(9, laws, 4) == ([1, 2, 4, 3], [0, 0, 2, 1], [-0.5, -0.6, -0.1, -2.0])
    assert len(best_first(9, laws, 9)[0]) == 7, (
        "nothing grows behind a token that the laws do not know"
    )


def good() -> Proposal:
    """Two rows with a drawn pair, a chosen node, a node below, and padding in the second row."""
    return Proposal(
        tokens=torch.tensor([[9, 1, 2, 3, 1], [9, 1, 2, 2, 2]]),
        parents=torch.tensor([[-1, 0, 0, 0, 1], [-1, 0, 0, -1, 0]]),
        sizes=torch.tensor([5, 3]),
        scores=torch.zeros(2, 5),
        probs=torch.full((2, 5, 10), 0.1),
        drawn=torch.tensor([[False, True, True, False, True], [False, True, False, False, False]]),
    )


def edited(name: str, *at: int, value: int) -> Proposal:
    proposal = good()
    changed = getattr(proposal, name).clone()
    changed[at] = value
    return replace(proposal, **{name: changed})


def without(**fields: Any) -> Proposal:
    return replace(good(), **fields)


def test_a_proposal_that_keeps_its_promises_passes() -> None:
    check(good())
    check(without(probs=None, drawn=None, scores=None))
    check(without(probs=None, drawn=torch.zeros(2, 5, dtype=torch.bool)))
    check(edited("drawn", 1, 4, value=1))  # padding may hold anything that is a tree


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        (without(parents=torch.tensor([[-1, 0]])), "do not fit"),
        (without(sizes=torch.tensor([5])), "for 2 rows"),
        (without(scores=torch.zeros(2, 4)), "scores do not fit"),
        (without(drawn=torch.zeros(1, 5, dtype=torch.bool)), "drawn do not fit"),
        (edited("sizes", 0, value=0), "outside"),
        (edited("sizes", 1, value=6), "outside"),
        (edited("parents", 1, 0, value=0), "not a root"),
        (edited("parents", 0, 3, value=3), "precede"),
        (edited("parents", 1, 4, value=4), "precede"),
        (edited("parents", 0, 2, value=-1), "second root"),
        (edited("tokens", 0, 3, value=2), "siblings with the same token"),
        (without(probs=None), "without their law"),
        (without(probs=torch.full((2, 4, 10), 0.1)), "probs"),
        (edited("drawn", 0, 0, value=1), "anchor"),
        (edited("probs", 0, 1, 1, value=0), "no mass"),
    ],
)
def test_a_broken_promise_is_found(proposal: Proposal, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(proposal)
