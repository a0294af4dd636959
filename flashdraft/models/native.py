"""The C++ kernels of csrc/step.cpp: compiled once per machine, loaded through ctypes, fed with weights packed in panels.

Knows weights, formats and pointers. Does not know models' names, drafters or tokens' meaning. Every format but int8 holds
exactly the float32 numbers it was given: whether a weight fits one is found out by packing and comparing.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.hub import cache_dir
from flashdraft.process import FLOATS, new_lock, num_threads

__all__ = [
    "PANEL",
    "Layer",
    "Model",
    "NativeLinear",
    "addresses",
    "call_team",
    "chain",
    "ensure",
    "library",
    "pointer",
    "step",
    "usable",
]

Tensors = Sequence[Tensor]
_BUILDING = new_lock()
_COMPILING = 600.0  # seconds until a compiler counts as one that hangs
PANEL = 32  # outputs that lie side by side, and inputs that share a scale
_EXACT = ("q4", "q8", "bfloat16", "float32")  # the same numbers in ever more bytes
# in csrc's order: bits of a number, inputs that go together, bits of each output's scales for 32 inputs
_FORMATS = {
    "float32": (32, 1, 0),
    "bfloat16": (16, 2, 0),
    "q8": (8, PANEL, 16),
    "q4": (4, PANEL, 32),
    "int8": (8, PANEL, 0),
}
_FILES = sorted((Path(__file__).parent / "csrc").glob("*.[ch]*"))
_FLAGS = (
    "-O3",
    "-march=native",
    "-fno-signed-zeros",
    "-pthread",
    "-fPIC",
    "-shared",
    "-std=c++17",
    "-w",
)


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class _Linear(Structure):
    _fields_ = _fields(c_int64, "format", "outputs", "inputs") + _fields(
        c_void_p, "weight", "bias", "scale"
    )


class Layer(Structure):
    _fields_ = _fields(c_void_p, "input_norm", "post_norm", "q_norm", "k_norm")
    _fields_ += _fields(_Linear, "qkv", "out", "gate_up", "down")


class Model(Structure):
    _fields_ = [
        *_fields(c_int64, "layers", "hidden", "heads", "kv_heads", "head_dim", "inner"),
        ("eps", c_float),
    ]
    _fields_ += [("layer", POINTER(Layer)), *_fields(c_void_p, "norm", "cos", "sin")]


class _Step(Structure):
    _fields_ = _fields(c_int64, "rows", "nodes", "tokens", "slots", "feature_size", "threads")
    _fields_ += _fields(c_void_p, "row", "start", "size", "depth", "seen", "keys", "values")
    _fields_ += _fields(c_void_p, "wanted", "x", "qkv", "mixed", "inner", "features", "seconds")


class _Chain(Structure):
    _fields_ = _fields(c_int64, "rows", "nodes", "likely", "hidden", "rank", "threads")
    _fields_ += _fields(
        c_void_p, "states", "anchors", "head", "embedding", "gate_up", "down", "ids", "scores"
    )


@functools.cache
def library() -> Any | None:
    """The kernels, compiled at the first call on this machine, or as the wheel brought them where there is no compiler.

    Where the cache folder can neither be written nor run from, they are compiled for this process alone. None if they cannot be
    had in any of these ways, or with FLASHDRAFT_NATIVE=0. What runs in the end is named wherever a kernel is.
    """
    if os.environ.get("FLASHDRAFT_NATIVE") == "0":
        return None
    with _BUILDING:  # of several threads one compiles
        kept = _compiled(cache_dir())
        if isinstance(kept, Path) and (found := _opened(kept)) is not None:
            return found

        brought = _FILES[0].with_name("step.so")  # setup.py built it for AVX2
        can_run = (
            platform.machine() not in ("x86_64", "AMD64")
            or torch.backends.cpu.get_cpu_capability() != "DEFAULT"
        )
        if can_run and (found := _opened(brought)) is not None:
            return found
        if kept is None:
            return None

        with tempfile.TemporaryDirectory(
            ignore_cleanup_errors=True
        ) as own:  # what is open stays when its file is gone
            alone = _compiled(Path(own))
            return _opened(alone) if isinstance(alone, Path) else None


def _compiled(folder: Path) -> Path | OSError | None:
    """Where the kernels lie in a folder, compiled if need be; the error where it cannot be written; None: no compiler works."""
    path, compiler = folder / f"step-{fingerprint()}.so", _compiler()
    if path.exists():
        return path
    if not compiler or shutil.which(compiler[0]) is None:
        return None

    sources = [str(source) for source in _FILES if source.suffix == ".cpp"]
    how: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": _COMPILING}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch, path.name)
            try:
                subprocess.run([*compiler, *_FLAGS, *sources, "-o", str(built)], check=True, **how)
            except (OSError, subprocess.SubprocessError):
                return None
            os.replace(built, path)
    except OSError as error:
        return error
    return path


def _opened(path: Path) -> Any | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _compiler() -> list[str]:
    """CXX, which may be several words, or what is usual; empty if there is nothing."""
    if given := shlex.split(os.environ.get("CXX", "")):
        return given
    return list(filter(shutil.which, ("g++", "clang++", "c++")))[:1]


@functools.cache
def fingerprint() -> str:
    """Of the source, the compiler's call and the processor: a cache folder may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    known = sorted(
        {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    ) or [platform.processor()]
    call = " ".join((" ".join(_compiler()) or "None", *_FLAGS, *known))
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in _FILES) + call.encode()
    ).hexdigest()[:16]


