"""Requests without number through one engine, none of whose rows waits for another.

The next request is taken as soon as there is room for it, so that a file of any length is one
stream. Knows engines and requests. Does not know where they are from, nor where answers go.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING

from flashdraft.engine import Engine, Request
from flashdraft.errors import FlashDraftError
from flashdraft.types import Chunk

if TYPE_CHECKING:
    from flashdraft.generate import Model

__all__ = ["feed", "run"]


def feed(model: "Model", requests: Iterable[Request]) -> Generator[Chunk]:
    """As `run`, by an engine of the model's own, with no more rows than there are requests."""
    rows = model.max_rows
    if isinstance(requests, Sequence):
        rows = min(rows, max(len(requests), 1))
    engine = model.engine(rows)
    try:
        yield from run(engine, requests)
    finally:
        engine.forget_kept()


def run(engine: Engine, requests: Iterable[Request]) -> Generator[Chunk]:
    """Chunks of all requests, in the order in which they come; errors of single ones, too.

    Nothing else may wait or run in the engine. requests: their indices differ. They are taken one
    by one, never more than twice the rows ahead of what has ended, so that they may be without
    number. Raises what `Engine.submit` raises.
    """
    if engine.has_work:
        busy = "another stream of this engine has not ended"
        raise FlashDraftError(busy, hint="read it to its end, or close it, before the next one")
    left = iter(requests)
    unfinished: set[int] = set()
    try:
        while True:
            while len(unfinished) < 2 * engine.max_rows:
                request = next(left, None)
                if request is None:
                    break
                engine.submit(request)
                unfinished.add(request.index)
            if not engine.has_work:
                return

            for chunk in engine.step():
                if chunk.result is not None or chunk.error is not None:
                    unfinished.remove(chunk.index)
                yield chunk
    finally:  # a caller that stops listening frees its rows
        for index in unfinished:
            engine.cancel(index)
