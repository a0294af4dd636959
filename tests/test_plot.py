"""Pictures and a report: complete, made from the file alone, and without anything from outside."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flashdraft.bench import plot
from flashdraft.bench.report import COLUMNS, read_results, summarise
from flashdraft.cli import main

METHODS = {"autoregressive": 1.0, "dflash:int8": 2.5, "prompt_lookup": 1.4, "other engine": None}
HEADER = {
    "command": "flashdraft bench --out <a&b>",
    "device": "a machine",
    "threads": 2,
    "kernel": {"auto": "none"},
}
HEADER |= {
    "versions": {"x": "1"},
    "commit": "abc",
    "config": {"target": "tiny", "max_new_tokens": 24},
}


def results(path: Path, *, rows: tuple[int, ...] = (1, 8), ours: bool = True) -> Path:
    lines: list[dict[str, Any]] = [{"header": HEADER}]
    for task in ("gsm8k", "spec_bench/qa"):
        for batch in rows:
            for method, tau in METHODS.items():
                line = {
                    "task": task,
                    "prompt": len(task),
                    "method": method,
                    "repeat": 0,
                    "identical": tau is not None or None,
                }
                rate = 9.0 * (tau or 1)
                line |= {
                    "temperature": 0.0,
                    "max_rows": batch,
                    "threads": 2,
                    "tau": tau or 1.0,
                    "tokens_per_second": rate,
                }
                line |= {
                    "decode_tokens_per_second": rate / 0.9,
                    "batch_tokens_per_second": batch * rate,
                }
                if ours and tau:
                    parts = {"prefill": 9.0, "draft": 0.1 * tau, "target": 1.0, "host": 0.3}
                    steps = [3, 1, 2, 4] if tau > 1 else [1] * 4
                    line |= {
                        "parts": parts,
                        "target_passes": 4,
                        "accepted_lengths": steps,
                        "time_to_first_token": 0.02,
                    }
                lines.append(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_report_is_whole_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    made = plot.draw(
        [
            results(tmp_path / "first.jsonl"),
            results(tmp_path / "second.jsonl", rows=(1,), ours=False),
        ],
        tmp_path / "out",
    )
    names = ["speedup", "tau", "acceptance", "batch", "step"]
    pictures = [f"first-{name}.svg" for name in names] + [
        "second-speedup.svg",
        "second-tau.svg",
    ]  # what it has figures for
    assert [path.name for path in made] == [*pictures, "report.md", "report.html"]
    for name in pictures:
        assert ET.parse(tmp_path / "out" / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    html = (tmp_path / "out/report.html").read_text()
    page = Page()
    page.feed(html)
    count = Counter(tag for tag, _ in page.tags)
    assert (count["svg"], count["table"], count["th"]) == (len(pictures), 3, 3 * len(COLUMNS))
    assert not {"script", "link", "img", "iframe", "object"} & set(count)
    links = [
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert links
    assert all(value and value.startswith("#") for value in links)
    assert not re.search(r"url\((?!#)|@import", html)
    assert "flashdraft bench --out &lt;a&amp;b&gt;" in html
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {value[1:] for value in links if value} <= ids  # every reference has its mark


def test_markdown_has_the_same_cells_as_the_table(tmp_path: Path) -> None:
    path = results(tmp_path / "first.jsonl", rows=(1,))
    plot.draw([path], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == COLUMNS
    assert rows[2:] == [row.cells for row in summarise(read_results(path)[1])]
    dflash = rows[2 + 1]
    assert dflash == [
        "gsm8k",
        "dflash:int8",
        "1",
        "22.5",
        "2.50",
        "25.0",
        "2.50",
        "2.50",
        "100%",
        "20",
    ]
    assert "### T = 0, batch 1, threads 2" in text
    assert set(re.findall(r"\]\((.+?)\)", text)) == {
        path.name for path in (tmp_path / "out").glob("*.svg")
    }


def drawn(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that go into the pictures, by title."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(
        plot, "_svg", lambda panels, labels, *_: found.update({labels[0]: panels}) or "<svg/>"
    )
    plot.draw([path], path.parent / "out")
    return found


def test_pictures_show_the_figures_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = drawn(results(tmp_path / "first.jsonl"), monkeypatch)
    speedup, tau, acceptance, batch, step = found.values()
    setting = "T = 0, batch 8, threads 2"
    assert speedup[f"gsm8k\n{setting}"]["dflash:int8"] == {"": 2.5}
    assert [name.split("\n")[0] for name in speedup] == ["gsm8k", "spec_bench/qa", "all"] * 2
    assert tau[f"all\n{setting}"]["prompt_lookup"] == {"": pytest.approx(1.4)}
    assert acceptance[setting] == {
        name: {1: 0.75, 2: 0.5, 3: 0.25} for name in ("dflash:int8", "prompt_lookup")
    }
    assert batch == {
        "T = 0, threads 2": {
            name: {1: 9.0 * (x or 1), 8: 72.0 * (x or 1)} for name, x in METHODS.items()
        }
    }
    assert step[setting]["dflash:int8"] == pytest.approx(
        {"draft": 62.5, "target": 250.0, "host": 75.0}
    )
    assert "other engine" not in step[setting]


def test_the_same_figures_make_the_same_picture() -> None:
    first, same, other = (
        plot._svg({"T = 0": {"dflash": {1: x, 2: 0.25}}}, ["Shares", "x", "y"], "toy")
        for x in (0.5, 0.5, 0.6)
    )
    assert first == same != other


def test_a_method_keeps_its_colour_and_a_kernel_is_a_tint_of_it() -> None:
    assert plot._colour("dflash") == plot._colour("dflash:float32") != plot._colour("dflash:int8")
    assert plot._colour("llama.cpp q8_0") == plot._colour("llama.cpp q8_0")
    known = json.loads((Path(plot.__file__).parents[1] / "assets/plot.json").read_text())["colours"]
    others = ("draft", "target", "host", "off", "on", "auto", "none")
    methods = {name: colour for name, colour in known.items() if name not in others}
    assert len(set(methods.values())) == len(methods)


def test_without_matplotlib_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "flashdraft.bench.plot")
    assert (
        main(["plot", str(results(tmp_path / "first.jsonl")), "--out", str(tmp_path / "out")]) == 1
    )
    assert "flashdraft[plot]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_draws_and_names_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = results(tmp_path / "first.jsonl", rows=(1,), ours=False), tmp_path / "deep/out"
    assert main(["plot", str(path), "--out", str(out)]) == 0
    assert {*capsys.readouterr().out.split()} == {
        str(made) for made in out.iterdir() if made.name != "report.run.json"
    }
