"""DFlash 2's convolutions against their definition, written out number by number in float64: in the
network that is trained, and in every way to decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_dflash import attended, features_of, rms, rotated, the_target, what_is_seen
from torch import Tensor
from toy_folders import ZLAB

from flashdraft.formats.written import config_of
from flashdraft.methods import dflash, network
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.models import decoder
from flashdraft.models.convolution import BlockConvolution, Kernel, convolved
from flashdraft.models.lean import LeanTarget
from flashdraft.train.batch import make_batch
from flashdraft.train.features import Sample
from flashdraft.train.passes import Pass
from flashdraft.types import Rows, SamplingParams

BLOCK = 4
SHAPES = ((2, 16), (3, 8))  # taps, and channels of a group: of 32
TEXT = (5, 9, 31, 7, 7, 12, 50, 3, 22, 17, 8, 40, 41, 9, 33, 6, 28)
Numbers = list[list[float]]


def model_with(taps: int, group_size: int) -> DFlashDraftModel:
    """Random weights, of the convolutions too."""
    config = replace(
        config_of({**ZLAB, "intermediate_size": 64}, "here"),
        rope_parameters={"rope_theta": 1000.0},
        conv_kernel_size=taps,
        conv_group_size=group_size,
    )
    model = DFlashDraftModel(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            is_matrix = parameter.ndim == 2
            parameter.copy_(0.2 * noise if is_matrix else parameter + 0.3 * noise)
    return model.eval()


def with_plain_weights_of(model: DFlashDraftModel, *, taps: int) -> DFlashDraftModel:
    """With new convolutions, or without any."""
    state = {name: tensor for name, tensor in model.state_dict().items() if "_conv." not in name}
    other = DFlashDraftModel(replace(model.config, conv_kernel_size=taps))
    other.load_state_dict(state, strict=False)
    return other.eval()


# The definition. `fault` plants one of the mistakes that implementations make.

FAULTS = (
    "taps reach into the context",
    "taps go round the block",
    "the kernel behind is made of z",
    "the kernels are made of what was convolved",
    "the taps are in reverse order",
    "the sides are swapped",
    "the context is convolved",
    "a channel's group is its remainder",
    "nothing is done behind",
)


def by_hand(u: Numbers, base: Numbers, added: list[Numbers], before: Numbers, fault: str) -> Tensor:
    """One side: u [rows, hidden], base [taps, hidden], added [rows, taps, groups]; before: the rows
    that stand before the block, which only some of the faults read."""
    num_taps, num_groups, hidden = len(base), len(added[0][0]), len(u[0])
    if fault == FAULTS[4]:
        base = base[::-1]
        added = [own[::-1] for own in added]
    out = []
    for t in range(len(u)):
        row = []
        for c in range(hidden):
            group = c % num_groups if fault == FAULTS[7] else c // (hidden // num_groups)
            total = 0.0
            for o in range(num_taps):
                outside = before[t - o][c] if t < o and before else 0.0
                value = outside if t < o else u[t - o][c]
                total += (base[o][c] + added[t][o][group]) * value
            row.append(total)
        out.append(row)
    return torch.tensor(out, dtype=torch.float64)


class ByHand:
    """The convolutions around one sublayer."""

    def __init__(self, w: dict[str, Tensor], place: str, fault: str) -> None:
        self.base = w[f"{place}.base_kernel"]
        self.projection = w[f"{place}.kernel_projection.weight"]
        self.fault = fault

    def added(self, u: Tensor) -> Tensor:
        return (u @ self.projection.T).view(len(u), 2, self.base.shape[1], -1)

    def side(self, side: int, x: Tensor, added: Tensor, context: Tensor) -> Tensor:
        if self.fault == FAULTS[8] and side == 1:
            return x
        side = 1 - side if self.fault == FAULTS[5] else side
        rows_before = {FAULTS[0]: context, FAULTS[1]: x}.get(self.fault, x[:0])
        base, own = self.base[side].tolist(), added[:, side].tolist()
        return by_hand(x.tolist(), base, own, rows_before.tolist(), self.fault)


def reference(
    model: DFlashDraftModel, features: Tensor, anchor: int, size: int, fault: str = ""
) -> Tensor:
    """Normed states [size, hidden]. features: [n, F * hidden] of the tokens before the anchor."""
    config, at = model.config, len(features)
    w = {name: t.double() for name, t in model.state_dict().items()}
    context = rms(features @ w["fc.weight"].T, w["hidden_norm.weight"])
    block = list(range(at, at + size))
    x = the_target().embed(torch.tensor([anchor] + [config.mask_token_id] * (size - 1)))
    for n in range(config.num_hidden_layers):
        p = f"layers.{n}."

        def heads(x: Tensor, name: str, p: str = p) -> Tensor:
            return (x @ w[f"{p}self_attn.{name}_proj.weight"].T).view(len(x), -1, config.head_dim)

        u = rms(x, w[p + "input_layernorm.weight"])
        conv = ByHand(w, p + "attention_conv", fault)
        added, source = conv.added(u), context
        y = conv.side(0, u, added, context)
        if fault == FAULTS[3]:
            added = conv.added(y)
        if fault == FAULTS[6]:
            source = conv.side(0, context, conv.added(context), context[:0])
        q = rotated(rms(heads(y, "q"), w[p + "self_attn.q_norm.weight"]), block)
        both = torch.cat((source, y))
        keys = rms(heads(both, "k"), w[p + "self_attn.k_norm.weight"])
        keys = rotated(keys, [*range(at), *block])
        seen = what_is_seen(config, n, at, size, "")
        z = attended(q, keys, heads(both, "v"), seen) @ w[p + "self_attn.o_proj.weight"].T
        x = x + conv.side(1, z, conv.added(z) if fault == FAULTS[2] else added, context)

        u = rms(x, w[p + "post_attention_layernorm.weight"])
        conv = ByHand(w, p + "mlp_conv", fault)
        added = conv.added(u)
        y = conv.side(0, u, added, context)
        if fault == FAULTS[3]:
            added = conv.added(y)
        gate, up = y @ w[p + "mlp.gate_proj.weight"].T, y @ w[p + "mlp.up_proj.weight"].T
        z = (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
        x = x + conv.side(1, z, conv.added(z) if fault == FAULTS[2] else added, context)
    return rms(x, w["norm.weight"])


def trained_states(model: DFlashDraftModel, text: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Of many blocks of one text at once, and of another text beside it: the blocks' states [n,
    rows, hidden] and the places of their anchors."""
    other = tuple(reversed(text))
    samples = []
    for number, tokens in enumerate((text, other)):
        samples.append((number, Sample(torch.tensor(tokens), features_of(tokens), 5)))
    batch = make_batch(samples, model.config, 99, seed=0)
    with torch.no_grad():
        states = Pass(model.double(), the_target().embed)(batch)
    span = batch.spans[0]
    rows = model.config.block_rows
    anchors = batch.positions.rows[span.rows][::rows].tolist()
    return states[span.rows].unflatten(0, (-1, rows)), anchors


