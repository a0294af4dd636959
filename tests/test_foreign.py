"""Folders of drafters that are not read here: each is told from a language model's, and refused by
its right name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from toy_folders import ZLAB, save_target, save_zlab, zlab_tensors
from toy_training import one_line_and_hint
from transformers import GPT2Config

import flashdraft
from flashdraft.errors import CheckpointError
from flashdraft.formats.foreign import is_draft
from flashdraft.formats.read import read_draft
from flashdraft.formats.written import config_of

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "vocab_size": 61,
}
SPECIAL = ZLAB["dflash_config"]
EAGLE: dict[str, Any] = {
    **ZLAB,
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
}
EAGLE = {
    name: value
    for name, value in EAGLE.items()
    if name not in ("dflash_config", "layer_types", "block_size")
}


def inside(**changes: Any) -> dict[str, Any]:
    return {"dflash_config": {**SPECIAL, **changes}}


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "DSpark under z-lab's name": (
        {"markov_rank": 256, "num_anchors": 512},
        "calls itself DFlash, but has the key markov_rank of DSpark",
    ),
    "the same in dflash_config": (
        inside(markov_rank=256),
        "calls itself DFlash, but has the key markov_rank of DSpark",
    ),
    "Domino under z-lab's name": (
        inside(shift_label=True),
        "calls itself DFlash, but has the key shift_label of Domino",
    ),
    "DFlash 2 under z-lab's name": (
        inside(conv_kernel_size=2, conv_group_size=16),
        "calls itself DFlash, but has the key conv_kernel_size of DFlash 2",
    ),
    "an unknown projector": (inside(projector_type="lstm"), "is a lstm drafter"),
    "LiLiCorr": ({"architectures": ["LiLiCorrDraftModel"]}, "is a LiLiCorr drafter"),
    "xPress": ({"architectures": ["Qwen3XPressModel"]}, "is an xPress drafter"),
    "Laguna": ({"architectures": ["DFlashLagunaForCausalLM"]}, "is a Laguna DFlash drafter"),
    "Muse": (
        {"architectures": ["MuseGlimmerAssistantModel"]},
        "is a Muse Glimmer assistant drafter",
    ),
    "P-EAGLE": ({**EAGLE, "parallel_drafting": True}, "is a P-EAGLE drafter"),
    "DeepSpec's EAGLE-3 of Gemma 4": (
        {"architectures": ["Gemma4Eagle3Model"]},
        "is a Gemma 4 EAGLE-3 drafter",
    ),
    "EAGLE-1": ({"architectures": ["EagleLlamaForCausalLM"]}, "is an EAGLE-1 or EAGLE-2 drafter"),
    "Medusa as published": ({"medusa_num_heads": 5}, "is a published Medusa drafter"),
    "pairs side by side": ({"rope_is_neox_style": False}, "has rope_is_neox_style False"),
    "the same in its scaling": (
        {"rope_scaling": {"rope_type": "default", "is_neox_style": False}},
        "has is_neox_style False",
    ),
    "part of a head rotated, and scaled": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.25},
        "has partial_rotary_factor 0.25",
    ),
    "part of a head, by kinds": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}},
        "has partial_rotary_factor 0.5",
    ),
    "width of the rotation": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_dim": 8}},
        "has rope_dim 8",
    ),
    "two scalings": (
        {
            "rope_parameters": {"rope_theta": 1e6},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        "rope_parameters and rope_scaling that differ",
    ),
    "a kind without positions": (
        {"rope_parameters": {"sliding_attention": {"rope_theta": 1e6}, "full_attention": None}},
        "gives no rope_parameters to its layers of full_attention",
    ),
    "norms of 1 + w": ({"use_gemma_norm": True}, "has use_gemma_norm True"),
    "a family with norms of 1 + w": ({"model_type": "qwen3_5"}, "has model_type qwen3_5"),
    "scaled values": (inside(attention_value_scale=0.5), "has attention_value_scale 0.5"),
    "sinks": (inside(attention_sink_bias=True), "is an attention-sink drafter"),
    "muP": ({"h_mup_width_multiplier": 4.0}, "has h_mup_width_multiplier 4.0"),
    "another activation": (
        {"hidden_activation": "gelu_pytorch_tanh"},
        "hidden_activation is 'gelu_pytorch_tanh'",
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        "is a quantised drafter",
    ),
    "another width than its target": ({"target_hidden_size": 128}, "target_hidden_size 128"),
    "windows without their switch": (
        inside(swa_window_size=8),
        "has swa_window_size without use_swa",
    ),
    "windows over layers of two kinds": (
        {
            "layer_types": ["sliding_attention", "full_attention"],
            **inside(use_swa=True, swa_window_size=8),
        },
        "nothing says which are causal",
    ),
    "a mask token by its text": (
        {"dflash_config": {"target_layer_ids": [1], "mask_token": "<|MASK|>"}},
        "names its mask token '<|MASK|>', but not its id",
    ),
    "EAGLE-3 of embeddings": (
        {**EAGLE, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
        "reads the target's embeddings",
    ),
    "EAGLE-3 of two lists": (
        {
            **EAGLE,
            "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
        },
        "names its layers twice and differently",
    ),
    "EAGLE-3's switches": ({"norm_before_fc": True}, "has norm_before_fc True"),
    "EAGLE-3 with windows": ({**EAGLE, "layer_types": ["sliding_attention"]}, "has sliding layers"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_folder_is_refused_by_its_name(case: str) -> None:
    changes, expected = FOREIGN[case]
    written = changes if "num_hidden_layers" in changes else {**ZLAB, **changes}
    assert is_draft(written)
    with pytest.raises(CheckpointError) as error:
        config_of(written, "here")
    assert expected in one_line_and_hint(error)


HARMLESS: dict[str, dict[str, Any]] = {
    "flags that say no": {
        "sample_from_anchor": False,
        "query_zero_predicts_next": False,
        "use_gemma_norm": False,
    },
    "what is usual": {
        "rope_is_neox_style": True,
        "attention_value_scale": 1.0,
        "h_mup_width_multiplier": 1,
        "is_neox_style": None,
    },
    "whole heads": {
        "partial_rotary_factor": 1.0,
        "rope_scaling": {"type": "default", "rope_dim": 16},
    },
    "part of a head, which z-lab's class passes over": {
        "partial_rotary_factor": 0.25,
        "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25},
    },
    "sections of a picture's positions": {
        "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}
    },
    "the same twice": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "no heads of confidence": {"enable_confidence_head": False, "quantization_config": None},
    "its own projector": inside(projector_type="dflash"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_keys_that_say_nothing_refuse_nothing(case: str) -> None:
    assert config_of({**ZLAB, **HARMLESS[case]}, "here").block_size == 4


@pytest.mark.parametrize(
    ("kind", "name"), [("peagle", "P-EAGLE"), ("xpress", "xPress"), ("mtp", "MTP"), ("new", "new")]
)
def test_speculators_folders_are_told_what_they_are(kind: str, name: str, tmp_path: Path) -> None:
    written = {
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "transformer_layer_config": LLAMA,
        "block_size": 8,
    }
    assert is_draft(written)
    folder = save_zlab(tmp_path / "draft", config=written)
    with pytest.raises(CheckpointError) as error:
        flashdraft.load(save_target(tmp_path / "target"), draft=folder)
    message = one_line_and_hint(error)
    assert f" {name} (speculators) drafter, which is not supported" in message


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("candidate_selector.predecessor_codebook", "a tensor of DFlash 2"),
        ("layers.0.attention_conv.base_kernel", "a tensor of DFlash 2"),
        ("markov_head.markov_w1.weight", "a tensor of DSpark"),
        ("prefix_gru.weight_ih_l0", "a tensor of Domino"),
        ("embed_proj.0.weight", "a tensor of Domino"),
        ("xpress_head.w1", "is an xPress drafter"),
        ("encoder.fc.weight", "is a Muse Glimmer assistant drafter"),
        ("layers.0.self_attn.q_proj.weight_packed", "is a quantised drafter"),
        ("layers.0.self_attn.attention_sink_bias", "is an attention-sink drafter"),
    ],
)
def test_tensors_of_other_drafters_are_named(tmp_path: Path, tensor: str, said: str) -> None:
    save_zlab(tmp_path, tensors={**zlab_tensors(), tensor: torch.zeros(1)})
    with pytest.raises(CheckpointError) as error:
        read_draft(tmp_path)
    assert said in one_line_and_hint(error)
    assert tensor in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {**LLAMA, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {**LLAMA, "architectures": ["BloomModel"], "model_type": "bloom"},
        {**LLAMA, "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
        {**LLAMA, "architectures": None},
        {**LLAMA, "architectures": 4},
        {key: value for key, value in LLAMA.items() if key != "architectures"},
        {**LLAMA, "sliding_window": 8, "quantization_config": {"bits": 4}},
        {},
    ],
)
def test_language_models_are_no_drafters(config: dict[str, Any]) -> None:
    assert not is_draft(config)


@pytest.mark.parametrize(
    "config",
    [
        ZLAB,
        {**LLAMA, "architectures": ["Eagle3LlamaForCausalLM"]},
        {**LLAMA, "architectures": ["LlamaForCausalLMEagle3"]},
        {**LLAMA, "architectures": ["DFlashLagunaForCausalLM"]},
        {**LLAMA, "draft_vocab_size": 40},
        {**LLAMA, "flashdraft_config": {"method": "draft_model"}},
        {**LLAMA, "medusa_num_heads": 4},
        {"model_type": "mlp_speculator"},
    ],
)
def test_drafters_are_no_language_models(config: dict[str, Any]) -> None:
    assert is_draft(config)


@pytest.mark.parametrize("kind", ["gpt2", "nameless"])
def test_language_model_of_any_class_name_drafts(tmp_path: Path, kind: str) -> None:
    if kind == "gpt2":
        shape: Any = {
            "vocab_size": 61,
            "n_embd": 32,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        model = tiny_model("", dtype=torch.float32, config=GPT2Config(**shape, n_layer=1))
        folder = save_target(tmp_path / kind, model=model)
    else:
        folder = save_target(tmp_path / kind)
        written = json.loads((folder / "config.json").read_text())
        del written["architectures"]
        (folder / "config.json").write_text(json.dumps(written))
    drafting = flashdraft.load(folder, draft=folder, block_size=3)
    plain = flashdraft.load(folder, draft="autoregressive")
    drafted, expected = (model.generate("hi", max_new_tokens=9) for model in (drafting, plain))
    assert drafted.tokens == expected.tokens
    assert drafted.stats.num_accepted > 0
