"""config.json -> the fields of a DraftConfig, by the rules of every reader of published folders.

Where a key may stand, what it means where it is absent, numbers that are written as text, things
that are said twice. Knows keys and values; does not know files, tensors, nor formats that are
refused as a whole (`foreign`).

The functions raise KeyError naming a key that is missing, AttributeError, TypeError or ValueError
for one that is garbled (`written` says which folder that is), and CheckpointError for
what is understood but cannot be had.
"""

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

from flashdraft.errors import CheckpointError
from flashdraft.formats.foreign import Json, part_of

__all__ = [
    "KINDS",
    "OTHER_READS",
    "Fields",
    "count_of",
    "dtype_of",
    "flag_of",
    "given",
    "layer_ids_of",
    "masks_of",
    "number_of",
    "other_fields",
    "rope_of",
    "scales_of",
    "sizes_of",
    "spread_layers",
    "without_parts",
]

Fields: TypeAlias = dict[str, Any]  # by name, of a DraftConfig or of a config.json
Value: TypeAlias = Any  # whatever JSON can hold

KINDS = ("full_attention", "sliding_attention")

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_QWEN3 = {  # what Qwen3Config takes where it is not told
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
}
_USUAL = {  # of folders that do not say
    "block_size": 6,
    "mask_token_id": 0,
    "num_target_layers": 0,
}
OTHER_READS = (*_USUAL, "target_layer_ids")  # flashdraft_config's of drafters without blocks
_PARTS = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")  # of heads, rotated
_MOST_LAYERS = 1000  # more are a slip, and would be counted up one by one
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_ROPE_POSITIVE = {"rope_theta", "factor", "original_max_position_embeddings"}
_ROPE_NUMBERS = {
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "mscale",
    "mscale_all_dim",
}


def other_fields(config: Json, method: str, where: str) -> Fields:
    """The fields of a drafter that fills no blocks."""
    fields = sizes_of(config, method)
    fields |= masks_of(config, method, where)
    kinds = fields["layer_types"] or ("full_attention",)
    fields["rope_parameters"] = rope_of(config, kinds, where)
    fields |= _other_reads(config)
    fields |= scales_of(config, method, where)
    fields["dtype"] = dtype_of(config)
    fields["method"] = method
    return fields


# --- One value


def given(config: Json, name: str, default: Value = None) -> Value:
    """z-lab's rule: a key stands in dflash_config, else at the top, else it has its default."""
    special = config.get("dflash_config") or {}
    nested = special.get(name)
    if nested is not None:
        return nested
    top = config.get(name)
    return default if top is None else top


def flag_of(config: Json, name: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name!r}: {value!r}")
    return value


