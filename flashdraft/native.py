"""The C++ kernels of csrc/step.cpp: compiled once per machine, loaded through ctypes, fed with weights packed in panels.

Knows weights, formats and pointers. Does not know models' names, drafters or tokens' meaning. Every format but int8 holds
exactly the float32 numbers it was given: whether a weight fits one is found out by packing and comparing.
"""

import ctypes
import functools
import hashlib
import os
import platform
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
from flashdraft.process import FLOATS, num_threads

__all__ = ["PANEL", "Layer", "Model", "NativeLinear", "addresses", "chain", "library", "step", "usable"]

Tensors = Sequence[Tensor]
PANEL = 32  # outputs that lie side by side, and inputs that share a scale
_EXACT = ("q4", "q8", "bfloat16", "float32")  # the same numbers in ever more bytes
# in csrc's order: bits of a number, inputs that go together, bits of each output's scales for 32 inputs
_FORMATS = {"float32": (32, 1, 0), "bfloat16": (16, 2, 0), "q8": (8, PANEL, 16), "q4": (4, PANEL, 32), "int8": (8, PANEL, 0)}
_FILES = sorted((Path(__file__).parent / "csrc").glob("*.[ch]*"))
_FLAGS = ("-O3", "-march=native", "-fno-signed-zeros", "-pthread", "-fPIC", "-shared", "-std=c++17", "-w")


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class _Linear(Structure):
    _fields_ = _fields(c_int64, "format", "outputs", "inputs") + _fields(c_void_p, "weight", "bias", "scale")


class Layer(Structure):
    _fields_ = _fields(c_void_p, "input_norm", "post_norm", "q_norm", "k_norm")
    _fields_ += _fields(_Linear, "qkv", "out", "gate_up", "down")


class Model(Structure):
    _fields_ = [*_fields(c_int64, "layers", "hidden", "heads", "kv_heads", "head_dim", "inner"), ("eps", c_float)]
    _fields_ += [("layer", POINTER(Layer)), *_fields(c_void_p, "norm", "cos", "sin")]


class _Step(Structure):
    _fields_ = _fields(c_int64, "rows", "nodes", "tokens", "slots", "feature_size", "threads")
    _fields_ += _fields(c_void_p, "row", "start", "size", "depth", "seen", "keys", "values")
    _fields_ += _fields(c_void_p, "wanted", "x", "qkv", "mixed", "inner", "features", "seconds")


class _Chain(Structure):
    _fields_ = _fields(c_int64, "rows", "nodes", "likely", "hidden", "rank", "threads")
    _fields_ += _fields(c_void_p, "states", "anchors", "head", "embedding", "gate_up", "down", "ids", "scores")


@functools.cache
def library() -> Any | None:
    """The kernels, compiled at the first call on this machine, or as the wheel brought them where there is no compiler.

    None if neither can be had, or with FLASHDRAFT_NATIVE=0.
    """
    compiler, path = _compiler(), cache_dir() / f"step-{fingerprint()}.so"
    if os.environ.get("FLASHDRAFT_NATIVE") == "0":
        return None
    try:
        if compiler is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                built = Path(scratch, path.name)
                sources = [str(path) for path in _FILES if path.suffix == ".cpp"]
                subprocess.run([compiler, *_FLAGS, *sources, "-o", str(built)], check=True, capture_output=True)
                os.replace(built, path)
    except (OSError, subprocess.CalledProcessError):
        pass  # what runs in the end is named wherever a kernel is
    brought = _FILES[0].with_name("step.so")  # setup.py built it for AVX2
    can_run = platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    try:
        return ctypes.CDLL(str(path if path.exists() or not can_run else brought))
    except OSError:
        return None


def _compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)


