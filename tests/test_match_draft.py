"""A drafter beside its target: another target, a cut, padded or reduced vocabulary, scaled
embeddings and capped logits are met, or refused in one line with a hint.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MASK, VOCAB, tiny_target
from torch import Tensor
from toy_drafts import KEPT, config, proposals, reduced, target_of
from toy_folders import HIDDEN, ZLAB, letter_tokenizer, save_target, save_zlab, zlab_tensors
from toy_training import one_line_and_hint

import flashdraft
from flashdraft import DFlashDraftModel
from flashdraft.errors import CheckpointError, DraftMismatch
from flashdraft.formats.match import check_target
from flashdraft.formats.read import read_draft
from flashdraft.formats.written import config_of
from flashdraft.loading import open_network
from flashdraft.methods.dflash import PackedDraft


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 64}, "the draft has hidden size 64, but `llama` has 32"),
        (
            {"target_layer_ids": (1, 4)},
            "the draft wants hidden states of layer 4, but `llama` has 4 layers",
        ),
        (
            {"target_layer_ids": (-2, 2)},
            "the draft wants hidden states of layer -2, but `llama` has 4 layers",
        ),
        (
            {"num_target_layers": 5},
            "the draft was made for a target with 5 layers, but `llama` has 4",
        ),
        ({"mask_token_id": VOCAB}, f"the mask token {VOCAB}, but `llama` has {VOCAB}"),
        ({"mask_token_id": -1}, "the mask token -1"),
    ],
)
def test_drafter_of_another_target_is_refused(changes: dict[str, Any], expected: str) -> None:
    target, fitting = tiny_target("llama", lean=True), config_of(ZLAB, "here")
    check_target(fitting, target)
    with pytest.raises(DraftMismatch) as error:
        check_target(replace(fitting, **changes), target)
    assert expected in one_line_and_hint(error)


def test_mismatch_ends_load_before_anything_runs(tmp_path: Path) -> None:
    save_zlab(tmp_path / "draft", config=config(num_target_layers=5))
    with pytest.raises(DraftMismatch):
        flashdraft.load(save_target(tmp_path / "target"), draft=tmp_path / "draft")


# Vocabularies of two lengths: a target whose embedding was cut or padded.


def vocabulary_of(count: int, *, d2t: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A drafter's config and tensors, with an embedding and a head of its own of `count` tokens;
    its head likes the last ones.
    """
    noise = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(8))
    tensors = {
        **zlab_tensors(),
        "embed_tokens.weight": noise,
        "lm_head.weight": noise.flip(0) * torch.arange(1, count + 1)[:, None],
    }
    if d2t:
        tensors |= {
            "d2t": torch.zeros(count, dtype=torch.int64),
            "t2d": torch.ones(count, dtype=torch.bool),
        }
    return config(vocab_size=count, **({"draft_vocab_size": count} if d2t else {})), tensors


@pytest.mark.parametrize("d2t", [False, True], ids=["whole", "reduced"])
@pytest.mark.parametrize("count", [VOCAB - 20, VOCAB, VOCAB + 20])
def test_drafter_of_a_cut_or_padded_vocabulary_proposes_only_what_its_target_knows(
    tmp_path: Path, count: int, d2t: bool
) -> None:
    target = target_of(save_target(tmp_path / "target"))
    written, tensors = vocabulary_of(count, d2t=d2t)
    written["dflash_config"] = {**ZLAB["dflash_config"], "mask_token_id": 3}
    model = DFlashDraftModel.from_pretrained(
        save_zlab(tmp_path / "draft", config=written, tensors=tensors)
    )
    drafted = proposals(model, target)
    assert max(drafted) < min(count, VOCAB)
    assert len(set(drafted)) > 1
    whole = PackedDraft(model, target)
    assert (
        whole.embed(torch.tensor([VOCAB - 1])).abs().sum() > 0 or count < VOCAB
    )  # what it never saw is nothing to it


def test_uncut_head_would_propose_what_the_target_lacks(tmp_path: Path) -> None:
    """What the test above rests on: the drafter's likeliest tokens are among those."""
    _, tensors = vocabulary_of(VOCAB + 20)
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(2))
    assert int((hidden @ tensors["lm_head.weight"].T).argmax(-1).max()) >= VOCAB


