"""Folders of drafters that are not read, and folders that contradict themselves: what each holds,
and part of the one line that refuses it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from conftest import MASK, VOCAB
from torch import Tensor
from toy_folders import HIDDEN, zlab_tensors
from toy_formats import (
    DFLASH2,
    DSPARK,
    FULL_DFLASH2,
    FULL_MARKOV,
    KEPT,
    RANK,
    V1,
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
    noise,
    selector,
    specforge,
    speculators,
    vocabulary,
)
from toy_published import SLIDING


class Refused(NamedTuple):
    """One folder."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    said: str  # part of the one line
    runs: str = ""  # part of the hint: what would run it


def named(architecture: str, **changes: Any) -> dict[str, Any]:
    return config(architectures=[architecture], **changes)


def without(tensors: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def packed(suffix: str) -> dict[str, Tensor]:
    """Quantised projections, as compressed-tensors, GPTQ or MLX call them; norms stay."""
    tensors = {}
    for name, tensor in V1.items():
        if tensor.ndim == 2:
            bare = name.removesuffix(".weight")
            tensors[f"{bare}.{suffix}"] = torch.zeros(4, 4, dtype=torch.int32)
        else:
            tensors[name] = tensor
    return tensors


ONE = torch.zeros(1)
LINE = "drafter, which is not supported"

OTHERS: dict[str, Refused] = {
    "LiLiCorr": Refused(named("LiLiCorrDraftModel"), V1, f"is a LiLiCorr {LINE}", "vLLM"),
    "LiLiCorr by its tensors": Refused(
        config(), V1 | {"lilicorr.proj.weight": ONE}, "is a LiLiCorr drafter", "SGLang"
    ),
    "xPress": Refused(
        named("Qwen3XPressModel", xpress_rank=256, xpress_topc=512),
        V1,
        f"is an xPress {LINE}",
        "vLLM",
    ),
    "xPress by its tensors": Refused(
        config(), V1 | {"xpress_head.w1": ONE}, "is an xPress drafter", "vLLM"
    ),
    "speculators xpress": Refused(
        speculators("xpress"), V1, f"is an xPress (speculators) {LINE}", "vLLM"
    ),
    "Laguna": Refused(
        named("DFlashLagunaForCausalLM"), V1, f"is a Laguna DFlash {LINE}", "vLLM and SGLang"
    ),
    "Laguna by its tensors": Refused(
        config(), V1 | {"layers.0.self_attn.g_proj.weight": ONE}, "is a Laguna DFlash drafter"
    ),
    "DFlare": Refused(named("DFlareDraftModel"), V1, f"is a DFlare {LINE}", "AngelSlim"),
    "DFly": Refused(named("DFlyDraftModel"), V1, f"is a DFly {LINE}", "AngelSlim"),
    "TreeFlash": Refused(named("TreeFlashDraftModel"), V1, f"is a TreeFlash {LINE}", "authors"),
    "Muse assistant": Refused(
        named("MuseGlimmerAssistantModel", vocab_size=..., dflash_config=...),
        V1 | {"encoder.fc.weight": ONE},
        f"is a Muse Glimmer assistant {LINE}",
        "transformers",
    ),
    "Muse assistant by its tensors": Refused(
        config(), V1 | {"encoder.output_norm_enc.weight": ONE}, "is a Muse Glimmer assistant"
    ),
    "P-EAGLE": Refused(
        named("PEagleDraftModel", parallel_drafting=True), V1, f"is a P-EAGLE {LINE}", "vLLM"
    ),
    "speculators peagle": Refused(
        speculators("peagle"), V1, f"is a P-EAGLE (speculators) {LINE}", "vLLM"
    ),
    "MTP": Refused(speculators("mtp"), V1, f"is an MTP (speculators) {LINE}", "vLLM"),
    "EAGLE-1": Refused(named("EagleLlamaForCausalLM"), V1, "is an EAGLE-1 or EAGLE-2 drafter"),
    "Gemma 4 DSpark": Refused(
        deepspec(architectures=["Gemma4DSparkModel"]),
        FULL_MARKOV,
        f"is a Gemma 4 DSpark {LINE}",
        "vLLM",
    ),
    "Gemma 4 DSpark by its tensors": Refused(
        deepspec(), FULL_MARKOV | {"layers.0.layer_scalar": ONE}, "is a Gemma 4 DSpark drafter"
    ),
    "LFM2 DSpark": Refused(
        specforge("Lfm2DSparkDraftModel", rope_is_neox_style=False),
        FULL_MARKOV,
        f"is an LFM2 DSpark {LINE}",
    ),
    "interleaved pairs": Refused(
        specforge(rope_is_neox_style=False), FULL_MARKOV, "has rope_is_neox_style False"
    ),
    "Nemotron": Refused(
        specforge(has_embed_tokens=True, sample_from_anchor=False),
        FULL_MARKOV,
        f"is a Nemotron 3.5 {LINE}",
    ),
    "Ornith": Refused(
        deepspec(enable_qwen35_gated_q_proj=True), FULL_MARKOV, f"is an Ornith DSpark {LINE}"
    ),
    "a family of norms of 1 + w": Refused(
        deepspec(model_type="qwen3_5"), FULL_MARKOV, "has model_type qwen3_5"
    ),
    "K3 DSpark": Refused(
        deepspec(architectures=["K3DSparkModel"]),
        FULL_MARKOV,
        f"is a Kimi K3 DSpark {LINE}",
        "vLLM",
    ),
    "Muse Spark": Refused(
        deepspec(architectures=["MuseSparkDSparkModel"]),
        FULL_MARKOV,
        f"is a Muse Spark DSpark {LINE}",
    ),
    "Qwen3-Omni": Refused(
        deepspec(architectures=["Qwen3OmniDSparkModel"]),
        FULL_MARKOV,
        f"is a Qwen3-Omni DSpark {LINE}",
    ),
    "Ling": Refused(
        deepspec(architectures=["LingDSparkModel"]),
        FULL_MARKOV,
        f"is a Ling DSpark {LINE}",
        "SGLang",
    ),
    "Bonsai": Refused(deepspec(log_snr=-2.0), FULL_MARKOV, f"is a Bonsai DSpark {LINE}"),
    "DeepSeek-V4's embedded DSpark": Refused(
        {"architectures": ["DeepseekV4ForCausalLM"], "dspark_target_layer_ids": [1, 2]},
        V1,
        f"is a DeepSeek-V4 DSpark {LINE}",
    ),
    "DeepSeek-V4's streams": Refused(
        speculators(target_hidden_size=4 * HIDDEN),
        V1,
        f"a target of target_hidden_size {4 * HIDDEN}",
    ),
    "muP": Refused(
        specforge(h_mup_width_multiplier=4.0), FULL_MARKOV, "has h_mup_width_multiplier 4.0"
    ),
    "MiMo: sinks": Refused(
        nested(use_swa=True, swa_window_size=8, attention_sink_bias=True),
        V1 | {"layers.0.self_attn.attention_sink_bias": ONE},
        f"is an attention-sink {LINE}",
        "vLLM and SGLang",
    ),
    "sinks by their tensors": Refused(
        config(), V1 | {"layers.0.attn_sinks": ONE}, "is an attention-sink drafter"
    ),
    "scaled values": Refused(
        nested(attention_value_scale=0.7), V1, "has attention_value_scale 0.7"
    ),
    "W4A16": Refused(
        config(quantization_config={"quant_method": "compressed-tensors"}),
        packed("weight_packed"),
        f"is a quantised {LINE}",
        "vLLM",
    ),
    "W4A16 by its tensors": Refused(config(), packed("weight_packed"), "is a quantised drafter"),
    "FP8 by its scales": Refused(
        config(), V1 | {"fc.weight_scale": ONE}, "is a quantised drafter", "unquantised original"
    ),
    "GPTQ by its tensors": Refused(config(), packed("qweight"), "is a quantised drafter"),
    "MLX 4-bit": Refused(
        config(quantization={"bits": 4, "group_size": 64}),
        packed("scales"),
        f"is a quantised {LINE}",
    ),
    "published Medusa": Refused(config(medusa_num_heads=5), V1, f"is a published Medusa {LINE}"),
    "an MLP speculator": Refused(
        config(model_type="mlp_speculator"), V1, f"is an MLP speculator {LINE}"
    ),
    "gelu": Refused(
        speculators(layers={"hidden_act": "gelu_pytorch_tanh"}), V1, "is 'gelu_pytorch_tanh'"
    ),
    "speculators of another family's layers": Refused(
        speculators(layers={"model_type": "gpt_oss"}), V1, "has layers of model_type gpt_oss"
    ),
    "Domino that corrects its first draft": Refused(
        domino(pure_draft_prefix_len=0), V1 | gru(), "pure_draft_prefix_len 0", "SpecForge"
    ),
}

CONTRADICTIONS: dict[str, Refused] = {
    "DSpark's tensors under z-lab's config": Refused(
        config(),
        FULL_MARKOV,
        "holds confidence_head.proj.bias, a tensor of DSpark, but its config.json says DFlash",
    ),
    "DFlash 2's tensors under z-lab's config": Refused(
        config(), FULL_DFLASH2, "a tensor of DFlash 2, but its config.json says DFlash"
    ),
    "Domino's tensors under z-lab's config": Refused(
        config(), V1 | gru(), "a tensor of Domino, but its config.json says DFlash"
    ),
    "EAGLE-3's tensors under z-lab's config": Refused(
        config(), V1 | {"midlayer.hidden_norm.weight": ONE}, "a tensor of EAGLE-3"
    ),
    "EAGLE-3's queries under z-lab's config": Refused(
        config(),
        V1 | {"layers.0.self_attn.q_proj.weight": noise((64, 2 * HIDDEN), 1)},
        "a tensor of EAGLE-3, but its config.json says DFlash",
    ),
    "DSpark's tensors in a DFlash 2 folder": Refused(
        dflash2(), FULL_DFLASH2 | markov(), "a tensor of DSpark, but its config.json says DFlash 2"
    ),
    "DFlash 2's tensors in a DSpark folder": Refused(
        deepspec(),
        FULL_MARKOV | convolutions(),
        "a tensor of DFlash 2, but its config.json says DSpark",
    ),
    "DFlash 2's tensors in the dflash wrapper": Refused(
        speculators(), FULL_DFLASH2, "a tensor of DFlash 2, but its config.json says DFlash"
    ),
    "v1's tensors under DFlash 2's config": Refused(
        dflash2(), V1, "lacks the tensor layers.0.attention_conv.base_kernel"
    ),
    "v1's tensors under DSpark's config": Refused(
        deepspec(), V1, "lacks the tensor markov_head.markov_w1.weight"
    ),
    "v1's tensors under Domino's config": Refused(
        domino(), V1, "lacks the tensor prefix_gru.weight_ih_l0"
    ),
    "DFlash 2's keys under z-lab's name": Refused(
        nested(**DFLASH2), FULL_DFLASH2, "calls itself DFlash, but has the key conv_kernel_size"
    ),
    "DSpark's keys under z-lab's name": Refused(
        deepspec(architectures=["DFlashDraftModel"]),
        FULL_MARKOV,
        "calls itself DFlash, but has the key markov_rank of DSpark",
    ),
    "DSpark's keys under DFlash 2's name": Refused(
        specforge("DFlash2DraftModel"), FULL_MARKOV, "calls itself DFlash 2, but has projector_type"
    ),
    "DeepSpec's places under z-lab's name": Refused(
        config(dflash_config=..., mask_token_id=MASK, target_layer_ids=[1, 2]),
        V1,
        "has its keys where DeepSpec has them, whose blocks are anchor-first",
    ),
    "two flags of the layout": Refused(
        config(sample_from_anchor=True, query_zero_predicts_next=False),
        V1,
        "says both of how its blocks lie",
    ),
    "shifted labels that are not": Refused(
        domino() | {"sample_from_anchor": False}, V1 | gru(), "has shift_label True and sample_from"
    ),
    "speculators that proposes as anchor-first does": Refused(
        speculators(tokens=4), V1, "proposes 4 tokens of blocks of 4, but its sample_from_anchor is"
    ),
    "old dspark that proposes as anchor-first does": Refused(
        speculators("dspark", tokens=4, sample_from_anchor=..., **DSPARK),
        FULL_MARKOV,
        "proposes 4 tokens of blocks of 4, but its sample_from_anchor is false or absent",
    ),
    "anchor-first dspark that proposes as fill-in does": Refused(
        speculators("dspark", tokens=3, sample_from_anchor=True, **DSPARK),
        FULL_MARKOV,
        "proposes 3 tokens of blocks of 4, but its sample_from_anchor is true",
    ),
    "DeepSpec's rank 0 with a Markov head": Refused(
        deepspec(markov_rank=0, enable_confidence_head=False),
        V1 | markov(),
        "has a tensor markov_head.markov_w1.weight",
    ),
    "confidence by the Markov head that is not there": Refused(
        deepspec(markov_rank=0),
        V1 | confidence(),
        "has confidence_head_with_markov, but markov_rank 0",
    ),
    "DeepSpec's format with windows": Refused(
        deepspec(**SLIDING), FULL_MARKOV, "has layers of sliding_attention, which DeepSpec's"
    ),
    "a copy of another shape": Refused(
        deepspec(),
        FULL_MARKOV | {"lm_head.weight": noise((7, HIDDEN), 1)},
        "lm_head.weight has shape",
    ),
    "a rank of another size": Refused(
        deepspec(markov_rank=2 * RANK), FULL_MARKOV, "markov_head.markov_w1.weight has shape"
    ),
    "half of the convolutions' keys": Refused(
        config(architectures=["DFlash2DraftModel"], conv_kernel_size=2),
        V1 | convolutions(),
        "lacks or garbles 'conv_group_size'",
    ),
    "groups that do not divide": Refused(
        config(architectures=["DFlash2DraftModel"], conv_kernel_size=2, conv_group_size=5),
        V1 | convolutions(),
        "'conv_group_size': 5",
    ),
    "a selector without its choices": Refused(
        config(architectures=["DFlash2DraftModel"], selector_rank=RANK),
        V1 | selector(),
        "lacks or garbles 'selector_top_k'",
    ),
    "anchor-first blocks without a row": Refused(
        deepspec(block_size=0), FULL_MARKOV, "has block_size 0", "a block is 1 row or more"
    ),
    "blocks without a row": Refused(
        config(block_size=0), V1, "has block_size 0", "a block is the anchor and 1 mask or more"
    ),
    "an unknown Markov head": Refused(
        deepspec(markov_head_type="lstm"), FULL_MARKOV, "'markov_head_type': 'lstm'"
    ),
    "a Domino without sizes": Refused(
        domino(gru_hidden_dim=None), V1 | gru(), "lacks or garbles 'gru_hidden_dim'"
    ),
    "d2t without draft_vocab_size": Refused(
        config(), V1 | vocabulary(), "holds d2t, but its config.json has no draft_vocab_size"
    ),
    "draft_vocab_size without d2t": Refused(
        config(draft_vocab_size=len(KEPT)), V1, "lacks the tensor d2t"
    ),
    "d2t beyond the vocabulary": Refused(
        config(draft_vocab_size=len(KEPT)),
        V1 | vocabulary() | {"d2t": torch.full((len(KEPT),), VOCAB)},
        f"d2t leads to token {VOCAB}",
    ),
    "a missing tensor": Refused(
        config(),
        without(V1, "layers.1.mlp.up_proj"),
        "lacks the tensor layers.1.mlp.up_proj.weight",
    ),
    "a convolution too few": Refused(
        dflash2(),
        without(FULL_DFLASH2, "layers.1.mlp_conv.base"),
        "lacks the tensor layers.1.mlp_conv",
    ),
    "a tensor too many": Refused(config(), V1 | {"gate.weight": ONE}, "has a tensor gate.weight"),
    "features of another number": Refused(
        speculators(aux_hidden_state_layer_ids=[2, 3, 4]), V1, "fc.weight has shape [32, 64]"
    ),
    "layers that nobody names": Refused(
        speculators(aux_hidden_state_layer_ids=None), V1, "does not say which layers it reads"
    ),
    "a layer below the embeddings": Refused(
        speculators(aux_hidden_state_layer_ids=[-1, 3]), V1, "'aux_hidden_state_layer_ids'"
    ),
    "speculators without a mask token": Refused(
        speculators(mask_token_id=None), V1, "lacks or garbles 'mask_token_id'"
    ),
    "a negative mask token": Refused(nested(mask_token_id=-1), V1, "'mask_token_id': -1"),
    "speculators whose windows are off": Refused(
        speculators(layers={**SLIDING, "use_sliding_window": ...}),
        V1,
        "has sliding layers without a window",
    ),
    "two names for one tensor": Refused(
        config(), V1 | {"model.fc.weight": noise((HIDDEN, 2 * HIDDEN), 4)}, "holds fc.weight twice"
    ),
    "three features, two ids": Refused(
        config(), zlab_tensors(num_features=3), "fc.weight has shape [32, 96]"
    ),
    "copies in z-lab's folder that do not fit": Refused(
        config(),
        V1 | {**copies(), "lm_head.weight": noise((9, HIDDEN), 3)},
        "lm_head.weight has shape",
    ),
}
