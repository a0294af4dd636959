"""A drafter's files, in its method's own format: theirs are read here, ours are read by the big engines.

DFlash: z-lab's config.json (Qwen3's keys, `block_size`, `dflash_config`) and model.safetensors (11 tensors a layer and 3 more).
EAGLE-3: SafeAILab's and SpecForge's names; their configs say nothing of the target's depth, which ours add. Medusa: heads
alone. Native format is served format. Knows names, shapes and files; does not know how a drafter runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdraft.errors import CheckpointError, DraftMismatch, InvalidParameter
from flashdraft.files import output_folder, write_file, write_tensors
from flashdraft.hub import read_config
from flashdraft.layers import HEADS
from flashdraft.process import INTS
from flashdraft.target import Target

__all__ = ["OPTIONAL", "DraftConfig", "check_target", "is_draft", "read_draft", "spread_layers"]
__all__ += ["write_draft"]

_FOREIGN = ("dflash2", "dspark", "domino")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_target_layers")
_FIXED = {  # by method: what its config.json always says
    "dflash": {"architectures": ["DFlashDraftModel"], "model_type": "qwen3", "tie_word_embeddings": True},
    "eagle3": {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "tie_word_embeddings": False},
    "medusa": {"architectures": ["MedusaDraftModel"], "model_type": "medusa", "tie_word_embeddings": True},
    "draft_model": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
}
OPTIONAL = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d")  # tensors that a file may hold
_OPTIONAL: Any = {"rms_norm_eps": float, "max_position_embeddings": int, "attention_bias": bool, "draft_vocab_size": int}


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
    target_layer_ids: tuple[int, ...]  # 0-based: the outputs of these target layers are the features
    num_target_layers: int
    rms_norm_eps: float = 1e-6
    rope_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_position_embeddings: int = 2048
    layer_types: tuple[str, ...] = ()  # per layer; empty: full attention in all
    sliding_window: int | None = None
    attention_bias: bool = False
    draft_vocab_size: int | None = None  # rows of the reduced vocabulary d2t, if there is one
    dtype: str = "bfloat16"
    sequential_head: str | None = None  # an addition of ours: `swiglu` (layers.py); not in the plain format
    head_rank: int = 64
    method: str = "dflash"

    @classmethod
    def from_json(cls, config: Mapping[str, Any], where: str) -> Self:
        """Read config.json. Raises CheckpointError naming the missing or foreign key."""
        config, method = _as_dflash(config)
        named = " ".join(map(str, (*(config.get("architectures") or ()), config.get("model_type", "")))).lower()
        special = config.get("dflash_config") or {}
        found = [name for name in _FOREIGN if name in named or f"{name}_config" in config]
        found += ["sample_from_anchor"] if config.get("sample_from_anchor") or special.get("sample_from_anchor") else []
        if config.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"`{where}`: hidden_act is {config['hidden_act']!r}", hint="drafters have silu")
        if found:
            raise CheckpointError(f"`{where}` is a {found[0]} drafter, which is not supported", hint="DFlash v1 drafters are")
        own = config.get("flashdraft_config") or {}
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
        rope.setdefault("rope_type", rope.pop("type", "default"))
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            given: dict[str, Any] = {name: int(config[name]) for name in _SIZES}
            given |= {name: kind(config[name]) for name, kind in _OPTIONAL.items() if config.get(name) is not None}
            given |= {"num_key_value_heads": int(config.get("num_key_value_heads") or heads), "rope_parameters": rope}
            given |= {"head_dim": int(config.get("head_dim") or hidden // heads), "mask_token_id": int(special["mask_token_id"])}
            return cls(
                **given,
                block_size=int(config["block_size"] if "block_size" in config else special["block_size"]),
                target_layer_ids=tuple(int(i) for i in special["target_layer_ids"]),
                layer_types=tuple(config.get("layer_types") or ()),
                sliding_window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
                dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
                sequential_head=own.get("sequential_head"),
                head_rank=int(own.get("head_rank", 64)),
                method=method,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            hint = "a drafter's config.json has block_size and dflash_config with mask_token_id and target_layer_ids"
            raise CheckpointError(f"`{where}` is not a DFlash drafter: its config lacks or garbles {error}", hint=hint) from None

    def to_json(self) -> dict[str, Any]:
        """config.json as the method's authors write it; what theirs leave out stands in `flashdraft_config`."""
        config: dict[str, Any] = _FIXED[self.method] | {"hidden_act": "silu"} | vars(self)
        del config["method"]
        special = {"mask_token_id": config.pop("mask_token_id"), "target_layer_ids": list(config.pop("target_layer_ids"))}
        rope = dict(config.pop("rope_parameters"))
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        own = {name: config.pop(name) for name in ("sequential_head", "head_rank")}
        if self.method == "dflash":
            config["use_sliding_window"] = self.sliding_window is not None
            config["layer_types"] = list(self.layer_types) or ["full_attention"] * self.num_hidden_layers
            config["dflash_config"] = special
        else:
            for name in ("layer_types", "sliding_window"):
                del config[name]
            own = {name: config.pop(name) for name in ("block_size", "num_target_layers")} | special | {"method": self.method}
        if self.method == "eagle3":  # the inputs of blocks are the outputs of those before
            config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [i + 1 for i in self.target_layer_ids]}
        if self.sequential_head is not None or self.method != "dflash":
            config["flashdraft_config"] = own
        if self.draft_vocab_size is None:
            del config["draft_vocab_size"]
        return config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the file must hold, with its shape."""
        h, i, d, r, eagle3 = self.hidden_size, self.intermediate_size, self.head_dim, self.head_rank, self.method == "eagle3"
        if self.method == "medusa":
            heads: dict[str, tuple[int, ...]] = {"weight": (h, h), "bias": (h,)}
            return {f"heads.{k}.{name}": shape for k in range(self.block_size - 1) for name, shape in heads.items()}
        q, kv, read = self.num_attention_heads * d, self.num_key_value_heads * d, 2 * h if eagle3 else h  # embedding and state
        attention = {"q_proj": (q, read), "k_proj": (kv, read), "v_proj": (kv, read), "o_proj": (h, q)}
        layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
        if self.attention_bias and not eagle3:
            layer |= {f"self_attn.{name}.bias": shape[:1] for name, shape in attention.items()}
        layer |= {"mlp.gate_proj.weight": (i, h), "mlp.up_proj.weight": (i, h), "mlp.down_proj.weight": (h, i)}
        layer |= {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
        layer |= {"hidden_norm.weight": (h,)} if eagle3 else {}
        layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)} if self.method == "dflash" else {}
        places = ["midlayer"] if eagle3 else [f"layers.{n}" for n in range(self.num_hidden_layers)]
        shapes = {f"{place}.{name}": shape for place in places for name, shape in layer.items()} | {"norm.weight": (h,)}
        if self.method != "draft_model":
            shapes["fc.weight"] = (h, (len(self.target_layer_ids) or 3 * eagle3) * h)
        shapes |= {"hidden_norm.weight": (h,)} if self.method == "dflash" else {}
        head = {"gate_up": (2 * r, 2 * h), "down": (h, r)} if self.sequential_head and self.method == "dflash" else {}
        return shapes | {f"sequential_head.{name}.weight": shape for name, shape in head.items()}


def is_draft(config: Mapping[str, Any]) -> bool:
    """Whether this config.json is a drafter's, and not a language model's own."""
    lm = any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
    return not lm or any(key in config for key in ("dflash_config", "flashdraft_config", "draft_vocab_size"))


def _as_dflash(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """config.json in DFlash's terms, and the method that it is of."""
    named = " ".join(map(str, config.get("architectures") or ())).lower()
    own = config.get("flashdraft_config") or {}
    if not isinstance(own, Mapping):
        return config, "dflash"  # whose reader will say so
    unnamed = config.get("model_type") == "llama" and config.get("num_hidden_layers") == 1 and "draft_vocab_size" in config
    method = own.get("method") or ("eagle3" if unnamed or "eagle3" in named else "dflash")
    if method == "dflash":
        return config, method
    inputs = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids") or ()
    layers = own.get("target_layer_ids", [i - 1 for i in inputs])
    special = {"mask_token_id": own.get("mask_token_id", 0), "target_layer_ids": layers}
    facts = {"block_size": own.get("block_size", 6), "num_target_layers": own.get("num_target_layers", 0)}
    return {**config, **facts, "dflash_config": special}, method


