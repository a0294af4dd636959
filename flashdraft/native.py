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

__all__ = ["PANEL", "Layer", "Model", "NativeLinear", "format_of", "library", "step", "usable"]

FORMATS = ("float32", "bfloat16", "q8", "q4", "int8")  # as csrc/step.cpp numbers them
EXACT = ("q4", "q8", "bfloat16", "float32")  # the same numbers in ever more bytes
PANEL, BLOCK = 32, 32  # outputs of a panel; inputs that share a scale
_SOURCE = Path(__file__).parent / "csrc" / "step.cpp"
_FLAGS = ("-O3", "-march=native", "-fno-signed-zeros", "-fopenmp", "-fPIC", "-shared", "-std=c++17", "-w")


class _Linear(Structure):
    _fields_ = [("format", c_int64), ("outputs", c_int64), ("inputs", c_int64)]
    _fields_ += [(name, c_void_p) for name in ("weight", "bias", "scale")]


class Layer(Structure):
    _fields_ = [(name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")]
    _fields_ += [(name, _Linear) for name in ("qkv", "out", "gate_up", "down")]


class Model(Structure):
    _fields_ = [(name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "inner")]
    _fields_ += [("eps", c_float), ("layer", POINTER(Layer)), ("norm", c_void_p), ("cos", c_void_p), ("sin", c_void_p)]


class _Step(Structure):
    _fields_ = [(name, c_int64) for name in ("tokens", "slots", "width", "feature_size", "threads")]
    _fields_ += [(name, c_void_p) for name in ("row", "start", "place", "position", "num_ancestors", "ancestors")]
    _fields_ += [(name, c_void_p) for name in ("keys", "values", "wanted", "x", "qkv", "mixed", "inner", "features", "seconds")]


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
                subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(built)], check=True, capture_output=True)
                os.replace(built, path)
    except (OSError, subprocess.CalledProcessError):
        pass  # what runs in the end is named wherever a kernel is
    brought = _SOURCE.with_suffix(".so")  # setup.py built it for AVX2
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
    return hashlib.sha256(_SOURCE.read_bytes() + call.encode()).hexdigest()[:16]


class NativeLinear:
    """x -> x @ weight.T + bias for float32 rows; row-exact. weight: [outputs, inputs].

    Raises ValueError if `format` cannot hold the weight exactly (int8 rounds: one scale an output, one for each row of x).
    """

    row_exact = True

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, format: str = "float32") -> None:
        self.out_features, self.in_features = weight.shape
        self.format = format
        padded = F.pad(weight.float(), (0, 0, 0, -len(weight) % PANEL))
        self.scale: Tensor | None = None
        if format == "int8":
            self.weight, self.scale = _int8(padded)
        else:
            self.weight = {"float32": _panels, "bfloat16": _bfloat16, "q8": _q8, "q4": _q4}[format](padded)
        self.bias = None if bias is None else F.pad(bias.float(), (0, -len(bias) % PANEL))
        self.nbytes = self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)
        pointers = [None if t is None else t.data_ptr() for t in (self.weight, self.bias, self.scale)]
        self.struct = _Linear(FORMATS.index(format), self.out_features, self.in_features, *pointers)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]"""
        x, y = x.contiguous(), x.new_empty(len(x), self.out_features)
        kernels: Any = library()
        pointers = ctypes.byref(self.struct), c_void_p(x.data_ptr()), c_int64(len(x)), c_void_p(y.data_ptr())
        kernels.flashdraft_linear(*pointers, c_int64(torch.get_num_threads()))
        return y


def usable(like: Tensor) -> bool:
    """Whether the kernels can stand in for torch's operations on tensors like this one."""
    return like.device.type == "cpu" and like.dtype == torch.float32 and library() is not None


def format_of(weight: Tensor, kernel: str) -> str:
    """The format in which `kernel` keeps this weight: "compact" takes the fewest bytes that hold it exactly."""
    if kernel != "compact":
        return kernel
    for format in EXACT[:-1]:
        try:
            NativeLinear(weight[:PANEL], format=format)  # most weights fail at once
            NativeLinear(weight, format=format)
            return format
        except ValueError:
            continue
    return EXACT[-1]


