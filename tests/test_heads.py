"""Sequential heads: what they add to the drafts, in decoding and in training alike, and that no
text of the target changes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny_target
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_folders import save_zlab, zlab_tensors
from toy_training import (
    BLOCK,
    CONFIG,
    HIDDEN,
    LAYERS,
    language_model,
    network,
    one_line_and_hint,
    toy_sample,
    write_lines,
)

from flashdraft.decoding.tree import best_first
from flashdraft.errors import CheckpointError, InvalidParameter
from flashdraft.formats.read import read_draft
from flashdraft.generate import Model
from flashdraft.methods import sequential
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.models.target import Target
from flashdraft.train import objectives as loss_stage
from flashdraft.train.batch import Batch, make_batch
from flashdraft.train.config import TrainConfig
from flashdraft.train.features import FeatureSet, write_features
from flashdraft.train.initialise import random_weights
from flashdraft.train.objectives import Loss
from flashdraft.train.regenerate import regenerate
from flashdraft.train.trainer import Trainer
from flashdraft.types import SamplingParams

KINDS = ("swiglu",)  # the published ones: test_published_heads.py, test_train_heads.py
RANK = 5
KEPT = (3, 4, 9, 11, 20, 25, 30, 41, 52, 59)
VOCABULARIES = ("whole", "reduced", "own lm_head")


def the_target() -> Target:
    return tiny_target("llama", lean=True)


def model_with(
    kind: str | None, vocabulary: str = "whole", *, seed: int = 0, blank: bool = False
) -> DFlashDraftModel:
    """A random network; its head has weights that matter, or (`blank`) those that a new one has."""
    model = network(seed)
    generator = torch.Generator().manual_seed(seed)
    if vocabulary != "whole":
        model.reduce_vocabulary(torch.tensor(KEPT))
    if vocabulary == "own lm_head":
        model.extras["lm_head.weight"] = torch.randn(len(KEPT), HIDDEN, generator=generator)
    if kind is not None:
        model.add_head(kind, RANK)
        for parameter in (
            model.sequential_head.parameters() if model.sequential_head and not blank else ()
        ):
            with torch.no_grad():
                parameter.normal_(0.0, 0.6, generator=generator)
    return model


def hidden_states(rows: int = 30, seed: int = 1) -> tuple[Tensor, Tensor]:
    """[rows, masks, hidden] and the anchors [rows]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, BLOCK - 1, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(3, 60, (rows,), generator=generator)


# A new head.


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_new_head_changes_nothing(kind: str, vocabulary: str) -> None:
    hidden, anchors = hidden_states()
    without = PackedDraft(model_with(None, vocabulary), the_target()).scored(hidden, anchors)[0][
        ..., 0
    ]
    blank = PackedDraft(model_with(kind, vocabulary, blank=True), the_target()).scored(
        hidden, anchors
    )[0][..., 0]
    trained = PackedDraft(model_with(kind, vocabulary), the_target()).scored(hidden, anchors)[0][
        ..., 0
    ]
    assert torch.equal(blank, without)
    assert not torch.equal(trained, without)


def test_new_head_is_an_addition_to_the_same_network() -> None:
    plain = model_with(None).state_dict()
    for kind in KINDS:
        state = model_with(kind, blank=True).state_dict()
        assert all(torch.equal(state[name], plain[name]) for name in plain)
        assert {name.split(".")[0] for name in set(state) - set(plain)} == {"sequential_head"}


# Decoding, against a slow loop from left to right over the logits of all drafted tokens.

DECODING_FAULTS = (
    "always the anchor before",
    "the token before as the network alone would have it",
    "the token before as a draft id",
    "from right to left",
)


def slow_logits(
    model: DFlashDraftModel, state: Tensor, previous: int, drafted: Sequence[int]
) -> Tensor:
    """The corrected logits of one position over the drafted tokens, by the formulas of SwigluHead's
    docstring.
    """
    w = {
        name: t.double()
        for name, t in model.state_dict().items()
        if name.startswith("sequential_head.")
    }
    own, kind = model.extras.get("lm_head.weight"), model.config.sequential_head
    head = the_target().head_weight(torch.tensor(drafted)) if own is None else own.double()
    if kind == "swiglu":
        both = torch.cat((state, the_target().embed(torch.tensor([previous]))[0]))
        gate, up = (w["sequential_head.gate_up.weight"] @ both).split(RANK)
        state = state + w["sequential_head.down.weight"] @ (gate * torch.sigmoid(gate) * up)
    logits = torch.stack([row @ state for row in head])
    return logits


