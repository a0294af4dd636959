"""Which folders are drafters, and which of them are not read here: refused by their right names.

Published formats share keys and tensor names and mean other things by them, so that a key nobody
looks at is read wrongly in silence. Knows keys, tensor names and files. Does not know shapes, nor
how a drafter runs.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from flashdraft.errors import CheckpointError

__all__ = ["IMAGE_METHOD", "Json", "is_draft", "refuse_config", "refuse_files", "refuse_tensors"]

Json: TypeAlias = Mapping[str, Any]  # a config.json, or a part of it
IMAGE_METHOD = "image_block"  # of an image draft's config.json, which drafts no text


class _Format(NamedTuple):
    """A kind of drafter that is not read, and how it is known."""

    name: str
    words: tuple[str, ...]  # in the name of its class
    keys: tuple[str, ...] = ()  # that only its config.json has


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
# Switches of a network that is ours in all else: what each may say, besides nothing, without
# changing what is computed here.
_SWITCHES: dict[str, tuple[bool | int, ...]] = {
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
_READ = (
    "DFlash v1 in z-lab's format, EAGLE-3 in SafeAILab's and SpecForge's, "
    "and FlashDraft's own folders are read"
)


def is_draft(config: Json) -> bool:
    """Whether this config.json is a drafter's, and not a language model's own."""
    return _has_word(config, _WORDS) or any(config.get(key) is not None for key in _KEYS)


def refuse_config(config: Json, where: str) -> None:
    """Raises CheckpointError for the config.json of a drafter that is not read here, or not
    exactly, naming what it is."""
    _refuse_speculators(config, where)
    _refuse_formats(config, where)
    _refuse_anchor_first(config, where)
    _refuse_switches(config, where)
    _refuse_shapes(config, where)


def refuse_tensors(names: Iterable[str], where: str) -> None:
    """Raises CheckpointError where a tensor's name is known to be another drafter's."""
    known = set(names)
    for name in sorted(known):
        for part, owner in _TENSORS.items():
            if part in name:
                got = f"`{where}` holds {name}: a tensor of {owner}, not supported"
                raise CheckpointError(got, hint=_READ)
        is_of_layers = name.startswith("layers.0.self_attn.")
        if is_of_layers and "midlayer.self_attn.q_proj.weight" in known:
            got = f"`{where}` holds {name} beside midlayer, which is not supported"
            raise CheckpointError(got, hint=_READ)


def refuse_files(folder: Path) -> None:
    """Raises CheckpointError for a companion file that changes what the network reads."""
    mask = "mask_embedding.pt"
    if (folder / mask).exists():
        hint = (
            "its mask token has an embedding of its own, pickled, which is not read; "
            "a drafter without that file works"
        )
        raise CheckpointError(f"`{folder}` holds {mask}, which is not supported", hint=hint)

    if (folder / "adapter_config.json").exists():
        got = f"`{folder}` holds an adapter (adapter_config.json), which would be left out"
        hint = "merge it into the drafter, or take adapter_config.json out of the folder"
        raise CheckpointError(got, hint=hint)


def _refuse_speculators(config: Json, where: str) -> None:
    if all(config.get(key) is None for key in _SPECULATORS):
        return

    wrapper = config.get("speculators_config")
    algorithm = wrapper.get("algorithm") if isinstance(wrapper, Mapping) else None
    kind = config.get("speculators_model_type") or algorithm or "draft"
    got = f"`{where}` is a {kind} drafter in the speculators format, which is not read yet"
    hint = f"speculators (vLLM's library) wraps a drafter in keys of its own; {_READ}"
    raise CheckpointError(got, hint=hint)


def _refuse_formats(config: Json, where: str) -> None:
    special = config.get("dflash_config")
    projector = special.get("projector_type") if isinstance(special, Mapping) else None
    if projector not in (None, "", "dflash"):
        raise _unsupported(f"{projector}", where)

    for kind in _FORMATS:
        if _has_word(config, kind.words) or _says_any(config, kind.keys):
            name = kind.name
            if name == "dspark" and config.get("markov_rank") == 0:
                name = "DeepSpec DFlash (anchor-first)"
            raise _unsupported(name, where)

    is_ours = isinstance(config.get("flashdraft_config"), Mapping)
    named = _named(config)
    if "eagle" in named and "eagle3" not in named and not is_ours:
        raise CheckpointError(
            f"`{where}` is an EAGLE-1 or EAGLE-2 drafter, which is not supported", hint=_READ
        )


def _refuse_anchor_first(config: Json, where: str) -> None:
    places = _places(config)
    for key in _ANCHOR_FIRST:
        if any(place.get(key) for place in places):
            hint = (
                "row k of its blocks predicts the token at anchor + k + 1; "
                "those whose row k predicts anchor + k are read"
            )
            raise _unsupported(key, where, hint=hint)


def _refuse_switches(config: Json, where: str) -> None:
    family = str(config.get("model_type") or "")
    if family.startswith(_NORM_OFFSETS):
        got = f"`{where}` has model_type {family}, which is not supported in a drafter"
        hint = "its norms multiply by 1 + weight, these by the weight; convert it first"
        raise CheckpointError(got, hint=hint)

    for place in _places(config):
        for key, harmless in _SWITCHES.items():
            value = place.get(key)
            if value is None or value in harmless:
                continue
            got = f"`{where}` has {key} {value!r:.40}, which is not supported"
            hint = (
                "the network would be computed otherwise than it was trained; "
                "there is no support for it here"
            )
            raise CheckpointError(got, hint=hint)


def _refuse_shapes(config: Json, where: str) -> None:
    for key in ("hidden_act", "hidden_activation"):
        activation = config.get(key) or "silu"
        if activation not in ("silu", "swish"):
            got = f"`{where}`: {key} is {activation!r}"
            raise CheckpointError(got, hint="drafters have silu")

    own = config.get("hidden_size")
    width = config.get("target_hidden_size")
    if width is not None and width != own:
        got = f"`{where}` is {own} wide for a target of target_hidden_size {width}"
        raise CheckpointError(got, hint="drafters as wide as their target are read")


def _named(config: Json) -> str:
    """The names of its classes and its model type, in small letters."""
    classes = config.get("architectures") or ()
    if not isinstance(classes, list | tuple):
        classes = (classes,)
    names = [*classes, config.get("model_type") or ""]
    return " ".join(map(str, names)).lower()


def _has_word(config: Json, words: Iterable[str]) -> bool:
    named = _named(config)
    return any(word in named for word in words)


def _places(config: Json) -> list[Json]:
    """Where a switch may stand: at the top, or in a part."""
    places = [config]
    for name in ("dflash_config", "eagle_config", "rope_parameters", "rope_scaling"):
        part = config.get(name)
        if isinstance(part, Mapping):
            places.append(part)
    return places


def _says_any(config: Json, keys: Iterable[str]) -> bool:
    """Whether one of these keys stands somewhere, and says more than no."""
    places = _places(config)
    for key in keys:
        for place in places:
            value = place.get(key)
            if value is not None and value is not False:
                return True
    return False


def _unsupported(kind: str, where: str, *, hint: str = _READ) -> CheckpointError:
    return CheckpointError(f"`{where}` is a {kind} drafter, which is not supported", hint=hint)
