"""Requests without number through one engine, none of whose rows waits for another.

`Model.stream` takes a list, and at its end rows are idle until the longest answer has ended. Here
the next request is taken as soon as there is room for it, so that a file of any length is one
stream. Knows models and requests. Does not know where they are from, nor where answers go.
"""

from collections.abc import Iterable, Iterator

from flashdraft.engine import Engine, Request
from flashdraft.generate import Model
from flashdraft.types import Chunk

__all__ = ["feed"]


def feed(model: Model, requests: Iterable[Request]) -> Iterator[Chunk]:
    """What `Model.stream` yields, in the order in which it comes.

    requests: their indices differ. They are taken one by one, never more than twice the rows ahead
    of what has ended. Raises what `engine.check` raises.
    """
    engine = Engine(
        model.target, model.new_drafter(), max_rows=model.max_rows, control=model.control
    )
    waiting = iter(requests)
    unfinished: set[int] = set()
    try:
        while True:
            while len(unfinished) < 2 * model.max_rows:
                request = next(waiting, None)
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
