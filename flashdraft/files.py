"""What appears whole or not at all, and what may be written over.

Nothing that a command did not write itself is overwritten, cut or appended to. A command knows its
own files by the note that it leaves beside them, `NAME.run.json`: which command wrote the file, of
what, and the checksum where it was written whole. Knows files, folders and notes. Does not know
what a note's facts mean, nor which command writes them.
"""

import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from flashdraft.errors import DataError, FlashDraftError, InvalidParameter

__all__ = [
    "Facts",
    "Json",
    "appears_whole",
    "check_facts",
    "check_replaceable",
    "locked",
    "note_path",
    "output_file",
    "output_folder",
    "parse_json",
    "read_note",
    "say",
    "write_file",
    "write_note",
    "write_own",
    "write_tensors",
]

Json = dict[str, Any]  # a JSON object

# What made an output, by name; a thing with weights is {"name": ..., "id": ... or None}.
Facts = Mapping[str, Any]
_SCRATCH = ".tmp-"
_ANOTHER = "name another one, or remove it"
_OTHERWISE = "go on with what it was made with, or name another output"


@contextmanager
def appears_whole(path: Path, scratch: str = _SCRATCH) -> Iterator[Path]:
    """Where to write the file or the folder that shall appear at `path`, whole or not at all.

    Its parent is a scratch folder, whose name begins with `scratch`. A link is written through, and
    a file that is replaced keeps its permissions.
    """
    path = Path(os.path.realpath(path))
    scratch_folder = tempfile.TemporaryDirectory(
        prefix=scratch, dir=path.parent, ignore_cleanup_errors=True
    )
    with scratch_folder as folder:
        made = Path(folder) / path.name
        yield made

        mode = _mode_of(path, Path(folder))
        written = list(made.iterdir()) if made.is_dir() else [made]
        for each in written:
            os.chmod(each, mode)  # save_file's are private
            with each.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(made, path)


