"""Laws by chi-square over 200,000 rows, the walk against a slow one node for node, seeded text by
equality.

Every law is tested on the first token, the first pair and the first triple; every way of getting it
wrong that is known is planted, and must be seen.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import pytest
import torch
from scipy import stats
from torch import Tensor

from flashdraft.decoding.sampling import coins, draw, probabilities, target_probs, uniforms
from flashdraft.decoding.tree import chain, check, depths
from flashdraft.decoding.verify import verify
from flashdraft.types import Proposal, SamplingParams, Verdict

ROWS, VOCAB = 200_000, 5
RULE = sys.modules[
    "flashdraft.decoding.verify"
]  # the module, also when the package exports the function under the same name
# chi-square above its degrees of freedom: at most 56 with the right rule (72 seeds), 1,200 with the
# mildest fault
SEEN = 1000

Shape = Sequence[tuple[int, str]]  # parent and kind of node 1, 2, ...
CHAIN_CHOSEN = ((0, "chosen"), (1, "chosen"), (2, "chosen"))
CHAIN_DRAWN = ((0, "drawn"), (1, "drawn"), (2, "drawn"))
TREE_CHOSEN = (
    (0, "chosen"),
    (0, "chosen"),
    (0, "chosen"),
    (1, "chosen"),
    (1, "chosen"),
    (2, "chosen"),
    (4, "chosen"),
)
TREE_DRAWN = (
    (0, "drawn"),
    (0, "drawn"),
    (0, "drawn"),
    (1, "drawn"),
    (1, "drawn"),
    (2, "drawn"),
    (2, "drawn"),
    (4, "drawn"),
)
UNION = (
    (0, "drawn"),
    (0, "chosen"),
    (0, "drawn"),
    (1, "chosen"),
    (1, "drawn"),
    (2, "drawn"),
    (2, "drawn"),
    (2, "chosen"),
)
SHAPES = {
    "chain": CHAIN_DRAWN,
    "tree": TREE_DRAWN,
    "union": UNION,
    "chosen chain": CHAIN_CHOSEN,
    "chosen tree": TREE_CHOSEN,
}


class Language(Protocol):
    def law(self, text: Tensor) -> Tensor:
        """The law of the next token. text: [rows, length] -> [rows, vocab]."""
        ...


@dataclass
class Toy:
    """A language of five tokens whose law depends on everything written so far, up to four
    tokens.
    """

    seed: int
    sharpness: float = 0.8
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=1.0))

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [(VOCAB,) * (length + 1) for length in range(4)]
        logits = [
            torch.randn(size, generator=generator, dtype=torch.float64) * self.sharpness
            for size in sizes
        ]
        self.tables = [probabilities(table, self.params) for table in logits]

    def law(self, text: Tensor) -> Tensor:
        recent = text[:, -3:]
        table = self.tables[recent.shape[1]]
        return table[tuple(recent.T)] if len(recent.T) else table.expand(len(text), -1)

    def joint(self, length: int) -> Tensor:
        """The law of the first `length` tokens, flat."""
        law = self.tables[0]
        for table in self.tables[1:length]:
            law = law[..., None] * table
        return law.flatten()


@dataclass
class Past:
    """A toy language that goes on after `past`."""

    toy: Toy
    past: Tensor  # [rows, length]

    def law(self, text: Tensor) -> Tensor:
        return self.toy.law(torch.cat([self.past, text], 1))


def pick(law: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each row, drawn without the code under test."""
    u = torch.rand(len(law), 1, generator=generator, dtype=torch.float64)
    return (law.cumsum(1) <= u * law.sum(1, keepdim=True)).sum(1)


