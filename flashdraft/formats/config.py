"""What a drafter is: the shape of its network, and what it reads from its target.

One description for all published formats; each has a file of its own that reads it (`zlab`,
`dflash2`, `dspark`, `domino`, `speculators`, `eagle3`) and, where we write it, dresses config.json
so. The format that training writes is the one that the big engines serve. Medusa: heads alone.
Knows tensors' names and shapes; does not know files (`read`, `write`), nor how a drafter runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from flashdraft.errors import CheckpointError
from flashdraft.formats import dflash2, domino, dspark, parse, speculators, zlab
from flashdraft.formats.eagle3 import eagle3_fields, eagle3_json, eagle3_shapes
from flashdraft.formats.foreign import Json, refuse_switches
from flashdraft.formats.parse import KINDS, Fields
from flashdraft.formats.recognise import TITLES, Format, recognise
from flashdraft.formats.weights import MASK_ROW, Shapes, told_by_shapes
from flashdraft.models.attention import Mask
from flashdraft.models.layers import scaled_length

__all__ = ["OPTIONAL", "DraftConfig"]

# Tensors that a folder may hold; the last is a file of its own there.
OPTIONAL = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d", MASK_ROW)

Shape = tuple[int, ...]

_READERS = {  # of block drafters: kind -> the fields of its flat config.json
    "dflash": zlab.read,
    "dflash2": dflash2.read,
    "dspark": dspark.read,
    "domino": domino.read,
}
_SILENT = ("num_key_value_heads", "head_dim")  # what z-lab's folders may leave out
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
_SIZES = (  # in the order in which config.json has them
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


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
    block_size: int  # nodes of a proposal: the anchor, and a draft for each row that predicts
    mask_token_id: int
    target_layer_ids: tuple[int, ...]  # 0-based: these layers' outputs are the features
    num_target_layers: int  # 0: not said
    rms_norm_eps: float = 1e-6
    rope_parameters: Json = field(  # or by kind of layer
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    max_position_embeddings: int = 2048
    layer_types: tuple[str, ...] = ()  # per layer; empty: full attention in all
    sliding_window: int | None = None
    # Of all layers, inside a block; None: sliding layers are causal, full ones are not.
    causal: bool | None = None
    input_embedding_scale: float = 1.0  # of the block's embeddings
    output_multiplier: float = 1.0  # of the logits
    final_logit_softcapping: float | None = None  # behind the multiplier; None: the target's own
    # EAGLE-3's switches (formats/eagle3.py)
    norm_before_residual: bool = False  # the residual is the normed state
    norm_output: bool = False  # the state that is fed back is normed
    norm_before_fc: bool = False  # one norm over all features side by side
    fc_norm: bool = False  # one norm each
    fused: bool = True  # False: the target's last state as it is, without fc
    qk_norm: bool = False  # queries and keys are normed
    tied_head: bool = False  # its lm_head is its own embedding
    target_hidden_size: int | None = None  # of its features; None: its own
    ids_by_target: bool = False  # what its layer ids count shows beside the target
    attention_bias: bool = False
    draft_vocab_size: int | None = None  # rows of the reduced vocabulary d2t, if there is one
    dtype: str = "bfloat16"
    # Row k of a block predicts the token at its own place + 1, the anchor's row too (DeepSpec,
    # DSpark); else the token at its own place, and the anchor's row nothing (z-lab, DFlash 2).
    anchor_first: bool = False
    conv_kernel_size: int = 0  # taps of DFlash 2's convolutions along a block; 0: it has none
    conv_group_size: int = 0  # channels that share a dynamic kernel
    sequential_head: str | None = None  # one of HEADS (models/heads.py)
    head_rank: int = 64  # its inner size; domino: the width of its second embedding
    head_choices: int = 16  # selector: candidates of a row
    head_states: int = 0  # domino: the size of its GRU's state
    confidence_head: bool = False  # DSpark: of how likely a row is accepted
    confidence_with_markov: bool = False  # it reads the embedding of the token before, too
    # speculators: the target's embedding and lm_head as they lie in its file, without the scale and
    # the cap of its family (Gemma).
    raw_tables: bool = False
    method: str = "dflash"

    @classmethod
    def from_json(cls, config: Json, where: str, shapes: Shapes | None = None) -> Self:
        """Read config.json; shapes: of the tensors beside it, which tell what it leaves out.

        Raises CheckpointError naming the missing or foreign key.
        """
        kind = "dflash"
        shapes = shapes or {}
        try:
            form = recognise(config, shapes, where)
            kind = form.kind
            if kind in _READERS:
                return cls(**_block_fields(config, form, shapes, where))
            flat = config
            if form.publisher == "speculators":
                flat = speculators.one_rope(speculators.unwrapped(config, shapes, where))
            refuse_switches(flat, where, kind=kind)
            fields = parse.other_fields(flat, kind, where)
            if kind == "eagle3":
                fields |= eagle3_fields(flat, where, wrapper=speculators.wrapper_of(config))
            return cls(**fields)
        except KeyError as error:
            hint = (
                "a drafter's config.json has block_size and dflash_config with mask_token_id "
                "and target_layer_ids"
            )
            raise _garbled(kind, error, where, hint=hint) from None
        except (AttributeError, TypeError, ValueError) as error:
            hint = "mend its config.json, or fetch it again"
            raise _garbled(kind, error, where, hint=hint) from None

    def without_heads(self) -> Self:
        """The same network without its heads, drafting the whole vocabulary."""
        return replace(
            self,
            draft_vocab_size=None,
            sequential_head=None,
            head_rank=64,
            head_choices=16,
            head_states=0,
            confidence_head=False,
            confidence_with_markov=False,
        )

    @property
    def block_rows(self) -> int:
        """Rows of a block: the anchor and masks. Where the anchor's row predicts, they are one
        fewer than the nodes of a proposal; Domino feeds one more, whose guess nobody takes."""
        if self.anchor_first and self.sequential_head != "domino":
            return self.block_size - 1
        return self.block_size

    @property
    def first_row(self) -> int:
        """The first row of a block that predicts; `block_size` - 1 rows from here on do."""
        return 0 if self.anchor_first else 1

    @property
    def num_features(self) -> int:
        """How many of the target's states are read at each position."""
        if self.method != "eagle3":
            return len(self.target_layer_ids)
        if not self.fused:
            return 1
        return len(self.target_layer_ids) or 3  # the usual layers: eagle3.fused_layers

    @property
    def feature_size(self) -> int:
        """The target's hidden size."""
        return self.target_hidden_size or self.hidden_size

    @property
    def masks(self) -> tuple[Mask, ...]:
        """Of every layer: its window, if there is one, and whether it is causal inside a block."""
        masks = []
        for kind in self.layer_types or ("full_attention",) * self.num_hidden_layers:
            sliding = kind == "sliding_attention"
            window = self.sliding_window if sliding else None
            causal = sliding if self.causal is None else self.causal
            masks.append(Mask(window, causal))
        return tuple(masks)

    @property
    def ropes(self) -> dict[str, Json]:
        """Rotary parameters by kind of layer; one kind where all layers have the same."""
        by_kind: dict[str, Json] = {}
        for kind in KINDS:
            if kind in self.rope_parameters:
                by_kind[kind] = self.rope_parameters[kind]

        if not by_kind:
            return {"full_attention": self.rope_parameters}
        return by_kind

    @property
    def trained_length(self) -> int:
        """Positions that it was trained on, rotary scaling included; it drafts beyond them, too."""
        limit = self.max_position_embeddings
        return min(scaled_length(limit, rope) for rope in self.ropes.values())

    def to_json(self) -> Fields:
        """config.json as the method's authors write it; what theirs leaves out stands in
        `flashdraft_config`. The order of the keys is part of the file."""
        is_dflash = self.method == "dflash"
        config: Fields = {**_FIXED[self.method], "hidden_act": "silu"}
        if self.tied_head:
            config["tie_word_embeddings"] = True

        for name in _SIZES:
            config[name] = getattr(self, name)
        if is_dflash:
            config["block_size"] = self.block_size
            config["num_target_layers"] = self.num_target_layers
        config["rms_norm_eps"] = self.rms_norm_eps
        config["max_position_embeddings"] = self.max_position_embeddings
        if is_dflash:
            full = ["full_attention"] * self.num_hidden_layers
            config["layer_types"] = list(self.layer_types) or full
            config["sliding_window"] = self.sliding_window
        if self.method == "eagle3":
            config |= eagle3_json(self)
        config["attention_bias"] = self.attention_bias
        if self.draft_vocab_size is not None:
            config["draft_vocab_size"] = self.draft_vocab_size
        config["dtype"] = self.dtype
        config |= self._rope_json()
        if self.causal is not None:
            config["is_causal"] = self.causal

        reads: Fields = {
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.target_layer_ids),
        }
        if is_dflash:
            config["use_sliding_window"] = self.sliding_window is not None
            config["dflash_config"] = reads | self._scales_json()
            _dress(self, config)
            return config

        config |= self._scales_json()
        if self.ids_by_target:  # eagle_config has them
            del reads["target_layer_ids"]
        own: Fields = {
            "block_size": self.block_size,
            "num_target_layers": self.num_target_layers,
            **reads,
            "method": self.method,
        }
        for name in ("qk_norm", "raw_tables"):
            if getattr(self, name):
                own[name] = True
        config["flashdraft_config"] = own
        return config

    def _rope_json(self) -> Fields:
        ropes = self.ropes
        if len(ropes) > 1:
            return {"rope_parameters": {kind: dict(rope) for kind, rope in ropes.items()}}

        scaling = dict(self.rope_parameters)
        theta = scaling.pop("rope_theta")
        is_scaled = scaling.get("rope_type", "default") != "default"
        return {"rope_theta": theta, "rope_scaling": scaling if is_scaled else None}

    def _scales_json(self) -> Fields:
        """What few folders have: written only where it says something."""
        scales: Fields = {}
        if self.input_embedding_scale != 1.0:
            scales["input_embedding_scale"] = self.input_embedding_scale
        if self.output_multiplier != 1.0:
            scales["output_multiplier"] = self.output_multiplier
        if self.final_logit_softcapping is not None:
            scales["final_logit_softcapping"] = self.final_logit_softcapping
        return scales

    def shapes(self) -> dict[str, Shape]:
        """Every tensor that the file must hold, with its shape."""
        hidden = self.hidden_size
        shapes: dict[str, Shape] = {}
        if self.method == "medusa":
            for head in range(self.block_size - 1):
                shapes[f"heads.{head}.weight"] = (hidden, hidden)
                shapes[f"heads.{head}.bias"] = (hidden,)
            return shapes

        if self.method == "eagle3":
            return eagle3_shapes(self)

        layer = self._layer_shapes()
        for index in range(self.num_hidden_layers):
            for name, shape in layer.items():
                shapes[f"layers.{index}.{name}"] = shape
        shapes["norm.weight"] = (hidden,)
        if self.method == "draft_model":
            return shapes

        shapes["fc.weight"] = (hidden, self.num_features * hidden)
        shapes["hidden_norm.weight"] = (hidden,)
        shapes |= self._convolution_shapes()
        shapes |= self._head_shapes()
        return shapes

    def _convolution_shapes(self) -> dict[str, Shape]:
        """DFlash 2's, two a layer: around the attention and around the MLP."""
        taps = self.conv_kernel_size
        if not taps:
            return {}

        groups = self.hidden_size // self.conv_group_size
        shapes: dict[str, Shape] = {}
        for index in range(self.num_hidden_layers):
            for name in ("attention_conv", "mlp_conv"):
                place = f"layers.{index}.{name}"
                shapes[f"{place}.base_kernel"] = (2, taps, self.hidden_size)
                shapes[f"{place}.kernel_projection.weight"] = (2 * taps * groups, self.hidden_size)
        return shapes

    def _head_shapes(self) -> dict[str, Shape]:
        """The sequential head's under the names of its format, and the confidence head's."""
        kind = self.sequential_head
        hidden = self.hidden_size
        rank = self.head_rank
        vocab_size = self.vocab_size
        shapes: dict[str, Shape] = {}
        if kind == "swiglu":
            shapes["sequential_head.gate_up.weight"] = (2 * rank, 2 * hidden)
            shapes["sequential_head.down.weight"] = (hidden, rank)
        elif kind == "selector":
            shapes["candidate_selector.predecessor_codebook"] = (vocab_size, rank)
            shapes["candidate_selector.successor_codebook"] = (vocab_size, rank)
            shapes["candidate_selector.hidden_projection.weight"] = (rank, hidden)
        elif kind in ("markov", "markov_gated", "markov_rnn"):
            shapes["markov_head.markov_w1.weight"] = (vocab_size, rank)
            shapes["markov_head.markov_w2.weight"] = (self.draft_vocab_size or vocab_size, rank)
        elif kind == "domino":
            states = self.head_states
            shapes["prefix_gru.weight_ih_l0"] = (3 * states, hidden)
            shapes["prefix_gru.weight_hh_l0"] = (3 * states, states)
            shapes["embed_proj.0.weight"] = (rank, hidden + states)
            shapes["embed_proj.2.weight"] = (vocab_size, rank)
        if kind == "markov_gated":
            shapes["markov_head.gate_proj.weight"] = (rank, hidden + rank)
            shapes["markov_head.gate_proj.bias"] = (rank,)
        if kind == "markov_rnn":
            shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + hidden)
            shapes["markov_head.joint_proj.bias"] = (3 * rank,)
        if self.confidence_head:
            width = hidden + rank if self.confidence_with_markov else hidden
            shapes["confidence_head.proj.weight"] = (1, width)
            shapes["confidence_head.proj.bias"] = (1,)
        return shapes

    def _layer_shapes(self) -> Mapping[str, Shape]:
        """The tensors of one decoder layer."""
        hidden = self.hidden_size
        inner = self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim

        shapes: dict[str, Shape] = {
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
        }
        if self.attention_bias:
            shapes["self_attn.q_proj.bias"] = (queries,)
            shapes["self_attn.k_proj.bias"] = (keys,)
            shapes["self_attn.v_proj.bias"] = (keys,)
            shapes["self_attn.o_proj.bias"] = (hidden,)
        shapes["mlp.gate_proj.weight"] = (inner, hidden)
        shapes["mlp.up_proj.weight"] = (inner, hidden)
        shapes["mlp.down_proj.weight"] = (hidden, inner)
        shapes["input_layernorm.weight"] = (hidden,)
        shapes["post_attention_layernorm.weight"] = (hidden,)
        if self.method == "dflash":
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes


