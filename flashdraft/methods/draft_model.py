"""Speculative decoding with a smaller causal LM of the same tokenizer (Leviathan 2211.17192), drafting token by token.

The draft LM is any network behind the Target protocol. Its cache holds what it has read, its own drafts included; a new
text keeps the prefix that matches, so that only tokens are read which were not drafted, or were drafted wrong.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from flashdraft.decoding.sampling import adjusted, draw, probabilities, uniforms
from flashdraft.decoding.tree import chain
from flashdraft.errors import DraftMismatch, InvalidParameter
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.match import check_target
from flashdraft.methods.network import DRAFT_KERNEL, DraftNetwork, network_shape
from flashdraft.models.lean import LeanTarget
from flashdraft.models.target import Target
from flashdraft.process import BOOLS, FLOATS, INTS, serial, undisturbed
from flashdraft.types import Drafter, Proposal, Rows, SamplingParams, require

__all__ = ["CutDraftModel", "DraftModelDrafter", "check_tokenizers"]

Size = int | None
_LOG = logging.getLogger("flashdraft")
_UNCUT = SamplingParams(temperature=1.0)  # of greedy rows: how sure the draft is of its argmax


class DraftModelDrafter(Drafter):
    """Drafts a chain per row. drawn: rows with a temperature draw their drafts, as the target would; else all are the argmax.

    vocab_size: the target's; a smaller network knows nothing of the last ids, and a row that holds one gets its anchor alone; a
    larger one never drafts what the target lacks.
    Chosen drafts leave seeded text as it is without drafts; drawn ones keep its law, and the same drafts give the same text.
    """

    name = "draft_model"

    def __init__(
        self,
        network: Target,
        *,
        block_size: Size = None,
        tree_nodes: Size = None,
        drawn: bool = True,
        vocab_size: Size = None,
    ) -> None:
        require(
            tree_nodes is None, "tree_nodes", tree_nodes, "left out: a draft model drafts chains"
        )
        self.network, self.block_size, self.drawn = network, block_size or 5, drawn
        self.vocab_size = vocab_size or network.vocab_size
        self.cache = network.new_cache(1, 256)
        self.caches = (self.cache,)
        self._read: dict[int, list[int]] = {}  # by slot: the tokens in the cache
        self._shared: dict[
            int, int
        ] = {}  # by slot: how many of them the history is known to begin with
        self._told = False

    @undisturbed
    @torch.inference_mode()
    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        """Read what is longer than a block, such as a prompt; a step's few tokens wait for the next draft's first pass."""
        for slot, history, position in zip(rows.slots, rows.histories, rows.positions, strict=True):
            *fresh, _ = self._unread(slot, history)
            if len(fresh) > self.block_size and self._fits(position, fresh):
                self.cache.reserve(len(history))
                self.network.prefill(self.cache, slot, torch.tensor(fresh, **INTS), ())
                self._read[slot] += fresh

    @undisturbed
    @serial(lambda self: self.cache.blocked)
    @torch.inference_mode()
    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        """One pass over all rows per drafted token. A row beyond the network's positions gets its anchor alone.

        A node's score is the log of the largest probability in the law that it comes from: an argmax's own, and known of a
        drawn node before its token is. Draws are keyed by the anchor's position and the node: no step sees another's.
        """
        unread = [
            self._unread(slot, history)
            for slot, history in zip(rows.slots, rows.histories, strict=True)
        ]
        places = rows.positions
        live = [
            i for i, fits in enumerate(map(self._fits, places, unread)) if fits and max_nodes > 1
        ]
        self._tell(max(places))
        slots, positions = [rows.slots[i] for i in live], [places[i] for i in live]
        params, fresh = [rows.params[i] for i in live], [unread[i] for i in live]
        width = min(self.block_size, max_nodes) if live else 1
        tokens = torch.tensor(rows.anchors, **INTS)[:, None].repeat(1, width)
        sizes, scores = torch.ones(len(rows), **INTS), torch.zeros(len(rows), width, **FLOATS)
        sizes[live] = width
        draws = torch.tensor([self.drawn and own.temperature > 0 for own in params], **BOOLS)
        probs = (
            torch.zeros(len(rows), width, self.vocab_size, **FLOATS) if bool(draws.any()) else None
        )
        for node in range(1, width):
            read = zip(self._forward(slots, fresh), slots, live, strict=True)
            laws = torch.stack(
                [
                    self._law(logits, slot, rows.params[i], rows.num_prompts[i])
                    for logits, slot, i in read
                ]
            )
            largest, token = laws.max(-1)
            if probs is not None:
                level = uniforms([own.seed for own in params], positions, 1, lane=-node)[:, 0]
                token, probs[live, node - 1] = torch.where(draws, draw(laws, level), token), laws
            tokens[live, node], scores[live, node] = token, largest.log()
            fresh = [[one] for one in token.tolist()]
        drawn = torch.zeros_like(tokens, dtype=torch.bool)
        drawn[live, 1:] = draws[:, None]
        return Proposal(
            tokens,
            chain(width).expand_as(tokens),
            sizes,
            scores,
            probs,
            None if probs is None else drawn,
        )

    def _law(self, logits: Tensor, slot: int, params: SamplingParams, num_prompt: int) -> Tensor:
        """The law that the row's own parameters make of logits [vocab] behind what it has read."""
        with suppress(
            InvalidParameter
        ):  # nothing is allowed behind this draft: the target will not come here
            logits = adjusted(logits, params, self._read[slot], num_prompt)
        return probabilities(logits, params if params.temperature else _UNCUT)

    def end(self, rows: Rows) -> None:
        for slot in {*rows.slots} & {*self._read}:
            self.cache.free(slot)
            del self._read[slot]
            self._shared.pop(slot, None)

    def _unread(self, slot: int, history: list[int]) -> list[int]:
        """Cut the row to what it shares with the history before its anchor; returns the rest of the history."""
        self.cache.reserve(0, rows=slot + 1)
        read = self._read.setdefault(slot, [])
        end = min(len(read), len(history) - 1)
        same = min(self._shared.get(slot, 0), end)
        while same < end and read[same] == history[same]:
            same += 1
        self._shared[slot] = same  # a history only grows: what was the same stays it
        del read[same:]
        self.cache.lengths[slot] = same
        return history[same:]

    def _fits(self, position: int, unread: list[int]) -> bool:
        """Whether the network has positions for a whole block behind an anchor at `position`, and knows all tokens before."""
        return (
            position + self.block_size - 1 <= self.network.context_length
            and max(unread, default=0) < self.network.vocab_size
        )

    def _tell(self, position: int) -> None:
        """Say once that drafting ends where the network has no more positions."""
        last = self.network.context_length
        if position + self.block_size - 1 > last and not self._told:
            self._told = True
            _LOG.warning(
                "the draft model `%s` has %d positions: behind them nothing is drafted",
                self.network.name,
                last,
            )

    def _forward(self, slots: list[int], fresh: list[list[int]]) -> Tensor:
        """Read every row's tokens in one pass: the logits after its last one, [rows, vocab] float32 on the host."""
        width, sizes = max(map(len, fresh)), torch.tensor([len(own) for own in fresh], **INTS)
        self.cache.reserve(max(self.cache.lengths[slot] for slot in slots) + width)
        tokens = torch.tensor([own + [0] * (width - len(own)) for own in fresh], **INTS)
        logits, _ = self.network.forward(
            self.cache, slots, tokens, chain(width).expand_as(tokens), sizes, ()
        )
        for slot, own in zip(slots, fresh, strict=True):
            self.cache.keep(slot, range(len(own)))
            self._read[slot] += own
        last = (
            logits[torch.arange(len(slots), **INTS), sizes - 1, : self.vocab_size].float().cpu()
        )  # no id that the target lacks
        return F.pad(last, (0, self.vocab_size - last.shape[-1]), value=-math.inf)