def step(
    model: Model,
    shape: tuple[int, int],
    indices: Sequence[Tensor],
    kv: Sequence[tuple[Tensor, Tensor]],
    wanted: Tensor,
    tensors: Sequence[Tensor],
    seconds: Tensor | None,
) -> None:
    """One pass of csrc/step.cpp. shape: slots of a cache row, nodes of a proposal.

    tensors: x, which becomes the final state, three to work in, and the features.
    """
    ints = [t.contiguous() for t in indices]
    pointers = [(c_void_p * len(kv))(*(pair[i].data_ptr() for pair in kv)) for i in (0, 1)]
    sizes = len(tensors[0]), *shape, tensors[-1].shape[1], torch.get_num_threads()
    addresses = [*(t.data_ptr() for t in ints), *(ctypes.cast(p, c_void_p) for p in pointers), wanted.data_ptr()]
    addresses += [*(t.data_ptr() for t in tensors), None if seconds is None else seconds.data_ptr()]
    kernels: Any = library()
    kernels.flashdraft_step(ctypes.byref(model), ctypes.byref(_Step(*sizes, *addresses)))


def _panels(weight: Tensor) -> Tensor:
    """[outputs, inputs] -> [panels, inputs, 32]"""
    return weight.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def _lanes(weight: Tensor, count: int) -> Tensor:
    """[outputs, inputs] -> [panels, inputs / count, 32, count]: the numbers of `count` inputs in one 32-bit lane."""
    return weight.reshape(-1, PANEL, weight.shape[1] // count, count).transpose(1, 2).contiguous()


def _bfloat16(weight: Tensor) -> Tensor:
    _same(weight.bfloat16().float(), weight)
    return _lanes(weight.bfloat16().view(torch.int16), 2)


def _q8(weight: Tensor) -> Tensor:
    """GGUF's Q8_0: w = d q with a 16-bit scale d for 32 inputs."""
    blocks = _in_blocks(weight)
    d = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    q = (blocks / d.where(d > 0, torch.ones(()))).round()
    _same(q * d, blocks)
    return _joined([d], _lanes(q.view(weight.shape).to(torch.int8), 4))


def _q4(weight: Tensor) -> Tensor:
    """GGUF's Q4_1: w = d q + m with 16-bit d and m for 32 inputs and q of 0 to 15."""
    blocks = _in_blocks(weight)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    d = ((high - low) / 15).half().float()
    q = ((blocks - low) / d.where(d > 0, torch.ones(()))).round().clamp(0, 15)
    _same(low.half().float(), low)
    _same(q * d + low, blocks)
    q = q.view(weight.shape).to(torch.uint8)
    return _joined([d, low], _lanes(q[:, ::2] | q[:, 1::2] << 4, 4))


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One scale an output; four inputs side by side. The second tensor: a panel's scales, then 128 times its sums."""
    scale = weight.abs().amax(1) / 127
    q = (weight / scale.where(scale > 0, torch.ones(()))[:, None]).round().to(torch.int8)
    sums = (q.sum(1, dtype=torch.int32) * 128).view(torch.float32)
    return _lanes(q, 4), torch.stack((scale.view(-1, PANEL), sums.view(-1, PANEL)), dim=1).contiguous()


def _in_blocks(weight: Tensor) -> Tensor:
    if weight.shape[1] % BLOCK:
        raise ValueError("the inputs are no multiple of 32")
    return weight.view(len(weight), -1, BLOCK)


def _joined(scales: list[Tensor], numbers: Tensor) -> Tensor:
    """[panels, blocks of inputs, bytes]: the block's scales in half precision, then its numbers."""
    heads = [_panels(scale[..., 0]).half().view(torch.uint8) for scale in scales]
    return torch.cat((*heads, numbers.view(torch.uint8).reshape(*heads[0].shape[:2], -1)), dim=-1).contiguous()


def _same(got: Tensor, wanted: Tensor) -> None:
    if not torch.equal(got, wanted):
        raise ValueError("the format does not hold this weight")
