"""Blocks of both layouts, features that are embeddings, a mask token with a row of its own: what a
drafter feeds and reads; and with every head that no text of the target changes.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MASK, VOCAB, tiny_target
from test_dflash import features_of, observed, reference, rows_of, the_model
from test_published_heads import HEADS, MARKOV, model_with, packed, the_target
from torch import Tensor
from toy_folders import HIDDEN
from toy_training import language_model, one_line_and_hint

from flashdraft.decoding.tree import check
from flashdraft.errors import DraftMismatch, InvalidParameter
from flashdraft.generate import Model
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.train.features import Reader
from flashdraft.types import Proposal, Rows, SamplingParams

PROMPTS = ((5, 9, 31), tuple(range(3, 40)), (7, 7, 12, 50, 3, 22, 17, 8, 40, 41, 9))
ROWS = 4  # of the toy's blocks


def proposed(
    drafter: DFlashDrafter, max_nodes: int = 99, rows: Rows | None = None
) -> tuple[Tensor, Proposal]:
    """The states of the rows that predict, [rows, n, hidden], and the proposal of every prompt.

    rows: what the drafter has observed; else it observes the prompts.
    """
    network, caught = drafter.network, []
    laws = network.laws

    def caught_laws(hidden: Tensor, anchors: Tensor, *, trees: bool) -> Any:
        caught.append(hidden)
        return laws(hidden, anchors, trees=trees)

    network.laws = caught_laws  # type: ignore[method-assign]
    proposal = drafter.propose(rows or observed(drafter, PROMPTS), max_nodes)
    check(proposal)
    return caught[0], proposal


# Layouts.


def drafter_of(*, anchor_first: bool, block_size: int, **given: Any) -> DFlashDrafter:
    model = the_model(anchor_first=anchor_first, block_size=block_size)
    return DFlashDrafter(PackedDraft(model, the_target()), **given)


def test_layouts_differ_in_their_first_row_alone() -> None:
    """The same four rows are fed; read as the other layout, every draft is off by one."""
    fill_in, of_fill_in = proposed(drafter_of(anchor_first=False, block_size=ROWS))
    anchor_first, of_anchor_first = proposed(drafter_of(anchor_first=True, block_size=ROWS + 1))
    assert fill_in.shape[1] == ROWS - 1
    assert anchor_first.shape[1] == ROWS
    assert torch.equal(anchor_first[:, 1:], fill_in)
    assert torch.equal(of_anchor_first.tokens[:, 2:], of_fill_in.tokens[:, 1:])
    assert of_anchor_first.sizes.tolist() == [ROWS + 1] * len(PROMPTS)


@pytest.mark.parametrize("anchor_first", [False, True])
def test_rows_that_predict_are_those_of_the_definition(anchor_first: bool) -> None:
    nodes = ROWS + anchor_first
    states, _ = proposed(drafter_of(anchor_first=anchor_first, block_size=nodes))
    for row, history in enumerate(PROMPTS):
        of_masks = reference(the_model(), features_of(history), history[-1], ROWS)
        torch.testing.assert_close(states[row, -(ROWS - 1) :], of_masks, rtol=0, atol=1e-3)
        if anchor_first:  # a block that is one row wider has other states
            wider = reference(the_model(), features_of(history), history[-1], ROWS + 1)
            assert (states[row] - wider).abs().max() > 0.1


@pytest.mark.parametrize("block_size", [2, 3, 7])
def test_a_block_size_counts_nodes_in_both_layouts(block_size: int) -> None:
    for anchor_first in (False, True):
        drafter = drafter_of(anchor_first=anchor_first, block_size=5)
        narrow = DFlashDrafter(drafter.network, block_size=block_size)
        made = drafter_of(anchor_first=anchor_first, block_size=block_size)
        states, proposal = proposed(narrow)
        assert proposal.num_nodes == block_size
        assert narrow.block_rows == block_size - anchor_first
        assert torch.equal(states, proposed(made)[0])


def test_fewer_nodes_are_the_first_ones_of_an_anchor_first_block() -> None:
    whole, _ = proposed(drafter_of(anchor_first=True, block_size=5))
    for max_nodes in (2, 3):
        states, proposal = proposed(drafter_of(anchor_first=True, block_size=5), max_nodes)
        assert torch.equal(states, whole[:, : max_nodes - 1])
        assert proposal.num_nodes == max_nodes


@pytest.mark.parametrize("shift", [False, True])
def test_domino_feeds_whole_blocks_and_drafts_one_fewer(shift: bool) -> None:
    model = model_with("domino", anchor_first=shift)
    drafter = DFlashDrafter(packed(model))
    alone = DFlashDraftModel(model_with(None).config)
    alone.load_state_dict(model.state_dict(), strict=False)
    states, proposal = proposed(drafter)
    of_masks, _ = proposed(DFlashDrafter(packed(alone)))
    assert drafter.block_rows == model.config.block_size
    assert proposal.num_nodes == model.config.block_size
    assert torch.equal(states[:, 1:] if shift else states, of_masks[:, : -1 if shift else None])


# Features.


@pytest.mark.parametrize("layers", [(-1, 2), (2, -1)])
def test_features_of_no_layer_are_the_embeddings(layers: tuple[int, int]) -> None:
    model = the_model(target_layer_ids=layers)
    drafter = DFlashDrafter(PackedDraft(model, the_target()))
    assert drafter.layers == (2,)
    rows = rows_of(PROMPTS)
    for history, slot in zip(PROMPTS, rows.slots, strict=True):
        tokens = torch.tensor(history[:-1])
        own = features_of(history, (2,))[:-1]
        one = replace(rows, slots=[slot], histories=[list(history)])
        for part in (slice(0, 1), slice(1, None)):
            drafter.observe(one, [tokens[part]], [own[part]])
    states, _ = proposed(drafter, rows=rows)

    for row, history in enumerate(PROMPTS):
        embedded = the_target().embed(torch.tensor(history))
        output = features_of(history, (2,))
        columns = (embedded, output) if layers[0] == -1 else (output, embedded)
        expected = reference(model, torch.cat(columns, dim=1), history[-1], ROWS)
        torch.testing.assert_close(states[row], expected, rtol=0, atol=1e-3)
        swapped = reference(model, torch.cat(columns[::-1], dim=1), history[-1], ROWS)
        assert (states[row] - swapped).abs().max() > 0.1


def test_embeddings_alone_want_no_features_of_the_target() -> None:
    model = the_model(target_layer_ids=(-1, -1))
    drafter = DFlashDrafter(PackedDraft(model, the_target()))
    assert drafter.layers == ()
    history = PROMPTS[0]
    rows = rows_of([history])
    drafter.observe(rows, [torch.tensor(history[:-1])], None)
    states, _ = proposed(drafter, rows=rows)
    twice = the_target().embed(torch.tensor(history)).repeat(1, 2)
    expected = reference(model, twice, history[-1], ROWS)
    torch.testing.assert_close(states[0], expected, rtol=0, atol=1e-3)


def test_a_drafter_that_reads_embeddings_is_not_trained() -> None:
    with pytest.raises(InvalidParameter) as error:
        Reader(language_model(), (-1, 2), 64)
    assert "layer -1" in one_line_and_hint(error)


# A mask token's own row.


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_mask_token_has_the_row_that_the_file_gives_it(scale: float) -> None:
    """As if the whole embedding were the file's own, with that row in its place."""
    generator = torch.Generator().manual_seed(4)
    row = torch.randn(HIDDEN, generator=generator)
    table = the_target().embed(torch.arange(VOCAB)).clone()
    table[MASK] = row
    by_row, by_table, plain = (the_model(input_embedding_scale=scale) for _ in range(3))
    by_row.extras["mask_embedding"] = row
    by_table.extras["embed_tokens.weight"] = table
    states = []
    for model in (by_row, by_table, plain):
        states.append(proposed(DFlashDrafter(PackedDraft(model, the_target())))[0])
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[0], states[2])


