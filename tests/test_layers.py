"""Linears and attention against obvious references, and bit for bit: a row's result depends on no other row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from flashdraft.cache import SLOT_STEP
from flashdraft.layers import CHUNK, PackedLinear, RMSNorm, SlotAttention, apply_rotary, rotary_table

SMOLLM2 = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # the linears of its blocks, fused: [out, in]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check_rows_are_exact(linear: Callable[[Tensor], Tensor], size: int) -> None:
    """Rows 1 to 32, from either end of a batch, have the bits that they have in the whole of it."""
    x = noise(32, size, seed=1)
    whole = linear(x)
    for count in range(1, 33):
        assert torch.equal(linear(x[:count]), whole[:count]), f"{count} rows"
        assert torch.equal(linear(x[-count:]), whole[-count:]), f"the last {count} rows"


@pytest.mark.parametrize(("rows", "size"), SMOLLM2)
@pytest.mark.parametrize("biased", [False, True])
def test_a_row_exact_linear_gives_the_same_bits_in_any_company(rows: int, size: int, biased: bool) -> None:
    linear = PackedLinear(noise(rows, size) * size**-0.5, noise(rows, seed=2) if biased else None)
    if linear.row_exact:  # measured on this machine; the kernel is oneDNN's
        check_rows_are_exact(linear, size)
    x = noise(7, size, seed=3)
    wanted = F.linear(x.double(), noise(rows, size).double() * size**-0.5, noise(rows, seed=2).double() if biased else None)
    assert torch.allclose(linear(x).double(), wanted, atol=1e-5)


class Drifting(PackedLinear):
    """A kernel whose bits depend on the number of rows, wherever there are fewer than `self.below`."""

    below = 99

    def _run(self, x: Tensor) -> Tensor:
        return F.linear(x, self.plain) * (1 + (x.shape[0] < self.below) * 2.0**-20 * x.shape[0])

    def __init__(self, weight: Tensor) -> None:
        self.plain = weight
        super().__init__(weight)
        self.min_rows, self.row_exact = self._measure(weight)


class DriftingBelowThree(Drifting):
    below = 3


def exact_weight() -> Tensor:
    """Weights with which every kernel gives the same bits: one entry a row."""
    return torch.eye(8)


def test_a_kernel_that_drifts_is_measured_and_its_rows_are_not_called_exact() -> None:
    linear = Drifting(exact_weight())
    assert (linear.min_rows, linear.row_exact) == (1, False)
    with pytest.raises(AssertionError, match="1 rows"):
        check_rows_are_exact(linear, 8)


def test_a_kernel_that_drifts_for_few_rows_gets_more_of_them() -> None:
    linear = DriftingBelowThree(exact_weight())
    assert (linear.min_rows, linear.row_exact) == (4, True)
    check_rows_are_exact(linear, 8)
    assert linear(noise(1, 8)).shape == (1, 8)
    linear.min_rows = 1
    with pytest.raises(AssertionError, match="1 rows"):
        check_rows_are_exact(linear, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_dtype_that_cannot_be_packed_is_computed_plainly(dtype: torch.dtype) -> None:
    weight, bias, x = noise(5, 8).to(dtype), noise(5, seed=1).to(dtype), noise(3, 8, seed=2).to(dtype)
    linear = PackedLinear(weight, bias)
    assert (linear.packed, linear.row_exact, linear.min_rows) == (False, False, 1)
    assert torch.equal(linear(x), F.linear(x, weight, bias))
    assert linear.nbytes == weight.numel() * weight.element_size()


def naive(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax attention one query and head at a time. query: [n, heads, size]; keys, values: [kv_heads, slots, size]."""
    rows = []
    for node in range(len(query)):
        heads = []
        for head in range(query.shape[1]):
            own = head * keys.shape[0] // query.shape[1]
            slots = seen[node].nonzero()[:, 0]
            weights = (keys[own, slots] @ query[node, head] * scale).softmax(0)
            heads.append(weights @ values[own, slots])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def seen_slots(length: int, visible: Tensor, window: int | None, slots: int) -> Tensor:
    """Which slots each node sees: the committed ones and, behind them, the visible nodes; none beyond its window."""
    seen = torch.zeros(len(visible), slots, dtype=torch.bool)
    for node in range(len(visible)):
        for slot in range(slots):
            new = slot - length
            inside = new < 0 or (new < len(visible) and bool(visible[node, new]))
            seen[node, slot] = inside and (window is None or slot > length + node - window)
    return seen


def tree(num_nodes: int, seed: int) -> Tensor:
    """A random tree: which nodes each node sees, itself and its ancestors."""
    visible = torch.eye(num_nodes, dtype=torch.bool)
    for node in range(1, num_nodes):
        visible[node] |= visible[int(torch.randint(node, (), generator=torch.Generator().manual_seed(seed + node)))]
    return visible


