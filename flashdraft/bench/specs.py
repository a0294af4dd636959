"""The names of methods as `bench` reads them: NAME=METHOD:KERNEL, separated by commas.

Paths may hold any of these signs. Knows which methods, kernels and files there are; does not know
how a method runs.
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

    @property
    def is_engine(self) -> bool:
        """Whether it is a function of an engines' file, instead of a method or a drafter."""
        return self.kind.endswith(".py")


def read_specs(methods: str) -> list[Spec]:
    """All of `methods`, in order.

    Raises InvalidParameter for an empty one, and for two of one name.
    """
    specs: dict[str, Spec] = {}  # by name; of the same method twice, one is left
    texts = set()
    pieces = methods.split(",")
    while pieces:
        count = _length_of_first(pieces)
        text = ",".join(pieces[:count]).strip()
        if not text:
            raise InvalidParameter(
                f"methods is {methods!r}",
                hint="methods must be names separated by commas",
                option="methods",
            )
        spec = _read(text)
        specs[spec.name] = spec
        texts.add(text)
        pieces = pieces[count:]

    if len(specs) < len(texts):
        raise InvalidParameter(
            f"two of `{methods}` have one name", hint="write NAME=METHOD with names of their own"
        )
    return list(specs.values())


def parts_of(kind: str) -> list[str]:
    """The methods that one of ours is joined of, trees or not."""
    parts = []
    for part in union_parts(kind, _is_there):
        parts.append(part if Path(part).exists() else _TREE.sub("", part))
    return parts


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
    """How many pieces are the first method: several if a path that is there holds commas."""
    for count in range(len(pieces), 1, -1):
        spec = _read(",".join(pieces[:count]).strip())
        path = spec.variant.partition(":")[2] if spec.is_engine else spec.kind
        if "," in path and Path(path).exists():
            return count
    return 1


def _read(text: str) -> Spec:
    """One method. NAME= is taken for a name, unless the whole text is a path that is there."""
    named, _, rest = text.partition("=")
    whole, _ = _split(text)
    is_named = named and rest and "," not in named
    if is_named and not Path(whole).exists():
        return Spec(named, *_split(rest), text)

    unnamed = text.removeprefix("=")
    return Spec(unnamed, *_split(unnamed), text)


def _split(text: str) -> tuple[str, str]:
    """Method or path, and what stands behind its colon.

    A path may have colons, as a drive's letter on Windows.
    """
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