def number_of(name: str, value: Value) -> float:
    """A finite number, which may be written as text. Raises ValueError naming the key."""
    wrong = ValueError(f"{name!r}: {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise wrong
    return number


def count_of(name: str, value: Value, least: int = 1) -> int:
    """A whole number from `least` on."""
    number = number_of(name, value)
    if number != int(number) or number < least:
        raise ValueError(f"{name!r}: {value!r}")
    return int(number)


def layer_ids_of(value: Value) -> tuple[int, ...]:
    """-1 stands for the embeddings."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"'target_layer_ids': {value!r}")
    return tuple(count_of("target_layer_ids", layer, least=-1) for layer in value)


def dtype_of(config: Json) -> str:
    """In which its weights are written again."""
    told = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    name = str(told).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"'dtype': {told!r}")
    return name


# --- The network's shape


def sizes_of(config: Json, method: str) -> Fields:
    """Widths, heads and the like; what is absent has the default of the folder's own class."""
    sizes: Fields = {}
    for name in _SIZES:
        sizes[name] = count_of(name, config[name])
    if sizes["num_hidden_layers"] > _MOST_LAYERS:
        raise ValueError(f"'num_hidden_layers': {config['num_hidden_layers']!r}")
    for name in ("max_position_embeddings", "draft_vocab_size"):
        if config.get(name) is not None:
            sizes[name] = count_of(name, config[name])
    if config.get("rms_norm_eps") is not None:
        sizes["rms_norm_eps"] = number_of("rms_norm_eps", config["rms_norm_eps"])
        if sizes["rms_norm_eps"] < 0:
            raise ValueError(f"'rms_norm_eps': {config['rms_norm_eps']!r}")
    sizes["attention_bias"] = bool(flag_of(config, "attention_bias"))

    defaults = _QWEN3 if method == "dflash" else {}
    heads = sizes["num_attention_heads"]
    groups = config.get("num_key_value_heads", defaults.get("num_key_value_heads"))
    sizes["num_key_value_heads"] = count_of("num_key_value_heads", groups or heads)
    head_dim = config.get("head_dim", defaults.get("head_dim"))
    sizes["head_dim"] = count_of("head_dim", head_dim or sizes["hidden_size"] // heads)
    sizes.setdefault("max_position_embeddings", defaults.get("max_position_embeddings", 2048))
    return sizes


def masks_of(config: Json, method: str, where: str) -> Fields:
    """Which layers have a window, and which are causal inside a block: z-lab's and vLLM's rules."""
    types = _types_of(config)
    if method != "dflash":
        if "sliding_attention" in types:
            hint = f"in drafters of {method} they are not supported"
            raise CheckpointError(f"`{where}` has sliding layers", hint=hint)
        return {"layer_types": types}

    num_layers = count_of("num_hidden_layers", config["num_hidden_layers"])
    special = config.get("dflash_config") or {}
    window = None
    if flag_of(config, "use_sliding_window"):
        window = config.get("sliding_window", 4096)
        if not types and window is not None:
            types = _types_by_depth(config, num_layers)
    causal = _causal(config, special)

    use_swa = flag_of(special, "use_swa")
    if use_swa is None and special.get("swa_window_size") is not None:
        hint = "say in dflash_config whether use_swa is true or false"
        raise CheckpointError(f"`{where}` has swa_window_size without use_swa", hint=hint)
    if use_swa:  # it holds for all layers; their types still say which are causal
        if causal is None and len(set(types)) > 1:
            got = (
                f"`{where}` has use_swa over layers of two kinds, and nothing says which are causal"
            )
            raise CheckpointError(got, hint="say it by is_causal in its config.json")
        if causal is None:
            causal = "sliding_attention" in types
        window = special["swa_window_size"]
        types = ("sliding_attention",) * num_layers

    if window is not None:
        window = count_of("sliding_window", window)
    return {"layer_types": types, "sliding_window": window, "causal": causal}


def _types_of(config: Json) -> tuple[str, ...]:
    types = config.get("layer_types") or []
    if not isinstance(types, list | tuple):
        raise ValueError(f"'layer_types': {types!r}")
    for kind in types:
        if not isinstance(kind, str):
            raise ValueError(f"'layer_types': {kind!r}")
    return tuple(types)


def _types_by_depth(config: Json, num_layers: int) -> tuple[str, ...]:
    """Qwen3Config's rule: layers have windows from `max_window_layers` on, by default 28."""
    first = config.get("max_window_layers")
    first = 28 if first is None else count_of("max_window_layers", first, least=0)
    num_full = min(first, num_layers)
    return ("full_attention",) * num_full + ("sliding_attention",) * (num_layers - num_full)


def _causal(config: Json, special: Json) -> bool | None:
    """`is_causal` at the top holds before what `special`, dflash_config, says."""
    flags = (
        flag_of(config, "is_causal"),
        flag_of(special, "causal"),
        flag_of(special, "is_causal"),
    )
    for flag in flags:
        if flag is not None:
            return flag
    return None


# --- Rotary positions


def rope_of(config: Json, kinds: Iterable[str], where: str) -> Json:
    """Rotary parameters, flat; by kind of layer where two kinds that are there differ."""
    new = config.get("rope_parameters") or {}
    old = config.get("rope_scaling") or {}
    if new and old and _contradict(new, old):
        got = f"`{where}` has rope_parameters and rope_scaling that differ"
        raise CheckpointError(got, hint="keep the one that it was trained with")

    rope = dict(new or old)
    nested: dict[str, Json] = {}
    for kind in KINDS:
        if kind in rope:
            nested[kind] = rope.pop(kind)
    if not nested:
        return _one_rope(rope, config, where)

    used: dict[str, Json] = {}
    for kind in sorted(set(kinds)):
        if not nested.get(kind):
            got = f"`{where}` gives no rope_parameters to its layers of {kind}"
            hint = "every kind of layer that is there needs rotary positions"
            raise CheckpointError(got, hint=hint)
        used[kind] = _one_rope({**rope, **nested[kind]}, config, where)
    first, *others = used.values()
    if all(other == first for other in others):
        return first
    return used


def without_parts(config: Json) -> Fields:
    """Without what a target says of rotating parts of heads: a draft's heads are rotated whole
    where these formats are trained."""
    flat = dict(config)
    for name in _PARTS:
        flat.pop(name, None)
    for name in ("rope_parameters", "rope_scaling"):
        rope = part_of(config, name)
        if rope:
            flat[name] = {key: value for key, value in rope.items() if key not in _PARTS}
    return flat


def _contradict(new: Json, old: Json) -> bool:
    """Whether `rope_parameters` and the older `rope_scaling` say two things."""
    for name in old:
        if name != "type" and name in new and new[name] != old[name]:
            return True
    new_type = new.get("rope_type", "default")
    old_type = old.get("rope_type", old.get("type", "default"))
    return bool(new_type != old_type)


def _one_rope(told: Json, config: Json, where: str) -> Fields:
    """Rotary parameters with their defaults, numbers as numbers.

    Raises CheckpointError for a rotation of another form.
    """
    rope = {name: value for name, value in told.items() if value is not None}
    theta = config.get("rope_theta")
    rope.setdefault("rope_theta", 10000.0 if theta is None else theta)
    for name in _ROPE_NUMBERS & rope.keys():
        number = number_of(name, rope[name])
        if isinstance(rope[name], str):
            rope[name] = number
    for name in _ROPE_POSITIVE & rope.keys():
        if rope[name] <= 0:
            raise ValueError(f"{name!r}: {rope[name]!r}")

    kind = rope.pop("type", None)
    if kind is None and "rope_type" not in rope and rope.get("factor", 1) != 1:
        got = f"`{where}` scales its positions by {rope['factor']}, but names no rope_type"
        raise CheckpointError(got, hint="say the rope_type that it was trained with")
    rope.setdefault("rope_type", kind or "default")

    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part is not None and number_of("partial_rotary_factor", part) != 1:
        got = f"`{where}` has partial_rotary_factor {part}, which is not supported"
        hint = (
            "whole heads are rotated here; if it was trained so, as z-lab's class does whatever "
            "the key says, remove the key"
        )
        raise CheckpointError(got, hint=hint)
    if rope.get("rope_dim") not in (None, config.get("head_dim")):
        got = f"`{where}` has rope_dim {rope['rope_dim']}, which is not supported"
        raise CheckpointError(got, hint="whole heads are rotated here")
    return rope


# --- What is read from the target, and what is done to it


def _other_reads(config: Json) -> Fields:
    """What drafters without blocks read, whose own formats have no place for it."""
    own = config.get("flashdraft_config") or {}
    reads: Fields = {}
    for name, usual in _USUAL.items():
        reads[name] = count_of(name, own.get(name, usual), least=0)
    reads["target_layer_ids"] = layer_ids_of(own.get("target_layer_ids") or ())
    return reads


def scales_of(config: Json, method: str, where: str) -> Fields:
    """What is done to embeddings and logits around the network."""
    multiplier = number_of("output_multiplier", given(config, "output_multiplier", 1.0))
    multiplier *= number_of("logit_scale", given(config, "logit_scale", 1.0))
    scale = number_of("input_embedding_scale", given(config, "input_embedding_scale", 1.0))
    cap = number_of("final_logit_softcapping", given(config, "final_logit_softcapping", 0.0))
    changes_something = multiplier != 1 or scale != 1 or cap != 0
    if method == "draft_model" and changes_something:
        got = f"`{where}` scales its embeddings or logits"
        hint = "a draft_model has its target's embedding and lm_head as they are"
        raise CheckpointError(got, hint=hint)

    scales: Fields = {
        "input_embedding_scale": scale,
        "output_multiplier": multiplier,
        "final_logit_softcapping": cap if cap != 0 else None,
    }
    return scales


def spread_layers(num_target_layers: int, count: int) -> tuple[int, ...]:
    """The target layers whose outputs are features: `count` of them, evenly from 1 to L - 3.

    DFlash 2602.06036; rounded as z-lab does.
    """
    if count == 1:
        return (num_target_layers // 2,)

    first = min(1, num_target_layers - 1)
    last = max(num_target_layers - 3, 0)
    return tuple(round(first + (last - first) * i / (count - 1)) for i in range(count))
