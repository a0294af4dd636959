"""What a drafter's config.json says: the shape of its network and what it reads from its target.

DFlash: z-lab's config.json (Qwen3's keys, `block_size`, `dflash_config`) and model.safetensors (11 tensors a layer and 3 more).
EAGLE-3: SafeAILab's and SpecForge's names; their configs say nothing of the target's depth, which ours add. Medusa: heads
alone. Native format is served format. Knows names and shapes; does not know files, nor how a drafter runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from flashdraft.errors import CheckpointError
from flashdraft.formats.foreign import refuse_config
from flashdraft.formats.parse import (
    KINDS,
    _count,
    _dtype,
    _masks,
    _method_of,
    _reads,
    _rope,
    _scales,
    _sizes,
)
from flashdraft.models.layers import scaled_length

__all__ = ["OPTIONAL", "DraftConfig"]

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
            kind: self.rope_parameters[kind] for kind in KINDS if kind in self.rope_parameters
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
