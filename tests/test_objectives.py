"""The losses and the masks of training, each against its definition written out slowly, with
mistakes that must be seen.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB
from torch import Tensor
from toy_training import BLOCK, CONFIG, HIDDEN, language_model, network, toy_sample

from flashdraft.train import objectives as loss_stage
from flashdraft.train.batch import Batch, flex_mask, make_batch
from flashdraft.train.config import TrainConfig
from flashdraft.train.objectives import Loss, chunked_loss, position_weights, row_loss
from flashdraft.train.passes import Pass

# Weights of a block's positions.

Weights = Callable[[Tensor, Tensor, Tensor], Tensor]  # log_q, offsets, blocks


def weight_case(
    lengths: Sequence[int], numbers: Sequence[int], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks with these numbers of labelled positions; a block that the sequence's end cuts short
    has fewer.
    """
    offsets = torch.cat([torch.arange(1, n + 1) for n in lengths])
    blocks = torch.cat(
        [torch.full((n,), number) for n, number in zip(lengths, numbers, strict=True)]
    )
    q = torch.rand(len(offsets), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return q.log(), offsets, blocks


WEIGHT_CASES = [
    weight_case((3, 3, 3), (0, 1, 2), 1),
    weight_case((3, 1, 3, 2), (0, 1, 2, 3), 2),  # two sequences, each with a block cut short
    weight_case((1,), (0,), 3),
    weight_case(
        (2, 7, 5), (3, 4, 9), 4
    ),  # as in a later chunk: numbers neither from 0 nor without gaps
]


def slow_dpace(log_q: Tensor, offsets: Tensor, blocks: Tensor, fault: str = "") -> Tensor:
    """w_j = sum over m >= j of the product over i <= m of q~_i, with q~ = (1 + q) / 2 (2605.18810);
    `fault` plants a mistake.
    """
    q, offset, block = log_q.exp().tolist(), offsets.tolist(), blocks.tolist()
    size, weights = max(offset), []
    for j in range(len(q)):
        mates = [i for i in range(len(q)) if block[i] == block[j] or fault == "blocks are mixed up"]
        terms = []
        for m in mates:
            if offset[m] < offset[j] or (fault == "not summed" and m != j):
                continue
            first = offset[j] if fault == "the product begins at j" else 1
            inside = [i for i in mates if first <= offset[i] <= offset[m]]
            terms.append(
                math.prod(q[i] if fault == "not softened" else (1 + q[i]) / 2 for i in inside)
            )
        if fault == "what lies behind the sequence's end counts":
            terms += [
                terms[-1] * 0.5**k for k in range(1, size - max(offset[i] for i in mates) + 1)
            ]
        weights.append(sum(terms))
    return torch.tensor(weights, dtype=torch.float64)


def is_dpace(weights: Weights) -> bool:
    return all(
        torch.allclose(weights(*case), slow_dpace(*case), rtol=1e-12, atol=0)
        for case in WEIGHT_CASES
    )


def dpace(log_q: Tensor, offsets: Tensor, blocks: Tensor) -> Tensor:
    return position_weights("dpace", log_q, offsets, blocks, gamma=math.nan)


def test_dpace_weights_equal_the_definition() -> None:
    assert is_dpace(dpace)


DPACE_FAULTS = (
    "not softened",
    "the product begins at j",
    "not summed",
    "blocks are mixed up",
    "what lies behind the sequence's end counts",
)


@pytest.mark.parametrize("fault", DPACE_FAULTS)
def test_planted_wrong_dpace_weights_are_caught(fault: str) -> None:
    assert not is_dpace(lambda *case: slow_dpace(*case, fault))


def test_dpace_weights_are_the_gradient_of_the_expected_accepted_length() -> None:
    """Over all outcomes of accepting each position with probability q~: w_j is the derivative by
    log q~_j.
    """
    log_q, offsets, blocks = weight_case((4,), (0,), 5)
    logs = ((1 + log_q.exp()) / 2).log().requires_grad_()
    accept = logs.exp()
    expected = torch.zeros((), dtype=torch.float64)
    for outcome in itertools.product((True, False), repeat=4):
        likelihood = torch.stack(
            [a if hit else 1 - a for a, hit in zip(accept, outcome, strict=True)]
        ).prod()
        expected = expected + likelihood * len(list(itertools.takewhile(bool, outcome)))
    (gradient,) = torch.autograd.grad(expected, logs)
    torch.testing.assert_close(dpace(log_q, offsets, blocks), gradient)


def test_dpace_weight_of_a_certain_block_is_what_is_left_of_it() -> None:
    weights = dpace(
        torch.zeros(5, dtype=torch.float64),
        torch.tensor([1, 2, 3, 1, 2]),
        torch.tensor([0, 0, 0, 1, 1]),
    )
    assert weights.tolist() == [3, 2, 1, 2, 1]


def test_dpace_weights_of_no_rows_are_none() -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert dpace(torch.zeros(0), none, none).shape == (0,)


def is_decay(weights: Callable[[Tensor, float], Tensor]) -> bool:
    offsets = torch.tensor([1, 2, 3, 7, 15])
    return all(
        weights(offsets, gamma).tolist()
        == pytest.approx([math.exp(-(k - 1) / gamma) for k in offsets.tolist()], rel=1e-9)
        for gamma in (1.0, 4.0, 7.0)
    )


def decay(offsets: Tensor, gamma: float) -> Tensor:
    return position_weights(
        "decay", torch.zeros(len(offsets), dtype=torch.float64), offsets, offsets, gamma=gamma
    )


def test_decay_equals_the_definition() -> None:
    assert is_decay(decay)


WRONG_DECAYS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "from 0": lambda offsets, gamma: decay(offsets + 1, gamma),
    "none": lambda offsets, gamma: decay(offsets, 1e9),
    "gamma multiplies": lambda offsets, gamma: decay(offsets, 1 / gamma),
}


