"""Drafters as other engines read them: keys, tensors and commands, each folder whole or not at
all.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import MASK, VOCAB
from torch import Tensor
from toy_drafts import KEPT, same_bits, tensors_of
from toy_folders import HIDDEN, NUM_TARGET_LAYERS, ZLAB, save_target, save_zlab, zlab_tensors

from flashdraft.cli import main
from flashdraft.export.run import ENGINES, in_cache
from flashdraft.formats.read import read_draft
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.formats.write import write_draft
from flashdraft.formats.written import config_of
from flashdraft.methods.dflash import DFlashDraftModel

PLAIN = config_of(ZLAB, "toy")
EAGLE3 = replace(PLAIN, method="eagle3", num_hidden_layers=1, layer_types=())
KINDS = {
    "dflash": PLAIN,
    "dflash2": replace(
        PLAIN,
        conv_kernel_size=2,
        conv_group_size=16,
        sequential_head="selector",
        head_rank=8,
        head_choices=4,
    ),
    "dspark": replace(PLAIN, sequential_head="markov", head_rank=8, anchor_first=True),
    "gated": replace(PLAIN, sequential_head="markov_gated", head_rank=8, anchor_first=True),
    "headless": replace(PLAIN, anchor_first=True),
    "swiglu": replace(PLAIN, sequential_head="swiglu", head_rank=8),
    "domino": replace(PLAIN, sequential_head="domino", head_rank=8, head_states=12),
    "eagle3": EAGLE3,
    "medusa": replace(EAGLE3, method="medusa", target_layer_ids=(4,)),
}


def made(folder: Path, kind: str, **changes: Any) -> Path:
    """A drafter of this kind with random weights."""
    config = replace(KINDS[kind], **changes)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = (1 + 0.1 * noise if len(shape) == 1 else 0.3 * noise).bfloat16()
    if config.draft_vocab_size is not None:
        kept = torch.tensor(KEPT)
        tensors["d2t"] = kept - torch.arange(len(KEPT))
        tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, kept, True)
    write_draft(folder, config, tensors)
    return folder


def exported(draft: Path, engine: str, out: Path, *more: str) -> int:
    return main(["export", str(draft), "--to", engine, "--out", str(out), *more])


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


# --- What each engine's loader reads


class Loader(NamedTuple):
    """A class of an engine: its name in config.json, the keys that its code asks for (a dot goes
    into a part), and its parameters as they are stored."""

    architecture: str
    keys: tuple[str, ...]
    tensors: tuple[str, ...]


LAYER = tuple(name for name in zlab_tensors(num_layers=1) if name.startswith("layers.0."))
PROJECTION = ("fc.weight", "hidden_norm.weight", "norm.weight")
CONVOLUTIONS = tuple(
    f"layers.0.{place}.{name}"
    for place in ("attention_conv", "mlp_conv")
    for name in ("base_kernel", "kernel_projection.weight")
)
SELECTOR = (
    "candidate_selector.predecessor_codebook",
    "candidate_selector.successor_codebook",
    "candidate_selector.hidden_projection.weight",
)
MARKOV = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
EAGLE_LAYER = tuple(name for name in LAYER if "_norm" not in name)
READS = ("dflash_config.mask_token_id", "dflash_config.target_layer_ids")
QWEN3 = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
QWEN3 += ("head_dim", "intermediate_size", "rms_norm_eps", "vocab_size", "hidden_act", "rope_theta")
DFLASH2 = tuple(
    f"dflash_config.{name}"
    for name in ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
)
DSPARK = ("markov_rank", "markov_head_type", "block_size")
V1 = Loader("DFlashDraftModel", (*QWEN3, *READS), LAYER + PROJECTION)
V2 = Loader(
    "DFlash2DraftModel", (*QWEN3, *READS, *DFLASH2), LAYER + PROJECTION + CONVOLUTIONS + SELECTOR
)
SPARK = Loader("Qwen3DSparkModel", (*QWEN3, *READS, *DSPARK), LAYER + PROJECTION + MARKOV)
LOADERS = {
    # dflash 0.1.0, model.py
    ("zlab", "dflash"): V1._replace(keys=(*V1.keys, "num_target_layers", "block_size")),
    ("zlab", "dflash2"): V2._replace(
        keys=(*V2.keys, "num_target_layers", "dflash_config.block_size")
    ),
    # vLLM 0.33: qwen3_dflash.py, qwen3_dflash2.py, qwen3_dspark.py, llama_eagle3.py
    ("vllm", "dflash"): V1,
    ("vllm", "dflash2"): V2,
    ("vllm", "dspark"): SPARK,
    ("vllm", "headless"): SPARK,
    ("vllm", "eagle3"): Loader(
        "Eagle3DraftModel",
        (
            "speculators_config.proposal_methods",
            "speculators_config.verifier.name_or_path",
            *(f"transformer_layer_config.{name}" for name in QWEN3[:-1]),
            "transformer_layer_config.rope_parameters.rope_theta",
            "draft_vocab_size",
            "eagle_aux_hidden_state_layer_ids",
            "norm_before_residual",
        ),
        (*EAGLE_LAYER, "layers.0.hidden_norm.weight", "fc.weight", "norm.weight"),
    ),
    # SGLang 0.5.23: models/dflash.py, models/dspark.py, models/llama_eagle3.py
    ("sglang", "dflash"): V1,
    ("sglang", "dflash2"): V2,
    ("sglang", "dspark"): SPARK,
    ("sglang", "headless"): SPARK,
    ("sglang", "gated"): SPARK._replace(
        tensors=(
            *SPARK.tensors,
            "markov_head.gate_proj.weight",
            "markov_head.gate_proj.bias",
        )
    ),
    ("sglang", "domino"): V1._replace(
        keys=(
            *V1.keys,
            "dflash_config.projector_type",
            "dflash_config.shift_label",
            "dflash_config.pure_draft_prefix_len",
            "dflash_config.gru_hidden_dim",
            "dflash_config.emb_dim",
        ),
        tensors=(
            *V1.tensors,
            "prefix_gru.weight_ih_l0",
            "prefix_gru.weight_hh_l0",
            "embed_proj.0.weight",
            "embed_proj.2.weight",
        ),
    ),
    ("sglang", "eagle3"): Loader(
        "LlamaForCausalLMEagle3",
        (*QWEN3, "eagle_config.eagle_aux_hidden_state_layer_ids"),
        (
            *(name.replace("layers.0", "midlayer") for name in EAGLE_LAYER),
            "midlayer.hidden_norm.weight",
            "fc.weight",
            "norm.weight",
        ),
    ),
    # transformers 5.24, modeling_muse_glimmer_assistant.py
    ("transformers", "dflash"): Loader(
        "MuseGlimmerAssistantModel",
        (
            *QWEN3[:7],
            "rope_parameters.rope_theta",
            "layer_types",
            "block_size",
            "mask_token_id",
            "target_layer_ids",
        ),
        (*LAYER, "encoder.fc.weight", "encoder.output_norm_enc.weight", "norm.weight"),
    ),
}


def has(config: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(config, dict) or config.get(part) is None:
            return False
        config = config[part]
    return True


def unmet(loader: Loader, folder: Path) -> list[str]:
    """What a loader would miss in a folder, or find and not know."""
    config = config_of(folder)
    problems = [f"no key {key}" for key in loader.keys if not has(config, key)]
    if config["architectures"] != [loader.architecture]:
        problems.append(f"class {config['architectures']}")
    wanted = set(loader.tensors)
    wanted |= {name.replace("layers.0.", "layers.1.") for name in wanted if "encoder" not in name}
    if loader.architecture in ("Eagle3DraftModel", "LlamaForCausalLMEagle3"):
        wanted = set(loader.tensors)
    found = set(tensors_of(folder / "model.safetensors"))
    return problems + sorted(f"tensor {name}" for name in wanted ^ found)


@pytest.mark.parametrize(("engine", "kind"), LOADERS)
def test_export_holds_what_its_loader_reads_and_nothing_else(
    engine: str, kind: str, tmp_path: Path
) -> None:
    assert exported(made(tmp_path / "draft", kind), engine, tmp_path / "out") == 0
    assert unmet(LOADERS[engine, kind], tmp_path / "out") == []
    assert "flashdraft_config" not in config_of(tmp_path / "out")


def test_missing_key_and_unknown_tensor_are_seen(tmp_path: Path) -> None:
    draft = made(tmp_path / "draft", "dflash")
    assert exported(draft, "zlab", tmp_path / "out") == 0
    assert unmet(LOADERS["zlab", "dflash2"], tmp_path / "out")
    config = config_of(tmp_path / "out")
    del config["dflash_config"]["mask_token_id"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    problem = "no key dflash_config.mask_token_id"
    assert unmet(LOADERS["zlab", "dflash"], tmp_path / "out") == [problem]


@pytest.mark.parametrize(("engine", "kind"), [k for k in LOADERS if k[1] in ("dflash2", "gated")])
def test_exported_network_is_the_same_when_read_back(
    engine: str, kind: str, tmp_path: Path
) -> None:
    draft = made(tmp_path / "draft", kind)
    assert exported(draft, engine, tmp_path / "out") == 0
    own, weights = read_draft(draft)
    again, others = read_draft(tmp_path / "out")
    assert again == own
    assert same_bits(weights, others)


@pytest.mark.parametrize(
    ("engine", "kind", "told"),
    [
        ("zlab", "dspark", "vllm, sglang and llamacpp have it"),
        ("zlab", "eagle3", "vllm and sglang have it"),
        ("vllm", "domino", "sglang has it"),
        ("vllm", "gated", "its Markov head is gated"),
        ("transformers", "dflash2", "zlab, vllm, sglang and llamacpp have it"),
        ("sglang", "medusa", "a Medusa drafter"),
    ],
)
def test_what_an_engine_cannot_have_is_refused_by_name(
    engine: str, kind: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported(made(tmp_path / "draft", kind), engine, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert told in message
    assert "cannot have" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("engine", "changes", "told"),
    [
        ("sglang", {"input_embedding_scale": 2.0}, "input_embedding_scale is 2.0"),
        ("transformers", {"causal": True}, "causal inside a block"),
        ("transformers", {"sliding_window": 3}, "windows"),
        ("transformers", {"attention_bias": True}, "biases"),
    ],
)
def test_what_an_engine_would_compute_otherwise_is_refused(
    engine: str,
    changes: dict[str, Any],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draft = made(tmp_path / "draft", "dflash", **changes)
    assert exported(draft, engine, tmp_path / "out") == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["zlab", "vllm", "sglang", "transformers"])
def test_drafter_of_the_last_layers_output(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engines on transformers' hidden_states have the final normed state in its place, others
    nothing; vLLM hands it out as it is."""
    draft = made(tmp_path / "draft", "dflash", target_layer_ids=(1, NUM_TARGET_LAYERS - 1))
    target = target_of(tmp_path / "target")
    is_read = engine == "vllm"
    assert exported(draft, engine, tmp_path / "out", "--target", target) == (not is_read)
    told = capsys.readouterr()
    if is_read:
        assert "note: it reads the last layer's output before the final norm" in told.out
    else:
        assert "cannot have" in told.err
        assert "last layer" in told.err

    below = made(tmp_path / "below", "dflash", target_layer_ids=(1, NUM_TARGET_LAYERS - 2))
    assert exported(below, engine, tmp_path / "out", "--target", target) == 0
    assert "last layer" not in capsys.readouterr().out


