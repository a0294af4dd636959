"""What the draft networks of all methods share: their files, the target's embedding, and a head over a draft vocabulary.

A method's file adds its own modules. Knows tensors, names and the target's two tables; does not know how a method drafts.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft import hub
from flashdraft.errors import CheckpointError, DraftMismatch, first_line
from flashdraft.formats.config import OPTIONAL, DraftConfig
from flashdraft.formats.match import check_target
from flashdraft.formats.read import read_draft
from flashdraft.formats.write import write_draft
from flashdraft.models import native
from flashdraft.models.layers import ROPE_TYPES, Linear, Rotary, pack, rotary_of, rotary_table
from flashdraft.models.modules import Frequencies, rotary_frequencies
from flashdraft.models.target import Target
from flashdraft.process import BOOLS, INTS, undisturbed
from flashdraft.types import Drafter

__all__ = ["DRAFT_KERNEL", "DraftHead", "DraftNetwork", "network_shape"]

_LOG = logging.getLogger("flashdraft")  # one line on stderr, unless the caller has other plans

DRAFT_KERNEL = "int8"  # a draft may be rounded: that can cost accepted length, never the text


class DraftNetwork(nn.Module):
    """A draft network; its modules carry the tensor names of its method's published format (formats/config.py)."""

    method: str
    frequencies: dict[str, Frequencies]  # by kind of layer, where a method has positions

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = replace(config, method=self.method)
        self.sequential_head: Any = None  # dflash's addition
        self.extras: dict[
            str, Tensor
        ] = {}  # the format's optional tensors: lm_head.weight, embed_tokens.weight, d2t, t2d

    @classmethod
    @undisturbed
    @torch.random.fork_rng(devices=[])  # new weights are drawn, and then replaced
    def from_pretrained(cls, name: str | Path) -> Self:
        """A drafter's folder or hub id, in float32. Raises CheckpointError or ModelNotFound."""
        files = hub.resolve(str(name))
        if not isinstance(files, Path):
            raise CheckpointError(
                f"`{name}` is a GGUF file, not a drafter's folder",
                hint="give the folder it was made from",
            )
        config, tensors = read_draft(files)
        if config.method != cls.method:
            hint = f"give a drafter of {cls.method}, or load it by its name: `flashdraft.load` knows the method of a folder"
            raise CheckpointError(
                f"`{name}` is a drafter of {config.method}, not of {cls.method}", hint=hint
            )
        model = cls(config)
        model.extras = {n: tensors.pop(n) for n in OPTIONAL if n in tensors}
        model.load_state_dict({n: t.float() for n, t in tensors.items()})
        return model.eval()

    def save_pretrained(
        self, folder: str | Path, *, readme: str | None = None, plain: bool = False
    ) -> None:
        """Write config.json and model.safetensors, in config.dtype; `readme` is the model card.

        plain: without the optional tensors, for engines that know only a method's own (DFlash: 11 a layer and 3 more).
        """
        config = (
            replace(self.config, draft_vocab_size=None, sequential_head=None)
            if plain
            else self.config
        )
        tensors = {n: t for n, t in self.state_dict().items() if n in config.shapes()}
        write_draft(Path(folder), config, tensors | ({} if plain else self.extras), readme)

    def push_to_hub(
        self, repo: str, *, readme: str | None = None, plain: bool = False, **options: Any
    ) -> str:
        """Save into a model repository of the hub; `options` and errors are those of hub.push."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, readme=readme, plain=plain)
            return hub.push(Path(folder), repo, what=self.method, **options)

    def reduce_vocabulary(self, tokens: Tensor) -> None:
        """Draft only these tokens [n] of the target's vocabulary (ascending): the lm_head's cost falls in proportion."""
        known = torch.zeros(self.config.vocab_size, **BOOLS)
        known[tokens] = True
        self.extras |= {"d2t": tokens - torch.arange(len(tokens), **INTS), "t2d": known}
        self.config = replace(self.config, draft_vocab_size=len(tokens))

    def add_rotary(self) -> None:
        """Make the frequencies that `rotary` reads, one for each kind of layer. Raises CheckpointError."""
        self.frequencies = {}
        for layers, rope in self.config.ropes.items():
            self.frequencies[layers] = self._frequencies({"rope_type": "default", **rope})

    def _frequencies(self, rope: Mapping[str, Any]) -> Frequencies:
        kind = rope["rope_type"]
        if kind not in ROPE_TYPES:
            raise CheckpointError(
                f"rotary scaling {kind!r} is not supported in a drafter",
                hint=f"known: {', '.join(ROPE_TYPES)}",
            )
        try:
            return rotary_frequencies(network_shape(self.config, rope))
        except (KeyError, TypeError, ValueError) as error:
            got = f"rotary scaling {kind!r} lacks or garbles {first_line(error)}"
            raise CheckpointError(
                got, hint="rope_parameters in its config.json are damaged"
            ) from None

    def rotary(self, positions: Tensor, kind: str | None = None) -> tuple[Tensor, Tensor]:
        """What `apply_rotary` takes for [n, heads, head_dim] at positions [n]; kind: of layer, where they differ."""
        inv_freq, scaling = self.frequencies[kind or next(iter(self.frequencies))]
        dtype = next(self.parameters()).dtype
        cos, sin = rotary_of(positions, inv_freq.to(positions.device), scaling)
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]

    @property
    def cos(self) -> Tensor:
        """Of the positions that it was trained on [positions, head_dim]."""
        inv_freq, scaling = next(iter(self.frequencies.values()))
        return rotary_table(inv_freq, self.config.max_position_embeddings, scaling, torch.float32)[
            0
        ]

    def rotaries(self, like: Tensor) -> dict[str, Rotary]:
        """Growing tables by kind of layer, in the dtype and on the device of `like`."""
        return {
            kind: Rotary(inv_freq, scaling, like)
            for kind, (inv_freq, scaling) in self.frequencies.items()
        }

    def drafters(self, target: Target) -> Callable[..., Drafter]:
        """What makes drafters beside this target: the weights are packed once; takes block_size and tree_nodes, or None."""
        raise NotImplementedError


def network_shape(config: DraftConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' config of a network of this shape takes. rope: flat rotary parameters."""
    names = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ]
    names += ["head_dim", "rms_norm_eps", "max_position_embeddings", "attention_bias"]
    shape = {name: getattr(config, name) for name in names}
    return shape | {"rope_parameters": {"rope_type": "default", **rope}}


