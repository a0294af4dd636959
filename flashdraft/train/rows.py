"""The rows of a file, whatever its ending says: JSON Lines, a JSON list, a dictionary that holds one; plain or compressed.

Knows encodings, compression and which formats are none of these. Does not know what a row means. What cannot be read is
refused by name, or left out, counted and named.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from flashdraft.errors import DataError, FlashDraftError
from flashdraft.files import say
from flashdraft.train.questions import CONVERSATIONS, QUESTIONS

__all__ = ["LeftOut", "is_whole", "json_list", "placed_rows", "read_jsonl"]

Names = Collection[str]

_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_TO_JSON = "convert it: python -c \"import pandas; pandas.read_{}('{}').to_json('rows.jsonl', orient='records', lines=True)\""
_OTHERS = {  # how a file of another format begins -> what it is, what to do
    b"PAR1": ("a Parquet file", _TO_JSON.replace("{}", "parquet", 1)),
    b"ARROW1": ("an Arrow file", _TO_JSON.replace("{}", "feather", 1)),
    b"\x28\xb5\x2f\xfd": ("compressed by Zstandard", "unpack it: zstd -d '{}'"),
    b"PK\x03\x04": ("a zip archive", "unpack it, and name the file in it"),
    b"version https://git-lfs": (
        "a pointer of Git LFS, not the file itself",
        "fetch the file: git lfs pull",
    ),
    b"<!doctype html": ("a web page", "fetch the file itself, not the page that shows it"),
    b"<html": ("a web page", "fetch the file itself, not the page that shows it"),
}
_TABLES = {".csv": "csv", ".tsv": "table", ".xlsx": "excel", ".parquet": "parquet"}
_UNREADABLE = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)
_SHOWN = 3


class LeftOut:
    """What could not be used: how many, and the first ones with their places and causes."""

    def __init__(self, what: str) -> None:
        self.what, self.count = what, 0
        self.hint: str | None = None  # what to do about the first one, where its cause says so
        self._shown: list[str] = []

    def add(self, place: str, cause: str | Exception) -> None:
        self.count += 1
        if len(self._shown) == _SHOWN:
            return
        if isinstance(cause, FlashDraftError):
            self.hint = self.hint or cause.hint
            cause = str(cause.args[0])
        self._shown.append(f"{place}: {' '.join(str(cause).split()):.200}")

    def join(self, other: "LeftOut") -> None:
        """Count what `other` counted."""
        self.count += other.count
        self._shown = (self._shown + other._shown)[:_SHOWN]

    def __str__(self) -> str:
        counted = f"{self.count} {self.what}{'s' * (self.count != 1)} left out"
        more = ["..."] if self.count > len(self._shown) else []
        return f"{counted}: {'; '.join(self._shown + more)}"

    def tell(self) -> None:
        """Say it on standard error, where there is one."""
        if self.count:
            say(str(self))


class _Broken(NamedTuple):
    """In the place of a row: why it cannot be read."""

    cause: str


Placed = tuple[str, Any]  # a row and its place, `line 3` or `entry 3`


def read_jsonl(
    path: Path, keys: Names = (), left_out: LeftOut | None = None
) -> Iterator[dict[str, Any]]:
    """The objects of a file, mostly JSON Lines.

    One that cannot be read, or lacks one of `keys`, is `left_out`; without that, DataError names it.
    """
    return (row for _, row in placed_rows(path, keys, left_out))


def placed_rows(
    path: Path, keys: Names = (), left_out: LeftOut | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same, each with its place, as messages name it."""
    for place, row in _rows(path):
        cause = _what_is_wrong(row, keys)
        if not cause:
            yield f"{path}, {place}", row
        elif left_out is not None:
            left_out.add(f"{path}, {place}", cause)
        else:
            raise DataError(
                f"{path}, {place}: {cause}", hint=f"mend or remove that {place.split()[0]}"
            )


