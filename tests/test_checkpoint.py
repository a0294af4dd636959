"""A drafter's folder: z-lab's format in, the same format out; what does not fit is refused in one
line with a hint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MASK, VOCAB, tiny_target
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from toy_folders import HEAD_DIM, HIDDEN, ZLAB, save_target, save_zlab, zlab_tensors
from toy_training import one_line_and_hint

import flashdraft
from flashdraft import DFlashDraftModel, files
from flashdraft.errors import CheckpointError, DraftMismatch
from flashdraft.files import write_file
from flashdraft.formats import parse, write
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.match import check_target
from flashdraft.formats.parse import spread_layers
from flashdraft.formats.read import read_draft
from flashdraft.formats.write import write_draft
from flashdraft.methods.dflash import DFlashDrafter, PackedDraft
from flashdraft.models.lean import LeanTarget
from flashdraft.types import Rows, SamplingParams

# The keys of the public format that a reader may ask for.
# fmt: off
PUBLIC_KEYS = (
    "architectures", "model_type", "block_size", "dflash_config", "num_target_layers", "num_hidden_layers", "hidden_size",
    "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
    "rope_scaling", "max_position_embeddings", "layer_types", "sliding_window", "attention_bias", "tie_word_embeddings",
    "vocab_size", "dtype",
)
# fmt: on


def config(**changes: Any) -> dict[str, Any]:
    """The published config.json with changes; a value of `...` removes the key."""
    return {name: value for name, value in {**ZLAB, **changes}.items() if value is not ...}


def tensors_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    "inside", [False, True], ids=["block_size-on-top", "block_size-in-dflash_config"]
)
def test_published_folder_loads_with_its_own_bits(
    tmp_path: Path, prefix: str, inside: bool
) -> None:
    written = config()
    if inside:
        written = config(block_size=..., dflash_config={**ZLAB["dflash_config"], "block_size": 4})
    tensors = zlab_tensors()
    save_zlab(tmp_path, config=written, tensors={prefix + name: t for name, t in tensors.items()})
    model = DFlashDraftModel.from_pretrained(tmp_path)
    assert same_bits(model.state_dict(), {name: t.float() for name, t in tensors.items()})
    assert not model.training
    read = model.config
    assert (read.block_size, read.mask_token_id, read.target_layer_ids, read.num_target_layers) == (
        4,
        MASK,
        (1, 2),
        4,
    )
    assert read.rope_parameters["rope_theta"] == 1000000
    assert read.rope_parameters["rope_type"] == "default"


def test_published_folder_drafts_for_a_target_folder(tmp_path: Path) -> None:
    target, draft = save_target(tmp_path / "target"), save_zlab(tmp_path / "draft")
    plain = flashdraft.load(target, draft="autoregressive", dtype="float64").generate(
        "hello", max_new_tokens=24
    )
    drafting = flashdraft.load(
        target, draft=draft, dtype="float64", block_size=4
    )  # fixed: whether drafts pay here is not the question
    drafted = drafting.generate("hello", max_new_tokens=24)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.num_drafted > 20
    assert plain.stats.num_drafted == 0


@pytest.mark.parametrize("method", ["dflash", "eagle3", "medusa", "draft_model"])
def test_shipped_folder_is_written_again_as_it_is(method: str) -> None:
    folder = Path(flashdraft.__file__).parent / "assets" / f"smollm2-135m-{method}"
    written = json.loads((folder / "config.json").read_text())
    read = DraftConfig.from_json(written, "here")
    assert read.to_json() == written
    assert read.method == method
    assert (
        read.target_layer_ids
        == {
            "dflash": (1, 8, 14, 20, 27),
            "eagle3": (1, 14, 27),
            "medusa": (30,),
            "draft_model": (),
        }[method]
    )


PLACES: dict[str, tuple[dict[str, Any], tuple[int, int, tuple[int, ...]]]] = {
    "dflash_config before the top": (
        {
            "mask_token_id": 7,
            "target_layer_ids": [0],
            "block_size": 9,
            "dflash_config": {**ZLAB["dflash_config"], "block_size": 6},
        },
        (6, MASK, (1, 2)),
    ),
    "all at the top": (
        {"dflash_config": ..., "mask_token_id": 7, "target_layer_ids": [0, 3], "block_size": 9},
        (9, 7, (0, 3)),
    ),
    "zero in dflash_config": (
        {"mask_token_id": 7, "dflash_config": {"mask_token_id": 0, "target_layer_ids": [0, 1]}},
        (4, 0, (0, 1)),
    ),
    "default layers": (
        {"dflash_config": {"mask_token_id": 7}, "num_target_layers": 36},
        (4, 7, (1, 33)),
    ),
    "default block": ({"block_size": ...}, (16, MASK, (1, 2))),
}


@pytest.mark.parametrize("case", PLACES)
def test_keys_are_looked_up_as_their_authors_do(case: str) -> None:
    changes, expected = PLACES[case]
    read = DraftConfig.from_json(config(**changes), "here")
    assert (read.block_size, read.mask_token_id, read.target_layer_ids) == expected


def test_heads_that_are_not_said_are_told_by_the_tensors(tmp_path: Path) -> None:
    save_zlab(tmp_path, config=config(head_dim=..., num_key_value_heads=...))
    read, _ = read_draft(tmp_path)
    assert (read.head_dim, read.num_key_value_heads) == (16, 2)  # 32 / 4 and 4 would be llama's
    bare = DraftConfig.from_json(
        config(head_dim=..., num_key_value_heads=..., max_position_embeddings=...), "here"
    )
    assert (bare.head_dim, bare.num_key_value_heads, bare.max_position_embeddings) == (
        128,
        32,
        32768,
    )  # Qwen3Config's


def test_depth_of_the_target_need_not_be_said(tmp_path: Path) -> None:
    read = DraftConfig.from_json(config(num_target_layers=...), "here")
    check_target(read, tiny_target("llama", lean=True))
    assert read.num_target_layers == 0


def test_mask_embedding_is_refused_by_name(tmp_path: Path) -> None:
    save_zlab(tmp_path)
    (tmp_path / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        DFlashDraftModel.from_pretrained(tmp_path)
    assert "holds mask_embedding.pt, which is not supported" in one_line_and_hint(error)


GARBLED: dict[str, tuple[dict[str, Any], str]] = {
    "a flag as text": ({"is_causal": "false"}, "'is_causal': 'false'"),
    "a window of nothing": (
        {"use_sliding_window": True, "sliding_window": 0, "layer_types": ...},
        "'sliding_window': 0",
    ),
    "no number": (
        {"dflash_config": {**ZLAB["dflash_config"], "input_embedding_scale": "big"}},
        "big",
    ),
    "not finite": ({"output_multiplier": float("nan")}, "'output_multiplier'"),
    "theta of words": ({"rope_theta": "a million"}, "a million"),
    "theta of nothing": ({"rope_theta": 0}, "'rope_theta': 0"),
    "swa without its size": (
        {"dflash_config": {**ZLAB["dflash_config"], "use_swa": True}},
        "'swa_window_size'",
    ),
    "layers as text": (
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": "all"}},
        "'target_layer_ids': 'all'",
    ),
    "layers as digits": (
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": "12"}},
        "'target_layer_ids': '12'",
    ),
    "half a layer": (
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1.5, 2]}},
        "'target_layer_ids': 1.5",
    ),
    "half a node": ({"block_size": 4.5}, "'block_size': 4.5"),
    "a block of yes": ({"block_size": True}, "'block_size': True"),
    "half a token": (
        {"dflash_config": {"mask_token_id": 1.5, "target_layer_ids": [1, 2]}},
        "'mask_token_id': 1.5",
    ),
    "a token before the first": (
        {"dflash_config": {"mask_token_id": -1, "target_layer_ids": [1, 2]}},
        "'mask_token_id': -1",
    ),
    "a list of mask tokens": (
        {"dflash_config": {"mask_token_id": [3], "target_layer_ids": [1, 2]}},
        "'mask_token_id': [3]",
    ),
    "no vocabulary": ({"vocab_size": 0}, "'vocab_size': 0"),
    "no context": ({"max_position_embeddings": 0}, "'max_position_embeddings': 0"),
    "a negative epsilon": ({"rms_norm_eps": -1}, "'rms_norm_eps': -1"),
    "an epsilon that is none": ({"rms_norm_eps": float("nan")}, "'rms_norm_eps': nan"),
    "a switch of words": ({"attention_bias": "false"}, "'attention_bias': 'false'"),
    "an unknown dtype": ({"dtype": "bf16"}, "'dtype': 'bf16'"),
    "a scaling by nothing": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "'factor': 0"),
    "a scaling backwards": (
        {"rope_scaling": {"rope_type": "linear", "factor": -2}},
        "'factor': -2",
    ),
    "theta of a dictionary": ({"rope_theta": {"a": 1}}, "'rope_theta': {'a': 1}"),
    "no layers": (
        {"dflash_config": {"mask_token_id": 3}, "num_target_layers": ...},
        "'target_layer_ids'",
    ),
    "scaling without its factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    "scaling of words": ({"rope_scaling": {"rope_type": "linear", "factor": "twice"}}, "twice"),
}


@pytest.mark.parametrize("case", GARBLED)
def test_garbled_value_is_named(tmp_path: Path, case: str) -> None:
    changes, expected = GARBLED[case]
    save_zlab(tmp_path, config=config(**changes))
    with pytest.raises(CheckpointError) as error:
        DFlashDraftModel.from_pretrained(tmp_path)
    message = one_line_and_hint(error)
    assert "lacks or garbles" in message
    assert expected in message


def test_planted_fault_numbers_that_are_only_cut_are_read_as_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parse, "_count", lambda _name, value, least=1: int(value))
    save_zlab(tmp_path, config=config(block_size=4.5))
    assert read_draft(tmp_path)[0].block_size == 4


def test_dtype_may_have_torch_before_it(tmp_path: Path) -> None:
    save_zlab(tmp_path / "draft", config=config(dtype="torch.float32"))
    read, tensors = read_draft(tmp_path / "draft")
    write_draft(tmp_path / "again", read, tensors)
    assert read_draft(tmp_path / "again")[0].dtype == "float32"


def test_factor_without_its_kind_of_scaling_is_refused(tmp_path: Path) -> None:
    save_zlab(tmp_path, config=config(rope_scaling={"factor": 2.0}))
    with pytest.raises(CheckpointError) as error:
        read_draft(tmp_path)
    assert "scales its positions by 2.0, but names no rope_type" in one_line_and_hint(error)


def test_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """An old file beside the new one, shards beside a whole one, two names for one tensor: either
    may be meant.
    """
    tensors = zlab_tensors()
    for name, others in (
        ("left-over", tensors),
        ("prefixed", {"model.fc.weight": tensors["fc.weight"] * 0}),
    ):
        folder = save_zlab(tmp_path / name)
        save_file(
            {key: tensor * 0 for key, tensor in others.items()},
            folder / "model-00001-of-00001.safetensors",
        )
        with pytest.raises(CheckpointError) as error:
            read_draft(folder)
        assert "holds fc.weight twice, the second time in" in one_line_and_hint(error)


NO_NUMBERS: dict[str, tuple[Any, str]] = {
    "packed": (lambda weight: (10 * weight).to(torch.int8), "holds fc.weight as int8"),
    "not a number": (lambda weight: weight * float("nan"), "fc.weight of"),
    "infinite": (lambda weight: weight.fill_(float("inf")), "fc.weight of"),
}


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, case: str) -> None:
    change, expected = NO_NUMBERS[case]
    tensors = zlab_tensors()
    save_zlab(tmp_path, tensors=tensors | {"fc.weight": change(tensors["fc.weight"])})
    with pytest.raises(CheckpointError) as error:
        read_draft(tmp_path)
    assert expected in one_line_and_hint(error)


def test_heads_that_no_attention_can_have_are_refused(tmp_path: Path) -> None:
    def changed(name: str, width: int) -> Path:
        tensors = zlab_tensors()
        for each in [key for key in tensors if key.endswith(("k_proj.weight", "v_proj.weight"))]:
            tensors[each] = torch.ones(width, HIDDEN)
        return save_zlab(tmp_path / name, config=config(num_key_value_heads=3), tensors=tensors)

    with pytest.raises(CheckpointError) as error:
        read_draft(changed("groups", 3 * HEAD_DIM))
    assert "has num_attention_heads 4 for num_key_value_heads 3" in one_line_and_hint(error)


def test_adapter_beside_a_drafter_is_not_left_out(tmp_path: Path) -> None:
    (save_zlab(tmp_path) / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        read_draft(tmp_path)
    assert "holds an adapter" in one_line_and_hint(error)


def test_falsy_ids_are_ids(tmp_path: Path) -> None:
    special = {"mask_token_id": 0, "target_layer_ids": [0, 1]}
    save_zlab(tmp_path, config=config(dflash_config=special))
    read, _ = read_draft(tmp_path)
    assert (read.mask_token_id, read.target_layer_ids) == (0, (0, 1))


def test_saved_folder_is_the_public_format(tmp_path: Path) -> None:
    save_zlab(tmp_path / "theirs")
    DFlashDraftModel.from_pretrained(tmp_path / "theirs").save_pretrained(
        tmp_path / "ours", readme="# A drafter\n"
    )
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    ours = tensors_of(tmp_path / "ours" / "model.safetensors")
    assert len(ours) == 11 * 2 + 3
    assert same_bits(ours, zlab_tensors())
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {key: written.get(key, "absent") for key in PUBLIC_KEYS} == {
        key: ZLAB[key] for key in PUBLIC_KEYS
    }
    assert written["hidden_act"] == "silu"
    assert read_draft(tmp_path / "ours")[0] == read_draft(tmp_path / "theirs")[0]


def test_round_trip_check_sees_one_changed_bit(tmp_path: Path) -> None:
    tensors = zlab_tensors()
    bits = tensors["layers.1.mlp.up_proj.weight"].view(torch.int16)
    bits[0, 0] ^= 1
    assert not same_bits(tensors, zlab_tensors())


@pytest.mark.parametrize("num_layers", [1, 5])
def test_saved_folder_holds_eleven_tensors_a_layer_and_three(
    tmp_path: Path, num_layers: int
) -> None:
    shape = config(num_hidden_layers=num_layers, layer_types=["full_attention"] * num_layers)
    save_zlab(tmp_path / "theirs", config=shape, tensors=zlab_tensors(num_layers=num_layers))
    DFlashDraftModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert len(tensors_of(tmp_path / "ours" / "model.safetensors")) == 11 * num_layers + 3


def test_saved_files_can_be_read_by_others(tmp_path: Path) -> None:
    write_draft(tmp_path, DraftConfig.from_json(ZLAB, "here"), zlab_tensors(), readme="")
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == dict.fromkeys(
        ("README.md", "config.json", "model.safetensors"), "0o644"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {
            "rope_theta": ...,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        },
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 8,
            "use_sliding_window": True,
        },
        {"attention_bias": True},
        {"draft_vocab_size": 5},
        {"num_key_value_heads": ..., "head_dim": ...},
        {"is_causal": False},
        {"output_multiplier": 0.5, "input_embedding_scale": 2.0, "final_logit_softcapping": 30.0},
        {"dflash_config": {**ZLAB["dflash_config"], "use_swa": True, "swa_window_size": 8}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_config_survives_a_round_trip(changes: dict[str, Any]) -> None:
    first = DraftConfig.from_json(config(**changes), "here")
    assert DraftConfig.from_json(json.loads(json.dumps(first.to_json())), "here") == first
    assert first != DraftConfig.from_json(ZLAB, "here")


def test_rotary_scaling_is_applied(tmp_path: Path) -> None:
    save_zlab(tmp_path / "plain")
    save_zlab(
        tmp_path / "scaled", config=config(rope_scaling={"rope_type": "linear", "factor": 2.0})
    )
    plain, scaled = (
        DFlashDraftModel.from_pretrained(tmp_path / name) for name in ("plain", "scaled")
    )
    torch.testing.assert_close(scaled.cos[2::2], plain.cos[1:128])
    assert not torch.allclose(scaled.cos, plain.cos)


@pytest.mark.parametrize(
    ("num_target_layers", "count", "ids"),
    [
        (36, 5, (1, 9, 17, 25, 33)),
        (32, 5, (1, 8, 15, 22, 29)),
        (36, 1, (18,)),
        (30, 3, (1, 14, 27)),
        (4, 2, (1, 1)),
        (2, 1, (1,)),
    ],
)
def test_feature_layers_are_spread_as_in_the_paper(
    num_target_layers: int, count: int, ids: tuple[int, ...]
) -> None:
    assert spread_layers(num_target_layers, count) == ids


def test_feature_layers_exist_for_every_depth() -> None:
    for depth in range(1, 80):
        for count in range(1, 9):
            assert all(0 <= i < depth for i in spread_layers(depth, count)), (depth, count)


def without(name: str) -> dict[str, Tensor]:
    return {n: t for n, t in zlab_tensors().items() if n != name}


DAMAGED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "missing tensor": (
        config(),
        without("layers.1.mlp.up_proj.weight"),
        "lacks the tensor layers.1.mlp.up_proj.weight",
    ),
    "missing fc": (config(), without("fc.weight"), "lacks the tensor fc.weight"),
    "wrong shape": (
        config(intermediate_size=40),
        zlab_tensors(),
        "layers.0.mlp.gate_proj.weight has shape [48, 32], ",
    ),
    "features of another number": (
        config(),
        zlab_tensors(num_features=3),
        "fc.weight has shape [32, 96], ",
    ),
    "unknown tensor": (
        config(),
        {**zlab_tensors(), "confidence.weight": torch.zeros(1)},
        "has a tensor confidence.weight",
    ),
    "a layer too many": (
        config(),
        zlab_tensors(num_layers=3),
        "has a tensor layers.2.input_layernorm.weight",
    ),
    "lm_head of another shape": (
        config(),
        {**zlab_tensors(), "lm_head.weight": torch.zeros(7, HIDDEN)},
        "lm_head.weight has shape [7, 32]",
    ),
    "no dflash_config": (
        config(dflash_config=...),
        zlab_tensors(),
        "lacks or garbles 'mask_token_id'",
    ),
    "a plain Qwen3": (
        config(dflash_config=..., block_size=..., num_target_layers=...),
        {},
        "is not a DFlash drafter",
    ),
    "garbled size": (config(hidden_size="wide"), zlab_tensors(), "is not a DFlash drafter"),
    "a block without masks": (config(block_size=1), zlab_tensors(), "has block_size 1"),
    "too few layer types": (config(layer_types=["full_attention"]), zlab_tensors(), "layer_types"),
    "unknown layer type": (
        config(layer_types=["full_attention", "linear_attention"]),
        zlab_tensors(),
        "linear_attention",
    ),
    "another activation": (config(hidden_act="gelu"), zlab_tensors(), "hidden_act is 'gelu'"),
    "rotary unknown": (config(rope_scaling={"rope_type": "spiral"}), zlab_tensors(), "'spiral'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folder_is_refused(tmp_path: Path, case: str) -> None:
    written, tensors, expected = DAMAGED[case]
    save_zlab(tmp_path, config=written, tensors=tensors)
    with pytest.raises(CheckpointError) as error:
        DFlashDraftModel.from_pretrained(tmp_path)
    assert expected in one_line_and_hint(error)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_file_is_refused_by_name(tmp_path: Path, name: str, share: float) -> None:
    save_zlab(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError) as error:
        DFlashDraftModel.from_pretrained(tmp_path)
    assert name in one_line_and_hint(error)


def test_pointer_in_the_place_of_weights_is_named(tmp_path: Path) -> None:
    (save_zlab(tmp_path) / "model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\n"
    )
    with pytest.raises(CheckpointError) as error:
        read_draft(tmp_path)
    assert "is a git-lfs pointer" in one_line_and_hint(error)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    save_zlab(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        DFlashDraftModel.from_pretrained(tmp_path)
    assert "holds no .safetensors file" in one_line_and_hint(error)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "dflash2"),
        ({"architectures": ["Qwen3DSparkModel"]}, "dspark"),
        ({"dspark_config": {"markov_rank": 256}}, "dspark"),
        ({"model_type": "domino"}, "domino"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        (
            {"dflash_config": {**ZLAB["dflash_config"], "sample_from_anchor": True}},
            "sample_from_anchor",
        ),
    ],
)
def test_foreign_drafter_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    save_zlab(tmp_path, config=config(**changes))
    with pytest.raises(CheckpointError) as error:
        DFlashDraftModel.from_pretrained(tmp_path)
    assert f"is a {name} drafter, which is not supported" in one_line_and_hint(error)


def test_drafter_that_does_not_sample_from_the_anchor_is_no_foreigner(tmp_path: Path) -> None:
    save_zlab(tmp_path, config=config(sample_from_anchor=False))
    assert DFlashDraftModel.from_pretrained(tmp_path).config.block_size == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 64}, "the draft has hidden size 64, but `llama` has 32"),
        (
            {"target_layer_ids": (1, 4)},
            "the draft wants hidden states of layer 4, but `llama` has 4 layers",
        ),
        (
            {"target_layer_ids": (-1, 2)},
            "the draft wants hidden states of layer -1, but `llama` has 4 layers",
        ),
        (
            {"num_target_layers": 5},
            "the draft was made for a target with 5 layers, but `llama` has 4",
        ),
        ({"mask_token_id": VOCAB}, f"the mask token {VOCAB}, but `llama` has {VOCAB}"),
        ({"mask_token_id": -1}, "the mask token -1"),
    ],
)
def test_drafter_of_another_target_is_refused(changes: dict[str, Any], expected: str) -> None:
    target, fitting = tiny_target("llama", lean=True), DraftConfig.from_json(ZLAB, "here")
    check_target(fitting, target)
    with pytest.raises(DraftMismatch) as error:
        check_target(replace(fitting, **changes), target)
    assert expected in one_line_and_hint(error)


def test_mismatch_ends_load_before_anything_runs(tmp_path: Path) -> None:
    save_zlab(tmp_path / "draft", config=config(num_target_layers=5))
    with pytest.raises(DraftMismatch):
        flashdraft.load(save_target(tmp_path / "target"), draft=tmp_path / "draft")


# Vocabularies of two lengths: a target whose embedding was cut or padded.


def vocabulary_of(count: int, *, d2t: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A drafter's config and tensors, with an embedding and a head of its own of `count` tokens;
    its head likes the last ones.
    """
    noise = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(8))
    tensors = {
        **zlab_tensors(),
        "embed_tokens.weight": noise,
        "lm_head.weight": noise.flip(0) * torch.arange(1, count + 1)[:, None],
    }
    if d2t:
        tensors |= {
            "d2t": torch.zeros(count, dtype=torch.int64),
            "t2d": torch.ones(count, dtype=torch.bool),
        }
    return config(vocab_size=count, **({"draft_vocab_size": count} if d2t else {})), tensors