def _mode_of(path: Path, scratch: Path) -> int:
    """The permissions of the file at `path`, or those that a new file gets in this process."""
    if path.is_file():
        return stat.S_IMODE(path.stat().st_mode)
    probe = scratch / ".mode"
    probe.touch()
    return stat.S_IMODE(probe.stat().st_mode)


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    with appears_whole(path) as made:
        made.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file so that it appears whole or not at all."""
    with appears_whole(path) as made:
        save_file(dict(tensors), made, metadata={"format": "pt"})


def output_file(path: Path, *, inputs: Iterable[Path] = ()) -> Path:
    """The real file behind `path`, links followed, where a text may be written.

    Nothing is made yet. Raises InvalidParameter for a folder, a device or a pipe, for one of the
    command's own `inputs`, for a path that no folder can hold, and for a name that promises a
    compressed file. Whose the file is, the other functions say.
    """
    if path.suffix == ".gz":
        hint = f"name it {path.stem}, and compress it afterwards"
        raise InvalidParameter(f"`{path}` would be plain text, not gzip", hint=hint)
    if path.is_dir():
        raise InvalidParameter(f"`{path}` is a folder", hint="name a file in it")
    if path.exists() and not path.is_file():
        hint = "name a file that can be written again"
        raise InvalidParameter(f"`{path}` is a device or a pipe, not a file", hint=hint)
    _check_name(path)
    _check_inputs(path, inputs)
    _check_room(path)
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        hint = "name another file, or remove the link"
        raise InvalidParameter(f"`{path}` is a link that leads nowhere", hint=hint)
    return real


def output_folder(path: Path, *, inputs: Iterable[Path] = ()) -> Path:
    """The real folder behind `path`, links followed, which may be there or not.

    Nothing is made yet. Raises InvalidParameter.
    """
    if path.exists() and not path.is_dir():
        raise InvalidParameter(f"`{path}` is a file, not a folder", hint="name a folder")
    _check_name(path)
    _check_inputs(path, inputs)
    _check_room(path)
    return Path(os.path.realpath(path))


def _check_name(path: Path) -> None:
    """Raises InvalidParameter for what stands for another place.

    A shell leaves the ~ of --out=~/name as it is.
    """
    if path.parts[:1] == ("~",) and not os.path.lexists("~"):
        hint = "write it out, or put a space before the ~"
        raise InvalidParameter(f"`{path}` would make a folder called ~", hint=hint)
    if path.parts == ("-",):
        got = "`-` is standard output, where no file can appear whole"
        raise InvalidParameter(got, hint="name a file")


def _check_inputs(path: Path, inputs: Iterable[Path]) -> None:
    for source in inputs:
        if _is_same(path, source):
            got = f"`{path}` is read and would be written over"
            raise InvalidParameter(got, hint="name another output")


def _is_same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def _check_room(path: Path) -> None:
    """Raises InvalidParameter where no file can appear at `path`.

    The folders above it are not there and cannot be made, or cannot be written into.
    """
    above = Path(os.path.realpath(path)).parent
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if not above.is_dir():
        got = f"`{path}` cannot be made: `{above}` is no folder"
        raise InvalidParameter(got, hint="name another output")
    if not os.access(above, os.W_OK | os.X_OK):
        got = f"`{path}` cannot be written: `{above}` is not yours to write into"
        raise InvalidParameter(got, hint="name another output")


def note_path(path: Path) -> Path:
    """Of the note beside an output file."""
    return path.with_name(f"{path.name}.run.json")


def read_note(path: Path) -> dict[str, Any] | None:
    """What the note beside the output file `path` says; None without one.

    Raises InvalidParameter for a foreign file there.
    """
    note = note_path(path)
    if not os.path.lexists(note):
        return None
    try:
        facts = json.loads(note.read_text(encoding="utf-8"))
        if isinstance(facts, dict) and isinstance(facts.get("made_by"), str):
            return facts
    except (OSError, ValueError):
        pass
    message = f"`{note}`, where the note of `{path.name}` belongs, was not written by flashdraft"
    raise InvalidParameter(message, hint="move it, or name another output")


def write_note(path: Path, made_by: str, facts: Facts) -> None:
    """Leave the note beside the output file `path`: the command that wrote it, and of what."""
    content = json.dumps({"made_by": made_by, **facts}, indent=2) + "\n"
    write_file(note_path(path), content.encode())


def check_facts(path: Path, noted: Facts, now: Facts, hint: str = _OTHERWISE) -> None:
    """Raises DataError for the first fact that is known on both sides and differs.

    It names the fact and both values.
    """
    for name, value in now.items():
        held = noted.get(name)
        if isinstance(value, Mapping) and "id" not in value and isinstance(held, Mapping):
            check_facts(path, held, value, hint)
        elif value is not None and held is not None and not _agree(held, value):
            got = f"`{path}` was made with {name} {_told(held)}, not {_told(value)}"
            raise DataError(got, hint=hint)


def _agree(held: object, value: object) -> bool:
    """Whether two values of a fact mean the same.

    Things with weights are the same where these are, whatever they are called; the others where
    their names are.
    """
    if not (isinstance(held, Mapping) and isinstance(value, Mapping)):
        return bool(held == value)
    if held.get("id") is not None and value.get("id") is not None:
        return bool(held["id"] == value["id"])
    return bool(held.get("name") == value.get("name"))


def _told(value: object) -> str:
    if not isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    known = f" (weights {str(value['id'])[:8]})" if value.get("id") else ""
    return f"`{value.get('name')}`{known}"


def check_replaceable(path: Path, made_by: str, fields: Iterable[str]) -> None:
    """Raises InvalidParameter where `path` surely is not what this command once wrote whole.

    By its note, or by its first line. fields: of a line of this command's. What an earlier version
    wrote without a note, `write_own` accepts if it would not change.
    """
    note = read_note(path)
    if not path.exists() or not path.stat().st_size:
        return
    if note is None:
        _check_first_line(path, made_by, fields)
    else:
        _check_noted(path, made_by, note)


def _check_first_line(path: Path, made_by: str, fields: Iterable[str]) -> None:
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(file.readline())
    except ValueError:
        row = None
    if not isinstance(row, dict) or not set(fields) <= row.keys():
        raise _foreign(path, made_by)


def _check_noted(path: Path, made_by: str, note: Facts) -> None:
    if note["made_by"] != made_by:
        got = f"`{path}` was written by `flashdraft {note['made_by']}`"
        raise InvalidParameter(got, hint=_ANOTHER)
    if note.get("files", {}).get(path.name) != _sha256(path):
        got = f"`{path}` was changed since `flashdraft {made_by}` wrote it"
        raise InvalidParameter(got, hint=_ANOTHER)


def _foreign(path: Path, made_by: str) -> FlashDraftError:
    return InvalidParameter(f"`{path}` was not written by `flashdraft {made_by}`", hint=_ANOTHER)


def write_own(main: Path, contents: Mapping[str, bytes], made_by: str, facts: Facts) -> None:
    """Write files by name into the folder of the output `main`, and their note last.

    Over nothing but this command's own.
    """
    note = read_note(main)
    for name, content in contents.items():
        path = output_file(main.parent / name)
        if not path.exists() or not path.stat().st_size or path.read_bytes() == content:
            continue
        if note is None or name not in note.get("files", {}):
            raise _foreign(path, made_by)
        _check_noted(path, made_by, note)

    main.parent.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_file(main.parent / name, content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    held = note.get("files", {}) if note is not None else {}
    write_note(main, made_by, {**facts, "files": held | sums})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While it is held, no other process writes the same output, a file or a folder.

    The folders above, which are made if need be, are gone afterwards if nothing was written into
    them. Raises InvalidParameter where another process writes it.
    """
    name = path.parent / f".{path.name}.lock"
    if name.exists() and (not name.is_file() or name.stat().st_size):
        got = f"`{name}`, which would lock `{path}`, was not written by flashdraft"
        raise InvalidParameter(got, hint="move it away")

    missing = [above for above in name.parents if not above.exists()]  # innermost first
    name.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is mounted may be all that is ours.
    if not os.access(name.parent, os.W_OK | os.X_OK):
        yield
        return

    lock = FileLock(name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        hint = "wait for it, or name another output"
        raise InvalidParameter(f"another process is writing `{path}`", hint=hint) from None
    try:
        yield
    finally:
        with suppress(OSError):  # an open file cannot be removed everywhere; it is empty
            name.unlink()
        lock.release()
        with suppress(OSError):
            for above in missing:
                above.rmdir()


def say(text: str) -> None:
    """One line for the user on standard error, where there is one."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises ValueError, also for one that nests deeper than Python's stack.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None
