"""A server from its options to its last log line: what `flashdraft serve` runs."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from flashdraft.generate import Model
from flashdraft.serve import logs
from flashdraft.serve.app import Options, make_app
from flashdraft.serve.options import ServeOptions
from flashdraft.serve.server import Server, listen, run, url_of
from flashdraft.serve.translate import Settings
from flashdraft.serve.worker import Limits, Worker

__all__ = ["serve"]


def serve(
    load: Callable[..., Model], target: str, keys: Sequence[bytes], options: ServeOptions
) -> None:
    """Listen, load the model, and answer until a signal comes.

    Raises FlashDraftError for an address that is taken, and what `load` raises.
    """
    listening = listen(options.host, options.port)
    writer = logs.start(options.log_level)
    limits = Limits(
        options.max_rows,
        options.queue,
        cache_bytes=options.cache_bytes,
        timeout=options.request_timeout,
    )
    worker = Worker(partial(load, max_rows=options.max_rows), limits)
    worker.metrics.lost_lines.set_function(lambda: writer.num_lost)

    name = options.served_model_name or _name_of(target)
    told = Options(
        model_name=name,
        keys=tuple(keys),
        max_body_bytes=options.max_body_bytes,
        cors_origins=options.cors_origin,
        settings=Settings(max_tokens=options.default_max_tokens),
    )
    ready = f"{name} is served at {url_of(listening)}"
    server = Server(
        make_app(worker, told),
        worker,
        drain_timeout=options.drain_timeout,
        on_ready=partial(_announce, ready),
    )
    try:
        run(server, listening)
    finally:
        listening.close()
        writer.finish()


def _name_of(target: str) -> str:
    """A folder or file is called by its own name, whatever lies above it."""
    return Path(target).resolve().name if Path(target).exists() else target


def _announce(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError:  # a full disk, a closed pipe: nobody reads it, and the server goes on
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