@pytest.mark.parametrize(("taps", "group_size"), SHAPES)
def test_trained_network_is_the_definition(taps: int, group_size: int) -> None:
    model = model_with(taps, group_size)
    states, anchors = trained_states(model, TEXT)
    assert len(anchors) > 8
    for index in (0, 3, 7):
        at = anchors[index]
        expected = reference(model, features_of(TEXT)[:at], TEXT[at], BLOCK)
        torch.testing.assert_close(states[index], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_changes_the_states(fault: str) -> None:
    model = model_with(3, 8)
    states, anchors = trained_states(model, TEXT)
    wrong = reference(model, features_of(TEXT)[: anchors[3]], TEXT[anchors[3]], BLOCK, fault)
    assert float((states[3] - wrong).abs().max()) > 0.05


def test_new_convolutions_change_no_bit() -> None:
    model = model_with(2, 16)
    blank = with_plain_weights_of(model, taps=2)
    plain = with_plain_weights_of(model, taps=0)
    assert torch.equal(trained_states(blank, TEXT)[0], trained_states(plain, TEXT)[0])
    assert not torch.equal(trained_states(model, TEXT)[0], trained_states(plain, TEXT)[0])


# Decoding: a block behind each of several texts, whatever runs the pass.

HISTORIES = (TEXT[:9], TEXT, TEXT[2:5])


def drafter_of(
    model: DFlashDraftModel, kernel: str = "torch", *, size: int = BLOCK
) -> DFlashDrafter:
    """Beside a target on a kernel, which the draft follows: torch and compiled in float64."""
    dtype = torch.float64 if kernel in ("torch", "compiled") else torch.float32
    target = LeanTarget(tiny_model("llama", dtype=dtype), "llama", kernel=kernel)
    return DFlashDrafter(PackedDraft(model, target), block_size=size)


@torch.inference_mode()
def decoded_states(
    drafter: DFlashDrafter, histories: Sequence[Sequence[int]] = HISTORIES
) -> Tensor:
    """[rows, size, hidden], in float64."""
    slots = list(range(len(histories)))
    rows = Rows(
        slots, [list(h) for h in histories], [SamplingParams()] * len(slots), [1] * len(slots)
    )
    before = [torch.tensor(history[:-1]) for history in histories]
    like = drafter.network.probe
    features = [features_of(history)[:-1].to(like) for history in histories]
    drafter.observe(rows, before, features)
    return drafter._states(slots, torch.tensor(rows.anchors)).double()


def by_definition(model: DFlashDraftModel, size: int) -> Tensor:
    states = []
    for history in HISTORIES:
        states.append(reference(model, features_of(history)[:-1], history[-1], size))
    return torch.stack(states)


@pytest.mark.parametrize("size", [2, BLOCK, 7])
@pytest.mark.parametrize(("taps", "group_size"), SHAPES)
def test_decoded_block_is_the_definition(taps: int, group_size: int, size: int) -> None:
    """A block may be shorter or longer than those that were trained."""
    model = model_with(taps, group_size)
    drafter = drafter_of(model, size=size)
    assert drafter.network.decoder.kernel == "torch"
    expected = by_definition(model, size)
    torch.testing.assert_close(decoded_states(drafter), expected, rtol=0, atol=1e-3)


def test_taps_that_go_on_from_row_to_row_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(x: Tensor, kernel: Kernel | None, places: Tensor) -> Tensor:
        return convolved(x, kernel, torch.arange(len(places)))

    model = model_with(2, 16)
    expected = by_definition(model, BLOCK)
    monkeypatch.setattr(decoder, "convolved", leaking)
    states = decoded_states(drafter_of(model))
    torch.testing.assert_close(states[0], expected[0], rtol=0, atol=1e-3)
    assert float((states[1:] - expected[1:]).abs().amax((1, 2)).min()) > 0.05


@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 7])
def test_kernels_pass_is_the_definition(taps: int, size: int) -> None:
    assert far_from_definition(taps, size) < 1e-3


