"""Every published folder drafts as its slow definition (toy_slow_drafts.py), which reads the raw
folder; and what a reader could get wrong in silence is seen in the drafts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_target
from test_dflash import rows_of
from torch import Tensor
from toy_formats import (
    DFLASH2,
    DSPARK,
    FULL_DFLASH2,
    FULL_MARKOV,
    MASK_ROW,
    V1,
    Config,
    Tensors,
    confidence,
    config,
    copies,
    deepspec,
    dflash2,
    domino,
    gru,
    markov,
    nested,
    speculators,
)
from toy_published import READ_ROWS, SLIDING, Published, save
from toy_slow_drafts import Chain, SlowDraft

from flashdraft.formats.config import DraftConfig
from flashdraft.formats.read import read_draft
from flashdraft.methods import network
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.methods.sequential import Domino, Markov, Selector, Step, Walk
from flashdraft.models.target import Target


def combined(config: Config, **special: Any) -> Config:
    """With more in its dflash_config."""
    return {**config, "dflash_config": {**config["dflash_config"], **special}}


# Changes what was read, in place or as another config.
Fault = Callable[[DraftConfig, Tensors], DraftConfig]
COMBINED: dict[str, Published] = {  # keys that no row of the tables has side by side
    "DFlash 2 of Muse: scales and a softcap": Published(
        combined(
            dflash2(),
            input_embedding_scale=2.0,
            output_multiplier=0.5,
            final_logit_softcapping=5.0,
        ),
        FULL_DFLASH2,
    ),
    "scales at the top, and others in dflash_config, which hold": Published(
        combined(config(input_embedding_scale=3.0, output_multiplier=9.0), output_multiplier=0.5),
        V1,
    ),
    "a row for the mask token, scaled": Published(
        nested(input_embedding_scale=2.0), V1, mask_row=MASK_ROW
    ),
    "is_causal at the top, which holds, and another causal": Published(
        combined(config(is_causal=True), causal=False), V1
    ),
    "is_causal over both kinds of layers": Published(config(**SLIDING, is_causal=True), V1),
    "a window, but no layer so deep": Published(
        config(layer_types=..., sliding_window=8, use_sliding_window=True, max_window_layers=...),
        V1,
    ),
    "another eps": Published(config(rms_norm_eps=0.1), V1),
    "DFlash 2 with windows of Qwen3.6": Published(dflash2(**SLIDING), FULL_DFLASH2),
    "DeepSpec's DSpark, the embeddings as features": Published(
        deepspec(target_layer_ids=[-1, 2]), FULL_MARKOV | copies()
    ),
    "DeepSpec's DSpark, rnn, that fills in": Published(
        deepspec(markov_head_type="rnn", sample_from_anchor=False, block_size=4),
        V1 | markov("rnn") | confidence() | copies(),
    ),
    "Domino with windows": Published(
        {**domino(), **SLIDING, "rope_theta": 1000},
        V1 | gru(),
    ),
    "speculators dflash, another eps, yarn by the old keys": Published(
        speculators(
            layers={
                "rms_norm_eps": 0.1,
                "rope_parameters": ...,
                "rope_theta": 1000,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            }
        ),
        V1,
    ),
    "speculators dflash2, windows without the flag": Published(
        speculators("dflash2", layers=SLIDING, sliding_window_non_causal=..., **DFLASH2),
        FULL_DFLASH2,
    ),
    "speculators dspark, causal windows": Published(
        speculators("dspark", block_size=3, sample_from_anchor=True, layers=SLIDING, **DSPARK),
        FULL_MARKOV,
    ),
    "speculators dspark, old: copies": Published(
        speculators("dspark", sample_from_anchor=..., **DSPARK), FULL_MARKOV | copies()
    ),
}
ROWS = {**READ_ROWS, **COMBINED}
HEADS = ("candidate_selector", "markov_head", "embed_proj")
# Longer than the windows, and shorter; the drafter reads them side by side.
HISTORIES = ((7, 7, 12, 50, 3, 22, 17, 8, 40, 41, 9, 33, 5), (5, 9, 31))


def target_of(family: str) -> Target:
    return tiny_target(family, lean=family == "llama")


def drafted(folder: Path, family: str = "llama") -> list[Chain]:
    """What our drafter proposes behind the histories."""
    target = target_of(family)
    drafter = DFlashDrafter(PackedDraft(DFlashDraftModel.from_pretrained(folder), target))
    rows = rows_of(HISTORIES)
    read = []
    features = []
    for history in HISTORIES:
        tokens = torch.tensor(history[:-1])
        cache = target.new_cache(1, len(history))
        outputs = target.prefill(cache, 0, tokens, drafter.layers)[1]
        assert outputs is not None
        read.append(tokens)
        features.append(outputs)
    drafter.observe(rows, read, features)
    proposal = drafter.propose(rows, 99)
    drafter.network.confidence = None
    unweighed = drafter.propose(rows, 99)
    assert torch.equal(proposal.tokens, unweighed.tokens)
    chains = []
    for row, tokens in enumerate(proposal.tokens.tolist()):
        scores = unweighed.scores[row].tolist()
        chances = proposal.scores[row].tolist()
        chains.append(Chain(tokens[1:], scores[1:], chances[1:]))
    return chains


class Shelf:
    """All folders, with heads whose weights matter, and what each drafts by definition."""

    def __init__(self, root: Path) -> None:
        self.folders: dict[str, Path] = {}
        self._defined: dict[tuple[str, str], list[Chain]] = {}
        for number, (name, row) in enumerate(ROWS.items()):
            tensors = {}
            for tensor_name, tensor in row.tensors.items():
                is_of_head = any(part in tensor_name for part in HEADS)
                tensors[tensor_name] = tensor * 6 if is_of_head else tensor
            louder = row._replace(tensors=tensors)
            self.folders[name] = save(louder, root / str(number))

    @functools.cached_property
    def read(self) -> dict[str, tuple[DraftConfig, Tensors]]:
        read = {}
        for name, folder in self.folders.items():
            read[name] = read_draft(folder / ROWS[name].folder)
        return read

    def defined(self, name: str, family: str = "llama") -> list[Chain]:
        key = (name, family)
        if key not in self._defined:
            slow = SlowDraft(self.folders[name] / ROWS[name].folder, family)
            self._defined[key] = [slow.chain(history) for history in HISTORIES]
        return self._defined[key]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("published"))


def same(got: list[Chain], expected: list[Chain], *, common: bool = False) -> bool:
    """Tokens, and scores closely. common: as far as both chains go."""
    for ours, right in zip(got, expected, strict=True):
        length = min(len(ours.tokens), len(right.tokens)) if common else None
        if ours.tokens[:length] != right.tokens[:length]:
            return False
        for numbers, laws in ((ours.scores, right.scores), (ours.chances, right.chances)):
            if numbers[:length] != pytest.approx(laws[:length], rel=1e-5, abs=1e-6):
                return False
    return True


@pytest.mark.parametrize("name", ROWS)
def test_published_folder_drafts_as_its_definition(shelf: Shelf, name: str) -> None:
    got = drafted(shelf.folders[name])
    expected = shelf.defined(name)
    assert same(got, expected), (got, expected)


BESIDE_GEMMA = (  # which scales its embedding
    "v1 of Gemma 4: softcap at the top",
    "v1, the embeddings as features",
    "v1, windows by depth",
    "speculators dflash",
    "speculators dflash, old: llama's layers and copies",
    "speculators dflash, the embeddings as features",
    "Domino with shifted labels",
)


@pytest.mark.parametrize("name", BESIDE_GEMMA)
def test_embedding_that_its_family_scales_is_read_as_it_was_trained(
    shelf: Shelf, name: str
) -> None:
    got = drafted(shelf.folders[name], "gemma3")
    expected = shelf.defined(name, "gemma3")
    assert same(got, expected), (got, expected)


# What readers get wrong in silence.


def ids_off_by_one(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    return replace(config, target_layer_ids=tuple(i + 1 for i in config.target_layer_ids))


def other_layout(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    """The same rows are fed."""
    other = replace(config, anchor_first=not config.anchor_first)
    return replace(other, block_size=config.block_size + config.block_rows - other.block_rows)


def causality(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    return replace(config, causal=not any(mask.causal for mask in config.masks))


def no_window(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    return replace(config, sliding_window=None)


def window_off_by_one(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    window = config.sliding_window
    return replace(config, sliding_window=None if window is None else window + 1)


def usual_rotation(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    return replace(config, rope_parameters={"rope_type": "default", "rope_theta": 1e4})


def one_rotation(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    rope = config.rope_parameters
    return replace(config, rope_parameters=rope.get("full_attention", rope))


def no_yarn(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    rope = config.rope_parameters
    if rope.get("rope_type") != "yarn":
        return config
    return replace(config, rope_parameters={**rope, "rope_type": "default"})


def other_mask_token(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    return replace(config, mask_token_id=config.mask_token_id - 1)


def draft_ids_for_tokens(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    if "d2t" in tensors:
        tensors["d2t"] = torch.zeros_like(tensors["d2t"])
    return config


def no_scale(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    return replace(config, input_embedding_scale=1.0)


def no_multiplier(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    return replace(config, output_multiplier=1.0)


def no_softcap(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    return replace(config, final_logit_softcapping=None)


def fewer_choices(config: DraftConfig, tensors: Tensors) -> DraftConfig:
    is_selector = config.sequential_head == "selector"
    return replace(config, head_choices=config.head_choices - is_selector)


def without(name: str) -> Fault:
    def fault(config: DraftConfig, tensors: Tensors) -> DraftConfig:
        tensors.pop(name, None)
        return config

    return fault


OF_ALL_ROWS: dict[str, Fault] = {
    "ids off by one": ids_off_by_one,
    "the other layout": other_layout,
    "causality": causality,
    "the usual rotation": usual_rotation,
    "another mask token": other_mask_token,
}
OF_SOME_ROWS: dict[str, Fault] = {  # which they change
    "no window": no_window,
    "a window one wider": window_off_by_one,
    "one rotation for all layers": one_rotation,
    "no yarn": no_yarn,
    "no d2t": draft_ids_for_tokens,
    "no lm_head of its own": without("lm_head.weight"),
    "no embedding of its own": without("embed_tokens.weight"),
    "no row for the mask token": without("mask_embedding"),
    "no embedding scale": no_scale,
    "no multiplier": no_multiplier,
    "no softcap": no_softcap,
    "one choice fewer": fewer_choices,
}


def a_row_of_each_form() -> list[str]:
    names: dict[tuple[str, str], str] = {}
    for name, row in READ_ROWS.items():
        names.setdefault((row.name, row.layout), name)
    return list(names.values())


def changes(fault: Fault, config: DraftConfig, tensors: Tensors) -> bool:
    held = dict(tensors)
    if fault(config, held) != config or held.keys() != tensors.keys():
        return True
    return any(held[name] is not tensors[name] for name in held)


def plant(fault: Fault, patch: pytest.MonkeyPatch) -> None:
    """Let all networks be read with it."""

    def faulty(folder: Path, vocabulary: object = None) -> tuple[DraftConfig, Tensors]:
        config, tensors = read_draft(folder)
        return fault(config, tensors), tensors

    patch.setattr(network, "read_draft", faulty)


@pytest.mark.parametrize("what", OF_ALL_ROWS)
def test_planted_faults_of_every_form_are_caught(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    fault = OF_ALL_ROWS[what]
    plant(fault, monkeypatch)
    for name in a_row_of_each_form():
        assert changes(fault, *shelf.read[name]), name
        got = drafted(shelf.folders[name])
        assert not same(got, shelf.defined(name), common=True), name


@pytest.mark.parametrize("what", OF_SOME_ROWS)
def test_planted_faults_are_caught_in_every_row_that_they_change(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    fault = OF_SOME_ROWS[what]
    plant(fault, monkeypatch)
    changed = [name for name in READ_ROWS if changes(fault, *shelf.read[name])]
    assert changed
    for name in changed:
        got = drafted(shelf.folders[name])
        assert not same(got, shelf.defined(name), common=True), name


@pytest.mark.parametrize("name", ["v1, windows by depth", "speculators dflash"])
def test_planted_fault_tables_of_the_other_kind_are_caught(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def other_tables(config: DraftConfig, tensors: Tensors) -> DraftConfig:
        return replace(config, raw_tables=not config.raw_tables)

    plant(other_tables, monkeypatch)
    got = drafted(shelf.folders[name], "gemma3")
    assert not same(got, shelf.defined(name, "gemma3"))


@pytest.mark.parametrize(
    "name",
    [
        "DFlash 2",
        "speculators dflash2, anchor-first",
        "DeepSpec's DSpark",
        "DeepSpec's DSpark, gated",
        "DeepSpec's DSpark, rnn",
        "DSpark that fills in",
        "speculators dspark, reduced vocabulary",
        "Domino with shifted labels",
        "Domino without",
    ],
)
def test_planted_fault_the_token_before_of_another_row_is_caught(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every row is corrected for the token that the row before it was corrected for."""
    for kind in (Selector, Markov, Domino):
        begin = kind.begin

        def late(head: Any, hidden: Tensor, begin: Any = begin) -> Walk:
            walk = begin(head, hidden)
            tokens: list[Tensor] = []

            def walked(k: int, before: Tensor, state: Tensor) -> Step:
                tokens.append(before)
                step: Step = walk(k, tokens[max(k - 1, 0)], state)
                return step

            return walked

        monkeypatch.setattr(kind, "begin", late)
    assert not same(drafted(shelf.folders[name]), shelf.defined(name))