@pytest.mark.parametrize("count", [VOCAB - 4, VOCAB + 4])
def test_drafter_without_tables_of_its_own_fits_any_length(tmp_path: Path, count: int) -> None:
    target = target_of(save_target(tmp_path / "target"))
    folder = save_zlab(tmp_path / "draft", config=config(vocab_size=count))
    same = save_zlab(tmp_path / "same")
    assert proposals(DFlashDraftModel.from_pretrained(folder), target) == proposals(
        DFlashDraftModel.from_pretrained(same), target
    )


def test_mask_token_beyond_a_cut_vocabulary_is_refused_unless_the_drafter_has_its_row(
    tmp_path: Path,
) -> None:
    target = target_of(save_target(tmp_path / "target"))
    written, tensors = vocabulary_of(VOCAB + 20)
    written["dflash_config"] = {**ZLAB["dflash_config"], "mask_token_id": VOCAB + 5}
    own = save_zlab(tmp_path / "own", config=written, tensors=tensors)
    assert max(proposals(DFlashDraftModel.from_pretrained(own), target)) < VOCAB
    shared = save_zlab(tmp_path / "shared", config=written)
    with pytest.raises(DraftMismatch) as error:
        PackedDraft(DFlashDraftModel.from_pretrained(shared), target)
    assert f"the mask token {VOCAB + 5}, but `" in one_line_and_hint(error)
    assert "its row of the embedding is missing" in str(error.value)


def test_vocabulary_that_lies_beyond_the_target_is_refused(tmp_path: Path) -> None:
    target = target_of(save_target(tmp_path / "target"))
    written = config(vocab_size=200, draft_vocab_size=5)
    extra = {
        "d2t": torch.full((5,), 100, dtype=torch.int64),
        "t2d": torch.zeros(200, dtype=torch.bool).index_fill(0, torch.arange(100, 105), True),
    }
    folder = save_zlab(tmp_path / "draft", config=written, tensors={**zlab_tensors(), **extra})
    with pytest.raises(DraftMismatch) as error:
        PackedDraft(DFlashDraftModel.from_pretrained(folder), target)
    assert "lies beyond the 61 tokens" in one_line_and_hint(error)


# A target that scales its embedding, or caps its logits (Gemma).


def gemma_draft(folder: Path, table: Tensor | None = None, **special: Any) -> DFlashDraftModel:
    tensors = (
        zlab_tensors()
        if table is None
        else {**zlab_tensors(), "embed_tokens.weight": table.float()}
    )
    written = config(dflash_config={**ZLAB["dflash_config"], **special})
    return DFlashDraftModel.from_pretrained(save_zlab(folder, config=written, tensors=tensors))


def test_copy_of_a_scaled_embedding_is_scaled_and_another_table_needs_a_scale(
    tmp_path: Path,
) -> None:
    target: Any = tiny_target("gemma3")
    some = torch.tensor([3, 9, MASK])
    rows = target.embedding_rows(torch.arange(VOCAB)).float().double()
    copied = PackedDraft(
        gemma_draft(tmp_path / "copy", target.embedding_rows(torch.arange(VOCAB)).double()), target
    )
    exact = torch.equal(rows, target.embedding_rows(torch.arange(VOCAB)))
    if exact:
        assert torch.equal(copied.embed(some), target.embed(some))
        assert not torch.equal(copied.embed(some), rows[some])
    with pytest.raises(DraftMismatch) as error:
        PackedDraft(gemma_draft(tmp_path / "other", rows.flip(0)), target)
    assert "an embedding of its own" in one_line_and_hint(error)
    own = PackedDraft(
        gemma_draft(tmp_path / "own", rows.flip(0), input_embedding_scale=4.0), target
    )
    assert torch.allclose(own.embed(some), rows.flip(0)[some] * 4.0)
    with pytest.raises(DraftMismatch) as error:
        PackedDraft(gemma_draft(tmp_path / "shared", input_embedding_scale=4.0), target)
    assert "which scales it already" in one_line_and_hint(error)