def is_whole(text: str) -> bool:
    """Whether a text can be written: one with half a character cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_list(path: Path) -> list[Any]:
    """The rows of a file, objects or not. Raises DataError for one that is no JSON."""
    rows = []
    for place, row in _rows(path):
        if isinstance(row, _Broken):
            raise DataError(f"{path}, {place}: {row.cause}", hint="mend it, or fetch it again")
        rows.append(row)
    return rows


def _what_is_wrong(row: Any, keys: Names) -> str:
    if isinstance(row, _Broken):
        return row.cause
    if not isinstance(row, dict):
        return "not a JSON object"
    missing = [key for key in keys if key not in row]
    return f"no field `{missing[0]}`" if missing else ""


def _rows(path: Path) -> Iterator[Placed]:
    """What the file holds, row by row; _Broken where one cannot be read. Raises DataError for a file of another format."""
    try:
        with path.open("rb") as raw:
            _check_format(path, raw)
            with _unpacked(raw) as file:
                yield from _told(path, _lines(file))
    except (FileNotFoundError, IsADirectoryError):
        hint = "name a .jsonl or .json file, or the folder of the training sets with --data or FLASHDRAFT_DATA"
        raise DataError(f"no file `{path}`", hint=hint) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not {error.encoding} ({error.reason})", hint="save it as UTF-8"
        ) from None
    except _UNREADABLE as error:
        raise DataError(f"`{path}` cannot be read: {error}", hint="fetch it again") from None


def _check_format(path: Path, file: BufferedReader) -> None:
    """Raises DataError for a format that holds no rows of JSON."""
    table = _TABLES.get(path.suffix.lower())
    if table:
        raise DataError(
            f"`{path}` is a table, not rows of JSON", hint=_TO_JSON.format(table, path.name)
        )

    head = file.peek(64)[:64]
    for start, (what, hint) in _OTHERS.items():
        if head.lower().startswith(start.lower()):
            raise DataError(f"`{path}` is {what}", hint=hint.format(path.name))
    is_packed = any(head.startswith(start) for start in _COMPRESSED)
    if path.suffix == ".gz" and head and not is_packed and head.lstrip()[:1] not in (b"{", b"["):
        raise DataError(f"`{path}` cannot be read: not a gzipped file", hint="fetch it again")


def _unpacked(file: BufferedReader) -> Any:
    """The same bytes, unpacked if they are compressed."""
    head = file.peek(64)[:64]
    for start, reader in _COMPRESSED.items():
        if head.startswith(start):
            return reader(file, "rb")
    return nullcontext(file)


def _lines(file: Any) -> Iterator[tuple[int, str | _Broken]]:
    """Its lines as text, from 1, without those that are blank."""
    first = file.readline()
    encoding = json.detect_encoding(first[:4]) if first[:4].strip(b"\0") else "utf-8"
    if not encoding.startswith("utf-8"):
        text = (first + file.read()).decode(encoding)
        yield from (
            (number, line.lstrip("\ufeff"))
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        )
        return

    line, number = first, 1
    while line:
        try:
            text = line.decode().lstrip("\ufeff")
            if text.strip():
                yield number, text.strip("\r\n")
        except UnicodeDecodeError as error:
            yield number, _Broken(f"not UTF-8 ({error.reason})")
        line, number = file.readline(), number + 1


def _told(path: Path, lines: Iterator[tuple[int, str | _Broken]]) -> Iterator[Placed]:
    """Rows of lines: one a line, or what all lines together tell."""
    start = next(lines, None)
    if start is None:
        return
    number, text = start
    value = _parsed(text)
    follow = next(lines, None)
    if follow is None:
        if isinstance(value, _Broken):
            _refuse_cut_list(path, text, value)
            yield from _parsed_line(number, text)
        elif isinstance(value, list) or _is_container(value):
            yield from _entries(path, value)
        else:
            yield f"line {number}", value
        return

    rest = [follow]
    if isinstance(value, _Broken) and isinstance(text, str) and text.lstrip()[:1] in ("[", "{"):
        rest += lines
        broken = [line for _, line in rest if isinstance(line, _Broken)]
        told = [text, *(line for _, line in rest if isinstance(line, str))]
        whole = broken[0] if broken else _whole("\n".join(told))
        if not isinstance(whole, _Broken):
            yield from _entries(path, whole)
            return
        _refuse_cut_list(path, text, whole)
    yield from _parsed_line(number, text)
    for each, line in rest:
        yield from _parsed_line(each, line)
    for each, line in lines:
        yield from _parsed_line(each, line)


def _refuse_cut_list(path: Path, text: str | _Broken, whole: _Broken) -> None:
    """A list that does not end is no lines of which some are broken."""
    if isinstance(text, str) and text.lstrip().startswith("["):
        raise DataError(f"{path}: {whole.cause}", hint="mend it, or fetch it again")


def _parsed_line(number: int, line: str | _Broken) -> Iterator[Placed]:
    """The row of a line, or those of one that old returns (\\r) divide."""
    value = _parsed(line)
    pieces = [piece for piece in line.split("\r") if piece.strip()] if isinstance(line, str) else []
    if isinstance(value, _Broken) and len(pieces) > 1:
        for count, piece in enumerate(pieces, number):
            yield f"line {count}", _parsed(piece)
        return
    yield f"line {number}", value


def _entries(path: Path, value: Any) -> Iterator[Placed]:
    """The rows of a JSON file as a whole."""
    if isinstance(value, dict) and _is_container(value):
        lists = _lists(value)
        if len(lists) > 1:
            raise DataError(
                f"{path} holds several lists: {', '.join(lists)}",
                hint="save the one that is meant as .jsonl",
            )
        value = value[lists[0]]
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        yield f"entry {number}", row


def _is_container(value: Any) -> bool:
    """Whether a dictionary holds rows, and is none itself."""
    if not isinstance(value, Mapping) or not _lists(value):
        return False
    return not any(name in value for name in (*CONVERSATIONS, *QUESTIONS) if name != "data")


def _lists(value: Mapping[str, Any]) -> list[str]:
    """Names of what in it is a list of objects."""
    return [
        name
        for name, rows in value.items()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    ]


def _whole(text: str) -> Any:
    """One JSON value, or a list of the objects that stand one behind the other; _Broken with the first one's cause."""
    whole = _parsed(text)
    if not isinstance(whole, _Broken):
        return whole

    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_once)
    found, at = [], 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            found.append(value)
            while at < len(text) and text[at].isspace():
                at += 1
    except (ValueError, RecursionError):
        return whole
    return found


def _parsed(line: str | _Broken) -> Any:
    if isinstance(line, _Broken):
        return line
    try:
        return json.loads(line, strict=False, object_pairs_hook=_once)
    except ValueError as error:
        return _Broken(f"not valid JSON ({error})")
    except RecursionError:
        return _Broken("not valid JSON (nested too deep)")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; json would take the last of two values for one key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice}` is there twice")
    return made
