"""What a process shares with the code that called us: neither changed nor trusted here.

Torch's default dtype belongs to the whole process and may change at any moment (transformers changes it while it loads), so
every tensor of ours states its dtype and its device: INTS, FLOATS and BOOLS say both. What belongs to a thread alone (autocast,
the default device, inference mode) is switched off by `undisturbed` where our work begins. A forked child has no threads but
its own, and no lock of a thread that is gone.
"""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

import torch

__all__ = ["BOOLS", "FLOATS", "INTS", "alone", "is_terminal", "new_lock", "num_threads", "serial", "undisturbed"]

INTS: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}  # ids, positions, counts
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
BOOLS: dict[str, Any] = {"dtype": torch.bool, "device": "cpu"}

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # devices whose operations a caller may have cast
_locks: WeakSet[Any] = WeakSet()
P = ParamSpec("P")
R = TypeVar("R")


class _Team:
    """Whether passes have run in this process, and whether it was forked from one where they had."""

    used = False
    gone = False


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run as if its caller had neither autocast, nor a default device, nor inference mode."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        _Team.used = True
        if _Team.gone and torch.get_num_threads() > 1:
            torch.set_num_threads(1)  # torch's own team did not come along either
        if not (torch._C._is_any_autocast_enabled() or torch._C._len_torch_function_stack() or torch.is_inference_mode_enabled()):
            return function(*args, **kwargs)

        with ExitStack() as switched:
            for device in _AUTOCAST:
                if torch.is_autocast_enabled(device):
                    switched.enter_context(torch.autocast(device, enabled=False))
            if torch.get_default_device().type != "cpu":
                switched.enter_context(torch.device("cpu"))
            switched.enter_context(torch.inference_mode(mode=False))
            return function(*args, **kwargs)

    return call


@functools.cache
def _openmp() -> Any | None:
    """The OpenMP library that torch runs on, or None where torch has another kind of threads."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            library = ctypes.CDLL(str(folder / name))
            library.omp_set_num_threads, library.omp_get_max_threads  # noqa: B018  # AttributeError where it has none
        except (OSError, AttributeError):
            continue
        return library
    return None


class _Serial(threading.local):
    threads: int | None = None  # what this thread had outside of `serial`


_serial = _Serial()


def num_threads() -> int:
    """How many threads our kernels may use: as many as torch, also where torch's own operations have one."""
    return _serial.threads or torch.get_num_threads()


def serial(wanted: Callable[[Any], bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A method during which torch's operations stay on the calling thread, where `wanted(self)`.

    Torch's team goes on spinning behind each of its operations, on cores that our kernels need for the next one: beside other
    processes that halves the speed. The number is the calling thread's own; no other thread sees it.
    """

    def around(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            openmp = _openmp()
            if openmp is None or _serial.threads is not None or not wanted(args[0]):
                return method(*args, **kwargs)
            _serial.threads = torch.get_num_threads()
            openmp.omp_set_num_threads(1)
            try:
                return method(*args, **kwargs)
            finally:
                openmp.omp_set_num_threads(_serial.threads)
                _serial.threads = None

        return call

    return around


def new_lock() -> Any:
    """A lock that its own thread may take again, and that is free in a forked child."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def alone() -> bool:
    """Whether this process was forked from one whose passes had teams of threads: they are gone, and are not to be waited for."""
    return _Team.gone


def is_terminal(stream: Any) -> bool:
    """Whether somebody looks at it; a standard stream may be None or closed."""
    return stream is not None and not stream.closed and bool(stream.isatty())


def _in_child() -> None:
    _Team.gone = _Team.used
    for lock in _locks:
        lock._at_fork_reinit()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_in_child)
