"""Training of the published heads and of anchor-first blocks: batches and losses against slow
definitions, with the mistakes that must be seen, and whole runs at toy size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import MASK, VOCAB, tiny_target
from torch import Tensor
from toy_training import (
    BLOCK,
    CONFIG,
    HIDDEN,
    network,
    one_line_and_hint,
    toy_sample,
)

from flashdraft.cli.train import DraftOptions
from flashdraft.errors import InvalidParameter
from flashdraft.methods.dflash import DFlashDraftModel, PackedDraft
from flashdraft.models.heads import CandidateSelector, MarkovHead
from flashdraft.models.target import Target
from flashdraft.train import objectives as loss_stage
from flashdraft.train.batch import Batch, anchor_bounds, make_batch
from flashdraft.train.config import TrainConfig, model_card
from flashdraft.train.heads import step_head
from flashdraft.train.initialise import (
    check_trained,
    draft_config,
    draft_only,
    left_behind,
    random_weights,
    taken_from,
    with_head,
)
from flashdraft.train.objectives import Loss, LossSum
from flashdraft.train.optimizers import new_optimizers
from flashdraft.train.passes import Pass

KINDS = ("selector", "markov")
LAYOUTS = {"fill-in": False, "anchor-first": True}
RANK = 5
CHOICES = 4
KEPT = (3, 4, 9, 11, 20, 25, 30, 41, 52, 59)
SAMPLES = [
    (7, toy_sample(30, 5, 1, final=True)),
    (4, toy_sample(12, 9, 2, final=True)),  # the last blocks are cut short
    (9, toy_sample(25, 3, 3, final=True)),
]


@functools.cache
def the_target() -> Target:
    return tiny_target("llama", lean=True)


def shape(anchor_first: bool, **changes: Any) -> Any:
    return replace(CONFIG, anchor_first=anchor_first, head_choices=CHOICES, **changes)


def model_with(kind: str, anchor_first: bool, vocabulary: str = "whole") -> DFlashDraftModel:
    """A random network whose head has weights that matter."""
    bare = network(0, anchor_first=anchor_first, head_choices=CHOICES)
    model = with_head(bare, (kind, RANK), 0)
    if vocabulary == "reduced":
        draft_only(model, torch.tensor(KEPT))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.startswith(("candidate_selector", "markov_head")):
            with torch.no_grad():
                parameter.normal_(0.0, 0.6, generator=generator)
    return model


# Batches.


def slow_rows(number: int, anchor: int, anchor_first: bool, fault: str = "") -> list[Any]:
    """Of one block's rows: the token it reads, its position, its label, the token before that, and
    the label's distance from the anchor. `fault` plants a mistake.
    """
    sample = dict(SAMPLES)[number]
    tokens = sample.tokens.tolist()
    rows = []
    for row in range(BLOCK - 1 if anchor_first else BLOCK):
        offset = row + 1 if anchor_first else row
        if fault == "labels one row up":
            offset += 1
        if fault == "labels one row down":
            offset -= 1
        place = anchor + offset
        label = tokens[place] if offset > 0 and place < len(tokens) else -1
        before = place - 1
        if fault == "the token before is shifted":
            before -= 1
        previous = tokens[before] if before < len(tokens) else None
        rows.append((tokens[anchor] if row == 0 else MASK, anchor + row, label, previous, offset))
    return rows


def is_batch(batch: Batch, anchor_first: bool, fault: str = "") -> bool:
    num_rows = BLOCK - 1 if anchor_first else BLOCK
    is_same = True
    for number, span in zip(batch.numbers, batch.spans, strict=True):
        for start in range(span.row_start, span.row_end, num_rows):
            anchor = int(batch.positions.rows[start])
            for row, wanted in enumerate(slow_rows(number, anchor, anchor_first, fault), start):
                read, position, label, previous, offset = wanted
                is_same &= int(batch.block_tokens[row]) == read
                is_same &= int(batch.positions.rows[row]) == position
                is_same &= int(batch.labels[row]) == label
                if label >= 0:
                    is_same &= int(batch.previous[row]) == previous
                    is_same &= int(batch.offsets[row]) == offset
    return is_same


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_batch_are_those_of_its_layout(layout: str) -> None:
    batch = make_batch(SAMPLES, shape(LAYOUTS[layout]), 5, 0)
    assert is_batch(batch, LAYOUTS[layout])
    for fault in ("labels one row up", "labels one row down", "the token before is shifted"):
        assert not is_batch(batch, LAYOUTS[layout], fault)


def test_layouts_learn_the_same_tokens_behind_the_same_anchors() -> None:
    fill_in = make_batch(SAMPLES, shape(False), 5, 0)
    first = make_batch(SAMPLES, shape(True), 5, 0)
    for name in ("labels", "previous", "offsets", "final"):
        there, here = getattr(fill_in, name), getattr(first, name)
        assert torch.equal(there[fill_in.labels >= 0], here[first.labels >= 0])
    assert len(first.labels) * BLOCK == len(fill_in.labels) * (BLOCK - 1)


def test_anchor_first_blocks_end_with_the_positions_of_the_network() -> None:
    sizes = toy_sample(40, 3, 0).sizes
    for first in (False, True):
        config = shape(first, max_position_embeddings=20)
        _, end = anchor_bounds(sizes, config)
        assert end - 2 + config.block_rows - 1 == 19


def test_rows_of_a_block_see_their_context_and_each_other() -> None:
    """An anchor-first block's states change with a token before its anchor, and with nothing from
    there on.
    """
    model = model_with("selector", True)
    tokens = torch.zeros(VOCAB, HIDDEN).normal_(generator=torch.Generator().manual_seed(0))
    batch = make_batch(SAMPLES[:1], model.config, 1, 0)
    states = Pass(model, lambda ids: tokens[ids])(batch)
    assert states.shape == (BLOCK - 1, HIDDEN)
    anchor = int(batch.positions.rows[0])
    assert len(batch.features) == anchor
    other = replace(batch, features=batch.features + torch.eye(anchor, 2 * HIDDEN))
    assert not torch.allclose(Pass(model, lambda ids: tokens[ids])(other), states)


# Losses.

LOSSES = {
    "decay": TrainConfig(negatives=0),
    "dpace": TrainConfig(negatives=0, weights="dpace"),
    "soft labels": TrainConfig(negatives=0, kl=0.3, tv=0.2, gamma=2.0),
}


def slow_law_loss(ours: Tensor, label: int, theirs: Tensor, config: TrainConfig) -> Tensor:
    """Of one row's logits beside the target's over the same columns."""
    q = ours.log_softmax(-1)
    p = theirs.log_softmax(-1)
    loss = -(1 - config.kl - config.tv) * q[label]
    loss = loss + config.kl * (p.exp() * (p - q)).sum()
    return loss + config.tv * (p.exp() - q.exp()).abs().sum() / 2


class Row(NamedTuple):
    """What a slow loss knows of one label."""

    state: Tensor
    base: Tensor  # logits over the columns
    theirs: Tensor  # the target's
    before: Tensor  # the token before the label [1]
    label: int  # its column


def slow_markov(
    head: MarkovHead, row: Row, columns: list[int], drafted: list[int], config: TrainConfig
) -> tuple[Tensor, float]:
    """The loss of a row, and the label's probability; what is not drafted has no correction."""
    bias = torch.zeros(len(columns), dtype=torch.float64)
    for place, column in enumerate(columns):
        if column in drafted:
            bias[place] = head.bias(row.before, torch.tensor([drafted.index(column)]))[0, 0]
    ours = row.base + bias
    chance = ours.softmax(-1)[row.label]
    return slow_law_loss(ours, row.label, row.theirs, config), float(chance.detach())


