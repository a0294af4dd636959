"""Which folders are drafters, and which of them are not read here: refused by their right names.

Published formats share keys and tensor names and mean other things by them, so that a key nobody
looks at is read wrongly in silence. Knows keys, tensor names and files. Does not know shapes, nor
how a drafter runs.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from flashdraft.errors import CheckpointError

__all__ = [
    "IMAGE_METHOD",
    "Json",
    "article_of",
    "is_draft",
    "names_of",
    "part_of",
    "refuse_files",
    "refuse_format",
    "refuse_switches",
    "refuse_tensors",
    "says_any",
    "wrapped_kind",
]

Json: TypeAlias = Mapping[str, Any]  # a config.json, or a part of it
IMAGE_METHOD = "image_block"  # of an image draft's config.json, which drafts no text


class _Foreigner(NamedTuple):
    """A kind of drafter that is not read, how it is known, and who runs it."""

    name: str
    runs: str  # who runs it, as far as their sources say
    words: tuple[str, ...] = ()  # in the names of its classes
    keys: tuple[str, ...] = ()  # that only its config.json has
    tensors: tuple[str, ...] = ()  # parts of names that only its tensors have


_BOTH = "vLLM and SGLang run it"
_VLLM = "vLLM runs it"
_SGLANG = "SGLang runs it"
_FOREIGNERS = (
    _Foreigner(
        "LiLiCorr",
        _BOTH,
        ("lilicorr",),
        ("lilicorr_config", "lilicorr_candidate_topk"),
        ("lilicorr",),
    ),
    _Foreigner("xPress", _VLLM, ("xpress",), ("xpress_rank", "xpress_topc"), ("xpress_head.",)),
    _Foreigner("Laguna DFlash", _BOTH, ("laguna",), (), ("aux_hidden_norms", ".g_proj.")),
    _Foreigner("DFlare", "AngelSlim, which made it, runs it", ("dflare",)),
    _Foreigner("DFly", "AngelSlim, which made it, runs it", ("dfly",)),
    _Foreigner("TreeFlash", "its authors' own code runs it", ("treeflash",)),
    _Foreigner(
        "Muse Glimmer assistant",
        "transformers, vLLM and SGLang run it",
        ("museglimmer",),
        (),
        ("encoder.fc", "encoder.output_norm_enc"),
    ),
    _Foreigner(
        "P-EAGLE",
        _VLLM,
        ("peagle",),
        ("pard_token", "parallel_drafting", "mask_hidden", "num_depths"),
        ("mask_hidden",),
    ),
    _Foreigner(
        "Gemma 4 DSpark",
        _VLLM,
        ("gemma4dspark",),
        (),
        ("layer_scalar", "pre_feedforward_layernorm"),
    ),
    _Foreigner("Kimi K3 DSpark", _VLLM, ("k3dspark",), (), ("kv_a_proj",)),
    _Foreigner("Muse Spark DSpark", _VLLM, ("musesparkdspark",)),
    _Foreigner("Qwen3-Omni DSpark", _VLLM, ("qwen3omnidspark",)),
    _Foreigner("Ling DSpark", _SGLANG, ("lingdspark",)),
    _Foreigner("LFM2 DSpark", "its card says which engine runs it", ("lfm2",)),
    _Foreigner("Nemotron 3.5", _SGLANG, ("nemotron",), ("has_embed_tokens",)),
    _Foreigner(
        "Ornith DSpark",
        "its card says which engine runs it",
        ("ornith",),
        ("enable_qwen35_gated_q_proj",),
    ),
    _Foreigner("Bonsai DSpark", "its card says which engine runs it", ("bonsai",), ("log_snr",)),
    _Foreigner(
        "DeepSeek-V4 DSpark",
        _VLLM,
        ("deepseekv4", "deepseek_v4"),
        ("dspark_config", "dspark_target_layer_ids", "dspark_block_size"),
    ),
    _Foreigner("Gemma 4 EAGLE-3", "DeepSpec's own code runs it", ("gemma4eagle3",)),
    _Foreigner("published Medusa", _VLLM, (), ("medusa_num_heads",)),
    _Foreigner("MLP speculator", _VLLM, ("mlp_speculator", "mlpspeculator")),
    _Foreigner("MTP", _VLLM, ("mtpspeculator", "mtpdraft")),
    _Foreigner(
        "quantised",
        "vLLM and SGLang run many of them; its unquantised original is read here",
        (),
        ("quantization_config", "compression_config", "quantization"),
        ("weight_packed", "weight_scale", "qweight", ".scales"),
    ),
    _Foreigner(
        "attention-sink",
        _BOTH,
        (),
        ("attention_sink_bias",),
        ("attn_sinks", "attention_sink_bias", ".sinks"),
    ),
)
_WRAPPED = {  # speculators_model_type -> what is not read of it
    "peagle": "P-EAGLE",
    "xpress": "xPress",
    "mtp": "MTP",
    "mlp_speculator": "MLP speculator",
}
_WRAPPED_READ = ("dflash", "dflash2", "dspark", "eagle3")
_PROJECTORS = (None, "", "dflash", "dspark", "domino")
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
    "markov_rank",
    *_SPECULATORS,
)
# Switches of a network that is ours in all else: what each may say, besides nothing, without
# changing what is computed here.
_SWITCHES: dict[str, tuple[bool | int, ...]] = {
    "use_gemma_norm": (False,),
    "attention_value_scale": (1,),
    "h_mup_width_multiplier": (1,),
    "logits_mup_width_multiplier": (1,),
    "rope_is_neox_style": (True,),
    "is_neox_style": (True,),
    "rope_interleave": (False,),
}
_EAGLE3_SWITCHES: dict[str, tuple[bool | int, ...]] = {  # which other networks do not have
    "norm_before_fc": (False,),
    "use_aux_norm": (False,),
    "fc_norm": (False,),
    "use_aux_hidden_state": (True,),
}
_NORM_OFFSETS = ("qwen3_5", "qwen3_next", "gemma")  # families whose norms multiply by 1 + weight
_READ = (
    "read are DFlash, DFlash 2, DSpark, Domino and EAGLE-3 in the folders of z-lab, DeepSpec, "
    "SpecForge, SafeAILab and speculators, and FlashDraft's own"
)


def is_draft(config: Json) -> bool:
    """Whether this config.json is a drafter's, and not a language model's own."""
    return _has_word(config, _WORDS) or any(config.get(key) is not None for key in _KEYS)


def refuse_format(config: Json, where: str) -> None:
    """Raises CheckpointError for the config.json of a drafter that is not read here, naming what it
    is and what would run it."""
    kind = wrapped_kind(config)
    if kind is not None and kind not in _WRAPPED_READ:
        name = _WRAPPED.get(kind, kind)
        raise _unsupported(f"{name} (speculators)", where, f"{_VLLM}; {_READ}")

    projector = part_of(config, "dflash_config").get("projector_type")
    if projector not in _PROJECTORS:
        raise _unsupported(f"{projector}", where, _READ)
    for foreigner in _FOREIGNERS:
        if _has_word(config, foreigner.words) or says_any(config, foreigner.keys):
            raise _unsupported(foreigner.name, where, f"{foreigner.runs}; {_READ}")

    named = names_of(config)
    is_ours = bool(part_of(config, "flashdraft_config"))
    if "eagle" in named and "eagle3" not in named and kind is None and not is_ours:
        got = f"`{where}` is an EAGLE-1 or EAGLE-2 drafter, which is not supported"
        raise CheckpointError(got, hint=f"{_BOTH}; {_READ}")


def refuse_tensors(names: Iterable[str], where: str) -> None:
    """Raises CheckpointError where a tensor's name is known to be another drafter's."""
    known = set(names)
    for name in sorted(known):
        for foreigner in _FOREIGNERS:
            if any(part in name for part in foreigner.tensors):
                hint = f"it holds {name}; {foreigner.runs}; {_READ}"
                raise _unsupported(foreigner.name, where, hint)


def refuse_files(folder: Path) -> None:
    """Raises CheckpointError for a companion file that changes what the network reads."""
    if (folder / "adapter_config.json").exists():
        got = f"`{folder}` holds an adapter (adapter_config.json), which would be left out"
        hint = "merge it into the drafter, or take adapter_config.json out of the folder"
        raise CheckpointError(got, hint=hint)


def refuse_switches(config: Json, where: str, *, kind: str = "dflash") -> None:
    """Raises CheckpointError for a switch of a network that is ours in all else. config: flat."""
    is_eagle3 = kind == "eagle3"
    _refuse_switches(config, _SWITCHES if is_eagle3 else _SWITCHES | _EAGLE3_SWITCHES, where)
    _refuse_shapes(config, where)
    if not is_eagle3:
        _refuse_width(config, where)


def _refuse_switches(
    config: Json, switches: Mapping[str, tuple[bool | int, ...]], where: str
) -> None:
    family = str(config.get("model_type") or "")
    if family.startswith(_NORM_OFFSETS):
        got = f"`{where}` has model_type {family}, which is not supported in a drafter"
        hint = "its norms multiply by 1 + weight, these by the weight; convert it first"
        raise CheckpointError(got, hint=hint)

    for place in _places(config):
        for key, harmless in switches.items():
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


def _refuse_width(config: Json, where: str) -> None:
    own = config.get("hidden_size")
    width = config.get("target_hidden_size")
    if width is not None and width != own:
        got = f"`{where}` is {own} wide for a target of target_hidden_size {width}"
        raise CheckpointError(got, hint="drafters as wide as their target are read")


def names_of(config: Json) -> str:
    """The names of its classes and its model type, in small letters."""
    classes = config.get("architectures") or ()
    if not isinstance(classes, list | tuple):
        classes = (classes,)
    names = [*classes, config.get("model_type") or ""]
    return " ".join(map(str, names)).lower()


def _has_word(config: Json, words: Iterable[str]) -> bool:
    named = names_of(config)
    return any(word in named for word in words)


def _places(config: Json) -> list[Json]:
    """Where a switch may stand: at the top, or in a part."""
    places = [config]
    for name in ("dflash_config", "eagle_config", "rope_parameters", "rope_scaling"):
        part = config.get(name)
        if isinstance(part, Mapping):
            places.append(part)
    return places


def says_any(config: Json, keys: Iterable[str]) -> bool:
    """Whether one of these keys stands somewhere, and says more than no."""
    places = _places(config)
    for key in keys:
        for place in places:
            value = place.get(key)
            if value is not None and value is not False:
                return True
    return False


def part_of(config: Json, name: str) -> Json:
    """A part of config.json; an empty one where it is not there, or none.

    Raises ValueError for what is no part.
    """
    part = config.get(name)
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        raise ValueError(f"{name!r}: {part!r}")
    return part


def wrapped_kind(config: Json) -> str | None:
    """What the speculators wrapper says the drafter is; None: there is no wrapper."""
    if all(config.get(key) is None for key in _SPECULATORS):
        return None
    kind = config.get("speculators_model_type")
    if kind is None:
        kind = part_of(config, "speculators_config").get("algorithm")
    return str(kind or "draft").lower()


def _unsupported(kind: str, where: str, hint: str) -> CheckpointError:
    got = f"`{where}` is {article_of(kind)} {kind} drafter, which is not supported"
    return CheckpointError(got, hint=hint)


def article_of(name: str) -> str:
    """As it is said: an xPress drafter, an MTP drafter."""
    is_spelt = name.startswith(("MTP", "MLP", "LFM", "x"))
    return "an" if is_spelt or name[0].lower() in "aeio" else "a"
