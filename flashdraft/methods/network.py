"""What the draft networks of all methods share: their files, their rotary positions, the target's
embedding, and a head over a draft vocabulary.

A method's file adds its own modules. Knows tensors, names and the target's two tables; does not
know how a method drafts.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft import hub
from flashdraft.errors import CheckpointError, DraftMismatch, InvalidParameter, first_line
from flashdraft.formats.config import OPTIONAL, DraftConfig
from flashdraft.formats.foreign import Json
from flashdraft.formats.match import check_target
from flashdraft.formats.parse import Fields
from flashdraft.formats.read import read_draft
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.formats.weights import MASK_ROW
from flashdraft.formats.write import write_draft
from flashdraft.formats.zlab import Vocabulary
from flashdraft.models import native
from flashdraft.models.heads import SwigluHead
from flashdraft.models.layers import (
    ROPE_TYPES,
    Linear,
    Rotary,
    pack,
    rotary_of,
    rotary_table,
)
from flashdraft.models.modules import Frequencies, rotary_frequencies
from flashdraft.models.target import Target
from flashdraft.process import BOOLS, INTS, undisturbed
from flashdraft.types import Drafter

__all__ = ["DRAFT_KERNEL", "DraftHead", "DraftNetwork", "Likely", "network_shape", "top"]

DRAFT_KERNEL = "int8"  # a draft may be rounded: that can cost accepted length, never the text

_LOG = logging.getLogger("flashdraft")  # one line on stderr, unless the caller has other plans
_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "attention_bias",
)


class Likely(NamedTuple):
    """The likeliest tokens of some positions, likeliest first."""

    tokens: Tensor  # [..., n] ids of the target
    scores: Tensor  # [..., n] their log-probabilities


class Top(NamedTuple):
    """The largest values along the last dimension, largest first."""

    values: Tensor
    indices: Tensor


def top(values: Tensor, count: int) -> Top:
    """The `count` largest along the last dimension, or all where there are fewer."""
    return Top(*values.topk(min(count, values.shape[-1]), dim=-1))


class DraftNetwork(nn.Module):
    """A draft network; its modules carry the tensor names of its method's published format
    (formats/config.py)."""

    method: str
    frequencies: dict[str, Frequencies]  # by kind of layer, where a method has positions

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = replace(config, method=self.method)
        self.sequential_head: SwigluHead | None = None  # dflash's addition
        self.extras: dict[str, Tensor] = {}  # the format's OPTIONAL tensors, by name

    @classmethod
    @undisturbed
    @torch.random.fork_rng(devices=[])  # new weights are drawn, and then replaced
    def from_pretrained(cls, name: str | Path, vocabulary: Vocabulary | None = None) -> Self:
        """A drafter's folder or hub id, in float32. Raises CheckpointError or ModelNotFound.

        vocabulary: the target's `get_vocab`, for a drafter that tells its mask token by name.
        """
        folder = hub.resolve(str(name))
        if not isinstance(folder, Path):
            got = f"`{name}` is a GGUF file, not a drafter's folder"
            raise CheckpointError(got, hint="give the folder it was made from")

        config, tensors = read_draft(folder, vocabulary)
        if config.method != cls.method:
            got = f"`{name}` is a drafter of {config.method}, not of {cls.method}"
            hint = (
                f"give a drafter of {cls.method}, or load it by its name: "
                "`flashdraft.load` knows the method of a folder"
            )
            raise CheckpointError(got, hint=hint)

        model = cls(config)
        for extra in OPTIONAL:
            if extra in tensors:
                model.extras[extra] = tensors.pop(extra)
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return model.eval()

    def save_pretrained(
        self, folder: str | Path, *, readme: str | None = None, plain: bool = False
    ) -> None:
        """Write config.json and model.safetensors, in config.dtype; `readme` is the model card.

        plain: without the optional tensors, for engines that know only a method's own
        (DFlash: 11 a layer and 3 more). Raises InvalidParameter where that is another network.
        """
        config = self.config
        if plain and "mask_embedding" in self.extras:
            got = "its mask token has an embedding of its own, which the plain format cannot hold"
            raise InvalidParameter(got, hint="save it as it is, without `plain`")
        if plain:
            config = config.without_heads()

        tensors = {}
        known = tensor_shapes(config)
        for name, tensor in self.state_dict().items():
            if name in known:
                tensors[name] = tensor
        if not plain:
            tensors |= self.extras
        write_draft(Path(folder), config, tensors, readme)

    def push_to_hub(
        self,
        repo: str,
        *,
        readme: str | None = None,
        plain: bool = False,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Save into a model repository of the hub. private, token and errors: those of hub.push."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, readme=readme, plain=plain)
            return hub.push(Path(folder), repo, what=self.method, private=private, token=token)

    def reduce_vocabulary(self, tokens: Tensor) -> None:
        """Draft only these tokens [n] of the target's vocabulary (ascending): the lm_head's cost
        falls in proportion."""
        known = torch.zeros(self.config.vocab_size, **BOOLS)
        known[tokens] = True
        self.extras["d2t"] = tokens - torch.arange(len(tokens), **INTS)
        self.extras["t2d"] = known
        self.config = replace(self.config, draft_vocab_size=len(tokens))

    def add_rotary(self) -> None:
        """Make the frequencies that `rotary` reads, one for each kind of layer.

        Raises CheckpointError.
        """
        self.frequencies = {}
        for kind, rope in self.config.ropes.items():
            self.frequencies[kind] = self._frequencies({"rope_type": "default", **rope})

    def _frequencies(self, rope: Json) -> Frequencies:
        rope_type = rope["rope_type"]
        if rope_type not in ROPE_TYPES:
            got = f"rotary scaling {rope_type!r} is not supported in a drafter"
            raise CheckpointError(got, hint=f"known: {', '.join(ROPE_TYPES)}")

        try:
            return rotary_frequencies(network_shape(self.config, rope))
        except (KeyError, TypeError, ValueError) as error:
            got = f"rotary scaling {rope_type!r} lacks or garbles {first_line(error)}"
            hint = "rope_parameters in its config.json are damaged"
            raise CheckpointError(got, hint=hint) from None

    def rotary(self, positions: Tensor, kind: str | None = None) -> tuple[Tensor, Tensor]:
        """What `apply_rotary` takes for [n, heads, head_dim] at positions [n].

        kind: of layer, where they differ.
        """
        if kind is None:
            kind = next(iter(self.frequencies))
        inv_freq, scaling = self.frequencies[kind]
        dtype = next(self.parameters()).dtype
        cos, sin = rotary_of(positions, inv_freq.to(positions.device), scaling)
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]

    @property
    def cos(self) -> Tensor:
        """Of the positions that it was trained on [positions, head_dim]."""
        inv_freq, scaling = next(iter(self.frequencies.values()))
        num_positions = self.config.max_position_embeddings
        cos, _ = rotary_table(inv_freq, num_positions, scaling, torch.float32)
        return cos

    def rotaries(self, like: Tensor) -> dict[str, Rotary]:
        """Growing tables by kind of layer, in the dtype and on the device of `like`."""
        return {kind: Rotary(*own, like) for kind, own in self.frequencies.items()}

    def drafters(self, target: Target) -> Callable[..., Drafter]:
        """What makes drafters beside this target: the weights are packed once; takes block_size and
        tree_nodes, or None."""
        raise NotImplementedError


def network_shape(config: DraftConfig, rope: Json) -> Fields:
    """What transformers' config of a network of this shape takes. rope: flat rotary parameters."""
    shape: Fields = {name: getattr(config, name) for name in _SHAPE}
    shape["rope_parameters"] = {"rope_type": "default", **rope}
    return shape