@pytest.mark.parametrize("d2t", [False, True], ids=["whole", "reduced"])
@pytest.mark.parametrize("count", [VOCAB - 20, VOCAB, VOCAB + 20])
def test_drafter_of_a_cut_or_padded_vocabulary_proposes_only_what_its_target_knows(
    tmp_path: Path, count: int, d2t: bool
) -> None:
    target = target_of(save_target(tmp_path / "target"))
    written, tensors = vocabulary_of(count, d2t=d2t)
    written["dflash_config"] = {**ZLAB["dflash_config"], "mask_token_id": 3}
    model = DFlashDraftModel.from_pretrained(
        save_zlab(tmp_path / "draft", config=written, tensors=tensors)
    )
    drafted = proposals(model, target)
    assert max(drafted) < min(count, VOCAB)
    assert len(set(drafted)) > 1
    whole = PackedDraft(model, target)
    assert (
        whole.embed(torch.tensor([VOCAB - 1])).abs().sum() > 0 or count < VOCAB
    )  # what it never saw is nothing to it


def test_uncut_head_would_propose_what_the_target_lacks(tmp_path: Path) -> None:
    """What the test above rests on: the drafter's likeliest tokens are among those."""
    _, tensors = vocabulary_of(VOCAB + 20)
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(2))
    assert int((hidden @ tensors["lm_head.weight"].T).argmax(-1).max()) >= VOCAB