def slow_selector(
    head: CandidateSelector, row: Row, columns: list[int], config: TrainConfig
) -> tuple[Tensor, float]:
    """Both of its losses, and the label's probability among the candidates."""
    best = row.base.detach().argsort(descending=True)[:CHOICES].tolist()
    if row.label not in best:
        best[-1] = row.label
    ids = torch.tensor([columns[column] for column in best])
    ours = row.base[best] + head.bias(row.state[None], row.before, ids)[0]
    place = best.index(row.label)
    loss = slow_law_loss(row.base, row.label, row.theirs, config)
    loss = loss + slow_law_loss(ours, place, row.theirs[best], config)
    return loss, float(ours.softmax(-1)[place].detach())


def slow_loss(model: DFlashDraftModel, states: Tensor, batch: Batch, config: TrainConfig) -> Tensor:
    """From samples and positions alone; the softmax is over the drafted tokens and the labels."""
    samples, shape = dict(SAMPLES), model.config
    drafted = list(KEPT) if "d2t" in model.extras else list(range(VOCAB))
    columns = sorted({*drafted, *batch.labels[batch.labels >= 0].tolist()})
    head = the_target().head_weight(torch.tensor(columns))
    total = torch.zeros((), dtype=torch.float64)
    for number, span in zip(batch.numbers, batch.spans, strict=True):
        tokens, final = samples[number].tokens, samples[number].final
        assert final is not None
        for start in range(span.row_start, span.row_end, shape.block_rows):
            anchor, reach, losses = int(batch.positions.rows[start]), 1.0, []
            for place in range(anchor + 1, min(anchor + BLOCK, len(tokens))):
                state = states[start + place - anchor - (1 if shape.anchor_first else 0)]
                theirs = head @ final[place - 1].double()
                label = columns.index(int(tokens[place]))
                row = Row(state, head @ state, theirs, tokens[place - 1 : place], label)
                if model.markov_head is not None:
                    loss, chance = slow_markov(model.markov_head, row, columns, drafted, config)
                else:
                    assert model.candidate_selector is not None
                    loss, chance = slow_selector(model.candidate_selector, row, columns, config)
                reach *= (1 + chance) / 2
                losses.append((loss, reach))
            for k, (loss, _) in enumerate(losses):
                weight = math.exp(-k / config.gamma)
                if config.weights == "dpace":
                    weight = sum(reach for _, reach in losses[k:])
                total = total + loss * weight
    return total


