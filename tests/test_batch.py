"""A batch of training: what the network is taught is what decoding asks of it. The mask, the
anchors, the loss, and several sequences in one pass; wrong ones are planted and must be seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import MASK, VOCAB
from torch import Tensor
from toy_pipeline import ANSWER, CONFIG
from toy_training import BLOCK, HIDDEN, LAYERS, language_model, one_line_and_hint

import flashdraft.methods.dflash
import flashdraft.methods.network
from flashdraft.errors import DataError
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.train.batch import (
    Batch,
    Span,
    block_mask,
    block_positions,
    draw_anchors,
    make_batch,
)
from flashdraft.train.features import Sample
from flashdraft.train.initialise import random_weights
from flashdraft.train.objectives import position_weights, row_loss
from flashdraft.train.passes import Pass
from flashdraft.types import Rows

# The mask: context strictly before the anchor, the own block both ways, nothing else.

Mask = Callable[[Tensor, int, int], Tensor]


def slow_mask(anchors: Sequence[int], num_context: int, size: int) -> list[list[bool]]:
    """Position by position."""
    mask = []
    for block, anchor in enumerate(anchors):
        for _ in range(size):
            row = [position < anchor for position in range(num_context)]
            row += [other == block for other in range(len(anchors)) for _ in range(size)]
            mask.append(row)
    return mask


def anchor_in_context(anchors: Tensor, num_context: int, size: int) -> Tensor:
    return block_mask(anchors + 1, num_context, size)


def blocks_see_each_other(anchors: Tensor, num_context: int, size: int) -> Tensor:
    mask = block_mask(anchors, num_context, size)
    mask[:, num_context:] = True
    return mask


def causal_block(anchors: Tensor, num_context: int, size: int) -> Tensor:
    mask = block_mask(anchors, num_context, size)
    mask[:, num_context:] &= torch.ones_like(mask[:, num_context:]).tril()
    return mask


def is_the_mask(mask: Mask) -> bool:
    cases = [((1,), 1, 2), ((3, 4, 9), 9, 4), ((5,), 8, 1), ((2, 7, 8, 11), 12, 3)]
    return all(
        mask(torch.tensor(a), n, size).tolist() == slow_mask(a, n, size) for a, n, size in cases
    )


def test_block_mask_equals_the_definition() -> None:
    assert is_the_mask(block_mask)


@pytest.mark.parametrize("wrong", [anchor_in_context, blocks_see_each_other, causal_block])
def test_planted_wrong_mask_is_caught(wrong: Mask) -> None:
    assert not is_the_mask(wrong)


def test_block_rows_stand_at_their_own_positions() -> None:
    assert block_positions(torch.tensor([3, 7]), 4).tolist() == [3, 4, 5, 6, 7, 8, 9, 10]


# Anchors.

Draw = Callable[[int, int, int, torch.Generator], Tensor]


def drawn(draw: Draw, num_prompt: int, num_tokens: int, count: int, number: int) -> list[int]:
    anchors: list[int] = draw(
        num_prompt, num_tokens, count, torch.Generator().manual_seed(number)
    ).tolist()
    return anchors


def is_fair(draw: Draw) -> bool:
    """Sorted, different response tokens that have a successor; each of them is drawn as often as
    any other.
    """
    counts = dict.fromkeys(range(5, 11), 0)
    for number in range(600):
        anchors = drawn(draw, 5, 12, 3, number)
        if (
            len(anchors) != 3
            or anchors != sorted(set(anchors))
            or not set(anchors) <= counts.keys()
        ):
            return False
        for anchor in anchors:
            counts[anchor] += 1
    return all(
        abs(count - 300) < 75 for count in counts.values()
    )  # 300 expected, 12 is one standard deviation


def test_anchors_are_fair() -> None:
    assert is_fair(draw_anchors)


PLANTED: dict[str, Draw] = {
    "prompt tokens": lambda p, n, c, g: draw_anchors(0, n, c, g),
    "never the first answer token": lambda p, n, c, g: draw_anchors(p + 1, n, c, g),
    "the last token, which nothing follows": lambda p, n, c, g: draw_anchors(p, n + 1, c, g),
    "always the same": lambda p, n, c, g: draw_anchors(p, n, c, torch.Generator().manual_seed(0)),
    "a fixed grid": lambda p, n, c, g: torch.arange(p, n - 1, 2)[:c],
    "twice the same": lambda p, n, c, g: torch.randint(p, n - 1, (c,), generator=g).sort().values,
}


@pytest.mark.parametrize("wrong", PLANTED)
def test_planted_unfair_anchors_are_caught(wrong: str) -> None:
    assert not is_fair(PLANTED[wrong])


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(3, []), (5, []), (6, []), (7, [5]), (8, [5, 6])]
)
def test_short_or_cut_answers_give_the_anchors_that_they_have(
    num_tokens: int, expected: list[int]
) -> None:
    assert drawn(draw_anchors, 5, num_tokens, 9, 0) == expected


# The loss.

Loss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def slow_loss(logits: Tensor, labels: Tensor, offsets: Tensor, gamma: float) -> tuple[float, float]:
    total = weight = 0.0
    for row, label, offset in zip(logits.tolist(), labels.tolist(), offsets.tolist(), strict=True):
        if label >= 0:
            w = math.exp(-(offset - 1) / gamma)
            total += w * (math.log(sum(math.exp(x) for x in row)) - row[label])
            weight += w
    return total / weight, weight


def loss_case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, 7, generator=g, dtype=torch.float64)
    return logits, torch.randint(-2, 7, (12,), generator=g), torch.arange(12) % 4


def decayed_cross_entropy(
    logits: Tensor, labels: Tensor, offsets: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """As the trainer puts it together: labelled rows alone, one sum and one weight."""
    wanted = labels >= 0
    weights = position_weights(
        "decay", logits[wanted, 0], offsets[wanted], offsets[wanted], gamma=gamma
    )
    losses = row_loss("ce", logits[wanted], labels[wanted], None)
    return (losses * weights).sum() / weights.sum().clamp(min=1e-9), weights.sum()


def is_the_loss(loss: Loss) -> bool:
    for seed in range(5):
        case = loss_case(seed)
        if not torch.allclose(
            torch.stack(loss(*case, 3.0)), torch.tensor(slow_loss(*case, 3.0), dtype=torch.float64)
        ):
            return False
    return True


WRONG_LOSSES: dict[str, Loss] = {
    "no decay": lambda x, y, k, gamma: decayed_cross_entropy(x, y, k, 1e9),
    "decay from 0": lambda x, y, k, gamma: decayed_cross_entropy(x, y, k + 1, gamma),
    "ignored labels count": lambda x, y, k, gamma: decayed_cross_entropy(
        x, y.clamp(min=0), k, gamma
    ),
    "labels shifted": lambda x, y, k, gamma: decayed_cross_entropy(x, y.roll(1), k, gamma),
}


def test_loss_equals_the_definition() -> None:
    assert is_the_loss(decayed_cross_entropy)


@pytest.mark.parametrize("wrong", WRONG_LOSSES)
def test_planted_wrong_loss_is_caught(wrong: str) -> None:
    assert not is_the_loss(WRONG_LOSSES[wrong])


def test_losses_of_parts_join_exactly() -> None:
    logits, labels, offsets = loss_case(1)
    whole, _ = decayed_cross_entropy(logits, labels, offsets, 3.0)
    parts = [
        decayed_cross_entropy(logits[p], labels[p], offsets[p], 3.0)
        for p in (slice(0, 5), slice(5, 12))
    ]
    joined = sum(loss * weight for loss, weight in parts) / sum(weight for _, weight in parts)
    torch.testing.assert_close(joined, whole)


def test_loss_without_labels_is_zero_and_has_a_gradient() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    loss, weight = decayed_cross_entropy(logits, torch.full((3,), -1), torch.arange(3), 3.0)
    loss.backward()
    assert (float(loss.detach()), float(weight)) == (0.0, 0.0)
    assert logits.grad is not None
    assert not logits.grad.any()


# Batches: several sequences in one pass.


def toy_sample(length: int, num_prompt: int, seed: int) -> Sample:
    """Tokens count upwards, so that any shift shows; features are noise."""
    g = torch.Generator().manual_seed(seed)
    return Sample(
        torch.arange(length) % 50 + 3, torch.randn(length, 2 * HIDDEN, generator=g), num_prompt
    )


SAMPLES = [
    (7, toy_sample(20, 6, 1)),
    (8, toy_sample(9, 2, 2)),
    (9, toy_sample(33, 30, 3)),
    (10, toy_sample(14, 3, 4)),
]


def network(seed: int = 0, **changes: Any) -> DFlashDraftModel:
    """Random weights that are large enough for everything to matter."""
    model = random_weights(replace(CONFIG, **changes), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if parameter.ndim > 1 else 1.0)
    return model


def states_of(batch: Batch, model: DFlashDraftModel) -> Tensor:
    with torch.no_grad():
        return Pass(model, language_model().target.embed)(batch)


def test_labels_are_the_tokens_at_their_own_positions() -> None:
    (sample,) = [sample for number, sample in SAMPLES if number == 7]
    batch = make_batch([(7, sample)], CONFIG, 99, seed=0)
    tokens = sample.tokens.tolist()
    rows = list(
        zip(
            *(
                t.tolist()
                for t in (batch.positions[1], batch.offsets, batch.block_tokens, batch.labels)
            ),
            strict=True,
        )
    )
    assert len(rows) == 13 * BLOCK  # 14 answer tokens, of which the last has no successor
    for start in range(0, len(rows), BLOCK):
        anchor = rows[start][0]
        for k, (position, offset, token, label) in enumerate(rows[start : start + BLOCK]):
            assert (position, offset) == (anchor + k, k)
            assert token == (tokens[anchor] if k == 0 else MASK)
            inside = k > 0 and anchor + k < len(tokens)
            assert label == (tokens[anchor + k] if inside else -1)
    assert -1 in [
        label for _, offset, _, label in rows if offset
    ]  # a block that reaches past the end is among them


def test_packed_sequences_have_the_states_of_each_alone() -> None:
    model = network()
    together = states_of(make_batch(SAMPLES, CONFIG, 4, seed=0), model)
    alone = torch.cat([states_of(make_batch([one], CONFIG, 4, seed=0), model) for one in SAMPLES])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_packed_sequences_that_see_each_other_are_caught() -> None:
    model, batch = network(), make_batch(SAMPLES, CONFIG, 4, seed=0)
    num_context, num_rows = batch.spans[-1][1], batch.spans[-1][3]
    anchors = torch.cat([batch.positions[1][r0:r1:BLOCK] + c0 for c0, _, r0, r1 in batch.spans])
    leaking = replace(
        batch,
        spans=[Span(0, num_context, 0, num_rows)],
        masks=[block_mask(anchors, num_context, BLOCK)],
    )
    assert float((states_of(leaking, model) - states_of(batch, model)).abs().max()) > 0.1


def test_loss_of_a_batch_is_that_of_its_sequences() -> None:
    model, head = network(), language_model().target.head_weight(torch.arange(VOCAB))

    def loss_of(samples: Sequence[tuple[int, Sample]]) -> tuple[Tensor, Tensor]:
        batch = make_batch(samples, CONFIG, 4, seed=0)
        return decayed_cross_entropy(
            states_of(batch, model) @ head.T, batch.labels, batch.offsets, 4.0
        )

    whole, _ = loss_of(SAMPLES)
    parts = [loss_of([one]) for one in SAMPLES]
    joined = sum(loss * weight for loss, weight in parts) / sum(weight for _, weight in parts)
    torch.testing.assert_close(whole, joined)


def test_anchors_are_new_for_every_sample_number_and_seed() -> None:
    sample = toy_sample(60, 3, 5)
    drawn = {
        (seed, number): tuple(make_batch([(number, sample)], CONFIG, 8, seed).positions[1].tolist())
        for seed in (0, 1)
        for number in range(20)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert make_batch([(3, sample)], CONFIG, 8, 1).positions[1].tolist() == list(drawn[1, 3])


def test_answers_without_two_tokens_are_left_out() -> None:
    short, cut = toy_sample(6, 5, 1), toy_sample(6, 9, 2)
    batch = make_batch([(0, short), SAMPLES[0], (1, cut)], CONFIG, 4, seed=0)
    assert batch.labels.tolist() == make_batch([SAMPLES[0]], CONFIG, 4, seed=0).labels.tolist()
    with pytest.raises(DataError) as error:
        make_batch([(0, short), (1, cut)], CONFIG, 4, seed=0)
    assert "no answer in this batch has two tokens" in one_line_and_hint(error)


@pytest.mark.parametrize("limit", [17, 20, 33])
def test_blocks_beyond_the_draft_positions_are_not_trained(limit: int) -> None:
    config = replace(CONFIG, max_position_embeddings=limit)
    batch = make_batch([(0, toy_sample(34, 5, 1))], config, 99, seed=0)
    assert batch.positions[1].max() == limit - 1
    assert torch.isfinite(states_of(batch, network(max_position_embeddings=limit))).all()


NETWORKS: dict[str, dict[str, Any]] = {
    "fill-in": {},
    "anchor-first": {"anchor_first": True},
    "convolutions": {"conv_kernel_size": 2, "conv_group_size": 16},
}


@pytest.mark.parametrize(
    "shift", [0, -1, 1], ids=["as-it-is", "features-one-late", "features-one-early"]
)
@pytest.mark.parametrize("kind", NETWORKS)
def test_training_computes_what_decoding_computes(
    kind: str, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else accuracy is high in training and nothing is accepted when served. The planted faults
    shift the features by one.
    """
    monkeypatch.setattr(flashdraft.methods.dflash, "DRAFT_KERNEL", "float32")
    monkeypatch.setattr(
        flashdraft.methods.network, "DRAFT_KERNEL", "float32"
    )  # a draft is rounded to 8 bits otherwise
    model, target = network(**NETWORKS[kind]), language_model().target
    num_rows, first = model.config.block_rows, model.config.first_row
    tokens = torch.tensor([1, 9, 17, 30, 4, 22, 41, 8, 15, 33, 27, 5])
    _, features = target.prefill(target.new_cache(1, 64), 0, tokens, LAYERS)
    assert features is not None
    batch = make_batch(
        [(0, Sample(tokens, features.clone().roll(shift, 0), 4))], model.config, 99, seed=0
    )
    states = states_of(batch, model).view(-1, num_rows, HIDDEN)
    anchors = batch.positions[1][::num_rows].tolist()
    assert anchors == list(range(4, 11))
    differences = []
    for anchor, trained in zip(anchors, states, strict=True):
        drafter = DFlashDrafter(PackedDraft(model, target))
        history = tokens[: anchor + 1].tolist()
        drafter.observe(Rows([0], [history], [ANSWER], [1]), [tokens[:anchor]], [features[:anchor]])
        caught: list[Tensor] = []
        drafter.network.scored = lambda hidden, *_, into=caught: (
            into.append(hidden[0]),
            hidden.topk(1, -1)[::-1],
        )[1]  # type: ignore
        drafter.propose(Rows([0], [history], [ANSWER], [1]), BLOCK)
        differences.append(float((caught[0] - trained[first:]).abs().max()))
    assert max(differences) < 1e-4 if shift == 0 else min(differences) > 0.05