class DraftHead:
    """Embedding, lm_head and vocabulary of a draft network beside one target.

    Raises DraftMismatch where they do not fit.
    """

    def __init__(self, model: DraftNetwork, target: Target) -> None:
        config = model.config
        embedding = model.extras.get("embed_tokens.weight")
        num_embeddings = None if embedding is None else len(embedding)
        check_target(config, target, num_embeddings=num_embeddings)

        self.config = config
        self.target = target
        self.probe = target.embed(torch.zeros(1, **INTS))  # the dtype and device of everything here
        self.native = native.usable(self.probe)  # whether our kernels do the heavy work
        self.embedding = self._own_embedding(embedding)
        self.mask_row = self._own_mask_row(model.extras.get(MASK_ROW))

        # The lm_head: the file's own, or its embedding, or (None) the target's. The vocabulary:
        # target ids of the draft ids; None: they are the target's own.
        stored = model.extras.get("lm_head.weight")
        weight = embedding if stored is None and config.tied_head else stored
        self.vocabulary: Tensor | None = None
        self.num_drafts = target.vocab_size  # draft ids: what there are logits of
        self._known: Tensor | None = None  # which of the file's draft ids lead to the target's
        offsets = model.extras.get("d2t")
        if offsets is not None:
            ids = offsets.long() + torch.arange(len(offsets), **INTS)
            self._known = self._leading_to_target(ids)
            self.vocabulary = ids[self._known].to(self.probe.device)
            self.num_drafts = len(self.vocabulary)
            weight = target.head_weight(self.vocabulary) if weight is None else weight[self._known]
        elif weight is not None:
            weight = weight[: target.vocab_size]
            self.num_drafts = len(weight)
        self.head: Linear | None = None if weight is None else self.packed(weight)

        self.own_head: Tensor | None = None  # as it is, for rows that a sequential head asks for
        if stored is not None and weight is not None and model.sequential_head is not None:
            self.own_head = weight.to(self.probe)

        cap = config.final_logit_softcapping
        if not cap and not config.raw_tables:
            cap = getattr(target.config, "final_logit_softcapping", None)
        self.cap = float(cap) if cap else None

        self.nbytes = 0
        for table in (self.embedding, self.head):
            if table is not None:
                self.nbytes += table.nbytes
        self._told = False

    def _own_embedding(self, stored: Tensor | None) -> Tensor | None:
        """The file's own table, as long as the target's vocabulary at least; None: the target's
        embedding serves.

        A family that scales its embedding (Gemma) trained its drafters on the scaled one.
        """
        target = self.target
        target_scales = self._target_scales()
        draft_scales = self.config.input_embedding_scale != 1
        if stored is None:
            if target_scales and draft_scales:
                got = f"the draft scales the embedding of `{target.name}`, which scales it already"
                hint = (
                    "readers of input_embedding_scale differ here: "
                    "the drafter needs embed_tokens of its own"
                )
                raise DraftMismatch(got, hint=hint)
            return None

        if target_scales and not draft_scales and self.config.method == "dflash":
            num_common = min(len(stored), target.vocab_size)
            rows = target.embedding_rows(torch.arange(num_common, **INTS))
            is_copy = torch.equal(stored[: len(rows)].to(rows), rows)
            if is_copy:
                return None
            got = (
                f"the draft has an embedding of its own, beside `{target.name}`, "
                "which scales its embedding"
            )
            hint = "say in its dflash_config by how much: input_embedding_scale"
            raise DraftMismatch(got, hint=hint)

        # Ids that it was not trained with are nothing to it.
        num_missing = max(target.vocab_size - len(stored), 0)
        return F.pad(stored, (0, 0, 0, num_missing)).to(self.probe)

    def _target_scales(self) -> bool:
        """Whether the embedding that the draft reads is more than the rows of a table."""
        if self.config.raw_tables:
            return False
        some = torch.arange(min(self.target.vocab_size, 8), **INTS)
        rows = self.target.embedding_rows(some).to(self.probe)
        return not torch.equal(self.target.embed(some), rows)

    def _own_mask_row(self, stored: Tensor | None) -> Tensor | None:
        """The mask token's row [hidden] where it has one of its own; None: as all tokens."""
        if stored is None:
            return None

        if self._target_scales() and self.embedding is None:
            got = f"the mask token has a row of its own, beside `{self.target.name}`"
            hint = "which scales its embedding: readers differ in whether the row is scaled, too"
            raise DraftMismatch(got, hint=hint)
        return stored.detach().flatten().to(self.probe)

    def _leading_to_target(self, ids: Tensor) -> Tensor:
        """Which of these ids the target has: what it lacks is never proposed."""
        known = ids < self.target.vocab_size
        if not bool(known.any()):
            got = (
                f"the draft's vocabulary lies beyond the {self.target.vocab_size} tokens "
                f"of `{self.target.name}`"
            )
            raise DraftMismatch(got, hint="the two must share their tokenizer")
        return known

    def packed(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        if bias is not None:
            bias = bias.detach().to(self.probe)
        return pack(weight.detach().to(self.probe), bias, kernel=DRAFT_KERNEL)

    def of_targets(self, table: Tensor) -> Tensor:
        """A file's rows of target ids, as many as the target has: those that it lacks are zero."""
        return _of_length(table, self.target.vocab_size)

    def of_drafts(self, table: Tensor) -> Tensor:
        """A file's rows of its draft ids: those of the draft ids here."""
        if self._known is not None:
            return table[self._known.to(table.device)]
        return _of_length(table, self.num_drafts)

    @property
    def all_ids(self) -> Tensor:
        """Target ids of all draft ids [n]."""
        if self.vocabulary is not None:
            return self.vocabulary
        return torch.arange(self.num_drafts, dtype=torch.int64, device=self.probe.device)

    def tell(self, end: int) -> None:
        """Say once where drafts go on beyond what the network was trained on.

        end: of the positions that they read.
        """
        if end > self.config.trained_length and not self._told:
            self._told = True
            _LOG.warning(
                "the drafter was not trained from position %d on: "
                "it drafts on, and may be accepted less",
                self.config.trained_length,
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embedding, or the drafter's own if its file holds one; of the mask token the
        row that the file may have for it."""
        if self.embedding is not None:
            rows = F.embedding(tokens.to(self.embedding.device), self.embedding)
        elif self.config.raw_tables:
            rows = self.target.embedding_rows(tokens).to(self.probe)
        else:
            rows = self.target.embed(tokens)
        if self.mask_row is not None:
            is_mask = (tokens == self.config.mask_token_id).to(rows.device)
            rows = torch.where(is_mask[..., None], self.mask_row, rows)
        scale = self.config.input_embedding_scale
        return rows if scale == 1 else rows * scale

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., draft vocabulary]; by the target's own lm_head where the draft has
        none."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        raw = self.target.uncapped_logits(flat) if self.head is None else self.head(flat)
        return self.transformed(raw).view(*hidden.shape[:-1], -1)

    @property
    def plain(self) -> bool:
        """Whether logits are what the lm_head gives."""
        return self.cap is None and self.config.output_multiplier == 1

    def transformed(self, logits: Tensor) -> Tensor:
        """Multiplied, then capped, as the config says."""
        if self.config.output_multiplier != 1:
            logits = logits * self.config.output_multiplier
        if self.cap is None:
            return logits
        return torch.tanh(logits / self.cap) * self.cap

    def likely(self, hidden: Tensor, count: int) -> Likely:
        """The `count` likeliest tokens behind states [..., hidden]."""
        logits = self.logits(hidden)
        scores, drafts = top(logits, count)
        return Likely(self.ids(drafts), scores - logits.logsumexp(-1, keepdim=True))

    def ids(self, drafts: Tensor) -> Tensor:
        """Target ids of draft ids."""
        return drafts if self.vocabulary is None else self.vocabulary[drafts]

    def head_rows(self, drafts: Tensor) -> Tensor:
        """The lm_head's rows of draft ids: [...] -> [..., hidden]."""
        if self.own_head is None:
            return self.target.head_weight(self.ids(drafts))
        return self.own_head[drafts]


def _of_length(table: Tensor, num_rows: int) -> Tensor:
    """Cut, or with rows of zeros behind it; not copied where it has that length."""
    num_missing = num_rows - len(table)
    if num_missing <= 0:
        return table[:num_rows]
    return F.pad(table, (0, 0, 0, num_missing))