@pytest.mark.parametrize("count", [VOCAB - 4, VOCAB + 4])
def test_drafter_without_tables_of_its_own_fits_any_length(tmp_path: Path, count: int) -> None:
    target = target_of(save_target(tmp_path / "target"))
    folder = save_zlab(tmp_path / "draft", config=config(vocab_size=count))
    same = save_zlab(tmp_path / "same")
    assert proposals(DFlashDraftModel.from_pretrained(folder), target) == proposals(
        DFlashDraftModel.from_pretrained(same), target
    )


def test_mask_token_beyond_a_cut_vocabulary_is_refused_unless_the_drafter_has_its_row(
    tmp_path: Path,
) -> None:
    target = target_of(save_target(tmp_path / "target"))
    written, tensors = vocabulary_of(VOCAB + 20)
    written["dflash_config"] = {**ZLAB["dflash_config"], "mask_token_id": VOCAB + 5}
    own = save_zlab(tmp_path / "own", config=written, tensors=tensors)
    assert max(proposals(DFlashDraftModel.from_pretrained(own), target)) < VOCAB
    shared = save_zlab(tmp_path / "shared", config=written)
    with pytest.raises(DraftMismatch) as error:
        PackedDraft(DFlashDraftModel.from_pretrained(shared), target)
    assert f"the mask token {VOCAB + 5}, but `" in one_line_and_hint(error)
    assert "its row of the embedding is missing" in str(error.value)


