"""The README is short and tells the truth; its blocks, links and lines are checked with the pages
of docs/ (test_docs.py).
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = re.search(r"^\|.*to llama\.cpp F32.*\n\|.*\n((?:\|.*\n)+)", README, re.MULTILINE)


def test_it_is_read_in_a_minute() -> None:
    assert len(README.splitlines()) <= 150


def test_it_shows_the_demo_and_one_chart() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 2
    assert pictures[0] == "docs/demo.svg"


def test_the_two_commands_come_first() -> None:
    (first, *_) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]


def test_its_example_has_ten_lines() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 12


def test_its_speeds_are_measured_ones() -> None:
    """Every row of the small table is a row of the long one, which has its tasks, too."""
    measured = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    assert TABLE is not None
    rows = [line for line in TABLE[1].splitlines() if "llama.cpp" not in line]
    assert len(rows) == 6
    for row in rows:
        name, speed, *ratios = [cell.strip() for cell in row.strip("|").split("|")]
        method, kernel = re.match(r"(\w+), `(\w+)`", name).groups()  # type: ignore[union-attr]
        (line,) = re.findall(
            rf"^\| {method}, `{kernel}`(?: \(.*?\))? \|(.*)$", measured, re.MULTILINE
        )[:1]
        cells = [cell.strip() for cell in line.split("|")]
        assert speed == cells[1]
        assert ratios == cells[3:6]


def test_the_targets_that_it_names_are_those_that_the_tests_know() -> None:
    from conftest import FAMILIES

    table = README.split("## What works with what")[1].split("## ")[0]
    for family in FAMILIES:
        assert family.split("-")[0] in table


def test_no_line_is_longer_than_an_editor_shows() -> None:
    for line in README.splitlines():
        assert len(line) <= 120 or line.startswith("|")


def test_its_tables_are_those_of_the_code() -> None:
    works_with = runpy.run_path(str(ROOT / "recipes" / "works_with.py"))
    for page in ("README.md", "docs/formats.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert works_with["with_tables"](page, text) == text, "run python recipes/works_with.py"
