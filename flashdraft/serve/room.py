"""An engine for a server: how much it may hold, and how long it may read prompts at a time.

Knows bytes, measured with the model that is served, and seconds. Does not know requests of
clients, threads or HTTP.
"""

from contextlib import suppress
from pathlib import Path

import torch

from flashdraft.decoding.text import TextDecoder
from flashdraft.engine import Engine, Request
from flashdraft.errors import InvalidParameter
from flashdraft.generate import Model
from flashdraft.process import INTS
from flashdraft.types import SamplingParams

__all__ = ["free_bytes", "new_engine"]

_SPARE = 3  # rows for finished texts to one that may be in use, where they cost what they hold
_SHARE = 0.5  # of the free memory that keys and values may take, where nobody says how much
_UNKNOWN = 4 * 2**30  # bytes, where the system does not tell what is free
_MEMORY = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")
_PAUSE = 0.08  # seconds that running rows may wait for a part of a prompt
_PROBE = 64  # tokens of the prompts with which kernels are built
_TEXTS = 2
_BEHIND = 576  # slots behind the context: of a proposal, and of a part that lies beside others


def new_engine(model: Model, max_rows: int, cache_bytes: int | None = None) -> Engine:
    """An engine whose caches hold `cache_bytes` of keys and values; None: half of what is free.

    It has run some texts already, so that kernels are built. Raises InvalidParameter where there is
    room for no text.
    """
    in_memory = _lies_in_memory(model)
    engine = model.engine(max_rows, spare=_SPARE * max_rows if in_memory else 0)
    engine.scheduler.pause = _PAUSE
    engine.scheduler.chunk = _PROBE
    for token in range(_TEXTS):
        _run(model, engine, token)
    engine.forget_kept()

    nbytes = int(free_bytes(model) * _SHARE) if cache_bytes is None else cache_bytes
    of_rows = engine.row_nbytes * engine.scheduler.num_rows
    max_tokens = (nbytes - of_rows) // engine.token_nbytes
    if max_tokens <= _PROBE:
        least = of_rows + engine.token_nbytes * 2 * _PROBE
        got = f"cache_bytes is {nbytes}, and a token takes {engine.token_nbytes}"
        hint = f"give {least} or more"
        if of_rows > 0:
            got += f", the rows' running states {of_rows}"
            hint += ", or fewer --max-rows"
        raise InvalidParameter(got, hint=hint, option="cache_bytes")

    context = model.target.context_length
    num_rows = engine.scheduler.num_rows
    engine.scheduler.max_tokens = min(max_tokens, num_rows * (context + _BEHIND))
    if in_memory:
        engine.prepare(context + _BEHIND)  # takes room only as it is written
    else:
        engine.scheduler.longest = max_tokens // max_rows
    return engine


def free_bytes(model: Model) -> int:
    """What is free where the model lies."""
    device = _device(model)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    free = _UNKNOWN
    with suppress(OSError, ValueError, StopIteration):  # only Linux tells
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        free = int(available.split()[1]) * 1024
    with suppress(OSError, ValueError):  # a container may have less
        limit = int((_CONTAINER / "memory.max").read_text(encoding="ascii"))
        used = int((_CONTAINER / "memory.current").read_text(encoding="ascii"))
        free = min(free, max(limit - used, 0))
    return free


def _lies_in_memory(model: Model) -> bool:
    return _device(model).type == "cpu" and not model.target.static_cache


def _device(model: Model) -> torch.device:
    one = torch.zeros(1, **INTS)
    return model.target.embed(one).device


def _run(model: Model, engine: Engine, token: int) -> None:
    """Let a text run that nobody sees."""
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    length = min(_PROBE, model.target.context_length - params.max_new_tokens)
    engine.submit(Request([token] * length, params, TextDecoder(model.tokenizer), drafting="on"))
    while engine.has_work:
        engine.step()
