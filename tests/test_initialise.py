"""Starts from other drafters, and fine-tunes on long contexts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, MASK, tiny_target
from test_wrappers import saved
from toy_folders import letter_tokenizer, save_target

from flashdraft.errors import CheckpointError, InvalidParameter
from flashdraft.formats.config import DraftConfig
from flashdraft.generate import Model
from flashdraft.loading import load_target
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.train.batch import make_batch
from flashdraft.train.config import TrainConfig
from flashdraft.train.features import FeatureSet, write_features
from flashdraft.train.initialise import copied_from_target, draft_config, random_weights, taken_from
from flashdraft.train.regenerate import regenerate
from flashdraft.train.trainer import Trainer
from flashdraft.types import SamplingParams

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
ANSWER = SamplingParams(max_new_tokens=90, ignore_eos=True)
SETTINGS = TrainConfig(
    steps=60, sequences=8, anchors=24, lr=1e-2, vocab=0, weight_decay=0.0, precision="fp32"
)


def language_model(family: str = "llama") -> Model:
    target = tiny_target(family, dtype=torch.float32)
    return Model(target, letter_tokenizer(), Autoregressive, eos=frozenset({EOS}), max_rows=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Features of two targets of the same width, the second one of other weights and of another
    family.
    """
    made = {}
    for family in ("llama", "qwen3"):
        lm, folder = language_model(family), tmp_path_factory.mktemp(family)
        rows = [{"source": "toy", "row": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        regenerate(
            lm, folder / "prompts.jsonl", folder / "answers.jsonl", params=ANSWER, quiet=True
        )
        write_features(
            lm,
            [folder / "answers.jsonl"],
            folder / "features",
            layers=(1, 2),
            max_length=128,
            quiet=True,
        )
        made[family] = folder / "features"
    return made


def config(family: str = "llama", **changes: Any) -> DraftConfig:
    made = draft_config(
        language_model(family).target,
        num_layers=2,
        block_size=4,
        num_features=1,
        mask_token_id=MASK,
    )
    return replace(made, **{"target_layer_ids": (1, 2), **changes})


def test_every_tensor_that_fits_is_taken_and_the_others_are_random() -> None:
    donor = random_weights(config(), 1)
    taken = taken_from(
        config(target_layer_ids=(1, 2, 3), block_size=6, num_hidden_layers=3), donor, 2
    )
    theirs, state = donor.state_dict(), taken.state_dict()
    same = {name for name in state if name in theirs and torch.equal(state[name], theirs[name])}
    assert {name for name in theirs if name != "fc.weight"} <= same
    assert state["fc.weight"].shape == (32, 96)
    assert "layers.2.mlp.up_proj.weight" in set(state) - same
    assert taken.config.block_size == 6


def test_shape_and_rotation_are_the_drafters_own() -> None:
    """Not the target's, by which half of its tensors would be random ones."""
    own = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
        "max_position_embeddings": 99,
        "causal": True,
    }
    donor = random_weights(config(**own), 1)
    taken = taken_from(config(), donor, 2)
    assert taken.config == donor.config
    theirs = donor.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in taken.state_dict().items())


@pytest.mark.parametrize("method", ["eagle3", "medusa", "draft_model"])
def test_drafters_of_other_methods_go_on_as_they_are(method: str) -> None:
    """EAGLE-3 with its switches; Medusa, whose tensors are no projections."""
    shape = draft_config(language_model().target, method=method, num_layers=2, num_features=1)
    switches = {"qk_norm": True, "norm_before_residual": True} if method == "eagle3" else {}
    donor = random_weights(replace(shape, **switches), 1)
    taken = taken_from(shape, donor, 2)
    assert taken.config == donor.config
    theirs, own = donor.state_dict(), taken.state_dict()
    assert theirs.keys() == own.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_drafter_of_another_width_is_refused() -> None:
    donor = random_weights(
        config(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24),
        1,
    )
    with pytest.raises(InvalidParameter, match="16 wide, these 32"):
        taken_from(config(), donor, 0)


