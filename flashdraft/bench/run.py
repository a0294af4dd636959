"""Methods side by side: every prompt by every method in turn, in one process, one line of results for each answer.

The wall clock runs from token ids to text, alike for all methods. The methods take turns at going first, settings (temperature,
batch size, threads) take turns prompt by prompt, and every ratio is made of two answers to the same prompt in the same repeat and
setting, so that a machine's drift hits both.
"""

import hashlib
import json
import runpy
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import chain, product, starmap, zip_longest
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import IO, Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from flashdraft import hub
from flashdraft.bench.peers import Answer, Method, Transformers, joined
from flashdraft.bench.report import grouped, read_results
from flashdraft.bench.specs import Spec, names_a_drafter, parts_of, read_specs, tree_of
from flashdraft.bench.tasks import BenchPrompt, named, read_prompts
from flashdraft.engine import check
from flashdraft.errors import InvalidParameter, ModelNotFound
from flashdraft.files import locked, output_file, say
from flashdraft.generate import Model, Prompt
from flashdraft.loading import DTYPES, KERNELS, MOST_NODES, drafters, load_target, open_network
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.process import threads_set
from flashdraft.provenance import provenance
from flashdraft.types import HIGHEST, SamplingParams, check_options, option, require

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["METHODS", "Answer", "BenchConfig", "acceptance", "run_bench", "run_peers"]

OURS = ("autoregressive", "dflash", "eagle3", "medusa", "draft_model", "prompt_lookup")
THEIRS = ("transformers", "transformers_lookup", "transformers_assisted", "transformers_dflash")
METHODS, DFLASH = OURS + THEIRS, {"dflash", "transformers_dflash"}
METHODS_HELP = (
    f"comma-separated, of {', '.join(METHODS)}; trees: dflash_tree, dflash_tree32; two at once: "
)
METHODS_HELP += (
    "dflash+prompt_lookup; another drafter: NAME=FOLDER; ours may name a kernel, dflash:int8; "
)
METHODS_HELP += "other engines: NAME=FILE.py:FUNCTION:ARG"
# function of the engines' file -> the engine's name, its package and what is given to it; else GGUF files
ENGINES: dict[str, tuple[str, ...]] = {
    "llama_cpp": ("llama.cpp", "llama_cpp"),
    "openvino": ("OpenVINO", "openvino_genai"),
}
ENGINES |= {"ctranslate2": ("CTranslate2", "ctranslate2", "float32", "int8")}
MOST_THREADS = 1024  # more than a machine has; beyond, the system refuses to make them
_TREE_NODES = 16  # of a tree that names none
_REST = 0.3  # seconds between methods beside other engines, whose threads may still spin


class Setting(NamedTuple):  # answers of two settings are never compared
    temperature: float
    max_rows: int
    threads: int


