"""Stage 1: public training sets -> one file of prompts, shuffled once. Evaluation sets are refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flashdraft.checkpoint import write_file
from flashdraft.errors import DataError, InvalidParameter

__all__ = ["SOURCES", "read_jsonl", "write_prompts"]

# source -> file below the data folder; of gsm8k only the train split
SOURCES = {
    "gsm8k/train": "gsm8k/train.jsonl",
    "gpteacher/codegen": "gpteacher/codegen-instruct.json",
    "gpteacher/roleplay": "gpteacher/roleplay-similarity_0.6-instruct-dataset.json",
    "self_instruct/seed": "self_instruct/seed_tasks.jsonl",
    "self_instruct/user": "self_instruct/user_oriented_instructions.jsonl",
}
MATHS_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def read_jsonl(path: Path, keys: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file. Raises DataError naming the line that is none, or that lacks one of `keys`."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: not valid JSON ({error})", hint="mend or remove that line") from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: not a JSON object", hint="mend or remove that line")
                if lacking := [key for key in keys if key not in row]:
                    raise DataError(f"{path}, line {number}: no field `{lacking[0]}`", hint="mend or remove that line")
                yield row
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"no file `{path}`", hint="give the path of a .jsonl file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason})", hint="save it as UTF-8") from None


def write_prompts(data: Path, out: Path, *, sources: Sequence[str] = tuple(SOURCES), seed: int = 0) -> int:
    """Write {source, row, prompt} lines of the named sources in a seeded order; returns how many."""
    if unknown := [source for source in sources if source not in SOURCES]:
        raise InvalidParameter(
            f"no training set `{unknown[0]}`", hint=f"there are {', '.join(SOURCES)}; evaluation sets are not trained on"
        )
    rows, seen = [], set()
    for source in sources:
        for number, row in enumerate(_rows(data / SOURCES[source])):
            try:
                prompt = _prompt(source, row)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                place = f"{data / SOURCES[source]}, entry {number + 1}"
                raise DataError(f"{place}: not of this set's form ({error!r})", hint="fetch the file again") from None
            if prompt and prompt not in seen:
                seen.add(prompt)
                rows.append({"source": source, "row": number, "prompt": prompt})
    random.Random(seed).shuffle(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return len(rows)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no file `{path}`", hint="name the folder of the training sets with --data or FLASHDRAFT_DATA") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})", hint="fetch it again") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: not a JSON list", hint="fetch it again")
    yield from rows


def _prompt(source: str, row: dict[str, Any]) -> str:
    if source == "gsm8k/train":
        return str(row["question"]) + MATHS_SUFFIX
    extra = row.get("input") or (row["instances"][0]["input"] if row.get("instances") else "")
    return "\n".join(part for part in (str(row["instruction"]).strip(), str(extra).strip()) if part)