def test_sglang_hands_out_the_last_layer_of_few_families(tmp_path: Path) -> None:
    draft = made(tmp_path / "draft", "dflash", target_layer_ids=(1, NUM_TARGET_LAYERS - 1))
    family = target_of(tmp_path / "family", model_type="gpt_oss")
    assert exported(draft, "sglang", tmp_path / "out", "--target", family) == 0


@pytest.mark.parametrize("engine", ["zlab", "vllm"])
def test_export_without_a_target_says_what_was_not_checked(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = made(tmp_path / "draft", "dflash")
    assert exported(draft, engine, tmp_path / "out") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "scales its embedding" in notes[0]
    assert exported(draft, engine, tmp_path / "out", "--target", target_of(tmp_path / "t")) == 0
    assert "note: " not in capsys.readouterr().out


def target_of(folder: Path, **changes: Any) -> str:
    path = save_target(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("engine", "kind", "target", "changes", "told"),
    [
        ("vllm", "dflash", {"model_type": "gemma3_text"}, {}, "whose bare rows"),
        ("vllm", "eagle3", {"model_type": "gemma3_text"}, {}, "whose bare rows"),
        ("sglang", "dflash", {"model_type": "gemma3_text"}, {"raw_tables": True}, "bare rows"),
        ("transformers", "dflash", {"model_type": "gemma3_text"}, {"raw_tables": True}, "bare"),
        ("vllm", "dspark", {"final_logit_softcapping": 30.0}, {}, "its target caps logits"),
        ("sglang", "dspark", {"final_logit_softcapping": 30.0}, {}, "its target caps logits"),
        ("zlab", "dflash2", {"logits_scaling": 8.0}, {}, "scales logits (logits_scaling)"),
    ],
)
def test_what_its_targets_family_does_otherwise_is_refused(
    engine: str,
    kind: str,
    target: dict[str, Any],
    changes: dict[str, Any],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To the embedding that a drafter reads, or to logits before its head adds to them."""
    draft = made(tmp_path / "draft", kind, **changes)
    plain = target_of(tmp_path / "plain")
    assert exported(draft, engine, tmp_path / "plain-out", "--target", plain) == 0
    family = target_of(tmp_path / "family", **target)
    assert exported(draft, engine, tmp_path / "out", "--target", family) == 1
    assert told in capsys.readouterr().err


def test_dflash2_says_what_gemma_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = made(tmp_path / "draft", "dflash2")
    changes = {"model_type": "gemma3_text", "final_logit_softcapping": 30.0}
    target = target_of(tmp_path / "target", **changes)
    for engine, scale in (("vllm", HIDDEN**0.5), ("sglang", None), ("zlab", None)):
        assert exported(draft, engine, tmp_path / engine, "--target", target) == 0
        special = config_of(tmp_path / engine)["dflash_config"]
        assert special["final_logit_softcapping"] == 30.0
        assert special.get("input_embedding_scale") == scale
        out = capsys.readouterr().out
        assert ("lost: the scale of its target's embedding" in out) == (engine == "zlab")


def test_sliding_layers_without_a_window_are_full_ones_to_transformers(tmp_path: Path) -> None:
    """Its class has a window where config.json has none."""
    changes = {"layer_types": ("sliding_attention",) * 2, "causal": False}
    draft = made(tmp_path / "draft", "dflash", **changes)
    assert exported(draft, "transformers", tmp_path / "out") == 0
    assert config_of(tmp_path / "out")["layer_types"] == ["full_attention"] * 2


def test_swiglu_head_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = made(tmp_path / "draft", "swiglu")
    for engine in ("zlab", "vllm", "sglang", "transformers"):
        assert exported(draft, engine, tmp_path / engine) == 0
        assert "lost: its sequential head (swiglu)" in capsys.readouterr().out
        assert unmet(LOADERS[engine, "dflash"], tmp_path / engine) == []


def test_layers_are_told_by_each_engines_count(tmp_path: Path) -> None:
    draft = made(tmp_path / "draft", "eagle3", target_layer_ids=(0, 1, 2))
    assert exported(draft, "vllm", tmp_path / "vllm") == 0
    assert exported(draft, "sglang", tmp_path / "sglang") == 0
    name = "eagle_aux_hidden_state_layer_ids"
    assert config_of(tmp_path / "vllm")[name] == [1, 2, 3]
    assert config_of(tmp_path / "sglang")["eagle_config"][name] == [0, 1, 2]


# --- Tables and targets


@pytest.mark.parametrize(
    ("kind", "told"), [("dflash", "dflash"), ("dspark", "dspark"), ("headless", "dspark")]
)
def test_reduced_vocabulary_goes_to_vllm_with_the_targets_rows(
    kind: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = save_target(tmp_path / "target")
    draft = made(tmp_path / "draft", kind, draft_vocab_size=len(KEPT))
    assert exported(draft, "vllm", tmp_path / "out", "--target", str(target)) == 0
    assert "lost" not in capsys.readouterr().out
    config = config_of(tmp_path / "out")
    assert config["speculators_model_type"] == told
    assert config["draft_vocab_size"] == len(KEPT)
    assert config["sliding_window_non_causal"] is True  # else vLLM makes all layers causal
    tensors = tensors_of(tmp_path / "out" / "model.safetensors")
    rows = tensors_of(target / "model.safetensors")["lm_head.weight"][list(KEPT)]
    assert torch.equal(tensors["lm_head.weight"], rows.bfloat16())
    assert torch.equal(tensors["d2t"] + torch.arange(len(KEPT)), torch.tensor(KEPT))
    assert read_draft(tmp_path / "out")[0].draft_vocab_size == len(KEPT)


def test_reduced_vocabulary_is_left_out_where_no_target_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = made(tmp_path / "draft", "dflash", draft_vocab_size=len(KEPT))
    assert exported(draft, "vllm", tmp_path / "out") == 0
    assert f"its reduced vocabulary of {len(KEPT)}" in capsys.readouterr().out
    assert unmet(LOADERS["vllm", "dflash"], tmp_path / "out") == []


def test_own_head_is_refused_unless_it_is_the_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = save_target(tmp_path / "target", dtype=torch.bfloat16)
    head = tensors_of(target / "model.safetensors")["lm_head.weight"]
    copy = save_zlab(tmp_path / "copy", tensors={**zlab_tensors(), "lm_head.weight": head})
    own = save_zlab(tmp_path / "own", tensors={**zlab_tensors(), "lm_head.weight": head + 1})
    assert exported(copy, "sglang", tmp_path / "a", "--target", str(target)) == 0
    assert exported(own, "sglang", tmp_path / "b", "--target", str(target)) == 1
    assert "lm_head.weight of its own" in capsys.readouterr().err
    assert exported(own, "vllm", tmp_path / "c", "--target", str(target)) == 0
    assert "lm_head.weight" in tensors_of(tmp_path / "c" / "model.safetensors")


def test_target_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = save_target(tmp_path / "target")
    draft = made(tmp_path / "draft", "dflash", num_target_layers=6)
    assert exported(draft, "zlab", tmp_path / "out", "--target", str(target)) == 1
    assert "made for a target with 6 layers" in capsys.readouterr().err


def test_sglang_has_an_anchor_first_drafter_without_its_swiglu_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = made(tmp_path / "draft", "swiglu", anchor_first=True, draft_vocab_size=len(KEPT))
    assert exported(draft, "sglang", tmp_path / "out") == 0
    lost = capsys.readouterr().out
    assert "swiglu" in lost
    assert f"its reduced vocabulary of {len(KEPT)}" in lost
    assert unmet(LOADERS["sglang", "dspark"], tmp_path / "out") == []


# --- Folders and commands


def test_own_export_is_replaced_and_a_foreign_file_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft, out = save_zlab(tmp_path / "draft"), tmp_path / "out"
    assert exported(draft, "zlab", out) == 0
    assert exported(draft, "sglang", out) == 0
    (out / "notes.txt").write_text("mine")
    assert exported(draft, "zlab", out) == 1
    assert "notes.txt" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".tmp-*"))


def test_changed_export_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft, out = save_zlab(tmp_path / "draft"), tmp_path / "out"
    assert exported(draft, "zlab", out) == 0
    (out / "config.json").write_text("{}")
    assert exported(draft, "zlab", out) == 1
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dflash", "dspark", "eagle3"])
def test_commands_say_how_many_tokens_are_drafted(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft, target = made(tmp_path / "draft", kind), save_target(tmp_path / "target")
    assert exported(draft, "vllm", tmp_path / "out", "--target", str(target)) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["vllm", "serve", str(target)]
    told = json.loads(words[words.index("--speculative-config") + 1])
    drafts = KINDS[kind].block_size - 1
    assert told == {
        "method": kind,
        "model": str(tmp_path / "out"),
        "num_speculative_tokens": drafts,
    }
    assert exported(draft, "sglang", tmp_path / "out", "--target", str(target)) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index("--speculative-num-draft-tokens") + 1] == str(drafts + 1)


def test_cache_holds_only_what_is_not_in_the_engines_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashdraft.hub.cache_dir", lambda: tmp_path / "cache")
    target = str(save_target(tmp_path / "target"))
    plain = str(made(tmp_path / "plain", "dflash"))
    assert plain in in_cache(plain, "sglang", target).command
    assert not (tmp_path / "cache").exists()

    other = in_cache(str(made(tmp_path / "other", "swiglu")), "sglang", target)
    (folder,) = (tmp_path / "cache" / "exports").glob("sglang-*")
    assert str(folder) in other.command
    assert unmet(LOADERS["sglang", "dflash"], folder) == []
    written = (folder / "config.json").stat().st_mtime_ns
    in_cache(str(tmp_path / "other"), "sglang", target)
    assert (folder / "config.json").stat().st_mtime_ns == written


def test_mask_token_by_name_is_exported_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flashdraft.hub.cache_dir", lambda: tmp_path / "cache")
    draft, target = made(tmp_path / "draft", "dflash"), str(save_target(tmp_path / "target"))
    written = config_of(draft)
    del written["dflash_config"]["mask_token_id"]
    written["dflash_config"]["mask_token"] = "<mask>"
    (draft / "config.json").write_text(json.dumps(written))

    assert exported(draft, "zlab", tmp_path / "none") == 1
    assert "name the target" in capsys.readouterr().err
    assert exported(draft, "zlab", tmp_path / "out", "--target", target) == 0
    assert config_of(tmp_path / "out")["dflash_config"]["mask_token_id"] == MASK
    assert str(draft) not in in_cache(str(draft), "sglang", target).command  # it wants the id
    assert main(["inspect", str(draft), "--target", target]) == 0
    assert f"mask token {MASK}" in capsys.readouterr().out


def test_every_engine_has_a_file() -> None:
    package = Path(__file__).parent.parent / "flashdraft" / "export"
    for engine in ENGINES:
        assert (package / f"{engine}.py").exists()


# --- transformers' own class


def hidden_states(model: DFlashDraftModel, features: Tensor, block: Tensor) -> Tensor:
    """Our network on one block behind a context, every place seen from every row."""
    places = torch.arange(len(features) + len(block))
    positions = places[: len(features)], places[len(features) :]

    def attend(_layer: int, queries: Tensor, context: Any, own: Any) -> Tensor:
        keys = torch.cat((context[0], own[0])).repeat_interleave(2, 1)
        values = torch.cat((context[1], own[1])).repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1)

    return model(model.context(features), block, positions, attend)


def test_transformers_own_class_computes_the_same(tmp_path: Path) -> None:
    name = "transformers.models.muse_glimmer_assistant.modeling_muse_glimmer_assistant"
    theirs = pytest.importorskip(name)
    draft = made(tmp_path / "draft", "dflash")
    assert exported(draft, "transformers", tmp_path / "out") == 0

    generator = torch.Generator().manual_seed(3)
    features = torch.randn(7, 2 * HIDDEN, generator=generator, dtype=torch.float64)
    block = torch.randn(PLAIN.block_size, HIDDEN, generator=generator, dtype=torch.float64)
    network = theirs.MuseGlimmerAssistantModel.from_pretrained(
        tmp_path / "out", dtype=torch.float64
    )
    with torch.no_grad():
        found = network(block[None], features[None]).last_hidden_state[0]
        own = DFlashDraftModel.from_pretrained(draft).double()
        wanted = hidden_states(own, features, block)
        wrong = hidden_states(own, features.flip(-1), block)
    assert (found - wanted).abs().max() < 1e-5
    assert (found - wrong).abs().max() > 1e-3