def test_vocabulary_that_lies_beyond_the_target_is_refused(tmp_path: Path) -> None:
    target = target_of(save_target(tmp_path / "target"))
    written = config(vocab_size=200, draft_vocab_size=5)
    extra = {
        "d2t": torch.full((5,), 100, dtype=torch.int64),
        "t2d": torch.zeros(200, dtype=torch.bool),
    }
    folder = save_zlab(tmp_path / "draft", config=written, tensors={**zlab_tensors(), **extra})
    with pytest.raises(DraftMismatch) as error:
        PackedDraft(DFlashDraftModel.from_pretrained(folder), target)
    assert "lies beyond the 61 tokens" in one_line_and_hint(error)


# A target that scales its embedding, or caps its logits (Gemma).


def gemma_draft(folder: Path, table: Tensor | None = None, **special: Any) -> DFlashDraftModel:
    tensors = (
        zlab_tensors()
        if table is None
        else {**zlab_tensors(), "embed_tokens.weight": table.float()}
    )
    written = config(dflash_config={**ZLAB["dflash_config"], **special})
    return DFlashDraftModel.from_pretrained(save_zlab(folder, config=written, tensors=tensors))


def test_copy_of_a_scaled_embedding_is_scaled_and_another_table_needs_a_scale(
    tmp_path: Path,
) -> None:
    target: Any = tiny_target("gemma3")
    some = torch.tensor([3, 9, MASK])
    rows = target.embedding_rows(torch.arange(VOCAB)).float().double()
    copied = PackedDraft(
        gemma_draft(tmp_path / "copy", target.embedding_rows(torch.arange(VOCAB)).double()), target
    )
    exact = torch.equal(rows, target.embedding_rows(torch.arange(VOCAB)))
    if exact:
        assert torch.equal(copied.embed(some), target.embed(some))
        assert not torch.equal(copied.embed(some), rows[some])
    with pytest.raises(DraftMismatch) as error:
        PackedDraft(gemma_draft(tmp_path / "other", rows.flip(0)), target)
    assert "an embedding of its own" in one_line_and_hint(error)
    own = PackedDraft(
        gemma_draft(tmp_path / "own", rows.flip(0), input_embedding_scale=4.0), target
    )
    assert torch.allclose(own.embed(some), rows.flip(0)[some] * 4.0)
    with pytest.raises(DraftMismatch) as error:
        PackedDraft(gemma_draft(tmp_path / "shared", input_embedding_scale=4.0), target)
    assert "which scales it already" in one_line_and_hint(error)


