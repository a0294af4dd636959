"""The speculators wrapper (vLLM's library): config.json <-> a flat one, as the others have it.

The network's shape stands in `transformer_layer_config`, as a difference to its family's defaults;
layers are told by hidden_states (0: the embeddings), one higher than the outputs of layers. Tables
are the target's as they lie, without a family's own scale or cap. Pure translations of
dictionaries. Knows keys, and what tensors' shapes say where keys are silent.
"""

from flashdraft.errors import CheckpointError
from flashdraft.formats import dflash2, dspark
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import Json, part_of, wrapped_kind
from flashdraft.formats.parse import Fields, count_of, flag_of, layer_ids_of, without_parts
from flashdraft.formats.weights import Shapes, told_by_shapes

__all__ = ["flat", "one_rope", "unwrapped", "wrapped", "wrapper_of"]

_WRAPPER = (
    "speculators_model_type",
    "speculators_version",
    "speculators_config",
    "transformer_layer_config",
    "auto_map",
    "model_type",
)
_DEFAULTS: dict[str, Fields] = {  # of a family's config class, where the difference is silent
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
}
_HEAD_KEYS = {  # at the top there, in dflash_config here
    "dflash": (),
    "dflash2": ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
    "dspark": (
        "markov_rank",
        "markov_head_type",
        "enable_confidence_head",
        "confidence_head_with_markov",
    ),
}
_USUAL: dict[str, Fields] = {  # what the library's own classes take where a key is absent
    "dflash": {},
    "dflash2": {
        "conv_kernel_size": 2,
        "conv_group_size": 16,
        "selector_rank": 256,
        "selector_top_k": 16,
    },
    "dspark": {
        "markov_rank": 256,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    },
}
_CLASSES = {
    "dflash": "DFlashDraftModel",
    "dflash2": "DFlash2DraftModel",
    "dspark": "DSparkDraftModel",
}
_VERSION = "0.9.0"  # of the library whose keys these are


# --- Reading


def unwrapped(config: Json, shapes: Shapes, where: str) -> Fields:
    """Everything at the top: the keys of the drafter, and the shape of its layers; what the latter
    leaves out is as the tensors' shapes or its family's defaults say.

    Raises CheckpointError for layers of a family that these drafters do not have.
    """
    layers = part_of(config, "transformer_layer_config")
    family = layers.get("model_type") or "qwen3"
    if family not in _DEFAULTS:
        got = f"`{where}` has layers of model_type {family} in its transformer_layer_config"
        raise CheckpointError(got, hint=f"known: {', '.join(_DEFAULTS)}; vLLM may run it")

    flat: Fields = {"model_type": family}
    for place in (config, layers):
        for name, value in place.items():
            if value is not None and name not in _WRAPPER:
                flat[name] = value
    for name in ("architectures", "tie_word_embeddings"):  # the drafter's, not its layers'
        if name in config:
            flat[name] = config[name]

    for told in (told_by_shapes(shapes), _DEFAULTS[family]):
        for name, value in told.items():
            flat.setdefault(name, value)
    return flat


def flat(config: Json, anchor_first: bool, shapes: Shapes, where: str) -> Fields:
    """The config.json of a block drafter as z-lab or SpecForge would have written it.

    anchor_first: how its blocks lie. Raises CheckpointError where it says what cannot be.
    """
    kind = str(wrapped_kind(config))
    flat = without_parts(one_rope(unwrapped(config, shapes, where)))
    block_size = count_of("block_size", flat.setdefault("block_size", 8))
    _check_layout(config, block_size, anchor_first, where)

    special: Fields = {
        "mask_token_id": flat.pop("mask_token_id", None),
        "target_layer_ids": _layers(config, where),
    }
    for key in _HEAD_KEYS[kind]:
        special[key] = flat.pop(key, _USUAL[kind].get(key))
    if kind == "dspark":
        special["projector_type"] = "dspark"
    flat["dflash_config"] = special
    flat["flashdraft_config"] = {"raw_tables": True}
    if flat.get("draft_vocab_size") == flat["vocab_size"]:
        del flat["draft_vocab_size"]

    _translate_windows(config, flat, where)
    return flat


def wrapper_of(config: Json) -> Json | None:
    """What the wrapper says of the drafter's use; None: there is no wrapper."""
    return None if wrapped_kind(config) is None else part_of(config, "speculators_config")


def one_rope(config: Fields) -> Fields:
    """All layers have the rotation of sliding ones where two are told (flatten_rope_parameters)."""
    rope = part_of(config, "rope_parameters")
    sliding = rope.get("sliding_attention")
    return {**config, "rope_parameters": dict(sliding)} if sliding else config


def _layers(config: Json, where: str) -> list[int]:
    """The layers whose outputs are features; -1: the embeddings."""
    told = config.get("aux_hidden_state_layer_ids")
    if told is None:
        got = f"`{where}` does not say which layers it reads"
        hint = "put aux_hidden_state_layer_ids into its config.json, as it was trained"
        raise CheckpointError(got, hint=hint)
    layers = [layer - 1 for layer in layer_ids_of(told)]
    if layers and min(layers) < -1:
        raise ValueError(f"'aux_hidden_state_layer_ids': {told!r}")
    return layers


