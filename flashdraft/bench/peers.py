"""Other engines on the same weights, timed as our methods are: from token ids to text, in the same process."""

import os
import time
from collections.abc import Callable, Sequence
from ctypes import c_int32
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from flashdraft.errors import FlashDraftError
from flashdraft.generate import load_target
from flashdraft.target import HFTarget
from flashdraft.types import SamplingParams, require

__all__ = ["Answer", "Method", "Transformers", "llama_cpp"]

_CONTEXT = 4096  # tokens that llama.cpp makes room for


@dataclass(frozen=True)
class Answer:
    """One method's answer to one prompt."""

    tokens: tuple[int, ...]
    seconds: float  # from token ids to text
    decode_seconds: float  # the part after the first token
    tau: float = 1.0
    figures: dict[str, Any] = field(default_factory=dict)  # what only our own methods can tell


Method = Callable[[list[list[int]], list[SamplingParams]], list[Answer]]


class Transformers:
    """transformers' own generate with its own cache on the same weights, at the better of 1 and 2 threads."""

    def __init__(self, target_name: str, dtype: str) -> None:
        target, self.tokenizer, eos = load_target(target_name, dtype=dtype, kernel="transformers")
        assert isinstance(target, HFTarget)
        self.model = target.model
        self.ends = {"eos_token_id": sorted(eos), "pad_token_id": min(eos)} if eos else {}
        seconds = {}
        for self.threads in (1, 2)[: os.cpu_count()]:
            seconds[self.threads] = min(self._one(list(range(8)), SamplingParams(max_new_tokens=16)).seconds for _ in range(2))
        self.threads = min(seconds, key=lambda threads: seconds[threads])

    def __call__(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Answer]:
        return [self._one(prompt, one) for prompt, one in zip(prompts, params, strict=True)]

    def _one(self, prompt: list[int], params: SamplingParams) -> Answer:
        sampled = {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": 1.0}
        options = (sampled if params.temperature > 0 else {"do_sample": False}) | self.ends
        times: list[float] = []  # of the prompt and of every token
        options["streamer"] = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        torch.manual_seed(params.seed)
        started = time.perf_counter()
        ids = torch.tensor([prompt])
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=params.max_new_tokens, **options)
        tokens = tuple(output[0, len(prompt) :].tolist())
        self.tokenizer.decode(tokens, skip_special_tokens=True)
        ended = time.perf_counter()
        torch.set_num_threads(before)
        return Answer(tokens, ended - started, ended - times[1])


def llama_cpp(path: Path, eos: frozenset[int]) -> Method:
    """llama.cpp's own greedy decoding, through its C interface, with as many threads as torch has."""
    try:
        import llama_cpp as lib
    except ModuleNotFoundError:
        raise FlashDraftError("llama.cpp is not installed", hint="pip install llama-cpp-python, or leave it out") from None
    threads = torch.get_num_threads()
    llama: Any = lib.Llama(str(path), n_ctx=_CONTEXT, n_batch=_CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())

    def read(tokens: Sequence[int]) -> int:
        held = (c_int32 * len(tokens))(*tokens)  # the batch only points at it
        assert lib.llama_decode(llama.ctx, lib.llama_batch_get_one(held, len(tokens))) == 0
        return int(lib.llama_sampler_sample(chain, llama.ctx, -1))

    def answer(prompt: list[int], params: SamplingParams) -> Answer:
        length = len(prompt) + params.max_new_tokens
        require(length <= _CONTEXT, "the length of prompt and answer", length, f"at most {_CONTEXT} beside llama.cpp")
        lib.llama_memory_clear(lib.llama_get_memory(llama.ctx), True)
        started = time.perf_counter()
        tokens = [read(prompt)]
        first = time.perf_counter()
        while len(tokens) < params.max_new_tokens and tokens[-1] not in eos:
            tokens.append(read(tokens[-1:]))
        llama.detokenize(tokens)
        now = time.perf_counter()
        return Answer(tuple(tokens), now - started, now - first)

    return lambda prompts, params: [answer(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