def test_head_of_a_capped_target_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target: Any = tiny_target("gemma3")
    monkeypatch.setattr(target.config, "final_logit_softcapping", 3.0)
    hidden = torch.randn(5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensors = {**zlab_tensors(), "lm_head.weight": target.head_weight(torch.arange(VOCAB)).float()}
    own = PackedDraft(
        DFlashDraftModel.from_pretrained(save_zlab(tmp_path / "own", tensors=tensors)), target
    )
    shared = PackedDraft(gemma_draft(tmp_path / "shared"), target)
    raw = target.uncapped_logits(hidden)
    capped = 3 * torch.tanh(raw / 3)
    assert torch.allclose(shared.logits(hidden), capped)
    assert torch.allclose(own.logits(hidden), capped, atol=1e-5)
    assert not torch.allclose(raw, capped, atol=0.1)


# A reduced vocabulary: draft id i is the target's token i + d2t[i].
KEPT = (3, 9, 20, 41, 59)


def reduced(*, own_head: bool) -> dict[str, Tensor]:
    kept = torch.tensor(KEPT)
    extra = {
        "d2t": kept - torch.arange(len(KEPT)),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, kept, True),
    }
    if own_head:
        extra["lm_head.weight"] = torch.randn(
            len(KEPT), HIDDEN, generator=torch.Generator().manual_seed(5)
        ).bfloat16()
    return {**zlab_tensors(), **extra}


