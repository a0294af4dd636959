"""Two drafters in one tree: merged path by path against a slow search, within the budget, with the
plain text.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from conftest import SHAPE, admit, requests_of, run, tiny_drafter, tiny_model, tiny_target
from torch import Tensor
from transformers import LlamaConfig

from flashdraft.decoding.control import Control
from flashdraft.decoding.tree import Nodes, check
from flashdraft.engine import Engine
from flashdraft.errors import InvalidParameter
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.draft_model import DraftModelDrafter
from flashdraft.methods.prompt_lookup import PromptLookup
from flashdraft.methods.union import Union, merge
from flashdraft.models.hf import HFTarget
from flashdraft.models.target import Target
from flashdraft.types import Drafter, Proposal, Rows, SamplingParams

NEW = 16
PROMPTS = ((5, 9, 7), (9, 8, 30, 4, 11, 9, 8), (*range(10, 21), *range(10, 16)), (33,))
GREEDY = SamplingParams(max_new_tokens=NEW)
SAMPLED = tuple(
    SamplingParams(temperature=0.8, top_p=p, seed=int(100 * p), max_new_tokens=NEW)
    for p in (0.9, 1.0, 0.95, 1.0)
)
KINDS = {"greedy": (GREEDY,) * 4, "sampled": SAMPLED, "mixed": (GREEDY, *SAMPLED[1:])}


@functools.cache
def small() -> Target:
    """The target with some noise on its weights."""
    model = tiny_model("llama", config=LlamaConfig(**SHAPE))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn_like(parameter) * 0.01 * parameter.std(),
                alpha=1.0 if parameter.ndim > 1 else 0.0,
            )
    return HFTarget(model, "small")


def draft_model(**options: Any) -> DraftModelDrafter:
    return DraftModelDrafter(small(), **{"drawn": False, **options})


UNIONS: dict[str, Callable[[Target], Union]] = {
    "dflash+prompt_lookup": lambda target: Union(tiny_drafter(target), PromptLookup()),
    "dflash tree+draft_model": lambda target: Union(
        tiny_drafter(target, tree_nodes=9), draft_model()
    ),
    "prompt_lookup+draft_model": lambda target: Union(PromptLookup(), draft_model()),
    "three": lambda target: Union(
        Union(tiny_drafter(target), draft_model(block_size=3)), PromptLookup()
    ),
    "nothing": lambda target: Union(Autoregressive(), Autoregressive()),
}


@functools.cache
def plain(params: tuple[SamplingParams, ...]) -> list[tuple[int, ...]]:
    engine = Engine(tiny_target("llama"), Autoregressive(), max_rows=1)
    return [result.tokens for result in run(engine, requests_of(PROMPTS, params))]


# ---------------------------------------------------------------- the merged tree


def random_tree(chance: random.Random) -> Nodes:
    """Siblings differ, parents come before children."""
    tokens, parents, scores = list[int](), list[int](), list[float]()
    for node in range(chance.randint(0, 6)):
        parent = chance.choice([node, chance.randint(0, node)])
        free = [t for t in range(4) if (parent, t) not in zip(parents, tokens, strict=True)]
        tokens.append(chance.choice(free))
        parents.append(parent)
        scores.append(chance.choice([0.0, -chance.random() * 2]))
    return tokens, parents, scores


def paths_of(tree: Nodes) -> dict[tuple[int, ...], float]:
    """Every path with the score of its last node, by climbing from each node to the anchor."""
    tokens, parents, scores = tree
    found = {}
    for node in range(1, len(tokens) + 1):
        path, above = list[int](), node
        while above > 0:
            path, above = [tokens[above - 1], *path], parents[above - 1]
        found[tuple(path)] = scores[node - 1]
    return found


def slow(trees: Sequence[Nodes]) -> dict[tuple[int, ...], float]:
    """Every path of any tree with the log-confidence of the whole of it, the better of the two at
    each node.
    """
    known = [paths_of(tree) for tree in trees]
    own = {
        path: max(found[path] for found in known if path in found)
        for found in known
        for path in found
    }
    return {path: sum(own[path[:n]] for n in range(1, len(path) + 1)) for path in own}


merge_under_test: Callable[[Sequence[Nodes], int], Nodes] = merge


def check_merge(trees: Sequence[Nodes], count: int) -> None:
    wanted, merged = slow(trees), merge_under_test(trees, count)
    tokens, parents, _ = merged
    size = 1 + len(tokens)
    check(
        Proposal(torch.tensor([[9, *tokens]]), torch.tensor([[-1, *parents]]), torch.tensor([size]))
    )
    assert len(tokens) == min(count, len(wanted))
    totals = [wanted[path] for path in paths_of(merged)]
    assert totals == pytest.approx(sorted(wanted.values(), reverse=True)[:count])
    assert slow([merged]) == pytest.approx({path: wanted[path] for path in paths_of(merged)})


def all_merges(times: int = 400) -> None:
    chance = random.Random(5)
    for _ in range(times):
        check_merge([random_tree(chance), random_tree(chance)], chance.choice([0, 1, 3, 5, 20]))


def test_the_merged_tree_holds_the_likeliest_paths_of_both() -> None:
    all_merges()


def test_of_equal_prefixes_one_remains_and_of_equal_scores_the_parent_comes_first() -> None:
    assert merge([([1, 2], [0, 1], [-0.5, -0.5]), ([1, 3], [0, 1], [-0.1, 0.0])], 9) == (
        [1, 3, 2],
        [0, 1, 1],
        [-0.1, 0.0, -0.5],
    )
    assert merge([([1, 2, 3], [0, 1, 2], [0.0, 0.0, 1e-7]), ([4], [0], [0.0])], 3)[0] == [1, 2, 3]
    assert merge([([], [], []), ([], [], [])], 5) == ([], [], [])


def side_by_side(trees: Sequence[Nodes], count: int) -> Nodes:
    """Equal siblings stay two."""
    (a, b, c), (d, e, f) = trees
    return (
        [*a, *d][:count],
        [*b, *(above and above + len(a) for above in e)][:count],
        [*c, *f][:count],
    )


def first_come(trees: Sequence[Nodes], count: int) -> Nodes:
    """The budget goes to the first drafter."""
    first = merge(trees[:1], count)
    return first if len(first[0]) == count else merge(trees, count)


def own_scores_only(trees: Sequence[Nodes], count: int) -> Nodes:
    """The best nodes, not the best paths."""
    tokens, parents, scores = merge(trees, 99)
    order = sorted(range(len(tokens)), key=lambda node: -scores[node])[:count]
    return [tokens[n] for n in order], [parents[n] for n in order], [scores[n] for n in order]


def first_score(trees: Sequence[Nodes], count: int) -> Nodes:
    """Of two scores the first drafter's."""
    known, (tokens, parents, scores) = paths_of(trees[0]), trees[1]
    own = [known.get(path, score) for path, score in zip(paths_of(trees[1]), scores, strict=True)]
    return merge([trees[0], (tokens, parents, own)], count)


