"""The rows of a file, whatever its ending says: JSON Lines, a JSON list, or a dictionary with one.

Knows encodings, compression and which formats are none of these. Does not know what a row means.
What cannot be read is refused by name, or left out, counted and named.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from io import BufferedIOBase, BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from flashdraft.errors import DataError, FlashDraftError
from flashdraft.files import say
from flashdraft.train.questions import CONVERSATIONS, QUESTIONS

__all__ = [
    "LeftOut",
    "PlacedRow",
    "Row",
    "is_whole",
    "json_list",
    "placed_rows",
    "placed_texts",
    "read_jsonl",
]

Names = Collection[str]
Row = dict[str, Any]  # a JSON object

_SHOWN = 3  # what was left out is told with that many places and causes
_HEAD = 64  # bytes, more than the longest beginning below
_COMPRESSED: dict[bytes, Callable[[BufferedReader], BufferedIOBase]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_UNREADABLE = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)


class _Format(NamedTuple):
    """A format that holds no rows of JSON: what a file of it is, and what to do with it.

    `{}` in the hint stands for the file's name.
    """

    what: str
    hint: str


def _to_json(reader: str) -> str:
    """The hint for what pandas reads by `read_<reader>`."""
    program = (
        f"import pandas; pandas.read_{reader}('{{}}')"
        ".to_json('rows.jsonl', orient='records', lines=True)"
    )
    return f'convert it: python -c "{program}"'


_WEB_PAGE = _Format("a web page", "fetch the file itself, not the page that shows it")
_OTHERS = {  # by how a file begins, in capitals or not
    b"PAR1": _Format("a Parquet file", _to_json("parquet")),
    b"ARROW1": _Format("an Arrow file", _to_json("feather")),
    b"\x28\xb5\x2f\xfd": _Format("compressed by Zstandard", "unpack it: zstd -d '{}'"),
    b"PK\x03\x04": _Format("a zip archive", "unpack it, and name the file in it"),
    b"version https://git-lfs": _Format(
        "a pointer of Git LFS, not the file itself", "fetch the file: git lfs pull"
    ),
    b"<!doctype html": _WEB_PAGE,
    b"<html": _WEB_PAGE,
}
_FIELDS_OF_A_ROW = {*CONVERSATIONS, *QUESTIONS} - {"data"}  # `data` may hold the rows as well
_TABLES = {".csv": "csv", ".tsv": "table", ".xlsx": "excel", ".parquet": "parquet"}


class LeftOut:
    """What could not be used: how many, and the first ones with their places and causes."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.count = 0
        self.hint: str | None = None  # what to do about the first one, where its cause says so
        self._shown: list[str] = []

    def add(self, place: str, cause: str | Exception) -> None:
        self.count += 1
        if len(self._shown) == _SHOWN:
            return

        if isinstance(cause, FlashDraftError):
            if not self.hint:
                self.hint = cause.hint
            cause = str(cause.args[0])
        one_line = " ".join(str(cause).split())
        self._shown.append(f"{place}: {one_line:.200}")

    def join(self, other: "LeftOut") -> None:
        """Count what `other` counted."""
        self.count += other.count
        self._shown = (self._shown + other._shown)[:_SHOWN]

    def __str__(self) -> str:
        plural = "" if self.count == 1 else "s"
        shown = list(self._shown)
        if self.count > len(shown):
            shown.append("...")
        return f"{self.count} {self.what}{plural} left out: {'; '.join(shown)}"

    def tell(self) -> None:
        """Say it on standard error, where there is one."""
        if self.count:
            say(str(self))


class PlacedRow(NamedTuple):
    place: str  # the file, and the line or the entry in it, as messages name it
    row: Row


class _Broken(NamedTuple):
    """In the place of a row or a line: why it cannot be read."""

    cause: str


class _Line(NamedTuple):
    number: int  # from 1
    text: str | _Broken


class _Entry(NamedTuple):
    place: str  # in the file: `line 3` or `entry 3`
    value: object  # what JSON says there, or _Broken


Divide = Callable[[Path, Iterator[_Line]], Iterator[_Entry]]


def read_jsonl(path: Path, keys: Names = (), left_out: LeftOut | None = None) -> Iterator[Row]:
    """The objects of a file, mostly JSON Lines.

    One that cannot be read, or lacks one of `keys`, is `left_out`; without that, a DataError names
    it.
    """
    for placed in placed_rows(path, keys, left_out):
        yield placed.row


