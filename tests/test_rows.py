"""Files as people have them: encodings, line ends, endings, compression, forms of JSON; and what is
no rows of JSON, by name.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from flashdraft.bench.tasks import read_prompts
from flashdraft.errors import DataError
from flashdraft.train.prompts import write_prompts
from flashdraft.train.rows import LeftOut, json_list, placed_rows, read_jsonl

ROWS = [{"prompt": "a"}, {"prompt": "é\u2028b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
PRETTY = json.dumps(ROWS, indent=2, ensure_ascii=False)

FILES: dict[str, bytes] = {
    "plain.jsonl": LINES.encode(),
    "escaped.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "no-last-line-end.jsonl": LINES.rstrip().encode(),
    "blank-lines.jsonl": ("\n" + LINES.replace("\n", "\n \n")).encode(),
    "windows.jsonl": LINES.replace("\n", "\r\n").encode(),
    "old-mac.jsonl": LINES.replace("\n", "\r").encode(),
    "return-between.jsonl": LINES.replace('":', '":\r').encode(),
    "mark.jsonl": LINES.encode("utf-8-sig"),
    "joined-marks.jsonl": b"".join((json.dumps(row) + "\n").encode("utf-8-sig") for row in ROWS),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16-windows.jsonl": LINES.replace("\n", "\r\n").encode("utf-16"),
    "utf16-big.jsonl": LINES.encode("utf-16-be"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "list.json": json.dumps(ROWS).encode(),
    "pretty.json": PRETTY.encode(),
    "pretty-windows.json": PRETTY.replace("\n", "\r\n").encode("utf-8-sig"),
    "pretty-utf16.json": PRETTY.encode("utf-16"),
    "list.jsonl": json.dumps(ROWS).encode(),
    "pretty.jsonl": PRETTY.encode(),
    "lines.json": LINES.encode(),
    "pretty-objects.jsonl": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "held.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "held-pretty.jsonl": json.dumps({"train": ROWS}, indent=2).encode(),
    "other.ndjson": LINES.encode(),
    "other.txt": LINES.encode(),
    "other.jl": LINES.encode(),
    "no-ending": LINES.encode(),
    "two.endings.jsonl.bak": LINES.encode(),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "packed.json.gz": gzip.compress(PRETTY.encode()),
    "packed.ndjson.gz": gzip.compress(LINES.encode("utf-8-sig")),
    "packed-by-content.jsonl": gzip.compress(LINES.encode()),
    "unpacked-by-a-browser.jsonl.gz": LINES.encode(),
    "packed.jsonl.bz2": bz2.compress(LINES.encode()),
    "packed.jsonl.xz": lzma.compress(LINES.encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_of_every_file_are_read_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert list(read_jsonl(path)) == json_list(path) == ROWS
    assert write_prompts(None, tmp_path / "out", files=[str(path)]) == 2
    assert {row["prompt"] for row in read_jsonl(tmp_path / "out")} == {
        row["prompt"] for row in ROWS
    }
    assert [prompt.text for prompt in read_prompts(path)] == [row["prompt"] for row in ROWS]


OTHERS: dict[str, tuple[bytes, str, str]] = {
    "set.parquet": (b"PAR1\x15\x04", "is a table", "read_parquet('set.parquet')"),
    "parquet-by-content.jsonl": (
        b"PAR1\x15\x04",
        "is a Parquet file",
        "read_parquet('parquet-by-content.jsonl')",
    ),
    "set.csv": (b"prompt,answer\na,b\n", "is a table", "read_csv('set.csv')"),
    "set.tsv": (b"prompt\tanswer\na\tb\n", "is a table", "read_table('set.tsv')"),
    "set.jsonl.zst": (
        b"\x28\xb5\x2f\xfd\x04",
        "compressed by Zstandard",
        "zstd -d 'set.jsonl.zst'",
    ),
    "set.zip": (b"PK\x03\x04\x14", "a zip archive", "unpack it"),
    "pointer.jsonl": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "Git LFS",
        "git lfs pull",
    ),
    "page.jsonl": (b"<!DOCTYPE html>\n<html>", "a web page", "fetch the file itself"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 50)[:-9], "cannot be read", "fetch it again"),
    "junk.jsonl.gz": (b"junk", "cannot be read", "fetch it again"),
    "cut.json": (PRETTY[:-3].encode(), "not valid JSON", "mend it"),
    "several.json": (
        json.dumps({"train": ROWS, "test": ROWS}).encode(),
        "several lists: train, test",
        "save the one",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_file_of_another_format_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    content, what, to_do = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        write_prompts(None, tmp_path / "out", files=[str(tmp_path / name)])
    message, hint = str(error.value).split("\n")
    assert what in message
    assert to_do in hint
    assert [path.name for path in tmp_path.iterdir()] == [name]


BROKEN: dict[str, tuple[bytes, str]] = {
    "half": (b'{"prompt": "x', "not valid JSON"),
    "latin": (b'{"prompt": "\xe9"}', "not UTF-8"),
    "twice": (b'{"prompt": "x", "prompt": "y"}', "`prompt` is there twice"),
    "deep": (b'{"prompt": ' + b"[" * 200_000, "nested too deep"),
    "list": (b"[1]", "not a JSON object"),
    "number": (b"3", "not a JSON object"),
    "python": (b"{'prompt': 'x'}", "not valid JSON"),
    "zeros": (b"\0\0\0\0", "not valid JSON"),
    "digits": (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "no-key": (b'{"question": "x"}', "no field `prompt`"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_line_that_cannot_be_read_is_named_and_stops_no_other(tmp_path: Path, name: str) -> None:
    line, cause = BROKEN[name]
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b"}\n')
    left_out = LeftOut("row")
    assert [row["prompt"] for _, row in placed_rows(path, ["prompt"], left_out)] == ["a", "b"]
    assert str(left_out).startswith(f"1 row left out: {path}, line 3: ")
    assert cause in str(left_out)
    with pytest.raises(DataError, match="line 3: "):
        list(read_jsonl(path, ["prompt"]))


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "list"])
def test_broken_first_line_stops_no_other(tmp_path: Path, name: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(BROKEN[name][0] + b'\n{"prompt": "a"}\n{"prompt": "b"}\n')
    left_out = LeftOut("row")
    assert [row["prompt"] for _, row in placed_rows(path, ["prompt"], left_out)] == ["a", "b"]
    assert left_out.count == 1


def test_numbers_that_are_none_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a", "score": NaN, "best": -Infinity}\n')
    assert write_prompts(None, tmp_path / "out.jsonl", files=[str(path)]) == 1


def test_rows_of_one_conversation_are_no_set_of_rows(tmp_path: Path) -> None:
    """One row on one line holds a list of objects, too."""
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
    for text in (json.dumps(row), json.dumps(row, indent=2)):
        (tmp_path / "one.json").write_text(text)
        assert list(read_jsonl(tmp_path / "one.json")) == [row]


def test_only_three_are_shown_and_long_causes_are_cut() -> None:
    left_out = LeftOut("prompt")
    assert left_out.count == 0
    for number in range(5):
        left_out.add(f"line {number}", ValueError("x\ny" * 500))
    assert str(left_out).startswith("5 prompts left out: line 0: x y")
    assert str(left_out).endswith("; ...")
    assert str(left_out).count("line ") == 3
    assert len(str(left_out)) < 700