def slow_predict(
    model: DFlashDraftModel, hidden: Tensor, anchors: Tensor, fault: str = ""
) -> list[list[int]]:
    """Row by row and position by position; `fault` plants a mistake."""
    drafted = list(KEPT) if "d2t" in model.extras else list(range(VOCAB))
    bare = DFlashDraftModel(replace(model.config, sequential_head=None))
    bare.extras = model.extras
    chosen = []
    for states, anchor in zip(hidden, anchors.tolist(), strict=True):
        previous, row = anchor, []
        for state in states.flip(0) if fault == DECODING_FAULTS[3] else states:
            best = int(slow_logits(model, state, previous, drafted).argmax())
            row.append(drafted[best])
            previous = {
                DECODING_FAULTS[0]: anchor,
                DECODING_FAULTS[1]: drafted[
                    int(slow_logits(bare, state, previous, drafted).argmax())
                ],
                DECODING_FAULTS[2]: best,
            }.get(fault, drafted[best])
        chosen.append(row[::-1] if fault == DECODING_FAULTS[3] else row)
    return chosen


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_with_a_head_are_those_of_the_slow_loop(kind: str, vocabulary: str) -> None:
    """VOCAB is below 64: a swiglu head chooses among all tokens."""
    model, (hidden, anchors) = model_with(kind, vocabulary), hidden_states()
    drafts = PackedDraft(model, the_target()).scored(hidden, anchors)[0][..., 0]
    assert drafts.tolist() == slow_predict(model, hidden, anchors)
    faults = [
        fault for fault in DECODING_FAULTS if vocabulary != "whole" or fault != DECODING_FAULTS[2]
    ]
    assert [
        fault for fault in faults if slow_predict(model, hidden, anchors, fault) == drafts.tolist()
    ] == []


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_swiglu_head_chooses_among_the_likeliest(
    monkeypatch: pytest.MonkeyPatch, vocabulary: str
) -> None:
    monkeypatch.setattr(sequential, "_LIKELY", 4)
    model, (hidden, anchors) = model_with("swiglu", vocabulary), hidden_states()
    bare = DFlashDraftModel(replace(model.config, sequential_head=None))
    bare.extras = model.extras
    drafted, expected = list(KEPT) if "d2t" in model.extras else list(range(VOCAB)), []
    for states, previous in zip(hidden, anchors.tolist(), strict=True):
        for state in states:
            likely = (
                slow_logits(bare, state, previous, drafted).argsort(descending=True)[:4].tolist()
            )
            logits = slow_logits(model, state, previous, drafted).tolist()
            previous = drafted[max(likely, key=logits.__getitem__)]
            expected.append(previous)
    drafts = PackedDraft(model, the_target()).scored(hidden, anchors)[0][..., 0].flatten().tolist()
    assert drafts == expected
    assert drafts != [token for row in slow_predict(model, hidden, anchors) for token in row]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_are_drafted_like_each_alone(kind: str) -> None:
    packed, (hidden, anchors) = PackedDraft(model_with(kind), the_target()), hidden_states()
    alone = [
        packed.scored(hidden[i : i + 1], anchors[i : i + 1])[0][..., 0][0].tolist()
        for i in range(len(hidden))
    ]
    assert packed.scored(hidden, anchors)[0][..., 0].tolist() == alone


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_node_of_a_tree_is_judged_behind_its_own_parent(vocabulary: str) -> None:
    """The planted fault is the law behind the main path's token, for all nodes of a depth."""
    model, (hidden, anchors) = model_with("swiglu", vocabulary), hidden_states(8)
    drafted, main = (
        list(KEPT) if "d2t" in model.extras else list(range(VOCAB)),
        slow_predict(model, hidden, anchors),
    )
    wrong, side = 0, 0
    for i, laws in enumerate(PackedDraft(model, the_target()).laws(hidden, anchors, trees=True)):
        tokens, parents, scores = best_first(int(anchors[i]), laws, 24)
        texts, depths = [int(anchors[i]), *tokens], [-1]
        for token, parent, score in zip(tokens, parents, scores, strict=True):
            depths.append(depths[parent] + 1)
            likeliest = texts[0] if parent == 0 else main[i][depths[parent]]
            law, fault = (
                slow_logits(model, hidden[i, depths[-1]], before, drafted).log_softmax(-1)[
                    drafted.index(token)
                ]
                for before in (texts[parent], likeliest)
            )
            assert score == pytest.approx(float(law), abs=1e-9)
            wrong += score != pytest.approx(float(fault), abs=1e-6)
            side += texts[parent] != likeliest
        at = [next(n for n, p in enumerate(parents) if p == 0)]
        while (below := [n for n, p in enumerate(parents) if p == at[-1] + 1]) and len(
            at
        ) < BLOCK - 1:
            at.append(below[0])
        assert [tokens[n] for n in at] == main[i][: len(at)], "the likeliest path is the chain"
    assert wrong >= side / 2 > 0


