"""A folder for every row of the tables of published drafters that are read, at toy size, and what
is to be read from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import MASK, VOCAB
from safetensors.torch import save_file
from toy_folders import HIDDEN, NUM_TARGET_LAYERS, ZLAB, zlab_tensors
from toy_formats import (
    BIASES,
    DFLASH2,
    DSPARK,
    FULL_DFLASH2,
    FULL_MARKOV,
    GROUP_SIZE,
    KEPT,
    MASK_ROW,
    RANK,
    STATES,
    TWO_KINDS,
    V1,
    Config,
    Tensors,
    confidence,
    config,
    convolutions,
    copies,
    deepspec,
    dflash2,
    domino,
    gru,
    markov,
    nested,
    renamed,
    selector,
    specforge,
    speculators,
    vocabulary,
)


class Published(NamedTuple):
    """One folder."""

    config: Config
    tensors: Tensors
    # Fields of the DraftConfig that are not those of NETWORK.
    reads: Config = {}  # noqa: RUF012
    refused: str = ""  # part of the one line that refuses it
    extra: tuple[str, ...] = ()  # tensors beyond the network's own, as they are kept
    name: str = "DFlash (z-lab)"  # format and layout, as `recognise.describe` tells them
    layout: str = "fill-in"
    mask_row: Any = None  # what mask_embedding.pt holds
    folder: str = "."  # where inside the folder its files lie


# --- What is read

READ_MARKOV: Config = {
    "sequential_head": "markov",
    "head_rank": RANK,
    "confidence_head": True,
    "confidence_with_markov": True,
}
READ_DFLASH2: Config = {
    "sequential_head": "selector",
    "head_rank": RANK,
    "head_choices": 5,
    "conv_kernel_size": 2,
    "conv_group_size": GROUP_SIZE,
}
READ_DOMINO: Config = {"sequential_head": "domino", "head_rank": RANK, "head_states": STATES}
ANCHOR: Config = {"anchor_first": True}
RAW: Config = {"raw_tables": True, "num_target_layers": 0}
WINDOWS: Config = {"layer_types": tuple(TWO_KINDS), "sliding_window": 8}
SLIDING: Config = {"layer_types": TWO_KINDS, "sliding_window": 8, "use_sliding_window": True}
ROPE7 = {"rope_type": "default", "rope_theta": 1e7}
ROPE6 = {"rope_type": "default", "rope_theta": 1000000}


SPEC = {"name": "DFlash (speculators)"}
SPEC2 = {"name": "DFlash 2 (speculators)"}
SPEC_DSPARK = {"name": "DSpark (speculators)"}
DEEPSPEC: Config = {"name": "DSpark (DeepSpec)", "layout": "anchor-first"}
SPECFORGE: Config = {"name": "DSpark (SpecForge)", "layout": "anchor-first"}
DOMINO: Config = {"name": "Domino (SpecForge)"}
TWO: Config = {"name": "DFlash 2 (z-lab)"}

ZLAB_ROWS: dict[str, Published] = {
    "z-lab v1": Published(config(), V1),
    "v1, block_size nested": Published(
        config(block_size=..., dflash_config={**ZLAB["dflash_config"], "block_size": 4}), V1
    ),
    "v1, both block_sizes": Published(nested(block_size=4) | {"block_size": 16}, V1),
    "v1, prefix": Published(config(), renamed(V1, "model.")),
    "v1 of Qwen3.6-27B: windows and a full layer": Published(
        config(**SLIDING, max_window_layers=2), V1, WINDOWS
    ),
    "v1 of Qwen3.5-35B-A3B: more features than layers": Published(
        nested(target_layer_ids=[0, 1, 2]),
        zlab_tensors(num_features=3),
        {"target_layer_ids": (0, 1, 2)},
    ),
    "v1 of gpt-oss: biases": Published(
        config(attention_bias=True), V1 | BIASES, {"attention_bias": True}
    ),
    "v1 of Gemma 4: softcap at the top": Published(
        config(
            **SLIDING,
            rope_theta=...,
            rope_scaling=...,
            rope_parameters=ROPE6,
            final_logit_softcapping=30.0,
        ),
        V1,
        {**WINDOWS, "final_logit_softcapping": 30.0},
    ),
    "v1 of Muse: scales": Published(
        nested(input_embedding_scale=2.0, output_multiplier=0.5), V1
    )._replace(reads={"input_embedding_scale": 2.0, "output_multiplier": 0.5}),
    "v1, is_causal false over windows": Published(
        config(**SLIDING, is_causal=False), V1, {**WINDOWS, "causal": False}
    ),
    "JetSpec: a causal block": Published(nested(causal=True), V1, {"causal": True}),
    "ModelOpt: says that nothing is causal": Published(nested(causal=False), V1, {"causal": False}),
    "v1, use_swa": Published(
        nested(use_swa=True, swa_window_size=8),
        V1,
        {"layer_types": ("sliding_attention",) * 2, "sliding_window": 8, "causal": False},
    ),
    "v1, sliding layers whose window is off": Published(
        config(layer_types=TWO_KINDS, sliding_window=8, use_sliding_window=False),
        V1,
        {"layer_types": tuple(TWO_KINDS)},
    ),
    "v1, windows by depth": Published(
        config(layer_types=..., sliding_window=8, use_sliding_window=True, max_window_layers=1),
        V1,
        {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 8},
    ),
    "v1, a rotation a kind of layer": Published(
        config(
            **SLIDING,
            rope_theta=...,
            rope_scaling=...,
            rope_parameters={"full_attention": ROPE6, "sliding_attention": ROPE7},
        ),
        V1,
        {**WINDOWS, "rope_parameters": {"full_attention": ROPE6, "sliding_attention": ROPE7}},
    ),
    "v1, layers by the formula": Published(
        config(dflash_config={"mask_token_id": MASK}), V1, {"target_layer_ids": (1, 1)}
    ),
    "v1, the embeddings as features": Published(
        nested(target_layer_ids=[-1, 2]), V1, {"target_layer_ids": (-1, 2)}
    ),
    "v1, reduced vocabulary": Published(
        config(draft_vocab_size=len(KEPT)),
        V1 | vocabulary(),
        {"draft_vocab_size": len(KEPT)},
        extra=("d2t", "lm_head.weight", "t2d"),
    ),
    "v1, a row for the mask token": Published(
        config(),
        V1,
        extra=("mask_embedding",),
        mask_row={"mask_token_id": MASK, "embedding": MASK_ROW},
    ),
    "v1, a bare row for the mask token": Published(
        config(), V1, extra=("mask_embedding",), mask_row=MASK_ROW[None]
    ),
    "v1 in a subfolder": Published(config(), V1, folder="dflash"),
    "v1 of NeMo, consolidated": Published(config(), V1, folder="model/consolidated"),
    "v1 that says where its first draft is": Published(
        config(block_size=3, query_zero_predicts_next=True), V1, ANCHOR, layout="anchor-first"
    ),
    "the same in dflash_config": Published(
        nested(sample_from_anchor=True) | {"block_size": 3}, V1, ANCHOR, layout="anchor-first"
    ),
}

DFLASH2_ROWS: dict[str, Published] = {
    "DFlash 2": Published(
        dflash2(), FULL_DFLASH2, {**READ_DFLASH2, "rope_parameters": ROPE7}, **TWO
    ),
    "DFlash 2 of Qwen3.8-27B: windows in both directions": Published(
        dflash2(
            layer_types=["sliding_attention"] * 2,
            sliding_window=8,
            use_sliding_window=True,
            is_causal=False,
        ),
        FULL_DFLASH2,
        {
            **READ_DFLASH2,
            "rope_parameters": ROPE7,
            "layer_types": ("sliding_attention",) * 2,
            "sliding_window": 8,
            "causal": False,
        },
        **TWO,
    ),
    "DFlash 2, saved again": Published(
        dflash2(),
        V1 | convolutions() | selector(suffix=".weight"),
        {**READ_DFLASH2, "rope_parameters": ROPE7},
        **TWO,
    ),
    "DFlash 2 with keys at the top": Published(
        config(architectures=["Qwen3DFlash2Model"], **DFLASH2), FULL_DFLASH2, READ_DFLASH2, **TWO
    ),
    "DFlash 2 without a selector": Published(
        config(architectures=["DFlash2DraftModel"], conv_kernel_size=2, conv_group_size=GROUP_SIZE),
        V1 | convolutions(),
        {"conv_kernel_size": 2, "conv_group_size": GROUP_SIZE},
        **TWO,
    ),
}
for _alias in ("DFlash2BeamDraftModel", "MiniMaxDFlash2DraftModel", "Qwen3DFlash2DraftModel"):
    DFLASH2_ROWS[f"DFlash 2 as {_alias}"] = DFLASH2_ROWS["DFlash 2"]._replace(
        config=dflash2(_alias)
    )

SPECULATORS_ROWS: dict[str, Published] = {
    "speculators dflash": Published(speculators(), V1, RAW, **SPEC),
    "speculators dflash, silent about its shape": Published(
        speculators(
            layers={
                "head_dim": ...,
                "num_attention_heads": ...,
                "num_key_value_heads": ...,
                "intermediate_size": ...,
                "num_hidden_layers": ...,
                "hidden_size": ...,
            }
        ),
        V1,
        RAW,
        **SPEC,
    ),
    "speculators dflash, old: llama's layers and copies": Published(
        speculators(
            architectures=["DFlashSpeculator"],
            layers={"model_type": "llama"},
            num_hidden_layers=2,
            sample_from_anchor=...,
            sliding_window_non_causal=...,
        ),
        V1 | copies(),
        RAW,
        extra=("embed_tokens.weight", "lm_head.weight"),
        **SPEC,
    ),
    "speculators dflash, reduced vocabulary": Published(
        speculators(draft_vocab_size=len(KEPT)),
        V1 | vocabulary(),
        {**RAW, "draft_vocab_size": len(KEPT)},
        extra=("d2t", "lm_head.weight", "t2d"),
        **SPEC,
    ),
    "speculators dflash, windows without the flag": Published(
        speculators(layers=SLIDING, sliding_window_non_causal=...),
        V1,
        {**RAW, **WINDOWS, "causal": False},
        **SPEC,
    ),
    "speculators dflash, causal windows": Published(
        speculators(layers=SLIDING), V1, {**RAW, **WINDOWS}, **SPEC
    ),
    "speculators dflash, rotations of a hybrid": Published(
        speculators(
            layers={
                "rope_parameters": {
                    "full_attention": {**ROPE7, "partial_rotary_factor": 0.25},
                    "sliding_attention": {**ROPE6, "mrope_section": [2, 3, 3]},
                },
                "partial_rotary_factor": 0.25,
            }
        ),
        V1,
        RAW,
        **SPEC,
    ),
    "speculators dflash, the embeddings as features": Published(
        speculators(aux_hidden_state_layer_ids=[0, 3]),
        V1,
        {**RAW, "target_layer_ids": (-1, 2)},
        **SPEC,
    ),
    "speculators dflash2": Published(
        speculators("dflash2", **DFLASH2), FULL_DFLASH2, {**RAW, **READ_DFLASH2}, **SPEC2
    ),
    "speculators dflash2, anchor-first": Published(
        speculators("dflash2", tokens=3, block_size=3, sample_from_anchor=True, **DFLASH2),
        FULL_DFLASH2,
        {**RAW, **READ_DFLASH2, **ANCHOR},
        layout="anchor-first",
        **SPEC2,
    ),
    "speculators dspark": Published(
        speculators("dspark", block_size=3, sample_from_anchor=True, **DSPARK),
        FULL_MARKOV,
        {**RAW, **READ_MARKOV, **ANCHOR},
        layout="anchor-first",
        **SPEC_DSPARK,
    ),
    "speculators dspark without the flag": Published(
        speculators("dspark", sample_from_anchor=..., **DSPARK),
        FULL_MARKOV,
        {**RAW, **READ_MARKOV},
        **SPEC_DSPARK,
    ),
    "speculators dspark, reduced vocabulary": Published(
        speculators("dspark", draft_vocab_size=len(KEPT), **DSPARK),
        V1 | vocabulary() | markov(num_drafts=len(KEPT)) | confidence(),
        {**RAW, **READ_MARKOV, "draft_vocab_size": len(KEPT)},
        extra=("d2t", "lm_head.weight", "t2d"),
        **SPEC_DSPARK,
    ),
}

DSPARK_ROWS: dict[str, Published] = {
    "DeepSpec's DSpark": Published(
        deepspec(),
        FULL_MARKOV | copies(),
        {**READ_MARKOV, **ANCHOR},
        **DEEPSPEC,
    ),
    "DeepSpec's DSpark, gated": Published(
        deepspec(markov_head_type="gated"),
        V1 | markov("gated") | confidence() | copies(),
        {**READ_MARKOV, **ANCHOR, "sequential_head": "markov_gated"},
        **DEEPSPEC,
    ),
    "DeepSpec's DSpark, rnn": Published(
        deepspec(markov_head_type="rnn", confidence_head_with_markov=False),
        V1 | markov("rnn") | confidence(with_markov=False) | copies(),
        {
            **READ_MARKOV,
            **ANCHOR,
            "sequential_head": "markov_rnn",
            "confidence_with_markov": False,
        },
        **DEEPSPEC,
    ),
    "DeepSpec's DSpark without confidence": Published(
        deepspec(enable_confidence_head=False, confidence_head_with_markov=...),
        V1 | markov(),
        {**ANCHOR, "sequential_head": "markov", "head_rank": RANK},
        **DEEPSPEC,
    ),
    "DeepSpec's DSpark, a hybrid's keys": Published(
        deepspec(
            partial_rotary_factor=0.25,
            rope_theta=...,
            rope_scaling=...,
            rope_parameters={**ROPE6, "partial_rotary_factor": 0.25, "mrope_section": [2, 3, 3]},
            use_sliding_window=True,
        ),
        FULL_MARKOV | copies(),
        {**READ_MARKOV, **ANCHOR},
        **DEEPSPEC,
    ),
    "DeepSpec's plain DFlash": Published(
        deepspec(
            markov_rank=0,
            markov_head_type=...,
            enable_confidence_head=False,
            confidence_head_with_markov=...,
        ),
        V1 | copies(),
        ANCHOR,
        **DEEPSPEC,
    ),
    "the same under z-lab's name": Published(
        deepspec(
            architectures=["DFlashDraftModel"],
            markov_rank=0,
            markov_head_type=...,
            enable_confidence_head=False,
            confidence_head_with_markov=...,
        ),
        V1,
        ANCHOR,
        **DEEPSPEC,
    ),
    "DSpark of SpecForge": Published(
        specforge(), FULL_MARKOV, {**READ_MARKOV, **ANCHOR}, **SPECFORGE
    ),
    "DSpark of SpecForge, exported": Published(
        specforge("Qwen3DSparkModel"), FULL_MARKOV, {**READ_MARKOV, **ANCHOR}, **SPECFORGE
    ),
    "DSpark of SpecForge, early names": Published(
        specforge(),
        V1 | renamed(markov() | confidence(), "logit_head."),
        {**READ_MARKOV, **ANCHOR},
        **SPECFORGE,
    ),
    "DSpark of SpecForge with yarn and windows": Published(
        specforge(
            **SLIDING,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        FULL_MARKOV,
        {
            **READ_MARKOV,
            **ANCHOR,
            **WINDOWS,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1000000,
            },
        },
        **SPECFORGE,
    ),
    "DSpark that fills in": Published(
        deepspec(sample_from_anchor=False, block_size=4),
        FULL_MARKOV | copies(),
        READ_MARKOV,
        name="DSpark (DeepSpec)",
    ),
}

DOMINO_ROWS: dict[str, Published] = {
    "Domino with shifted labels": Published(
        domino(), V1 | gru(), {**READ_DOMINO, **ANCHOR}, layout="anchor-first", **DOMINO
    ),
    "Domino without": Published(domino(shift_label=False), V1 | gru(), READ_DOMINO, **DOMINO),
    "Domino before it is exported": Published(
        domino("DominoDraftModel"),
        V1 | renamed(gru(), "logit_head."),
        {**READ_DOMINO, **ANCHOR},
        layout="anchor-first",
        **DOMINO,
    ),
}

READ_ROWS = {**ZLAB_ROWS, **DFLASH2_ROWS, **SPECULATORS_ROWS, **DSPARK_ROWS, **DOMINO_ROWS}


def save(row: Published, folder: Path) -> Path:
    """Write a row's folder; returns where it is looked for."""
    home = folder / row.folder
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.json").write_text(json.dumps(row.config))
    save_file(row.tensors, home / "model.safetensors", metadata={"format": "pt"})
    if row.mask_row is not None:
        torch.save(row.mask_row, home / "mask_embedding.pt")
    return folder


NETWORK: Config = {  # what every row here reads besides
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "block_size": 4,
    "mask_token_id": MASK,
    "target_layer_ids": (1, 2),
    "num_target_layers": NUM_TARGET_LAYERS,
    "rope_parameters": ROPE6,
    "max_position_embeddings": 256,
    "layer_types": ("full_attention", "full_attention"),
}