@pytest.mark.parametrize("wrong", WRONG_DECAYS)
def test_planted_wrong_decay_is_caught(wrong: str) -> None:
    assert not is_decay(WRONG_DECAYS[wrong])


# Soft labels.

RowLoss = Callable[[str, Tensor, Tensor, Tensor], Tensor]


def slow_softmax(row: Sequence[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def slow_row_loss(kind: str, logits: Tensor, labels: Tensor, target_logits: Tensor) -> list[float]:
    losses = []
    for ours, label, theirs in zip(
        logits.tolist(), labels.tolist(), target_logits.tolist(), strict=True
    ):
        q, p = slow_softmax(ours), slow_softmax(theirs)
        losses.append(
            {
                "ce": -math.log(q[label]),
                "kl": sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
                "tv": 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True)),
            }[kind]
        )
    return losses


def row_case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits, theirs = (3 * torch.randn(6, 9, generator=g, dtype=torch.float64) for _ in range(2))
    return logits, torch.randint(9, (6,), generator=g), theirs


def is_row_loss(kind: str, loss: RowLoss) -> bool:
    return all(
        loss(kind, *row_case(seed)).tolist()
        == pytest.approx(slow_row_loss(kind, *row_case(seed)), rel=1e-9)
        for seed in range(4)
    )


@pytest.mark.parametrize("kind", ["ce", "kl", "tv"])
def test_row_loss_equals_the_naive_sum(kind: str) -> None:
    assert is_row_loss(kind, row_loss)


def mean_of_both_ways(kind: str, logits: Tensor, labels: Tensor, theirs: Tensor) -> Tensor:
    return (row_loss(kind, logits, labels, theirs) + row_loss(kind, theirs, labels, logits)) / 2


