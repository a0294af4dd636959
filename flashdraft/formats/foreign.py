"""Which folders are drafters, and which of them are not read here: refused by their right names.

Published formats share keys and tensor names and mean other things by them, so what nobody looks at is read wrongly in silence.
Knows keys, tensor names and files. Does not know shapes, nor how a drafter runs.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flashdraft.errors import CheckpointError

__all__ = ["is_draft", "refuse_config", "refuse_files", "refuse_tensors"]


class _Format(NamedTuple):
    """A kind of drafter that is not read: words in the name of its class, and keys that only its config.json has."""

    name: str
    words: tuple[str, ...]
    keys: tuple[str, ...] = ()


_FORMATS = (
    _Format(
        "dflash2",
        ("dflash2",),
        ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
    ),
    _Format(
        "dspark",
        ("dspark",),
        (
            "dspark_config",
            "markov_rank",
            "markov_head_type",
            "num_anchors",
            "enable_confidence_head",
        ),
    ),
    _Format("domino", ("domino",), ("domino_config", "shift_label", "pure_draft_prefix_len")),
    _Format("LiLiCorr", ("lilicorr",), ("lilicorr_config", "lilicorr_candidate_topk")),
    _Format("xPress", ("xpress",), ("xpress_rank", "xpress_topc")),
    _Format("Laguna DFlash", ("laguna",)),
    _Format("DFlare", ("dflare",)),
    _Format("DFly", ("dfly",)),
    _Format("TreeFlash", ("treeflash",)),
    _Format("Muse Glimmer", ("museglimmer",)),
    _Format(
        "P-EAGLE", ("peagle",), ("pard_token", "parallel_drafting", "mask_hidden", "num_depths")
    ),
    _Format("DeepSpec EAGLE-3", ("qwen3eagle3", "gemma4eagle3")),
    _Format("published Medusa", (), ("medusa_num_heads",)),
    _Format("MLP speculator", ("mlp_speculator", "mlpspeculator")),
)
_ANCHOR_FIRST = ("sample_from_anchor", "query_zero_predicts_next")
_WORDS = (
    "dflash",
    "dspark",
    "domino",
    "eagle",
    "medusa",
    "speculator",
    "lilicorr",
    "xpress",
    "draftmodel",
    "assistantmodel",
)
_SPECULATORS = ("speculators_model_type", "speculators_version", "speculators_config")
_KEYS = (
    "dflash_config",
    "flashdraft_config",
    "eagle_config",
    "draft_vocab_size",
    "mask_token_id",
    "target_layer_ids",
    "block_size",
    "num_target_layers",
    "eagle_aux_hidden_state_layer_ids",
    "medusa_num_heads",
    *_SPECULATORS,
)
# Switches of a network that is ours in all else: what each may say, besides nothing, without changing what is computed here.
_SWITCHES: dict[str, tuple[Any, ...]] = {
    "use_gemma_norm": (False,),
    "attention_value_scale": (1,),
    "attention_sink_bias": (False,),
    "h_mup_width_multiplier": (1,),
    "logits_mup_width_multiplier": (1,),
    "enable_qwen35_gated_q_proj": (False,),
    "log_snr": (False,),
    "rope_is_neox_style": (True,),
    "is_neox_style": (True,),
    "rope_interleave": (False,),
    "norm_before_fc": (False,),
    "use_aux_norm": (False,),
    "fc_norm": (False,),
    "use_aux_hidden_state": (True,),
    "quantization_config": (),
    "compression_config": (),
}
_NORM_OFFSETS = ("qwen3_5", "qwen3_next", "gemma")  # families whose norms multiply by 1 + weight
_TENSORS = {  # part of a tensor's name -> whose it is
    "candidate_selector.": "DFlash 2",
    "attention_conv.": "DFlash 2",
    "mlp_conv.": "DFlash 2",
    "markov_head.": "DSpark",
    "confidence_head.": "DSpark",
    "logit_head.": "DSpark",
    "prefix_gru.": "Domino",
    "embed_proj.": "Domino",
    "lilicorr": "LiLiCorr",
    "xpress_head.": "xPress",
    "aux_hidden_norms": "Laguna DFlash",
    ".g_proj.": "Laguna DFlash",
    "encoder.fc": "Muse Glimmer",
    "attn_sinks": "drafters with attention sinks",
    "attention_sink_bias": "drafters with attention sinks",
    "weight_packed": "quantised drafters",
    "weight_scale": "quantised drafters",
    "qweight": "quantised drafters",
    "fc_norm.": "EAGLE-3 with norms before fc",
    "input_norm.": "EAGLE-3 with norms before fc",
}
_READ = "DFlash v1 in z-lab's format, EAGLE-3 in SafeAILab's and SpecForge's, and FlashDraft's own folders are read"


def is_draft(config: Mapping[str, Any]) -> bool:
    """Whether this config.json is a drafter's, and not a language model's own."""
    named = _named(config)
    return any(word in named for word in _WORDS) or any(
        config.get(key) is not None for key in _KEYS
    )


def refuse_config(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for the config.json of a drafter that is not read here, or not exactly, naming what it is."""
    _refuse_speculators(config, where)
    _refuse_formats(config, where)
    _refuse_switches(config, where)