def target_of(folder: Path) -> LeanTarget:
    target = flashdraft.load(folder, draft="autoregressive", dtype="float64").target
    assert isinstance(target, LeanTarget)
    return target


def proposals(model: DFlashDraftModel, target: LeanTarget) -> list[int]:
    """Everything drafted behind 40 anchors, one after the other, with random features."""
    drafter = DFlashDrafter(PackedDraft(model, target))
    generator = torch.Generator().manual_seed(2)
    history, drafted = [1], []
    for token in torch.randint(3, 60, (40,), generator=generator).tolist():
        features = torch.randn(1, 2 * HIDDEN, generator=generator, dtype=torch.float64)
        drafter.observe(
            Rows([0], [history], [SamplingParams()], [1]), [torch.tensor(history[-1:])], [features]
        )
        history.append(token)
        drafted += (
            drafter.propose(Rows([0], [history], [SamplingParams()], [1]), 8).tokens[0, 1:].tolist()
        )
    return drafted


@pytest.mark.parametrize("own_head", [False, True], ids=["the-target's-rows", "own-lm_head"])
def test_reduced_vocabulary_drafts_only_its_tokens_and_leaves_the_target_alone(
    tmp_path: Path, own_head: bool
) -> None:
    target = target_of(save_target(tmp_path / "target"))
    save_zlab(
        tmp_path / "draft", config=config(draft_vocab_size=5), tensors=reduced(own_head=own_head)
    )
    save_zlab(tmp_path / "whole")
    head, hidden = (
        target.head_weight(torch.arange(VOCAB)).clone(),
        torch.randn(3, HIDDEN, dtype=torch.float64),
    )
    logits = target.lm_head(hidden)
    drafted = set(proposals(DFlashDraftModel.from_pretrained(tmp_path / "draft"), target))
    assert drafted <= set(KEPT)
    assert len(drafted) > 1
    assert torch.equal(target.head_weight(torch.arange(VOCAB)), head)
    assert torch.equal(target.lm_head(hidden), logits)
    whole = set(proposals(DFlashDraftModel.from_pretrained(tmp_path / "whole"), target))
    assert not whole <= set(KEPT)


