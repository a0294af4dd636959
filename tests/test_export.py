"""Drafters as other engines read them: keys, tensors and commands, each folder whole or not at
all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_drafts import same_bits, tensors_of
from toy_folders import save_zlab, zlab_tensors

from flashdraft.cli import main


def exported(draft: Path, engine: str, out: Path, *more: str) -> int:
    return main(["export", str(draft), "--to", engine, "--out", str(out), *more])


def test_zlab_folder_holds_its_own_tensors_only(tmp_path: Path) -> None:
    assert exported(save_zlab(tmp_path / "draft"), "zlab", tmp_path / "out") == 0
    assert same_bits(tensors_of(tmp_path / "out" / "model.safetensors"), zlab_tensors())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "flashdraft_config" not in config


def test_own_export_is_replaced_and_a_foreign_file_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft, out = save_zlab(tmp_path / "draft"), tmp_path / "out"
    assert exported(draft, "zlab", out) == 0
    assert exported(draft, "zlab", out) == 0
    (out / "notes.txt").write_text("mine")
    assert exported(draft, "zlab", out) == 1
    assert "notes.txt" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"