@pytest.mark.parametrize("paths", [1, 2, 5])
def test_trees_go_on_from_the_likeliest_paths(monkeypatch: pytest.MonkeyPatch, paths: int) -> None:
    """The planted faults follow the first path alone, or forget how likely a path was up to its
    last token.
    """
    monkeypatch.setattr(sequential, "_PATHS", paths)
    model, (hidden, anchors) = model_with("swiglu", "reduced"), hidden_states(8)
    whole, first, forgetful = (
        [
            likeliest_ends(model, states, int(anchor), paths, fault)
            for states, anchor in zip(hidden, anchors, strict=True)
        ]
        for fault in ("", "first", "forgetful")
    )
    laws = PackedDraft(model, the_target()).laws(hidden, anchors, trees=True)
    assert [[list(depth) for depth in own] for own in laws] == whole
    assert (whole == first) == (whole == forgetful) == (paths == 1)


def likeliest_ends(
    model: DFlashDraftModel, states: Tensor, anchor: int, paths: int, fault: str
) -> list[list[int]]:
    """By depth: the tokens before, those of the likeliest paths."""
    reached, ends = {anchor: 0.0}, []
    for state in states:
        ends.append(list(reached))
        best: dict[int, float] = {}
        for before, score in list(reached.items())[: 1 if fault == "first" else None]:
            law = slow_logits(model, state, before, KEPT).log_softmax(-1).tolist()
            for token, own in zip(KEPT, law, strict=True):
                best[token] = max(
                    best.get(token, -math.inf), own + (0.0 if fault == "forgetful" else score)
                )
        reached = dict(sorted(best.items(), key=lambda pair: -pair[1])[:paths])
    return ends


def test_bytes_of_a_head_are_counted() -> None:
    plain = PackedDraft(model_with(None), the_target()).nbytes
    count = 2 * RANK * 2 * HIDDEN + HIDDEN * RANK
    assert PackedDraft(model_with("swiglu"), the_target()).nbytes - plain == 8 * count


# Training, against a loss written row by row.

SAMPLES = [
    (7, toy_sample(20, 6, 1, final=True)),
    (8, toy_sample(9, 2, 2, final=True)),
    (9, toy_sample(33, 30, 3, final=True)),
]
LOSSES = {
    "cross-entropy": TrainConfig(negatives=0),
    "cross-entropy and dpace": TrainConfig(negatives=0, weights="dpace"),
    "soft labels": TrainConfig(negatives=0, kl=0.3, tv=0.2, gamma=2.0),
}


def naive_loss(
    model: DFlashDraftModel, states: Tensor, batch: Batch, config: TrainConfig
) -> Tensor:
    """From samples and positions alone; the softmax is over the drafted tokens and this batch's
    labels.
    """
    target, total, own = the_target(), torch.zeros((), dtype=torch.float64), model.sequential_head
    samples, drafted = dict(SAMPLES), list(KEPT) if "d2t" in model.extras else list(range(VOCAB))
    labels = {label for label in batch.labels.tolist() if label >= 0}
    columns = sorted({*drafted, *labels})
    head = target.head_weight(torch.tensor(columns))
    for number, (_, _, first, last) in zip(batch.numbers, batch.spans, strict=True):
        sample = samples[number]
        for block in range(first, last, BLOCK):
            anchor, reach = int(batch.positions[1][block]), 1.0
            rows: list[tuple[Tensor, float]] = []
            for k in range(1, BLOCK):
                position = anchor + k
                if position >= len(sample.tokens):
                    break
                before, label = sample.tokens[position - 1 : position], int(sample.tokens[position])
                state = states[block + k]
                if own is not None:
                    state = own(state[None], target.embed(before))[0]
                logits = head @ state
                ours = logits.log_softmax(-1)
                assert sample.final is not None
                theirs = (head @ sample.final[position - 1].double()).log_softmax(-1)
                loss = -(1 - config.kl - config.tv) * ours[columns.index(label)]
                loss = loss + config.kl * (theirs.exp() * (theirs - ours)).sum()
                loss = loss + config.tv * (theirs.exp() - ours.exp()).abs().sum() / 2
                reach *= (1 + math.exp(ours[columns.index(label)].detach())) / 2
                rows.append((loss, reach))
            for k, (loss, _) in enumerate(rows):
                dpace = sum(reach for _, reach in rows[k:])
                total = total + loss * (
                    dpace if config.weights == "dpace" else math.exp(-k / config.gamma)
                )
    return total


