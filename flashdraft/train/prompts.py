"""Stage 1: training sets, files and hub data sets -> one file of prompts, shuffled once.

What a row asks is found in train/questions.py, how files are read in train/rows.py. A row that
cannot be used is left out, counted and named. Evaluation sets are refused by name; whether a set of
another name holds entries of one cannot be seen.
"""

import json
import random
import re
from collections.abc import Collection, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from flashdraft.errors import DataError, InvalidParameter
from flashdraft.files import check_replaceable, output_file, write_own
from flashdraft.train.questions import Asked, AsksNothing, as_prompt
from flashdraft.train.rows import LeftOut, PlacedRow, Row, json_list, placed_rows, read_jsonl
from flashdraft.types import Allowed, check_option

__all__ = ["SOURCES", "as_prompt", "hub_rows", "json_list", "read_jsonl", "write_prompts"]

_ASSETS = Path(__file__).parents[1] / "assets"
# source -> file below the data folder; of gsm8k only the train split
SOURCES: dict[str, str] = json.loads(_ASSETS.joinpath("sources.json").read_text(encoding="utf-8"))
_MATHS = "gsm8k/train"
MATHS_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."

Names = Collection[str]
_FIELDS = ("source", "row", "prompt")  # of a line that is written
_FILE_ENDINGS = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
# searched in a file's folder and name, or in a hub data set's name with its split
EVALUATION = re.compile(
    r"gsm8k.*(?<![a-z])test|human.?eval|mbpp|math.?500(?!\d)"
    r"|(mt|spec|live.?code).?bench|alpaca.?eval|aime.?2",
    re.IGNORECASE,
)


class _Set(NamedTuple):
    """Where prompts come from."""

    name: str  # as the lines call it
    known: Path | None  # the file of a set of SOURCES; None: the name says which file or hub set


def write_prompts(
    data: Path | None, out: Path, *, files: Names = (), thinking: float | None = None, seed: int = 0
) -> int:
    """Write {source, row, prompt} lines in a seeded order, every prompt once; returns how many.

    The prompts are those of SOURCES below `data`, if that is given, and of `files`: files of JSON,
    or hub data sets as name, name:split or name:config:split. With `thinking`, this share of the
    lines has `thinking` true, the rest false. A row that asks nothing is left out; the number of
    these and the first ones are told on standard error. Raises InvalidParameter or DataError, with
    nothing written, for a set that cannot be used or of which nothing is left.
    """
    known_files = [] if data is None else [data / file for file in SOURCES.values()]
    named_files = [Path(name) for name in files]
    real = output_file(out, inputs=[*known_files, *named_files])
    check_replaceable(real, "prompts", _FIELDS)
    if data is None and not files:
        raise InvalidParameter(
            "no source of prompts",
            hint="name files or hub data sets, or the known sets' folder with --data",
        )
    if thinking is not None:
        check_option("thinking", thinking, float, Allowed(0, 1))
    _refuse_evaluation_sets(files)

    rows = _distinct_rows(_sets(data, files))
    draw = random.Random(seed)
    draw.shuffle(rows)
    if thinking is not None:
        rows = _with_thinking(rows, thinking, draw)

    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    content = "".join(lines).encode()
    inputs = [str(path) for path in known_files] + list(files)
    facts = {"inputs": inputs, "thinking": thinking, "seed": seed}
    write_own(real, {real.name: content}, "prompts", facts)
    return len(rows)


def _refuse_evaluation_sets(names: Names) -> None:
    """Raises InvalidParameter for a file or hub data set that nothing may be trained on."""
    for name in names:
        path = Path(name)
        if path.is_file():
            path = path.resolve()
        told = "/".join(path.parts[-2:])
        if EVALUATION.search(told):
            raise InvalidParameter(
                f"`{name}` is an evaluation set by its name",
                hint="evaluation sets are not trained on",
            )


