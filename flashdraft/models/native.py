"""The C++ kernels of csrc/: compiled once a machine, loaded by ctypes, fed with packed weights.

Knows weights, formats and pointers. Does not know models' names, drafters or tokens' meaning. Every
format but int8 holds exactly the float32 numbers that it was given: whether a weight fits one is
found out by packing and comparing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from ctypes import CDLL, POINTER, Array, Structure, c_float, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.hub import cache_dir
from flashdraft.process import FLOATS, new_lock, num_threads

if TYPE_CHECKING:
    from _ctypes import _CDataType

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

PANEL = 32  # outputs that lie side by side, and inputs that share a scale


class _Format(NamedTuple):
    """What a packed weight takes; csrc/formats.h draws it."""

    code: int  # its place in the enum there
    number_bits: int
    together: int  # inputs that share a lane or a scale: a weight has a multiple of them
    scale_bits: int  # of an output, for PANEL inputs


_FORMATS = {
    "float32": _Format(code=0, number_bits=32, together=1, scale_bits=0),
    "bfloat16": _Format(code=1, number_bits=16, together=2, scale_bits=0),
    "q8": _Format(code=2, number_bits=8, together=PANEL, scale_bits=16),
    "q4": _Format(code=3, number_bits=4, together=PANEL, scale_bits=32),  # a scale and a minimum
    "int8": _Format(code=4, number_bits=8, together=PANEL, scale_bits=0),  # scales lie elsewhere
}
_EXACT = ("q4", "q8", "bfloat16", "float32")  # the same numbers in ever more bytes


# ---- what C++ is called with: csrc/interface.h has the same fields in the same order -----------


def _fields(kind: type[_CDataType], *names: str) -> list[tuple[str, type[_CDataType]]]:
    return [(name, kind) for name in names]


class _Linear(Structure):
    _fields_ = [
        *_fields(c_int64, "format", "outputs", "inputs"),
        *_fields(c_void_p, "weight", "bias", "scale"),
    ]


class Convolution(Structure):
    _fields_ = [
        *_fields(c_void_p, "base"),
        *_fields(_Linear, "kernels"),
    ]


class Layer(Structure):
    _fields_ = [
        *_fields(c_void_p, "input_norm", "post_norm", "q_norm", "k_norm"),
        *_fields(_Linear, "qkv", "out", "gate_up", "down"),
        *_fields(Convolution, "attention_conv", "mlp_conv"),
    ]


class Model(Structure):
    _fields_ = [
        *_fields(c_int64, "layers", "hidden", "heads", "kv_heads", "head_dim", "inner"),
        *_fields(c_int64, "taps", "conv_groups"),
        *_fields(c_float, "eps"),
        *_fields(POINTER(Layer), "layer"),
        *_fields(c_void_p, "norm", "cos", "sin"),
    ]


class _Step(Structure):
    _fields_ = [
        *_fields(c_int64, "rows", "nodes", "tokens", "slots", "feature_size", "threads"),
        *_fields(c_void_p, "row", "start", "size", "depth", "seen", "keys", "values"),
        *_fields(c_void_p, "wanted", "x", "qkv", "mixed", "inner", "kernels", "behind"),
        *_fields(c_void_p, "features", "seconds"),
    ]


class _Chain(Structure):
    _fields_ = [
        *_fields(c_int64, "rows", "nodes", "likely", "hidden", "rank", "threads"),
        *_fields(c_void_p, "states", "anchors", "head", "embedding", "gate_up", "down"),
        *_fields(c_void_p, "ids", "scores"),
    ]


def _declare(kernels: CDLL) -> None:
    """Tell ctypes what every function of interface.h takes: a plain int would travel as 32 bits."""
    pack = kernels.flashdraft_pack
    pack.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p]
    pack.restype = c_int64

    linear = kernels.flashdraft_linear
    linear.argtypes = [POINTER(_Linear), c_void_p, c_int64, c_void_p, c_int64]
    linear.restype = None

    kernels.flashdraft_step.argtypes = [POINTER(Model), POINTER(_Step)]
    kernels.flashdraft_step.restype = None
    kernels.flashdraft_chain.argtypes = [POINTER(_Chain)]
    kernels.flashdraft_chain.restype = None
    kernels.flashdraft_call.argtypes = []
    kernels.flashdraft_call.restype = None


# ---- compiled and loaded -----------------------------------------------------------------------


@functools.cache
def library() -> CDLL | None:
    """The kernels, compiled at the first call on this machine, or as the wheel brought them.

    The wheel's are for machines without a compiler. Where the cache folder can neither be written
    nor run from, they are compiled for this process alone. None if they cannot be had in any of
    these ways, or with FLASHDRAFT_NATIVE=0. What runs in the end is named wherever a kernel is.
    """
    if os.environ.get("FLASHDRAFT_NATIVE") == "0":
        return None

    with _BUILDING:  # of several threads one compiles
        kept = _compiled(cache_dir())
        if isinstance(kept, Path):
            kernels = _opened(kept)
            if kernels is not None:
                return kernels

        kernels = _brought()
        if kernels is not None:
            return kernels

        if kept is None:  # no compiler works: it would not do so elsewhere
            return None
        return _compiled_for_this_process()


def _brought() -> CDLL | None:
    """What setup.py put into the wheel, built for AVX2."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    if is_x86 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return None
    return _opened(_FILES[0].with_name("step.so"))