def test_head_of_a_capped_target_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target: Any = tiny_target("gemma3")
    monkeypatch.setattr(target.config, "final_logit_softcapping", 3.0)
    hidden = torch.randn(5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensors = {**zlab_tensors(), "lm_head.weight": target.head_weight(torch.arange(VOCAB)).float()}
    own = PackedDraft(
        DFlashDraftModel.from_pretrained(save_zlab(tmp_path / "own", tensors=tensors)), target
    )
    shared = PackedDraft(gemma_draft(tmp_path / "shared"), target)
    raw = target.uncapped_logits(hidden)
    capped = 3 * torch.tanh(raw / 3)
    assert torch.allclose(shared.logits(hidden), capped)
    assert torch.allclose(own.logits(hidden), capped, atol=1e-5)
    assert not torch.allclose(raw, capped, atol=0.1)


# A reduced vocabulary.


@pytest.mark.parametrize("own_head", [False, True], ids=["the-target's-rows", "own-lm_head"])
def test_reduced_vocabulary_drafts_only_its_tokens_and_leaves_the_target_alone(
    tmp_path: Path, own_head: bool
) -> None:
    target = target_of(save_target(tmp_path / "target"))
    save_zlab(
        tmp_path / "draft", config=config(draft_vocab_size=5), tensors=reduced(own_head=own_head)
    )
    save_zlab(tmp_path / "whole")
    head, hidden = (
        target.head_weight(torch.arange(VOCAB)).clone(),
        torch.randn(3, HIDDEN, dtype=torch.float64),
    )
    logits = target.lm_head(hidden)
    drafted = set(proposals(DFlashDraftModel.from_pretrained(tmp_path / "draft"), target))
    assert drafted <= set(KEPT)
    assert len(drafted) > 1
    assert torch.equal(target.head_weight(torch.arange(VOCAB)), head)
    assert torch.equal(target.lm_head(hidden), logits)
    whole = set(proposals(DFlashDraftModel.from_pretrained(tmp_path / "whole"), target))
    assert not whole <= set(KEPT)


def test_reduced_vocabulary_takes_the_best_of_its_tokens(tmp_path: Path) -> None:
    target = target_of(save_target(tmp_path / "target"))
    save_zlab(
        tmp_path / "draft", config=config(draft_vocab_size=5), tensors=reduced(own_head=False)
    )
    network = PackedDraft(DFlashDraftModel.from_pretrained(tmp_path / "draft"), target)
    hidden = torch.randn(
        50, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    logits = target.lm_head(hidden)
    expected = [max(KEPT, key=lambda token: float(row[token])) for row in logits]
    assert (
        network.scored(hidden[None], torch.zeros(1, dtype=torch.long))[0][..., 0][0].tolist()
        == expected
    )
    assert (
        network.scored(hidden[None], torch.zeros(1, dtype=torch.long))[0][..., 0][0].tolist()
        != logits.argmax(-1).tolist()
    )


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"d2t": torch.full((5,), VOCAB)}, "d2t leads to token"),
        ({"d2t": torch.full((5,), -9)}, "d2t leads to token"),
        ({"d2t": torch.zeros(4, dtype=torch.int64)}, "d2t has shape [4]"),
        ({"d2t": torch.zeros(5)}, "holds d2t as float32, not as whole numbers"),
        ({"d2t": torch.zeros(5, dtype=torch.bool)}, "holds d2t as bool"),
        ({"d2t": torch.arange(5)}, "d2t and t2d differ in whether token"),  # ids, not offsets
        ({"t2d": torch.ones(VOCAB)}, "d2t and t2d differ in whether token 0"),
        ({"lm_head.weight": torch.zeros(6, HIDDEN)}, "lm_head.weight has shape [6, 32]"),
    ],
)
def test_damaged_reduced_vocabulary_is_refused(
    tmp_path: Path, extra: dict[str, Tensor], expected: str
) -> None:
    save_zlab(
        tmp_path, config=config(draft_vocab_size=5), tensors={**reduced(own_head=True), **extra}
    )
    with pytest.raises(CheckpointError) as error:
        DFlashDraftModel.from_pretrained(tmp_path)
    assert expected in one_line_and_hint(error)


def test_t2d_without_d2t_is_refused(tmp_path: Path) -> None:
    whole = {**zlab_tensors(), "t2d": torch.ones(VOCAB, dtype=torch.bool)}
    DFlashDraftModel.from_pretrained(save_zlab(tmp_path / "whole", tensors=whole))
    part = whole | {"t2d": torch.arange(VOCAB) < 5}
    for name, size in (("said", VOCAB), ("unsaid", ...)):
        folder = save_zlab(tmp_path / name, config=config(draft_vocab_size=size), tensors=part)
        with pytest.raises(CheckpointError) as error:
            DFlashDraftModel.from_pretrained(folder)
        assert f"holds t2d with 5 of {VOCAB} tokens, but no d2t" in one_line_and_hint(error)