@functools.cache
def fingerprint() -> str:
    """Of the source, the compiler's call and the processor: a cache folder may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    known = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}) or [platform.processor()]
    call = " ".join((str(_compiler()), *_FLAGS, *known))
    return hashlib.sha256(b"".join(path.read_bytes() for path in _FILES) + call.encode()).hexdigest()[:16]


class NativeLinear:
    """x -> x @ weight.T + bias for float32 rows; row-exact. weight: [outputs, inputs].

    kernel: a format, or "compact": the one of fewest bytes that holds the weight exactly. Raises ValueError if the format
    would round it; int8 may (one scale an output, one for 32 inputs of each row of x).
    """

    row_exact = True

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, kernel: str = "compact") -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else F.pad(bias.detach().float(), (0, -self.out_features % PANEL))
        plain = weight.detach().float().contiguous()
        held = next((format for format in (_EXACT if kernel == "compact" else (kernel,)) if self._pack(format, plain)), None)
        if held is None:
            raise ValueError(f"{kernel} does not hold this weight")
        self.format, self.nbytes = held, self.weight.nbytes + self.scale.nbytes
        pointers = self.weight.data_ptr(), None if self.bias is None else self.bias.data_ptr(), self.scale.data_ptr()
        self.struct = _Linear(list(_FORMATS).index(held), self.out_features, self.in_features, *pointers)

    def _pack(self, format: str, weight: Tensor) -> bool:
        """Whether the format holds the weight, which then lies in panels."""
        bits, together, scales = _FORMATS[format]
        if self.in_features % together:
            return False
        panels, kernels = -(-self.out_features // PANEL), library()
        number_bits = self.in_features * bits + self.in_features // PANEL * scales
        self.weight = torch.empty(panels * PANEL * number_bits // 8, dtype=torch.uint8, device="cpu")
        self.scale = torch.empty(panels * PANEL if format == "int8" else 0, **FLOATS)
        source, *packed = (c_void_p(tensor.data_ptr()) for tensor in (weight, self.weight, self.scale))
        sizes = (c_int64(size) for size in (list(_FORMATS).index(format), *weight.shape))
        assert kernels is not None, "look at `usable` first"
        return bool(kernels.flashdraft_pack(source, *sizes, *packed))

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]"""
        x, y = x.contiguous(), x.new_empty(len(x), self.out_features)
        kernels: Any = library()
        pointers = ctypes.byref(self.struct), c_void_p(x.data_ptr()), c_int64(len(x)), c_void_p(y.data_ptr())
        kernels.flashdraft_linear(*pointers, c_int64(num_threads()))
        return y


def usable(like: Tensor) -> bool:
    """Whether the kernels can stand in for torch's operations on tensors like this one."""
    return like.device.type == "cpu" and like.dtype == torch.float32 and library() is not None


def addresses(kv: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
    """Where every layer's keys lie, and its values."""
    return [(c_void_p * len(kv))(*(tensor.data_ptr() for tensor in tensors)) for tensors in zip(*kv, strict=True)]


def step(model: Model, slots: int, shape: Tensors, kv: Sequence[Any], tensors: Tensors, seconds: Tensor | None) -> None:
    """One pass of csrc/step.cpp. slots: of a cache row; shape: cache rows, their lengths, sizes, and `depths`, `seen` of trees.

    kv: `addresses`; tensors: the wanted layers' places, x, which becomes the final state, three to work in, and the features.
    """
    held, (_, x, *_, features) = [t.contiguous() for t in shape], tensors
    sizes = *held[-2].shape, len(x), slots, features.shape[1], num_threads()
    pointers: list[Any] = [*(t.data_ptr() for t in held), *map(ctypes.addressof, kv), *(t.data_ptr() for t in tensors)]
    pointers += [None if seconds is None else seconds.data_ptr()]
    kernels: Any = library()
    kernels.flashdraft_step(ctypes.byref(model), ctypes.byref(_Step(*sizes, *pointers)))


def chain(states: Tensor, anchors: Tensor, tables: Sequence[Tensor], ids: Tensor) -> Tensor:
    """A sequential head's log-probabilities of `ids`, the likely ones [rows, nodes, n]: each node's best corrects the next state.

    states: [rows, nodes, hidden]; anchors: their embeddings [rows, hidden]; tables: lm_head's rows and embeddings of the draft
    ids [ids, hidden], gate_up [2 * rank, 2 * hidden] and down [hidden, rank].
    """
    scores, held = states.new_empty(ids.shape), [t.contiguous() for t in (states, anchors, *tables, ids)]
    sizes = *ids.shape, states.shape[2], tables[-1].shape[1], num_threads()
    kernels: Any = library()
    kernels.flashdraft_chain(ctypes.byref(_Chain(*sizes, *(tensor.data_ptr() for tensor in (*held, scores)))))
    return scores