def draft_trees(
    shape: Shape, draft: Language, generator: torch.Generator, rows: int = ROWS
) -> tuple[Proposal, list[Tensor]]:
    """Trees after an empty text, as a drafter must make them; also the text at every node.

    Chosen children are the draft's likeliest tokens; drawn ones come without replacement from its
    law without the chosen ones.
    """
    tokens = torch.zeros(rows, len(shape) + 1, dtype=torch.long)
    probs = torch.zeros(rows, len(shape) + 1, VOCAB, dtype=torch.float64)
    texts = [torch.zeros(rows, 0, dtype=torch.long)] + [torch.empty(0)] * len(shape)
    for parent in range(len(shape) + 1):
        law = draft.law(texts[parent]).clone()
        nodes = [node for node, (above, _) in enumerate(shape, 1) if above == parent]
        for node in sorted(nodes, key=lambda node: shape[node - 1][1]):  # chosen before drawn
            if shape[node - 1][1] == "chosen":
                token = law.argmax(1)
            else:
                probs[:, parent] += (
                    probs[:, parent].sum(1, keepdim=True) == 0
                ) * law  # before the first drawn sibling
                token = pick(law, generator)
            tokens[:, node] = token
            texts[node] = torch.cat([texts[parent], token[:, None]], 1)
            law.scatter_(1, token[:, None], 0)
            law /= law.sum(1, keepdim=True)
    parents = torch.tensor([-1, *(parent for parent, _ in shape)]).expand(rows, -1)
    drawn = torch.tensor([False, *(kind == "drawn" for _, kind in shape)]).expand(rows, -1)
    sizes = torch.full((rows,), len(shape) + 1)
    return Proposal(tokens, parents, sizes, probs=probs, drawn=drawn), texts


def node_laws(target: Language, texts: list[Tensor]) -> Tensor:
    return torch.stack([target.law(text) for text in texts], 1)


def first_tokens(
    verdict: Verdict,
    proposal: Proposal,
    target: Language,
    generator: torch.Generator,
    length: int = 3,
) -> Tensor:
    """The text that a verdict begins, continued by the target alone: [rows, length]."""
    path = torch.nn.functional.pad(verdict.path[:, 1:], (0, length + 1), value=-1)
    text = torch.where(path >= 0, proposal.tokens.gather(1, path.clamp(min=0)), -1)
    text = text.scatter(1, verdict.num_accepted[:, None], verdict.bonus[:, None])[:, :length]
    for column in range(length):
        rows = (text[:, column] < 0).nonzero()[:, 0]
        if len(rows):
            text[rows, column] = pick(target.law(text[rows, :column]), generator)
    return text


def chi_square(text: Tensor, target: Toy) -> list[tuple[float, int]]:
    """Chi-square and degrees of freedom of the first token, pair and triple against the target's
    law.
    """
    results = []
    for length in range(1, 4):
        cells = torch.zeros(len(text), dtype=torch.long)
        for column in text[:, :length].T:
            cells = cells * VOCAB + column
        expected = target.joint(length) * len(text)
        counts = torch.bincount(cells, minlength=len(expected)).double()
        assert not counts[expected == 0].any()
        likely = expected > 0
        statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
        results.append((float(statistic), int(likely.sum()) - 1))
    return results


def follows(text: Tensor, target: Toy) -> bool:
    return all(
        stats.chi2.sf(statistic, degrees) > 1e-4 for statistic, degrees in chi_square(text, target)
    )


def excess(text: Tensor, target: Toy) -> float:
    """How far the worst chi-square lies above its degrees of freedom."""
    return max(statistic - degrees for statistic, degrees in chi_square(text, target))


@dataclass
class Case:
    """One verification of 200,000 rows, ready to be spoilt by a test."""

    proposal: Proposal
    laws: Tensor
    target: Toy
    draft: Toy
    generator: torch.Generator

    def run(self, **changed: Tensor) -> tuple[Verdict, Tensor]:
        """The verdict, and the first three tokens of every row."""
        proposal = replace(self.proposal, **changed)
        draws, tosses = torch.rand(
            2, *proposal.tokens.shape, generator=self.generator, dtype=torch.float64
        )
        verdict = verify(proposal, self.laws, draws, tosses)
        return verdict, first_tokens(verdict, proposal, self.target, self.generator)

    @property
    def confidence(self) -> Tensor:
        """[rows, nodes]: the largest probability of the law that a node was drawn from; known
        before its token is.
        """
        return self.proposal.probs.amax(-1).gather(1, self.proposal.parents.clamp(min=0))  # type: ignore[union-attr]