@dataclass(frozen=True)
class BenchConfig:
    """One run. Raises InvalidParameter for a value outside its range; temperature, max_rows and threads may be single numbers."""

    prompts: Path = field(metadata={"help": "JSON Lines with `prompt` or `turns`, and `task`"})
    out: Path = field(metadata={"help": "results file to write; it must not exist"})
    methods: str = option("autoregressive,dflash,prompt_lookup,transformers", METHODS_HELP)
    target: str = option("smollm2-135m", "built-in name, hub id, folder or GGUF file")
    draft: str = option(
        "auto", "folder or hub id of dflash's drafter; auto is the one shipped for the target"
    )
    assistant: str | None = option(
        None,
        "folder or hub id of transformers_assisted's small model, which has the same tokenizer",
    )
    block_size: int | None = option(
        None,
        "nodes of a chain, the anchor included; a tree is as deep; by default as many of what was trained as pay",
        least=1,
        most=MOST_NODES,
    )
    dtype: str = option(
        "float32", f"of all methods alike: {', '.join(DTYPES)} (as stored)", choices=DTYPES
    )
    kernel: str = option(
        "auto",
        f"what runs our methods' weights, where a method names none: {', '.join(KERNELS)}",
        choices=KERNELS,
    )
    max_new_tokens: int = option(
        128, "tokens per answer and turn, at most", least=1, most=2**31 - 1
    )
    turns: int = option(
        1,
        "turns of a prompt with several that are asked at most, each after the method's own answer",
        least=1,
        most=2**31 - 1,
    )
    temperature: tuple[float, ...] = option(
        (0.0,), "0 is greedy; may be given several times", least=0
    )
    seed: int = option(
        0, "seed of the first prompt; the others count on from it", least=0, most=HIGHEST
    )
    repeats: int = option(
        1, "times that every prompt is answered by every method", least=1, most=2**31 - 1
    )
    transformers_prompts: int | None = option(
        None, "run transformers on each task's first prompts only", least=1, most=2**31 - 1
    )
    threads: tuple[int, ...] = option(
        (),
        "of all methods, or several; else torch's own, and transformers' better of 1, 2",
        least=1,
        most=MOST_THREADS,
    )
    max_rows: tuple[int, ...] = option(
        (1,),
        "prompts of a task that ours decode together; may be given several times",
        least=1,
        most=1 << 16,
    )

    def __post_init__(self) -> None:
        for name in Setting._fields:
            value = getattr(self, name)
            several = tuple(value) if isinstance(value, list | tuple) else (value,)
            object.__setattr__(self, name, several)
        check_options(self)
        require(bool(self.temperature), "temperature", self.temperature, "at least one number")
        require(bool(self.max_rows), "max_rows", self.max_rows, "at least one number")
        for name in Setting._fields:
            different = tuple(dict.fromkeys(getattr(self, name)))
            object.__setattr__(self, name, different)

        specs = self.specs.values()
        for _, kind, variant, _ in specs:
            if kind.endswith(".py"):
                require(
                    Path(kind).is_file(),
                    "an engine's file",
                    kind,
                    "there: NAME=FILE.py:FUNCTION:TEXT",
                )
                require(
                    not any(self.temperature),
                    "temperature",
                    max(self.temperature),
                    "0 beside engines that are greedy here",
                )
                require(
                    len(self.threads) < 2,
                    "threads",
                    self.threads,
                    "one number beside engines that keep theirs",
                )
            elif kind not in THEIRS and (
                odd := [part for part in parts_of(kind) if not names_a_drafter(part, OURS)]
            ):
                raise InvalidParameter(
                    f"no method {odd[0]!r}",
                    hint=f"methods are {', '.join(METHODS)}, or a drafter's folder",
                )
            elif variant not in (("", *KERNELS) if kind not in THEIRS else ("",)):
                raise InvalidParameter(
                    f"no kernel {variant!r}", hint=f"kernels are {', '.join(KERNELS)}"
                )
        if self.draft in METHODS:
            raise InvalidParameter(
                f"draft is {self.draft!r}",
                hint="draft names dflash's drafter; other methods go into methods",
            )
        kinds = {part for spec in specs for part in parts_of(spec.kind)}
        users = {"draft": DFLASH, "block_size": kinds - {"autoregressive", *THEIRS}}
        users |= {"assistant": {"transformers_assisted"}, "transformers_prompts": {*THEIRS}}
        for name, those in users.items():
            if getattr(self, name) not in (None, "auto") and not those & kinds:
                got = f"{name} is {getattr(self, name)}, but no method uses it"
                raise InvalidParameter(got, hint=f"for {', '.join(sorted(those))}")
        need = self.assistant is not None or "transformers_assisted" not in kinds
        require(need, "assistant", None, "the folder of transformers_assisted's small model")
        if self.kernel != "auto" and all(spec.variant or spec.kind in THEIRS for spec in specs):
            raise InvalidParameter(
                f"kernel is {self.kernel!r}, but every method names its own", hint="leave one out"
            )

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """By name in the results."""
        return {spec.name: spec for spec in read_specs(self.methods)}

    def params(self, number: int, temperature: float) -> SamplingParams:
        params = SamplingParams(
            temperature=temperature, seed=self.seed, max_new_tokens=self.max_new_tokens
        )
        return params.numbered(number)


