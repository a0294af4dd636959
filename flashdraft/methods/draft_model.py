"""Speculative decoding with a smaller causal LM of the same tokenizer (Leviathan 2211.17192),
drafting token by token.

The draft LM is any network behind the Target protocol. Its cache holds what it has read, its own
drafts included; a new text keeps the prefix that matches, so that only tokens are read which were
not drafted, or were drafted wrong.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

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
from flashdraft.models.cache import StateCache
from flashdraft.models.lean import LeanTarget
from flashdraft.models.target import Target
from flashdraft.process import BOOLS, FLOATS, INTS, serial, undisturbed
from flashdraft.types import Drafter, Proposal, Rows, SamplingParams, require

__all__ = ["CutDraftModel", "DraftModelDrafter", "check_cut_back", "check_tokenizers"]

Size = int | None

_LOG = logging.getLogger("flashdraft")
_UNCUT = SamplingParams(temperature=1.0)  # of greedy rows: how sure the draft is of its argmax


class Tokenizer(Protocol):
    def get_vocab(self) -> Mapping[str, int]: ...


# --- The drafter


class DraftModelDrafter(Drafter):
    """Drafts a chain per row.

    drawn: rows with a temperature draw their drafts, as the target would; else all are the argmax.
    Chosen drafts leave seeded text as it is without drafts; drawn ones keep its law, and the same
    drafts give the same text.
    vocab_size: the target's; a smaller network knows nothing of the last ids, and a row that holds
    one gets its anchor alone; a larger one never drafts what the target lacks.
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
        check_cut_back(network)
        self.network = network
        self.block_size = 5 if block_size is None else block_size
        self.drawn = drawn
        self.vocab_size = network.vocab_size if vocab_size is None else vocab_size
        self.cache = network.new_cache(1, 256)
        self.caches = (self.cache,)
        self._read: dict[int, list[int]] = {}  # by slot: the tokens in the cache
        # By slot: how many of them the history is known to begin with.
        self._shared: dict[int, int] = {}
        self._told = False

    @undisturbed
    @torch.inference_mode()
    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        """Read what is longer than a block, such as a prompt; a step's few tokens wait for the next
        draft's first pass."""
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
        """One pass over all rows per drafted token. A row beyond the network's positions gets its
        anchor alone.

        A node's score is the log of the largest probability in the law that it comes from: an
        argmax's own, and known of a drawn node before its token is. Draws are keyed by the anchor's
        position and the node: no step sees another's.
        """
        num_rows = len(rows)
        live = []  # rows that are drafted
        positions = []  # of their anchors
        fresh = []  # of each of them: what the network has not read
        for row, position in enumerate(rows.positions):
            unread = self._unread(rows.slots[row], rows.histories[row])
            if max_nodes > 1 and self._fits(position, unread):
                live.append(row)
                positions.append(position)
                fresh.append(unread)
        self._tell(max(rows.positions))

        width = min(self.block_size, max_nodes) if live else 1
        tokens = torch.tensor(rows.anchors, **INTS)[:, None].repeat(1, width)
        scores = torch.zeros(num_rows, width, **FLOATS)
        sizes = torch.ones(num_rows, **INTS)
        sizes[live] = width

        seeds = [rows.params[row].seed for row in live]
        draw_own = [self._draws(rows.params[row]) for row in live]
        draws = torch.tensor(draw_own, **BOOLS)
        probs: Tensor | None = None
        drawn: Tensor | None = None
        if bool(draws.any()):
            probs = torch.zeros(num_rows, width, self.vocab_size, **FLOATS)
            drawn = torch.zeros(num_rows, width, **BOOLS)
            drawn[live, 1:] = draws[:, None]

        for node in range(1, width):
            laws = self._laws(rows, live, fresh)
            largest, chosen = laws.max(-1)
            if probs is not None:
                levels = uniforms(seeds, positions, 1, lane=-node)[:, 0]
                chosen = torch.where(draws, draw(laws, levels), chosen)
                probs[live, node - 1] = laws
            tokens[live, node] = chosen
            scores[live, node] = largest.log()
            fresh = [[token] for token in chosen.tolist()]
        return Proposal(tokens, chain(width).expand_as(tokens), sizes, scores, probs, drawn)

    def _draws(self, params: SamplingParams) -> bool:
        return self.drawn and params.temperature > 0

    def _laws(self, rows: Rows, live: list[int], fresh: list[list[int]]) -> Tensor:
        """Of every live row, the law behind what it has read with `fresh`: [live, vocab]."""
        slots = [rows.slots[row] for row in live]
        laws = []
        for row, logits in zip(live, self._forward(slots, fresh), strict=True):
            law = self._law(logits, rows.slots[row], rows.params[row], rows.num_prompts[row])
            laws.append(law)
        return torch.stack(laws)

    def _law(self, logits: Tensor, slot: int, params: SamplingParams, num_prompt: int) -> Tensor:
        """The law that the row's own parameters make of logits [vocab] behind what it has read."""
        # Nothing may be allowed behind this draft: then the target will not come here.
        with suppress(InvalidParameter):
            logits = adjusted(logits, params, self._read[slot], num_prompt)
        return probabilities(logits, params if params.temperature else _UNCUT)

    def _forward(self, slots: list[int], fresh: list[list[int]]) -> Tensor:
        """Read every row's tokens in one pass: the logits after its last one, [rows, vocab] float32
        on the host."""
        counts = [len(own) for own in fresh]
        width = max(counts)
        longest = max(self.cache.lengths[slot] for slot in slots)
        self.cache.reserve(longest + width)
        padded = [own + [0] * (width - len(own)) for own in fresh]
        tokens = torch.tensor(padded, **INTS)
        parents = chain(width).expand_as(tokens)
        sizes = torch.tensor(counts, **INTS)
        logits, _ = self.network.forward(self.cache, slots, tokens, parents, sizes, ())
        for slot, own in zip(slots, fresh, strict=True):
            self.cache.keep(slot, range(len(own)))
            self._read[slot] += own

        every_row = torch.arange(len(slots), **INTS)
        last = logits[every_row, sizes - 1, : self.vocab_size]  # no id that the target lacks
        last = last.float().cpu()
        num_missing = self.vocab_size - last.shape[-1]
        return F.pad(last, (0, num_missing), value=-math.inf)

    def _unread(self, slot: int, history: list[int]) -> list[int]:
        """Cut the row to what it shares with the history before its anchor; returns the rest of the
        history."""
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
        """Whether the network has positions for a whole block behind an anchor at `position`, and
        knows all tokens before."""
        has_positions = position + self.block_size - 1 <= self.network.context_length
        return has_positions and max(unread, default=0) < self.network.vocab_size

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

    def resume(self, source: int, slot: int, count: int) -> int:
        """Whatever the network has not read of them, or has read otherwise, it reads later."""
        known = self._read.get(source, [])[:count]
        self.cache.reserve(0, rows=max(source, slot) + 1)
        self.cache.take(slot, source, min(len(known), self.cache.lengths[source]))
        self._read[slot] = known[: self.cache.lengths[slot]]
        self._shared.pop(slot, None)
        return count

    def end(self, rows: Rows) -> None:
        for slot in rows.slots:
            if slot in self._read:
                self.cache.free(slot)
                del self._read[slot]
                self._shared.pop(slot, None)