def slots_of(heads: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values [heads, slots, size]; the slots that nobody may read are as lively as the others."""
    keys, values = noise(heads, 256, 16, seed=seed, dtype=dtype), noise(heads, 256, 16, seed=seed + 1, dtype=dtype)
    return keys, values


def check_against_naive(length: int, num_nodes: int, shape: str, heads: tuple[int, int], window: int | None = None) -> None:
    dtype = torch.float64
    query, (keys, values) = noise(num_nodes, heads[0], 16, dtype=dtype), slots_of(heads[1], dtype, length)
    visible = torch.ones(num_nodes, num_nodes, dtype=torch.bool)
    visible = {"chain": visible.tril(), "tree": tree(num_nodes, length), "block": visible}[shape]
    seen = seen_slots(length, visible, window, 256)
    given_mask = None if shape == "chain" else visible
    attend = SlotAttention(length, num_nodes, visible=given_mask, groups=heads[0] // heads[1], like=query, window=window)
    got = attend(query, keys, values, 0.3)
    assert torch.allclose(got, naive(query, keys, values, seen, 0.3), atol=1e-9), (length, num_nodes, shape, heads, window)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    length=st.integers(0, 140) | st.sampled_from((SLOT_STEP - 1, SLOT_STEP, 2 * SLOT_STEP - 3)),
    num_nodes=st.integers(1, 14),
    shape=st.sampled_from(("chain", "tree", "block")),
    heads=st.sampled_from(((4, 2), (3, 1), (2, 2))),
    window=st.sampled_from((None, None, 1, 5, 20)),
)
def test_attention_is_a_softmax_over_the_slots_that_a_node_may_see(
    length: int, num_nodes: int, shape: str, heads: tuple[int, int], window: int | None
) -> None:
    check_against_naive(length, num_nodes, shape, heads, window)


class SeesTheNextSlot(SlotAttention):
    def _mask(self, length: int, *rest: Any) -> Tensor:
        return super()._mask(length + 1, *rest)


class SeesSiblings(SlotAttention):
    def __init__(self, length: int, num_nodes: int, *, visible: Tensor | None, **rest: Any) -> None:
        super().__init__(length, num_nodes, visible=None, **rest)


class WideWindow(SlotAttention):
    def __init__(self, length: int, num_nodes: int, *, window: int | None, **rest: Any) -> None:
        super().__init__(length, num_nodes, window=None if window is None else window + 1, **rest)


class WrongHeads(SlotAttention):
    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        return super().__call__(query, keys.flip(0), values.flip(0), scale)


@pytest.mark.parametrize("faulty", [SeesTheNextSlot, SeesSiblings, WideWindow, WrongHeads])
def test_a_planted_fault_of_attention_is_caught(faulty: type[SlotAttention], monkeypatch: pytest.MonkeyPatch) -> None:
    case = (70, 9, "tree", (4, 2), 20)
    check_against_naive(*case)
    monkeypatch.setitem(globals(), "SlotAttention", faulty)
    with pytest.raises(AssertionError, match="70, 9"):
        check_against_naive(*case)


def check_chain_has_the_bits_of_single_nodes(length: int, num_nodes: int, heads: tuple[int, int]) -> None:
    query, (keys, values) = noise(num_nodes, heads[0], 16), slots_of(heads[1], torch.float32, 5)
    groups = heads[0] // heads[1]
    together = SlotAttention(length, num_nodes, visible=None, groups=groups, like=query)(query, keys, values, 0.25)
    for node in range(num_nodes):
        alone = SlotAttention(length + node, 1, visible=None, groups=groups, like=query)
        assert torch.equal(alone(query[node : node + 1], keys, values, 0.25)[0], together[node]), (length, node)


@pytest.mark.parametrize("heads", [(9, 3), (4, 2), (2, 2)])
def test_a_chain_has_the_bits_of_single_nodes(heads: tuple[int, int]) -> None:
    for length in (*range(0, 40, 3), *range(SLOT_STEP - 9, SLOT_STEP + 4), 2 * SLOT_STEP - 5, 3 * SLOT_STEP - 1):
        for num_nodes in (1, 2, CHUNK, CHUNK + 1, 13):
            check_chain_has_the_bits_of_single_nodes(length, num_nodes, heads)


class ReadsOneShape(SlotAttention):
    """Reads as many slots for every node as the last one needs."""

    def __init__(self, length: int, num_nodes: int, *, visible: Tensor | None, **rest: Any) -> None:
        super().__init__(length, num_nodes, visible=torch.ones(num_nodes, num_nodes, dtype=torch.bool).tril(), **rest)


def test_a_node_whose_shape_depends_on_its_company_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel whose bits show the shape that it was given, as real ones may."""
    attend = F.scaled_dot_product_attention

    def telling(query: Tensor, keys: Tensor, *rest: Any, **more: Any) -> Tensor:
        return attend(query, keys, *rest, **more) + math.prod(query.shape[:-1]) * keys.shape[2] * 2.0**-10

    monkeypatch.setattr(F, "scaled_dot_product_attention", telling)
    check_chain_has_the_bits_of_single_nodes(SLOT_STEP - 3, 9, (4, 2))
    monkeypatch.setitem(globals(), "SlotAttention", ReadsOneShape)
    with pytest.raises(AssertionError, match=f"{SLOT_STEP - 3}, 0"):
        check_chain_has_the_bits_of_single_nodes(SLOT_STEP - 3, 9, (4, 2))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
)
def test_rotary_positions_are_those_of_transformers(rope: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config)
    positions = torch.tensor([0, 1, 63, 64, 255])
    query, key = noise(1, 4, 5, 16), noise(1, 2, 5, 16, seed=1)
    wanted = apply_rotary_pos_emb(query, key, *theirs(query, positions[None]))
    cos, sin = (t[positions][:, None] for t in rotary_table(theirs.inv_freq, 256, theirs.attention_scaling, torch.float32))
    for given_heads, right in ((query, wanted[0]), (key, wanted[1])):
        assert torch.allclose(apply_rotary(given_heads[0].transpose(0, 1), cos, sin), right[0].transpose(0, 1), atol=1e-5)


def test_rms_norm_is_that_of_transformers() -> None:
    ours, theirs = RMSNorm(16, 1e-5), LlamaRMSNorm(16, 1e-5)
    with torch.no_grad():
        ours.weight.copy_(noise(16))
        theirs.weight.copy_(noise(16))
    x = noise(3, 16, seed=1) * 1e-2  # small enough for the epsilon to matter
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert not torch.allclose(RMSNorm(16, 1e-6)(x) * ours.weight, theirs(x), atol=1e-3)