def fast_loss(
    model: DFlashDraftModel, states: Tensor, batch: Batch, config: TrainConfig
) -> tuple[Tensor, float]:
    vocabulary = torch.tensor(KEPT) if "d2t" in model.extras else torch.arange(VOCAB)
    surrogate, value, _ = Loss(model, the_target(), vocabulary, config, torch.device("cpu"))(
        states, batch, 0
    )
    return surrogate, value


@pytest.mark.parametrize("config", LOSSES)
@pytest.mark.parametrize("vocabulary", ["whole", "reduced"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_loss_with_a_head_equals_the_naive_one(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, vocabulary: str, config: str
) -> None:
    """Value and gradients, also of the head; each position sees the true token before it."""
    monkeypatch.setattr(loss_stage, "_CHUNK", 3 * BLOCK)
    model, batch = model_with(kind, vocabulary).double(), make_batch(SAMPLES, CONFIG, 5, 0)
    generator = torch.Generator().manual_seed(0)
    states = (
        0.3 * torch.randn(len(batch.labels), HIDDEN, generator=generator, dtype=torch.float64)
    ).requires_grad_()
    wanted = [
        states,
        *([] if model.sequential_head is None else model.sequential_head.parameters()),
    ]
    expected = naive_loss(model, states, batch, LOSSES[config])
    surrogate, value = fast_loss(model, states, batch, LOSSES[config])
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)  # logits are in float32
    pairs = zip(
        torch.autograd.grad(surrogate, wanted), torch.autograd.grad(expected, wanted), strict=True
    )
    for got, gradient in pairs:
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-4)
        assert gradient.abs().max() > 0.01
    if kind is None:
        return
    anchors = batch.block_tokens.view(-1, BLOCK)[:, :1].expand(-1, BLOCK).flatten()
    for wrong in (
        batch.labels.clamp(min=0),
        anchors,
        batch.block_tokens.roll(1),
        batch.previous.roll(1),
    ):
        _, value = fast_loss(model, states, replace(batch, previous=wrong), LOSSES[config])
        assert abs(value / float(expected.detach()) - 1) > 1e-3


def test_previous_tokens_are_those_one_position_before() -> None:
    batch, samples = make_batch(SAMPLES, CONFIG, 5, 0), dict(SAMPLES)
    for number, (_, _, first, last) in zip(batch.numbers, batch.spans, strict=True):
        for row in range(first, last):
            if batch.labels[row] >= 0:
                assert batch.previous[row] == samples[number].tokens[batch.positions[1][row] - 1]


# Files.


