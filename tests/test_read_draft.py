"""Reading a drafter's folder: published ones load with their own bits; what is garbled, damaged or
foreign is refused in one line with a hint.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MASK, tiny_target
from safetensors.torch import save_file
from torch import Tensor
from toy_drafts import config, same_bits
from toy_folders import HEAD_DIM, HIDDEN, ZLAB, save_target, save_zlab, zlab_tensors
from toy_training import one_line_and_hint

import flashdraft
from flashdraft import DFlashDraftModel
from flashdraft.errors import CheckpointError
from flashdraft.formats import zlab
from flashdraft.formats.match import check_target
from flashdraft.formats.parse import spread_layers
from flashdraft.formats.read import read_draft
from flashdraft.formats.write import write_draft
from flashdraft.formats.written import config_of, json_of


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
    read = config_of(written, "here")
    assert json_of(read) == written
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


@pytest.mark.parametrize("method", ["dflash", "eagle3", "medusa", "draft_model"])
def test_what_a_newer_version_wrote_is_refused_by_name(method: str) -> None:
    folder = Path(flashdraft.__file__).parent / "assets" / f"smollm2-135m-{method}"
    written = json.loads((folder / "config.json").read_text())
    written["flashdraft_config"]["head_norm"] = True
    with pytest.raises(CheckpointError) as error:
        config_of(written, "here")
    assert "has 'head_norm' in flashdraft_config, which is not known" in one_line_and_hint(error)
    assert "newer FlashDraft" in str(error.value)


def test_layouts_that_contradict_in_a_folder_of_ours_are_refused() -> None:
    own = {"sequential_head": "swiglu", "anchor_first": True}
    written = config(flashdraft_config=own)
    assert config_of(written, "here").anchor_first
    with pytest.raises(CheckpointError) as error:
        config_of(written | {"sample_from_anchor": False}, "here")
    assert "says both of how its blocks lie" in one_line_and_hint(error)


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
        {
            "dflash_config": ...,
            "mask_token_id": 7,
            "target_layer_ids": [0, 3],
            "block_size": 9,
            "sample_from_anchor": False,
        },
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
    read = config_of(config(**changes), "here")
    assert (read.block_size, read.mask_token_id, read.target_layer_ids) == expected


def test_heads_that_are_not_said_are_told_by_the_tensors(tmp_path: Path) -> None:
    save_zlab(tmp_path, config=config(head_dim=..., num_key_value_heads=...))
    read, _ = read_draft(tmp_path)
    assert (read.head_dim, read.num_key_value_heads) == (16, 2)  # 32 / 4 and 4 would be llama's
    bare = config_of(
        config(head_dim=..., num_key_value_heads=..., max_position_embeddings=...), "here"
    )
    assert (bare.head_dim, bare.num_key_value_heads, bare.max_position_embeddings) == (
        128,
        32,
        32768,
    )  # Qwen3Config's


def test_depth_of_the_target_need_not_be_said(tmp_path: Path) -> None:
    read = config_of(config(num_target_layers=...), "here")
    check_target(read, tiny_target("llama", lean=True))
    assert read.num_target_layers == 0


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
    "layers without end": (
        {"num_hidden_layers": 10**9, "layer_types": ...},
        "'num_hidden_layers': 1000000000",
    ),
    "more digits than a float has": ({"vocab_size": 10**400}, "'vocab_size': 1000"),
    "a list of a layer's kind": ({"layer_types": [["full_attention"]] * 2}, "'layer_types': ["),
    "kinds of two types": ({"layer_types": [None, "x"]}, "'layer_types': None"),
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
    assert len(message) < 500


def test_planted_fault_numbers_that_are_only_cut_are_read_as_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zlab, "count_of", lambda _name, value, least=1: int(value))
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
    "a block that no proposal can be": (
        config(block_size=1025),
        zlab_tensors(),
        "has block_size 1025",
    ),
    "a norm that is one number": (
        config(),
        {**zlab_tensors(), "norm.weight": torch.tensor(1.0)},
        "norm.weight has shape []",
    ),
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
    assert "convert them" in str(error.value.hint)


def test_folder_whose_weights_never_came_is_not_called_pickled(tmp_path: Path) -> None:
    save_zlab(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        read_draft(tmp_path)
    assert "holds no .safetensors file" in one_line_and_hint(error)
    assert "its weights are missing" in str(error.value.hint)


def test_pickles_are_read_in_one_place_and_as_tensors_alone() -> None:
    package = Path(flashdraft.__file__).parent
    readers = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            options = [ast.unparse(option) for option in node.keywords]
            assert not called.startswith(("pickle.", "cloudpickle.", "joblib.", "dill.")), path
            assert "allow_pickle=True" not in options, path
            if called == "torch.load":
                readers.append(path.name)
                assert "weights_only=True" in options
    assert readers == ["weights.py"]


def test_drafter_that_does_not_sample_from_the_anchor_is_no_foreigner(tmp_path: Path) -> None:
    save_zlab(tmp_path, config=config(sample_from_anchor=False))
    assert DFlashDraftModel.from_pretrained(tmp_path).config.block_size == 4