@pytest.mark.parametrize("name", ["lm_head.weight", "embed_tokens.weight"])
def test_own_embedding_or_head_is_used(tmp_path: Path, name: str) -> None:
    target = target_of(save_target(tmp_path / "target"))
    weight = (
        target.head_weight(torch.arange(VOCAB))
        if name == "lm_head.weight"
        else target.embed(torch.arange(VOCAB))
    )
    folders = {
        "none": {},
        "the target's": {name: weight.float()},
        "another": {name: weight.flip(0).contiguous().float()},
    }
    drafted = {}
    for number, (kind, extra) in enumerate(folders.items()):
        folder = save_zlab(tmp_path / str(number), tensors={**zlab_tensors(), **extra})
        drafted[kind] = proposals(DFlashDraftModel.from_pretrained(folder), target)
    assert drafted["the target's"] == drafted["none"]
    assert drafted["another"] != drafted["none"]


def test_mask_token_that_is_a_word_is_refused(tmp_path: Path) -> None:
    target = save_target(tmp_path / "target")
    save_zlab(tmp_path / "word", config=config(dflash_config={"mask_token_id": 10}))
    with pytest.raises(DraftMismatch) as error:
        flashdraft.load(target, draft=tmp_path / "word")
    message = one_line_and_hint(error)
    assert "fills its blocks with token 10, which is '" in message
    assert str(target) in message


def test_mask_token_that_is_no_word_is_taken(tmp_path: Path) -> None:
    """Special ones, and those that the tokenizer does not have."""
    target = save_target(tmp_path / "target")
    for token in (0, 2, MASK):
        folder = tmp_path / f"special{token}"
        save_zlab(folder, config=config(dflash_config={"mask_token_id": token}))
        flashdraft.load(target, draft=folder)


# A mask token that config.json calls by its name.


def naming(folder: Path, token: str, **more: Any) -> Path:
    reads = {"target_layer_ids": [1, 2], "mask_token": token, **more}
    return save_zlab(folder, config=config(dflash_config=reads))


def test_mask_token_by_name_is_the_target_tokenizers(tmp_path: Path) -> None:
    target = save_target(tmp_path / "target")
    named = naming(tmp_path / "named", "<mask>")
    assert open_network(named, str(target)).config.mask_token_id == MASK
    texts = []
    for draft in (save_zlab(tmp_path / "numbered"), named):
        model = flashdraft.load(target, draft=draft, dtype="float64", block_size=4)
        answer = model.generate("hello", max_new_tokens=12)
        texts.append((answer.tokens, answer.stats.num_accepted, answer.stats.num_drafted))
    assert texts[0] == texts[1]

    with pytest.raises(CheckpointError) as error:
        open_network(named)
    assert "names its mask token '<mask>', but not its id" in one_line_and_hint(error)
    assert "name the target" in str(error.value)


def test_mask_token_that_a_tokenizer_lacks_is_its_next_one(tmp_path: Path) -> None:
    tokenizer = letter_tokenizer()
    draft = naming(tmp_path / "draft", "<|MASK|>")
    read, _ = read_draft(draft, tokenizer.get_vocab)
    tokenizer.add_special_tokens({"mask_token": "<|MASK|>"})
    assert read.mask_token_id == tokenizer.mask_token_id == VOCAB
    with pytest.raises(DraftMismatch) as error:  # this target has no row for it
        flashdraft.load(save_target(tmp_path / "target"), draft=draft)
    assert f"the mask token {VOCAB}, but" in one_line_and_hint(error)


@pytest.mark.parametrize(
    ("token", "more", "expected"),
    [
        ("<pad>", {"mask_token_id": MASK}, f"mask_token_id {MASK}, but its mask_token '<pad>' is"),
        ("", {}, "garbles 'mask_token': ''"),
    ],
)
def test_mask_token_by_another_name_is_refused(
    tmp_path: Path, token: str, more: dict[str, Any], expected: str
) -> None:
    draft = naming(tmp_path, token, **more)
    with pytest.raises(CheckpointError) as error:
        read_draft(draft, letter_tokenizer().get_vocab)
    assert expected in one_line_and_hint(error)