def fast_loss(
    model: DFlashDraftModel, states: Tensor, batch: Batch, config: TrainConfig
) -> LossSum:
    vocabulary = torch.tensor(KEPT) if "d2t" in model.extras else torch.arange(VOCAB)
    return Loss(model, the_target(), vocabulary, config, torch.device("cpu"))(states, batch, 0)


@pytest.mark.parametrize("config", LOSSES)
@pytest.mark.parametrize(
    ("kind", "layout", "vocabulary"),
    [
        ("selector", "fill-in", "reduced"),
        ("selector", "anchor-first", "whole"),
        ("markov", "fill-in", "whole"),
        ("markov", "anchor-first", "reduced"),
    ],
)
def test_loss_of_a_head_equals_the_slow_one(
    monkeypatch: pytest.MonkeyPatch, kind: str, layout: str, vocabulary: str, config: str
) -> None:
    """Value and gradients, also of the head's tables, in chunks; and every mistake is seen."""
    model = model_with(kind, LAYOUTS[layout], vocabulary).double()
    monkeypatch.setattr(loss_stage, "_CHUNK", 3 * model.config.block_rows)
    batch = make_batch(SAMPLES, model.config, 5, 0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(batch.labels), HIDDEN, generator=generator, dtype=torch.float64)
    states = (0.3 * noise).requires_grad_()
    head = model.markov_head or model.candidate_selector
    assert head is not None
    wanted = [states, *head.parameters()]
    expected = slow_loss(model, states, batch, LOSSES[config])
    loss = fast_loss(model, states, batch, LOSSES[config])
    assert loss.total == pytest.approx(float(expected.detach()), rel=1e-5)  # logits are in float32
    pairs = zip(
        torch.autograd.grad(loss.surrogate, wanted),
        torch.autograd.grad(expected, wanted),
        strict=True,
    )
    for got, gradient in pairs:
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-4)
        assert gradient.abs().max() > 0.01

    for wrong in (
        {"previous": batch.previous.roll(1)},
        {"previous": batch.labels.clamp(min=0)},
        {"labels": batch.labels.where(batch.labels < 0, batch.previous)},
    ):
        mistaken = fast_loss(model, states, replace(batch, **wrong), LOSSES[config])
        assert abs(mistaken.total / float(expected.detach()) - 1) > 1e-3


