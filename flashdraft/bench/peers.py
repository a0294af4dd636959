"""What any engine says of its answers, and transformers as one of them; recipes/engines.py has more."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from flashdraft.generate import load_target
from flashdraft.target import HFTarget
from flashdraft.types import SamplingParams

__all__ = ["Answer", "Method", "Transformers"]


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
