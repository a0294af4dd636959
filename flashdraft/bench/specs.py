"""The names of methods as `bench` reads them: NAME=METHOD:KERNEL, separated by commas, where paths may hold any of these signs.

Knows which methods, kernels and files there are. Does not know how a method runs.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from flashdraft.errors import InvalidParameter
from flashdraft.loading import KERNELS, union_parts

__all__ = ["Spec", "names_a_drafter", "parts_of", "read_specs", "tree_of"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TREE = re.compile(r"_tree(\d*)$")
_ENGINE = re.compile(r"(.+?\.py)(?::(.*))?", re.DOTALL)


class Spec(NamedTuple):
    """One method of a run."""

    name: str  # in the results
    kind: str  # the method, a drafter's folder, several joined by +, or an engine's file
    variant: str  # its kernel, or an engine's FUNCTION:TEXT
    text: str  # as it was given


def read_specs(methods: str) -> list[Spec]:
    """All of `methods`, in order. Raises InvalidParameter for an empty one, and for two of one name."""
    pieces = methods.split(",")
    specs: list[Spec] = []
    while pieces:
        count = _length_of_first(pieces)
        text = ",".join(pieces[:count]).strip()
        if not text:
            raise InvalidParameter(
                f"methods is {methods!r}",
                hint="methods must be names separated by commas",
                option="methods",
            )
        specs.append(_read(text))
        pieces = pieces[count:]

    names = {spec.name for spec in specs}
    if len(names) < len({spec.text for spec in specs}):
        raise InvalidParameter(
            f"two of `{methods}` have one name", hint="write NAME=METHOD with names of their own"
        )
    return list({spec.name: spec for spec in specs}.values())


def parts_of(kind: str) -> list[str]:
    """The methods that one of ours is joined of, trees or not."""
    return [
        part if Path(part).exists() else _TREE.sub("", part)
        for part in union_parts(kind, _is_there)
    ]


def tree_of(kind: str, default: int) -> int | None:
    """The nodes of the tree that a method drafts; None: a chain."""
    for part in union_parts(kind, _is_there):
        found = None if Path(part).exists() else _TREE.search(part)
        if found:
            return int(found[1] or default)
    return None


def names_a_drafter(part: str, methods: Collection[str]) -> bool:
    """Whether it is one of the methods, a folder, or may be a hub id."""
    return part in methods or Path(part).is_dir() or _HUB_ID.fullmatch(part) is not None


def _is_there(part: str) -> bool:
    """A path, or one that drafts trees."""
    return Path(part).exists() or Path(_TREE.sub("", part)).exists()


def _length_of_first(pieces: list[str]) -> int:
    """How many pieces are the first method: more than one if a path that is there holds commas."""
    for count in range(len(pieces), 1, -1):
        spec = _read(",".join(pieces[:count]).strip())
        path = spec.variant.partition(":")[2] if spec.kind.endswith(".py") else spec.kind
        if "," in path and Path(path).exists():
            return count
    return 1


def _read(text: str) -> Spec:
    named, _, rest = text.partition("=")
    whole = _split(text)
    if named and rest and "," not in named and not Path(whole[0]).exists():
        return Spec(named, *_split(rest), text)
    name = text if not text.startswith("=") else text.removeprefix("=")
    return Spec(name, *_split(name), text)


def _split(text: str) -> tuple[str, str]:
    """Method or path, and what stands behind its colon; a path may have colons, as a drive's letter on Windows."""
    if Path(text).exists():
        return text, ""
    engine = _ENGINE.fullmatch(text)
    if engine:
        return engine[1], engine[2] or ""

    head, found, tail = text.rpartition(":")
    is_path = "/" in head or "\\" in text or len(head) == 1
    if found and (tail in KERNELS or not is_path):
        return head, tail
    return text, ""
