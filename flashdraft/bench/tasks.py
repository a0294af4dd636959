"""The benchmark's prompts: fixed entries of public evaluation sets, as one JSON Lines file of
{task, row, prompt or turns}.

A set is a file below the data folder or, where no folder is named, a data set of the Hugging Face
hub. Knows where a set lies and how its entries ask; does not know who answers.
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

__all__ = [
    "TASKS",
    "BenchPrompt",
    "evaluation_texts",
    "named",
    "read_ids",
    "read_prompts",
    "write_tasks",
]

Entry = dict[str, Any]  # a JSON object: of a set, of a prompts file, or of TASKS
Turn = dict[str, str]  # `role` and `content`

_FIELDS = ("task", "row")  # of a line that is written

# task -> `file` below the data folder; `hub`, a data set as name:split or name:config:split, or a
# JSON file in one; `prompt`, made of an entry's fields (without it, an entry has turns);
# `categories`: those of the file's entries that are the task's
_TASKS_FILE = Path(__file__).parents[1] / "assets" / "tasks.json"
TASKS: dict[str, Entry] = json.loads(_TASKS_FILE.read_text(encoding="utf-8"))


class BenchPrompt(NamedTuple):
    """One line of a prompts file."""

    number: int  # among the file's entries, from 0
    task: str
    rank: int  # among its task's entries, from 0
    turns: tuple[str, ...]  # what is asked, one after the other; mostly one
    earlier: tuple[Turn, ...] = ()  # the turns before the first one, of a conversation
    place: str = ""  # in the file, as messages name it

    @property
    def text(self) -> str:
        return self.turns[0]

    @property
    def asked(self) -> str | list[Turn]:
        """The first question, with the turns before it."""
        if not self.earlier:
            return self.text
        return [*self.earlier, {"role": "user", "content": self.text}]


@contextmanager
def named(place: str) -> Iterator[None]:
    """A prompt that is refused inside is named by its place."""
    try:
        yield
    except InvalidPrompt as error:
        raise type(error)(f"{place}: {error.args[0]}", hint=error.hint) from None


# --- writing ------------------------------------------------------------------------------------


def read_ids(path: Path) -> dict[str, list[int]]:
    """The entry numbers of tasks. Raises DataError for a file that is no such table."""
    try:
        table = parse_json(path.read_text(encoding="utf-8-sig"))
        ids = {}
        for task in TASKS:
            if task in table:
                ids[task] = [int(number) for number in table[task]]
        if not ids:
            raise ValueError("none of its keys is a task")
        return ids
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

    data: the folder of the sets; None: they come from the hub. tasks: names, or what stands before
    the slash of several. Raises InvalidParameter for an unknown task, DataError for a set that is
    not there or does not hold what is asked for.
    """
    if first is not None:
        check_option("first", first, int, COUNTS)
    sets = []
    if data is not None:
        sets = [data / table["file"] for table in TASKS.values()]
    real = output_file(out, inputs=sets)
    check_replaceable(real, "tasks", _FIELDS)

    lines: list[str] = []
    for task in _wanted(tasks):
        if task not in ids:
            raise DataError(
                f"no entry numbers for {task}",
                hint="add them to the file of --ids, or leave the task out",
            )
        lines += _lines(task, data, ids[task], first)
    facts = {"data": str(data or "the hub"), "tasks": sorted(tasks), "first": first}
    write_own(real, {real.name: "".join(lines).encode()}, "tasks", facts)
    return len(lines)


def evaluation_texts(data: Path) -> Iterator[str]:
    """What every entry of every set asks, of the sets that lie in this folder.

    Raises DataError where none does.
    """
    found = False
    for task, table in TASKS.items():
        if not (data / table["file"]).is_file():
            continue
        found = True
        for entry in _entries(task, data):
            asked = _asked(entry, table.get("prompt"))
            yield from asked.get("turns") or [asked["prompt"]]
    if not found:
        hint = "name the evaluation sets' folder with --data or FLASHDRAFT_DATA"
        raise DataError(f"`{data}` holds no evaluation set", hint=hint)


def _wanted(tasks: Collection[str]) -> list[str]:
    """Those of TASKS that are named, by themselves or with their set. Raises InvalidParameter."""
    set_names = [_set_of(task) for task in TASKS]
    unknown = set(tasks) - set(TASKS) - set(set_names)
    if unknown:
        raise InvalidParameter(f"no task {min(unknown)!r}", hint=f"tasks are {', '.join(TASKS)}")
    return [task for task in TASKS if task in tasks or _set_of(task) in tasks]


def _set_of(task: str) -> str:
    """What stands before the slash."""
    return task.split("/")[0]