class NativeLinear:
    """x -> x @ weight.T + bias for float32 rows; row-exact. weight: [outputs, inputs].

    kernel: a format, or "compact": the one of fewest bytes that holds the weight exactly. Raises ValueError if the format
    would round it; int8 may (one scale an output, one for 32 inputs of each row of x).
    """

    row_exact = True

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, kernel: str = "compact"
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = (
            None if bias is None else F.pad(bias.detach().float(), (0, -self.out_features % PANEL))
        )
        plain = weight.detach().float().contiguous()
        held = next(
            (
                format
                for format in (_EXACT if kernel == "compact" else (kernel,))
                if self._pack(format, plain)
            ),
            None,
        )
        if held is None:
            raise ValueError(f"{kernel} does not hold this weight")
        self.format, self.nbytes = held, self.weight.nbytes + self.scale.nbytes
        bias_at = (
            None
            if self.bias is None
            else pointer(self.bias, "a bias", -(-self.out_features // PANEL) * PANEL)
        )
        pointers = pointer(self.weight, "a packed weight", len(self.weight), torch.uint8), bias_at
        scale = pointer(self.scale, "scales", len(self.scale))
        self.struct = _Linear(
            list(_FORMATS).index(held), self.out_features, self.in_features, *pointers, scale
        )

    def _pack(self, format: str, weight: Tensor) -> bool:
        """Whether the format holds the weight, which then lies in panels."""
        bits, together, scales = _FORMATS[format]
        if self.in_features % together:
            return False
        panels, kernels = -(-self.out_features // PANEL), library()
        number_bits = self.in_features * bits + self.in_features // PANEL * scales
        self.weight = torch.empty(
            panels * PANEL * number_bits // 8, dtype=torch.uint8, device="cpu"
        )
        self.scale = torch.empty(panels * PANEL if format == "int8" else 0, **FLOATS)
        source = c_void_p(pointer(weight, "a weight", self.out_features * self.in_features))
        packed = c_void_p(pointer(self.weight, "a packed weight", len(self.weight), torch.uint8))
        scale = c_void_p(pointer(self.scale, "scales", len(self.scale)))
        sizes = (c_int64(size) for size in (list(_FORMATS).index(format), *weight.shape))
        assert kernels is not None, "look at `usable` first"
        return bool(kernels.flashdraft_pack(source, *sizes, packed, scale))

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]"""
        x, y = x.contiguous(), x.new_empty(len(x), self.out_features)
        source = c_void_p(pointer(x, "a linear's input", len(x) * self.in_features))
        result = c_void_p(pointer(y, "a linear's output", len(x) * self.out_features))
        kernels: Any = library()
        threads = c_int64(num_threads())
        kernels.flashdraft_linear(
            ctypes.byref(self.struct), source, c_int64(len(x)), result, threads
        )
        return y


def ensure(ok: bool, message: str) -> None:
    """An assertion that `python -O` leaves in: what fails here would be read or written beyond a tensor's end."""
    if not ok:
        raise AssertionError(message)


def pointer(tensor: Tensor, name: str, count: int, dtype: torch.dtype = torch.float32) -> int:
    """Where a tensor lies, if it is what C++ takes it for: `count` numbers of this dtype, in one piece, in the CPU's memory.

    No other line here hands an address to C++, which reads and writes unchecked.
    """
    if (
        tensor.dtype == dtype
        and tensor.numel() == count
        and tensor.is_cpu
        and tensor.is_contiguous()
    ):
        return tensor.data_ptr()

    got = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}{'' if tensor.is_contiguous() else ', in pieces'}"
    raise AssertionError(f"{name} is {got}; the kernels read {count} numbers of {dtype} on the CPU")


def usable(like: Tensor) -> bool:
    """Whether the kernels can stand in for torch's operations on tensors like this one."""
    return like.device.type == "cpu" and like.dtype == torch.float32 and library() is not None


def addresses(kv: Sequence[tuple[Tensor, Tensor]], count: int) -> list[Any]:
    """Where every layer's keys lie, and its values, `count` numbers each."""
    keys = [pointer(own, "a layer's keys", count) for own, _ in kv]
    values = [pointer(own, "a layer's values", count) for _, own in kv]
    return [(c_void_p * len(kv))(*keys), (c_void_p * len(kv))(*values)]


def step(
    model: Model,
    slots: int,
    shape: Tensors,
    kv: Sequence[Any],
    tensors: Tensors,
    seconds: Tensor | None,
) -> None:
    """One pass of csrc/step.cpp. slots: of a cache row; shape: cache rows, their lengths, sizes, and `depths`, `seen` of trees.

    kv: `addresses`; tensors: the wanted layers' places, x, which becomes the final state, three to work in, and the features.
    """
    row, start, size, depth, seen = (t.contiguous() for t in shape)
    wanted, x, qkv, mixed, inner, features = tensors
    (rows, nodes), n, threads = depth.shape, len(x), num_threads()
    head_dim, heads, kv_heads = model.head_dim, model.heads, model.kv_heads
    by_row = [
        pointer(each, name, rows, torch.int64)
        for name, each in (("row", row), ("start", start), ("size", size))
    ]
    by_node = (
        pointer(depth, "depth", rows * nodes, torch.int64),
        pointer(seen, "seen", rows * nodes * nodes, torch.bool),
    )
    work = [
        pointer(wanted, "wanted", model.layers + 1, torch.int64),
        pointer(x, "x", n * model.hidden),
        pointer(qkv, "qkv", n * (heads + 2 * kv_heads) * head_dim),
        pointer(mixed, "mixed", n * heads * head_dim),
        pointer(inner, "inner", n * model.inner),
        pointer(features, "features", n * features.shape[1]),
        None if seconds is None else pointer(seconds, "seconds", 3, torch.float64),
    ]
    sizes = rows, nodes, n, slots, features.shape[1], threads
    given = _Step(*sizes, *by_row, *by_node, *map(ctypes.addressof, kv), *work)
    kernels: Any = library()
    kernels.flashdraft_step(ctypes.byref(model), ctypes.byref(given))


def call_team() -> None:
    """A pass comes soon: the kernels' threads that sleep wake up meanwhile."""
    kernels: Any = library()
    kernels.flashdraft_call()


def chain(states: Tensor, anchors: Tensor, tables: Sequence[Tensor], ids: Tensor) -> Tensor:
    """A sequential head's log-probabilities of `ids`, the likely ones [rows, nodes, n]: each node's best corrects the next state.

    states: [rows, nodes, hidden]; anchors: their embeddings [rows, hidden]; tables: lm_head's rows and embeddings of the draft
    ids [ids, hidden], gate_up [2 * rank, 2 * hidden] and down [hidden, rank].
    """
    scores, threads = states.new_empty(ids.shape), num_threads()
    states, anchors, ids = states.contiguous(), anchors.contiguous(), ids.contiguous()
    head, embedding, gate_up, down = (table.contiguous() for table in tables)
    (rows, nodes, likely), hidden, rank, count = (
        ids.shape,
        states.shape[2],
        down.shape[1],
        len(head),
    )
    least, most = ids.aminmax()
    ensure(
        0 <= int(least) <= int(most) < count,
        f"an id of {int(least)} or {int(most)} beside {count} rows of the head",
    )
    pointers = [
        pointer(states, "states", rows * nodes * hidden),
        pointer(anchors, "anchors", rows * hidden),
        pointer(head, "head", count * hidden),
        pointer(embedding, "embedding", count * hidden),
        pointer(gate_up, "gate_up", 4 * rank * hidden),
        pointer(down, "down", hidden * rank),
        pointer(ids, "ids", rows * nodes * likely, torch.int64),
        pointer(scores, "scores", rows * nodes * likely),
    ]
    given = _Chain(rows, nodes, likely, hidden, rank, threads, *pointers)
    kernels: Any = library()
    kernels.flashdraft_chain(ctypes.byref(given))
    return scores
