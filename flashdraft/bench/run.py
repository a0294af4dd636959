"""Methods side by side: every prompt by every method in turn, in one process, one line of results for each answer.

The wall clock runs from token ids to text, alike for all methods, at batch 1. The methods take turns at going first, and
every ratio is made of two answers to the same prompt in the same repeat, so that a machine's drift hits both.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from flashdraft import hub
from flashdraft.bench.tasks import read_prompts
from flashdraft.engine import check
from flashdraft.errors import InvalidParameter, ModelNotFound
from flashdraft.generate import KERNELS, Model, drafters, load_target
from flashdraft.provenance import provenance
from flashdraft.target import HFTarget
from flashdraft.types import SamplingParams, check_options, option

__all__ = ["METHODS", "Answer", "BenchConfig", "run_bench"]

METHODS = ("autoregressive", "dflash", "prompt_lookup", "transformers")
_COUNTED = ("accepted_lengths", "target_passes", "num_drafted", "num_accepted")  # of a request's Stats


@dataclass(frozen=True)
class BenchConfig:
    """One run. Raises InvalidParameter for a value outside its range."""

    prompts: Path = field(metadata={"help": "JSON Lines with `prompt` or `turns`, and `task`"})
    out: Path = field(metadata={"help": "results file to write; it must not exist"})
    methods: str = option(",".join(METHODS), f"comma-separated, of {', '.join(METHODS)}")
    target: str = option("smollm2-135m", "built-in name, hub id, folder or GGUF file")
    draft: str = option("auto", "folder or hub id of dflash's drafter; auto is the one shipped for the target")
    block_size: int | None = option(None, "nodes per proposal of dflash and prompt_lookup, the anchor included", least=1)
    dtype: str = option("float32", "float32, bfloat16, float16 or auto (as stored), for all methods alike")
    kernel: str = option("auto", "what runs our methods' weights", choices=KERNELS)
    max_new_tokens: int = option(128, "tokens per answer, at most")
    temperature: float = option(0.0, "0 is greedy")
    seed: int = option(0, "seed of the first prompt; the others count on from it")
    repeats: int = option(1, "times that every prompt is answered by every method", least=1)
    transformers_prompts: int | None = option(None, "run transformers on each task's first prompts only", least=1)
    threads: int | None = option(None, "threads of our methods; by default what torch takes", least=1)
    max_rows: int = option(1, "prompts our methods decode together; above 1 compare tau and texts, not times", least=1)

    def __post_init__(self) -> None:
        check_options(self)
        if unknown := [name for name in self.names if name not in METHODS]:
            raise InvalidParameter(f"no method {unknown[0]!r}", hint=f"methods are {', '.join(METHODS)}")
        if self.draft in METHODS:
            raise InvalidParameter(f"draft is {self.draft!r}", hint="draft names dflash's drafter; other methods go into methods")
        users = {"draft": "dflash", "block_size": "dflash prompt_lookup", "transformers_prompts": "transformers"}
        for name, methods in users.items():
            if getattr(self, name) not in (None, "auto") and not set(methods.split()) & set(self.names):
                raise InvalidParameter(f"{name} is {getattr(self, name)}, but no method uses it", hint=f"it is for {methods}")
        self.params(0)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for name in self.methods.split(",")))

    def params(self, number: int) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, seed=self.seed + number, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True)
class Answer:
    """One method's answer to one prompt."""

    tokens: tuple[int, ...]
    seconds: float  # from token ids to text
    decode_seconds: float  # the part after the first token
    tau: float = 1.0
    figures: dict[str, Any] = field(default_factory=dict)  # what only our own methods can tell


Method = Callable[[list[list[int]], list[SamplingParams]], list[Answer]]


