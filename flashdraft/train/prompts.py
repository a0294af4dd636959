"""Stage 1: training sets, files and hub data sets -> one file of prompts, shuffled once.

What a row asks is found in train/questions.py, how files are read in train/rows.py; a row that cannot be used is left out,
counted and named. Evaluation sets are refused by name; it cannot be seen whether a set of another name holds entries of one.
"""

import json
import random
import re
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from flashdraft.errors import DataError, InvalidParameter
from flashdraft.files import check_replaceable, output_file, write_own
from flashdraft.train.questions import Asked, AsksNothing, as_prompt
from flashdraft.train.rows import LeftOut, json_list, placed_rows, read_jsonl
from flashdraft.types import Allowed, check_option

__all__ = ["SOURCES", "as_prompt", "hub_rows", "json_list", "read_jsonl", "write_prompts"]

# source -> file below the data folder; of gsm8k only the train split
SOURCES: dict[str, str] = json.loads(
    Path(__file__).parents[1].joinpath("assets/sources.json").read_text(encoding="utf-8")
)
Names = Collection[str]
_FIELDS = ("source", "row", "prompt")  # of a line that is written
MATHS_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_FILE_ENDINGS = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
EVALUATION = re.compile(  # searched in a file's folder and name, or in a hub data set's name with its split
    r"gsm8k.*(?<![a-z])test|human.?eval|mbpp|math.?500(?!\d)|(mt|spec|live.?code).?bench|alpaca.?eval|aime.?2",
    re.IGNORECASE,
)


def write_prompts(
    data: Path | None, out: Path, *, files: Names = (), thinking: float | None = None, seed: int = 0
) -> int:
    """Write {source, row, prompt} lines in a seeded order, every prompt once; returns how many.

    The prompts are those of SOURCES below `data`, if that is given, and of `files`: files of JSON, or hub data sets as name,
    name:split or name:config:split. With `thinking`, this share of the lines has `thinking` true, the rest false. A row that
    asks nothing is left out; the number of these and the first ones are told on standard error. Raises InvalidParameter or
    DataError, with nothing written, for a set that cannot be used or of which nothing is left.
    """
    sets = [data / file for file in SOURCES.values()] if data is not None else []
    real = output_file(out, inputs=[*sets, *map(Path, files)])
    check_replaceable(real, "prompts", _FIELDS)
    if data is None and not files:
        raise InvalidParameter(
            "no source of prompts",
            hint="name files or hub data sets, or the known sets' folder with --data",
        )
    if thinking is not None:
        check_option("thinking", thinking, float, Allowed(0, 1))
    for name in files:
        path = Path(name)
        if EVALUATION.search("/".join((path.resolve() if path.is_file() else path).parts[-2:])):
            raise InvalidParameter(
                f"`{name}` is an evaluation set by its name",
                hint="evaluation sets are not trained on",
            )
    left_out = LeftOut("row")
    known: list[tuple[str, Path | None]] = []
    if data is not None:
        known = [(source, data / file) for source, file in SOURCES.items()]
    rows, seen = [], set()
    for source, file in [*known, *((name, None) for name in files)]:
        own, count = LeftOut("row"), 0
        told = source.encode(errors="backslashreplace").decode()  # a file's name may be no text
        for number, prompt in enumerate(_prompts(source, own, file)):
            count += 1
            key = json.dumps(prompt)
            if key not in seen:
                seen.add(key)
                rows.append({"source": told, "row": number, "prompt": prompt})
        if not count:
            why = f": {own}" if own.count else ""
            raise DataError(
                f"`{source}` holds no prompts{why}",
                hint='leave it out, or give rows such as {"prompt": ...}',
            )
        left_out.join(own)
    left_out.tell()
    draw = random.Random(seed)
    draw.shuffle(rows)
    if thinking is not None:
        chosen = set(draw.sample(range(len(rows)), round(thinking * len(rows))))
        rows = [row | {"thinking": number in chosen} for number, row in enumerate(rows)]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    facts = {"inputs": [*(str(path) for path in sets), *files], "thinking": thinking, "seed": seed}
    write_own(real, {real.name: content.encode()}, "prompts", facts)
    return len(rows)


def _prompts(name: str, left_out: LeftOut, known: Path | None = None) -> Iterator[Asked]:
    """Those of a file or hub data set, row by row; some rows of the sets of SOURCES, at `known`, ask nothing."""
    path = known or Path(name)
    if known or _is_file(path):
        rows: Iterator[tuple[str, Any]] = placed_rows(path, left_out=left_out)
    else:
        rows = ((f"{name}, entry {number}", row) for number, row in enumerate(hub_rows(name), 1))
    for place, row in rows:
        try:
            prompt = as_prompt(row)
        except ValueError as error:
            if not (known and isinstance(error, AsksNothing)):
                left_out.add(place, error)
            continue
        yield f"{prompt}{MATHS_SUFFIX}" if known and name == "gsm8k/train" else prompt


def _is_file(path: Path) -> bool:
    """Whether a name is that of a file: there is one, whatever its ending, or the ending says so."""
    return (path.exists() and not path.is_dir()) or path.name.endswith(_FILE_ENDINGS)


def hub_rows(name: str) -> Any:
    parts = re.split(r":(?![^\[]*\])", name)  # a slice, train[:1000], has a colon of its own
    repo, *config, split = parts if len(parts) > 1 else (name, "train")
    try:
        return import_module("datasets").load_dataset(
            repo, *config, split=split, trust_remote_code=False
        )
    except ImportError:
        if Path(name).is_dir():
            raise DataError(
                f"`{name}` is a folder", hint="name the .jsonl or .json files in it"
            ) from None
        message = (
            f"`{name}` is no .jsonl or .json file, and hub data sets need the package `datasets`"
        )
        raise DataError(message, hint="pip install datasets, or name such a file") from None
    except Exception as error:  # the package raises what its readers do
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        hint = "name a .jsonl or .json file, or a hub data set as name, name:split or name:config:split"
        raise DataError(f"no hub data set `{name}`: {cause}", hint=hint) from None