def test_reduced_vocabulary_takes_the_best_of_its_tokens(tmp_path: Path) -> None:
    target = target_of(save_target(tmp_path / "target"))
    save_zlab(
        tmp_path / "draft", config=config(draft_vocab_size=5), tensors=reduced(own_head=False)
    )
    network = PackedDraft(DFlashDraftModel.from_pretrained(tmp_path / "draft"), target)
    hidden = torch.randn(
        50, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    logits = target.lm_head(hidden)
    expected = [max(KEPT, key=lambda token: float(row[token])) for row in logits]
    assert (
        network.scored(hidden[None], torch.zeros(1, dtype=torch.long))[0][..., 0][0].tolist()
        == expected
    )
    assert (
        network.scored(hidden[None], torch.zeros(1, dtype=torch.long))[0][..., 0][0].tolist()
        != logits.argmax(-1).tolist()
    )


def test_reduced_vocabulary_survives_saving(tmp_path: Path) -> None:
    save_zlab(
        tmp_path / "theirs", config=config(draft_vocab_size=5), tensors=reduced(own_head=True)
    )
    DFlashDraftModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert same_bits(tensors_of(tmp_path / "ours" / "model.safetensors"), reduced(own_head=True))


def test_reduced_model_is_saved_with_its_vocabulary_or_without_it(tmp_path: Path) -> None:
    model = DFlashDraftModel.from_pretrained(save_zlab(tmp_path / "theirs"))
    model.reduce_vocabulary(torch.tensor(KEPT))
    model.save_pretrained(tmp_path / "reduced")
    assert same_bits(
        tensors_of(tmp_path / "reduced" / "model.safetensors"), reduced(own_head=False)
    )
    assert read_draft(tmp_path / "reduced")[0].draft_vocab_size == len(KEPT)
    model.save_pretrained(tmp_path / "plain", plain=True)
    assert same_bits(tensors_of(tmp_path / "plain" / "model.safetensors"), zlab_tensors())
    assert read_draft(tmp_path / "plain")[0] == read_draft(tmp_path / "theirs")[0]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"d2t": torch.full((5,), VOCAB)}, "d2t leads to token"),
        ({"d2t": torch.full((5,), -9)}, "d2t leads to token"),
        ({"d2t": torch.zeros(4, dtype=torch.int64)}, "d2t has shape [4]"),
        ({"lm_head.weight": torch.zeros(6, HIDDEN)}, "lm_head.weight has shape [6, 32]"),
    ],
)
def test_damaged_reduced_vocabulary_is_refused(
    tmp_path: Path, extra: dict[str, Tensor], expected: str
) -> None:
    save_zlab(
        tmp_path, config=config(draft_vocab_size=5), tensors={**reduced(own_head=True), **extra}
    )
    with pytest.raises(CheckpointError) as error:
        DFlashDraftModel.from_pretrained(tmp_path)
    assert expected in one_line_and_hint(error)