def spread_layers(num_target_layers: int, count: int) -> tuple[int, ...]:
    """The target layers whose outputs are features: evenly from 1 to L - 3 (DFlash 2602.06036; z-lab's rounding)."""
    if count == 1:
        return (num_target_layers // 2,)
    first, last = min(1, num_target_layers - 1), max(num_target_layers - 3, 0)
    return tuple(round(first + (last - first) * i / (count - 1)) for i in range(count))


def read_draft(folder: Path) -> tuple[DraftConfig, dict[str, Tensor]]:
    """A drafter's config and tensors; every tensor is there with its shape, or CheckpointError says which is not."""
    config = DraftConfig.from_json(read_config(folder), str(folder))
    if config.block_size < 2:
        raise CheckpointError(f"`{folder}` has block_size {config.block_size}", hint="a block is the anchor and 1 mask or more")
    tensors = _read_tensors(folder, pickled=config.method == "eagle3")
    kinds, count = config.layer_types, config.num_hidden_layers
    if odd := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise CheckpointError(f"`{folder}` has a layer of type {odd[0]}", hint="known: full_attention, sliding_attention")
    if kinds and len(kinds) != count:
        raise CheckpointError(f"`{folder}` has {len(kinds)} layer_types for {count} layers", hint="its config.json is damaged")
    if config.sequential_head not in (None, *HEADS):
        named = f"a sequential head {config.sequential_head!r}"
        raise CheckpointError(f"`{folder}` has {named}, which is not known", hint=f"known: {', '.join(HEADS)}")
    h, v, rows = config.hidden_size, config.vocab_size, config.draft_vocab_size or config.vocab_size
    wanted, optional = config.shapes(), {"embed_tokens.weight": (v, h), "lm_head.weight": (rows, h), "d2t": (rows,), "t2d": (v,)}
    reduced = config.draft_vocab_size not in (None, config.vocab_size)
    for name, shape in (wanted | {n: s for n, s in optional.items() if n in tensors or (n == "d2t" and reduced)}).items():
        if name not in tensors:
            raise CheckpointError(f"`{folder}` lacks the tensor {name}", hint="the folder is incomplete, or of another method")
        if tuple(tensors[name].shape) != shape:
            got = f"shape {list(tensors[name].shape)}, its config.json asks for {list(shape)}"
            raise CheckpointError(f"{name} has {got}", hint="the two do not belong together")
    if unknown := sorted(set(tensors) - set(wanted) - set(optional)):
        raise CheckpointError(f"`{folder}` has a tensor {unknown[0]}, unknown to {config.method}", hint="it is of another method")
    if "d2t" in tensors:
        leads = tensors["d2t"].long() + torch.arange(len(tensors["d2t"]), **INTS)
        if bad := [int(token) for token in leads if not 0 <= token < config.vocab_size]:
            found = f"d2t leads to token {bad[0]} of a vocabulary of {config.vocab_size}"
            raise CheckpointError(f"`{folder}` is damaged: {found}", hint="fetch or write it again")
    return config, tensors


def _read_tensors(folder: Path, *, pickled: bool) -> dict[str, Tensor]:
    """All tensors of a folder, without the prefix `model.`; pickled: SafeAILab's .bin files are read, too, tensors only."""
    files = sorted(folder.glob("*.safetensors")) or (sorted(folder.glob("pytorch_model*.bin")) if pickled else [])
    if not files:
        raise CheckpointError(f"`{folder}` holds no .safetensors file", hint="pickled weights are not read; convert them")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            if path.suffix == ".bin":
                tensors |= torch.load(path, map_location="cpu", weights_only=True)
            else:
                with safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError, UnpicklingError) as error:
            raise CheckpointError(f"`{path}` is damaged: {error}", hint="it may be cut short; fetch or write it again") from None
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def write_draft(folder: Path, config: DraftConfig, tensors: Mapping[str, Tensor], readme: str | None = None) -> None:
    """Write a drafter's folder; each file appears whole or not at all, config.json last.

    Raises InvalidParameter where a folder is no drafter's, but has a file of one of these names.
    """
    folder = output_folder(folder)
    _check_free(folder, tensors, readme)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config.dtype)
    stored = {n: (t.to(dtype) if t.is_floating_point() else t).contiguous().cpu() for n, t in tensors.items()}
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
    return InvalidParameter(f"`{path}` is no drafter's and would be written over", hint="name another folder for the drafter")


def check_target(config: DraftConfig, target: Target) -> None:
    """Raises DraftMismatch where this drafter cannot have been made for this target."""
    layers, but = config.num_target_layers, f"but `{target.name}` has"
    hint = f"it was trained for a target with {layers} layers of size {config.hidden_size}"
    if config.hidden_size != target.hidden_size:
        raise DraftMismatch(f"the draft has hidden size {config.hidden_size}, {but} {target.hidden_size}", hint=hint)
    if beyond := [i for i in config.target_layer_ids if not 0 <= i <= target.num_layers - (config.method == "dflash")]:
        raise DraftMismatch(f"the draft wants hidden states of layer {beyond[0]}, {but} {target.num_layers} layers", hint=hint)
    if layers and layers != target.num_layers:
        raise DraftMismatch(f"the draft was made for a target with {layers} layers, {but} {target.num_layers}", hint=hint)
    if config.vocab_size > target.vocab_size or not 0 <= config.mask_token_id < target.vocab_size:
        got = f"{config.vocab_size} and the mask token {config.mask_token_id}, {but} {target.vocab_size}"
        raise DraftMismatch(f"the draft has a vocabulary of {got} tokens", hint="the two must share their tokenizer")
