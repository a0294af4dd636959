"""What a process shares with the code that called us: neither changed nor trusted here.

Torch's default dtype belongs to the whole process and may change at any moment (transformers
changes it while it loads), so every tensor of ours states its dtype and its device: INTS, FLOATS
and BOOLS say both. What belongs to a thread alone (autocast, the default device, inference mode) is
switched off by `undisturbed` where our work begins. A forked child has no threads but its own, and
no lock of a thread that is gone.
"""

import atexit
import ctypes
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, ParamSpec, Protocol, TypeVar, cast
from weakref import WeakSet

import torch

__all__ = [
    "BOOLS",
    "DOUBLES",
    "FLOATS",
    "INTS",
    "is_terminal",
    "new_lock",
    "num_threads",
    "serial",
    "signals_told",
    "threads_set",
    "undisturbed",
]

Kind = dict[str, Any]  # the `dtype` and `device` of a new tensor, as torch's functions take them
INTS: Kind = {"dtype": torch.int64, "device": "cpu"}  # ids, positions, counts
FLOATS: Kind = {"dtype": torch.float32, "device": "cpu"}
DOUBLES: Kind = {"dtype": torch.float64, "device": "cpu"}
BOOLS: Kind = {"dtype": torch.bool, "device": "cpu"}


class RLock(Protocol):
    """threading.RLock, whose own type has no name."""

    def acquire(self, blocking: bool = ..., timeout: float = ...) -> bool: ...

    def release(self) -> None: ...

    def __enter__(self) -> bool: ...

    def __exit__(self, *error: object) -> None: ...

    def _at_fork_reinit(self) -> None: ...


_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # devices whose operations a caller may have cast
_LAST_PASS = 10.0  # seconds that a process waits at its end for what daemon threads have begun
_locks: WeakSet[RLock] = WeakSet()
_working: set[int] = set()  # threads that are inside of what is `undisturbed`
P = ParamSpec("P")
R = TypeVar("R")


class _Team:
    """What became of torch's threads in this process."""

    used = False  # passes have run
    gone = False  # it was forked from a process where they had
    ended = False  # it is at its end


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run as if its caller had none of torch's modes.

    Neither autocast, nor a default device, nor inference mode.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        me = threading.get_ident()
        if me in _working:  # inside another one
            return run(*args, **kwargs)

        if _Team.ended and threading.current_thread() is not threading.main_thread():
            # For the process's end, which would break a daemon's pass off in the middle of C++.
            threading.Event().wait()
        _working.add(me)
        try:
            return run(*args, **kwargs)
        finally:
            _working.discard(me)

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        _Team.used = True
        if _Team.gone and torch.get_num_threads() > 1:
            torch.set_num_threads(1)  # torch would wait for a team that did not come along
        if not _is_in_a_mode():
            return function(*args, **kwargs)
        with _modes_off():
            return function(*args, **kwargs)

    return call


def _is_in_a_mode() -> bool:
    """Whether the calling thread has any of torch's modes, as far as that is quickly said."""
    if torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled():
        return True
    return torch._C._len_torch_function_stack() > 0  # a default device is one of them


@contextmanager
def _modes_off() -> Iterator[None]:
    with ExitStack() as switched:
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                switched.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            switched.enter_context(torch.device("cpu"))
        switched.enter_context(torch.inference_mode(mode=False))
        yield


@functools.cache
def _torch_library() -> ctypes.CDLL | None:
    """The library that torch's operations are in; None where it is not found."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            return ctypes.CDLL(str(folder / name))
        except OSError:
            continue
    return None


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch runs on, or None where torch has another kind of threads."""
    library = _torch_library()
    if hasattr(library, "omp_set_num_threads") and hasattr(library, "omp_get_max_threads"):
        return library
    return None


def _set_mkl_threads(count: int) -> int:
    """How many threads MKL has in this thread, 0: as many as in the others; returns the number
    before.

    Behind `torch.set_num_threads` MKL asks OpenMP no more, and `exp` and `logsumexp` are MKL's.
    """
    set_own = getattr(_torch_library(), "MKL_Set_Num_Threads_Local", None)
    if set_own is None:
        return 0
    before: int = set_own(count)
    return before


class _Serial(threading.local):
    threads: int | None = None  # what this thread had outside of `serial`


_serial = _Serial()


def num_threads() -> int:
    """How many threads our kernels may use.

    As many as torch, also where torch's own operations have one.
    """
    return _serial.threads or torch.get_num_threads()


def serial(wanted: Callable[[Any], bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A method during which torch's operations stay on the calling thread, where `wanted(self)`.

    Torch's team goes on spinning behind each of its operations, on cores that our kernels need for
    the next one: beside other processes that halves the speed. The number is the calling thread's
    own; no other thread sees it.
    """

    def around(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            openmp = _openmp()
            if openmp is None or _serial.threads is not None or not wanted(args[0]):
                return method(*args, **kwargs)
            _serial.threads = torch.get_num_threads()
            openmp.omp_set_num_threads(1)
            before = _set_mkl_threads(1)
            try:
                return method(*args, **kwargs)
            finally:
                _set_mkl_threads(before)
                openmp.omp_set_num_threads(_serial.threads)
                _serial.threads = None

        return call

    return around


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """Torch has so many threads, None: as many as it has, and its own number back behind it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def new_lock() -> RLock:
    """A lock that its own thread may take again, and that is free in a forked child."""
    lock = cast(RLock, threading.RLock())
    _locks.add(lock)
    return lock


@contextmanager
def signals_told(tell: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGINT are told by their number, and let what runs go on to its end.

    In another thread than the main one they are not ours to handle.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        tell(number)

    old = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        old[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in old.items():
            if handler is None:  # it was not one of Python's
                handler = signal.SIG_DFL
            signal.signal(number, handler)


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether somebody looks at it; a standard stream may be None or closed."""
    if stream is None or stream.closed:
        return False
    return bool(stream.isatty())


def _at_end() -> None:
    """Only daemons are left: no new pass begins, and those that have begun may end."""
    _Team.ended = True
    until = time.monotonic() + _LAST_PASS
    while _working - {threading.get_ident()} and time.monotonic() < until:
        time.sleep(0.005)


def _in_child() -> None:
    _working.intersection_update({threading.get_ident()})
    _Team.gone = _Team.used
    for lock in _locks:
        lock._at_fork_reinit()


atexit.register(_at_end)
if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_in_child)
