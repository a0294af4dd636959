"""Every published format of drafters' folders: read as what it is, written again as such, or
refused by its right name.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MASK, VOCAB, tiny_target
from safetensors.torch import save_file
from torch import Tensor
from toy_drafts import same_bits, tensors_of
from toy_folders import HIDDEN, save_target
from toy_formats import MASK_ROW, V1, config, nested
from toy_published import NETWORK, READ_ROWS, Published, save
from toy_refused import CONTRADICTIONS, OTHERS, Refused
from toy_training import one_line_and_hint

import flashdraft
from flashdraft import DFlashDraftModel, hub
from flashdraft.errors import CheckpointError, DraftMismatch
from flashdraft.formats import recognise, speculators
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.match import check_target
from flashdraft.formats.read import read_draft
from flashdraft.formats.recognise import describe
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.formats.written import config_of
from flashdraft.methods.dflash import PackedDraft

SAYABLE = [  # by the speculators wrapper
    name
    for name, row in READ_ROWS.items()
    if not {"input_embedding_scale", "final_logit_softcapping"} & row.reads.keys()
    and row.reads.get("sequential_head") != "domino"
    and row.reads.get("causal") is not True
    and "a rotation a kind of layer" not in name
    and "without a selector" not in name
    and "whose window is off" not in name
]


def home_of(row: Published, tmp_path: Path) -> Path:
    folder = hub.resolve(str(save(row, tmp_path)))
    assert isinstance(folder, Path)
    return folder


@pytest.mark.parametrize("name", READ_ROWS)
def test_published_folder_is_read_as_what_it_is(tmp_path: Path, name: str) -> None:
    row = READ_ROWS[name]
    folder = home_of(row, tmp_path)
    read, tensors = read_draft(folder)
    assert read == DraftConfig(**{**NETWORK, **row.reads})
    assert set(tensors) == {*tensor_shapes(read), *row.extra}
    form = describe(folder)
    assert (form.name, form.layout) == (row.name, row.layout)


@pytest.mark.parametrize("name", READ_ROWS)
def test_published_folder_is_written_again_as_such(tmp_path: Path, name: str) -> None:
    row = READ_ROWS[name]
    folder = home_of(row, tmp_path / "theirs")
    model = DFlashDraftModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours")
    again, tensors = read_draft(tmp_path / "ours")
    assert again == model.config
    assert same_bits(tensors, read_draft(folder)[1])
    ours, theirs = describe(tmp_path / "ours"), describe(folder)
    is_deepspec = theirs.kind == "dflash" and theirs.layout == "anchor-first"
    assert ours.kind == ("dspark" if is_deepspec else theirs.kind)
    assert ours.layout == theirs.layout
    assert ours.publisher != "FlashDraft"  # no key of ours is needed to read it


@pytest.mark.parametrize("name", SAYABLE)
def test_speculators_wrapper_survives_a_round_trip(name: str) -> None:
    first = DraftConfig(**{**NETWORK, **READ_ROWS[name].reads})
    written = speculators.wrapped(first, target="org/target", target_classes=["Qwen3ForCausalLM"])
    again = config_of(json.loads(json.dumps(written)), "here")
    assert again.masks == first.masks
    same = {"raw_tables": True, "num_target_layers": 0, "causal": again.causal}
    assert again == replace(first, **same)


@pytest.mark.parametrize("name", sorted(READ_ROWS.keys() - set(SAYABLE)))
def test_what_the_wrapper_cannot_say_is_not_written(name: str) -> None:
    read = DraftConfig(**{**NETWORK, **READ_ROWS[name].reads})
    with pytest.raises(CheckpointError) as error:
        speculators.wrapped(read, target="org/target", target_classes=[])
    assert "cannot be a speculators folder" in one_line_and_hint(error)


def save_refused(row: Refused, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(row.config))
    save_file(row.tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", [*OTHERS, *CONTRADICTIONS])
def test_what_is_not_read_is_refused_by_its_right_name(tmp_path: Path, name: str) -> None:
    row = {**OTHERS, **CONTRADICTIONS}[name]
    with pytest.raises(CheckpointError) as error:
        read_draft(save_refused(row, tmp_path))
    assert row.said in one_line_and_hint(error)
    assert row.runs in str(error.value.hint)


def test_planted_fault_a_reader_that_believes_class_names_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anchor-first blocks that are read as if they filled in: what the recogniser is for."""
    row = READ_ROWS["the same under z-lab's name"]
    monkeypatch.setattr(recognise, "_KEYS", {})
    with pytest.raises(CheckpointError, match="whose blocks are anchor-first"):
        read_draft(home_of(row, tmp_path))
    monkeypatch.setattr(recognise, "_is_anchor_first", lambda *_: False)
    read, _ = read_draft(home_of(row, tmp_path))
    assert read != DraftConfig(**{**NETWORK, **row.reads})


def test_planted_fault_ids_of_hidden_states_taken_for_outputs_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = READ_ROWS["speculators dflash"]
    monkeypatch.setattr(
        speculators, "_layers", lambda config, _: config["aux_hidden_state_layer_ids"]
    )
    read, _ = read_draft(home_of(row, tmp_path))
    assert read != DraftConfig(**{**NETWORK, **row.reads})


# --- Beside a target


