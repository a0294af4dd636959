"""Tables of a load test's results file, made of nothing but that file.

Knows what its lines hold and which turns are a pair. Does not know who wrote it.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, geometric_mean, median, stdev
from typing import NamedTuple

from flashdraft.bench.report import grouped, print_table
from flashdraft.errors import DataError
from flashdraft.files import Json
from flashdraft.train.prompts import read_jsonl

__all__ = [
    "LOAD_COLUMNS",
    "LoadSummary",
    "full_load_rate",
    "is_load",
    "load_origin",
    "read_load",
    "show_load",
    "summarise_load",
]

Header = Json
Line = Json  # one request
Turn = tuple[int, str, int]  # streams, drafting, repeat
Question = tuple[int, int, int]  # streams, repeat, prompt
Rates = dict[Turn, float]  # tokens per second

LOAD_COLUMNS = [
    "streams",
    "drafting",
    "requests",
    "failed",
    "tokens/s",
    "ratio",
    "from",
    "to",
    "first, ms",
    "p95",
    "ms/token",
    "p95",
    "gap, ms",
    "tau",
    "same text",
]
_FIELDS = ["task", "prompt", "streams", "drafting", "repeat"]
_FIELDS += ["started", "seconds", "arrivals", "num_tokens"]
# Student's t, one-sided 95 %, by degrees of freedom from 1
_STUDENT = [6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812]
_STUDENT += [1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725]
_STUDENT += [1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697]


class LoadSummary(NamedTuple):
    """One mode at one number of streams. Times in milliseconds, of requests that were answered."""

    streams: int
    drafting: str
    requests: int
    failed: int
    tokens_per_second: float  # median of the turns; see `full_load_rate`
    ratio: float | None  # to the base, geometric mean over pairs of turns
    lower: float | None  # its bounds: 95 % each, by Student's t of the pairs' logarithms
    upper: float | None
    first: float | None  # to the first text: median, 95th percentile
    first_p95: float | None
    token: float | None  # between two tokens, a request's mean: median, 95th percentile
    token_p95: float | None
    gap: float | None  # the longest that any stream waited between two pieces of text
    tau: float | None  # mean over the requests whose server tells it
    same: float | None  # share of the texts that equal the base's

    @property
    def cells(self) -> list[str]:
        """As LOAD_COLUMNS want it."""
        wide = ["", "", "", "", ".1f", ".3f", ".3f", ".3f"]
        forms = [*wide, ".0f", ".0f", ".2f", ".2f", ".0f", ".2f", ".0%"]
        cells = []
        for value, form in zip(self, forms, strict=True):
            cells.append("-" if value is None else format(value, form))
        return cells


def is_load(path: Path) -> bool:
    """Whether a results file, or what is said to be one, was written by a load test."""
    first = next(iter(read_jsonl(path)), None)
    header = first.get("header") if isinstance(first, dict) else None
    return isinstance(header, dict) and header.get("kind") == "load"


def read_load(path: Path) -> tuple[Header, list[Line]]:
    """The header and the requests of a results file. Raises DataError for another file."""
    rows = list(read_jsonl(path))
    are_whole = all(row.keys() >= set(_FIELDS) for row in rows[1:])
    if not rows or "header" not in rows[0] or not are_whole:
        raise DataError(
            f"`{path}` is no load test's results file",
            hint="give a file that `flashdraft bench serve` wrote",
        )
    return rows[0]["header"], rows[1:]


def load_origin(header: Header) -> list[str]:
    """What was asked of which server, and by what client, in two lines."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    facts = f"`{header['model']}` at {header['url']}; {header['time']}"
    client = f"client: {header['device']}; {versions}; commit {header['commit']}"
    return [header["command"], f"{facts}; {client}"]


def show_load(path: Path, base: str | None = None) -> None:
    """Print the table of a results file, with what was asked. base: see `summarise_load`."""
    header, lines = read_load(path)
    for fact in load_origin(header):
        print(fact)
    print_table(LOAD_COLUMNS, [row.cells for row in summarise_load(lines, base)])


def summarise_load(lines: Sequence[Line], base: str | None = None) -> list[LoadSummary]:
    """A row for every mode at every number of streams.

    base: the mode that ratios and equal texts are to; by default `off` or, without it, the first.
    """
    rates: Rates = {}
    for turn, own in grouped(lines, _turn_of).items():
        rates[turn] = full_load_rate(own)
    modes = sorted({line["drafting"] for line in lines}, key=_place_of)
    if base is None:
        base = modes[0] if modes else ""
    texts = _texts_of(lines, base)

    rows = []
    by_level = grouped(lines, lambda line: line["streams"])
    for level in sorted(by_level):
        by_mode = grouped(by_level[level], lambda line: line["drafting"])
        for mode in sorted(by_mode, key=_place_of):
            rows.append(_summary(by_mode[mode], rates, base, texts))
    return rows