def case(
    shape: Shape, target: Toy | None = None, draft: Toy | None = None, rows: int = ROWS
) -> Case:
    generator = torch.Generator().manual_seed(2026)
    target, draft = target or Toy(1), draft or Toy(2)
    proposal, texts = draft_trees(shape, draft, generator, rows)
    return Case(proposal, node_laws(target, texts), target, draft, generator)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_text_has_the_law_of_the_target(shape: Shape) -> None:
    some = case(shape)
    verdict, text = some.run()
    assert follows(text, some.target)
    assert verdict.num_accepted.unique().tolist() == list(
        range(int(depths(some.proposal.parents[:1]).max()) + 1)
    )
    assert excess(text, some.draft) > SEEN  # the laws can be told apart


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_text_has_the_law_of_the_target_at_any_mixture_of_sizes(shape: Shape) -> None:
    some = case(shape)
    sizes = torch.randint(1, some.proposal.num_nodes + 1, (ROWS,), generator=some.generator)
    verdict, text = some.run(sizes=sizes)
    assert follows(text, some.target)
    assert (verdict.path.amax(1) < sizes).all()


CUTS = {
    "top_k": SamplingParams(temperature=0.9, top_k=3),
    "top_p": SamplingParams(temperature=1.2, top_p=0.7),
    "min_p": SamplingParams(temperature=1.0, min_p=0.4),
}


@pytest.mark.parametrize(
    "shape", [TREE_CHOSEN, TREE_DRAWN, UNION], ids=["chosen", "drawn", "union"]
)
@pytest.mark.parametrize("params", CUTS.values(), ids=CUTS)
def test_text_has_the_cut_law_of_the_target(params: SamplingParams, shape: Shape) -> None:
    some = case(shape, Toy(3, params=params))
    assert (some.target.joint(1) == 0).any()
    assert follows(some.run()[1], some.target)