def _compiled_for_this_process() -> CDLL | None:
    # On Linux what is open stays when its file is gone; elsewhere the file may not go.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = _compiled(Path(folder))
        if not isinstance(path, Path):
            return None
        return _opened(path)


def _compiled(folder: Path) -> Path | OSError | None:
    """Where the kernels lie in a folder, compiled if need be.

    The error where the folder cannot be written; None: no compiler works.
    """
    path = folder / f"step-{fingerprint()}.so"
    if path.exists():
        return path

    compiler = _compiler()
    if not compiler or shutil.which(compiler[0]) is None:
        return None

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch, path.name)
            if not _compile(compiler, built):
                return None
            os.replace(built, path)
    except OSError as error:
        return error
    return path


def _compile(compiler: list[str], out: Path) -> bool:
    """Whether it worked."""
    sources = [str(path) for path in _FILES if path.suffix == ".cpp"]
    command = [*compiler, *_FLAGS, *sources, "-o", str(out)]
    try:
        subprocess.run(
            command,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMPILING,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _opened(path: Path) -> CDLL | None:
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError:
        return None
    _declare(kernels)
    return kernels


def _compiler() -> list[str]:
    """CXX, which may be several words, or what is usual; empty if there is nothing."""
    given = shlex.split(os.environ.get("CXX", ""))
    if given:
        return given
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name) is not None:
            return [name]
    return []


@functools.cache
def fingerprint() -> str:
    """Of sources, the compiler's call and processor: unlike machines may share a cache folder."""
    compiler = " ".join(_compiler()) or "None"
    call = " ".join((compiler, *_FLAGS, *_processor()))
    sources = b"".join([path.read_bytes() for path in _FILES])
    return hashlib.sha256(sources + call.encode()).hexdigest()[:16]


def _processor() -> list[str]:
    """What tells it from others, its instruction sets above all."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        telling = ("model name", "flags", "Features")
        known = {line for line in lines if line.startswith(telling)}  # once, not once a core
        if known:
            return sorted(known)
    return [platform.processor()]


def _kernels() -> CDLL:
    kernels = library()
    assert kernels is not None, "look at `usable` first"
    return kernels


def usable(like: Tensor) -> bool:
    """Whether the kernels can stand in for torch's operations on tensors like this one."""
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return False
    return library() is not None


# ---- tensors handed over -----------------------------------------------------------------------


def ensure(ok: bool, message: str) -> None:
    """An assertion that `python -O` leaves in.

    What fails here would be read or written beyond a tensor's end.
    """
    if not ok:
        raise AssertionError(message)


def pointer(tensor: Tensor, name: str, count: int, dtype: torch.dtype = torch.float32) -> int:
    """Where a tensor lies, if it is what C++ takes it for.

    That is `count` numbers of this dtype, in one piece, in the CPU's memory. No other line here
    hands an address to C++, which reads and writes unchecked.
    """
    if (
        tensor.dtype == dtype
        and tensor.numel() == count
        and tensor.is_cpu
        and tensor.is_contiguous()
    ):
        return tensor.data_ptr()

    got = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
    if not tensor.is_contiguous():
        got += ", in pieces"
    raise AssertionError(f"{name} is {got}; the kernels read {count} numbers of {dtype} on the CPU")


def addresses(kv: Sequence[tuple[Tensor, Tensor]], count: int) -> list[Array[c_void_p]]:
    """Where every layer's keys lie, and its values, `count` numbers each."""
    keys = [pointer(own, "a layer's keys", count) for own, _ in kv]
    values = [pointer(own, "a layer's values", count) for _, own in kv]
    table = c_void_p * len(kv)
    return [table(*keys), table(*values)]


# ---- linears -----------------------------------------------------------------------------------