WRONG_ROW_LOSSES: dict[str, tuple[str, RowLoss]] = {
    "kl the other way": ("kl", lambda kind, x, y, z: row_loss(kind, z, y, x)),
    "kl both ways": ("kl", mean_of_both_ways),
    "kl with the target's entropy left in": (
        "kl",
        lambda kind, x, y, z: -(z.softmax(-1) * x.log_softmax(-1)).sum(-1),
    ),
    "kl as a mean": ("kl", lambda kind, x, y, z: row_loss(kind, x, y, z) / x.shape[-1]),
    "tv without the half": ("tv", lambda kind, x, y, z: 2 * row_loss(kind, x, y, z)),
    "tv of logits": ("tv", lambda kind, x, y, z: 0.5 * (x - z).abs().sum(-1)),
    "tv squared": (
        "tv",
        lambda kind, x, y, z: 0.5 * (x.softmax(-1) - z.softmax(-1)).pow(2).sum(-1),
    ),
    "softmax over the rows": ("tv", lambda kind, x, y, z: row_loss(kind, x.T, y, z.T)[:6]),
}


@pytest.mark.parametrize("wrong", WRONG_ROW_LOSSES)
def test_planted_wrong_row_loss_is_caught(wrong: str) -> None:
    assert not is_row_loss(*WRONG_ROW_LOSSES[wrong])


@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_soft_loss_of_the_targets_own_law_is_zero_and_so_is_its_gradient(kind: str) -> None:
    logits, labels, theirs = row_case(0)
    same = theirs.clone().requires_grad_()
    losses = row_loss(kind, same + 1.0, labels, theirs)  # a shift of all logits is the same law
    losses.sum().backward()
    assert float(losses.detach().abs().max()) < 1e-12
    if kind == "kl":
        assert same.grad is not None
        assert float(same.grad.abs().max()) < 1e-12
    assert float(row_loss(kind, logits, labels, theirs).min()) > 0.1


# The loss in chunks.

ROWS, COLUMNS = 11, 13
CHUNKS = (slice(0, 4), slice(4, 5), slice(5, 9))  # the last two rows belong to none