def saved(folder: Path, kind: str, vocabulary: str = "whole", *, plain: bool = False) -> Path:
    model_with(kind, vocabulary).save_pretrained(folder, plain=plain)
    return folder


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_head_survives_saving(tmp_path: Path, kind: str, vocabulary: str) -> None:
    model, read = (
        model_with(kind, vocabulary),
        DFlashDraftModel.from_pretrained(saved(tmp_path, kind, vocabulary)),
    )
    assert read.config == model.config
    for ours, theirs in ((model.state_dict(), read.state_dict()), (model.extras, read.extras)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    hidden, anchors = hidden_states()
    drafts = [
        PackedDraft(one, the_target()).scored(hidden, anchors)[0][..., 0] for one in (model, read)
    ]
    assert torch.equal(*drafts)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_folder_has_no_head_and_the_published_names(
    tmp_path: Path, kind: str, vocabulary: str
) -> None:
    saved(tmp_path / "plain", kind, vocabulary, plain=True)
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == zlab_tensors().keys()
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (
        not {"flashdraft_config", "draft_vocab_size", "sequential_head", "head_rank"}
        & written.keys()
    )
    assert DFlashDraftModel.from_pretrained(tmp_path / "plain").sequential_head is None
    assert (
        load_file(saved(tmp_path / "own", kind) / "model.safetensors").keys()
        > zlab_tensors().keys()
    )


def test_published_folder_gets_a_head(tmp_path: Path) -> None:
    model = DFlashDraftModel.from_pretrained(save_zlab(tmp_path / "theirs"))
    model.add_head("swiglu", RANK)
    model.save_pretrained(tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in zlab_tensors().items())
    assert DFlashDraftModel.from_pretrained(tmp_path / "ours").config.sequential_head == "swiglu"


DAMAGED: dict[str, tuple[Any, str]] = {
    "unknown kind": (
        {"sequential_head": "medusa", "head_rank": RANK},
        "has a sequential head 'medusa', which is not known",
    ),
    "kind that is no name": (
        {"sequential_head": ["swiglu"], "head_rank": RANK},
        "has a sequential head ['swiglu']",
    ),
    "another rank": (
        {"sequential_head": "swiglu", "head_rank": 6},
        "sequential_head.gate_up.weight has shape [10, ",
    ),
    "no kind": ({}, "has a tensor sequential_head."),
    "rank that is no number": (
        {"sequential_head": "swiglu", "head_rank": "wide"},
        "lacks or garbles",
    ),
    "no object": ("swiglu", "lacks or garbles"),
    "key of a newer version": (
        {"sequential_head": "swiglu", "head_rank": RANK, "head_norm": True},
        "has 'head_norm' in flashdraft_config, which is not known",
    ),
    "key of another method": (
        {"sequential_head": "swiglu", "head_rank": RANK, "qk_norm": True},
        "has 'qk_norm' in flashdraft_config",
    ),
    "unknown method": ({"method": "dspark"}, "is a drafter of 'dspark' (method in"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_head_is_refused(tmp_path: Path, case: str) -> None:
    saved(tmp_path, "swiglu")
    own, expected = DAMAGED[case]
    config = json.loads((tmp_path / "config.json").read_text())
    for layer_types in (config["layer_types"], []):  # theirs may be absent
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"flashdraft_config": own, "layer_types": layer_types})
        )
        with pytest.raises(CheckpointError) as error:
            DFlashDraftModel.from_pretrained(tmp_path)
        assert expected in one_line_and_hint(error)
    if case.startswith(("unknown", "key of")):
        assert "was it written by a newer FlashDraft?" in str(error.value)
    if case == "unknown kind":
        assert all(kind in str(error.value) for kind in KINDS)


def test_head_without_a_tensor_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, "swiglu") / "model.safetensors"
    save_file(
        {n: t for n, t in load_file(path).items() if n != "sequential_head.down.weight"}, path
    )
    with pytest.raises(CheckpointError) as error:
        read_draft(tmp_path)
    assert "lacks the tensor sequential_head.down.weight" in one_line_and_hint(error)


# The whole way: answers, features, training, decoding.

PROMPTS = (
    "hello there",
    "what is it",
    "a b c",
    "zebra",
    "Quick fox",
    "sing a song",
    "why?",
    "tell me",
)
ANSWER = SamplingParams(max_new_tokens=24, ignore_eos=True)
OVERFIT = TrainConfig(
    steps=50,
    sequences=8,
    anchors=24,
    lr=1e-2,
    weight_decay=0.0,
    vocab=0,
    precision="fp32",
    save_every=10,
)
SHORT = replace(OVERFIT, steps=4, sequences=4, anchors=6, vocab=20, negatives=9)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"source": "toy", "row": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    regenerate(
        language_model(),
        write_lines(folder / "prompts.jsonl", rows),
        folder / "answers.jsonl",
        params=ANSWER,
        quiet=True,
    )
    out = folder / "features"
    write_features(
        language_model(), [folder / "answers.jsonl"], out, layers=LAYERS, max_length=64, quiet=True
    )
    return FeatureSet(out)


def drafting_with(model: DFlashDraftModel) -> Model:
    lm = language_model()
    packed = PackedDraft(model.eval(), lm.target)
    return Model(lm.target, lm.tokenizer, lambda: DFlashDrafter(packed), eos=lm.eos, max_rows=8)


def texts_and_tau(
    lm: Model, params: SamplingParams, count: int = len(PROMPTS)
) -> tuple[list[tuple[int, ...]], float]:
    results = lm.generate(list(PROMPTS[:count]), params)
    return [result.tokens for result in results], sum(result.stats.tau for result in results) / len(
        results
    )