def run_bench(config: BenchConfig, *, quiet: bool = False) -> int:
    """Write the header and one line per prompt, method, repeat and setting to config.out; returns the number of answers.

    Everything that can be refused is refused before the file appears; it grows prompt by prompt.
    """
    prompts = read_prompts(config.prompts)
    if config.out.is_file() and config.out.stat().st_size:
        raise InvalidParameter(
            f"`{config.out}` exists", hint="name another file; results are not overwritten"
        )
    out = output_file(config.out, inputs=[config.prompts])
    with threads_set(next(iter(config.threads), None)):
        return _measured(config, prompts, out, quiet)


def _measured(config: BenchConfig, prompts: list[BenchPrompt], out: Path, quiet: bool) -> int:
    methods, model, facts = _load(config)
    for prompt in prompts:
        for turn in range(
            len(prompt.turns[: config.turns])
        ):  # its answers as long as they may become
            with named(prompt.place):
                tokens = model.encode(_talk(prompt, [""] * turn)) + [0] * (
                    turn * config.max_new_tokens
                )
                check(model.target, model.request(tokens, config.params(0, 0.0)))
    short = replace(config.params(0, 0.0), max_new_tokens=min(8, config.max_new_tokens))
    for method in methods.values():  # first calls build kernels
        method([model.encode(prompts[0].asked)], [short])
    count, foreign = 0, any(spec.kind.endswith(".py") for spec in config.specs.values())
    plan = _plan(config, prompts)
    facts |= {
        "answers": sum(len(_todo(config, name, group)) for *_, group in plan for name in methods)
    }
    facts |= {"prompts_sha256": hashlib.sha256(config.prompts.read_bytes()).hexdigest()}
    with locked(out), _results(out) as file:
        file.write(
            json.dumps({"header": provenance() | {"config": asdict(config)} | facts}, default=str)
            + "\n"
        )
        for repeat, turn, setting, group in track(
            plan, "bench", console=Console(stderr=True), disable=quiet
        ):
            torch.set_num_threads(setting.threads)
            first = turn % len(methods)
            answers: dict[tuple[int, str], Answer] = {}
            for name in [*methods][first:] + [*methods][:first]:
                if todo := _todo(config, name, group):
                    time.sleep(_REST if foreign else 0.0)
                    found = _ask(methods[name], model, todo, config, setting.temperature)
                    answers |= {
                        (prompt.number, name): answer
                        for prompt, answer in zip(todo, found, strict=True)
                    }
            for (number, name), answer in answers.items():
                key = {
                    "task": prompts[number].task,
                    "prompt": number,
                    "method": name,
                    "repeat": repeat,
                } | setting._asdict()
                _, kind, kernel, _ = config.specs[name]
                ours = kind not in THEIRS and not kind.endswith(".py")
                plain = "autoregressive" + (f":{kernel}" if kernel and ours else "")
                # others draw by other generators, and drawn drafts keep the law, not the text
                comparable = setting.temperature == 0 or (ours and name not in facts["drawn"])
                figures = {"plain": plain} | _figures(
                    answer, answers.get((number, plain)) if comparable else None
                )
                file.write(json.dumps(key | figures) + "\n")
                count += 1
            file.flush()
    return count


@contextmanager
def _results(out: Path) -> Iterator[IO[str]]:
    """The results file, new or empty; if not one answer came of it, it is gone as it was."""
    was_there = out.exists()
    try:
        with out.open("w" if was_there else "x", encoding="utf-8") as file:
            yield file
    except BaseException:
        is_header = len(out.read_bytes().splitlines()) <= 1
        if is_header and was_there:
            out.write_bytes(b"")
        elif is_header:
            out.unlink()
        raise