@pytest.mark.parametrize(
    ("name", "value"), [("final_logit_softcapping", 1.5), ("logits_scaling", 4.0)]
)
@pytest.mark.parametrize("kind", ["markov", "swiglu"])
def test_loss_is_of_the_laws_of_decoding_where_a_family_changes_logits(
    kind: str, name: str, value: float
) -> None:
    """Capped or scaled before a head adds to them; and so is the target's own law."""
    target = tiny_target.__wrapped__("qwen3")
    setattr(target.config, name, value)
    model = with_head(network(0), (kind, RANK), 0).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(0.0, 0.6, generator=generator)
    decoding = PackedDraft(model, target).sequential
    assert decoding is not None

    batch = make_batch(SAMPLES, model.config, 5, 0)
    states = torch.randn(len(batch.labels), HIDDEN, generator=generator, dtype=torch.float64)
    losses = {}
    for kl in (0.0, 1.0):
        loss = Loss(model, target, torch.arange(VOCAB), TrainConfig(kl=kl), torch.device("cpu"))
        losses[kl] = loss(states, batch, 0).figures["loss"]

    assert batch.final is not None
    for place, row in enumerate((batch.labels >= 0).nonzero()[:, 0].tolist()[:9]):
        walk = decoding.begin(states[row][None, None])
        step = walk(0, batch.previous[row].view(1, 1), states.new_zeros(1, 1, 0))
        law = torch.empty(VOCAB, dtype=torch.float64)
        law[step.candidates[0]] = step.laws[0, 0].detach()
        theirs = target.lm_head(batch.final[row].double()).detach().log_softmax(-1)
        of_label = -law[batch.labels[row]]
        of_law = (theirs.exp() * (theirs - law)).sum()
        assert float(losses[0.0][place]) == pytest.approx(float(of_label), rel=1e-4, abs=1e-4)
        assert float(losses[1.0][place]) == pytest.approx(float(of_law), rel=1e-4, abs=1e-4)


def test_a_draft_model_caps_no_logits() -> None:
    target = tiny_target.__wrapped__("qwen3")
    target.config.final_logit_softcapping = 1.5
    model = random_weights(draft_config(target, method="draft_model", num_layers=1), 0)
    loss = Loss(model, target, torch.arange(VOCAB), TrainConfig(), torch.device("cpu"))
    assert (loss.cap, loss.target_cap) == (None, 1.5)


def test_hit_needs_the_label_among_the_candidates() -> None:
    """A selector that likes a label which decoding does not offer it is not right."""
    model = model_with("selector", False)
    selector = model.candidate_selector
    assert isinstance(selector, CandidateSelector)
    previous, labels = torch.tensor([5, 5]), torch.tensor([7, 8])
    logits = torch.zeros(2, VOCAB)
    logits[:, 8 : 8 + CHOICES] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    states = torch.ones(2, HIDDEN)
    columns = torch.arange(VOCAB)
    head = step_head(model, the_target().embed, columns, previous, columns)
    chosen = head.chosen(states, logits, labels, slice(0, 2))
    assert chosen.columns is not None
    assert chosen.is_there is not None
    assert chosen.columns.tolist() == [[8, 9, 10, 7], [8, 9, 10, 11]]
    assert chosen.is_there.tolist() == [False, True]
    assert chosen.labels.tolist() == [3, 0]


def test_tables_and_kernels_do_not_decay() -> None:
    for kind, names in (
        ("selector", ("predecessor_codebook", "successor_codebook", "base_kernel")),
        ("markov", ("markov_w1.weight", "markov_w2.weight")),
    ):
        model = model_with(kind, False)
        groups = new_optimizers(model, TrainConfig())[0].param_groups
        assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
        decaying = {id(parameter) for parameter in groups[0]["params"]}
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim > 1 and not name.endswith(names)
            assert (id(parameter) in decaying) == is_matrix


