"""EAGLE-3's dialects: folders as they are published, shrunk, against a slow definition of what each
means (toy_eagle3.py).

A mistake that implementations make is planted in the definition and must be far off.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import requests_of, run
from safetensors.torch import save_file
from torch import Tensor
from toy_eagle3 import (
    CASES,
    DEEPSPEC,
    FAULTS,
    GREEDY,
    HIDDEN,
    HISTORIES,
    IDS,
    KEPT,
    Definition,
    drafted,
    flat,
    published,
    tensors_of,
    the_target,
    wrapped,
)
from toy_training import one_line_and_hint

from flashdraft.engine import Engine
from flashdraft.errors import CheckpointError, DraftMismatch
from flashdraft.formats.foreign import is_draft
from flashdraft.formats.read import read_draft
from flashdraft.formats.written import config_of
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.eagle3 import Eagle3DraftModel
from flashdraft.models.target import Target


@pytest.mark.parametrize("name", CASES)
def test_a_published_folder_drafts_as_its_definition(tmp_path: Path, name: str) -> None:
    folder = published(tmp_path, name)
    meaning = CASES[name].meaning
    for history in HISTORIES:
        proposal = drafted(folder, history)
        tokens, scores = Definition(meaning).chain(history, meaning.drafts)
        assert proposal.tokens[0, 1:].tolist() == tokens
        assert proposal.scores[0, 1:].tolist() == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_planted_faults_change_what_is_drafted(name: str) -> None:
    meaning = CASES[name].meaning
    history = HISTORIES[1]
    right = Definition(meaning).chain(history, 3)[1]
    for fault, applies in FAULTS.items():
        if applies(meaning):
            wrong = Definition(meaning, fault).chain(history, 3)[1]
            assert wrong != pytest.approx(right, rel=1e-3), fault


def test_every_fault_is_planted_somewhere() -> None:
    meanings = [case.meaning for case in CASES.values()]
    for applies in FAULTS.values():
        assert any(applies(meaning) for meaning in meanings)


@pytest.mark.parametrize("name", ["speculators, two of Qwen3's layers", "DeepSpec"])
def test_every_path_of_a_tree_is_scored_as_its_definition_scores_it(
    tmp_path: Path, name: str
) -> None:
    history = HISTORIES[1]
    meaning = CASES[name].meaning
    definition = Definition(meaning)
    first = KEPT[0] if meaning.reduced else 0
    proposal = drafted(published(tmp_path, name), history, tree_nodes=9, block_size=4)
    tokens = proposal.tokens[0].tolist()
    parents = proposal.parents[0].tolist()
    for node in range(1, len(tokens)):
        path = []
        above = node
        while above > 0:
            path.insert(0, tokens[above] - first)
            above = parents[above]
        scores = definition.scores(
            history, lambda step, _, path=path: path[step] if step < len(path) else None
        )
        assert float(proposal.scores[0, node]) == pytest.approx(scores[-1], rel=1e-4)


@functools.cache
def plain_texts() -> list[list[int]]:
    return texts_with(Autoregressive())


def texts_with(drafter: Any) -> list[list[int]]:
    engine = Engine(the_target(), drafter, max_rows=2)
    results = run(engine, requests_of(HISTORIES, [GREEDY] * len(HISTORIES)))
    return [result.tokens for result in results]


@pytest.mark.parametrize("name", CASES)
def test_text_of_every_dialect_is_plain_text(tmp_path: Path, name: str) -> None:
    made = Eagle3DraftModel.from_pretrained(published(tmp_path, name)).drafters(the_target())
    assert texts_with(made()) == plain_texts()
    assert texts_with(made(tree_nodes=7)) == plain_texts()


@pytest.mark.parametrize("name", CASES)
def test_a_folder_written_again_drafts_the_same(tmp_path: Path, name: str) -> None:
    folder = published(tmp_path / "theirs", name)
    assert is_draft(json.loads((folder / "config.json").read_text()))
    model = Eagle3DraftModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours")
    again = Eagle3DraftModel.from_pretrained(tmp_path / "ours")
    assert replace(again.config, dtype="") == replace(model.config, dtype="")
    first = drafted(folder, HISTORIES[1])
    second = drafted(tmp_path / "ours", HISTORIES[1])
    assert torch.equal(first.tokens, second.tokens)
    torch.testing.assert_close(first.scores, second.scores)


def named_layers(target_type: str, depth: int, ids: Sequence[int]) -> tuple[int, ...]:
    """The outputs that are read for ids of eagle_config beside such a target."""
    case = CASES["SpecForge, outputs"]
    config = config_of({**case.config, "eagle_config": {IDS: list(ids)}}, "here")
    model = Eagle3DraftModel(config)
    target: Target = copy.copy(the_target())
    target.num_layers = depth
    target.config = copy.copy(target.config)
    target.config.model_type = target_type
    layers: tuple[int, ...] = model.drafters(target)().layers
    return layers


@pytest.mark.parametrize(
    ("target_type", "depth", "ids", "outputs"),
    [
        ("gpt_oss", 24, [1, 11, 20], (1, 11, 20)),  # SpecForge
        ("gpt_oss", 36, [24, 30, 36], (23, 29, 35)),  # NVIDIA, gpt-oss-120b-Eagle3-v3
        ("deepseek_v3", 61, [1, 29, 57], (1, 29, 57)),
        ("deepseek_v3", 61, [2, 30, 58], (1, 29, 57)),
        ("kimi_k2", 61, [2, 30, 58], (1, 29, 57)),
        ("llama", 61, [2, 30, 58], (2, 30, 58)),
    ],
)
def test_ids_of_eagle_config_mean_what_their_writers_mean(
    target_type: str, depth: int, ids: list[int], outputs: tuple[int, ...]
) -> None:
    assert named_layers(target_type, depth, ids) == outputs


def test_ids_at_the_top_are_never_read_in_two_ways(tmp_path: Path) -> None:
    """State 9 of 8 layers is nothing: it is not taken for a list that counts otherwise."""
    folder = published(tmp_path, "vLLM, ids at the top", **{IDS: [3, 5, 9]})
    with pytest.raises(DraftMismatch, match="reads the outputs of 3 layers"):
        Eagle3DraftModel.from_pretrained(folder).drafters(the_target())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "P-EAGLE": (wrapped(speculators_model_type="peagle"), "P-EAGLE"),
    "P-EAGLE by a key": (flat(pard_token=3), "P-EAGLE"),
    "part of a head of words": (
        flat(partial_rotary_factor="half"),
        "is not an EAGLE-3 drafter: its config lacks or garbles 'partial_rotary_factor': 'half'",
    ),
    "layers without end": (flat(num_hidden_layers=10**9), "'num_hidden_layers': 1000000000"),
    "another class": (
        flat(architectures=["DeepseekV3ForCausalLMEagle3"]),
        "EAGLE-3 drafter of class DeepseekV3ForCausalLMEagle3",
    ),
    "Gemma 4's layer": (
        {**DEEPSPEC, "architectures": ["Gemma4Eagle3Model"]},
        "Gemma 4 EAGLE-3",
    ),
    "two kinds of norms": (
        flat(norm_before_fc=True, fc_norm=True),
        "has both norm_before_fc and fc_norm",
    ),
    "norms before no fc": (
        flat(fc_norm=True, eagle_config={"use_aux_hidden_state": False}),
        "has fc_norm, but no fc",
    ),
    "two widths and no fc": (
        flat(target_hidden_size=48, eagle_config={"use_aux_hidden_state": False}),
        "is of another width than its target",
    ),
    "embeddings": (flat(**{IDS: [0, 2, 4]}), "reads the target's embeddings"),
    "two lists": (
        flat(**{IDS: [2, 4, 7]}, eagle_config={IDS: [2, 4, 7]}),
        "names its layers twice and differently",
    ),
    "three lists": (
        {**DEEPSPEC, IDS: [2, 4, 7]},
        "names its layers twice and differently",
    ),
    "another count": (
        flat(num_aux_hidden_states=5),
        "has num_aux_hidden_states 5, but names 3 layers",
    ),
    "windows": (
        {**DEEPSPEC, "layer_types": ["sliding_attention"], "sliding_window": 8},
        "has sliding layers",
    ),
    "windows by depth": (
        {**DEEPSPEC, "layer_types": None, "sliding_window": 8, "max_window_layers": 0}
        | {"use_sliding_window": True},
        "has sliding layers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_in_a_line(name: str) -> None:
    config, expected = REFUSED[name]
    with pytest.raises(CheckpointError) as error:
        config_of(config, "here")
    assert expected in one_line_and_hint(error)


def test_a_tensor_that_belongs_elsewhere_or_is_missing_is_named(tmp_path: Path) -> None:
    odd: dict[str, tuple[str, dict[str, Tensor], str]] = {
        "twice": (
            "SpecForge, outputs",
            {"layers.0.hidden_norm.weight": torch.ones(HIDDEN)},
            "holds midlayer.hidden_norm.weight twice",
        ),
        "mask": ("SpecForge, outputs", {"mask_hidden": torch.ones(HIDDEN)}, "P-EAGLE"),
        "norm": (
            "SpecForge, outputs",
            {"input_norm.weight": torch.ones(3 * HIDDEN)},
            "has a tensor input_norm.weight",
        ),
    }
    for case, (name, more, expected) in odd.items():
        folder = published(tmp_path / case, name)
        save_file({**tensors_of(CASES[name].meaning), **more}, folder / "model.safetensors")
        with pytest.raises(CheckpointError) as error:
            read_draft(folder)
        assert expected in one_line_and_hint(error)

    for name, lost in (
        ("speculators, two of Qwen3's layers", "layers.1.self_attn.q_norm.weight"),
        ("speculators, biases", "layers.0.self_attn.q_proj.bias"),
        ("a width of its own", "embed_tokens.weight"),
        ("a width of its own", "lm_head.weight"),
        ("DeepSpec", "layers.0.self_attn.k_norm.weight"),
    ):
        folder = published(tmp_path / f"{name} {lost}", name)
        tensors = tensors_of(CASES[name].meaning)
        del tensors[lost]
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(CheckpointError) as error:
            read_draft(folder)
        ours = lost.replace("layers.0", "midlayer")
        assert f"lacks the tensor {ours}" in one_line_and_hint(error)