@pytest.mark.parametrize("kind", ["swiglu"])
def test_sequential_head_comes_along_with_its_vocabulary(kind: str) -> None:
    donor = random_weights(config(), 1)
    donor.reduce_vocabulary(torch.arange(5, 45))
    donor.add_head(kind, 8)
    taken = taken_from(config(), donor, 2)
    assert (
        taken.config.sequential_head,
        taken.config.head_rank,
        taken.config.draft_vocab_size,
    ) == (kind, 8, 40)
    assert torch.equal(taken.extras["d2t"], donor.extras["d2t"])
    theirs = donor.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in taken.state_dict().items())


def test_vocabulary_without_its_table_of_known_tokens_comes_along() -> None:
    """Published folders may lack t2d, and d2t where all tokens are drafted."""
    donor = random_weights(config(), 1)
    donor.reduce_vocabulary(torch.arange(5, 45))
    donor.add_head("markov", 8)
    del donor.extras["t2d"]
    assert taken_from(config(), donor, 2).extras.keys() == {"d2t"}


def test_start_from_another_targets_drafter_learns_faster(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    """The donor was trained for a target of the same family with a few more steps behind it: a
    fine-tuned target's case.
    """
    lm, data = language_model(), FeatureSet(folders["llama"])
    donor = Trainer(random_weights(config(), 0), lm, data, tmp_path / "donor", SETTINGS)
    for _ in range(SETTINGS.steps):
        donor.train_step()
    other = FeatureSet(folders["qwen3"])
    losses = {}
    for name, model in (
        ("same", taken_from(config(), donor.model, 0)),
        ("random", random_weights(config(), 0)),
    ):
        losses[name] = Trainer(model, lm, data, tmp_path / name, SETTINGS).train_step()["loss"]
    assert losses["same"] < 0.7 * losses["random"]
    moved = Trainer(
        taken_from(config("qwen3"), donor.model, 0),
        language_model("qwen3"),
        other,
        tmp_path / "moved",
        SETTINGS,
    )
    figures = [moved.train_step()["loss"] for _ in range(SETTINGS.steps)]
    assert sum(figures[-5:]) < 0.75 * sum(figures[:5])


def test_long_context_anchors_have_their_context_before_them(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    data = FeatureSet(folders["llama"])
    batch = make_batch([(n, data[n]) for n in range(8)], config(), 24, 0, min_context=60)
    anchors = batch.positions[1][::4]
    assert anchors.min() >= 60
    assert make_batch([(n, data[n]) for n in range(8)], config(), 24, 0).positions[1].min() < 60
    settings = replace(SETTINGS, min_context=60)
    trainer = Trainer(random_weights(config(), 0), language_model(), data, tmp_path, settings)
    losses = [trainer.train_step()["loss"] for _ in range(40)]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_quantised_layers_are_not_copied_as_they_lie(tmp_path: Path) -> None:
    """A scale stands beside each of them, in a tensor of its own."""
    folder = save_target(tmp_path)
    config = draft_config(
        tiny_target("llama", dtype=torch.float32), method="draft_model", num_layers=2
    )
    assert copied_from_target(config, str(folder), None, 0).state_dict()
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(CheckpointError, match="is quantised"):
        copied_from_target(config, str(folder), None, 0)


@pytest.mark.parametrize("kind", ["qwen3_vl", "llava"])
def test_layers_of_a_wrapper_are_those_of_its_language_model(tmp_path: Path, kind: str) -> None:
    folder, model = saved(tmp_path, kind)
    target = load_target(str(folder), kernel="transformers").target
    shape = draft_config(target, method="draft_model", num_layers=2)
    copied = copied_from_target(shape, str(folder), None, 0).state_dict()
    decoder = model.get_decoder()
    theirs = decoder.layers[-1].mlp.down_proj.weight
    assert torch.equal(copied["layers.1.mlp.down_proj.weight"], theirs)
    assert torch.equal(copied["norm.weight"], decoder.norm.weight)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_layers_under_llamas_names_that_are_none_are_not_copied(tmp_path: Path, kind: str) -> None:
    """Norms behind sublayers; gates beside queries, and running states."""
    folder, _ = saved(tmp_path, kind)
    target = load_target(str(folder), kernel="transformers").target
    shape = draft_config(target, method="draft_model", num_layers=2)
    with pytest.raises(CheckpointError, match="no llama-shaped layers") as error:
        copied_from_target(shape, str(folder), None, 0)
    assert error.value.hint == "start from --init random"