class _Packed(NamedTuple):
    """A weight in a format's panels."""

    weight: Tensor  # bytes
    scale: Tensor  # of int8: a float32 for each output; else empty


class NativeLinear:
    """x -> x @ weight.T + bias for float32 rows; row-exact. weight: [outputs, inputs].

    kernel: a format, or "compact": the one of fewest bytes that holds the weight exactly. Raises
    ValueError if the format would round it; int8 may (one scale an output, one for 32 inputs of
    each row of x).
    """

    row_exact = True

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, kernel: str = "compact"
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else _filled_up(bias.detach().float())

        formats = _EXACT if kernel == "compact" else (kernel,)
        held = _first_that_holds(formats, weight.detach().float().contiguous())
        if held is None:
            raise ValueError(f"{kernel} does not hold this weight")

        self.format, packed = held
        self.weight = packed.weight
        self.scale = packed.scale
        self.nbytes = self.weight.nbytes + self.scale.nbytes
        self.struct = self._struct()

    @classmethod
    def of_panels(
        cls, shape: tuple[str, int, int], weight: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Self:
        """What was packed before: its format, outputs and inputs, and the tensors that it had.

        Raises ValueError where these are not of that shape, KeyError for an unknown format.
        """
        linear = cls.__new__(cls)
        linear.format, linear.out_features, linear.in_features = shape
        num_bytes, num_scales = _sizes(*shape)
        if linear.in_features % _FORMATS[linear.format].together or len(weight) != num_bytes:
            raise ValueError(f"{len(weight)} bytes are no {linear.format} of {shape[1:]}")
        if len(scale) != num_scales:
            raise ValueError(f"{len(scale)} scales, not {num_scales}")

        linear.weight = weight
        linear.scale = scale
        linear.bias = bias
        linear.nbytes = weight.nbytes + scale.nbytes
        linear.struct = linear._struct()
        return linear

    def _struct(self) -> _Linear:
        """For C++; it points into this linear's tensors."""
        struct = _Linear()
        struct.format = _FORMATS[self.format].code
        struct.outputs = self.out_features
        struct.inputs = self.in_features
        struct.weight = _bytes_of(self.weight)
        struct.scale = _scales_of(self.scale)
        if self.bias is not None:
            struct.bias = pointer(self.bias, "a bias", _num_panels(self.out_features) * PANEL)
        return struct

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]"""
        x = x.contiguous()
        rows = len(x)
        y = x.new_empty(rows, self.out_features)

        source = pointer(x, "a linear's input", rows * self.in_features)
        result = pointer(y, "a linear's output", rows * self.out_features)
        linear = ctypes.byref(self.struct)
        _kernels().flashdraft_linear(linear, source, rows, result, num_threads())
        return y


def _num_panels(outputs: int) -> int:
    return -(-outputs // PANEL)


def _filled_up(bias: Tensor) -> Tensor:
    """With zeros, to whole panels."""
    return F.pad(bias, (0, -len(bias) % PANEL))


def _bytes_of(weight: Tensor) -> int:
    return pointer(weight, "a packed weight", len(weight), torch.uint8)


def _scales_of(scale: Tensor) -> int:
    return pointer(scale, "scales", len(scale))


def _first_that_holds(formats: Iterable[str], weight: Tensor) -> tuple[str, _Packed] | None:
    for format in formats:
        packed = _pack(format, weight)
        if packed is not None:
            return format, packed
    return None


def _sizes(name: str, outputs: int, inputs: int) -> tuple[int, int]:
    """Bytes of a weight in a format's panels, and scales beside them."""
    format = _FORMATS[name]
    filled_up = _num_panels(outputs) * PANEL
    bits_of_output = inputs * format.number_bits + inputs // PANEL * format.scale_bits
    num_scales = filled_up if name == "int8" else 0
    return filled_up * bits_of_output // 8, num_scales


def _pack(name: str, weight: Tensor) -> _Packed | None:
    """A weight in a format's panels, or None: the format does not hold it."""
    format = _FORMATS[name]
    outputs, inputs = weight.shape
    if inputs % format.together:
        return None

    num_bytes, num_scales = _sizes(name, outputs, inputs)
    packed = _Packed(
        weight=torch.empty(num_bytes, dtype=torch.uint8, device="cpu"),
        scale=torch.empty(num_scales, **FLOATS),
    )

    source = pointer(weight, "a weight", outputs * inputs)
    into = _bytes_of(packed.weight)
    scales = _scales_of(packed.scale)
    fits = _kernels().flashdraft_pack(source, format.code, outputs, inputs, into, scales)
    return packed if fits else None


# ---- a pass, a drafter's head ------------------------------------------------------------------


