"""Linears and attention against obvious references, and bit for bit: a row's result depends on no
other row.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from flashdraft.models.cache import SLOT_STEP, SlotCache
from flashdraft.models.decoder import Decoder
from flashdraft.models.layers import (
    RMSNorm,
    Rotary,
    TorchLinear,
    apply_rotary,
    rotary_table,
    scaled_length,
)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_linear_is_the_linear(biased: bool) -> None:
    weight, bias, x = noise(96, 64), noise(96, seed=1) if biased else None, noise(7, 64, seed=2)
    assert torch.allclose(TorchLinear(weight, bias)(x), F.linear(x, weight, bias), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_dtype_that_cannot_be_packed_is_computed_plainly(dtype: torch.dtype) -> None:
    weight, bias, x = (
        noise(5, 8).to(dtype),
        noise(5, seed=1).to(dtype),
        noise(3, 8, seed=2).to(dtype),
    )
    linear = TorchLinear(weight, bias)
    assert (linear.format, linear.row_exact) == ("torch", False)
    assert torch.equal(linear(x), F.linear(x, weight, bias))
    assert linear.nbytes == weight.numel() * weight.element_size()


def naive(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax attention one query and head at a time. query: [n, heads, size]; keys, values:
    [kv_heads, slots, size].
    """
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
    """Which slots each node sees: the committed ones and, behind them, the visible nodes; none
    beyond its window.
    """
    seen = torch.zeros(len(visible), slots, dtype=torch.bool)
    for node in range(len(visible)):
        for slot in range(slots):
            new = slot - length
            inside = new < 0 or (new < len(visible) and bool(visible[node, new]))
            seen[node, slot] = inside and (window is None or abs(slot - length - node) < window)
    return seen


def tree(num_nodes: int, seed: int) -> Tensor:
    """A random tree: which nodes each node sees, itself and its ancestors."""
    visible = torch.eye(num_nodes, dtype=torch.bool)
    for node in range(1, num_nodes):
        visible[node] |= visible[
            int(torch.randint(node, (), generator=torch.Generator().manual_seed(seed + node)))
        ]
    return visible


def check_against_naive(
    length: int,
    num_nodes: int,
    shape: str,
    heads: tuple[int, int],
    mask: tuple[int | None, bool] = (None, False),
    fault: str = "",
) -> None:
    window, causal = mask
    dtype, others = torch.float64, 3
    query = noise(num_nodes, heads[0], 16, dtype=dtype)
    keys, values = (
        noise(heads[1], 256, 16, seed=seed, dtype=dtype) for seed in (length, length + 1)
    )
    visible = torch.ones(num_nodes, num_nodes, dtype=torch.bool)
    visible = {"chain": visible.tril(), "tree": tree(num_nodes, length), "block": visible}[shape]
    visible = visible.tril() if causal else visible
    wanted = naive(query, keys, values, seen_slots(length, visible, window, 256), 0.25)
    cache = SlotCache(1, others, 256)
    new = slice(length, length + num_nodes)
    for stored, given_ in zip(cache.layer(0, keys), (keys, values), strict=True):
        stored.copy_(
            noise(others, heads[1], 256, 16, seed=9, dtype=dtype)
        )  # what nobody may read is as lively as the rest
        stored[1, :, :length] = given_[:, :length]
    if fault == "heads":
        cache.keys[0] = cache.keys[0].flip(1)  # type: ignore[union-attr]
    wide = None if window is None else window + (fault == "window")
    own = wide, causal != (fault == "causal")
    decoder: Any = SimpleNamespace(
        heads=heads[0],
        kv_heads=heads[1],
        masks=(own,),
        norm=query,
        attention=F.scaled_dot_product_attention,
    )
    kv = [tuple(stored[1:2] for stored in cache.layer(0, keys))]
    seen = {"chain": visible, "tree": tree(num_nodes, length), "block": torch.ones_like(visible)}[
        shape
    ]
    seen = seen if fault != "siblings" else torch.ones_like(visible).tril()
    starts = torch.tensor([length + (fault == "slot")])
    at = torch.zeros(num_nodes, dtype=torch.long), None, starts + torch.arange(num_nodes)
    attend = Decoder.attend_to(decoder, kv, starts, seen[None], at)
    got = attend(0, query, keys[:, new].transpose(0, 1), values[:, new].transpose(0, 1))
    assert torch.allclose(got, wanted, atol=1e-9), (length, num_nodes, shape, heads, mask)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    length=st.integers(0, 140) | st.sampled_from((SLOT_STEP - 1, SLOT_STEP, 2 * SLOT_STEP - 3)),
    num_nodes=st.integers(1, 14),
    shape=st.sampled_from(("chain", "tree", "block")),
    heads=st.sampled_from(((4, 2), (3, 1), (2, 2))),
    window=st.sampled_from((None, None, 1, 5, 20)),
    causal=st.booleans(),
)
def test_attention_is_a_softmax_over_the_slots_that_a_node_may_see(
    length: int,
    num_nodes: int,
    shape: str,
    heads: tuple[int, int],
    window: int | None,
    causal: bool,
) -> None:
    check_against_naive(length, num_nodes, shape, heads, (window, causal))