def refuse_tensors(names: Iterable[str], where: str) -> None:
    """Raises CheckpointError where a tensor's name is known to be another drafter's."""
    for name in sorted(names):
        for part, owner in _TENSORS.items():
            if part in name:
                raise CheckpointError(
                    f"`{where}` holds {name}: a tensor of {owner}, not supported", hint=_READ
                )
        if name.startswith("layers.0.self_attn.") and "midlayer.self_attn.q_proj.weight" in names:
            raise CheckpointError(
                f"`{where}` holds {name} beside midlayer, which is not supported", hint=_READ
            )


def refuse_files(folder: Path) -> None:
    """Raises CheckpointError for a companion file that changes what the network reads."""
    name = "mask_embedding.pt"
    if (folder / name).exists():
        hint = "its mask token has an embedding of its own, pickled, which is not read; a drafter without that file works"
        raise CheckpointError(f"`{folder}` holds {name}, which is not supported", hint=hint)
    if (folder / "adapter_config.json").exists():
        got = f"`{folder}` holds an adapter (adapter_config.json), which would be left out"
        raise CheckpointError(
            got, hint="merge it into the drafter, or take adapter_config.json out of the folder"
        )


def _named(config: Mapping[str, Any]) -> str:
    """The names of its classes and its model type, in small letters."""
    classes = config.get("architectures") or ()
    classes = (classes,) if isinstance(classes, str) else classes
    return " ".join(map(str, (*classes, config.get("model_type") or ""))).lower()


def _places(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Where a switch may stand: at the top, or in a part."""
    parts = [
        config.get(name)
        for name in ("dflash_config", "eagle_config", "rope_parameters", "rope_scaling")
    ]
    return [config, *(part for part in parts if isinstance(part, Mapping))]


def _refuse_speculators(config: Mapping[str, Any], where: str) -> None:
    if not any(config.get(key) is not None for key in _SPECULATORS):
        return
    inner = config.get("speculators_config")
    algorithm = inner.get("algorithm") if isinstance(inner, Mapping) else None
    kind = config.get("speculators_model_type") or algorithm or "draft"
    got = f"`{where}` is a {kind} drafter in the speculators format, which is not read yet"
    raise CheckpointError(
        got, hint=f"speculators (vLLM's library) wraps a drafter in keys of its own; {_READ}"
    )


def _refuse_formats(config: Mapping[str, Any], where: str) -> None:
    named, places = _named(config), _places(config)
    special = config.get("dflash_config")
    projector = special.get("projector_type") if isinstance(special, Mapping) else None
    if projector not in (None, "", "dflash"):
        raise CheckpointError(
            f"`{where}` is a {projector} drafter, which is not supported", hint=_READ
        )

    for format in _FORMATS:
        by_name = any(word in named for word in format.words)
        told = [place.get(key) for place in places for key in format.keys]
        by_key = any(value is not None and value is not False for value in told)
        if by_name or by_key:
            plain = format.name == "dspark" and config.get("markov_rank") == 0
            name = "DeepSpec DFlash (anchor-first)" if plain else format.name
            raise CheckpointError(
                f"`{where}` is a {name} drafter, which is not supported", hint=_READ
            )
    if (
        "eagle" in named
        and "eagle3" not in named
        and not isinstance(config.get("flashdraft_config"), Mapping)
    ):
        raise CheckpointError(
            f"`{where}` is an EAGLE-1 or EAGLE-2 drafter, which is not supported", hint=_READ
        )

    for key in _ANCHOR_FIRST:
        if any(place.get(key) for place in places):
            hint = "row k of its blocks predicts the token at anchor + k + 1; those whose row k predicts anchor + k are read"
            raise CheckpointError(
                f"`{where}` is a {key} drafter, which is not supported", hint=hint
            )


def _refuse_switches(config: Mapping[str, Any], where: str) -> None:
    family = str(config.get("model_type") or "")
    if family.startswith(_NORM_OFFSETS):
        hint = "its norms multiply by 1 + weight, these by the weight; convert it first"
        raise CheckpointError(
            f"`{where}` has model_type {family}, which is not supported in a drafter", hint=hint
        )
    for place in _places(config):
        for key, harmless in _SWITCHES.items():
            value = place.get(key)
            if value is not None and value not in harmless:
                hint = "the network would be computed otherwise than it was trained; there is no support for it here"
                raise CheckpointError(
                    f"`{where}` has {key} {value!r:.40}, which is not supported", hint=hint
                )
    for key in ("hidden_act", "hidden_activation"):
        if (config.get(key) or "silu") not in ("silu", "swish"):
            raise CheckpointError(f"`{where}`: {key} is {config[key]!r}", hint="drafters have silu")
    width = config.get("target_hidden_size")
    if width is not None and width != config.get("hidden_size"):
        got = f"`{where}` is {config.get('hidden_size')} wide for a target of target_hidden_size {width}"
        raise CheckpointError(got, hint="drafters as wide as their target are read")
