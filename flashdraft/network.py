"""What the draft networks of all methods share: their files, the target's embedding, and a head over a draft vocabulary.

A method's file adds its own modules. Knows tensors, names and the target's two tables; does not know how a method drafts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from flashdraft import hub, native
from flashdraft.checkpoint import OPTIONAL, DraftConfig, check_target, read_draft, write_draft
from flashdraft.errors import CheckpointError, DraftMismatch
from flashdraft.layers import ROPE_TYPES, Linear, pack, rotary_table
from flashdraft.process import BOOLS, INTS, undisturbed
from flashdraft.target import Target
from flashdraft.types import Drafter

__all__ = ["DRAFT_KERNEL", "DraftHead", "DraftNetwork", "network_shape"]

DRAFT_KERNEL = "int8"  # a draft may be rounded: that can cost accepted length, never the text


class DraftNetwork(nn.Module):
    """A draft network; its modules carry the tensor names of its method's published format (checkpoint.py)."""

    method: str
    cos: Tensor  # of every position, where a method has positions: see `add_rotary`
    sin: Tensor

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = replace(config, method=self.method)
        self.sequential_head: Any = None  # dflash's addition
        self.extras: dict[str, Tensor] = {}  # the format's optional tensors: lm_head.weight, embed_tokens.weight, d2t, t2d

    @classmethod
    @undisturbed
    def from_pretrained(cls, name: str | Path) -> Self:
        """A drafter's folder or hub id, in float32. Raises CheckpointError or ModelNotFound."""
        files = hub.resolve(str(name))
        if not isinstance(files, Path):
            raise CheckpointError(f"`{name}` is a GGUF file, not a drafter's folder", hint="give the folder it was made from")
        config, tensors = read_draft(files)
        if config.method != cls.method:
            hint = f"give a drafter of {cls.method}, or load it by its name: `flashdraft.load` knows the method of a folder"
            raise CheckpointError(f"`{name}` is a drafter of {config.method}, not of {cls.method}", hint=hint)
        model = cls(config)
        model.extras = {n: tensors.pop(n) for n in OPTIONAL if n in tensors}
        model.load_state_dict({n: t.float() for n, t in tensors.items()})
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, readme: str | None = None, plain: bool = False) -> None:
        """Write config.json and model.safetensors, in config.dtype; `readme` is the model card.

        plain: without the optional tensors, for engines that know only a method's own (DFlash: 11 a layer and 3 more).
        """
        config = replace(self.config, draft_vocab_size=None, sequential_head=None) if plain else self.config
        tensors = {n: t for n, t in self.state_dict().items() if n in config.shapes()}
        write_draft(Path(folder), config, tensors | ({} if plain else self.extras), readme)

    def push_to_hub(self, repo: str, *, readme: str | None = None, plain: bool = False, **options: Any) -> str:
        """Save into a model repository of the hub; `options` and errors are those of hub.push."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, readme=readme, plain=plain)
            return hub.push(Path(folder), repo, **options)

    def reduce_vocabulary(self, tokens: Tensor) -> None:
        """Draft only these tokens [n] of the target's vocabulary (ascending): the lm_head's cost falls in proportion."""
        known = torch.zeros(self.config.vocab_size, **BOOLS)
        known[tokens] = True
        self.extras |= {"d2t": tokens - torch.arange(len(tokens), **INTS), "t2d": known}
        self.config = replace(self.config, draft_vocab_size=len(tokens))

    def add_rotary(self) -> Qwen3Config:
        """The buffers that `rotary` reads; returns what transformers needs to know for the parts that are Qwen3's own."""
        if (kind := self.config.rope_parameters.get("rope_type", "default")) not in ROPE_TYPES:
            known = f"known: {', '.join(ROPE_TYPES)}"
            raise CheckpointError(f"rotary scaling {kind!r} is not supported in a drafter", hint=known)
        qwen3 = Qwen3Config(**network_shape(self.config))
        made = Qwen3RotaryEmbedding(qwen3)
        cos, sin = rotary_table(made.inv_freq, qwen3.max_position_embeddings, made.attention_scaling, torch.float32)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        return qwen3

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What `apply_rotary` takes for [n, heads, head_dim] at positions [n]."""
        return self.cos[positions][:, None], self.sin[positions][:, None]

    def drafters(self, target: Target) -> Callable[..., Drafter]:
        """What makes drafters beside this target: the weights are packed once; takes block_size and tree_nodes, or None."""
        raise NotImplementedError


def network_shape(config: DraftConfig) -> dict[str, Any]:
    """What transformers' config of a network of this shape takes."""
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["head_dim", "rms_norm_eps", "max_position_embeddings", "attention_bias"]
    shape = {name: getattr(config, name) for name in names}
    return shape | {"rope_parameters": {"rope_type": "default", **config.rope_parameters}}


class DraftHead:
    """Embedding, lm_head and vocabulary of a draft network beside one target. Raises DraftMismatch where they do not fit."""

    def __init__(self, model: DraftNetwork, target: Target) -> None:
        check_target(model.config, target)
        self.config, self.target = model.config, target
        self.probe = target.embed(torch.zeros(1, **INTS))  # the dtype and device of everything here
        self.native = native.usable(self.probe)  # whether our kernels do the heavy work
        embedding, own = model.extras.get("embed_tokens.weight"), model.extras.get("lm_head.weight")
        if embedding is not None and len(embedding) < target.vocab_size:
            got = f"an embedding of {len(embedding)} tokens, but `{target.name}` has {target.vocab_size}"
            raise DraftMismatch(f"the draft has {got}", hint="the two must share their tokenizer")
        self.embedding = None if embedding is None else embedding.to(self.probe)
        self.own_head = None if own is None or model.sequential_head is None else own.to(self.probe)
        self.vocabulary: Tensor | None = None  # target ids of a reduced draft vocabulary; None: the target's
        if (offsets := model.extras.get("d2t")) is not None:  # target id - draft id
            self.vocabulary = (offsets.long() + torch.arange(len(offsets), **INTS)).to(self.probe.device)
            own = target.head_weight(self.vocabulary) if own is None else own
        self.head: Linear | None = None if own is None else self.packed(own)
        self.nbytes = sum(t.nbytes for t in (self.embedding, self.head) if t is not None)

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embedding, or the drafter's own if its file holds one."""
        own = self.embedding
        return self.target.embed(tokens) if own is None else F.embedding(tokens.to(own.device), own)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., draft vocabulary]; the target's own lm_head where the draft has none."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return (self.target.lm_head if self.head is None else self.head)(flat).view(*hidden.shape[:-1], -1)

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
        return self.target.head_weight(self.ids(drafts)) if self.own_head is None else self.own_head[drafts]

    def packed(self, weight: Tensor) -> Linear:
        return pack(weight.detach().to(self.probe), kernel=DRAFT_KERNEL)
