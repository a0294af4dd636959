"""The benchmark's prompts: fixed entries of public evaluation sets, as one JSON Lines file of {task, row, prompt or turns}.

A set is a file below the data folder or, where no folder is named, a data set of the Hugging Face hub. Knows where a set lies
and how its entries ask; does not know who answers.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download

from flashdraft.errors import DataError, InvalidParameter, InvalidPrompt, first_line
from flashdraft.files import check_replaceable, output_file, parse_json, write_own
from flashdraft.train.prompts import hub_rows
from flashdraft.train.questions import as_prompt
from flashdraft.train.rows import json_list, placed_rows, read_jsonl
from flashdraft.types import COUNTS, check_option

__all__ = ["TASKS", "BenchPrompt", "named", "read_ids", "read_prompts", "write_tasks"]


_FIELDS = ("task", "row")  # of a line that is written


class BenchPrompt(NamedTuple):
    """One line of a prompts file."""

    number: int  # among the file's entries, from 0
    task: str
    rank: int  # among its task's entries, from 0
    turns: tuple[str, ...]  # what is asked, one after the other; mostly one
    earlier: tuple[dict[str, str], ...] = ()  # the turns before the first one, of a conversation
    place: str = ""  # in the file, as messages name it

    @property
    def text(self) -> str:
        return self.turns[0]

    @property
    def asked(self) -> str | list[dict[str, str]]:
        """The first question, with the turns before it."""
        return (
            [*self.earlier, {"role": "user", "content": self.text}] if self.earlier else self.text
        )


# task -> `file` below the data folder; `hub`, a data set as name:split or name:config:split, or a JSON file in one; `prompt`,
# made of an entry's fields (without it, an entry has turns); `categories`: those of the file's entries that are the task's
TASKS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).parents[1].joinpath("assets/tasks.json").read_text(encoding="utf-8")
)


@contextmanager
def named(place: str) -> Iterator[None]:
    """A prompt that is refused inside is named by its place."""
    try:
        yield
    except InvalidPrompt as error:
        raise type(error)(f"{place}: {error.args[0]}", hint=error.hint) from None


def read_ids(path: Path) -> dict[str, list[int]]:
    """The entry numbers of tasks. Raises DataError for a file that is no such table."""
    try:
        ids = parse_json(path.read_text(encoding="utf-8-sig"))
        if not (found := {task: [int(i) for i in ids[task]] for task in TASKS if task in ids}):
            raise ValueError("none of its keys is a task")
        return found
    except FileNotFoundError:
        raise DataError(
            f"no file `{path}`", hint="name recipes/bench_ids.json of the source tree with --ids"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"`{path}` is not a table of entry numbers: {error!r}",
            hint=f"tasks are {', '.join(TASKS)}",
        ) from None


def write_tasks(
    data: Path | None,
    out: Path,
    ids: Mapping[str, Sequence[int]],
    *,
    tasks: Collection[str] = TASKS,
    first: int | None = None,
) -> int:
    """Write the prompts of `ids`, or only each task's first ones; returns how many.

    data: the folder of the sets; None: they come from the hub. tasks: names, or what stands before the slash of several.
    """
    if first is not None:
        check_option("first", first, int, COUNTS)
    sets = [data / table["file"] for table in TASKS.values()] if data is not None else []
    real = output_file(out, inputs=sets)
    check_replaceable(real, "tasks", _FIELDS)
    if unknown := {*tasks} - {*TASKS, *(task.split("/")[0] for task in TASKS)}:
        raise InvalidParameter(f"no task {min(unknown)!r}", hint=f"tasks are {', '.join(TASKS)}")
    lines = []
    for task in (task for task in TASKS if {task, task.split("/")[0]} & {*tasks}):
        if task not in ids:
            raise DataError(
                f"no entry numbers for {task}",
                hint="add them to the file of --ids, or leave the task out",
            )
        kinds = TASKS[task].get("categories")
        entries = [
            row for row in _rows(task, data) if kinds is None or row.get("category") in kinds
        ]
        if beyond := [i for i in ids[task] if not 0 <= i < len(entries)]:
            raise DataError(
                f"{task} has no entry {beyond[0]}, only {len(entries)}",
                hint="the ids are of another version of it",
            )
        for i in ids[task][:first]:
            try:
                asked = _asked(entries[i], TASKS[task].get("prompt"))
            except (KeyError, TypeError, AttributeError) as error:
                hint = "the set is of another version, or damaged: fetch it again"
                raise DataError(
                    f"entry {i} of {task} cannot be asked: {error!r}", hint=hint
                ) from None
            lines.append(json.dumps({"task": task, "row": i} | asked, ensure_ascii=False) + "\n")
    facts = {"data": str(data or "the hub"), "tasks": sorted(tasks), "first": first}
    write_own(real, {real.name: "".join(lines).encode()}, "tasks", facts)
    return len(lines)


def _asked(row: dict[str, Any], prompt: str | None) -> dict[str, Any]:
    if prompt is not None:
        texts = {
            name: "\n".join(value) if isinstance(value, list) else str(value).rstrip()
            for name, value in row.items()
        }
        return {"prompt": prompt.format(**texts)}
    turns = row.get("turns") or row["prompt"]
    return {"turns": turns} if len(turns) > 1 else {"prompt": turns[0]}


def _rows(task: str, data: Path | None) -> Sequence[dict[str, Any]]:
    hint, name = (
        "name the evaluation sets' folder with --data or FLASHDRAFT_DATA",
        str(TASKS[task].get("hub", "")),
    )
    repo, _, file = name.rpartition("/")
    if data is not None:
        path = data / TASKS[task]["file"]
    elif not name:
        raise DataError(f"the hub has no set for {task}", hint=hint)
    elif not file.endswith(".json"):
        return list(hub_rows(name))
    else:
        try:
            path = Path(hf_hub_download(repo, file, repo_type="dataset"))
        except Exception as error:  # the hub's client raises what its connection does
            raise DataError(f"cannot fetch `{name}`: {first_line(error)}", hint=hint) from None
    if not path.is_file():
        raise DataError(f"no file `{path}`", hint=hint)
    rows = json_list(path) if path.suffix == ".json" else list(read_jsonl(path))
    if odd := [i for i, row in enumerate(rows) if not isinstance(row, dict)]:
        raise DataError(f"{path}, entry {odd[0]} is no JSON object", hint="fetch it again")
    return rows


def read_prompts(path: Path) -> list[BenchPrompt]:
    """Rows that ask something, in any form that `flashdraft prompts` takes, or texts in `turns`.

    `task` groups them, the file's name if it is missing. Raises DataError for a row that asks nothing: with fewer prompts a
    figure would be another one.
    """
    prompts, seen = list[BenchPrompt](), Counter[str]()
    for place, row in placed_rows(path):
        try:
            turns, earlier = _questions(row)
        except ValueError as error:
            raise DataError(
                f"{place}: no text to ask: {error}", hint="mend or remove that row"
            ) from None
        task = str(row.get("task", path.stem))
        prompts.append(BenchPrompt(len(prompts), task, seen[task], turns, earlier, place))
        seen[task] += 1
    if not prompts:
        raise DataError(
            f"`{path}` holds no prompts", hint='a line is {"task": "chat", "prompt": "Hello"}'
        )
    return prompts


def _questions(row: dict[str, Any]) -> tuple[tuple[str, ...], tuple[dict[str, str], ...]]:
    """What a row asks, one after the other, and the turns before. Raises ValueError for one that asks nothing."""
    turns = row.get("turns")
    if turns is not None and "prompt" not in row and not _holds_objects(turns):
        if not (
            isinstance(turns, list)
            and turns
            and all(isinstance(text, str) and text.strip() for text in turns)
        ):
            raise ValueError("`turns` is no list of texts")
        return tuple(turns), ()

    asked = as_prompt(row)
    if isinstance(asked, str):
        return (asked,), ()
    return (asked[-1]["content"],), tuple(asked[:-1])


def _holds_objects(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and all(isinstance(turn, dict) for turn in turns)