@pytest.mark.parametrize("faulty", [side_by_side, first_come, own_scores_only, first_score])
def test_a_wrong_merge_is_seen(
    faulty: Callable[..., Nodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "merge_under_test", faulty)
    with pytest.raises(AssertionError):
        all_merges()


# ---------------------------------------------------------------- proposals


def rows_of(histories: Sequence[Sequence[int]], params: SamplingParams = GREEDY) -> Rows:
    return Rows(
        list(range(len(histories))),
        [list(history) for history in histories],
        [params] * len(histories),
        [1] * len(histories),
    )


@pytest.mark.parametrize("max_nodes", [1, 2, 4, 6, 40])
def test_a_union_keeps_to_the_budget_and_to_what_was_proposed(max_nodes: int) -> None:
    rows = rows_of(PROMPTS)
    first, second = draft_model(), PromptLookup()
    joined = Union(draft_model(), PromptLookup()).propose(rows, max_nodes)
    check(joined)
    assert joined.num_nodes <= max_nodes
    parts = [one.propose(rows, max_nodes) for one in (first, second)]
    for row, size in enumerate(joined.sizes.tolist()):
        own = [
            (p.tokens[row, 1:n].tolist(), p.parents[row, 1:n].tolist(), [0.0] * (n - 1))
            for p in parts
            for n in [p.sizes[row]]
        ]
        merged = (
            joined.tokens[row, 1:size].tolist(),
            joined.parents[row, 1:size].tolist(),
            [0.0] * (size - 1),
        )
        both = {path for tree in own for path in paths_of(tree)}
        assert set(paths_of(merged)) <= both
        assert size == min(max_nodes, 1 + len(both))
    assert max_nodes < 40 or max(joined.sizes.tolist()) > max(part.num_nodes for part in parts)


def test_drawn_drafts_are_refused() -> None:
    drawing = draft_model(drawn=True)
    union = Union(drawing, PromptLookup())
    assert union.propose(rows_of(PROMPTS, SAMPLED[0]), 9).drawn is None  # told to choose
    drawing.drawn = True
    assert union.propose(rows_of(PROMPTS), 9).drawn is None
    with pytest.raises(InvalidParameter, match="drawn drafts cannot be joined") as raised:
        union.propose(rows_of(PROMPTS, SAMPLED[0]), 9)
    assert "drawn=False" in str(raised.value.hint)


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNIONS)
def test_texts_are_the_plain_texts_while_rows_join_and_leave(name: str, kind: str) -> None:
    union = UNIONS[name](tiny_target("llama"))
    engine = Engine(tiny_target("llama"), union, max_rows=3)
    for _ in range(2):
        results = run(engine, requests_of(PROMPTS, KINDS[kind]))
        assert [result.tokens for result in results] == plain(KINDS[kind])
        assert all(not any(cache.lengths) for cache in union.caches)
    accepted = sum(result.stats.num_accepted for result in results)
    assert (accepted > 0) == (name != "nothing") or name == "dflash+prompt_lookup"