class CutDraftModel(DraftNetwork):
    """A causal LM of some of its target's layers, in llama's shape. Embedding and lm_head are the target's, and in no file."""

    method = "draft_model"

    @undisturbed
    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        lm: Any = LlamaModel(_llama(config, vocab_size=1)).float()
        lm.set_input_embeddings(nn.Identity())
        self.layers, self.norm, self.rotary_emb = lm.layers, lm.norm, lm.rotary_emb
        self._lm = (lm,)  # not a module of its own: its parts are

    def forward(self, embedded: Tensor) -> Tensor:
        """Embeddings of one text [n, hidden] -> normed states [n, hidden], for the lm_head."""
        return self._lm[0](inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]  # type: ignore[no-any-return]

    def reduce_vocabulary(self, tokens: Tensor) -> None:
        """Training compares fewer tokens; all are drafted."""

    @undisturbed
    def drafters(self, target: Target) -> Callable[..., Drafter]:
        check_target(self.config, target)
        everything = torch.arange(target.vocab_size, **INTS)
        table, head = target.embed(everything), target.head_weight(everything)
        norm, tokens = (
            SimpleNamespace(weight=weight)
            for weight in (self.norm.weight.detach().to(table), table)
        )
        model = SimpleNamespace(
            embed_tokens=tokens, layers=self.layers, norm=norm, rotary_emb=self.rotary_emb
        )
        own = SimpleNamespace(weight=table if torch.equal(table, head) else head, bias=None)
        lm = SimpleNamespace(
            config=_llama(self.config, vocab_size=target.vocab_size), model=model, lm_head=own
        )
        return partial(
            DraftModelDrafter, LeanTarget(lm, f"a cut of {target.name}", kernel=DRAFT_KERNEL)
        )


def _llama(config: DraftConfig, *, vocab_size: int) -> LlamaConfig:
    nothing: Any = dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id")
    )  # what the engine asks a target
    shape = network_shape(config, config.rope_parameters)
    return LlamaConfig(**shape, vocab_size=vocab_size, **nothing, tie_word_embeddings=True)


def check_tokenizers(
    target_tokenizer: Any, draft_tokenizer: Any, target: Target, network: Target
) -> None:
    """Raises DraftMismatch unless the ids that both know mean the same: one of the two may have more tokens than the other."""
    hint = f"a draft LM shares its target's tokenizer: take a smaller model of the family of `{target.name}`"
    ids, others = target_tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    own, other = ({i: token for token, i in vocabulary.items()} for vocabulary in (ids, others))
    common = sorted(own.keys() & other.keys())
    for i in common:
        if own[i] != other[i]:
            got = (
                f"token {i} is {other[i]!r} to `{network.name}`, but {own[i]!r} to `{target.name}`"
            )
            raise DraftMismatch(got, hint=hint)
    for token in sorted(ids.keys() & others.keys(), key=ids.__getitem__):
        if ids[token] != others[token]:
            got = f"{token!r} is token {others[token]} to `{network.name}`, but {ids[token]} to `{target.name}`"
            raise DraftMismatch(got, hint=hint)
    if not common:
        raise DraftMismatch(
            f"`{network.name}` and `{target.name}` have no token in common", hint=hint
        )