def placed_rows(
    path: Path, keys: Names = (), left_out: LeftOut | None = None
) -> Iterator[PlacedRow]:
    """The same, each with its place, as messages name it."""
    for entry in _entries(path):
        place = f"{path}, {entry.place}"
        cause = _what_is_wrong(entry.value, keys)
        if not cause:
            assert isinstance(entry.value, dict)
            yield PlacedRow(place, entry.value)
        elif left_out is not None:
            left_out.add(place, cause)
        else:
            kind = entry.place.split()[0]
            raise DataError(f"{place}: {cause}", hint=f"mend or remove that {kind}")


def placed_texts(path: Path, left_out: LeftOut) -> Iterator[PlacedRow]:
    """The lines of a file of plain text, each as the row {prompt: line}."""
    for entry in _entries(path, _entries_of_texts):
        place = f"{path}, {entry.place}"
        if isinstance(entry.value, _Broken):
            left_out.add(place, entry.value.cause)
        else:
            yield PlacedRow(place, {"prompt": entry.value})


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
    for place, value in _entries(path):
        if isinstance(value, _Broken):
            raise DataError(f"{path}, {place}: {value.cause}", hint="mend it, or fetch it again")
        rows.append(value)
    return rows


def _what_is_wrong(value: object, keys: Names) -> str:
    """Why this is no row with these fields; empty where it is one."""
    if isinstance(value, _Broken):
        return value.cause
    if not isinstance(value, dict):
        return "not a JSON object"
    for key in keys:
        if key not in value:
            return f"no field `{key}`"
    return ""


# --- from bytes to lines --------------------------------------------------------------------------


def _entries(path: Path, divide: "Divide | None" = None) -> Iterator[_Entry]:
    """What the file holds, row by row, or _Broken where one cannot be read.

    divide: how its lines become entries; by default they are JSON, in whichever form. Raises
    DataError for a file of another format.
    """
    try:
        with path.open("rb") as raw:
            _check_format(path, raw)
            with _unpacked(raw) as file:
                yield from (divide or _entries_of_lines)(path, _lines(file))
    except (FileNotFoundError, IsADirectoryError):
        hint = (
            "name a .jsonl or .json file, "
            "or the folder of the training sets with --data or FLASHDRAFT_DATA"
        )
        raise DataError(f"no file `{path}`", hint=hint) from None
    except UnicodeDecodeError as error:
        got = f"{path}: not {error.encoding} ({error.reason})"
        raise DataError(got, hint="save it as UTF-8") from None
    except _UNREADABLE as error:
        raise DataError(f"`{path}` cannot be read: {error}", hint="fetch it again") from None


def _check_format(path: Path, file: BufferedReader) -> None:
    """Raises DataError for a format that holds no rows of JSON."""
    table = _TABLES.get(path.suffix.lower())
    if table:
        hint = _to_json(table).format(path.name)
        raise DataError(f"`{path}` is a table, not rows of JSON", hint=hint)

    head = file.peek(_HEAD)[:_HEAD]
    for beginning, other in _OTHERS.items():
        if head.lower().startswith(beginning.lower()):
            raise DataError(f"`{path}` is {other.what}", hint=other.hint.format(path.name))

    is_compressed = head.startswith(tuple(_COMPRESSED))
    is_json = head.lstrip().startswith((b"{", b"["))
    if path.suffix == ".gz" and head and not is_compressed and not is_json:
        raise DataError(f"`{path}` cannot be read: not a gzipped file", hint="fetch it again")


def _unpacked(file: BufferedReader) -> BufferedIOBase:
    """The same bytes, unpacked if they are compressed."""
    head = file.peek(_HEAD)
    for beginning, reader in _COMPRESSED.items():
        if head.startswith(beginning):
            return reader(file)
    return file


def _lines(file: BufferedIOBase) -> Iterator[_Line]:
    """The lines that are not blank, as text."""
    first = file.readline()
    encoding = "utf-8"
    if first[:4].strip(b"\0"):
        encoding = json.detect_encoding(first[:4])

    if encoding.startswith("utf-8"):
        yield from _utf8_lines(chain([first], file))
    else:
        yield from _lines_of_text((first + file.read()).decode(encoding))