@pytest.mark.parametrize("name", ["lm_head.weight", "embed_tokens.weight"])
def test_own_embedding_or_head_is_used(tmp_path: Path, name: str) -> None:
    target = target_of(save_target(tmp_path / "target"))
    weight = (
        target.head_weight(torch.arange(VOCAB))
        if name == "lm_head.weight"
        else target.embed(torch.arange(VOCAB))
    )
    folders = {
        "none": {},
        "the target's": {name: weight.float()},
        "another": {name: weight.flip(0).contiguous().float()},
    }
    drafted = {}
    for number, (kind, extra) in enumerate(folders.items()):
        folder = save_zlab(tmp_path / str(number), tensors={**zlab_tensors(), **extra})
        drafted[kind] = proposals(DFlashDraftModel.from_pretrained(folder), target)
    assert drafted["the target's"] == drafted["none"]
    assert drafted["another"] != drafted["none"]


# Writing: each file appears whole or not at all.


class Unplugged(Exception):
    """The machine stops here."""


def unplug(*_: Any, **__: Any) -> None:
    raise Unplugged


def half_save(tensors: dict[str, Tensor], path: Any, metadata: Any = None) -> None:
    Path(path).write_bytes(b"half a file")
    raise Unplugged


def naive_write_file(path: Path, content: bytes) -> None:
    """The planted fault: write in place."""
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        os.fsync(file.fileno())
        file.write(content[len(content) // 2 :])


def survives_a_stop(
    write: Callable[[Path, bytes], None], path: Path, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether a file and its folder are as they were after a stop at any of a writer's system
    calls, and new without one.

    A writer that does not make one of the calls fails, too: it cannot be safe.
    """
    for call in ("replace", "fsync"):
        path.write_bytes(b"the old content")
        with monkeypatch.context() as patch:
            patch.setattr(os, call, unplug)
            with suppress(Unplugged):
                write(path, b"the new content")
        if path.read_bytes() != b"the old content" or list(path.parent.iterdir()) != [path]:
            return False
    write(path, b"the new content")
    return path.read_bytes() == b"the new content" and list(path.parent.iterdir()) == [path]


def test_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert survives_a_stop(write_file, tmp_path / "file", monkeypatch)


@pytest.mark.parametrize(
    "wrong", [naive_write_file, lambda path, content: path.write_bytes(content)]
)
def test_writing_in_place_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Path, bytes], None]
) -> None:
    assert not survives_a_stop(wrong, tmp_path / "file", monkeypatch)


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
@pytest.mark.parametrize("existing", [False, True], ids=["new-folder", "folder-with-a-drafter"])
def test_stopped_save_leaves_the_old_drafter_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, existing: bool
) -> None:
    shape, folder = DraftConfig.from_json(ZLAB, "here"), tmp_path / "draft"
    if existing:
        write_draft(folder, shape, zlab_tensors(seed=1))
    before = {p.name: p.read_bytes() for p in folder.glob("*")}
    with monkeypatch.context() as patch:
        if where == "save_file":
            patch.setattr(files, "save_file", half_save)
        else:
            patch.setattr(os, where, unplug)
        with pytest.raises(Unplugged):
            write_draft(folder, shape, zlab_tensors(seed=2))
    assert {p.name: p.read_bytes() for p in folder.glob("*")} == before
    write_draft(folder, shape, zlab_tensors(seed=2))
    assert same_bits(read_draft(folder)[1], zlab_tensors(seed=2))


def test_new_folder_without_its_last_file_is_no_drafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(write, "write_file", unplug)
        with pytest.raises(Unplugged):
            write_draft(tmp_path, DraftConfig.from_json(ZLAB, "here"), zlab_tensors())
    with pytest.raises(CheckpointError) as error:
        read_draft(tmp_path)
    assert "no config.json" in one_line_and_hint(error)
