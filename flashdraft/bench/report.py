"""Tables from results files, and from nothing else, so that they can be made again.

Knows what a line of results holds, and which answers are a pair. Does not know who wrote the file.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from flashdraft.errors import DataError
from flashdraft.train.prompts import read_jsonl

__all__ = [
    "COLUMNS",
    "Header",
    "Line",
    "Summary",
    "grouped",
    "origin",
    "print_table",
    "read_results",
    "settings",
    "show",
    "summarise",
]

Header = dict[str, Any]  # the first line of a results file
Line = dict[str, Any]  # each of the others: one answer
Item = TypeVar("Item")
Key = TypeVar("Key")

_TOGETHER = "batch_tokens_per_second"
_DECODING = "decode_tokens_per_second"
_SETTING = {"temperature": "T = {:g}", "max_rows": "batch {}", "threads": "threads {}"}
_FIELDS = (  # of every answer that any version wrote
    "task",
    "prompt",
    "method",
    "repeat",
    "tau",
    "identical",
    "tokens_per_second",
    _DECODING,
)
COLUMNS = [
    "task",
    "method",
    "answers",
    "tokens/s",
    "ratio",
    "decode tokens/s",
    "decode ratio",
    "tau",
    "identical",
    "first, ms",
]


class Summary(NamedTuple):
    """One method on one task.

    Ratios, to plain decoding or a chosen method, are medians of pairs of one prompt and repeat.
    tokens_per_second: of all prompts decoded together, prefill included; decode_tokens_per_second:
    of one, after its first token.
    """

    task: str
    method: str
    answers: int
    tokens_per_second: float | None  # medians
    ratio: float | None
    decode_tokens_per_second: float | None
    decode_ratio: float | None
    tau: float  # mean
    identical: float | None  # share of the answers that equal plain decoding; None: not compared
    first_token_ms: float | None  # median

    @property
    def cells(self) -> list[str]:
        """As COLUMNS want it."""
        forms = ("", "", "", ".1f", ".2f", ".1f", ".2f", ".2f", ".0%", ".0f")
        cells = []
        for value, form in zip(self, forms, strict=True):
            cells.append("-" if value is None else format(value, form))
        return cells


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items by what `key` says of them, in the order in which it first says it."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def settings(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines by temperature, batch size and number of threads, as far as they tell them."""
    return grouped(lines, _setting_of)


def _setting_of(line: Line) -> str:
    told = []
    for name, form in _SETTING.items():
        value = line.get(name)
        if value is not None:
            told.append(form.format(value))
    return ", ".join(told)


def summarise(lines: Sequence[Line]) -> list[Summary]:
    """Every task's methods, plain decoding first; with several tasks, all together come last."""
    by_task = grouped(lines, lambda line: line["task"])
    parts = list(by_task.items())
    if len(parts) > 1:
        parts.append(("all", list(lines)))

    rows = []
    for task, part in parts:
        by_method = grouped(part, lambda line: line["method"])
        for method in sorted(by_method, key=_plain_first):
            rows.append(_summary(task, method, by_method[method]))
    return rows


def _plain_first(method: str) -> tuple[bool, str]:
    return not method.startswith("autoregressive"), method


def read_results(path: Path, base: str | None = None) -> tuple[Header, list[Line]]:
    """The header and the answers of a results file.

    Each answer has its `pair`: the answer of `base`, or of plain decoding, to the same prompt in
    the same repeat and setting; None where there is none. Raises DataError for another file.
    """
    rows = list(read_jsonl(path))
    if not _are_results(rows):
        raise DataError(
            f"`{path}` is not a results file", hint="give a file that `flashdraft bench` wrote"
        )

    lines = []
    answers: dict[tuple[object, ...], Line] = {}
    for row in rows[1:]:
        line = {_TOGETHER: row["tokens_per_second"]} | row  # older files do not tell it
        lines.append(line)
        answers[line["method"], *_question(line)] = line

    paired = []
    for line in lines:
        method = base or line.get("plain", "autoregressive")
        pair = answers.get((method, *_question(line)))
        paired.append(line | {"pair": pair})
    return rows[0]["header"], paired


def _are_results(rows: Sequence[Line]) -> bool:
    if not rows or "header" not in rows[0]:
        return False
    return all(row.keys() >= set(_FIELDS) for row in rows[1:])


def _question(line: Line) -> tuple[object, ...]:
    """What two answers must have in common to be a pair."""
    setting = [line.get(name) for name in _SETTING]
    return (line["prompt"], line["repeat"], *setting)


def origin(header: Header) -> list[str]:
    """What a results file was measured with and on, in two lines."""
    threads = f"{header['threads']} threads"
    theirs = header.get("transformers_threads")
    if theirs:
        threads += f", transformers {theirs}"
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    facts = f"{header['device']}; {threads}; {header['kernel']}; {versions}"
    return [header["command"], f"{facts}; commit {header['commit']}"]


def show(path: Path, base: str | None = None) -> None:
    """Print the tables of a results file, with what it was measured on.

    base: the method that ratios are to; by default plain decoding.
    """
    header, lines = read_results(path, base)
    for fact in origin(header):
        print(fact)
    for setting, own in settings(lines).items():
        if setting:
            print(f"\n{setting}")
        print_table(COLUMNS, [row.cells for row in summarise(own)])


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A rich table on a terminal, plain columns elsewhere; all but the first two are numbers."""
    is_plain = not sys.stdout.isatty()
    table = Table(box=None if is_plain else box.SIMPLE_HEAD, pad_edge=not is_plain)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = 200 if is_plain else None
    Console(width=width, highlight=False).print(table)


def _summary(task: str, method: str, lines: Sequence[Line]) -> Summary:
    firsts = []
    for line in lines:
        seconds = line.get("time_to_first_token")
        firsts.append(1000 * seconds if seconds else None)
    return Summary(
        task=task,
        method=method,
        answers=len(lines),
        tokens_per_second=_known(median, _column(lines, _TOGETHER)),
        ratio=_ratio(lines, _TOGETHER),
        decode_tokens_per_second=_known(median, _column(lines, _DECODING)),
        decode_ratio=_ratio(lines, _DECODING),
        tau=fmean(_column(lines, "tau")),
        identical=_known(fmean, _column(lines, "identical")),
        first_token_ms=_known(median, firsts),
    )


def _column(lines: Sequence[Line], name: str) -> list[Any]:
    """That figure of all lines; None where it is not known."""
    return [line[name] for line in lines]


def _ratio(lines: Sequence[Line], name: str) -> float | None:
    """The median over the pairs that both have that figure."""
    ratios = []
    for line in lines:
        pair = line["pair"]
        if pair is not None and line[name] and pair[name]:
            ratios.append(line[name] / pair[name])
    return _known(median, ratios)


def _known(middle: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    """The mean or median of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return middle(known) if known else None
