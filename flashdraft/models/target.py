"""What a target is: a large model, seen as a function from proposals to logits and features.

Knows caches and trees of tokens. Does not know whose code runs the model: transformers' own (`hf`)
or ours (`lean`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flashdraft.decoding.tree import chain
from flashdraft.models.cache import SlotCache
from flashdraft.models.layers import scaled_length
from flashdraft.process import INTS, undisturbed

__all__ = ["HFConfig", "HFModel", "Indices", "Output", "Target", "context_of"]

PREFILL_CHUNK = 512

# Transformers' models and configs: what they hold differs by family, and no type of theirs says it.
HFModel = Any
HFConfig = Any

Indices = Sequence[int]  # of layers, or of a cache's rows
# Logits or states, and the features if there are any.
Output = tuple[Tensor, Tensor | None]


class Target(Protocol):
    """A large model, seen as a function from proposals to logits and features."""

    name: str
    config: HFConfig  # the text model's
    kernel_name: str  # what runs the weights, as `load` takes it
    kernel: str  # the same in words, for reports
    row_exact: bool  # a row's bits do not depend on how many rows travel with it
    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int
    nbytes: int  # of the weights
    blocked_keys: bool = False  # how its cache lies: see SlotCache
    static_cache: bool = False  # likewise

    @property
    def step_seconds(self) -> Mapping[int, float]:
        """Of a step by its number of tokens; empty where it is not measured."""
        return {}

    def new_cache(self, rows: int, slots: int) -> SlotCache:
        return SlotCache(
            self.num_layers, rows, slots, blocked=self.blocked_keys, static=self.static_cache
        )

    @undisturbed
    @torch.inference_mode()
    def prefill(self, cache: SlotCache, slot: int, tokens: Tensor, layers: Indices) -> Output:
        """Read and commit tokens [n] of one row.

        Returns the last token's logits [vocab] and the features [n, layers * hidden].
        """
        features = []
        for part in tokens.split(PREFILL_CHUNK):
            states, own = self.read(cache, [slot], [part], layers)
            if own is not None:
                features.append(own[0])

        logits = self.lm_head(states[0][-1])
        return logits, torch.cat(features) if features else None

    @undisturbed
    @torch.inference_mode()
    def read(
        self, cache: SlotCache, slots: Indices, texts: Sequence[Tensor], layers: Indices
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Read and commit a text of tokens [n] for each row, all in one pass.

        Returns by row the final normed states [n, hidden] and the features [n, layers * hidden].
        """
        counts = [len(text) for text in texts]
        width = max(counts)
        tokens = torch.zeros(len(slots), width, **INTS)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = text

        parents = chain(width).expand_as(tokens)
        sizes = torch.tensor(counts, **INTS)
        hidden, feature = self._read(cache, slots, tokens, parents, sizes, layers)
        states = []
        features = []
        for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            cache.keep(slot, range(count))
            states.append(hidden[row, :count])
            if feature is not None:
                features.append(feature[row, :count])
        return states, None if feature is None else features

    @undisturbed
    @torch.inference_mode()
    def forward(
        self,
        cache: SlotCache,
        slots: Indices,
        tokens: Tensor,
        parents: Tensor,
        sizes: Tensor,
        layers: Indices,
    ) -> Output:
        """Read proposals [rows, nodes] behind each row's length, which stays.

        Returns logits [rows, nodes, vocab], and features likewise.
        """
        hidden, features = self._read(cache, slots, tokens, parents, sizes, layers)
        has_padding = int(sizes.min()) < tokens.shape[1]
        if self.row_exact and has_padding:
            return self._logits_of_nodes(hidden, sizes), features
        return self.lm_head(hidden), features

    def _logits_of_nodes(self, hidden: Tensor, sizes: Tensor) -> Tensor:
        """[rows, nodes, vocab]; those of padding are zero, and cost no lm_head."""
        nodes = torch.arange(hidden.shape[1], **INTS)
        real = (nodes < sizes[:, None]).to(hidden.device)
        of_nodes = self.lm_head(hidden[real])
        logits = of_nodes.new_zeros(*hidden.shape[:2], of_nodes.shape[-1])
        logits[real] = of_nodes
        return logits

    def _read(
        self,
        cache: SlotCache,
        slots: Indices,
        tokens: Tensor,
        parents: Tensor,
        sizes: Tensor,
        layers: Indices,
    ) -> Output:
        """The final normed state [rows, nodes, hidden] and the features."""

    def embed(self, tokens: Tensor) -> Tensor: ...

    def embedding_rows(self, tokens: Tensor) -> Tensor:
        """The embedding's rows as they are stored: a family may scale them (Gemma)."""
        return self.embed(tokens)

    def lm_head(self, hidden: Tensor) -> Tensor: ...

    def uncapped_logits(self, hidden: Tensor) -> Tensor:
        """The lm_head without the softcap behind it."""
        return self.lm_head(hidden)

    def head_weight(self, tokens: Tensor) -> Tensor:
        """The lm_head's rows of these tokens: [n] -> [n, hidden]."""


def context_of(config: HFConfig) -> int:
    """The positions of a Hugging Face text model, its rotary scaling included.

    See layers.scaled_length. Where layers differ, the shortest of them counts: none may end before
    the others.
    """
    limit = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = [own for own in rope.values() if isinstance(own, Mapping)]
    if not by_kind:
        return scaled_length(limit, rope)

    lengths = [scaled_length(limit, own) for own in by_kind]
    return min(limit, *lengths)