def _todo(config: BenchConfig, name: str, group: Sequence[BenchPrompt]) -> list[BenchPrompt]:
    """Of a group of prompts those that a method is asked."""
    most = config.transformers_prompts if config.specs[name].kind in THEIRS else None
    return [prompt for prompt in group if most is None or prompt.rank < most]


def run_peers(config: BenchConfig, gguf: Sequence[Path], engines: Path) -> list[Path]:
    """Run our methods beside every engine that is installed, and name the others; returns the results files.

    An engine's file is config.out with its name in it; one that a run of the same settings wrote is not measured again, but one
    that it did not finish is. Each runs in a process of its own, because in one process the thread pools of engines slow each
    other down by half. transformers is an engine, too. Raises InvalidParameter for results of other settings, DataError for none.
    """
    ours = [spec.text for spec in config.specs.values() if spec.kind not in THEIRS]
    runs = {"transformers": [spec.text for spec in config.specs.values() if spec.kind in THEIRS]}
    for function, (name, package, *given) in ENGINES.items():
        texts = given or gguf
        if (
            missing := f"{package} is not installed"
            if find_spec(package) is None
            else ""
            if texts
            else "it needs --gguf"
        ):
            print(f"{name} is left out: {missing}")
        runs[function] = [
            f"{name} {_as_name(text)}={engines}:{function}:{text}" for text in texts if not missing
        ]
    configs = []
    for engine, specs in ((engine, specs) for engine, specs in runs.items() if specs and ours):
        own: dict[str, Any] = (
            {} if engine == "transformers" else {"assistant": None, "transformers_prompts": None}
        )
        own |= {
            "methods": ",".join([*ours, *specs]),
            "out": config.out.with_stem(f"{config.out.stem}-{engine}"),
        }
        configs.append(replace(config, **own))
    if not configs:
        raise InvalidParameter(
            "nothing to compare",
            hint="name a method of ours, and install an engine or name transformers",
        )
    to_measure = [one for one in configs if not _is_measured(one)]
    for one in to_measure:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            process.submit(run_bench, one, quiet=True).result()
    return [one.out for one in configs]


def _is_measured(config: BenchConfig) -> bool:
    """Whether config.out holds the results of this very run, whole; what is left of one that was stopped is removed."""
    out = output_file(config.out, inputs=[config.prompts])
    if not out.exists() or not out.stat().st_size:
        return False
    header, lines = read_results(out)
    asked = json.loads(json.dumps(asdict(config), default=str))
    asked |= {"prompts": hashlib.sha256(config.prompts.read_bytes()).hexdigest()}
    held = header.get("config", {}) | {"prompts": header.get("prompts_sha256", asked["prompts"])}
    for name in asked.keys() - {"out"}:
        if name in held and held[name] != asked[name]:
            got = f"`{out}` was measured with {name} {held[name]}, not {asked[name]}"
            raise InvalidParameter(got, hint="name another file with --out, or remove that one")
    if len(lines) == header.get("answers", len(lines)):
        return True
    say(f"{out}: {len(lines)} of {header['answers']} answers; it is measured again")
    out.unlink()
    return False


def _as_name(text: str | Path) -> str:
    """A file's name in the name of a method, where = and , would end it."""
    return Path(text).stem.replace("=", "_").replace(",", "_")