class DraftHead:
    """Embedding, lm_head and vocabulary of a draft network beside one target. Raises DraftMismatch where they do not fit."""

    def __init__(self, model: DraftNetwork, target: Target) -> None:
        embedding, own = model.extras.get("embed_tokens.weight"), model.extras.get("lm_head.weight")
        check_target(
            model.config, target, num_embeddings=None if embedding is None else len(embedding)
        )
        self.config, self.target = model.config, target
        self.probe = target.embed(torch.zeros(1, **INTS))  # the dtype and device of everything here
        self.native = native.usable(self.probe)  # whether our kernels do the heavy work
        self.embedding = self._own_embedding(embedding)
        if own is None and model.config.tied_head:
            own = embedding
        self.vocabulary: Tensor | None = (
            None  # target ids of a reduced draft vocabulary; None: the target's
        )
        if (offsets := model.extras.get("d2t")) is not None:  # target id - draft id
            leads = offsets.long() + torch.arange(len(offsets), **INTS)
            known = leads < target.vocab_size  # what the target lacks is never proposed
            if not bool(known.any()):
                got = f"the draft's vocabulary lies beyond the {target.vocab_size} tokens of `{target.name}`"
                raise DraftMismatch(got, hint="the two must share their tokenizer")
            self.vocabulary = leads[known].to(self.probe.device)
            own = target.head_weight(self.vocabulary) if own is None else own[known]
        elif own is not None:
            own = own[: target.vocab_size]
        with_head = (
            model.extras.get("lm_head.weight") is not None and model.sequential_head is not None
        )
        self.own_head = own.to(self.probe) if with_head and own is not None else None
        cap = model.config.final_logit_softcapping or getattr(
            target.config, "final_logit_softcapping", None
        )
        self.cap = None if cap is None else float(cap)
        self.head: Linear | None = None if own is None else self.packed(own)
        self.nbytes = sum(t.nbytes for t in (self.embedding, self.head) if t is not None)
        self._told = False

    def _own_embedding(self, stored: Tensor | None) -> Tensor | None:
        """The file's own table, as long as the target's vocabulary at least; None: the target's embedding serves.

        A family that scales its embedding (Gemma) trained its drafters on the scaled one.
        """
        target, explicit = self.target, self.config.input_embedding_scale != 1
        some = torch.arange(min(target.vocab_size, 8), **INTS)
        scaled = not torch.equal(target.embed(some), target.embedding_rows(some).to(self.probe))
        if stored is None:
            if scaled and explicit:
                got = f"the draft scales the embedding of `{target.name}`, which scales it already"
                raise DraftMismatch(
                    got,
                    hint="readers of input_embedding_scale differ here: the drafter needs embed_tokens of its own",
                )
            return None

        if scaled and not explicit and self.config.method == "dflash":
            rows = target.embedding_rows(torch.arange(min(len(stored), target.vocab_size), **INTS))
            if torch.equal(stored[: len(rows)].to(rows), rows):
                return None  # a copy of what the target scales
            got = f"the draft has an embedding of its own, beside `{target.name}`, which scales its embedding"
            raise DraftMismatch(
                got, hint="say in its dflash_config by how much: input_embedding_scale"
            )
        missing = max(
            target.vocab_size - len(stored), 0
        )  # ids that it was not trained with are nothing to it
        return F.pad(stored, (0, 0, 0, missing)).to(self.probe)

    def tell(self, end: int) -> None:
        """Say once where drafts go on beyond what the network was trained on. end: of the positions that they read."""
        if end > self.config.trained_length and not self._told:
            self._told = True
            _LOG.warning(
                "the drafter was not trained from position %d on: it drafts on, and may be accepted less",
                self.config.trained_length,
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embedding, or the drafter's own if its file holds one."""
        own, scale = self.embedding, self.config.input_embedding_scale
        rows = self.target.embed(tokens) if own is None else F.embedding(tokens.to(own.device), own)
        return rows if scale == 1 else rows * scale

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., draft vocabulary]; the target's own lm_head where the draft has none."""
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
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def likely(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens and their log-probabilities: [..., hidden] -> [..., count] each."""
        logits = self.logits(hidden)
        best = logits.topk(min(count, logits.shape[-1]), dim=-1)
        return self.ids(best.indices), best.values - logits.logsumexp(-1, keepdim=True)

    def ids(self, drafts: Tensor) -> Tensor:
        """Target ids of draft ids."""
        return drafts if self.vocabulary is None else self.vocabulary[drafts]

    def head_rows(self, drafts: Tensor) -> Tensor:
        """The lm_head's rows of draft ids: [...] -> [..., hidden]."""
        return (
            self.target.head_weight(self.ids(drafts))
            if self.own_head is None
            else self.own_head[drafts]
        )

    def packed(self, weight: Tensor) -> Linear:
        return pack(weight.detach().to(self.probe), kernel=DRAFT_KERNEL)