def _lines(
    task: str, data: Path | None, numbers: Sequence[int], first: int | None
) -> Iterator[str]:
    """A task's entries of those numbers, or the first ones of them, as lines of the prompts file.

    All numbers are looked at, first or not.
    """
    entries = _entries(task, data)
    for number in numbers:
        if not 0 <= number < len(entries):
            raise DataError(
                f"{task} has no entry {number}, only {len(entries)}",
                hint="the ids are of another version of it",
            )

    for number in numbers[:first]:
        try:
            asked = _asked(entries[number], TASKS[task].get("prompt"))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"entry {number} of {task} cannot be asked: {error!r}",
                hint="the set is of another version, or damaged: fetch it again",
            ) from None
        yield json.dumps({"task": task, "row": number} | asked, ensure_ascii=False) + "\n"


def _asked(entry: Entry, prompt: str | None) -> Entry:
    """What an entry asks: `prompt` filled in with its fields, or else its own turns."""
    if prompt is None:
        turns = entry.get("turns") or entry["prompt"]
        return {"turns": turns} if len(turns) > 1 else {"prompt": turns[0]}

    texts = {}
    for name, value in entry.items():
        texts[name] = "\n".join(value) if isinstance(value, list) else str(value).rstrip()
    return {"prompt": prompt.format(**texts)}


def _entries(task: str, data: Path | None) -> Sequence[Entry]:
    """All of a task, in the order of its set."""
    rows = _rows(task, data)
    kinds = TASKS[task].get("categories")
    if kinds is None:
        return rows
    return [row for row in rows if row.get("category") in kinds]


def _rows(task: str, data: Path | None) -> Sequence[Entry]:
    """A whole set. Raises DataError where it is not there, or holds something else than objects."""
    hint = "name the evaluation sets' folder with --data or FLASHDRAFT_DATA"
    name = str(TASKS[task].get("hub", ""))
    if data is not None:
        path = data / TASKS[task]["file"]
    elif not name:
        raise DataError(f"the hub has no set for {task}", hint=hint)
    elif name.endswith(".json"):
        path = _fetched(name, hint)
    else:
        return list(hub_rows(name))

    if not path.is_file():
        raise DataError(f"no file `{path}`", hint=hint)
    rows = json_list(path) if path.suffix == ".json" else list(read_jsonl(path))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, entry {number} is no JSON object", hint="fetch it again")
    return rows


def _fetched(name: str, hint: str) -> Path:
    """A file of a data set on the hub, REPOSITORY/FILE."""
    repository, _, file = name.rpartition("/")
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # the hub's client raises what its connection does
        raise DataError(f"cannot fetch `{name}`: {first_line(error)}", hint=hint) from None


# --- reading ------------------------------------------------------------------------------------


class _Questions(NamedTuple):
    turns: tuple[str, ...]  # what is asked, one after the other
    earlier: tuple[Turn, ...] = ()  # the turns before


def read_prompts(path: Path) -> list[BenchPrompt]:
    """Rows that ask something, in any form that `flashdraft prompts` takes, or texts in `turns`.

    `task` groups them, the file's name if it is missing. Raises DataError for a row that asks
    nothing: with fewer prompts a figure would be another one.
    """
    prompts: list[BenchPrompt] = []
    seen: Counter[str] = Counter()
    for place, row in placed_rows(path):
        try:
            asked = _questions(row)
        except ValueError as error:
            raise DataError(
                f"{place}: no text to ask: {error}", hint="mend or remove that row"
            ) from None
        task = str(row.get("task", path.stem))
        number = len(prompts)
        prompts.append(BenchPrompt(number, task, seen[task], asked.turns, asked.earlier, place))
        seen[task] += 1

    if not prompts:
        raise DataError(
            f"`{path}` holds no prompts", hint='a line is {"task": "chat", "prompt": "Hello"}'
        )
    return prompts


def _questions(row: Entry) -> _Questions:
    """What a row asks. Raises ValueError for one that asks nothing."""
    turns = row.get("turns")
    if turns is not None and "prompt" not in row and not _holds_objects(turns):
        if not _holds_texts(turns):
            raise ValueError("`turns` is no list of texts")
        return _Questions(tuple(turns))

    asked = as_prompt(row)
    if isinstance(asked, str):
        return _Questions((asked,))
    question = asked[-1]["content"]
    return _Questions((question,), tuple(asked[:-1]))


def _holds_texts(turns: object) -> bool:
    """Whether it is a list of at least one text, and none of them is blank."""
    if not isinstance(turns, list) or not turns:
        return False
    return all(isinstance(text, str) and text.strip() for text in turns)


def _holds_objects(turns: object) -> bool:
    if not isinstance(turns, list) or not turns:
        return False
    return all(isinstance(turn, dict) for turn in turns)