def _plan(
    config: BenchConfig, prompts: Sequence[BenchPrompt]
) -> list[tuple[int, int, Setting, list[BenchPrompt]]]:
    """(repeat, turn, setting, prompts decoded together) in order: a repeat's settings go through the prompts side by side.

    A group is of one task; `turn` counts a setting's groups, so that every method goes first in each setting.
    """
    tasks, units = grouped(prompts, attrgetter("task")), []
    for setting in starmap(
        Setting,
        product(config.temperature, config.max_rows, config.threads or (torch.get_num_threads(),)),
    ):
        groups = [
            task[i : i + setting.max_rows]
            for task in tasks.values()
            for i in range(0, len(task), setting.max_rows)
        ]
        units += [
            (turn, setting, group)
            for turn, group in enumerate(sorted(groups, key=lambda group: group[0].number))
        ]
    units.sort(key=lambda unit: unit[2][0].number)
    return [
        (repeat, repeat + turn, setting, group)
        for repeat in range(config.repeats)
        for turn, setting, group in units
    ]


def _talk(prompt: BenchPrompt, answers: Sequence[str]) -> Prompt:
    """What is asked behind the answers to the turns before: the text alone, or the conversation so far."""
    if not answers:
        return prompt.asked
    told = [*chain(*zip(prompt.turns, answers, strict=False)), prompt.turns[len(answers)]]
    roles = ("user", "assistant") * len(prompt.turns)
    return [
        *prompt.earlier,
        *({"role": role, "content": text} for role, text in zip(roles, told, strict=False)),
    ]


def _ask(
    method: Method,
    model: Model,
    prompts: Sequence[BenchPrompt],
    config: BenchConfig,
    temperature: float,
) -> list[Answer]:
    """The answers to prompts that are decoded together; every turn after the first one follows the method's own answers."""
    found: list[list[Answer]] = [[] for _ in prompts]
    seconds = 0.0
    for turn in range(config.turns):
        live = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        said = [
            [model.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in found[i]]
            for i in live
        ]
        encoded = [
            model.encode(_talk(prompts[i], texts)) for i, texts in zip(live, said, strict=True)
        ]
        started = time.perf_counter()
        answers = (
            method(encoded, [config.params(prompts[i].number, temperature) for i in live])
            if live
            else []
        )
        seconds += time.perf_counter() - started
        for i, tokens, answer in zip(live, encoded, answers, strict=True):
            found[i].append(
                replace(
                    answer, figures=answer.figures | {"turns": 1, "num_prompt_tokens": len(tokens)}
                )
            )
    whole = [joined(turns) for turns in found]
    rate = sum(len(answer.tokens) for answer in whole) / seconds
    return [
        replace(answer, figures=answer.figures | {"batch_tokens_per_second": rate})
        for answer in whole
    ]


def acceptance(steps: Sequence[int]) -> list[float]:
    """By draft position from 1: the share of steps that committed it. steps: tokens of each, the target's own one included."""
    return [
        fmean(count > position for count in steps) for position in range(1, max(steps, default=1))
    ]


def _figures(answer: Answer, plain: Answer | None) -> dict[str, Any]:
    """`identical`: whether the tokens are those of plain decoding; the first index where they are not; null: not compared.

    `shares`: of the steps' time after the first token; `peak_memory`: the most bytes that the whole process ever held.
    """
    count, seconds, decode_seconds, steps = (
        len(answer.tokens),
        answer.seconds,
        answer.decode_seconds,
        answer.steps,
    )
    figures = {
        "num_tokens": count,
        "seconds": seconds,
        "decode_seconds": decode_seconds,
        "tau": answer.tau,
        **answer.figures,
    }
    figures |= {
        "accepted_lengths": steps,
        "acceptance": acceptance(steps),
        "target_passes": len(steps),
    }
    figures |= {
        "time_to_first_token": (seconds - decode_seconds) / answer.figures["turns"],
        "tokens_per_second": count / seconds,
    }
    figures["decode_tokens_per_second"] = (
        sum(steps) / decode_seconds if steps and decode_seconds else None
    )
    figures["peak_memory"] = _peak_memory()
    parts = {
        part: spent for part, spent in answer.figures.get("parts", {}).items() if part != "prefill"
    }
    figures["shares"] = {part: spent / sum(parts.values()) for part, spent in parts.items()}
    pairs = enumerate(zip_longest(answer.tokens, plain.tokens if plain else answer.tokens))
    different = next((i for i, (a, b) in pairs if a != b), None)
    return figures | {
        "identical": None if plain is None else different is None,
        "first_difference": different,
    }


