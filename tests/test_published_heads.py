"""Published sequential heads and block layouts: what they draft, against slow definitions of their
own, and that no text of the target changes.

The definitions are those of the published formats: DFlash 2's candidate selector, DSpark's Markov
heads and its confidence head, Domino's GRU. A law is computed from all tokens before it, from
scratch: nothing is carried along.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny_target
from torch import Tensor
from toy_training import BLOCK, CONFIG, HIDDEN, network, one_line_and_hint

from flashdraft.decoding.tree import best_first
from flashdraft.errors import DraftMismatch
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.methods import sequential
from flashdraft.methods.dflash import DFlashDraftModel, PackedDraft
from flashdraft.methods.sequential import Domino, RecurrentMarkov, Selector
from flashdraft.models.target import Target

RANK, STATES, CHOICES = 5, 7, 6
KEPT = (3, 4, 9, 11, 20, 25, 30, 41, 52, 59)
HEADS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "selector": {"head_choices": CHOICES},
    "markov": {},
    "markov_gated": {},
    "markov_rnn": {},
    "domino": {"head_states": STATES},
}
PUBLISHED = [kind for kind in HEADS if kind != "swiglu"]  # which has tests of its own
MARKOV = [kind for kind in HEADS if kind.startswith("markov")]
CAPPED: dict[str, Any] = {"output_multiplier": 0.7, "final_logit_softcapping": 3.0}
VOCABULARIES = ("whole", "reduced", "own lm_head", "capped")


def the_target() -> Target:
    return tiny_target("llama", lean=True)


def model_with(kind: str | None, vocabulary: str = "whole", **changes: Any) -> DFlashDraftModel:
    """A random network whose heads have weights that matter."""
    fields: dict[str, Any] = {} if kind is None else {"sequential_head": kind, **HEADS[kind]}
    fields |= CAPPED if vocabulary == "capped" else {}
    is_reduced = vocabulary in ("reduced", "own lm_head")
    if is_reduced:
        fields["draft_vocab_size"] = len(KEPT)
    model = network(0, **{"head_rank": RANK, **fields, **changes})
    generator = torch.Generator().manual_seed(0)
    plain = set(network(0).state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in plain:
                parameter.normal_(0.0, 0.6, generator=generator)
    if is_reduced:
        model.reduce_vocabulary(torch.tensor(KEPT))
    if vocabulary == "own lm_head":
        model.extras["lm_head.weight"] = torch.randn(len(KEPT), HIDDEN, generator=generator)
    return model


def packed(model: DFlashDraftModel) -> PackedDraft:
    return PackedDraft(model, the_target())


def hidden_states(rows: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    """[rows, positions, hidden] and the anchors [rows]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, BLOCK, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(3, 60, (rows,), generator=generator)


# Modules and files.


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("confidence", [(False, False), (True, False), (True, True)])
def test_modules_are_those_of_the_config(kind: str, confidence: tuple[bool, bool]) -> None:
    head, markov = confidence
    model = model_with(kind, confidence_head=head, confidence_with_markov=markov)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == tensor_shapes(model.config)


@pytest.mark.parametrize("kind", HEADS)
def test_published_heads_survive_saving(tmp_path: Path, kind: str) -> None:
    model = model_with(
        kind, anchor_first=True, confidence_head=True, confidence_with_markov=kind in MARKOV
    )
    model.save_pretrained(tmp_path)
    read = DFlashDraftModel.from_pretrained(tmp_path)
    assert read.config == model.config
    ours, theirs = model.state_dict(), read.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    model.save_pretrained(tmp_path / "plain", plain=True)
    plain = DFlashDraftModel.from_pretrained(tmp_path / "plain")
    assert plain.config == replace(CONFIG, anchor_first=True)


@pytest.mark.parametrize("kind", HEADS)
def test_a_new_head_drafts_as_the_network_alone(kind: str) -> None:
    """DSpark's second table, the selector's successors and Domino's last linear are zero."""
    hidden, anchors = hidden_states()
    alone = model_with(None)
    expected = packed(alone).scored(hidden, anchors).tokens
    model = DFlashDraftModel(replace(alone.config, **HEADS[kind]))
    model.load_state_dict(alone.state_dict())
    model.add_head(kind, RANK)
    assert torch.equal(packed(model).scored(hidden, anchors).tokens, expected)
    trained = packed(model_with(kind)).scored(hidden, anchors).tokens
    assert not torch.equal(trained, expected)


# The definitions. `fault` plants a mistake that implementations make.