def test_a_mask_row_beside_an_embedding_that_is_scaled_is_refused() -> None:
    gemma = tiny_target("gemma3")
    model = the_model(num_target_layers=0)
    model.extras["mask_embedding"] = torch.ones(HIDDEN)
    with pytest.raises(DraftMismatch) as error:
        PackedDraft(model, gemma)
    assert "the mask token has a row of its own" in one_line_and_hint(error)


def test_a_mask_row_is_saved_but_not_in_the_plain_format(tmp_path: Path) -> None:
    model = the_model()
    model.extras["mask_embedding"] = torch.linspace(-1, 1, HIDDEN)
    model.save_pretrained(tmp_path / "whole")
    read = DFlashDraftModel.from_pretrained(tmp_path / "whole").extras["mask_embedding"]
    torch.testing.assert_close(read.float(), model.extras["mask_embedding"], rtol=0, atol=0.01)
    with pytest.raises(InvalidParameter) as error:
        model.save_pretrained(tmp_path / "plain", plain=True)
    assert "an embedding of its own" in one_line_and_hint(error)


# Losslessness.

TEXTS = ("hello there", "what is it", "zebra")
GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=1.0, seed=3)


@functools.cache
def plain_texts(params: SamplingParams) -> list[tuple[int, ...]]:
    return [result.tokens for result in language_model().generate(list(TEXTS), params)]


def texts_of(model: DFlashDraftModel, params: SamplingParams, tree_nodes: int | None) -> Any:
    lm = language_model()
    network = PackedDraft(model, lm.target)
    drafting = Model(
        lm.target,
        lm.tokenizer,
        lambda: DFlashDrafter(network, tree_nodes=tree_nodes),
        eos=lm.eos,
        max_rows=2,
    )
    return drafting.generate(list(TEXTS), params)


CONVOLVED: dict[str, Any] = {"conv_kernel_size": 2, "conv_group_size": 16}


@pytest.mark.parametrize("tree_nodes", [None, 9])
@pytest.mark.parametrize("kind", HEADS)
def test_no_head_changes_a_text(kind: str, tree_nodes: int | None) -> None:
    """Greedy and sampled, with a reduced vocabulary and a confidence head, in both layouts."""
    fields: dict[str, Any] = {"confidence_head": True, "confidence_with_markov": kind in MARKOV}
    fields |= CONVOLVED if kind == "selector" else {}
    for params, vocabulary in ((GREEDY, "whole"), (SAMPLED, "reduced")):
        model = model_with(kind, vocabulary, anchor_first=vocabulary == "whole", **fields)
        results = texts_of(model, params, tree_nodes)
        assert [result.tokens for result in results] == plain_texts(params)
        assert all(result.stats.num_drafted for result in results)
