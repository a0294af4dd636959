"""What any engine says of its answers, and transformers' own loops as engines.

Knows how transformers' generate is called, drafters included; does not know prompts, pairs or
files. recipes/engines.py has more engines.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, Qwen3Config
from transformers.modeling_outputs import BaseModelOutputWithPast

from flashdraft.errors import ContextLengthError, DraftMismatch, UnsupportedTarget
from flashdraft.formats.match import check_target
from flashdraft.loading import load_target
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.models.hf import HFTarget
from flashdraft.models.target import HFModel
from flashdraft.process import INTS, threads_set
from flashdraft.types import SamplingParams

__all__ = ["Answer", "DFlashAssistant", "Figures", "Method", "Transformers", "joined"]

Figures = dict[str, Any]  # what goes into a line of results, by name; JSON values
Options = dict[str, Any]  # of transformers' generate
KeyValue = tuple[Tensor, Tensor]  # of some tokens: [n, kv_heads, head_dim] each


@dataclass(frozen=True)
class Answer:
    """One method's answer to one prompt."""

    tokens: tuple[int, ...]
    seconds: float  # from token ids to text
    decode_seconds: float  # the part after the first tokens
    # tokens of every target pass after the one that read the prompt; left out: one each
    steps: tuple[int, ...] = ()
    figures: Figures = field(default_factory=dict)  # what only our own methods can tell

    def __post_init__(self) -> None:
        if not self.steps:
            one_each = (1,) * (len(self.tokens) - 1)
            object.__setattr__(self, "steps", one_each)

    @property
    def tau(self) -> float:
        return sum(self.steps) / len(self.steps) if self.steps else 1.0


# Answers prompts that are decoded together, as their parameters say, one for each.
Method = Callable[[list[list[int]], list[SamplingParams]], list[Answer]]


def joined(turns: Sequence[Answer]) -> Answer:
    """The turns of a conversation as one answer."""
    # An engine of somebody's file may give lists.
    tokens = tuple(chain.from_iterable(turn.tokens for turn in turns))
    steps = tuple(chain.from_iterable(turn.steps for turn in turns))
    seconds = 0.0
    decode_seconds = 0.0
    for turn in turns:
        seconds += turn.seconds
        decode_seconds += turn.decode_seconds
    figures = _added([turn.figures for turn in turns])
    return Answer(tokens, seconds, decode_seconds, steps, figures)


def _added(turns: Sequence[Figures]) -> Figures:
    """Numbers and tuples are added up, and dicts name by name; of all else the last one stands."""
    total: Figures = {}
    for name in dict.fromkeys(chain.from_iterable(turns)):
        holders = [turn for turn in turns if name in turn]
        values = [turn[name] for turn in holders]
        last = values[-1]
        if isinstance(last, dict):
            total[name] = _added(values)
        elif isinstance(last, tuple):
            total[name] = tuple(chain.from_iterable(values))
        elif isinstance(last, int | float):
            total[name] = sum(values)
        else:
            total[name] = last
    return total


class Transformers:
    """transformers' own generate with its own cache on the same weights, shared by its methods.

    tuned: at the better of 1 and 2 threads; else at those that torch has.
    """

    def __init__(self, target_name: str, dtype: str, *, tuned: bool = True) -> None:
        target, self.tokenizer, eos = load_target(target_name, dtype=dtype, kernel="transformers")
        assert isinstance(target, HFTarget)
        self.target = target
        self.model = target.model
        self.dtype = dtype
        self.ends: Options = {}
        if eos:
            self.ends = {"eos_token_id": sorted(eos), "pad_token_id": min(eos)}
        self.threads: int | None = None  # as many as torch has
        if tuned:
            self.threads = self._faster_threads()

    def _faster_threads(self) -> int:
        """1 or 2, whichever answers sooner; of each the better of two short answers counts."""
        prompt = list(range(8))
        params = SamplingParams(max_new_tokens=16)
        seconds: dict[int, float] = {}
        for threads in (1, 2)[: os.cpu_count()]:
            self.threads = threads
            seconds[threads] = min(self._one(prompt, params, {}).seconds for _ in range(2))
        return min(seconds, key=seconds.__getitem__)

    def method(self, kind: str, *, draft: str = "", assistant: str = "") -> Method:
        """`transformers`, or with `_lookup`, `_assisted` or `_dflash` behind it.

        assistant: folder or hub id of the causal LM that drafts; draft: of the drafter.
        Raises DraftMismatch for an assistant of another vocabulary, and what DFlashAssistant does.
        """
        how: Options = {}
        if kind == "transformers_lookup":
            how["prompt_lookup_num_tokens"] = 10  # as its documentation has it
        elif kind == "transformers_assisted":
            how["assistant_model"] = self._assistant_model(assistant)
        elif kind == "transformers_dflash":
            how["assistant_model"] = DFlashAssistant(draft, self.target)
            how["speculation_type"] = "dflash"

        def answer(prompts: list[list[int]], params: list[SamplingParams]) -> list[Answer]:
            pairs = zip(prompts, params, strict=True)
            return [self._one(prompt, own, how) for prompt, own in pairs]

        return answer

    def _assistant_model(self, name: str) -> HFModel:
        small, _, _ = load_target(name, dtype=self.dtype, kernel="transformers")
        if small.vocab_size != self.target.vocab_size:
            raise DraftMismatch(
                f"`{name}` has {small.vocab_size} tokens, "
                f"`{self.target.name}` has {self.target.vocab_size}",
                hint="name a smaller model of the same family with --assistant",
            )
        assert isinstance(small, HFTarget)
        return small.model

    def _one(self, prompt: list[int], params: SamplingParams, how: Options) -> Answer:
        options: Options = {"do_sample": False}
        if params.temperature > 0:
            temperature = params.temperature
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        options |= self.ends
        options |= how

        clock = _Clock()
        with threads_set(self.threads), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(params.seed)
            started = time.perf_counter()
            ids = torch.tensor([prompt], **INTS)
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=params.max_new_tokens,
                streamer=clock,
                **options,
            )
            tokens = tuple(output[0, len(prompt) :].tolist())
            self.tokenizer.decode(tokens, skip_special_tokens=True)
            ended = time.perf_counter()

        first = clock.times[1]  # behind the prompt, which is handed on first
        steps = tuple(clock.counts[2:])
        return Answer(tokens, ended - started, ended - first, steps)


