"""An engine for a server: how much it may hold, and how much of a prompt it reads at a time.

Knows bytes and seconds, both measured with the model that is served. Does not know requests of
clients, threads or HTTP.
"""

import os
import time
from contextlib import suppress

import torch

from flashdraft.decoding.text import TextDecoder
from flashdraft.engine import Engine, Request
from flashdraft.errors import InvalidParameter
from flashdraft.generate import Model
from flashdraft.types import SamplingParams

__all__ = ["free_bytes", "new_engine"]

_SHARE = 0.5  # of the free memory that keys and values may take, where nobody says how much
_UNKNOWN = 4 * 2**30  # bytes, where the system does not tell what is free
_PAUSE = 0.08  # seconds that running rows may wait for a part of a prompt, behind a short context
_PROBE = 64  # tokens of the prompts that are measured
_STEP = 16  # a part of a prompt is a multiple of this
_LONGEST = 512  # and no longer, however quick the machine
_BEHIND = 576  # slots behind the context: of a proposal, and of a part that lies beside others


def new_engine(model: Model, max_rows: int, cache_bytes: int | None = None) -> Engine:
    """An engine whose caches hold `cache_bytes` of keys and values; None: half of what is free.

    It has run two texts already, so that kernels are built. Raises InvalidParameter where there is
    room for no text.
    """
    engine = model.engine(max_rows)
    _run(model, engine, token=1)
    seconds = _run(model, engine, token=2)
    engine.forget_kept()

    wanted = int(_PAUSE / seconds) // _STEP * _STEP
    engine.scheduler.chunk = min(max(wanted, _STEP), _LONGEST)

    nbytes = int(free_bytes(model) * _SHARE) if cache_bytes is None else cache_bytes
    max_tokens = nbytes // engine.token_nbytes
    if max_tokens <= _PROBE:
        least = engine.token_nbytes * 2 * _PROBE
        got = f"cache_bytes is {nbytes}, and a token takes {engine.token_nbytes}"
        raise InvalidParameter(got, hint=f"give {least} or more", option="cache_bytes")

    context = model.target.context_length
    engine.scheduler.max_tokens = min(max_tokens, max_rows * (context + _BEHIND))
    if _lies_in_memory(model):
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
    with suppress(OSError, ValueError, AttributeError):  # Windows and macOS do not tell
        pages = os.sysconf("SC_AVPHYS_PAGES")
        return pages * os.sysconf("SC_PAGE_SIZE")
    return _UNKNOWN


def _lies_in_memory(model: Model) -> bool:
    return _device(model).type == "cpu" and not model.target.static_cache


def _device(model: Model) -> torch.device:
    one = torch.zeros(1, dtype=torch.int64)
    return model.target.embed(one).device


def _run(model: Model, engine: Engine, token: int) -> float:
    """Let a text run that nobody sees; returns the seconds that a token of its prompt took."""
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    length = min(_PROBE, model.target.context_length - params.max_new_tokens)
    prompt = [token] * length
    engine.submit(Request(prompt, params, TextDecoder(model.tokenizer), drafting="on"))
    started = time.perf_counter()
    engine.step()
    seconds = time.perf_counter() - started
    while engine.has_work:
        engine.step()
    return seconds / length
