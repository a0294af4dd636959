"""Methods side by side: every prompt by every method in turn, in one process, one line of results for each answer.

The wall clock runs from token ids to text, alike for all methods, at batch 1. The methods take turns at going first, and
every ratio is made of two answers to the same prompt in the same repeat, so that a machine's drift hits both.
"""

import json
import runpy
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from flashdraft import hub
from flashdraft.bench.peers import Answer, Method, Transformers
from flashdraft.bench.tasks import read_prompts
from flashdraft.engine import check
from flashdraft.errors import InvalidParameter, ModelNotFound
from flashdraft.generate import KERNELS, Model, drafters, load_target
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.provenance import provenance
from flashdraft.types import SamplingParams, check_options, option, require

__all__ = ["METHODS", "Answer", "BenchConfig", "run_bench"]

METHODS = ("autoregressive", "dflash", "dflash_tree", "prompt_lookup", "transformers")
METHODS_HELP = (
    f"comma-separated, of {', '.join(METHODS)}; ours may name a kernel, dflash:int8; others: NAME=FILE.py:FUNCTION:TEXT"
)
_TREE_NODES = 16  # of dflash_tree
_REST = 0.3  # seconds between methods beside other engines, whose threads may still spin
_COUNTED = ("accepted_lengths", "target_passes", "num_drafted", "num_accepted")  # of a request's Stats