class Toy:
    """A loss of states and of a head's parameters, one of which the loss does not touch."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.states = noise(ROWS, 5).requires_grad_()
        self.scale, self.bias, self.idle = (
            noise(*shape).requires_grad_() for shape in ((5,), (COLUMNS,), (3,))
        )
        self.weight, self.labels = noise(COLUMNS, 5), torch.randint(COLUMNS, (ROWS,), generator=g)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.scale, self.bias, self.idle]

    def part(self, rows: Tensor, chunk: slice) -> tuple[Tensor, dict[str, Tensor]]:
        logits = (rows * self.scale) @ self.weight.T
        if chunk.start:  # not every chunk uses every parameter
            logits = logits + self.bias
        losses = F.cross_entropy(logits, self.labels[chunk], reduction="none")
        return losses.pow(2).sum(), {"loss": losses.detach(), "row": torch.arange(ROWS)[chunk]}

    def gradients(self, scalar: Tensor) -> list[Tensor]:
        wanted = [self.states, *self.parameters]
        got = torch.autograd.grad(scalar * 3.0, wanted, allow_unused=True)
        return [
            torch.zeros_like(one) if grad is None else grad
            for one, grad in zip(wanted, got, strict=True)
        ]


Chunked = Callable[
    [Tensor, Sequence[Tensor], Sequence[slice], Any], tuple[Tensor, float, dict[str, Tensor]]
]


def is_the_whole(chunked: Chunked) -> bool:
    """Value, figures and gradients are those of the whole graph."""
    toy, other = Toy(), Toy()
    parts = [other.part(other.states[chunk], chunk) for chunk in CHUNKS]
    whole = torch.stack([loss for loss, _ in parts]).sum()
    surrogate, value, figures = chunked(toy.states, toy.parameters, CHUNKS, toy.part)
    same = abs(value - float(whole.detach())) < 1e-9 and figures["row"].tolist() == list(range(9))
    same = same and torch.allclose(
        figures["loss"], torch.cat([figure["loss"] for _, figure in parts])
    )
    pairs = zip(toy.gradients(surrogate), other.gradients(whole), strict=True)
    return same and all(
        torch.allclose(got, expected, rtol=1e-10, atol=1e-12) for got, expected in pairs
    )


def test_chunked_loss_has_value_and_gradients_of_the_whole() -> None:
    assert is_the_whole(chunked_loss)


def one_state_gradient_for_all(
    states: Tensor, parameters: Sequence[Tensor], chunks: Sequence[slice], part: Any
) -> Any:
    surrogate, value, figures = chunked_loss(states, parameters, chunks, part)
    return surrogate + (states - states.detach()).sum(), value, figures


WRONG_CHUNKS: dict[str, Chunked] = {
    "a chunk is forgotten": lambda s, p, chunks, part: chunked_loss(s, p, chunks[:-1], part),
    "a chunk counts twice": lambda s, p, chunks, part: chunked_loss(
        s, p, [*chunks, chunks[0]], part
    ),
    "the head's gradients are dropped": lambda s, p, chunks, part: chunked_loss(
        s, (), chunks, part
    ),
    "one parameter's gradient is dropped": lambda s, p, chunks, part: chunked_loss(
        s, p[:1], chunks, part
    ),
    "the states' gradients are dropped": lambda s, p, chunks, part: chunked_loss(
        s.detach(), p, chunks, part
    ),
    "the states have a gradient more": one_state_gradient_for_all,
}


@pytest.mark.parametrize("wrong", WRONG_CHUNKS)
def test_planted_wrong_chunks_are_caught(wrong: str) -> None:
    assert not is_the_whole(WRONG_CHUNKS[wrong])


def test_chunks_leave_no_gradient_behind() -> None:
    """Nothing is accumulated before the surrogate goes back."""
    toy = Toy()
    chunked_loss(toy.states, toy.parameters, CHUNKS, toy.part)
    assert all(tensor.grad is None for tensor in (toy.states, *toy.parameters))


class _Held:
    """A tensor that autograd keeps for its way back."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Kept:
    """How many elements of `columns` columns autograd keeps at the moment."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        self.alive.add(held)
        return held

    @contextmanager
    def watch(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor):
            yield

    @property
    def rows(self) -> int:
        return sum(
            h.tensor.shape[0]
            for h in self.alive
            if h.tensor.ndim == 2 and h.tensor.shape[1] == self.columns
        )


def rows_kept_before_each_chunk(chunked: Chunked) -> list[int]:
    toy, kept, counts = Toy(), Kept(COLUMNS), []

    def part(rows: Tensor, chunk: slice) -> tuple[Tensor, dict[str, Tensor]]:
        counts.append(kept.rows)
        made = toy.part(rows, chunk)
        assert kept.rows > counts[-1]  # what is counted is there
        return made

    with kept.watch():
        chunked(toy.states, toy.parameters, CHUNKS, part)
    return counts


def whole_graph(
    states: Tensor, parameters: Sequence[Tensor], chunks: Sequence[slice], part: Any
) -> Any:
    """The planted fault: all chunks' graphs are there at once."""
    parts = [part(states[chunk], chunk) for chunk in chunks]
    return torch.stack([loss for loss, _ in parts]).sum(), 0.0, {}


def test_logits_of_one_chunk_are_alive_at_a_time() -> None:
    assert rows_kept_before_each_chunk(chunked_loss) == [0, 0, 0]


def test_logits_that_stay_alive_are_caught() -> None:
    assert rows_kept_before_each_chunk(whole_graph)[1:] > [0, 0]


# The loss of a batch in small chunks and in one.

SAMPLES = [
    (7, toy_sample(20, 6, 1, final=True)),
    (8, toy_sample(9, 2, 2, final=True)),
    (9, toy_sample(33, 30, 3, final=True)),
]


