"""A file of JSON Lines that grows: what was appended is on the disk before the next line is made.

A process may be killed at any moment and leave half a line at the end; it is cut off when the next
one is appended. Knows lines, endings and halves. Does not know what a line says, nor whose it is.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["GrowingFile", "HeldLine"]

_BLOCK = 1 << 20  # bytes that are read at a time, from the end


class HeldLine(NamedTuple):
    number: int  # from 1, blank ones counted
    content: bytes  # without its ending


class GrowingFile:
    """The file at `path`, which may be missing. Nothing is changed before `append` or `mend`.

    before_first: called once, right before the first change: the place to leave a note.
    """

    def __init__(self, path: Path, before_first: Callable[[], None]) -> None:
        self.path = path
        self._before_first = before_first
        self._size = path.stat().st_size if path.exists() else 0
        tail = _tail(path) if self._size else b""
        self.torn = b"" if _is_json(tail) else tail  # at the end: a kill may leave half a line
        self._lacks_ending = bool(tail) and not self.torn
        self._ending = _first_ending(path) if self._size else b"\n"
        self._is_mended = False

    @property
    def is_empty(self) -> bool:
        return self._size == 0

    def lines(self) -> Iterator[HeldLine]:
        """The whole lines that the file held when it was opened, without blank ones."""
        if self.is_empty:
            return
        left = self._size - len(self.torn)
        number = 0
        with self.path.open("rb") as file:
            while left > 0:
                raw = file.readline(left)
                left -= len(raw)
                for line in raw.splitlines():  # old returns (\r) divide lines, too
                    number += 1
                    if line.strip():
                        yield HeldLine(number, line)

    def append(self, line: Mapping[str, object]) -> None:
        """Write one line; it is on the disk when this returns."""
        content = json.dumps(line, ensure_ascii=False).encode() + self._ending
        self.mend()
        with self.path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def mend(self) -> None:
        """Make the file if it is missing, cut off half a line, end a whole one."""
        if self._is_mended:
            return
        self._is_mended = True
        self._before_first()
        with self.path.open("ab") as file:
            if self.torn:
                file.truncate(self._size - len(self.torn))
            elif self._lacks_ending:
                file.write(self._ending)


def _tail(path: Path) -> bytes:
    """What stands behind the last line's end."""
    tail = b""
    with path.open("rb") as file:
        place = file.seek(0, os.SEEK_END)
        while place > 0:
            size = min(_BLOCK, place)
            place -= size
            file.seek(place)
            tail = file.read(size) + tail
            last_ending = max(tail.rfind(b"\n"), tail.rfind(b"\r"))
            if last_ending >= 0:
                return tail[last_ending + 1 :]
    return tail


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _first_ending(path: Path) -> bytes:
    with path.open("rb") as file:
        return b"\r\n" if file.readline().endswith(b"\r\n") else b"\n"
