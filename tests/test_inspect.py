"""`flashdraft inspect`: one screen that says what a folder is, what it fits, and who runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import save_file
from toy_folders import NUM_TARGET_LAYERS, save_target, save_zlab
from toy_published import READ_ROWS, save
from toy_refused import OTHERS

from flashdraft.cli import main
from flashdraft.export.run import ENGINES
from flashdraft.formats.recognise import PUBLISHERS, TITLES

ROOM = 40  # lines of a screen


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["inspect", *words]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", READ_ROWS)
def test_a_folder_of_every_format_is_told_on_one_screen(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = READ_ROWS[name]
    lines = lines_of(capsys, str(save(row, tmp_path / "draft")))
    assert len(lines) <= ROOM
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert row.name in text
    assert row.layout in text
    for engine in ENGINES:
        assert re.search(rf"\b{engine}(, \w+)*: (yes|no)", " ".join(text.split()))


def test_a_target_is_named_where_it_fits_and_where_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = str(save_zlab(tmp_path / "draft"))
    target = str(save_target(tmp_path / "target"))
    text = " ".join(" ".join(lines_of(capsys, draft, "--target", target)).split())
    assert f"fits `{target}`: {NUM_TARGET_LAYERS} layers" in text

    text = " ".join(" ".join(lines_of(capsys, draft, "--target", "smollm2-135m")).split())
    assert "fits not `smollm2-135m`" in text
    assert "hidden size" in text


@pytest.mark.parametrize("method", ["dflash", "eagle3", "medusa", "draft_model"])
def test_what_is_shipped_is_told_by_its_name(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join(lines_of(capsys, method))
    assert f"{TITLES[method]} (FlashDraft)" in text
    assert "FlashDraft: yes" in text
    assert " 1 drafts" not in text


def test_what_is_not_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = OTHERS["LiLiCorr"] if "LiLiCorr" in OTHERS else next(iter(OTHERS.values()))
    (tmp_path / "config.json").write_text(json.dumps(row.config))
    save_file(row.tensors, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert row.said in error
    assert hint.startswith("hint: ")


def test_a_language_model_is_told_from_a_drafter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = save_target(tmp_path)
    capsys.readouterr()
    assert main(["inspect", str(target)]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert "is no drafter but a language model: LlamaForCausalLM, model_type llama" in error
    assert "--target" in hint


def test_a_drafter_in_the_targets_place_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = str(save_zlab(tmp_path / "draft"))
    other = str(save_zlab(tmp_path / "other"))
    assert main(["inspect", draft, "--target", other]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert f"`{other}` is a drafter, not a target" in error
    assert "language model" in hint


def test_every_kind_has_its_publishers() -> None:
    assert PUBLISHERS.keys() == TITLES.keys()
    found: dict[str, set[str]] = {}
    for row in READ_ROWS.values():
        title, publisher = row.name.removesuffix(")").split(" (")
        found.setdefault(title, set()).add(publisher)
    for kind in ("dflash", "dflash2", "dspark", "domino"):
        assert found[TITLES[kind]] | {"FlashDraft"} == {*PUBLISHERS[kind], "FlashDraft"}