def _utf8_lines(lines: Iterator[bytes]) -> Iterator[_Line]:
    """A line that is not UTF-8 is _Broken, the others are read."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode().lstrip("\ufeff")
        except UnicodeDecodeError as error:
            yield _Line(number, _Broken(f"not UTF-8 ({error.reason})"))
            continue
        if text.strip():
            yield _Line(number, text.strip("\r\n"))


def _lines_of_text(text: str) -> Iterator[_Line]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _Line(number, line.lstrip("\ufeff"))


# --- from lines to rows ---------------------------------------------------------------------------


def _entries_of_texts(path: Path, lines: Iterator[_Line]) -> Iterator[_Entry]:
    for line in lines:
        yield _Entry(f"line {line.number}", line.text)


def _entries_of_lines(path: Path, lines: Iterator[_Line]) -> Iterator[_Entry]:
    """Rows of lines: one a line, or what all lines together say."""
    first = next(lines, None)
    if first is None:
        return
    second = next(lines, None)
    if second is None:
        yield from _entries_of_only_line(path, first)
        return

    rest: Iterator[_Line] = chain([second], lines)
    if _may_go_on(first):
        following = list(rest)
        whole = _whole([first, *following])
        if not isinstance(whole, _Broken):
            yield from _entries_of_value(path, whole)
            return
        _refuse_cut_list(path, first, whole)
        rest = iter(following)

    yield from _entries_of_line(first)
    for line in rest:
        yield from _entries_of_line(line)


def _entries_of_only_line(path: Path, line: _Line) -> Iterator[_Entry]:
    value = _parsed(line.text)
    if isinstance(value, _Broken):
        _refuse_cut_list(path, line, value)
    if isinstance(value, list) or _is_container(value):
        yield from _entries_of_value(path, value)
    else:
        yield from _entries_of_line(line)


def _may_go_on(first: _Line) -> bool:
    """Whether the first line begins a JSON value that ends on a later one."""
    if not isinstance(first.text, str) or not first.text.lstrip().startswith(("[", "{")):
        return False
    return isinstance(_parsed(first.text), _Broken)


def _refuse_cut_list(path: Path, first: _Line, broken: _Broken) -> None:
    """Raises DataError for a list that does not end: it is no lines of which some are broken."""
    if isinstance(first.text, str) and first.text.lstrip().startswith("["):
        raise DataError(f"{path}: {broken.cause}", hint="mend it, or fetch it again")


def _entries_of_line(line: _Line) -> Iterator[_Entry]:
    """The row of a line, or those of one that old returns (\\r) divide."""
    value = _parsed(line.text)
    pieces = []
    if isinstance(value, _Broken) and isinstance(line.text, str):
        pieces = [piece for piece in line.text.split("\r") if piece.strip()]

    if len(pieces) < 2:
        yield _Entry(f"line {line.number}", value)
        return
    for number, piece in enumerate(pieces, line.number):
        yield _Entry(f"line {number}", _parsed(piece))


def _entries_of_value(path: Path, value: object) -> Iterator[_Entry]:
    """The rows of a JSON file that is one value."""
    if isinstance(value, dict) and _is_container(value):
        lists = _lists_of_objects(value)
        if len(lists) > 1:
            got = f"{path} holds several lists: {', '.join(lists)}"
            raise DataError(got, hint="save the one that is meant as .jsonl")
        value = value[lists[0]]

    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        yield _Entry(f"entry {number}", row)


def _is_container(value: object) -> bool:
    """Whether this is a dictionary that holds rows, and is none itself."""
    if not isinstance(value, Mapping) or not _lists_of_objects(value):
        return False
    return _FIELDS_OF_A_ROW.isdisjoint(value)


def _lists_of_objects(value: Mapping[str, object]) -> list[str]:
    """The names of the lists in it that hold objects and nothing else."""
    return [name for name, rows in value.items() if _is_list_of_objects(rows)]


def _is_list_of_objects(rows: object) -> bool:
    if not isinstance(rows, list) or not rows:
        return False
    return all(isinstance(row, dict) for row in rows)


# --- JSON -----------------------------------------------------------------------------------------


def _whole(lines: list[_Line]) -> object:
    """What all lines together say: one value, or a list of those that stand one behind the other.

    _Broken, with the cause of the first fault, where they say neither.
    """
    texts = []
    for line in lines:
        if isinstance(line.text, _Broken):
            return line.text
        texts.append(line.text)
    text = "\n".join(texts)

    value = _parsed(text)
    if not isinstance(value, _Broken):
        return value
    try:
        return _values_in_a_row(text)
    except (ValueError, RecursionError):
        return value


def _values_in_a_row(text: str) -> list[object]:
    """The JSON values that stand one behind the other. Raises ValueError or RecursionError."""
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_object_without_repeats)
    values = []
    at = 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values.append(value)
        while at < len(text) and text[at].isspace():
            at += 1
    return values


def _parsed(line: str | _Broken) -> object:
    """What a line's JSON says, or _Broken."""
    if isinstance(line, _Broken):
        return line
    try:
        return json.loads(line, strict=False, object_pairs_hook=_object_without_repeats)
    except ValueError as error:
        return _Broken(f"not valid JSON ({error})")
    except RecursionError:
        return _Broken("not valid JSON (nested too deep)")


def _object_without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object. Raises ValueError for two values of one key, of which json takes the last."""
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"`{twice}` is there twice")