class Slow:
    """One network's laws by the formulas, for one position after the other."""

    def __init__(self, model: DFlashDraftModel, fault: str = "") -> None:
        self.config = model.config
        self.kind = model.config.sequential_head
        self.fault = fault
        self.w = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.drafted = list(KEPT) if "d2t" in model.extras else list(range(VOCAB))
        own = model.extras.get("lm_head.weight")
        shared = the_target().head_weight(torch.tensor(self.drafted))
        self.head = shared if own is None else own.double()

    def capped(self, logit: float) -> float:
        cap = self.config.final_logit_softcapping
        return logit if cap is None else cap * math.tanh(logit / cap)

    def law(self, states: Tensor, k: int, path: Sequence[int]) -> dict[int, float]:
        """Log-probabilities by token of position k behind `path`: the anchor and k tokens."""
        raw = [float(row @ states[k]) * self.config.output_multiplier for row in self.head]
        bias = self.bias(states, k, path)
        if self.fault == "the bias is capped, too":
            logits = [self.capped(one + more) for one, more in zip(raw, bias, strict=True)]
        else:
            logits = [self.capped(one) + more for one, more in zip(raw, bias, strict=True)]
        asked = range(len(raw))
        if self.kind == "selector":
            asked = sorted(asked, key=lambda i: -raw[i])[:CHOICES]  # type: ignore[assignment]
        total = math.log(sum(math.exp(logits[i]) for i in asked))
        return {self.drafted[i]: logits[i] - total for i in asked}

    def bias(self, states: Tensor, k: int, path: Sequence[int]) -> list[float]:
        """What is added to the logit of every drafted token."""
        before = path[-1]
        if self.fault == "the token two before":
            before = path[-2] if k else path[-1]
        if self.fault == "always the anchor":
            before = path[0]
        if self.fault == "the token before as a draft id" and before in self.drafted:
            before = self.drafted.index(before)
        state = states[k - 1] if self.fault == "the state of the row before" else states[k]
        if self.kind is None:
            return [0.0] * len(self.drafted)
        if self.kind == "selector":
            return self.pair_scores(state, before)
        if self.kind == "domino":
            return self.domino(state, k, path)

        table = self.w["markov_head.markov_w1.weight"]
        code = table[before]
        if self.kind == "markov_gated" and self.fault != "the gate is left out":
            read = torch.cat((state, code))
            weight, bias = (self.w[f"markov_head.gate_proj.{part}"] for part in ("weight", "bias"))
            code = torch.sigmoid(weight @ read + bias) * code
        if self.kind == "markov_rnn":
            code = self.recurrent(states, [*path[:-1], before])
        return [float(row @ code) for row in self.w["markov_head.markov_w2.weight"]]

    def pair_scores(self, state: Tensor, before: int) -> list[float]:
        first = self.w["candidate_selector.predecessor_codebook"]
        second = self.w["candidate_selector.successor_codebook"]
        if self.fault == "the codebooks are swapped":
            first, second = second, first
        projected = self.w["candidate_selector.hidden_projection.weight"] @ state
        scores = []
        for token in self.drafted:
            score = 0.0
            for j in range(RANK):
                score += float(first[before, j] * projected[j] * second[token, j])
            scores.append(score)
        return scores

    def recurrent(self, states: Tensor, path: Sequence[int]) -> Tensor:
        """tanh(o) of the last step."""
        weight = self.w["markov_head.joint_proj.weight"]
        bias = self.w["markov_head.joint_proj.bias"]
        memory = torch.zeros(RANK, dtype=torch.float64)
        output = memory
        for k, token in enumerate(path):
            if self.fault == "the state is reset":
                memory = torch.zeros(RANK, dtype=torch.float64)
            read = torch.cat((memory, self.w["markov_head.markov_w1.weight"][token], states[k]))
            gate, candidate, output = (weight @ read + bias).split(RANK)
            if self.fault == "the gates are swapped":
                gate, candidate = candidate, gate
            kept = torch.sigmoid(gate)
            memory = kept * memory + (1 - kept) * torch.tanh(candidate)
        return torch.tanh(output)

    def domino(self, state: Tensor, k: int, path: Sequence[int]) -> list[float]:
        if k == 0 and self.fault != "the first position is corrected, too":
            return [0.0] * len(self.drafted)
        inputs = self.w["prefix_gru.weight_ih_l0"].split(STATES)
        states = self.w["prefix_gru.weight_hh_l0"].split(STATES)
        order = (1, 0, 2) if self.fault == "the gates are swapped" else (0, 1, 2)
        memory = torch.zeros(STATES, dtype=torch.float64)
        for token in path:
            if self.fault == "the state is reset":
                memory = torch.zeros(STATES, dtype=torch.float64)
            x = the_target().embed(torch.tensor([token]))[0]
            reset, update, _ = (
                torch.sigmoid(inputs[part] @ x + states[part] @ memory) for part in order
            )
            new = torch.tanh(inputs[2] @ x + reset * (states[2] @ memory))
            memory = (1 - update) * new + update * memory
        inner = self.w["embed_proj.0.weight"] @ torch.cat((state, memory))
        outer = self.w["embed_proj.2.weight"][torch.tensor(self.drafted)]
        return (outer @ (inner * torch.sigmoid(inner))).tolist()  # type: ignore[no-any-return]

    def chain(self, states: Tensor, anchor: int) -> list[tuple[int, float]]:
        """The likeliest token behind the likeliest, with its log-probability."""
        path, drafts = [anchor], []
        for k in range(len(states)):
            law = self.law(states, k, path)
            best = max(law, key=law.__getitem__)
            drafts.append((best, law[best]))
            path.append(best)
        return drafts

    def depths(self, states: Tensor, anchor: int, num_paths: int) -> list[dict[int, Any]]:
        """By depth and by the token before: the law behind the likeliest path to that token."""
        ends = {anchor: (0.0, [anchor])}
        depths = []
        for k in range(len(states)):
            laws = {end: self.law(states, k, path) for end, (_, path) in ends.items()}
            depths.append(laws)
            ways: dict[int, tuple[float, list[int]]] = {}
            likeliest = next(iter(ends.values()))[1]
            for end, (reached, path) in ends.items():
                for token, score in laws[end].items():
                    known = likeliest if self.fault == "the state of the likeliest path" else path
                    if reached + score > ways.get(token, (-math.inf, []))[0]:
                        ways[token] = (reached + score, [*known, token])
            ranked = sorted(ways.items(), key=lambda way: -way[1][0])
            ends = dict(ranked[:num_paths])
        return depths