def test_a_draft_with_a_cut_law_of_its_own_changes_nothing() -> None:
    some = case(CHAIN_DRAWN, draft=Toy(2, params=SamplingParams(temperature=0.5, top_k=2)))
    assert follows(some.run()[1], some.target)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_text_is_the_argmax_whatever_was_drafted(shape: Shape) -> None:
    target = Toy(4, params=SamplingParams())
    best = int(target.joint(3).argmax())
    num_accepted = []
    for draft in (Toy(2), Toy(4)):  # a poor one, and one that knows the target
        some = case(shape, target, draft, rows=1000)
        check(some.proposal)
        verdict, text = some.run()
        assert text.unique(dim=0).tolist() == [[best // 25, best // 5 % 5, best % 5]]
        num_accepted += verdict.num_accepted.tolist()
    assert (
        min(num_accepted)
        < max(num_accepted)
        == max(depths(case(shape, rows=1).proposal.parents)[0])
    )


def test_drawn_nodes_may_be_pruned_by_what_was_known_before_their_tokens() -> None:
    """A chain is cut where the draft is unsure: its law there depends on the tokens before, not on
    the one drawn from it.
    """
    some = case(CHAIN_DRAWN)
    sure = some.confidence[:, 1:] > 0.4
    sizes = 1 + sure.long().cumprod(1).sum(1)
    verdict, text = some.run(sizes=sizes)
    assert len(sizes.unique()) > 1
    assert verdict.num_accepted.max() > 1
    assert follows(text, some.target)


def test_chosen_nodes_may_be_pruned_freely() -> None:
    """Even by their own tokens, which no draw has seen."""
    some = case(CHAIN_CHOSEN, draft=Toy(5))
    sizes = 1 + (some.proposal.tokens[:, 1:] > 1).long().cumprod(1).sum(1)
    assert follows(some.run(sizes=sizes)[1], some.target)


def unnormalized(q: Tensor, token: Tensor) -> Tensor:
    return q.scatter(1, token, 0.0)


def rest_forgotten(weights: Tensor, otherwise: Tensor) -> Tensor:
    return otherwise


@pytest.mark.parametrize(
    ("part", "fault"),
    [("_without", unnormalized), ("_normalized", rest_forgotten)],
)
def test_a_wrong_rule_for_drawn_siblings_is_seen(
    part: str, fault: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = case(TREE_DRAWN)
    monkeypatch.setattr(RULE, part, fault)
    assert excess(some.run()[1], some.target) > SEEN


def test_an_argmax_draft_judged_as_if_drawn_is_seen() -> None:
    some = case(CHAIN_CHOSEN)
    probs = torch.stack(
        [some.draft.law(text) for text in draft_trees(CHAIN_CHOSEN, some.draft, some.generator)[1]],
        1,
    )
    drawn = torch.tensor([False, True, True, True]).expand(ROWS, -1)
    assert excess(some.run(probs=probs, drawn=drawn)[1], some.target) > SEEN


def test_pruning_a_drawn_node_by_its_own_probability_is_seen() -> None:
    some = case(CHAIN_DRAWN)
    own = some.proposal.probs[:, :-1].gather(2, some.proposal.tokens[:, 1:, None])[..., 0]  # type: ignore[index]
    sizes = 1 + (own > 0.25).long().cumprod(1).sum(1)
    assert excess(some.run(sizes=sizes)[1], some.target) > SEEN


def test_drawn_siblings_that_share_one_coin_are_seen() -> None:
    some = case(TREE_DRAWN)
    draws, tosses = torch.rand(
        2, *some.proposal.tokens.shape, generator=some.generator, dtype=torch.float64
    )
    verdict = verify(some.proposal, some.laws, draws, tosses[:, :1].expand_as(tosses))
    assert (
        excess(first_tokens(verdict, some.proposal, some.target, some.generator), some.target)
        > SEEN
    )


def many_steps(
    toss: Callable[[Sequence[int], Sequence[int], int], Tensor], num_steps: int = 3
) -> tuple[Tensor, Toy]:
    """Three steps over 200,000 seeds, each with a drawn tree, all randomness from `uniforms` and
    `coins` as in the engine.
    """
    target, draft, generator = Toy(1), Toy(2), torch.Generator().manual_seed(7)
    seeds = list(range(ROWS))
    text = torch.full((ROWS, 3 + 4 * num_steps), -1)
    lengths = torch.zeros(ROWS, dtype=torch.long)
    for _ in range(num_steps):
        for length in lengths[lengths < 3].unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            past = text[rows, :length]
            proposal, texts = draft_trees(TREE_DRAWN, Past(draft, past), generator, len(rows))
            laws = node_laws(Past(target, past), texts)
            own = [seeds[row] for row in rows.tolist()]
            anchors = [length] * len(own)  # position 0 holds the one token of the prompt
            draws = uniforms(own, [anchor + 1 for anchor in anchors], proposal.num_nodes)
            verdict = verify(proposal, laws, draws, toss(own, anchors, proposal.num_nodes))
            path = torch.where(
                verdict.path[:, 1:] >= 0,
                proposal.tokens.gather(1, verdict.path[:, 1:].clamp(min=0)),
                -1,
            )
            text[rows, length : length + path.shape[1]] = path
            text[rows, length + verdict.num_accepted] = verdict.bonus
            lengths[rows] += verdict.num_accepted + 1
    assert (lengths >= 3).all()
    return text[:, :3], target


def test_many_steps_with_keyed_uniforms_and_coins_have_the_law_of_the_target() -> None:
    assert follows(*many_steps(coins))


def test_coins_that_come_back_in_the_next_step_are_seen() -> None:
    """Keyed by the anchor's position plus the node's index, a coin that rejected one node would
    judge a later one.
    """
    assert (
        excess(*many_steps(lambda seeds, anchors, nodes: uniforms(seeds, anchors, nodes, lane=1)))
        > SEEN
    )


def slow_walk(
    proposal: Proposal, row: int, laws: Tensor, draws: Tensor, tosses: Tensor
) -> tuple[list[int], int]:
    """The rule as the papers tell it, one row, one node, one number at a time."""
    assert proposal.probs is not None
    assert proposal.drawn is not None
    tokens, parents, drawn = (
        proposal.tokens[row].tolist(),
        proposal.parents[row].tolist(),
        proposal.drawn[row].tolist(),
    )
    path = [0]
    while True:
        p, q = laws[row, path[-1]].tolist(), proposal.probs[row, path[-1]].tolist()
        children = [node for node in range(int(proposal.sizes[row])) if parents[node] == path[-1]]
        accepted = None
        for node in children:
            if not drawn[node]:
                continue
            token = tokens[node]
            if tosses[row, node] < p[token] / q[token]:
                accepted = node
                break
            rest = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
            p = [a / sum(rest) for a in rest]
            q[token] = 0.0
            q = [b / sum(q) if sum(q) else 0.0 for b in q]
        if accepted is None:
            level, token = float(draws[row, len(path) - 1]) * sum(p), 0
            while sum(p[: token + 1]) <= level:
                token += 1
            accepted = next(
                (node for node in children if not drawn[node] and tokens[node] == token), None
            )
            if accepted is None:
                return path, token
        path.append(accepted)


def random_batch(chance: random.Random, rows: int = 12) -> tuple[Proposal, Tensor]:
    """Random trees of chosen and drawn nodes with different siblings, ragged sizes, and garbage
    behind them.
    """
    generator = torch.Generator().manual_seed(chance.randrange(2**32))
    num_nodes = chance.randint(1, 12)
    parents = torch.full((rows, num_nodes), -1)
    tokens = torch.zeros(rows, num_nodes, dtype=torch.long)
    for row in range(rows):
        free = [
            random.Random(chance.random()).sample(range(VOCAB), VOCAB) for _ in range(num_nodes)
        ]
        for node in range(1, num_nodes):
            parents[row, node] = chance.choice(
                [above for above in range(max(0, node - 4), node) if free[above]]
            )
            tokens[row, node] = free[int(parents[row, node])].pop()
    sizes = torch.randint(1, num_nodes + 1, (rows,), generator=generator)
    drawn = torch.rand(rows, num_nodes, generator=generator) < chance.choice([0.0, 0.4, 0.9])
    drawn[:, 0] = False
    probs, laws = torch.rand(
        2, rows, num_nodes, VOCAB, generator=generator, dtype=torch.float64
    ) ** chance.choice([1, 4])
    for row, node in (
        drawn.logical_not().nonzero().tolist()
    ):  # the duty of a union: no mass on chosen siblings
        if node > 0:
            probs[row, parents[row, node], tokens[row, node]] = 0
    laws[torch.rand(laws.shape, generator=generator) < chance.choice([0.0, 0.5])] = 0
    laws[..., 2] += 0.01
    probs /= probs.sum(-1, keepdim=True).clamp(min=1e-30)
    padding = torch.arange(num_nodes) >= sizes[:, None]
    laws[padding] = torch.nan
    return Proposal(tokens, parents, sizes, probs=probs, drawn=drawn), laws / laws.sum(
        -1, keepdim=True
    )


def test_the_walk_is_the_slow_walk_node_for_node() -> None:
    chance = random.Random(0)
    lengths = []
    for _ in range(150):
        proposal, laws = random_batch(chance)
        check(proposal)
        generator = torch.Generator().manual_seed(chance.randrange(2**32))
        draws, tosses = torch.rand(
            2, *proposal.tokens.shape, generator=generator, dtype=torch.float64
        )
        before = [tensor.clone() for tensor in (laws, proposal.probs, proposal.tokens)]  # type: ignore[union-attr]
        verdict = verify(proposal, laws, draws, tosses)
        for row in range(len(proposal.tokens)):
            path, bonus = slow_walk(proposal, row, laws, draws, tosses)
            assert [node for node in verdict.path[row].tolist() if node >= 0] == path
            assert verdict.path[row, : len(path)].tolist() == path
            assert [int(verdict.num_accepted[row]), int(verdict.bonus[row])] == [
                len(path) - 1,
                bonus,
            ]
            lengths.append(len(path))
        assert verdict.path.shape[1] == 1 + verdict.num_accepted.max()
        for tensor, copy in zip((laws, proposal.probs, proposal.tokens), before, strict=True):
            assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())  # type: ignore[union-attr]
    assert max(lengths) > 4
    assert sum(lengths) > 1.4 * len(lengths)


def test_a_rejection_that_leaves_no_mass_by_rounding_keeps_the_law() -> None:
    half = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]], dtype=torch.float64)
    proposal = Proposal(
        tokens=torch.tensor([[0, 1]]),
        parents=chain(2)[None],
        sizes=torch.tensor([2]),
        probs=half * (1 + 2.0**-50),
        drawn=torch.tensor([[False, True]]),
    )
    tosses = torch.full((1, 2), 1 - 2.0**-53, dtype=torch.float64)
    for u, token in ((0.4, 0), (0.6, 1)):
        verdict = verify(proposal, half, torch.full((1, 2), u, dtype=torch.float64), tosses)
        assert (verdict.num_accepted.tolist(), verdict.bonus.tolist()) == ([0], [token])


