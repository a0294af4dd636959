"""What any engine says of its answers, and transformers' own loops as engines; recipes/engines.py has more.

Knows how transformers' generate is called, drafters included; does not know prompts, pairs or files.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config
from transformers.modeling_outputs import BaseModelOutputWithPast

from flashdraft.errors import ContextLengthError, DraftMismatch, UnsupportedTarget
from flashdraft.formats.match import check_target
from flashdraft.loading import load_target
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.models.hf import HFTarget
from flashdraft.process import INTS, threads_set
from flashdraft.types import SamplingParams

__all__ = ["Answer", "DFlashAssistant", "Method", "Transformers", "joined"]


@dataclass(frozen=True)
class Answer:
    """One method's answer to one prompt."""

    tokens: tuple[int, ...]
    seconds: float  # from token ids to text
    decode_seconds: float  # the part after the first tokens
    steps: tuple[
        int, ...
    ] = ()  # tokens of every target pass after the one that read the prompt; left out: one each
    figures: dict[str, Any] = field(default_factory=dict)  # what only our own methods can tell

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", self.steps or (1,) * (len(self.tokens) - 1))

    @property
    def tau(self) -> float:
        return sum(self.steps) / len(self.steps) if self.steps else 1.0


def joined(turns: Sequence[Answer]) -> Answer:
    """The turns of a conversation as one answer."""
    return Answer(**_added([vars(turn) for turn in turns]))


def _added(values: Sequence[Any]) -> Any:
    """Numbers and tuples are added up, and dicts name by name; of what cannot be added up the last one stands."""
    last = values[-1]
    if isinstance(last, dict):
        return {
            name: _added([one[name] for one in values if name in one])
            for name in dict.fromkeys(chain(*values))
        }
    if isinstance(last, tuple):
        return tuple(chain(*values))
    return sum(values) if isinstance(last, int | float) else last


Method = Callable[[list[list[int]], list[SamplingParams]], list[Answer]]


class Transformers:
    """transformers' own generate with its own cache on the same weights, shared by its methods.

    tuned: at the better of 1 and 2 threads; else at those that torch has.
    """

    def __init__(self, target_name: str, dtype: str, *, tuned: bool = True) -> None:
        target, self.tokenizer, eos = load_target(target_name, dtype=dtype, kernel="transformers")
        assert isinstance(target, HFTarget)
        self.target, self.model, self.dtype = target, target.model, dtype
        self.ends = {"eos_token_id": sorted(eos), "pad_token_id": min(eos)} if eos else {}
        self.threads: int | None = None
        seconds, short = dict[int, float](), SamplingParams(max_new_tokens=16)
        for self.threads in (1, 2)[: os.cpu_count()] if tuned else ():
            seconds[self.threads] = min(
                self._one(list(range(8)), short, {}).seconds for _ in range(2)
            )
        self.threads = min(seconds, key=seconds.__getitem__, default=None)

    def method(self, kind: str, *, draft: str = "", assistant: str = "") -> Method:
        """`transformers`, or with `_lookup`, `_assisted` (by the causal LM `assistant`) or `_dflash` (by the drafter `draft`)."""
        how: dict[str, Any] = {}
        if kind == "transformers_lookup":
            how = {"prompt_lookup_num_tokens": 10}  # as its documentation has it
        elif kind == "transformers_assisted":
            small, _, _ = load_target(assistant, dtype=self.dtype, kernel="transformers")
            if small.vocab_size != self.target.vocab_size:
                got = f"`{assistant}` has {small.vocab_size} tokens, `{self.target.name}` has {self.target.vocab_size}"
                raise DraftMismatch(
                    got, hint="name a smaller model of the same family with --assistant"
                )
            assert isinstance(small, HFTarget)
            how = {"assistant_model": small.model}
        elif kind == "transformers_dflash":
            how = {
                "assistant_model": DFlashAssistant(draft, self.target),
                "speculation_type": "dflash",
            }
        return lambda prompts, params: [
            self._one(prompt, one, how) for prompt, one in zip(prompts, params, strict=True)
        ]

    def _one(self, prompt: list[int], params: SamplingParams, how: dict[str, Any]) -> Answer:
        sampled = {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": 1.0}
        options = (sampled if params.temperature > 0 else {"do_sample": False}) | self.ends | how
        clock: list[
            tuple[float, int]
        ] = []  # when the prompt and every pass's tokens were there, and how many they are
        noted = SimpleNamespace(
            put=lambda tokens: clock.append((time.perf_counter(), tokens.numel())), end=lambda: None
        )
        with threads_set(self.threads), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(params.seed)
            started = time.perf_counter()
            ids = torch.tensor([prompt], **INTS)
            options |= {
                "attention_mask": torch.ones_like(ids),
                "max_new_tokens": params.max_new_tokens,
                "streamer": noted,
            }
            output = self.model.generate(ids, **options)
            tokens = tuple(output[0, len(prompt) :].tolist())
            self.tokenizer.decode(tokens, skip_special_tokens=True)
            ended = time.perf_counter()
        return Answer(
            tokens, ended - started, ended - clock[1][0], tuple(count for _, count in clock[2:])
        )


class DFlashAssistant(nn.Module):
    """A drafter as transformers' generate(speculation_type="dflash") calls it.

    That loop owns the cache of keys and values, embeds the block and applies the target's whole lm_head: a sequential head and a
    reduced vocabulary have no part in it. Raises UnsupportedTarget for a drafter that such a loop cannot carry.
    """

    def __init__(self, draft: str, target: HFTarget) -> None:
        super().__init__()
        network = DFlashDraftModel.from_pretrained(draft)
        shape = network.config
        check_target(shape, target)
        plain = (
            shape.masks == ((None, False),) * shape.num_hidden_layers
            and shape.input_embedding_scale == 1
        )
        if not plain or "embed_tokens.weight" in network.extras:
            got = f"`{draft}` has causal or windowed layers or an embedding of its own"
            raise UnsupportedTarget(
                got, hint="transformers' loop has neither; leave transformers_dflash out"
            )
        self.network, self.device = network.to(target.model.dtype), target.model.device
        read = {
            name: getattr(shape, name)
            for name in ("num_hidden_layers", "block_size", "mask_token_id")
        }
        read |= {"target_layer_ids": list(shape.target_layer_ids)}
        self.config = Qwen3Config(**read)  # what the loop and its cache read

    def forward(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        position_ids: Tensor,
        past_key_values: Any,
        **_: Any,
    ) -> Any:
        """States [1, block, hidden] of a block of embeddings behind new features [1, n, F * hidden]; positions [1, n + block]."""
        context, positions = self.network.context(context_hidden_states[0]), position_ids[0]
        if (last := int(positions[-1])) >= (limit := self.network.config.trained_length):
            got = f"a block ends at position {last}, but the drafter knows {limit}"
            raise ContextLengthError(
                got, hint="shorten prompts or answers, or leave transformers_dflash out"
            )

        def attend(layer: int, queries: Tensor, *kv: tuple[Tensor, Tensor]) -> Tensor:
            new = (
                torch.cat(parts).transpose(0, 1)[None] for parts in zip(*kv, strict=True)
            )  # the context's, then the block's
            keys, values = past_key_values.update(*new, layer)
            out = scaled_dot_product_attention(
                queries.transpose(0, 1)[None], keys, values, enable_gqa=True
            )
            return out[0].transpose(0, 1).flatten(1)

        split = positions[: len(context)], positions[len(context) :]
        return BaseModelOutputWithPast(
            last_hidden_state=self.network(context, noise_embeds[0], split, attend)[None]
        )
