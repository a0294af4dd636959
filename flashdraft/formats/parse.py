"""config.json -> the fields of a DraftConfig.

Every published reader's rules for what is absent, written as text, or said in two places. Knows keys and values; does not know files.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from flashdraft.errors import CheckpointError

__all__ = ["KINDS", "spread_layers"]

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
KINDS = ("full_attention", "sliding_attention")
_QWEN3 = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
}  # what Qwen3Config takes where it is not told
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
_USUAL = {
    "block_size": 6,
    "mask_token_id": 0,
    "num_target_layers": 0,
}  # of EAGLE-3 folders, which do not say


def _method_of(config: Mapping[str, Any]) -> str:
    """The method whose folder this is: ours say so, EAGLE-3's are known by their class or by their shape."""
    own = config.get("flashdraft_config") or {}
    named = " ".join(map(str, config.get("architectures") or ())).lower()
    unnamed = (
        config.get("model_type") == "llama"
        and config.get("num_hidden_layers") == 1
        and "draft_vocab_size" in config
    )
    return str(own.get("method") or ("eagle3" if unnamed or "eagle3" in named else "dflash"))


def _given(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """z-lab's rule: a key stands in dflash_config, else at the top, else it has its default."""
    nested = (config.get("dflash_config") or {}).get(name)
    if nested is not None:
        return nested
    top = config.get(name)
    return default if top is None else top


def _flag(config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name!r}: {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    """A number that may be written as text. Raises ValueError naming the key for what is none, or is not finite."""
    wrong = ValueError(f"{name!r}: {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise wrong from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise wrong
    return number


def _count(name: str, value: Any, least: int = 1) -> int:
    """A whole number from `least` on."""
    number = _number(name, value)
    if number != int(number) or number < least:
        raise ValueError(f"{name!r}: {value!r}")
    return int(number)


def _layer_ids(value: Any) -> tuple[int, ...]:
    """-1 stands for the embeddings, which are refused by name where they are read."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"'target_layer_ids': {value!r}")
    return tuple(_count("target_layer_ids", layer, least=-1) for layer in value)


def _dtype(config: Mapping[str, Any]) -> str:
    """In which its weights are written again."""
    told = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    name = str(told).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"'dtype': {told!r}")
    return name


def _sizes(config: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Widths, heads and the like; what is absent has the default of the class that the folder is of."""
    sizes: dict[str, Any] = {name: _count(name, config[name]) for name in _SIZES}
    for name in ("max_position_embeddings", "draft_vocab_size"):
        if config.get(name) is not None:
            sizes[name] = _count(name, config[name])
    if config.get("rms_norm_eps") is not None:
        sizes["rms_norm_eps"] = _number("rms_norm_eps", config["rms_norm_eps"])
        if sizes["rms_norm_eps"] < 0:
            raise ValueError(f"'rms_norm_eps': {config['rms_norm_eps']!r}")
    sizes["attention_bias"] = bool(_flag(config, "attention_bias"))
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    defaults = _QWEN3 if method == "dflash" else {}
    groups = config.get("num_key_value_heads", defaults.get("num_key_value_heads"))
    sizes["num_key_value_heads"] = _count("num_key_value_heads", groups or heads)
    sizes["head_dim"] = _count(
        "head_dim", config.get("head_dim", defaults.get("head_dim")) or hidden // heads
    )
    sizes.setdefault("max_position_embeddings", defaults.get("max_position_embeddings", 2048))
    return sizes


def _masks(config: Mapping[str, Any], method: str, where: str) -> dict[str, Any]:
    """Which layers have a window, and which are causal inside a block, as z-lab's class and vLLM read it."""
    types = tuple(config.get("layer_types") or ())
    if method != "dflash":
        if "sliding_attention" in types:
            raise CheckpointError(
                f"`{where}` has sliding layers",
                hint=f"in drafters of {method} they are not supported",
            )
        return {"layer_types": types}

    count, special = (
        _count("num_hidden_layers", config["num_hidden_layers"]),
        config.get("dflash_config") or {},
    )
    window = config.get("sliding_window", 4096) if _flag(config, "use_sliding_window") else None
    if not types and window is not None:
        first = config.get("max_window_layers")
        first = 28 if first is None else _count("max_window_layers", first, least=0)
        types = tuple(KINDS[n >= first] for n in range(count))
    told = [
        flag
        for flag in (
            _flag(config, "is_causal"),
            _flag(special, "causal"),
            _flag(special, "is_causal"),
        )
        if flag is not None
    ]
    causal = told[0] if told else None

    swa = _flag(special, "use_swa")
    if swa is None and special.get("swa_window_size") is not None:
        hint = "say in dflash_config whether use_swa is true or false"
        raise CheckpointError(f"`{where}` has swa_window_size without use_swa", hint=hint)
    if swa:  # it holds for all layers; their types still say which are causal
        if causal is None and len(set(types)) > 1:
            got = (
                f"`{where}` has use_swa over layers of two kinds, and nothing says which are causal"
            )
            raise CheckpointError(got, hint="say it by is_causal in its config.json")
        causal = "sliding_attention" in types if causal is None else causal
        window, types = special["swa_window_size"], ("sliding_attention",) * count
    window = None if window is None else _count("sliding_window", window)
    return {"layer_types": types, "sliding_window": window, "causal": causal}


def _rope(config: Mapping[str, Any], kinds: Iterable[str], where: str) -> Mapping[str, Any]:
    """Rotary parameters, flat; by kind of layer where two kinds that are there differ."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if new and old:
        differ = [name for name in old if name != "type" and name in new and new[name] != old[name]]
        if differ or new.get("rope_type", "default") != old.get(
            "rope_type", old.get("type", "default")
        ):
            hint = "keep the one that it was trained with"
            raise CheckpointError(
                f"`{where}` has rope_parameters and rope_scaling that differ", hint=hint
            )
    rope = dict(new or old)
    nested = {kind: rope.pop(kind) for kind in KINDS if kind in rope}
    if not nested:
        return _one_rope(rope, config, where)

    used: dict[str, Mapping[str, Any]] = {}
    for kind in sorted(set(kinds)):
        if not nested.get(kind):
            hint = "every kind of layer that is there needs rotary positions"
            raise CheckpointError(
                f"`{where}` gives no rope_parameters to its layers of {kind}", hint=hint
            )
        used[kind] = _one_rope({**rope, **nested[kind]}, config, where)
    first, *others = used.values()
    return used if any(other != first for other in others) else first


def _one_rope(given: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rotary parameters with their defaults, numbers as numbers. Raises CheckpointError for a rotation of another form."""
    rope = {name: value for name, value in given.items() if value is not None}
    theta = config.get("rope_theta")
    rope.setdefault("rope_theta", 10000.0 if theta is None else theta)
    for name in _ROPE_NUMBERS & rope.keys():
        number = _number(name, rope[name])
        if isinstance(rope[name], str):
            rope[name] = number
    for name in _ROPE_POSITIVE & rope.keys():
        if rope[name] <= 0:
            raise ValueError(f"{name!r}: {rope[name]!r}")

    kind = rope.pop("type", None)
    if kind is None and "rope_type" not in rope and rope.get("factor", 1) != 1:
        hint = "say the rope_type that it was trained with"
        raise CheckpointError(
            f"`{where}` scales its positions by {rope['factor']}, but names no rope_type", hint=hint
        )
    rope.setdefault("rope_type", kind or "default")

    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part is not None and float(part) != 1.0:
        hint = "whole heads are rotated here; if it was trained so, as z-lab's class does whatever the key says, remove the key"
        raise CheckpointError(
            f"`{where}` has partial_rotary_factor {part}, which is not supported", hint=hint
        )
    if rope.get("rope_dim") not in (None, config.get("head_dim")):
        hint = "whole heads are rotated here"
        raise CheckpointError(
            f"`{where}` has rope_dim {rope['rope_dim']}, which is not supported", hint=hint
        )
    return rope


def _reads(config: Mapping[str, Any], method: str, where: str) -> dict[str, Any]:
    """The block, its mask token, and the target's layers whose outputs are features."""
    own = config.get("flashdraft_config") or {}
    if method != "dflash":
        layers = own.get("target_layer_ids")
        layers = _eagle_layers(config, where) if layers is None else layers
        facts = {
            name: _count(name, own.get(name, usual), least=0) for name, usual in _USUAL.items()
        }
        return {**facts, "target_layer_ids": _layer_ids(layers)}

    mask, layers = _given(config, "mask_token_id"), _given(config, "target_layer_ids")
    total = _count("num_target_layers", config.get("num_target_layers") or 0, least=0)
    count = _count("num_hidden_layers", config["num_hidden_layers"])
    if mask is None and _given(config, "mask_token") is not None:
        hint = "put the token's id into its config.json: mask_token_id in dflash_config"
        raise CheckpointError(
            f"`{where}` names its mask token {_given(config, 'mask_token')!r}, but not its id",
            hint=hint,
        )
    if mask is None:
        raise KeyError("mask_token_id")
    if layers is None and not total:
        raise KeyError("target_layer_ids")
    chosen = spread_layers(total, count) if layers is None else _layer_ids(layers)
    if chosen and min(chosen) < 0:
        hint = "the outputs of the target's layers are read, from 0 on"
        raise CheckpointError(
            f"`{where}` reads layer {min(chosen)}, the target's embeddings, which is not supported",
            hint=hint,
        )
    facts = {
        "block_size": _count("block_size", _given(config, "block_size", 16), least=0),
        "num_target_layers": total,
    }
    return {
        **facts,
        "mask_token_id": _count("mask_token_id", mask, least=0),
        "target_layer_ids": chosen,
    }


def _eagle_layers(config: Mapping[str, Any], where: str) -> list[int]:
    """The layers whose outputs an EAGLE-3 folder reads, 0-based; empty: the usual ones.

    Ids at the top are those of transformers' hidden_states (vLLM, speculators): i is the output of layer i - 1. Ids in
    eagle_config are outputs (SpecForge, SGLang); which of them are not shows beside the target (methods/eagle3.py).
    """
    name = "eagle_aux_hidden_state_layer_ids"
    top, nested = config.get(name), (config.get("eagle_config") or {}).get(name)
    states = None if top is None else [layer - 1 for layer in _layer_ids(top)]
    outputs = None if nested is None else [*_layer_ids(nested)]
    if states and outputs and states != outputs:
        hint = "at the top ids count the embeddings as 0, in eagle_config they do not; keep the list that it was trained with"
        raise CheckpointError(
            f"`{where}` names its layers twice and differently: {top} and {nested}", hint=hint
        )
    layers = states or outputs or []
    if -1 in layers:
        raise CheckpointError(
            f"`{where}` reads the target's embeddings, which is not supported",
            hint="layers' outputs are read",
        )
    return layers


def _scales(config: Mapping[str, Any], method: str, where: str) -> dict[str, Any]:
    """What is done to embeddings and logits around the network, and EAGLE-3's switches."""
    multiplier = _number("output_multiplier", _given(config, "output_multiplier", 1.0))
    multiplier *= _number("logit_scale", _given(config, "logit_scale", 1.0))
    scale = _number("input_embedding_scale", _given(config, "input_embedding_scale", 1.0))
    cap = _number("final_logit_softcapping", _given(config, "final_logit_softcapping", 0.0))
    scales = {
        "input_embedding_scale": scale,
        "output_multiplier": multiplier,
        "final_logit_softcapping": cap or None,
    }
    if method == "draft_model" and (multiplier != 1 or scale != 1 or cap):
        got = f"`{where}` scales its embeddings or logits"
        raise CheckpointError(
            got, hint="a draft_model has its target's embedding and lm_head as they are"
        )
    if method != "eagle3":
        return scales
    nested = config.get("eagle_config") or {}
    for name in ("norm_before_residual", "norm_output"):
        told = _flag(config, name)
        scales[name] = bool(_flag(nested, name) if told is None else told)
    return scales | {"tied_head": bool(_flag(config, "tie_word_embeddings"))}


def spread_layers(num_target_layers: int, count: int) -> tuple[int, ...]:
    """The target layers whose outputs are features: evenly from 1 to L - 3 (DFlash 2602.06036; z-lab's rounding)."""
    if count == 1:
        return (num_target_layers // 2,)
    first, last = min(1, num_target_layers - 1), max(num_target_layers - 3, 0)
    return tuple(round(first + (last - first) * i / (count - 1)) for i in range(count))