def full_load_rate(lines: Sequence[Line]) -> float:
    """Tokens per second of a turn while all of its streams had something to do.

    Once nothing is left to ask, streams end one by one, and what runs then is no load of so many.
    A request's tokens are spread evenly over its pieces of text.
    """
    streams = lines[0]["streams"]
    ends = sorted(line["started"] + line["seconds"] for line in lines)
    first_idle = ends[max(len(ends) - streams, 0)]

    tokens = 0.0
    for line in lines:
        arrivals = line["arrivals"]
        if not arrivals:
            continue
        in_time = sum(line["started"] + moment <= first_idle for moment in arrivals)
        tokens += line["num_tokens"] * in_time / len(arrivals)
    return tokens / first_idle if first_idle else 0.0


def bounds(ratios: Sequence[float]) -> tuple[float, float] | None:
    """The lower and the upper 95 % bound of the mean ratio; None of less than two."""
    count = len(ratios)
    if count < 2:
        return None
    logarithms = [math.log(ratio) for ratio in ratios]
    degrees = count - 1
    quantile = _STUDENT[min(degrees, len(_STUDENT)) - 1]
    margin = quantile * stdev(logarithms) / math.sqrt(count)
    middle = fmean(logarithms)
    return math.exp(middle - margin), math.exp(middle + margin)


def _place_of(mode: str) -> tuple[bool, str]:
    """What ratios are to comes first: `off`; then as the alphabet has it."""
    return mode != "off", mode


def _turn_of(line: Line) -> Turn:
    return line["streams"], line["drafting"], line["repeat"]


def _question(line: Line) -> Question:
    """What two answers must have in common to be a pair."""
    return line["streams"], line["repeat"], line["prompt"]


def _texts_of(lines: Sequence[Line], mode: str) -> dict[Question, str]:
    texts = {}
    for line in lines:
        if line["drafting"] == mode and line.get("text"):
            texts[_question(line)] = line["text"]
    return texts


class _Waits(NamedTuple):
    """How long clients waited, in milliseconds, by request."""

    firsts: list[float]  # to the first text
    tokens: list[float]  # from one token to the next, on average
    gaps: list[float]  # the longest between two pieces of text


def _summary(
    lines: Sequence[Line], rates: Rates, base: str, texts: dict[Question, str]
) -> LoadSummary:
    streams = lines[0]["streams"]
    mode = lines[0]["drafting"]
    answered = [line for line in lines if line["arrivals"]]
    waits = _waits(answered)
    own_rates = [rate for turn, rate in rates.items() if turn[:2] == (streams, mode)]
    ratios = [] if mode == base else _ratios(rates, streams, mode, base)
    ends = bounds(ratios)
    same = [] if mode == base else _same(answered, texts)

    return LoadSummary(
        streams=streams,
        drafting=mode,
        requests=len(lines),
        failed=sum(bool(line.get("error")) for line in lines),
        tokens_per_second=median(own_rates),
        ratio=_known(geometric_mean, ratios),
        lower=ends[0] if ends else None,
        upper=ends[1] if ends else None,
        first=_known(median, waits.firsts),
        first_p95=_known(_p95, waits.firsts),
        token=_known(median, waits.tokens),
        token_p95=_known(_p95, waits.tokens),
        gap=_known(max, waits.gaps),
        tau=_known(fmean, _taus(answered)),
        same=_known(fmean, same),
    )


def _waits(answered: Sequence[Line]) -> _Waits:
    waits = _Waits([], [], [])
    for line in answered:
        arrivals = line["arrivals"]
        waits.firsts.append(1000 * arrivals[0])
        between = [1000 * (later - sooner) for sooner, later in pairwise(arrivals)]
        if between:
            waits.gaps.append(max(between))
            waits.tokens.append(sum(between) / max(line["num_tokens"] - 1, 1))
    return waits


def _ratios(rates: Rates, streams: int, mode: str, base: str) -> list[float]:
    """Of every turn to the one of `base` in the same repeat; one of no tokens is no pair."""
    ratios = []
    for turn, rate in rates.items():
        pair = rates.get((streams, base, turn[2]))
        if turn[:2] == (streams, mode) and pair and rate:
            ratios.append(rate / pair)
    return ratios


def _taus(answered: Sequence[Line]) -> list[float]:
    taus = []
    for line in answered:
        drafts = line.get("drafts") or {}
        tau = drafts.get("mean_acceptance_length")
        if tau is not None:
            taus.append(tau)
    return taus


def _same(answered: Sequence[Line], texts: dict[Question, str]) -> list[bool]:
    """Whether an answer's text is that of `texts`; those without a pair are left out."""
    same = []
    for line in answered:
        pair = texts.get(_question(line))
        if pair is not None:
            same.append(line["text"] == pair)
    return same


def _p95(values: Sequence[float]) -> float:
    """The smallest of the values that 95 % of them do not exceed."""
    ordered = sorted(values)
    place = math.ceil(0.95 * len(ordered)) - 1
    return ordered[place]


def _known(middle: Callable[[Sequence[float]], float], values: Sequence[float]) -> float | None:
    return middle(values) if values else None