def _block_fields(config: Json, form: Format, shapes: Shapes, where: str) -> Fields:
    """Of the config.json of a block drafter."""
    flat = dict(config)
    if form.publisher == "speculators":
        flat = speculators.flat(config, form.anchor_first, shapes, where)
    told = told_by_shapes(shapes)
    for name in _SILENT:
        if flat.get(name) is None and name in told:
            flat[name] = told[name]

    refuse_switches(flat, where)
    if form.publisher == "FlashDraft":  # flashdraft_config has the layout
        return zlab.read(flat, where)
    return _READERS[form.kind](flat, where, anchor_first=form.anchor_first)


def _dress(draft: DraftConfig, config: Fields) -> None:
    """Make z-lab's config.json, which is of version 1, the one of the drafter's own format; what
    none of them says stands in `flashdraft_config`."""
    is_told = True
    if dflash2.fits(draft):
        dflash2.dress(draft, config)
    elif dspark.fits(draft):
        dspark.dress(draft, config)
    elif domino.fits(draft):
        domino.dress(draft, config)
    else:
        is_told = False
    own = zlab.own_json(draft, heads=not is_told)
    if own:
        config["flashdraft_config"] = own


def _garbled(method: str, error: Exception, where: str, *, hint: str) -> CheckpointError:
    title = TITLES.get(method, method)
    got = f"`{where}` is not a {title} drafter: its config lacks or garbles {error}"
    return CheckpointError(got, hint=hint)