FAULTS = {
    "selector": (
        "always the anchor",
        "the token two before",
        "the state of the row before",
        "the codebooks are swapped",
    ),
    "markov": ("always the anchor", "the token two before"),
    "markov_gated": (
        "the token two before",
        "the state of the row before",
        "the gate is left out",
    ),
    "markov_rnn": ("the token two before", "the state is reset", "the gates are swapped"),
    "domino": (
        "the state of the row before",
        "the state is reset",
        "the gates are swapped",
        "the first position is corrected, too",
    ),
}


def faults_of(kind: str, vocabulary: str) -> list[str]:
    faults = list(FAULTS[kind])
    if vocabulary == "reduced" and kind != "domino":
        faults.append("the token before as a draft id")
    if vocabulary == "capped":
        faults.append("the bias is capped, too")
    return faults


@functools.cache
def slow_chains(kind: str, vocabulary: str, fault: str = "") -> list[list[tuple[int, float]]]:
    hidden, anchors = hidden_states()
    slow = Slow(model_with(kind, vocabulary), fault)
    return [slow.chain(*row) for row in zip(hidden, anchors.tolist(), strict=True)]


def tokens_of(chains: Sequence[Sequence[tuple[int, float]]]) -> list[list[int]]:
    return [[token for token, _ in chain] for chain in chains]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", PUBLISHED)
def test_chains_are_those_of_the_definition(kind: str, vocabulary: str) -> None:
    hidden, anchors = hidden_states()
    tokens, scores = packed(model_with(kind, vocabulary)).scored(hidden, anchors)
    expected = slow_chains(kind, vocabulary)
    assert tokens[..., 0].tolist() == tokens_of(expected)
    law = torch.tensor([[score for _, score in chain] for chain in expected], dtype=torch.float64)
    torch.testing.assert_close(scores[..., 0], law, rtol=0, atol=1e-6)
    for fault in faults_of(kind, vocabulary):
        assert tokens_of(slow_chains(kind, vocabulary, fault)) != tokens_of(expected), fault


