"""Methods of one object that are other functions for a while, and nothing left of it behind.

Knows how torch and accelerate call a module. Does not know diffusion.
"""

import functools
from collections.abc import Callable
from typing import Any

from flashdraft.errors import InvalidParameter

__all__ = ["Mark", "Patch", "called_name"]

_MARK = "_flashdraft"


class Patch:
    """function(original, *args, **kwargs) is called in the method's place."""

    def __init__(self, owner: object, name: str, function: Callable[..., object]) -> None:
        self.owner = owner
        self._name = name
        self._had_own = name in owner.__dict__
        original = getattr(owner, name)
        self.original = original

        @functools.wraps(original)
        def call(*args: object, **kwargs: object) -> Any:
            return function(original, *args, **kwargs)

        self._call = call
        owner.__dict__[name] = call

    @property
    def is_in_place(self) -> bool:
        """Whether it is what is called: others patch methods, too, and take their patches back."""
        return self.owner.__dict__.get(self._name) is self._call

    def undo(self) -> None:
        if not self.is_in_place:
            return
        if self._had_own:
            self.owner.__dict__[self._name] = self.original
        else:
            del self.owner.__dict__[self._name]


def called_name(module: object) -> str:
    """The name of what torch calls where the module is called."""
    is_compiled = module.__dict__.get("_compiled_call_impl") is not None  # by its `compile`
    return "_compiled_call_impl" if is_compiled else "forward"


def is_marked(owner: object) -> bool:
    """Whether its methods are patched."""
    return _MARK in owner.__dict__


class Mark:
    """Says in an object's `__dict__` that its methods are patched. A copy would call the methods of
    what it was copied from: making one is refused."""

    def __init__(self, owner: object) -> None:
        """Raises InvalidParameter where one is already there."""
        if is_marked(owner):
            raise InvalidParameter(
                "this pipe is in another SpeculativeDiffusion context",
                hint="leave that one first",
                option="pipe",
            )
        self._owner = owner
        owner.__dict__[_MARK] = self

    @property
    def is_in_place(self) -> bool:
        return self._owner.__dict__.get(_MARK) is self

    def undo(self) -> None:
        if self.is_in_place:
            del self._owner.__dict__[_MARK]

    def __deepcopy__(self, memo: dict[int, object]) -> "Mark":
        raise self._refusal()

    def __reduce_ex__(self, protocol: object) -> Any:
        raise self._refusal()

    def _refusal(self) -> InvalidParameter:
        return InvalidParameter(
            f"a {type(self._owner).__name__} in a SpeculativeDiffusion context can't be copied",
            hint="leave the context first; save_pretrained works in it",
            option="pipe",
        )
