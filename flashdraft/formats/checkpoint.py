"""A drafter's files, in its method's own format: theirs are read here, ours are read by the big engines.

DFlash: z-lab's config.json (Qwen3's keys, `block_size`, `dflash_config`) and model.safetensors (11 tensors a layer and 3 more).
EAGLE-3: SafeAILab's and SpecForge's names; their configs say nothing of the target's depth, which ours add. Medusa: heads
alone. Native format is served format. Knows names, shapes and files; does not know how a drafter runs.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdraft.errors import CheckpointError, DraftMismatch, InvalidParameter
from flashdraft.files import output_folder, write_file, write_tensors
from flashdraft.formats.foreign import refuse_config, refuse_files, refuse_tensors
from flashdraft.hub import read_config
from flashdraft.models.layers import HEADS, scaled_length
from flashdraft.models.target import Target
from flashdraft.pretrained import foreign_file
from flashdraft.process import INTS

__all__ = ["OPTIONAL", "DraftConfig", "check_target", "read_draft", "spread_layers"]
__all__ += ["write_draft"]

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_FIXED = {  # by method: what its config.json always says
    "dflash": {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "tie_word_embeddings": True,
    },
    "eagle3": {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "tie_word_embeddings": False,
    },
    "medusa": {
        "architectures": ["MedusaDraftModel"],
        "model_type": "medusa",
        "tie_word_embeddings": True,
    },
    "draft_model": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
    },
}
OPTIONAL = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d")  # tensors that a file may hold
_KINDS = ("full_attention", "sliding_attention")
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
_TITLES = {
    "dflash": "DFlash",
    "eagle3": "EAGLE-3",
    "medusa": "Medusa",
    "draft_model": "draft_model",
}


@dataclass(frozen=True)
class DraftConfig:
    """The shape of a draft network and what it reads from its target."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    block_size: int  # anchor and masks
    mask_token_id: int
    target_layer_ids: tuple[
        int, ...
    ]  # 0-based: the outputs of these target layers are the features
    num_target_layers: int  # 0: not said
    rms_norm_eps: float = 1e-6
    rope_parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )  # or by kind
    max_position_embeddings: int = 2048
    layer_types: tuple[str, ...] = ()  # per layer; empty: full attention in all
    sliding_window: int | None = None
    causal: bool | None = (
        None  # of all layers, inside a block; None: sliding layers are, full ones are not
    )
    input_embedding_scale: float = 1.0  # of the block's embeddings
    output_multiplier: float = 1.0  # of the logits
    final_logit_softcapping: float | None = None  # behind it; None: the target's own
    norm_before_residual: bool = False  # eagle3: the residual is the normed state
    norm_output: bool = False  # eagle3: the state that is fed back is normed
    tied_head: bool = False  # eagle3: its lm_head is its own embedding
    attention_bias: bool = False
    draft_vocab_size: int | None = None  # rows of the reduced vocabulary d2t, if there is one
    dtype: str = "bfloat16"
    sequential_head: str | None = (
        None  # an addition of ours: `swiglu` (layers.py); not in the plain format
    )
    head_rank: int = 64
    method: str = "dflash"

    @classmethod
    def from_json(cls, config: Mapping[str, Any], where: str) -> Self:
        """Read config.json. Raises CheckpointError naming the missing or foreign key."""
        refuse_config(config, where)
        method = "dflash"
        try:
            method = _method_of(config)
            own = config.get("flashdraft_config") or {}
            given = _sizes(config, method)
            given |= _masks(config, method, where)
            kinds = given["layer_types"] or ("full_attention",)
            given["rope_parameters"] = _rope(config, kinds, where)
            given |= _reads(config, method, where)
            given |= _scales(config, method, where)
            return cls(
                **given,
                dtype=_dtype(config),
                sequential_head=own.get("sequential_head"),
                head_rank=_count("head_rank", own.get("head_rank", 64)),
                method=method,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            hint = "mend its config.json, or fetch it again"
            if isinstance(error, KeyError):
                hint = "a drafter's config.json has block_size and dflash_config with mask_token_id and target_layer_ids"
            got = f"`{where}` is not a {_TITLES.get(method, method)} drafter: its config lacks or garbles {error}"
            raise CheckpointError(got, hint=hint) from None

    @property
    def masks(self) -> tuple[tuple[int | None, bool], ...]:
        """Of every layer: its window, if there is one, and whether it is causal inside a block."""
        masks = []
        for kind in self.layer_types or ("full_attention",) * self.num_hidden_layers:
            sliding = kind == "sliding_attention"
            causal = sliding if self.causal is None else self.causal
            masks.append((self.sliding_window if sliding else None, causal))
        return tuple(masks)

    @property
    def ropes(self) -> dict[str, Mapping[str, Any]]:
        """Rotary parameters by kind of layer; one kind where all layers have the same."""
        nested = {
            kind: self.rope_parameters[kind] for kind in _KINDS if kind in self.rope_parameters
        }
        return nested or {"full_attention": self.rope_parameters}

    @property
    def trained_length(self) -> int:
        """The positions that it was trained on, rotary scaling included; it drafts beyond them, too."""
        return min(
            scaled_length(self.max_position_embeddings, rope) for rope in self.ropes.values()
        )

    def to_json(self) -> dict[str, Any]:
        """config.json as the method's authors write it; what theirs leave out stands in `flashdraft_config`."""
        config: dict[str, Any] = _FIXED[self.method] | {"hidden_act": "silu"} | vars(self)
        del config["method"]
        special = {
            "mask_token_id": config.pop("mask_token_id"),
            "target_layer_ids": list(config.pop("target_layer_ids")),
        }
        rope = dict(config.pop("rope_parameters"))
        if len(self.ropes) > 1:
            config["rope_parameters"] = {kind: dict(own) for kind, own in self.ropes.items()}
        else:
            config["rope_theta"] = rope.pop("rope_theta")
            config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        self._write_rare(config, special)
        own = {name: config.pop(name) for name in ("sequential_head", "head_rank")}
        if self.method == "dflash":
            config["use_sliding_window"] = self.sliding_window is not None
            config["layer_types"] = (
                list(self.layer_types) or ["full_attention"] * self.num_hidden_layers
            )
            config["dflash_config"] = special
        else:
            for name in ("layer_types", "sliding_window"):
                del config[name]
            own = (
                {name: config.pop(name) for name in ("block_size", "num_target_layers")}
                | special
                | {"method": self.method}
            )
        if self.method == "eagle3":  # the inputs of blocks are the outputs of those before
            config["eagle_config"] = {
                "eagle_aux_hidden_state_layer_ids": [i + 1 for i in self.target_layer_ids]
            }
        if self.sequential_head is not None or self.method != "dflash":
            config["flashdraft_config"] = own
        if self.draft_vocab_size is None:
            del config["draft_vocab_size"]
        return config

    def _write_rare(self, config: dict[str, Any], special: dict[str, Any]) -> None:
        """What few folders have is written only where it says something."""
        if (causal := config.pop("causal")) is not None:
            config["is_causal"] = causal
        for name, nothing in (
            ("input_embedding_scale", 1.0),
            ("output_multiplier", 1.0),
            ("final_logit_softcapping", None),
        ):
            value = config.pop(name)
            if value != nothing:
                place = special if self.method == "dflash" else config
                place[name] = value
        for name in ("norm_before_residual", "norm_output"):
            if not config[name]:
                del config[name]
        if config.pop("tied_head"):
            config["tie_word_embeddings"] = True

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the file must hold, with its shape."""
        h, i, d, r, eagle3 = (
            self.hidden_size,
            self.intermediate_size,
            self.head_dim,
            self.head_rank,
            self.method == "eagle3",
        )
        if self.method == "medusa":
            heads: dict[str, tuple[int, ...]] = {"weight": (h, h), "bias": (h,)}
            return {
                f"heads.{k}.{name}": shape
                for k in range(self.block_size - 1)
                for name, shape in heads.items()
            }
        q, kv, read = (
            self.num_attention_heads * d,
            self.num_key_value_heads * d,
            2 * h if eagle3 else h,
        )  # embedding and state
        attention = {
            "q_proj": (q, read),
            "k_proj": (kv, read),
            "v_proj": (kv, read),
            "o_proj": (h, q),
        }
        layer: dict[str, tuple[int, ...]] = {
            f"self_attn.{name}.weight": shape for name, shape in attention.items()
        }
        if self.attention_bias and not eagle3:
            layer |= {f"self_attn.{name}.bias": shape[:1] for name, shape in attention.items()}
        layer |= {
            "mlp.gate_proj.weight": (i, h),
            "mlp.up_proj.weight": (i, h),
            "mlp.down_proj.weight": (h, i),
        }
        layer |= {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
        layer |= {"hidden_norm.weight": (h,)} if eagle3 else {}
        layer |= (
            {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
            if self.method == "dflash"
            else {}
        )
        places = ["midlayer"] if eagle3 else [f"layers.{n}" for n in range(self.num_hidden_layers)]
        shapes = {f"{place}.{name}": shape for place in places for name, shape in layer.items()} | {
            "norm.weight": (h,)
        }
        if self.method != "draft_model":
            shapes["fc.weight"] = (h, (len(self.target_layer_ids) or 3 * eagle3) * h)
        shapes |= {"hidden_norm.weight": (h,)} if self.method == "dflash" else {}
        head = (
            {"gate_up": (2 * r, 2 * h), "down": (h, r)}
            if self.sequential_head and self.method == "dflash"
            else {}
        )
        return shapes | {f"sequential_head.{name}.weight": shape for name, shape in head.items()}


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
        types = tuple(_KINDS[n >= first] for n in range(count))
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
    nested = {kind: rope.pop(kind) for kind in _KINDS if kind in rope}
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


def read_draft(folder: Path) -> tuple[DraftConfig, dict[str, Tensor]]:
    """A drafter's config and tensors; every tensor is there with its shape, or CheckpointError says which is not."""
    refuse_files(folder)
    written = read_config(folder)
    config = DraftConfig.from_json(written, str(folder))
    if config.block_size < 2:
        raise CheckpointError(
            f"`{folder}` has block_size {config.block_size}",
            hint="a block is the anchor and 1 mask or more",
        )
    tensors = _read_tensors(folder, pickled=config.method == "eagle3")
    refuse_tensors(tensors, str(folder))
    config = _told_by_tensors(config, written, tensors, folder)
    kinds, count = config.layer_types, config.num_hidden_layers
    if odd := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise CheckpointError(
            f"`{folder}` has a layer of type {odd[0]}",
            hint="known: full_attention, sliding_attention",
        )
    if kinds and len(kinds) != count:
        raise CheckpointError(
            f"`{folder}` has {len(kinds)} layer_types for {count} layers",
            hint="its config.json is damaged",
        )
    if config.sequential_head not in (None, *HEADS):
        named = f"a sequential head {config.sequential_head!r}"
        raise CheckpointError(
            f"`{folder}` has {named}, which is not known", hint=f"known: {', '.join(HEADS)}"
        )
    h, v, rows = config.hidden_size, config.vocab_size, config.draft_vocab_size or config.vocab_size
    wanted, optional = (
        config.shapes(),
        {"embed_tokens.weight": (v, h), "lm_head.weight": (rows, h), "d2t": (rows,), "t2d": (v,)},
    )
    reduced = config.draft_vocab_size not in (None, config.vocab_size)
    for name, shape in (
        wanted | {n: s for n, s in optional.items() if n in tensors or (n == "d2t" and reduced)}
    ).items():
        if name not in tensors:
            raise CheckpointError(
                f"`{folder}` lacks the tensor {name}",
                hint="the folder is incomplete, or of another method",
            )
        if tuple(tensors[name].shape) != shape:
            got = f"shape {list(tensors[name].shape)}, its config.json asks for {list(shape)}"
            raise CheckpointError(f"{name} has {got}", hint="the two do not belong together")
    if unknown := sorted(set(tensors) - set(wanted) - set(optional)):
        raise CheckpointError(
            f"`{folder}` has a tensor {unknown[0]}, unknown to {config.method}",
            hint="it is of another method",
        )
    _check_numbers(tensors, str(folder))
    _check_heads(config, str(folder))
    if "d2t" in tensors:
        leads = tensors["d2t"].long() + torch.arange(len(tensors["d2t"]), **INTS)
        if bad := [int(token) for token in leads if not 0 <= token < config.vocab_size]:
            found = f"d2t leads to token {bad[0]} of a vocabulary of {config.vocab_size}"
            raise CheckpointError(f"`{folder}` is damaged: {found}", hint="fetch or write it again")
    return config, tensors


def _told_by_tensors(
    config: DraftConfig, written: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> DraftConfig:
    """What config.json leaves out and the tensors' shapes say: heads; and whether a tied head has what it is tied to."""
    norm, keys = (
        tensors.get("layers.0.self_attn.q_norm.weight"),
        tensors.get("layers.0.self_attn.k_proj.weight"),
    )
    if norm is not None and norm.ndim == 1 and written.get("head_dim") is None:
        config = replace(config, head_dim=len(norm))
    if (
        keys is not None
        and keys.ndim == 2
        and config.method == "dflash"
        and written.get("num_key_value_heads") is None
    ):
        config = replace(config, num_key_value_heads=len(keys) // config.head_dim)
    if config.tied_head and "lm_head.weight" in tensors:
        config = replace(config, tied_head=False)
    reduced = config.draft_vocab_size not in (None, config.vocab_size)
    if config.tied_head and ("embed_tokens.weight" not in tensors or reduced):
        lacks = "tie_word_embeddings is true, but it holds no whole embed_tokens to be its lm_head"
        raise CheckpointError(
            f"`{folder}`: {lacks}",
            hint="a folder with an lm_head.weight or a whole embed_tokens.weight works",
        )
    return config


def _check_heads(config: DraftConfig, where: str) -> None:
    """Raises CheckpointError for heads that no attention can have."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if config.method == "medusa":  # it has none
        return
    if heads % groups:
        got = f"`{where}` has num_attention_heads {heads} for num_key_value_heads {groups}"
        raise CheckpointError(got, hint="the first must be a multiple of the second")
    if config.head_dim % 2:
        raise CheckpointError(
            f"`{where}` has head_dim {config.head_dim}",
            hint="rotary positions turn pairs: it must be even",
        )


def _read_tensors(folder: Path, *, pickled: bool) -> dict[str, Tensor]:
    """All tensors of a folder, without the prefix `model.`; pickled: SafeAILab's .bin files are read, too, tensors only."""
    files = sorted(folder.glob("*.safetensors")) or (
        sorted(folder.glob("pytorch_model*.bin")) if pickled else []
    )
    if not files:
        raise CheckpointError(
            f"`{folder}` holds no .safetensors file",
            hint="pickled weights are not read; convert them",
        )
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in _tensors_of(path).items():
            bare = name.removeprefix("model.")
            if bare in tensors:
                got = f"`{folder}` holds {bare} twice, the second time in {path.name}"
                raise CheckpointError(got, hint="move the weights that are old out of the folder")
            tensors[bare] = tensor
    return tensors


def _tensors_of(path: Path) -> dict[str, Tensor]:
    found = foreign_file(path)
    if found is not None:
        raise CheckpointError(f"`{path}` is {found[0]}", hint=found[1])
    try:
        if path.suffix == ".bin":
            return _unpickled(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"`{path}` is damaged: {error}", hint="it may be cut short; fetch or write it again"
        ) from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Tensors by name, and nothing else: what would run code is refused by torch."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:  # its own words recommend to run the code
        hint = "pickles can run code, which never runs here: take the drafter as safetensors"
        raise CheckpointError(
            f"`{path}` holds more than tensors, or is no pickle", hint=hint
        ) from None
    is_plain = isinstance(loaded, dict) and all(
        isinstance(tensor, Tensor) for tensor in loaded.values()
    )
    if not is_plain:
        raise CheckpointError(
            f"`{path}` is no dictionary of tensors by name",
            hint="save its state_dict, or safetensors",
        )
    return dict(loaded)


def _check_numbers(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError for weights that are no numbers as they lie: packed ones, or what a failed training left."""
    for name, tensor in tensors.items():
        if name in ("d2t", "t2d"):
            continue
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"`{where}` holds {name} as {dtype}", hint="quantised drafters are not read"
            )
        wide = tensor if tensor.element_size() > 1 else tensor.float()
        if not wide.isfinite().all():
            got = f"{name} of `{where}` holds infinite numbers, or none at all (NaN)"
            raise CheckpointError(
                got, hint="its training failed, or the file is damaged: fetch or write it again"
            )


def write_draft(
    folder: Path, config: DraftConfig, tensors: Mapping[str, Tensor], readme: str | None = None
) -> None:
    """Write a drafter's folder; each file appears whole or not at all, config.json last.

    Raises InvalidParameter where a folder is no drafter's, but has a file of one of these names.
    """
    folder = output_folder(folder)
    _check_free(folder, tensors, readme)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config.dtype)
    stored = {
        n: (t.to(dtype) if t.is_floating_point() else t).contiguous().cpu()
        for n, t in tensors.items()
    }
    if readme is not None:
        write_file(folder / "README.md", readme.encode())
    write_tensors(folder / "model.safetensors", stored)
    write_file(folder / "config.json", (json.dumps(config.to_json(), indent=2) + "\n").encode())


def _check_free(folder: Path, tensors: Mapping[str, Tensor], readme: str | None) -> None:
    """Raises InvalidParameter where a file that is no drafter's would be written over."""
    if (folder / "config.json").exists():
        try:
            DraftConfig.from_json(read_config(folder), str(folder))
        except CheckpointError:
            raise _taken(folder / "config.json") from None
        return
    weights = folder / "model.safetensors"
    if weights.exists():  # config.json comes last: it may be missing after a kill
        try:
            with safe_open(weights, framework="pt") as file:
                is_ours = set(file.keys()) == set(tensors)
        except (SafetensorError, OSError):
            is_ours = False
        if not is_ours:
            raise _taken(weights)
    card = folder / "README.md"
    if readme is not None and card.exists() and not weights.exists() and not _is_card(card):
        raise _taken(card)


def _is_card(path: Path) -> bool:
    return path.read_bytes().startswith(b"---\nlibrary_name: flashdraft")


def _taken(path: Path) -> InvalidParameter:
    return InvalidParameter(
        f"`{path}` is no drafter's and would be written over",
        hint="name another folder for the drafter",
    )


def check_target(config: DraftConfig, target: Target, *, num_embeddings: int | None = None) -> None:
    """Raises DraftMismatch where this drafter cannot have been made for this target.

    Vocabularies of two lengths fit where their common ids do: one is cut or padded. num_embeddings: of a drafter's own.
    """
    layers, but = config.num_target_layers, f"but `{target.name}` has"
    hint = (
        f"it was trained for a target with {layers or 'other'} layers of size {config.hidden_size}"
    )
    if config.hidden_size != target.hidden_size:
        raise DraftMismatch(
            f"the draft has hidden size {config.hidden_size}, {but} {target.hidden_size}", hint=hint
        )
    if beyond := [
        i
        for i in config.target_layer_ids
        if not 0 <= i <= target.num_layers - (config.method == "dflash")
    ]:
        raise DraftMismatch(
            f"the draft wants hidden states of layer {beyond[0]}, {but} {target.num_layers} layers",
            hint=hint,
        )
    if layers and layers != target.num_layers:
        raise DraftMismatch(
            f"the draft was made for a target with {layers} layers, {but} {target.num_layers}",
            hint=hint,
        )
    rows, mask = num_embeddings or target.vocab_size, config.mask_token_id
    if config.method == "dflash" and not 0 <= mask < rows:
        hint = "its row of the embedding is missing: take the target whose vocabulary was not cut, or a drafter with embed_tokens"
        raise DraftMismatch(
            f"the draft fills its blocks with the mask token {mask}, {but} {rows} tokens", hint=hint
        )