@pytest.mark.parametrize("vocabulary", ["whole", "reduced"])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_trees_have_the_laws_behind_every_path(
    monkeypatch: pytest.MonkeyPatch, kind: str, vocabulary: str
) -> None:
    """Of the selector behind every candidate: the whole lattice of pair scores."""
    monkeypatch.setattr(sequential, "_PATHS", 4)
    num_paths = CHOICES if kind == "selector" else 4
    hidden, anchors = hidden_states(6)
    model = model_with(kind, vocabulary)
    slow, wrong = Slow(model), Slow(model, "the state of the likeliest path")
    num_wrong = 0
    for row, laws in enumerate(packed(model).laws(hidden, anchors, trees=True)):
        given = hidden[row], int(anchors[row]), num_paths
        expected, faulty = slow.depths(*given), wrong.depths(*given)
        assert [set(depth) for depth in laws] == [set(depth) for depth in expected]
        for depth, (own, wanted) in enumerate(zip(laws, expected, strict=True)):
            for before, (tokens, scores) in own.items():
                likeliest = sorted(wanted[before].items(), key=lambda pair: -pair[1])[:8]
                assert list(tokens) == [token for token, _ in likeliest]
                assert list(scores) == pytest.approx([score for _, score in likeliest], abs=1e-6)
                fault = faulty[depth].get(before, {})
                num_wrong += fault.get(tokens[0]) != pytest.approx(scores[0], abs=1e-4)
    assert (num_wrong > 0) == (kind in ("markov_rnn", "domino"))  # what remembers a path


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_first_nodes_of_a_tree_are_the_chain(kind: str) -> None:
    hidden, anchors = hidden_states(6)
    network = packed(model_with(kind))
    chains = network.scored(hidden, anchors).tokens[..., 0].tolist()
    for row, laws in enumerate(network.laws(hidden, anchors, trees=True)):
        nodes = best_first(int(anchors[row]), laws, 400)
        path, at = [], 0
        while at in nodes.parents:
            at = 1 + nodes.parents.index(at)
            path.append(nodes.tokens[at - 1])
        assert path == chains[row][: len(path)]
        assert len(path) == BLOCK


@pytest.mark.parametrize("kind", HEADS)
def test_rows_of_a_batch_are_drafted_like_each_alone(kind: str) -> None:
    hidden, anchors = hidden_states()
    network = packed(model_with(kind))
    together = network.scored(hidden, anchors).tokens
    for row in range(len(hidden)):
        alone = network.scored(hidden[row : row + 1], anchors[row : row + 1]).tokens
        assert torch.equal(alone[0], together[row])


# Single parts, by hand.


def test_three_steps_of_the_recurrent_head_by_hand() -> None:
    """Of rank 1, with states that it does not read."""
    model = model_with("markov_rnn", head_rank=1)
    head = model.markov_head
    assert head is not None
    with torch.no_grad():
        head.markov_w1.weight[[5, 6, 7]] = torch.tensor([[1.0], [-2.0], [0.5]])
        head.joint_proj.weight.zero_()  # type: ignore[union-attr, operator]
        weights = torch.tensor([[0.3, 1.0], [0.5, -1.0], [2.0, 0.7]])  # of s and e
        head.joint_proj.weight[:, :2] = weights  # type: ignore[union-attr, index, operator]
        head.joint_proj.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))  # type: ignore[union-attr, operator]
    walk = packed(model).sequential
    assert isinstance(walk, RecurrentMarkov)

    memory, state = 0.0, torch.zeros(1, 1, 1, dtype=torch.float64)
    for token, e in ((5, 1.0), (6, -2.0), (7, 0.5)):
        kept = 1 / (1 + math.exp(-(0.3 * memory + e + 0.1)))
        output = math.tanh(2 * memory + 0.7 * e - 0.3)
        memory = kept * memory + (1 - kept) * math.tanh(0.5 * memory - e + 0.2)
        own = torch.ones(1, 1, HIDDEN, dtype=torch.float64)
        code, state = walk._code(walk.before[torch.tensor([[token]])], own, state)
        assert float(code) == pytest.approx(output, abs=1e-6)
        assert float(state) == pytest.approx(memory, abs=1e-6)


def test_domino_reads_tokens_as_the_gru_of_torch_does() -> None:
    model = model_with("domino")
    head = packed(model).sequential
    assert isinstance(head, Domino)
    assert model.prefix_gru is not None
    tokens = torch.tensor([[5, 9, 31, 7, 44], [8, 8, 3, 50, 12]])
    expected, _ = model.prefix_gru.double()(the_target().embed(tokens))
    state = torch.zeros(2, 1, STATES, dtype=torch.float64)
    for k in range(tokens.shape[1]):
        state = head._read(tokens[:, k : k + 1], state)
        torch.testing.assert_close(state[:, 0], expected[:, k], rtol=0, atol=1e-9)