def loss_and_gradient(config: TrainConfig, seen: list[int] | None = None) -> tuple[float, Tensor]:
    batch, target = make_batch(SAMPLES, CONFIG, 5, 0), language_model(torch.float64).target
    states = torch.randn(
        len(batch.labels), HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    states.requires_grad_()
    kept = Kept(VOCAB)
    loss = Loss(network().double(), target, torch.arange(VOCAB), config, torch.device("cpu"))
    with kept.watch(), pytest.MonkeyPatch.context() as patch:
        real = loss_stage.row_loss
        patch.setattr(
            loss_stage,
            "row_loss",
            lambda *a: (seen is not None and seen.append(kept.rows), real(*a))[1],
        )
        surrogate, value, _ = loss(states, batch, 0)
    (gradient,) = torch.autograd.grad(surrogate, states)
    return value, gradient


@pytest.mark.parametrize(
    "config",
    [TrainConfig(), TrainConfig(weights="dpace"), TrainConfig(weights="dpace", kl=0.3, tv=0.2)],
    ids=["decay", "dpace", "soft-labels"],
)
def test_loss_of_a_batch_does_not_depend_on_the_chunks(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk ends between blocks: one cut in two would have other dpace weights."""
    whole, gradient = loss_and_gradient(config)
    for rows in (1, 2 * BLOCK, 3 * BLOCK + 1):
        monkeypatch.setattr(loss_stage, "_CHUNK", rows)
        value, got = loss_and_gradient(config)
        assert value == pytest.approx(whole, rel=1e-6)
        torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunked", [chunked_loss, whole_graph])
def test_loss_of_a_batch_keeps_one_chunk_of_logits(
    monkeypatch: pytest.MonkeyPatch, chunked: Chunked
) -> None:
    monkeypatch.setattr(loss_stage, "_CHUNK", BLOCK)
    monkeypatch.setattr(loss_stage, "chunked_loss", chunked)
    seen: list[int] = []
    loss_and_gradient(TrainConfig(weights="dpace"), seen)
    assert len(seen) > 5
    only_the_lm_head = seen == [HIDDEN] * len(
        seen
    )  # it is transposed; nothing is kept of earlier chunks
    assert only_the_lm_head == (chunked is chunked_loss)


# The sparse mask of several sequences.

FlexMask = Callable[[Sequence[Tensor], Sequence[int], int, torch.device], Any]
CPU = torch.device("cpu")
PACKED = [
    ([torch.tensor([1])], [1], 2),
    ([torch.tensor([3, 4, 9]), torch.tensor([5]), torch.tensor([2, 7])], [9, 5, 7], 4),
    (
        [torch.tensor([5]), torch.tensor([5])],
        [8, 6],
        3,
    ),  # a context that is longer than what is seen of it
]


def slow_flex(anchors: Sequence[Tensor], num_context: Sequence[int], size: int) -> list[list[bool]]:
    """Row by row and key by key: the own sequence's context before the anchor, and the own
    block.
    """
    rows = [
        (s, int(a), n)
        for s, each in enumerate(anchors)
        for n, a in enumerate(each)
        for _ in range(size)
    ]
    keys: list[tuple[int, int | None, int]] = [
        (s, place, -1) for s, n in enumerate(num_context) for place in range(n)
    ]
    keys += [(s, None, n) for s, _, n in rows]
    mask = []
    for s, anchor, block in rows:
        seen = []
        for owner, place, other in keys:
            seen.append(owner == s and (other == block if place is None else place < anchor))
        mask.append(seen)
    return mask


def dense(mask: Any) -> list[list[bool]]:
    rows, keys = mask.seq_lengths
    zero = torch.tensor(0)
    dense: list[list[bool]] = mask.mask_mod(
        zero, zero, torch.arange(rows)[:, None], torch.arange(keys)[None]
    ).tolist()
    return dense


def is_isolated(make: FlexMask) -> bool:
    return all(dense(make(a, n, size, CPU)) == slow_flex(a, n, size) for a, n, size in PACKED)


def test_flex_mask_equals_the_definition() -> None:
    assert is_isolated(flex_mask)


def as_one(anchors: Sequence[Tensor], num_context: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """The sequences as if they were one."""
    starts = itertools.accumulate(num_context[:-1], initial=0)
    return [torch.cat([a + start for a, start in zip(anchors, starts, strict=True)])], [
        sum(num_context)
    ]


def changed(change: Callable[[Any, Tensor, Tensor], Tensor]) -> FlexMask:
    """The mask with another rule: change(mask, row, key)."""

    def make(
        anchors: Sequence[Tensor], num_context: Sequence[int], size: int, device: torch.device
    ) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        mask, total = flex_mask(anchors, num_context, size, device), sum(num_context)

        def rule(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            seen: Tensor = mask.mask_mod(_batch, _head, row, key)
            return change(seen, row, key - total)  # key of a block from 0 on

        return create_block_mask(rule, None, None, *mask.seq_lengths, device=device)

    return make


WRONG_MASKS: dict[str, FlexMask] = {
    "sequences see each other": lambda a, n, size, device: flex_mask(*as_one(a, n), size, device),
    "the anchor is in its context": lambda a, n, size, device: flex_mask(
        [x + 1 for x in a], n, size, device
    ),
    "the context lacks its last token": lambda a, n, size, device: flex_mask(
        [x - 1 for x in a], n, size, device
    ),
    "blocks see each other": changed(lambda seen, row, key: seen | (key >= 0)),
    "blocks are causal": changed(lambda seen, row, key: seen & (key <= row)),
    "blocks do not see themselves": changed(lambda seen, row, key: seen & (key < 0)),
    "blocks are one larger": lambda a, n, size, device: flex_mask(a, n, size + 1, device),
}


@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_planted_wrong_flex_mask_is_caught(wrong: str) -> None:
    assert not is_isolated(WRONG_MASKS[wrong])


def test_flex_mask_skips_only_tiles_that_nobody_sees() -> None:
    """Kernels trust the tiles of 128 x 128, not the rule."""
    anchors = [torch.arange(20, 150, 2), torch.tensor([299]), torch.arange(3, 60)]
    num_context, size = [150, 300, 60], 4
    mask, expected = (
        flex_mask(anchors, num_context, size, CPU),
        torch.tensor(slow_flex(anchors, num_context, size)),
    )
    tiles = mask.to_dense()[0, 0].bool()
    whole = F.pad(expected, (0, -expected.shape[1] % 128, 0, -len(expected) % 128))
    needed = whole.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(3).any(1)
    assert tiles.tolist() == needed.tolist()
    assert 0.2 < float(needed.float().mean()) < 0.8


def states_of(batch: Batch) -> Tensor:
    with torch.no_grad():
        return Pass(network(), language_model().target.embed)(batch)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_network_with_the_flex_mask_equals_the_dense_one() -> None:
    dense_batch = make_batch(SAMPLES, CONFIG, 4, seed=0)
    flex_batch = make_batch(SAMPLES, CONFIG, 4, seed=0, flex=CPU)
    assert flex_batch.masks == []
    expected = states_of(dense_batch)
    torch.testing.assert_close(states_of(flex_batch), expected, rtol=0, atol=1e-5)
    anchors = [dense_batch.positions[1][r0:r1:BLOCK] for _, _, r0, r1 in dense_batch.spans]
    contexts = [c1 - c0 for c0, c1, _, _ in dense_batch.spans]
    for wrong in (
        "sequences see each other",
        "blocks see each other",
        "the context lacks its last token",
    ):
        leaking = replace(flex_batch, flex=WRONG_MASKS[wrong](anchors, contexts, BLOCK, CPU))
        assert float((states_of(leaking) - expected).abs().max()) > 0.01, wrong