def _peak_memory() -> int | None:
    """Bytes; None where the system does not tell."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def _load(config: BenchConfig) -> tuple[dict[str, Method], Model, dict[str, Any]]:
    """The methods, a model that encodes prompts, and what the header tells about them."""
    drafter = str(
        hub.builtin_draft(config.target) or "" if config.draft == "auto" else config.draft
    )
    if not drafter and any(
        part in DFLASH for spec in config.specs.values() for part in parts_of(spec.kind)
    ):
        raise ModelNotFound(
            f"no drafter is shipped for `{config.target}`",
            hint="name one with --draft, or leave out dflash",
        )
    if config.draft != "auto":
        method = open_network(drafter).method
        hint = f"--draft is of dflash's drafter; name this one in --methods: NAME={config.draft}"
        if method != "dflash":
            raise InvalidParameter(f"draft is {config.draft!r}, a drafter of {method}", hint=hint)

    facts: dict[str, Any] = {"kernel": {}, "row_exact": {}, "drawn": []}

    @cache
    def ours(kernel: str) -> Model:
        target, tokenizer, eos = load_target(config.target, dtype=config.dtype, kernel=kernel)
        facts["kernel"][kernel], facts["row_exact"][kernel] = target.kernel, target.row_exact
        return Model(target, tokenizer, Autoregressive, eos=eos, max_rows=max(config.max_rows))

    methods: dict[str, Method] = {}
    theirs: Transformers | None = None
    for name, kind, variant, _ in config.specs.values():
        if kind in THEIRS:
            theirs = theirs or Transformers(config.target, config.dtype, tuned=not config.threads)
            facts["transformers_threads"] = theirs.threads
            methods[name] = theirs.method(kind, draft=drafter, assistant=config.assistant or "")
        elif kind.endswith(".py"):
            function, _, argument = variant.partition(":")
            engines = runpy.run_path(kind)
            require(
                callable(engines.get(function)), "an engine", function, f"a function of `{kind}`"
            )
            methods[name] = engines[function](argument, ours(config.kernel))
        else:
            model, plain = ours(variant or config.kernel), kind == "autoregressive"
            sizes = None if plain else config.block_size, tree_of(kind, _TREE_NODES)
            draft = "+".join(drafter if part == "dflash" else part for part in parts_of(kind))
            made = drafters(draft, model.target, config.target, *sizes, tokenizer=model.tokenizer)
            facts["drawn"] += [name] * (getattr(made(), "drawn", None) is True)
            methods[name] = _timed(
                replace(model, new_drafter=made, adaptive=not plain and config.block_size is None)
            )
    return methods, ours(next(iter(facts["kernel"]), config.kernel)), facts


def _timed(model: Model) -> Method:
    """A method of ours."""

    def answer(prompts: list[list[int]], params: list[SamplingParams]) -> list[Answer]:
        started, firsts, found = time.perf_counter(), dict[int, float](), dict[int, Answer]()
        for chunk in model.stream(prompts, params):
            first = firsts.setdefault(chunk.index, time.perf_counter())
            if (result := chunk.result) is not None:
                now, stats = time.perf_counter(), result.stats
                figures: dict[str, Any] = {
                    "finish_reason": result.finish_reason,
                    "parts": stats.seconds,
                }
                figures |= {"num_drafted": stats.num_drafted, "num_accepted": stats.num_accepted}
                found[chunk.index] = Answer(
                    result.tokens,
                    now - started,
                    now - first,
                    tuple(stats.accepted_lengths),
                    figures,
                )
        return [found[index] for index in sorted(found)]

    return answer