def test_ids_beyond_the_target_are_refused() -> None:
    target = tiny_target("llama", lean=True)
    for changes, said in (
        ({"target_layer_ids": (1, 4)}, "hidden states of layer 4"),
        ({"target_layer_ids": (-2, 1)}, "hidden states of layer -2"),
        ({"mask_token_id": VOCAB}, f"the mask token {VOCAB}"),
    ):
        with pytest.raises(DraftMismatch) as error:
            check_target(DraftConfig(**{**NETWORK, **changes}), target)
        assert said in one_line_and_hint(error)


MASK_ROWS: dict[str, tuple[Any, str]] = {
    "of another token": (
        {"mask_token_id": 7, "embedding": MASK_ROW},
        f"is of the mask token 7, its config.json's is {MASK}",
    ),
    "a row a position": (
        {"mask_token_id": MASK, "embedding": MASK_ROW, "per_position": torch.zeros(4, HIDDEN)},
        "has a row a position",
    ),
    "of another width": (torch.zeros(HIDDEN + 1), f"holds no row of {HIDDEN} numbers"),
    "no embedding": ({"mask_token_id": MASK}, f"holds no row of {HIDDEN} numbers"),
    "whole numbers": (torch.zeros(HIDDEN, dtype=torch.int64), "holds no row of"),
    "not finite": (torch.full((HIDDEN,), float("nan")), "mask_embedding of"),
}


@pytest.mark.parametrize("case", MASK_ROWS)
def test_mask_row_that_is_none_is_refused(tmp_path: Path, case: str) -> None:
    held, said = MASK_ROWS[case]
    save(Published(config(), V1, mask_row=held), tmp_path)
    with pytest.raises(CheckpointError) as error:
        read_draft(tmp_path)
    assert said in one_line_and_hint(error)


def test_mask_row_that_would_run_code_is_refused(tmp_path: Path) -> None:
    save(Published(config(), V1), tmp_path)
    torch.save(Path, tmp_path / "mask_embedding.pt")
    with pytest.raises(CheckpointError) as error:
        read_draft(tmp_path)
    assert "holds more than tensors" in one_line_and_hint(error)


def test_mask_row_of_the_drafter_before_does_not_stay(tmp_path: Path) -> None:
    row = READ_ROWS["v1, a row for the mask token"]
    with_row = DFlashDraftModel.from_pretrained(home_of(row, tmp_path / "with"))
    without = DFlashDraftModel.from_pretrained(save(Published(config(), V1), tmp_path / "without"))
    with_row.save_pretrained(tmp_path / "ours")
    assert torch.equal(read_draft(tmp_path / "ours")[1]["mask_embedding"], MASK_ROW)
    without.save_pretrained(tmp_path / "ours")
    assert "mask_embedding" not in read_draft(tmp_path / "ours")[1]


def drafted(folder: Path, tmp_path: Path) -> tuple[list[int], list[int]]:
    target = tmp_path / "target"
    if not target.exists():
        save_target(target)
    texts = []
    for draft in ("autoregressive", str(folder)):
        model = flashdraft.load(target, draft=draft, dtype="float64")
        texts.append(list(model.generate("hello", max_new_tokens=12).tokens))
    return texts[0], texts[1]


@pytest.mark.parametrize(
    "name",
    [
        "v1, the embeddings as features",
        "v1, a row for the mask token",
        "v1 of NeMo, consolidated",
        "DFlash 2",
        "speculators dspark, reduced vocabulary",
        "DeepSpec's DSpark, rnn",
        "Domino with shifted labels",
    ],
)
def test_texts_of_published_drafters_are_the_targets_own(tmp_path: Path, name: str) -> None:
    plain, text = drafted(save(READ_ROWS[name], tmp_path / "draft"), tmp_path)
    assert text == plain


def test_garbled_config_is_one_line_to_whoever_asks_what_it_is(tmp_path: Path) -> None:
    for name, value in (("dflash_config", [1]), ("sample_from_anchor", "yes")):
        folder = save(Published(config(**{name: value}), V1), tmp_path)
        with pytest.raises(CheckpointError) as error:
            describe(folder)
        assert name in one_line_and_hint(error)


@pytest.mark.parametrize("raw", [True, False], ids=["speculators", "z-lab"])
def test_speculators_drafts_read_the_targets_table_as_it_lies(raw: bool) -> None:
    """Gemma scales its embedding, and speculators trains on the rows before that."""
    target = tiny_target("gemma3")
    shape = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    draft = DFlashDraftModel(DraftConfig(**{**NETWORK, **shape, "raw_tables": raw}))
    tokens = torch.tensor([3, 9], dtype=torch.int64)
    embedded = PackedDraft(draft, target).embed(tokens)
    assert torch.equal(embedded, target.embedding_rows(tokens).to(embedded)) == raw
    assert torch.equal(embedded, target.embed(tokens)) != raw


def test_tensors_keep_their_bits_through_renaming(tmp_path: Path) -> None:
    early = READ_ROWS["DSpark of SpecForge, early names"]
    plain = READ_ROWS["DSpark of SpecForge"]
    held: dict[str, Tensor] = read_draft(save(early, tmp_path / "early"))[1]
    assert same_bits(held, read_draft(save(plain, tmp_path / "plain"))[1])
    assert same_bits(held, tensors_of(tmp_path / "plain" / "model.safetensors"))


def test_mask_token_by_name_is_told_what_to_do(tmp_path: Path) -> None:
    row = Published(nested(mask_token="<|MASK|>", mask_token_id=None), V1)
    with pytest.raises(CheckpointError) as error:
        read_draft(save(row, tmp_path))
    assert "names its mask token '<|MASK|>', but not its id" in one_line_and_hint(error)