@pytest.mark.parametrize("fault", ["slot", "siblings", "window", "heads", "causal"])
def test_a_planted_fault_of_attention_is_caught(fault: str) -> None:
    case: Any = (70, 9, "block" if fault == "causal" else "tree", (4, 2), (20, fault != "causal"))
    check_against_naive(*case)
    with pytest.raises(AssertionError, match="70, 9"):
        check_against_naive(*case, fault)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_rotary_positions_are_those_of_transformers(rope: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=rope
    )
    theirs = LlamaRotaryEmbedding(config)
    positions = torch.tensor([0, 1, 63, 64, 255])
    query, key = noise(1, 4, 5, 16), noise(1, 2, 5, 16, seed=1)
    wanted = apply_rotary_pos_emb(query, key, *theirs(query, positions[None]))
    cos, sin = (
        t[positions][:, None]
        for t in rotary_table(theirs.inv_freq, 256, theirs.attention_scaling, torch.float32)
    )
    for given_heads, right in ((query, wanted[0]), (key, wanted[1])):
        assert torch.allclose(
            apply_rotary(given_heads[0].transpose(0, 1), cos, sin),
            right[0].transpose(0, 1),
            atol=1e-5,
        )


def test_rms_norm_is_that_of_transformers() -> None:
    ours, theirs = RMSNorm(16, 1e-5), LlamaRMSNorm(16, 1e-5)
    with torch.no_grad():
        ours.weight.copy_(noise(16))
        theirs.weight.copy_(noise(16))
    x = noise(3, 16, seed=1) * 1e-2  # small enough for the epsilon to matter
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert not torch.allclose(RMSNorm(16, 1e-6)(x) * ours.weight, theirs(x), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_table_that_grew_has_the_bits_of_one_made_at_once(dtype: torch.dtype) -> None:
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, 34, 2) / 34))
    rotary = Rotary(inv_freq, 1.1, torch.zeros(1, dtype=dtype))
    assert not rotary.reserve(256)
    for count in (257, 300, 1001, 1300):
        rotary.reserve(count)
    whole = rotary_table(inv_freq, len(rotary.tables[0]), 1.1, dtype)
    assert 1300 <= len(whole[0]) <= 2600
    for grown, made in zip(rotary.tables, whole, strict=True):
        assert torch.equal(grown, made)
    positions = torch.tensor([1299, 0, 256])
    assert torch.equal(rotary.at(positions)[0][:, 0], whole[0][positions])
    assert not torch.equal(rotary.at(positions)[0][:, 0], whole[0][positions + 1])


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (None, 64),
        ({"rope_type": "default", "rope_theta": 1e4}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"type": "yarn", "factor": 2.0}, 128),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4}, 64),
        ({"rope_type": "dynamic", "factor": 4.0}, 64),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 32),
    ],
)
def test_scaled_length_is_what_the_config_means(rope: dict[str, Any] | None, length: int) -> None:
    assert scaled_length(64, rope) == length