def test_a_shared_budget_under_the_controller_leaves_texts_alone() -> None:
    for seconds in ({1: 1.0, 8: 1.1}, {1: 1.0, 8: 2.0}):
        engine = Engine(
            tiny_target("llama"),
            UNIONS["prompt_lookup+draft_model"](tiny_target("llama")),
            max_rows=3,
        )
        engine.control = Control(seconds)
        results = run(engine, requests_of(PROMPTS, KINDS["mixed"]))
        assert [result.tokens for result in results] == plain(KINDS["mixed"])


def test_a_union_accepts_what_either_would() -> None:
    texts = {}
    for name, drafter in {
        "one": draft_model(),
        "two": PromptLookup(),
        "both": Union(draft_model(), PromptLookup()),
    }.items():
        engine = Engine(tiny_target("llama"), drafter, max_rows=4)
        requested = requests_of(PROMPTS, KINDS["greedy"])
        for request in requested:
            admit(engine, request)
        engine.step()  # from the same texts
        texts[name] = [request.stats.num_accepted for request in requested]
    assert texts["both"] == [max(pair) for pair in zip(texts["one"], texts["two"], strict=True)]


# ---------------------------------------------------------------- what each drafter sees


@dataclass
class Listener(Drafter):
    """Keeps the features and tokens that it is shown."""

    layers: tuple[int, ...] = ()
    name: str = "listener"
    tokens: dict[int, list[int]] = field(default_factory=dict)
    features: dict[int, list[Tensor]] = field(default_factory=dict)
    checked: int = 0

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        return draft_model().propose(rows, max_nodes)

    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        assert (features is None) == (not self.layers)
        for i, slot in enumerate(rows.slots):
            self.tokens.setdefault(slot, []).extend(tokens[i].tolist())
            self.features.setdefault(slot, []).extend(() if features is None else [features[i]])

    def end(self, rows: Rows) -> None:
        for slot, history in zip(rows.slots, rows.histories, strict=True):
            tokens, features, target = (
                self.tokens.pop(slot),
                self.features.pop(slot),
                tiny_target("llama"),
            )
            assert tokens == history[: len(tokens)]
            _, wanted = target.prefill(
                target.new_cache(1, len(tokens)), 0, torch.tensor(tokens), self.layers
            )
            assert wanted is None or torch.allclose(torch.cat(features), wanted, atol=1e-6)
            self.checked += 1


