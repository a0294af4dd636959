"""Tables from results files, and from nothing else, so that they can be made again."""

import sys
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from flashdraft.errors import DataError
from flashdraft.train.prompts import read_jsonl

__all__ = [
    "COLUMNS",
    "Summary",
    "grouped",
    "origin",
    "print_table",
    "read_results",
    "settings",
    "show",
    "summarise",
]

Line = dict[str, Any]
_SPEEDS = ("batch_tokens_per_second", "decode_tokens_per_second")
_SETTING = {"temperature": "T = {:g}", "max_rows": "batch {}", "threads": "threads {}"}
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
    """One method on one task. Ratios, to plain decoding or a chosen method, are medians of pairs of one prompt and repeat.

    tokens_per_second: of all prompts decoded together, prefill included; decode_tokens_per_second: of one, after its first token.
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
        return [
            "-" if value is None else format(value, form)
            for value, form in zip(self, forms, strict=True)
        ]


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """The items by what `key` says of them, in the order in which it first says it."""
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def settings(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines by temperature, batch size and number of threads, as far as they tell them."""

    def setting(line: Line) -> str:
        return ", ".join(
            form.format(line[name]) for name, form in _SETTING.items() if line.get(name) is not None
        )

    return grouped(lines, setting)


def summarise(lines: Sequence[Line]) -> list[Summary]:
    """Every task's methods, in the order of the lines; with several tasks, all of them together come last."""
    parts = [*grouped(lines, itemgetter("task")).items()]
    rows = []
    for task, part in [*parts, ("all", lines)] if len(parts) > 1 else parts:
        methods = grouped(part, itemgetter("method"))
        for method in sorted(
            methods, key=lambda name: (not name.startswith("autoregressive"), name)
        ):
            rows.append(_summary(task, method, methods[method]))
    return rows


def read_results(path: Path, base: str | None = None) -> tuple[dict[str, Any], list[Line]]:
    """The header and the answers, each with its `pair`: the answer of `base`, or of plain decoding, to the same prompt."""
    rows = list(read_jsonl(path))
    wanted = {
        "task",
        "prompt",
        "method",
        "repeat",
        "tau",
        "identical",
        "tokens_per_second",
        _SPEEDS[1],
    }
    if not rows or "header" not in rows[0] or not all(wanted <= row.keys() for row in rows[1:]):
        raise DataError(
            f"`{path}` is not a results file", hint="give a file that `flashdraft bench` wrote"
        )
    lines = [{_SPEEDS[0]: line["tokens_per_second"]} | line for line in rows[1:]]
    keys = [(line["prompt"], line["repeat"], *map(line.get, _SETTING)) for line in lines]
    answers = {(line["method"], key): line for line, key in zip(lines, keys, strict=True)}
    plain = (base or line.get("plain", "autoregressive") for line in lines)
    pairs = map(answers.get, zip(plain, keys, strict=True))
    return rows[0]["header"], [
        line | {"pair": pair} for line, pair in zip(lines, pairs, strict=True)
    ]


def origin(header: dict[str, Any]) -> list[str]:
    """What a results file was measured with and on, in two lines."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    threads = f"{header['threads']} threads" + (
        f", transformers {t}" if (t := header.get("transformers_threads")) else ""
    )
    return [
        header["command"],
        f"{header['device']}; {threads}; {header['kernel']}; {versions}; commit {header['commit']}",
    ]


def show(path: Path, base: str | None = None) -> None:
    """Print the tables of a results file, with what it was measured on. base: the method that ratios are to; plain decoding."""
    header, lines = read_results(path, base)
    print(*origin(header), sep="\n")
    for setting, own in settings(lines).items():
        print(f"\n{setting}\n" if setting else "", end="")
        print_table(COLUMNS, (row.cells for row in summarise(own)))


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
    speed, decode = (
        (_known(median, (line[name] for line in lines)), _ratio(lines, name)) for name in _SPEEDS
    )
    identical = _known(fmean, (line["identical"] for line in lines))
    first = _known(
        median, (1000 * t if (t := line.get("time_to_first_token")) else None for line in lines)
    )
    return Summary(
        task,
        method,
        len(lines),
        *speed,
        *decode,
        fmean(line["tau"] for line in lines),
        identical,
        first,
    )


def _ratio(lines: Iterable[Line], name: str) -> float | None:
    pairs = [
        line for line in lines if line["pair"] is not None and line[name] and line["pair"][name]
    ]
    return _known(median, (line[name] / line["pair"][name] for line in pairs))


def _known(middle: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return middle(known) if known else None