class _Clock:
    """A streamer of generate: when the prompt and every pass's tokens were there, and how many."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(tokens.numel())

    def end(self) -> None:
        """Generate calls it behind the last tokens."""


class DFlashAssistant(nn.Module):
    """A drafter as transformers' generate(speculation_type="dflash") calls it.

    That loop owns the cache of keys and values, embeds the block and applies the target's whole
    lm_head: a sequential head and a reduced vocabulary have no part in it. Raises UnsupportedTarget
    for a drafter that such a loop cannot carry.
    """

    def __init__(self, draft: str, target: HFTarget) -> None:
        super().__init__()
        network = DFlashDraftModel.from_pretrained(draft)
        shape = network.config
        check_target(shape, target)
        sees_all_both_ways = ((None, False),) * shape.num_hidden_layers
        is_plain = shape.masks == sees_all_both_ways and shape.input_embedding_scale == 1
        if not is_plain or "embed_tokens.weight" in network.extras:
            raise UnsupportedTarget(
                f"`{draft}` has causal or windowed layers or an embedding of its own",
                hint="transformers' loop has neither; leave transformers_dflash out",
            )

        self.network = network.to(target.model.dtype)
        self.device = target.model.device
        read: Options = {  # by the loop and its cache
            "num_hidden_layers": shape.num_hidden_layers,
            "block_size": shape.block_size,
            "mask_token_id": shape.mask_token_id,
            "target_layer_ids": list(shape.target_layer_ids),
        }
        self.config = Qwen3Config(**read)

    def forward(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
        **_: object,
    ) -> BaseModelOutputWithPast:
        """States [1, block, hidden] of a block of embeddings behind new features.

        context_hidden_states: the features, [1, n, F * hidden]; position_ids: [1, n + block].
        Raises ContextLengthError for a block beyond the positions that the drafter was trained on.
        """
        positions = position_ids[0]
        last = int(positions[-1])
        limit = self.network.config.trained_length
        if last >= limit:
            raise ContextLengthError(
                f"a block ends at position {last}, but the drafter knows {limit}",
                hint="shorten prompts or answers, or leave transformers_dflash out",
            )

        def attend(layer: int, queries: Tensor, context_kv: KeyValue, block_kv: KeyValue) -> Tensor:
            new_keys = _heads_first(torch.cat((context_kv[0], block_kv[0])))
            new_values = _heads_first(torch.cat((context_kv[1], block_kv[1])))
            keys, values = past_key_values.update(new_keys, new_values, layer)
            out = scaled_dot_product_attention(_heads_first(queries), keys, values, enable_gqa=True)
            return out[0].transpose(0, 1).flatten(1)

        context = self.network.context(context_hidden_states[0])
        split = (positions[: len(context)], positions[len(context) :])
        states = self.network(context, noise_embeds[0], split, attend)
        return BaseModelOutputWithPast(last_hidden_state=states[None])


def _heads_first(states: Tensor) -> Tensor:
    """[n, heads, head_dim] -> [1, heads, n, head_dim]."""
    return states.transpose(0, 1)[None]