@dataclass(frozen=True)
class BenchConfig:
    """One run. Raises InvalidParameter for a value outside its range."""

    prompts: Path = field(metadata={"help": "JSON Lines with `prompt` or `turns`, and `task`"})
    out: Path = field(metadata={"help": "results file to write; it must not exist"})
    methods: str = option("autoregressive,dflash,prompt_lookup,transformers", METHODS_HELP)
    target: str = option("smollm2-135m", "built-in name, hub id, folder or GGUF file")
    draft: str = option("auto", "folder or hub id of dflash's drafter; auto is the one shipped for the target")
    block_size: int | None = option(None, "nodes of a chain, the anchor included; a tree is as deep", least=1)
    dtype: str = option("float32", "float32, bfloat16, float16 or auto (as stored), for all methods alike")
    kernel: str = option("auto", "what runs our methods' weights, where a method names none", choices=KERNELS)
    max_new_tokens: int = option(128, "tokens per answer, at most")
    temperature: float = option(0.0, "0 is greedy")
    seed: int = option(0, "seed of the first prompt; the others count on from it")
    repeats: int = option(1, "times that every prompt is answered by every method", least=1)
    transformers_prompts: int | None = option(None, "run transformers on each task's first prompts only", least=1)
    threads: int | None = option(None, "threads of our methods; by default what torch takes", least=1)
    max_rows: int = option(1, "prompts our methods decode together; above 1 compare tau and texts, not times", least=1)

    def __post_init__(self) -> None:
        check_options(self)
        for kind, variant in self.specs.values():
            if kind.endswith(".py"):
                require(Path(kind).is_file(), "an engine's file", kind, "there: NAME=FILE.py:FUNCTION:TEXT")
                require(self.temperature == 0, "temperature", self.temperature, "0 beside engines that run greedily here")
            elif kind not in METHODS:
                raise InvalidParameter(f"no method {kind!r}", hint=f"methods are {', '.join(METHODS)}")
            elif variant not in (("",) if kind == "transformers" else ("", *KERNELS)):
                raise InvalidParameter(f"no kernel {variant!r}", hint=f"kernels are {', '.join(KERNELS)}")
        if self.draft in METHODS:
            raise InvalidParameter(f"draft is {self.draft!r}", hint="draft names dflash's drafter; other methods go into methods")
        if len(self.specs) < len({part.strip() for part in self.methods.split(",")}):
            raise InvalidParameter(f"two of `{self.methods}` have one name", hint="write NAME=METHOD with names of their own")
        kinds, chains = {kind.removesuffix("_tree") for kind, _ in self.specs.values()}, {"dflash", "prompt_lookup"}
        for name, users in {"draft": {"dflash"}, "block_size": chains, "transformers_prompts": {"transformers"}}.items():
            if getattr(self, name) not in (None, "auto") and not users & kinds:
                raise InvalidParameter(f"{name} is {getattr(self, name)}, but no method uses it", hint=f"for {', '.join(users)}")
        if self.kernel != "auto" and all(variant or kind == "transformers" for kind, variant in self.specs.values()):
            raise InvalidParameter(f"kernel is {self.kernel!r}, but every method names its own", hint="leave one out")
        self.params(0)

    @property
    def specs(self) -> dict[str, tuple[str, str]]:
        """By name in the results: the method or an engine's file, and its kernel or function and argument."""
        named = (part.strip().rpartition("=") for part in self.methods.split(","))
        parts = ((name or spec, spec.partition(":")) for name, _, spec in named)
        return {name: (kind, variant) for name, (kind, _, variant) in parts}

    def params(self, number: int) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, seed=self.seed + number, max_new_tokens=self.max_new_tokens)


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
    count, foreign = 0, any(kind.endswith(".py") for kind, _ in config.specs.values())
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with config.out.open("x", encoding="utf-8") as file:
        file.write(json.dumps({"header": provenance() | {"config": asdict(config)} | facts}, default=str) + "\n")
        for repeat, turn, group in track(plan, "bench", console=Console(stderr=True), disable=quiet):
            first = turn % len(methods)
            answers: dict[tuple[int, str], Answer] = {}
            for name in [*methods][first:] + [*methods][:first]:
                most = config.transformers_prompts if name == "transformers" else None
                if todo := [i for i in group if most is None or prompts[i].rank < most]:
                    time.sleep(_REST if foreign else 0.0)
                    found = methods[name]([encoded[i] for i in todo], [config.params(prompts[i].number) for i in todo])
                    answers |= {(i, name): answer for i, answer in zip(todo, found, strict=True)}
            for (i, name), answer in answers.items():
                key = {"task": prompts[i].task, "prompt": prompts[i].number, "method": name, "repeat": repeat}
                kind, kernel = config.specs[name]
                ours = kind in METHODS and kind != "transformers"
                plain = "autoregressive" + (f":{kernel}" if kernel and ours else "")
                comparable = config.temperature == 0 or ours  # others' draws are of other generators
                figures = {"plain": plain} | _figures(answer, answers.get((i, plain)) if comparable else None)
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
    drafting = any(kind.startswith("dflash") for kind, _ in config.specs.values())
    if drafting and config.draft == "auto" and hub.builtin_draft(config.target) is None:
        raise ModelNotFound(f"no drafter is shipped for `{config.target}`", hint="name one with --draft, or leave out dflash")
    models: dict[str, Model] = {}
    facts: dict[str, Any] = {"kernel": {}, "row_exact": {}}

    def ours(kernel: str) -> Model:
        if kernel not in models:
            target, tokenizer, eos = load_target(config.target, dtype=config.dtype, kernel=kernel)
            models[kernel] = Model(target, tokenizer, Autoregressive, eos=eos, max_rows=config.max_rows)
            facts["kernel"][kernel], facts["row_exact"][kernel] = target.kernel, target.row_exact
        return models[kernel]

    methods: dict[str, Method] = {}
    for name, (kind, variant) in config.specs.items():
        if kind == "transformers":
            methods[name] = plain = Transformers(config.target, config.dtype)
            facts["transformers_threads"] = plain.threads
        elif kind.endswith(".py"):
            function, _, argument = variant.partition(":")
            engines = runpy.run_path(kind)
            require(callable(engines.get(function)), "an engine", function, f"a function of `{kind}`")
            methods[name] = engines[function](argument, ours(config.kernel))
        else:
            model, block_size = ours(variant or config.kernel), None if kind == "autoregressive" else config.block_size
            method, tree, _ = kind.partition("_tree")
            draft, nodes = config.draft if method == "dflash" else kind, _TREE_NODES if tree else None
            made = drafters(draft, model.target, config.target, block_size, nodes)
            adaptive = kind != "autoregressive" and block_size is None
            methods[name] = _timed(replace(model, new_drafter=made, adaptive=adaptive))
    return methods, next(iter(models.values()), None) or ours(config.kernel), facts


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
