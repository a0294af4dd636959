"""Tables from results files, and from nothing else, so that they can be made again."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from flashdraft.errors import DataError
from flashdraft.train.prompts import read_jsonl

__all__ = ["Summary", "print_table", "read_results", "show", "summarise"]

Line = dict[str, Any]
_SPEEDS = ("tokens_per_second", "decode_tokens_per_second")


@dataclass(frozen=True)
class Summary:
    """One method on one task. Ratios, to plain decoding or a chosen method, are medians of pairs of one prompt and repeat."""

    task: str
    method: str
    answers: int
    tokens_per_second: float | None  # medians, prefill included
    ratio: float | None
    decode_tokens_per_second: float | None  # medians, after the first token
    decode_ratio: float | None
    tau: float  # mean
    identical: float | None  # share of the answers that equal plain decoding; None: not compared


def summarise(path: Path, base: str | None = None) -> list[Summary]:
    """Every task's methods in the order of the file; with several tasks, all of them together come last. base: see `show`."""
    _, lines = read_results(path, base)
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    parts = [(task, [line for line in lines if line["task"] == task]) for task in tasks]
    rows = []
    for task, part in [*parts, ("all", lines)] if len(tasks) > 1 else parts:
        for method in sorted({line["method"] for line in part}, key=lambda name: (not name.startswith("autoregressive"), name)):
            rows.append(_summary(task, method, [line for line in part if line["method"] == method]))
    return rows


def read_results(path: Path, base: str | None = None) -> tuple[dict[str, Any], list[Line]]:
    """The header and the answers, each with its `pair`: the answer of `base`, or of plain decoding, to the same prompt."""
    rows = list(read_jsonl(path))
    wanted = {"task", "prompt", "method", "repeat", "tau", "identical", *_SPEEDS}
    if not rows or "header" not in rows[0] or not all(wanted <= row.keys() for row in rows[1:]):
        raise DataError(f"`{path}` is not a results file", hint="give a file that `flashdraft bench` wrote")
    answers = {(line["prompt"], line["repeat"], line["method"]): line for line in rows[1:]}
    pairs = [answers.get((line["prompt"], line["repeat"], base or line.get("plain", "autoregressive"))) for line in rows[1:]]
    return rows[0]["header"], [line | {"pair": pair} for line, pair in zip(rows[1:], pairs, strict=True)]


def show(path: Path, base: str | None = None) -> None:
    """Print the table of a results file, with what it was measured on. base: the method that ratios are to; plain decoding."""
    header, _ = read_results(path, base)
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    threads = f"{header['threads']} threads" + (f", transformers {t}" if (t := header.get("transformers_threads")) else "")
    print(f"{header['command']}\n{header['device']}; {threads}; {header['kernel']}; {versions}; commit {header['commit']}")
    columns = ["task", "method", "answers", "tokens/s", "ratio", "decode tokens/s", "decode ratio", "tau", "identical"]
    forms, rows = (".1f", ".2f", ".1f", ".2f", ".2f", ".0%"), []
    for task, method, answers, *figures in map(astuple, summarise(path, base)):
        rows.append([task, method, str(answers), *map(_number, figures, forms)])
    print_table(columns, rows)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A rich table on a terminal, plain columns elsewhere; all but the first two columns are numbers."""
    plain = not sys.stdout.isatty()
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=not plain)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=200 if plain else None, highlight=False).print(table)


def _summary(task: str, method: str, lines: list[Line]) -> Summary:
    speed, decode = ((_known(median, (line[name] for line in lines)), _ratio(lines, name)) for name in _SPEEDS)
    identical = _known(fmean, (line["identical"] for line in lines))
    return Summary(task, method, len(lines), *speed, *decode, fmean(line["tau"] for line in lines), identical)


def _ratio(lines: Iterable[Line], name: str) -> float | None:
    pairs = [line for line in lines if line["pair"] is not None and line[name] and line["pair"][name]]
    return _known(median, (line[name] / line["pair"][name] for line in pairs))


def _known(middle: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return middle(known) if known else None


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)