def far_from_definition(taps: int, size: int) -> float:
    """By the C++ kernels, from weights that are not rounded."""
    model = model_with(taps, 16)
    with pytest.MonkeyPatch.context() as patch:
        for module in (dflash, network):
            patch.setattr(module, "DRAFT_KERNEL", "float32")
        drafter = drafter_of(model, "float32", size=size)
    assert drafter.network.decoder.native
    return float((decoded_states(drafter) - by_definition(model, size)).abs().max())


def test_compiled_pass_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks of 7 are padded to 8; it is traced whole."""
    compiling = torch.compile

    def traced(trace: Any, **options: Any) -> Any:
        return compiling(trace, **{**options, "mode": None, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", traced)
    model = model_with(2, 16)
    drafter = drafter_of(model, "compiled", size=7)
    assert drafter.network.step is not None
    torch.testing.assert_close(decoded_states(drafter), by_definition(model, 7), rtol=0, atol=1e-3)


def test_groups_that_the_kernels_cannot_take_run_in_torch() -> None:
    drafter = drafter_of(model_with(2, 8), "float32")
    assert drafter.network.decoder.kernel == "torch"
    size = drafter.network.decoder.odd_size()
    assert size == "its convolutions' group size is 8, which is no multiple of 16"


@pytest.mark.parametrize("kernel", ["torch", "int8"])
def test_new_convolutions_change_no_bit_of_a_decoded_block(kernel: str) -> None:
    model = model_with(2, 16)
    drafter = drafter_of(model, kernel)
    assert drafter.network.decoder.kernel == kernel
    own = decoded_states(drafter)
    blank, plain = (
        decoded_states(drafter_of(with_plain_weights_of(model, taps=taps), kernel))
        for taps in (2, 0)
    )
    assert torch.equal(blank, plain)
    assert not torch.allclose(own, plain, atol=0.05)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_block_has_its_bits_in_any_company(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        drafter = drafter_of(model_with(3, 16), "int8")
        together = decoded_states(drafter)
        for row, history in enumerate(HISTORIES):
            other = drafter_of(model_with(3, 16), "int8")
            assert torch.equal(decoded_states(other, [history])[0], together[row])
    finally:
        torch.set_num_threads(before)


# One side alone: rows of several blocks of different lengths.


def some_rows(num_taps: int) -> tuple[Tensor, Kernel, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    base = torch.randn(num_taps, 6, generator=generator, dtype=torch.float64)
    added = torch.randn(9, num_taps, 3, generator=generator, dtype=torch.float64)
    places = torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 3])
    return x, Kernel(base, added), places


@pytest.mark.parametrize("num_taps", [1, 2, 3, 5])
def test_no_tap_leaves_its_block(num_taps: int) -> None:
    x, kernel, places = some_rows(num_taps)
    together = convolved(x, kernel, places)
    for block in (slice(0, 4), slice(4, 5), slice(5, 9)):
        own = by_hand(x[block].tolist(), kernel.base.tolist(), kernel.added[block].tolist(), [], "")
        torch.testing.assert_close(together[block], own)
    leaking = convolved(x, kernel, torch.arange(9))
    assert torch.equal(leaking, together) == (num_taps == 1)


def test_what_is_not_finite_stays_in_its_block() -> None:
    x, kernel, places = some_rows(3)
    x[3] = torch.inf
    assert bool(convolved(x, kernel, places)[4:].isfinite().all())


def test_gradients_are_those_of_finite_differences() -> None:
    x, kernel, places = some_rows(3)
    inputs = [tensor.requires_grad_() for tensor in (x, *kernel)]

    def one_side(x: Tensor, base: Tensor, added: Tensor) -> Tensor:
        return convolved(x, Kernel(base, added), places)

    assert torch.autograd.gradcheck(one_side, inputs)


def test_every_weight_of_a_new_convolution_learns() -> None:
    convolution = BlockConvolution(32, 2, 16)
    u = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    places = torch.arange(8) % 4
    before, behind = convolution(u)
    z = convolved(u, before, places) * 2
    convolved(z, behind, places).square().sum().backward()
    for parameter in convolution.parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).any(-1).all())