def test_the_selector_chooses_among_as_many_as_there_are() -> None:
    hidden, anchors = hidden_states(3)
    wide = packed(model_with("selector", "reduced", head_choices=99)).sequential
    assert isinstance(wide, Selector)
    assert wide.num_choices == len(KEPT)
    laws = list(wide.depths(hidden, anchors, wide.num_paths))
    assert laws[1].before.shape == (3, len(KEPT))


@pytest.mark.parametrize("vocab_size", [VOCAB - 6, VOCAB + 9])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_tokens_without_a_row_in_the_tables_are_nothing_to_a_head(
    kind: str, vocab_size: int
) -> None:
    """Tables that are shorter than the target's vocabulary count as zero beyond, longer ones are
    cut: a network with tables of just its length drafts the same."""
    odd = model_with(kind, vocab_size=vocab_size)
    exact = DFlashDraftModel(replace(odd.config, vocab_size=VOCAB))
    state = exact.state_dict()
    for name, tensor in odd.state_dict().items():
        if tensor.shape != state[name].shape:
            padding = (0, 0, 0, VOCAB - len(tensor))
            tensor = torch.nn.functional.pad(tensor, padding)  # which cuts where it is below 0
        state[name] = tensor
    exact.load_state_dict(state)
    hidden, _ = hidden_states()
    anchors = torch.arange(VOCAB - len(hidden), VOCAB)
    drafts = packed(odd).scored(hidden, anchors).tokens
    assert torch.equal(drafts, packed(exact).scored(hidden, anchors).tokens)


# The confidence head.


def confidence_model(kind: str | None, *, with_markov: bool) -> DFlashDraftModel:
    return model_with(kind, confidence_head=True, confidence_with_markov=with_markov)


@pytest.mark.parametrize(
    ("kind", "with_markov"),
    [(None, False), ("selector", False), ("markov", False), ("markov", True), ("markov_rnn", True)],
)
def test_scores_are_what_the_confidence_head_says(kind: str | None, with_markov: bool) -> None:
    """Of a chain sigmoid(w [h ; W1[a]] + b), a being the token before; the drafts stay."""
    hidden, anchors = hidden_states()
    model = confidence_model(kind, with_markov=with_markov)
    network = packed(model)
    tokens, scores = network.scored(hidden, anchors)
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for row, anchor in enumerate(anchors.tolist()):
        before = anchor
        for k, token in enumerate(tokens[row, :, 0].tolist()):
            read = hidden[row, k]
            if with_markov:
                read = torch.cat((read, w["markov_head.markov_w1.weight"][before]))
            logit = w["confidence_head.proj.weight"][0] @ read + w["confidence_head.proj.bias"]
            chance = 1 / (1 + math.exp(-float(logit)))
            assert float(scores[row, k, 0].exp()) == pytest.approx(chance, abs=1e-6)
            before = token

    network.confidence = None
    ignored = network.scored(hidden, anchors)
    assert torch.equal(ignored.tokens, tokens)
    assert not torch.allclose(ignored.scores, scores)


@pytest.mark.parametrize("kind", [None, "markov", "selector"])
def test_siblings_share_what_the_confidence_head_leaves(kind: str | None) -> None:
    hidden, anchors = hidden_states()
    network = packed(confidence_model(kind, with_markov=kind == "markov"))
    told = network.laws(hidden, anchors, trees=True)
    network.confidence = None
    by_law = network.laws(hidden, anchors, trees=True)
    num_shared = 0
    for row in range(len(hidden)):
        for own, plain in zip(told[row], by_law[row], strict=True):
            assert own.keys() == plain.keys()
            for before, (tokens, scores) in own.items():
                assert list(tokens) == list(plain[before][0])
                assert list(scores) == sorted(scores, reverse=True)
                chance, first = math.exp(scores[0]), math.exp(plain[before][1][0])
                for score, law in zip(scores[1:], plain[before][1][1:], strict=True):
                    share = (1 - chance) * math.exp(law) / (1 - first)
                    assert math.exp(score) == pytest.approx(min(share, chance), abs=1e-5)
                    num_shared += share < chance
    assert num_shared > 0


def test_a_confidence_head_without_its_table_is_refused() -> None:
    with pytest.raises(DraftMismatch) as error:
        packed(confidence_model("selector", with_markov=True))
    assert "reads the table of a markov head" in one_line_and_hint(error)