def _translate_windows(config: Json, flat: Fields, where: str) -> None:
    """Full layers look in both directions whatever the flag says, which is of sliding ones alone;
    absent it means both directions, as to vLLM."""
    types = flat.get("layer_types") or ()
    if "sliding_attention" not in types:
        flat["use_sliding_window"] = False
        return

    has_window = flat.get("sliding_window") is not None
    is_used = has_window and (flat["model_type"] == "llama" or flag_of(flat, "use_sliding_window"))
    if not is_used:
        got = f"`{where}` has sliding layers without a window (use_sliding_window, sliding_window)"
        raise CheckpointError(got, hint="say the window that it was trained with")
    flat["use_sliding_window"] = True
    if flag_of(config, "sliding_window_non_causal") in (None, True):
        flat["is_causal"] = False


def _check_layout(config: Json, block_size: int, anchor_first: bool, where: str) -> None:
    """Raises CheckpointError where the number of proposed tokens is that of the other layout."""
    for method in part_of(config, "speculators_config").get("proposal_methods") or ():
        tokens = method.get("speculative_tokens")
        if tokens is None:
            continue
        tokens = count_of("speculative_tokens", tokens)
        num_drafts = block_size if anchor_first else block_size - 1
        is_of_the_other = tokens == block_size - 1 and anchor_first
        if tokens <= num_drafts and not is_of_the_other:
            continue

        flag = str(anchor_first).lower()
        got = (
            f"`{where}` proposes {tokens} tokens of blocks of {block_size}, but its "
            f"sample_from_anchor is {flag} or absent: that makes {num_drafts}"
        )
        hint = (
            "block_size tokens are proposed where sample_from_anchor is true, one fewer where it "
            "is not: say in its config.json how it was trained"
        )
        raise CheckpointError(got, hint=hint)


# --- Writing


def wrapped(draft: DraftConfig, *, target: str, target_classes: list[str]) -> Fields:
    """The config.json of a block drafter as speculators writes it.

    target: the name of its target, and the classes that the target's config.json names. Raises
    CheckpointError for a drafter that this format cannot say.
    """
    kind = _kind_of(draft)
    _check_sayable(draft)
    num_drafts = draft.block_size - 1
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": num_drafts,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    config: Fields = {
        "architectures": [_CLASSES[kind]],
        "speculators_model_type": kind,
        "speculators_version": _VERSION,
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target, "architectures": list(target_classes)},
        },
        "transformer_layer_config": _layers_json(draft),
        "draft_vocab_size": draft.draft_vocab_size or draft.vocab_size,
        "block_size": draft.block_rows,
        "mask_token_id": draft.mask_token_id,
        "aux_hidden_state_layer_ids": [layer + 1 for layer in draft.target_layer_ids],
        # vLLM takes it for the layers without a window, too.
        "sliding_window_non_causal": not any(mask.causal for mask in draft.masks),
        "sample_from_anchor": draft.anchor_first,
        "tie_word_embeddings": False,
        "dtype": draft.dtype,
    }
    if kind == "dflash2":
        config |= dflash2.keys_of(draft)
    if kind == "dspark":
        config |= dspark.keys_of(draft)
    return config


def _kind_of(draft: DraftConfig) -> str:
    if draft.sequential_head is None and not draft.conv_kernel_size and not draft.confidence_head:
        return "dflash"
    has_both = draft.sequential_head is not None and draft.conv_kernel_size
    if dflash2.fits(draft) and has_both:
        return "dflash2"
    if dspark.fits(draft):
        return "dspark"
    got = f"a drafter with the head {draft.sequential_head} cannot be a speculators folder"
    hint = "DFlash, DSpark, and DFlash 2 with both its parts can; save it without its head"
    raise CheckpointError(got, hint=hint)


def _check_sayable(draft: DraftConfig) -> None:
    """Raises CheckpointError for what speculators has no key for."""
    scaled = draft.input_embedding_scale != 1 or draft.output_multiplier != 1
    if scaled or draft.final_logit_softcapping is not None:
        got = "a drafter that scales its embeddings or logits cannot be a speculators folder"
        raise CheckpointError(got, hint="z-lab's format has keys for it")
    is_causal = [mask.causal for mask in draft.masks if mask.window is None]
    if any(is_causal) or len(draft.ropes) > 1:
        got = "a drafter of causal full layers, or of two rotations, cannot be a speculators folder"
        raise CheckpointError(got, hint="z-lab's format has keys for it")


def _layers_json(draft: DraftConfig) -> Fields:
    """transformer_layer_config, with nothing left out."""
    types = list(draft.layer_types) or ["full_attention"] * draft.num_hidden_layers
    has_windows = draft.sliding_window is not None
    return {
        "model_type": "qwen3",
        "hidden_size": draft.hidden_size,
        "intermediate_size": draft.intermediate_size,
        "num_hidden_layers": draft.num_hidden_layers,
        "num_attention_heads": draft.num_attention_heads,
        "num_key_value_heads": draft.num_key_value_heads,
        "head_dim": draft.head_dim,
        "vocab_size": draft.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": draft.rms_norm_eps,
        "max_position_embeddings": draft.max_position_embeddings,
        "rope_parameters": dict(draft.rope_parameters),
        "attention_bias": draft.attention_bias,
        "layer_types": types,
        "use_sliding_window": has_windows,
        "sliding_window": draft.sliding_window,
        "max_window_layers": draft.num_hidden_layers,
        "tie_word_embeddings": False,
    }
