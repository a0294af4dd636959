"""The benchmark's prompts: fixed entries of three public evaluation sets, as one JSON Lines file of {task, row, prompt}."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashdraft.checkpoint import write_file
from flashdraft.errors import DataError
from flashdraft.train.prompts import MATHS_SUFFIX, read_jsonl
from flashdraft.types import require

__all__ = ["TASKS", "BenchPrompt", "read_ids", "read_prompts", "write_tasks"]


@dataclass(frozen=True)
class BenchPrompt:
    """One line of a prompts file."""

    number: int  # among the file's entries, from 0
    task: str
    rank: int  # among its task's entries, from 0
    text: str


# task -> file below the data folder, and an entry's prompt; an MT-Bench entry is its first turn
TASKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "gsm8k": ("gsm8k/test.jsonl", lambda row: row["question"] + MATHS_SUFFIX),
    "humaneval": ("humaneval/HumanEval.jsonl.gz", lambda row: _COMPLETE.format(row["prompt"].rstrip())),
    "mt_bench": ("mt_bench/question.jsonl", lambda row: row["turns"][0]),
}
_COMPLETE = "Complete this Python function:\n```python\n{}\n```"


def read_ids(path: Path) -> dict[str, list[int]]:
    """The entry numbers of every task. Raises DataError for a file that is no such table."""
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        return {task: [int(i) for i in ids[task]] for task in TASKS}
    except FileNotFoundError:
        raise DataError(f"no file `{path}`", hint="name recipes/bench_ids.json of the source tree with --ids") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"`{path}` is not a table of entry numbers: {error!r}", hint=f"it needs {', '.join(TASKS)}") from None


def write_tasks(data: Path, out: Path, ids: Mapping[str, Sequence[int]], *, first: int | None = None) -> int:
    """Write the prompts of `ids`, or only each task's first ones; returns how many."""
    require(first is None or first >= 1, "first", first, "1 or more")
    lines = []
    for task, (file, prompt) in TASKS.items():
        if not (data / file).is_file():
            raise DataError(f"no file `{data / file}`", hint="name the evaluation sets' folder with --data or FLASHDRAFT_DATA")
        entries = list(read_jsonl(data / file))
        if beyond := [i for i in ids[task] if not 0 <= i < len(entries)]:
            raise DataError(f"{task} has no entry {beyond[0]}, only {len(entries)}", hint="the ids are of another version of it")
        rows = [{"task": task, "row": i, "prompt": prompt(entries[i])} for i in ids[task][:first]]
        lines += [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, "".join(lines).encode())
    return len(lines)


def read_prompts(path: Path) -> list[BenchPrompt]:
    """Lines with `prompt`, or with `turns`, of which the first is taken; `task` groups them, the file's name if it is missing."""
    prompts, seen = list[BenchPrompt](), Counter[str]()
    for number, row in enumerate(read_jsonl(path)):
        text = row["prompt"] if "prompt" in row else next(iter(row.get("turns") or ()), None)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}, entry {number + 1}: no text in `prompt` or `turns`", hint="mend or remove that line")
        task = str(row.get("task", path.stem))
        prompts.append(BenchPrompt(number, task, seen[task], text))
        seen[task] += 1
    if not prompts:
        raise DataError(f"`{path}` holds no prompts", hint='a line is {"task": "chat", "prompt": "Hello"}')
    return prompts