def test_the_luckiest_coin_accepts_no_token_that_the_target_excludes() -> None:
    laws = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    drawn = torch.tensor([[False, True]])
    proposal = Proposal(
        torch.tensor([[0, 0]]),
        chain(2)[None],
        torch.tensor([2]),
        probs=torch.full((1, 2, 2), 0.5),
        drawn=drawn,
    )
    zeros = torch.zeros(1, 2, dtype=torch.float64)
    verdict = verify(proposal, laws, zeros, zeros)
    assert (verdict.num_accepted.tolist(), verdict.bonus.tolist()) == ([0], [1])


def test_drawn_nodes_without_coins_are_refused() -> None:
    some = case(CHAIN_DRAWN)
    with pytest.raises(AssertionError, match="without coins"):
        verify(some.proposal, some.laws, torch.rand(ROWS, 4, dtype=torch.float64))


REQUESTS = (
    SamplingParams(temperature=1.0, seed=11),
    SamplingParams(temperature=1.0, seed=12),
    SamplingParams(seed=13),
    SamplingParams(temperature=0.7, top_k=4, seed=14),
    SamplingParams(temperature=1.3, top_p=0.8, seed=15),
    SamplingParams(temperature=1.0, min_p=0.2, seed=16),
)
LANGUAGE = (
    torch.randn(9, 9, generator=torch.Generator().manual_seed(0)) * 1.5
)  # logits after each of nine tokens