def _sets(data: Path | None, names: Names) -> list[_Set]:
    sets = []
    if data is not None:
        for source, file in SOURCES.items():
            sets.append(_Set(source, data / file))
    for name in names:
        sets.append(_Set(name, None))
    return sets


def _distinct_rows(sets: Iterable[_Set]) -> list[Row]:
    """Every prompt once, as it is written. Tells what was left out.

    Raises DataError for a set that holds no prompt.
    """
    rows = []
    seen = set()
    left_out = LeftOut("row")
    for each in sets:
        # a file's name may be no text
        source = each.name.encode(errors="backslashreplace").decode()
        own = LeftOut("row")
        count = 0
        for prompt in _prompts(each, own):
            key = json.dumps(prompt)
            if key not in seen:
                seen.add(key)
                rows.append({"source": source, "row": count, "prompt": prompt})
            count += 1

        if not count:
            why = f": {own}" if own.count else ""
            raise DataError(
                f"`{each.name}` holds no prompts{why}",
                hint='leave it out, or give rows such as {"prompt": ...}',
            )
        left_out.join(own)
    left_out.tell()
    return rows


def _with_thinking(rows: list[Row], share: float, draw: random.Random) -> list[Row]:
    """The rows, of which this share is to be answered with thinking."""
    chosen = set(draw.sample(range(len(rows)), round(share * len(rows))))
    marked = []
    for number, row in enumerate(rows):
        marked.append(row | {"thinking": number in chosen})
    return marked


def _prompts(one: _Set, left_out: LeftOut) -> Iterator[Asked]:
    """Those of a set, row by row. Some rows of the sets of SOURCES ask nothing, which is known."""
    for place, row in _rows(one, left_out):
        try:
            prompt = as_prompt(row)
        except ValueError as error:
            is_known_to_be_empty = one.known is not None and isinstance(error, AsksNothing)
            if not is_known_to_be_empty:
                left_out.add(place, error)
            continue
        if one.known is not None and one.name == _MATHS:
            prompt = f"{prompt}{MATHS_SUFFIX}"
        yield prompt


def _rows(one: _Set, left_out: LeftOut) -> Iterator[PlacedRow]:
    """Those of a file, or of a hub data set."""
    path = Path(one.name) if one.known is None else one.known
    if one.known is not None or _is_file(path):
        yield from placed_rows(path, left_out=left_out)
        return
    for number, row in enumerate(hub_rows(one.name), 1):
        yield PlacedRow(f"{one.name}, entry {number}", row)


def _is_file(path: Path) -> bool:
    """Whether a name is a file's: there is one, whatever its ending, or the ending says so."""
    if path.exists() and not path.is_dir():
        return True
    return path.name.endswith(_FILE_ENDINGS)


def hub_rows(name: str) -> Iterable[Any]:
    """The rows of a hub data set, given as name, name:split or name:config:split.

    Raises DataError where the package `datasets` is missing, or cannot load this set.
    """
    parts = re.split(r":(?![^\[]*\])", name)  # a slice, train[:1000], has a colon of its own
    if len(parts) == 1:
        parts.append("train")
    *where, split = parts
    try:
        datasets = import_module("datasets")
        rows: Iterable[object] = datasets.load_dataset(*where, split=split, trust_remote_code=False)
    except ImportError:
        if Path(name).is_dir():
            hint = "name the .jsonl or .json files in it"
            raise DataError(f"`{name}` is a folder", hint=hint) from None
        raise DataError(
            f"`{name}` is no .jsonl or .json file, and hub data sets need the package `datasets`",
            hint="pip install datasets, or name such a file",
        ) from None
    except Exception as error:  # the package raises what its readers do
        cause = " ".join(str(error).split())[:200]
        if not cause:
            cause = type(error).__name__
        raise DataError(
            f"no hub data set `{name}`: {cause}",
            hint="name a .jsonl or .json file, "
            "or a hub data set as name, name:split or name:config:split",
        ) from None
    return rows