def check_cut_back(network: Target) -> None:
    """Raises DraftMismatch for a network that a text's drafts could not be taken back from."""
    if isinstance(network.new_cache(1, 1), StateCache):
        got = f"`{network.name}` keeps running states, which are not cut to what a new text shares"
        raise DraftMismatch(got, hint="a draft LM is one whose layers all are attention")


# --- A draft model cut from its target


class CutDraftModel(DraftNetwork):
    """A causal LM of some of its target's layers, in llama's shape. Embedding and lm_head are the
    target's, and in no file."""

    method = "draft_model"

    @undisturbed
    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        lm: Any = LlamaModel(_llama(config, vocab_size=1)).float()
        lm.set_input_embeddings(nn.Identity())
        self.layers = lm.layers
        self.norm = lm.norm
        self.rotary_emb = lm.rotary_emb
        self._lm = (lm,)  # not a module of its own: its parts are

    def forward(self, embedded: Tensor) -> Tensor:
        """Embeddings of one text [n, hidden] -> normed states [n, hidden], for the lm_head."""
        (lm,) = self._lm
        output = lm(inputs_embeds=embedded[None], use_cache=False)
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def reduce_vocabulary(self, tokens: Tensor) -> None:
        """Training compares fewer tokens; all are drafted."""

    @undisturbed
    def drafters(self, target: Target) -> Callable[..., Drafter]:
        check_target(self.config, target)
        every_token = torch.arange(target.vocab_size, **INTS)
        table = target.embed(every_token)
        head = target.head_weight(every_token)
        if torch.equal(table, head):
            head = table

        model = SimpleNamespace(
            embed_tokens=SimpleNamespace(weight=table),
            layers=self.layers,
            norm=SimpleNamespace(weight=self.norm.weight.detach().to(table)),
            rotary_emb=self.rotary_emb,
        )
        lm = SimpleNamespace(
            config=_llama(self.config, vocab_size=target.vocab_size),
            model=model,
            lm_head=SimpleNamespace(weight=head, bias=None),
        )
        network = LeanTarget(lm, f"a cut of {target.name}", kernel=DRAFT_KERNEL)
        return partial(DraftModelDrafter, network)


def _llama(config: DraftConfig, *, vocab_size: int) -> LlamaConfig:
    shape = network_shape(config, config.rope_parameters)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # the engine asks its target
        shape[name] = None
    return LlamaConfig(**shape, vocab_size=vocab_size, tie_word_embeddings=True)


# --- Two models, one tokenizer


def check_tokenizers(
    target_tokenizer: Tokenizer, draft_tokenizer: Tokenizer, target: Target, network: Target
) -> None:
    """Raises DraftMismatch unless the ids that both know mean the same: one of the two may have
    more tokens than the other."""
    hint = (
        "a draft LM shares its target's tokenizer: "
        f"take a smaller model of the family of `{target.name}`"
    )
    target_ids = target_tokenizer.get_vocab()
    draft_ids = draft_tokenizer.get_vocab()
    target_tokens = {i: token for token, i in target_ids.items()}
    draft_tokens = {i: token for token, i in draft_ids.items()}
    common = sorted(target_tokens.keys() & draft_tokens.keys())
    for i in common:
        if target_tokens[i] != draft_tokens[i]:
            got = (
                f"token {i} is {draft_tokens[i]!r} to `{network.name}`, "
                f"but {target_tokens[i]!r} to `{target.name}`"
            )
            raise DraftMismatch(got, hint=hint)

    for token in sorted(target_ids.keys() & draft_ids.keys(), key=target_ids.__getitem__):
        if target_ids[token] != draft_ids[token]:
            got = (
                f"{token!r} is token {draft_ids[token]} to `{network.name}`, "
                f"but {target_ids[token]} to `{target.name}`"
            )
            raise DraftMismatch(got, hint=hint)

    if not common:
        got = f"`{network.name}` and `{target.name}` have no token in common"
        raise DraftMismatch(got, hint=hint)