@functools.cache
def plain_texts(params: SamplingParams, count: int = len(PROMPTS)) -> list[tuple[int, ...]]:
    return texts_and_tau(language_model(), params, count)[0]


@pytest.fixture(scope="module", params=KINDS)
def overfitted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data: FeatureSet
) -> Trainer:
    out = tmp_path_factory.mktemp("run")
    trainer = Trainer(
        random_weights(CONFIG, 0), language_model(), data, out, OVERFIT, head=(request.param, 8)
    )
    trainer.run(PROMPTS[:3], quiet=True)
    return trainer


def test_drafter_with_a_head_overfits_and_its_tau_is_real(overfitted: Trainer) -> None:
    best = DFlashDraftModel.from_pretrained(overfitted.out / "best")
    assert best.config.sequential_head == overfitted.model.config.sequential_head
    measured = SamplingParams(max_new_tokens=128)  # as the trainer measures: beyond what was learnt
    texts, tau = texts_and_tau(drafting_with(best), measured, 3)
    assert tau == pytest.approx(overfitted.best, abs=1e-9)
    assert texts == plain_texts(measured, 3)
    texts, tau = texts_and_tau(drafting_with(best), ANSWER)
    assert texts == plain_texts(ANSWER)
    assert tau > 2.5
    untrained = DFlashDraftModel(best.config)
    assert texts_and_tau(drafting_with(untrained), ANSWER)[1] < 1.5


def test_trained_head_is_part_of_the_drafts(overfitted: Trainer) -> None:
    """Without it the same network is accepted less: the two have learnt together."""
    best = DFlashDraftModel.from_pretrained(overfitted.out / "best")
    tau = texts_and_tau(drafting_with(best), ANSWER)[1]
    best.sequential_head = None
    assert texts_and_tau(drafting_with(best), ANSWER)[1] < tau


@pytest.mark.parametrize("seed", [0, 7])
def test_sampled_text_with_a_head_equals_plain_sampled_text(overfitted: Trainer, seed: int) -> None:
    params = replace(ANSWER, temperature=0.2, seed=seed)
    texts, tau = texts_and_tau(drafting_with(overfitted.model), params)
    assert texts == plain_texts(params)
    assert texts != plain_texts(ANSWER)
    assert tau > 1.05


@pytest.mark.parametrize("vocabulary", ["whole", "reduced"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_with_any_head_equals_the_plain_one(kind: str, vocabulary: str) -> None:
    lm = drafting_with(model_with(kind, vocabulary))
    for params in (ANSWER, replace(ANSWER, temperature=1.0, seed=3)):
        results = lm.generate(list(PROMPTS), params)
        assert [result.tokens for result in results] == plain_texts(params)
        assert all(result.stats.num_drafted for result in results)


# The trainer.


def new_trainer(
    data: FeatureSet,
    out: Path,
    config: TrainConfig,
    head: tuple[str, int] | None,
    model: DFlashDraftModel | None = None,
) -> Trainer:
    return Trainer(
        random_weights(CONFIG, 0) if model is None else model,
        language_model(),
        data,
        out,
        config,
        head=head,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_run_with_a_head_ends_with_the_same_bits(
    tmp_path: Path, data: FeatureSet, kind: str
) -> None:
    config, states = replace(SHORT, save_every=2), []
    for out, stops in (("whole", (4,)), ("stopped", (2, 4))):
        for stop in stops:
            trainer = new_trainer(data, tmp_path / out, config, (kind, RANK))
            assert trainer.step == (stop - 2 if out == "stopped" else 0)
            while trainer.step < stop:
                trainer.train_step()
            trainer._save()
        states.append(trainer.model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    before = new_trainer(data, tmp_path / "fresh", config, (kind, RANK)).model.state_dict()
    assert all(
        (states[0][n] != before[n]).any() for n in before if n.startswith("sequential_head.")
    )
    for head in (None, (kind, RANK + 1)):
        with pytest.raises(InvalidParameter) as error:
            new_trainer(data, tmp_path / "whole", config, head)
        assert "was begun with another draft network" in one_line_and_hint(error)


def test_swiglu_head_learns_any_vocabulary(tmp_path: Path, data: FeatureSet) -> None:
    trainer = new_trainer(data, tmp_path, replace(SHORT, steps=2), ("swiglu", RANK))
    assert len(trainer.loss.vocabulary) == 20
    trainer.run(PROMPTS[:1], quiet=True)
    assert DFlashDraftModel.from_pretrained(tmp_path / "best").config.draft_vocab_size == 20