def plain_text(params: SamplingParams, length: int) -> list[int]:
    text = [0]
    while len(text) < length:
        law = probabilities(LANGUAGE[text[-1]][None], params)
        text += draw(law, uniforms([params.seed], [len(text)], 1)[:, 0]).tolist()
    return text


def random_trees(anchors: list[int], chance: random.Random) -> Proposal:
    """Chosen trees of any shape and size with different siblings: of likely tokens, or of tokens
    that know nothing.
    """
    num_nodes, bushy, informed = chance.randint(1, 14), chance.random() < 0.6, chance.random() < 0.5
    tokens, parents = [], []
    for anchor in anchors:
        own, above, free = [anchor], [-1], {}
        for node in range(num_nodes):
            free[node] = (
                LANGUAGE[own[node]].argsort().tolist() if informed else chance.sample(range(9), 9)
            )
            if node + 1 < num_nodes:
                above.append(
                    chance.choice([parent for parent in free if free[parent]]) if bushy else node
                )
                own.append(free[above[-1]].pop())
        tokens.append(own)
        parents.append(above)
    return Proposal(
        torch.tensor(tokens),
        torch.tensor(parents),
        torch.tensor([chance.randint(1, num_nodes) for _ in anchors]),
    )


Keyed = Callable[[list[int], list[int], int], Tensor]


def drafted_texts(
    requests: Sequence[SamplingParams], length: int, chance: random.Random, keyed: Keyed = uniforms
) -> tuple[list[list[int]], list[int]]:
    """All requests in one batch, as the engine does it; also the accepted nodes of every step."""
    texts: list[list[int]] = [[0] for _ in requests]
    num_accepted: list[int] = []
    while min(map(len, texts)) < length:
        proposal = random_trees([text[-1] for text in texts], chance)
        check(proposal)
        laws = target_probs(LANGUAGE[proposal.tokens], requests, proposal.sizes)
        draws = keyed(
            [params.seed for params in requests], [len(text) for text in texts], proposal.num_nodes
        )
        verdict = verify(proposal, laws, draws)
        num_accepted += verdict.num_accepted.tolist()
        for row, text in enumerate(texts):
            nodes = [node for node in verdict.path[row, 1:].tolist() if node >= 0]
            text += [*proposal.tokens[row, nodes].tolist(), int(verdict.bonus[row])]
    return [text[:length] for text in texts], num_accepted


@pytest.mark.parametrize(
    "requests", [REQUESTS, REQUESTS[:1], REQUESTS[3:4]], ids=["batch", "alone", "alone, cut"]
)
def test_seeded_text_is_the_plain_seeded_text_token_for_token(
    requests: Sequence[SamplingParams],
) -> None:
    plain = [plain_text(params, 150) for params in requests]
    num_accepted = []
    for seed in range(3):
        texts, accepted = drafted_texts(requests, 150, random.Random(seed))
        assert texts == plain
        num_accepted += accepted
    assert set(range(4)) <= set(num_accepted)


def test_draws_keyed_by_anything_but_the_position_are_seen() -> None:
    def restarted(seeds: list[int], starts: list[int], count: int) -> Tensor:
        return uniforms(seeds, [0] * len(seeds), count)

    texts, _ = drafted_texts(REQUESTS, 150, random.Random(0), restarted)
    plain = [plain_text(params, 150) for params in REQUESTS]
    assert [text == other for text, other in zip(texts, plain, strict=True)] == [
        params.temperature == 0 for params in REQUESTS
    ]