def run_bench(config: BenchConfig, *, quiet: bool = False) -> int:
    """Write the header and one line per prompt, method and repeat to config.out; returns the number of answers.

    Everything that can be refused is refused before the file appears; it grows prompt by prompt.
    """
    prompts = read_prompts(config.prompts)
    if config.out.exists():
        raise InvalidParameter(f"`{config.out}` exists", hint="name another file; results are not overwritten")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    methods, model, facts = _load(config)
    encoded = [model.encode(prompt.text) for prompt in prompts]
    for tokens in encoded:
        check(model.target, model.request(tokens, config.params(0)))
    for method in methods.values():  # first calls build kernels
        method(encoded[:1], [replace(config.params(0), max_new_tokens=min(8, config.max_new_tokens))])
    groups = [range(i, min(i + config.max_rows, len(prompts))) for i in range(0, len(prompts), config.max_rows)]
    plan = [(repeat, repeat + turn, group) for repeat in range(config.repeats) for turn, group in enumerate(groups)]
    count = 0
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with config.out.open("x", encoding="utf-8") as file:
        file.write(json.dumps({"header": provenance() | {"config": asdict(config)} | facts}, default=str) + "\n")
        for repeat, turn, group in track(plan, "bench", console=Console(stderr=True), disable=quiet):
            first = turn % len(config.names)
            answers: dict[tuple[int, str], Answer] = {}
            for name in config.names[first:] + config.names[:first]:
                most = config.transformers_prompts if name == "transformers" else None
                if todo := [i for i in group if most is None or prompts[i].rank < most]:
                    found = methods[name]([encoded[i] for i in todo], [config.params(prompts[i].number) for i in todo])
                    answers |= {(i, name): answer for i, answer in zip(todo, found, strict=True)}
            for (i, name), answer in answers.items():
                key = {"task": prompts[i].task, "prompt": prompts[i].number, "method": name, "repeat": repeat}
                comparable = config.temperature == 0 or name != "transformers"  # its draws are of another generator
                figures = _figures(answer, answers.get((i, "autoregressive")) if comparable else None)
                file.write(json.dumps(key | {"num_prompt_tokens": len(encoded[i])} | figures) + "\n")
                count += 1
            file.flush()
    return count


def _figures(answer: Answer, plain: Answer | None) -> dict[str, Any]:
    """`identical`: whether the tokens are those of plain decoding; the first index where they are not; null: not compared."""
    count, seconds, decode_seconds = len(answer.tokens), answer.seconds, answer.decode_seconds
    decode_speed = (count - 1) / decode_seconds if count > 1 and decode_seconds else None
    figures = {"num_tokens": count, "seconds": seconds, "decode_seconds": decode_seconds, "tau": answer.tau, **answer.figures}
    figures |= {"tokens_per_second": count / seconds, "decode_tokens_per_second": decode_speed}
    pairs = enumerate(zip_longest(answer.tokens, plain.tokens if plain else answer.tokens))
    different = next((i for i, (a, b) in pairs if a != b), None)
    return figures | {"identical": None if plain is None else different is None, "first_difference": different}


def _load(config: BenchConfig) -> tuple[dict[str, Method], Model, dict[str, Any]]:
    """The methods, a model that encodes prompts, and what the header tells about them."""
    if "dflash" in config.names and config.draft == "auto" and hub.builtin_draft(config.target) is None:
        raise ModelNotFound(f"no drafter is shipped for `{config.target}`", hint="name one with --draft, or leave out dflash")
    target, tokenizer, eos = load_target(config.target, dtype=config.dtype, kernel=config.kernel)
    facts: dict[str, Any] = {"kernel": target.kernel, "row_exact": target.row_exact}
    model = Model(target, tokenizer, drafters("autoregressive", target, config.target), eos=eos, max_rows=1)
    methods: dict[str, Method] = {}
    for name in config.names:
        if name == "transformers":
            methods[name] = plain = _Transformers(config)
            facts["transformers_threads"] = plain.threads
        else:
            block_size = None if name == "autoregressive" else config.block_size
            made = drafters(config.draft if name == "dflash" else name, target, config.target, block_size)
            methods[name] = _timed(replace(model, new_drafter=made, max_rows=config.max_rows))
    return methods, model, facts


def _timed(model: Model) -> Method:
    """A method of ours."""

    def answer(prompts: list[list[int]], params: list[SamplingParams]) -> list[Answer]:
        started, firsts, found = time.perf_counter(), dict[int, float](), dict[int, Answer]()
        for chunk in model.stream(prompts, params):
            first = firsts.setdefault(chunk.index, time.perf_counter())
            if (result := chunk.result) is not None:
                now, stats = time.perf_counter(), result.stats
                figures = {"finish_reason": result.finish_reason, "parts": stats.seconds}
                figures |= {name: getattr(stats, name) for name in _COUNTED}
                found[chunk.index] = Answer(result.tokens, now - started, now - first, stats.tau, figures)
        return [found[index] for index in sorted(found)]

    return answer


class _Transformers:
    """transformers' own generate with its own cache on the same weights, at the better of 1 and 2 threads."""

    def __init__(self, config: BenchConfig) -> None:
        target, self.tokenizer, eos = load_target(config.target, dtype=config.dtype, kernel="transformers")
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
