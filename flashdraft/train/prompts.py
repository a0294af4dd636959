"""Stage 1: training sets, files and hub data sets -> one file of prompts, shuffled once.

A row is a conversation (`messages`, or ShareGPT's `conversations`), a `question`, an `instruction` with its `input`, or a
`prompt`. Evaluation sets are refused by name; it cannot be seen whether a set of another name holds entries of one.
"""

import gzip
import json
import random
import re
import zlib
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from flashdraft.errors import DataError, InvalidParameter
from flashdraft.files import write_file
from flashdraft.types import require

__all__ = ["SOURCES", "as_prompt", "hub_rows", "json_list", "numbered_lines", "read_jsonl", "write_prompts"]

# source -> file below the data folder; of gsm8k only the train split
SOURCES: dict[str, str] = json.loads(Path(__file__).parents[1].joinpath("assets/sources.json").read_text(encoding="utf-8"))
Names = Collection[str]
MATHS_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
FORMS = ("messages", "conversations", "question", "instruction", "prompt")  # a row's field; the first one that it has counts
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
EVALUATION = re.compile(  # searched in a file's folder and name, or in a hub data set's name with its split
    r"gsm8k.*(?<![a-z])test|human.?eval|mbpp|math.?500(?!\d)|(mt|spec|live.?code).?bench|alpaca.?eval|aime.?2", re.IGNORECASE
)


def read_jsonl(path: Path, keys: Names = ()) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file. Raises DataError naming the line that is none, or that lacks one of `keys`."""
    return (row for _, row in numbered_lines(path, keys))


def numbered_lines(path: Path, keys: Names = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same, each with the number of its line, from 1."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    wrong = [f"no field `{k}`" for k in keys if k not in row] if isinstance(row, dict) else ["not a JSON object"]
                except ValueError as error:
                    wrong = [f"not valid JSON ({error})"]
                if wrong:
                    raise DataError(f"{path}, line {number}: {wrong[0]}", hint="mend or remove that line")
                yield number, row
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"no file `{path}`", hint="give the path of a .jsonl file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason})", hint="save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"`{path}` cannot be read: {error}", hint="fetch it again") from None


def write_prompts(data: Path | None, out: Path, *, files: Names = (), thinking: float | None = None, seed: int = 0) -> int:
    """Write {source, row, prompt} lines in a seeded order, every prompt once; returns how many.

    The prompts are those of SOURCES below `data`, if that is given, and of `files`: .jsonl and .json files, or hub
    data sets as name, name:split or name:config:split. With `thinking`, this share of the lines has `thinking` true, the rest
    false. Raises InvalidParameter or DataError, with nothing written, for a set that cannot be used and for a bad row.
    """
    if data is None and not files:
        raise InvalidParameter("no source of prompts", hint="name files or hub data sets, or the known sets' folder with --data")
    require(thinking is None or 0 <= thinking <= 1, "thinking", thinking, "a share from 0 to 1")
    for name in files:
        path = Path(name)
        if EVALUATION.search("/".join((path.resolve() if path.is_file() else path).parts[-2:])):
            raise InvalidParameter(f"`{name}` is an evaluation set by its name", hint="evaluation sets are not trained on")
    asked = [] if data is None else [(source, _prompts(source, data / file)) for source, file in SOURCES.items()]
    rows, seen = [], set()
    for source, prompts in asked + [(name, _prompts(name)) for name in files]:
        number = None
        for number, prompt in enumerate(prompts):
            if prompt and (key := json.dumps(prompt)) not in seen:
                seen.add(key)
                rows.append({"source": source, "row": number, "prompt": prompt})
        if number is None:
            raise DataError(f"`{source}` holds no prompts", hint="leave it out, or fetch it again")
    draw = random.Random(seed)
    draw.shuffle(rows)
    if thinking is not None:
        chosen = set(draw.sample(range(len(rows)), round(thinking * len(rows))))
        rows = [row | {"thinking": number in chosen} for number, row in enumerate(rows)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return len(rows)


def as_prompt(row: Any) -> str | list[dict[str, str]]:
    """What a row asks: text, or a conversation of several turns. Raises ValueError saying why it asks nothing.

    A conversation ends with its last user turn: what an assistant said before is context, and its last word is the target's.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    form = next((form for form in FORMS if row.get(form) is not None), None)
    if form is None:
        raise ValueError(f"none of the fields {', '.join(FORMS)}")
    value: str | list[dict[str, str]] = row[form]
    if form in ("messages", "conversations") or isinstance(value, list):
        value = _conversation(value)
    elif not isinstance(value, str):
        raise ValueError(f"`{form}` is no text")
    elif form == "instruction":
        value = _instruction(row)
    if not (value if isinstance(value, str) else value[-1]["content"]).strip():
        raise _AsksNothing("the prompt is empty")
    json.dumps(value, ensure_ascii=False).encode()  # half a character is a ValueError too
    return value


class _AsksNothing(ValueError): ...


def _conversation(turns: Any) -> str | list[dict[str, str]]:
    try:
        told = [(ROLES[turn.get("role", turn.get("from"))], turn.get("content", turn.get("value"))) for turn in turns]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"not a list of turns, each from one of {', '.join(ROLES)}") from None
    while told and told[-1][0] != "user":
        told.pop()
    if not told:
        raise ValueError("the conversation has no user turn")
    if not all(isinstance(content, str) for _, content in told):
        raise ValueError("a turn's content is no text")
    return told[0][1] if len(told) == 1 else [{"role": role, "content": content} for role, content in told]


def _instruction(row: dict[str, Any]) -> str:
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and instances else None
    extra = row.get("input") or (first.get("input") if isinstance(first, dict) else None)
    return "\n".join(part for part in (str(row["instruction"]).strip(), str(extra or "").strip()) if part)


def _prompts(name: str, known: Path | None = None) -> Iterator[str | list[dict[str, str]]]:
    """Those of a file or hub data set, row by row; some rows of the sets of SOURCES, at `known`, ask nothing."""
    path, unit = known or Path(name), "entry"
    if path.suffix == ".jsonl":
        rows, unit = numbered_lines(path), "line"
    else:
        rows = enumerate(json_list(path) if path.suffix == ".json" else hub_rows(name), 1)
    for number, row in rows:
        try:
            prompt = as_prompt(row)
            yield f"{prompt}{MATHS_SUFFIX}" if known and name == "gsm8k/train" else prompt
        except ValueError as error:
            if not (known and isinstance(error, _AsksNothing)):
                raise DataError(f"{known or name}, {unit} {number}: {error}", hint=f"mend or remove that {unit}") from None


def json_list(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        hint = "name a .jsonl or .json file, or the folder of the training sets with --data or FLASHDRAFT_DATA"
        raise DataError(f"no file `{path}`", hint=hint) from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})", hint="mend it, or fetch it again") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: not a JSON list", hint="save one row a line as .jsonl, or fetch it again")
    return rows


def hub_rows(name: str) -> Any:
    parts = re.split(r":(?![^\[]*\])", name)  # a slice, train[:1000], has a colon of its own
    repo, *config, split = parts if len(parts) > 1 else (name, "train")
    try:
        return import_module("datasets").load_dataset(repo, *config, split=split)
    except ImportError:
        message = f"`{name}` is no .jsonl or .json file, and hub data sets need the package `datasets`"
        raise DataError(message, hint="pip install datasets, or name such a file") from None
    except Exception as error:  # the package raises what its readers do
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        hint = "name a .jsonl or .json file, or a hub data set as name, name:split or name:config:split"
        raise DataError(f"no hub data set `{name}`: {cause}", hint=hint) from None