def check_features(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    pair = Listener(first), Listener(second)
    union = Union(*pair)
    assert sorted(union.layers) == sorted({*first, *second})
    run(Engine(tiny_target("llama"), union, max_rows=2), requests_of(PROMPTS, KINDS["greedy"]))
    assert [one.checked for one in pair] == [len(PROMPTS)] * 2


@pytest.mark.parametrize(
    "layers", [((0, 3), ()), ((), (2,)), ((0, 3), (0, 3)), ((4, 1), (3, 1, 0)), ((), ())]
)
def test_each_drafter_sees_the_features_that_it_asked_for(
    layers: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    check_features(*layers)


def test_features_of_another_layer_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = Union.observe

    def shifted(self: Union, rows: Rows, tokens: Any, features: Any) -> None:
        observe(
            self,
            rows,
            tokens,
            features and [f.unflatten(1, (-1, 32)).flip(1).flatten(1) for f in features],
        )

    monkeypatch.setattr(Union, "observe", shifted)
    with pytest.raises(AssertionError):
        check_features((4, 1), (3, 1, 0))


def test_name_and_memory_are_those_of_both() -> None:
    first, second = tiny_drafter(tiny_target("llama")), draft_model()
    union = Union(first, second)
    assert union.name == "dflash+draft_model"
    engine = Engine(tiny_target("llama"), union, max_rows=2)
    run(engine, requests_of(PROMPTS, KINDS["greedy"]))
    assert first.cache.nbytes > 0 < second.cache.nbytes
    assert engine.cache_nbytes == engine._cache.nbytes + first.cache.nbytes + second.cache.nbytes


def test_an_unknown_confidence_stands_between_the_sure_and_the_unlikely() -> None:
    """Of two nodes the drafter without confidence keeps its place before a doubtful one and behind
    a sure one.
    """

    @dataclass
    class Fixed(Drafter):
        score: float | None
        name: str = "fixed"

        def propose(self, rows: Rows, max_nodes: int) -> Proposal:
            tokens = torch.tensor([[rows.anchors[0], 40 if self.score is None else 50]])
            own = Proposal(tokens, torch.tensor([[-1, 0]]), torch.tensor([2]))
            return (
                own
                if self.score is None
                else replace(own, scores=torch.tensor([[0.0, self.score]]))
            )

    for score, token in ((-0.1, 50), (-3.0, 40)):
        assert Union(Fixed(score), Fixed(None)).propose(
            rows_of(PROMPTS[:1]), 2
        ).tokens.tolist() == [[7, token]]


class Still(Autoregressive):
    """A part with a network, whose every proposal is counted."""

    is_free = False

    def __init__(self) -> None:
        self.num_proposals = 0

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        self.num_proposals += 1
        return super().propose(rows, max_nodes)


class NeverPays(Control):
    def wants_drafts(self, rows: int, gain: float = 1.0) -> bool:
        return False


@pytest.mark.parametrize("has_free_part", [True, False])
def test_the_free_part_drafts_where_the_network_does_not_pay(has_free_part: bool) -> None:
    """Texts that repeat themselves: copies are accepted, and nobody asks the network."""
    still = Still()
    union = Union(still, PromptLookup())
    assert union.free_part is union.drafters[1]
    if not has_free_part:
        union.free_part = None  # the planted fault
    target = tiny_target("llama")
    params = SamplingParams(max_new_tokens=40)
    found = []
    for drafter, control in ((union, NeverPays({1: 1.0, 8: 1.01})), (Autoregressive(), None)):
        engine = Engine(target, drafter, control=control)
        (request,) = requests_of([[7, 8, 9] * 12], [params])
        (result,) = run(engine, [request])
        found.append((list(result.tokens), result.stats.num_accepted))
    assert found[0][0] == found[1][0]
    assert still.num_proposals == 0
    assert (found[0][1] > 0) == has_free_part
