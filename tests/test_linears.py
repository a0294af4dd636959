"""The C++ linears at the edges: tiles of rows, chunks of inputs, vectors of other processors."""

from __future__ import annotations

import platform
import subprocess

import pytest
import torch
import torch.nn.functional as F
from test_native import EXACT, noise, weight_for

from flashdraft.models import native
from flashdraft.models.native import NativeLinear

WIDTHS = (
    "x86-64",
    "x86-64-v3",
    "skylake-avx512",  # AVX-512 without products of bytes
    "icelake-server",
)


def check_rows(linear: NativeLinear, rows: int) -> None:
    """Each row's bits are those of the row alone."""
    x = noise(rows, linear.in_features, seed=2)
    together = linear(x)
    for row in range(rows):
        assert torch.equal(linear(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("format", [*EXACT, "int8"])
@pytest.mark.parametrize("rows", [48, 49, 97])
def test_rows_of_several_tiles_have_the_bits_of_single_ones(format: str, rows: int) -> None:
    check_rows(NativeLinear(weight_for(format, 50, 96), kernel=format), rows)


@pytest.mark.parametrize(("format", "inputs"), [("float32", 41), ("float32", 7), ("bfloat16", 42)])
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_the_last_chunk_may_have_fewer_inputs(format: str, inputs: int, rows: int) -> None:
    weight = noise(50, inputs).bfloat16().float()  # which both hold
    x = noise(rows, inputs, seed=2)
    linear = NativeLinear(weight, kernel=format)
    assert torch.allclose(linear(x), F.linear(x, weight), atol=1e-5)
    check_rows(linear, rows)


def test_a_row_whose_bits_depend_on_the_others_is_seen() -> None:
    linear = NativeLinear(weight_for("float32", 50, 96), kernel="float32")

    class Faulty(NativeLinear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) * (1 + 1e-6 * (len(x) > 48))

    linear.__class__ = Faulty
    check_rows(linear, 48)
    with pytest.raises(AssertionError):
        check_rows(linear, 49)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of other processors")
@pytest.mark.parametrize("march", WIDTHS)
def test_the_kernels_compile_for_vectors_of_every_width(march: str) -> None:
    for file in native._FILES:
        if file.suffix != ".cpp":
            continue
        command = [*native._compiler(), f"-march={march}", "-std=c++17", "-w", "-fsyntax-only"]
        subprocess.run([*command, str(file)], check=True)
