"""What a drafter is: the shape of its network, and what it reads from its target.

One description for all published formats. Knows shapes; does not know config.json (`written`),
tensors' names (`shapes`), files (`read`, `write`), nor how a drafter runs.
"""

from dataclasses import dataclass, field, replace
from typing import Self

from flashdraft.formats.foreign import Json
from flashdraft.formats.parse import KINDS
from flashdraft.formats.weights import MASK_ROW
from flashdraft.models.attention import Mask
from flashdraft.models.layers import scaled_length

__all__ = ["OPTIONAL", "DraftConfig"]

# Tensors that a folder may hold; the last is a file of its own there.
OPTIONAL = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d", MASK_ROW)


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
