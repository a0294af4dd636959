"""The README tells the truth: its Python runs, its commands exist, its file tree is the package's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from flashdraft.cli import main
from flashdraft.cli.table import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.real_model
@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_there_are_blocks_to_check() -> None:
    assert blocks("python")
    assert len(blocks("sh")) >= 2


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if "flashdraft " in line]
)
def test_commands_and_their_options_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)
    words = words[words.index("flashdraft") + 1 :]
    assert words[0] in COMMANDS
    assert main([words[0], "--help"]) == 0
    text = capsys.readouterr().out
    for word in words[1:]:
        if word.startswith("--"):
            assert word.split("=")[0] in text


@pytest.mark.parametrize("line", [line for line in README.splitlines() if line.startswith("make ")])
def test_make_targets_exist(line: str) -> None:
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_file_tree_names_every_module() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    for path in (ROOT / "flashdraft").iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert path.name in tree, f"{path.name} is missing from the README's file tree"
        if path.is_dir() and path.name != "__pycache__":
            assert f"{path.name}/" in tree, f"{path.name}/ is missing from the README's file tree"