def step(
    model: Model,
    slots: int,
    shape: Tensors,
    kv: Sequence[Array[c_void_p]],
    tensors: Tensors,
    seconds: Tensor | None,
) -> None:
    """One pass of csrc/step.cpp.

    slots: of a cache row; shape: cache rows, their lengths, sizes, and `depths`, `seen` of trees;
    kv: `addresses`; tensors: the wanted layers' places, x, which becomes the final state, five to
    work in, and the features.
    """
    shape = [tensor.contiguous() for tensor in shape]
    row, start, size, depth, seen = shape
    wanted, x, qkv, mixed, inner, kernels, behind, features = tensors
    keys, values = kv
    rows, nodes = depth.shape
    tokens = len(x)
    feature_size = features.shape[1]
    mixed_size = model.heads * model.head_dim
    qkv_size = mixed_size + 2 * model.kv_heads * model.head_dim
    kernels_size = 2 * model.taps * model.conv_groups
    behind_size = model.hidden if model.taps else 0

    given = _Step()
    given.rows = rows
    given.nodes = nodes
    given.tokens = tokens
    given.slots = slots
    given.feature_size = feature_size
    given.threads = num_threads()

    given.row = pointer(row, "row", rows, torch.int64)
    given.start = pointer(start, "start", rows, torch.int64)
    given.size = pointer(size, "size", rows, torch.int64)
    given.depth = pointer(depth, "depth", rows * nodes, torch.int64)
    given.seen = pointer(seen, "seen", rows * nodes * nodes, torch.bool)
    given.keys = ctypes.addressof(keys)
    given.values = ctypes.addressof(values)

    given.wanted = pointer(wanted, "wanted", model.layers + 1, torch.int64)
    given.x = pointer(x, "x", tokens * model.hidden)
    given.qkv = pointer(qkv, "qkv", tokens * qkv_size)
    given.mixed = pointer(mixed, "mixed", tokens * mixed_size)
    given.inner = pointer(inner, "inner", tokens * model.inner)
    given.kernels = pointer(kernels, "kernels", tokens * kernels_size)
    given.behind = pointer(behind, "behind", tokens * behind_size)
    given.features = pointer(features, "features", tokens * feature_size)
    if seconds is not None:
        given.seconds = pointer(seconds, "seconds", 3, torch.float64)

    _kernels().flashdraft_step(ctypes.byref(model), ctypes.byref(given))


def call_team() -> None:
    """A pass comes soon: the kernels' threads that sleep wake up meanwhile."""
    _kernels().flashdraft_call()


def chain(states: Tensor, anchors: Tensor, tables: Tensors, ids: Tensor) -> Tensor:
    """A sequential head's log-probabilities of `ids`, the likely ones [rows, nodes, n].

    Each node's best corrects the next state. states: [rows, nodes, hidden]; anchors: their
    embeddings [rows, hidden]; tables: lm_head's rows and embeddings of the draft ids [ids, hidden],
    gate_up [2 * rank, 2 * hidden] and down [hidden, rank].
    """
    scores = states.new_empty(ids.shape)
    states = states.contiguous()
    anchors = anchors.contiguous()
    ids = ids.contiguous()
    tables = [table.contiguous() for table in tables]
    head, embedding, gate_up, down = tables
    rows, nodes, likely = ids.shape
    hidden = states.shape[2]
    rank = down.shape[1]
    num_ids = len(head)
    _ensure_rows(ids, num_ids)

    given = _Chain()
    given.rows = rows
    given.nodes = nodes
    given.likely = likely
    given.hidden = hidden
    given.rank = rank
    given.threads = num_threads()

    given.states = pointer(states, "states", rows * nodes * hidden)
    given.anchors = pointer(anchors, "anchors", rows * hidden)
    given.head = pointer(head, "head", num_ids * hidden)
    given.embedding = pointer(embedding, "embedding", num_ids * hidden)
    given.gate_up = pointer(gate_up, "gate_up", 4 * rank * hidden)
    given.down = pointer(down, "down", hidden * rank)
    given.ids = pointer(ids, "ids", rows * nodes * likely, torch.int64)
    given.scores = pointer(scores, "scores", rows * nodes * likely)

    _kernels().flashdraft_chain(ctypes.byref(given))
    return scores


def _ensure_rows(ids: Tensor, count: int) -> None:
    """Every id is a row of tables of `count` rows."""
    least, most = ids.aminmax()
    inside = 0 <= int(least) <= int(most) < count
    ensure(inside, f"an id of {int(least)} or {int(most)} beside {count} rows of the head")
