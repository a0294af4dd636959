"""Writing a drafter's folder: the public format, every bit of it, and each file whole or not at
all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_drafts import KEPT, config, reduced, same_bits, tensors_of
from toy_folders import ZLAB, save_zlab, zlab_tensors
from toy_training import one_line_and_hint

from flashdraft import DFlashDraftModel, files
from flashdraft.errors import CheckpointError
from flashdraft.files import write_file
from flashdraft.formats import write
from flashdraft.formats.read import read_draft
from flashdraft.formats.write import write_draft
from flashdraft.formats.written import config_of, json_of

# The keys of the public format that a reader may ask for.
PUBLIC_KEYS = (
    "architectures",
    "model_type",
    "block_size",
    "dflash_config",
    "num_target_layers",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "layer_types",
    "sliding_window",
    "attention_bias",
    "tie_word_embeddings",
    "vocab_size",
    "dtype",
)


def test_saved_folder_is_the_public_format(tmp_path: Path) -> None:
    save_zlab(tmp_path / "theirs")
    DFlashDraftModel.from_pretrained(tmp_path / "theirs").save_pretrained(
        tmp_path / "ours", readme="# A drafter\n"
    )
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    ours = tensors_of(tmp_path / "ours" / "model.safetensors")
    assert len(ours) == 11 * 2 + 3
    assert same_bits(ours, zlab_tensors())
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {key: written.get(key, "absent") for key in PUBLIC_KEYS} == {
        key: ZLAB[key] for key in PUBLIC_KEYS
    }
    assert written["hidden_act"] == "silu"
    assert read_draft(tmp_path / "ours")[0] == read_draft(tmp_path / "theirs")[0]


def test_round_trip_check_sees_one_changed_bit(tmp_path: Path) -> None:
    tensors = zlab_tensors()
    bits = tensors["layers.1.mlp.up_proj.weight"].view(torch.int16)
    bits[0, 0] ^= 1
    assert not same_bits(tensors, zlab_tensors())


@pytest.mark.parametrize("num_layers", [1, 5])
def test_saved_folder_holds_eleven_tensors_a_layer_and_three(
    tmp_path: Path, num_layers: int
) -> None:
    shape = config(num_hidden_layers=num_layers, layer_types=["full_attention"] * num_layers)
    save_zlab(tmp_path / "theirs", config=shape, tensors=zlab_tensors(num_layers=num_layers))
    DFlashDraftModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert len(tensors_of(tmp_path / "ours" / "model.safetensors")) == 11 * num_layers + 3


def test_saved_files_can_be_read_by_others(tmp_path: Path) -> None:
    write_draft(tmp_path, config_of(ZLAB, "here"), zlab_tensors(), readme="")
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == dict.fromkeys(
        ("README.md", "config.json", "model.safetensors"), "0o644"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {
            "rope_theta": ...,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        },
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 8,
            "use_sliding_window": True,
        },
        {"attention_bias": True},
        {"draft_vocab_size": 5},
        {"num_key_value_heads": ..., "head_dim": ...},
        {"is_causal": False},
        {"output_multiplier": 0.5, "input_embedding_scale": 2.0, "final_logit_softcapping": 30.0},
        {"dflash_config": {**ZLAB["dflash_config"], "use_swa": True, "swa_window_size": 8}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_config_survives_a_round_trip(changes: dict[str, Any]) -> None:
    first = config_of(config(**changes), "here")
    assert config_of(json.loads(json.dumps(json_of(first))), "here") == first
    assert first != config_of(ZLAB, "here")


def test_rotary_scaling_is_applied(tmp_path: Path) -> None:
    save_zlab(tmp_path / "plain")
    save_zlab(
        tmp_path / "scaled", config=config(rope_scaling={"rope_type": "linear", "factor": 2.0})
    )
    plain, scaled = (
        DFlashDraftModel.from_pretrained(tmp_path / name) for name in ("plain", "scaled")
    )
    torch.testing.assert_close(scaled.cos[2::2], plain.cos[1:128])
    assert not torch.allclose(scaled.cos, plain.cos)


def test_reduced_vocabulary_survives_saving(tmp_path: Path) -> None:
    save_zlab(
        tmp_path / "theirs", config=config(draft_vocab_size=5), tensors=reduced(own_head=True)
    )
    DFlashDraftModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert same_bits(tensors_of(tmp_path / "ours" / "model.safetensors"), reduced(own_head=True))


def test_reduced_model_is_saved_with_its_vocabulary_or_without_it(tmp_path: Path) -> None:
    model = DFlashDraftModel.from_pretrained(save_zlab(tmp_path / "theirs"))
    model.reduce_vocabulary(torch.tensor(KEPT))
    model.save_pretrained(tmp_path / "reduced")
    assert same_bits(
        tensors_of(tmp_path / "reduced" / "model.safetensors"), reduced(own_head=False)
    )
    assert read_draft(tmp_path / "reduced")[0].draft_vocab_size == len(KEPT)
    model.save_pretrained(tmp_path / "plain", plain=True)
    assert same_bits(tensors_of(tmp_path / "plain" / "model.safetensors"), zlab_tensors())
    assert read_draft(tmp_path / "plain")[0] == read_draft(tmp_path / "theirs")[0]


# Each file appears whole or not at all.


class Unplugged(Exception):
    """The machine stops here."""


def unplug(*_: Any, **__: Any) -> None:
    raise Unplugged


def half_save(tensors: dict[str, Tensor], path: Any, metadata: Any = None) -> None:
    Path(path).write_bytes(b"half a file")
    raise Unplugged


def naive_write_file(path: Path, content: bytes) -> None:
    """The planted fault: write in place."""
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        os.fsync(file.fileno())
        file.write(content[len(content) // 2 :])


def survives_a_stop(
    write: Callable[[Path, bytes], None], path: Path, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether a file and its folder are as they were after a stop at any of a writer's system
    calls, and new without one.

    A writer that does not make one of the calls fails, too: it cannot be safe.
    """
    for call in ("replace", "fsync"):
        path.write_bytes(b"the old content")
        with monkeypatch.context() as patch:
            patch.setattr(os, call, unplug)
            with suppress(Unplugged):
                write(path, b"the new content")
        if path.read_bytes() != b"the old content" or list(path.parent.iterdir()) != [path]:
            return False
    write(path, b"the new content")
    return path.read_bytes() == b"the new content" and list(path.parent.iterdir()) == [path]