# First weights.


@pytest.mark.parametrize("kind", KINDS)
def test_new_head_changes_no_state_and_no_loss(kind: str) -> None:
    bare = network(0, head_choices=VOCAB)
    model = with_head(bare, (kind, RANK), 3)
    again = with_head(bare, (kind, RANK), 3).state_dict()
    other = with_head(bare, (kind, RANK), 4).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in again.items())
    batch = make_batch(SAMPLES, model.config, 5, 0)
    embed = the_target().embed
    states = Pass(bare, embed)(batch)
    assert torch.equal(Pass(model, embed)(batch), states)

    config = LOSSES["decay"]
    before = fast_loss(bare, states, batch, config).total
    after = fast_loss(model, states, batch, config).total
    terms = 2 if kind == "selector" else 1  # of VOCAB candidates, both of its terms are the same
    assert after == pytest.approx(terms * before, rel=1e-6)
    assert (model.config.conv_kernel_size, model.config.conv_group_size) == (
        (2, 16) if kind == "selector" else (0, 0)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_head_comes_along_with_its_drafter(kind: str) -> None:
    donor = model_with(kind, False, "reduced")
    taken = taken_from(shape(True), donor, 1)
    assert taken.config == replace(donor.config, anchor_first=True)
    theirs = donor.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in taken.state_dict().items())
    with pytest.raises(InvalidParameter) as error:
        with_head(taken, (kind, RANK + 1), 0)
    assert f"has a {kind} head of inner size {RANK} already" in one_line_and_hint(error)


def test_markov_rows_follow_their_tokens() -> None:
    model = model_with("markov", True)
    assert isinstance(model.markov_head, MarkovHead)
    whole = model.markov_head.markov_w2.weight.clone()
    for kept in ((4, 9, 30), (3, 9, 30, 31)):
        draft_only(model, torch.tensor(kept))
        rows = model.markov_head.markov_w2.weight
        assert rows.shape == (len(kept), RANK)
        for row, token in zip(rows, kept, strict=True):
            was_kept = kept == (4, 9, 30) or token in (9, 30)
            assert torch.equal(row, whole[token] if was_kept else torch.zeros(RANK))
    draft_only(model, None)
    assert model.config.draft_vocab_size is None
    assert not model.extras
    assert len(model.markov_head.markov_w2.weight) == VOCAB


def test_heads_that_are_not_trained_are_refused_by_name() -> None:
    for kind, changes in (
        ("markov_rnn", {}),
        ("domino", {"head_states": 4}),
    ):
        changes = {**changes, "sequential_head": kind, "head_rank": RANK}
        with pytest.raises(InvalidParameter) as error:
            taken_from(shape(False), network(0, **changes), 0)
        assert f"has a {kind} head, which is not trained here" in one_line_and_hint(error)


def test_a_confidence_head_stays_behind_and_is_not_trained() -> None:
    """DeepSpec's folders have one beside their Markov head."""
    fields = {"sequential_head": "markov", "head_rank": RANK, "anchor_first": True}
    donor = network(0, **fields, confidence_head=True, confidence_with_markov=True)
    taken = taken_from(shape(True), donor, 0)
    assert taken.config.sequential_head == "markov"
    assert not taken.config.confidence_head
    theirs = donor.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in taken.state_dict().items())
    assert any("confidence head" in line for line in left_behind(donor, taken.config, the_target()))
    with pytest.raises(InvalidParameter, match="a confidence head, which is not trained here"):
        check_trained(donor)


def test_what_training_would_pass_over_is_refused_by_name() -> None:
    windows = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 8}
    for changes, told in (
        (windows, "sliding_attention layers"),
        ({"input_embedding_scale": 2.0}, "input_embedding_scale 2.0"),
        ({"output_multiplier": 0.5}, "output_multiplier 0.5"),
        ({}, "an embedding of its own for the mask token"),
    ):
        donor = network(0, **changes)
        if not changes:
            donor.extras["mask_embedding"] = torch.ones(HIDDEN)
        with pytest.raises(InvalidParameter) as error:
            taken_from(shape(False), donor, 0)
        assert f"has {told}, which cannot be trained here" in one_line_and_hint(error)


