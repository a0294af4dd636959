"""The scripts of examples/ run as they stand, on the built-in model, with few tokens."""

from __future__ import annotations

import functools
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import flashdraft

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
Run = Callable[..., str]


def name_of(path: Path) -> str:
    return path.name


@pytest.fixture(scope="module")
def load_once() -> Iterator[None]:
    """A model of the same options is loaded once for all scripts."""
    plain = flashdraft.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashdraft, "load", functools.cache(plain), raising=False)
        yield


@pytest.fixture
def run(
    load_once: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a script with these arguments; returns what it printed."""

    def script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_there_are_six_and_all_are_run_here() -> None:
    own = Path(__file__).read_text(encoding="utf-8")
    assert len(SCRIPTS) == 6
    for path in SCRIPTS:
        assert f'run("{path.name}"' in own


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_an_example_fits_on_a_screen_and_says_how_to_call_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert any(line.startswith(f"python examples/{path.name}") for line in lines)


@pytest.mark.real_model
def test_generate_streams_the_same_text_with_its_drafts_marked(run: Run) -> None:
    printed = run("generate.py", "Count from one to five.", "--max-new-tokens", "12")
    whole, _, streamed = printed.partition("\n-> 12 tokens in")
    marked = streamed.split("\n\n", 1)[1].split("\n-> tau")[0]
    assert "[" in marked
    assert marked.replace("[", "").replace("]", "") == whole


@pytest.mark.real_model
def test_a_sampled_tree_writes_the_plain_text(run: Run) -> None:
    printed = run("sampled_tree.py", "Name a colour.", "--max-new-tokens", "6")
    taus = re.findall(r"the same (\d+) tokens, tau ([\d.]+)", printed)
    assert len(taus) == 4
    assert all(float(tau) >= 1 for _, tau in taus)


@pytest.mark.real_model
def test_a_chat_remembers_and_a_batch_answers_in_order(run: Run) -> None:
    printed = run("chat.py", "Name a fruit.", "Name another.", "--max-new-tokens", "6")
    assert printed.index("> Name a fruit.") < printed.index("> Name another.")
    lengths = [
        int(length) for length in re.findall(r"^ *(\d+) prompt tokens -> ", printed, re.MULTILINE)
    ]
    assert len(lengths) == 3
    assert lengths[2] > lengths[1]


@pytest.mark.real_model
def test_a_record_keeps_to_its_schema_in_fewer_passes_than_tokens(run: Run) -> None:
    printed = run("structured.py", "Tom Hill, 51, lives in Leeds and is single.")
    record, cost = printed.splitlines()
    assert list(json.loads(record)) == ["name", "age", "city", "is_married"]
    (counts,) = re.findall(r"^(\d+) tokens in (\d+) passes", cost)
    assert int(counts[1]) < int(counts[0]) / 2


@pytest.mark.real_model
def test_a_benchmark_of_own_prompts_compares_texts(run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Name a colour.\n", encoding="utf-8")
    out = tmp_path / "results.jsonl"
    printed = run("benchmark.py", str(prompts), "--out", str(out), "--max-new-tokens", "6")
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()[1:]]
    assert {line["method"] for line in lines} == {"autoregressive", "dflash", "prompt_lookup"}
    assert all(line["identical"] for line in lines)
    assert "dflash" in printed


@pytest.mark.real_model
def test_a_drafter_learns_a_handful_of_answers(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    printed = run("train_drafter.py", "--out", str(out), "--steps", "8", "--max-new-tokens", "12")
    (tau,) = re.findall(r"^tau ([\d.]+) on 3 prompts", printed, re.MULTILINE)
    assert float(tau) > 1
    assert (out / "best" / "model.safetensors").is_file()