def test_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert survives_a_stop(write_file, tmp_path / "file", monkeypatch)


@pytest.mark.parametrize(
    "wrong", [naive_write_file, lambda path, content: path.write_bytes(content)]
)
def test_writing_in_place_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Path, bytes], None]
) -> None:
    assert not survives_a_stop(wrong, tmp_path / "file", monkeypatch)


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
@pytest.mark.parametrize("existing", [False, True], ids=["new-folder", "folder-with-a-drafter"])
def test_stopped_save_leaves_the_old_drafter_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, existing: bool
) -> None:
    shape, folder = config_of(ZLAB, "here"), tmp_path / "draft"
    if existing:
        write_draft(folder, shape, zlab_tensors(seed=1))
    before = {p.name: p.read_bytes() for p in folder.glob("*")}
    with monkeypatch.context() as patch:
        if where == "save_file":
            patch.setattr(files, "save_file", half_save)
        else:
            patch.setattr(os, where, unplug)
        with pytest.raises(Unplugged):
            write_draft(folder, shape, zlab_tensors(seed=2))
    assert {p.name: p.read_bytes() for p in folder.glob("*")} == before
    write_draft(folder, shape, zlab_tensors(seed=2))
    assert same_bits(read_draft(folder)[1], zlab_tensors(seed=2))


def test_new_folder_without_its_last_file_is_no_drafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(write, "write_file", unplug)
        with pytest.raises(Unplugged):
            write_draft(tmp_path, config_of(ZLAB, "here"), zlab_tensors())
    with pytest.raises(CheckpointError) as error:
        read_draft(tmp_path)
    assert "no config.json" in one_line_and_hint(error)