def test_what_a_drafter_leaves_behind_is_told() -> None:
    donor, target = network(0), the_target()
    rows = target.head_weight(torch.tensor(KEPT)).float()
    donor.reduce_vocabulary(torch.tensor(KEPT))
    donor.extras["lm_head.weight"] = rows
    assert list(left_behind(donor, donor.config, target)) == []
    donor.extras["lm_head.weight"] = rows + 0.1
    (line,) = left_behind(donor, donor.config, target)
    assert line == "the target's lm_head.weight is taken, not that"
    donor.extras.clear()
    (line,) = left_behind(donor, replace(donor.config, target_layer_ids=(1, 3)), target)
    assert line == "layers (1, 3) of the target are read, not the (1, 2)"


def test_convolutions_need_whole_groups() -> None:
    narrow = network(0, hidden_size=24)
    with pytest.raises(InvalidParameter) as error:
        with_head(narrow, ("selector", RANK), 0)
    assert "groups of 16 channels, the drafter 24 channels" in one_line_and_hint(error)


def test_head_decides_the_layout_unless_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = the_target()
    donor = model_with("markov", True, "reduced")
    donor.config = replace(donor.config, target_layer_ids=(1,))
    donor.fc = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
    donor.save_pretrained(tmp_path / "first")
    donor.config = replace(donor.config, anchor_first=False)
    donor.save_pretrained(tmp_path / "filled")
    donor.config = replace(donor.config, anchor_first=True)
    common = {"mask_token_id": MASK, "num_features": 1}
    for options, anchor_first in (
        ({}, False),
        ({"head": "selector"}, False),
        ({"head": "markov"}, True),
        ({"head": "markov", "layout": "fill-in"}, False),
        ({"head": "none"}, False),
        ({"head": "none", "layout": "anchor-first"}, True),
        ({"layout": "anchor-first"}, True),
        ({"init_from": str(tmp_path / "first")}, True),
        ({"init_from": str(tmp_path / "first"), "layout": "fill-in"}, False),
        ({"init_from": str(tmp_path / "filled")}, False),
        ({"init_from": str(tmp_path / "filled"), "head": "markov"}, False),  # no new one
    ):
        given: Any = options if "init_from" in options else common | options
        assert DraftOptions(**given).shape(target).anchor_first is anchor_first

    brought = DraftOptions(init_from=str(tmp_path / "first"), head="markov")
    assert brought.new_head(donor) is None
    capsys.readouterr()
    for is_first, told in ((True, ""), (False, "are anchor-first, those of this run fill-in")):
        config = replace(donor.config, anchor_first=is_first)
        brought.network(config, target, [], 0)  # type: ignore[arg-type]
        err = capsys.readouterr().err
        assert told in err if told else not err
    assert replace(brought, head_rank=RANK).new_head(donor) is None
    assert replace(brought, head_rank=7).new_head(donor) == ("markov", 7)
    assert replace(brought, head="selector").new_head(donor) == ("selector", 256)
    with pytest.raises(InvalidParameter, match="medusa has no such thing"):
        DraftOptions(method="medusa", layout="fill-in").shape(target)


def test_card_names_layout_and_head() -> None:
    run = {"config": {}, "versions": {}, "command": "c", "device": "d", "threads": 1, "commit": "x"}
    run["versions"] = {"torch": "1", "transformers": "1", "flashdraft": "1"}
    figures: Any = {"step": 1, "positions_seen": 1, "num_prompts": 1, "flops": 1.0, "taus": []}
    card = model_card(model_with("selector", False).config, "t", run, figures, num_samples=1)
    assert "DFlash 2's candidate selector, inner size 5, among 4 candidates; convolutions" in card
    assert "filled in: row k predicts the token at anchor + k |" in card
    card = model_card(model_with("markov", True).config, "t", run, figures, num_samples=1)
    assert "DSpark's vanilla Markov head, inner size 5 |" in card
    assert "anchor-first: row k predicts the token at anchor + k + 1 |" in card
