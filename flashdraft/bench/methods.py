"""The methods of a run, loaded: from token ids of prompts to answers with their times.

Ours are streams with a clock beside them; transformers' loops are in peers.py, other engines are
functions of a file. Knows how each is loaded; does not know prompts, pairs or results files.
"""

import runpy
import time
from dataclasses import replace
from typing import NamedTuple

from flashdraft import hub
from flashdraft.bench.config import DFLASH, THEIRS, BenchConfig
from flashdraft.bench.peers import Answer, Figures, Method, Transformers
from flashdraft.bench.specs import Spec, parts_of, tree_of
from flashdraft.errors import InvalidParameter, ModelNotFound
from flashdraft.generate import Model
from flashdraft.loading import drafters, load_target, open_network
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.types import Result, SamplingParams, require

__all__ = ["Loaded", "load_methods"]

_TREE_NODES = 16  # of a tree that names none


class Loaded(NamedTuple):
    """What a run needs of its models."""

    methods: dict[str, Method]  # by name in the results, in the order of the run's specs
    model: Model  # encodes prompts
    drawn: list[str]  # names of the methods that draw their drafts by chance
    facts: dict[str, object]  # for the results' header


def load_methods(config: BenchConfig) -> Loaded:
    """All methods of a run; every target is loaded once for each kernel.

    Raises ModelNotFound or InvalidParameter for a drafter that dflash cannot have.
    """
    loader = _Loader(config, _dflash_drafter(config))
    methods = {name: loader.method(spec) for name, spec in config.specs.items()}
    model = loader.any_model()
    return Loaded(methods, model, loader.drawn, loader.facts())


def _dflash_drafter(config: BenchConfig) -> str:
    """The folder or hub id of dflash's drafter; nothing where none is shipped and none is used."""
    drafter = config.draft
    if config.draft == "auto":
        drafter = str(hub.builtin_draft(config.target) or "")
    if not drafter and DFLASH & config.kinds:
        raise ModelNotFound(
            f"no drafter is shipped for `{config.target}`",
            hint="name one with --draft, or leave out dflash",
        )

    if config.draft != "auto":
        method = open_network(drafter, config.target).method
        if method != "dflash":
            raise InvalidParameter(
                f"draft is {config.draft!r}, a drafter of {method}",
                hint="--draft is of dflash's drafter; "
                f"name this one in --methods: NAME={config.draft}",
            )
    return drafter


class _Loader:
    """Loads methods one after the other, and notes what the header says about them."""

    def __init__(self, config: BenchConfig, drafter: str) -> None:
        self.config = config
        self.drafter = drafter  # dflash's
        self.drawn: list[str] = []
        self._models: dict[str, Model] = {}  # by kernel, as it was asked for
        self._transformers: Transformers | None = None

    def method(self, spec: Spec) -> Method:
        if spec.is_engine:
            return self._of_file(spec)
        if spec.kind in THEIRS:
            return self._of_transformers(spec)
        return self._ours(spec)

    def any_model(self) -> Model:
        """Of ours, the one that was loaded first; if there is none yet, with the run's kernel."""
        kernel = next(iter(self._models), self.config.kernel)
        return self._model(kernel)

    def facts(self) -> dict[str, object]:
        targets = {kernel: model.target for kernel, model in self._models.items()}
        facts: dict[str, object] = {
            "kernel": {kernel: target.kernel for kernel, target in targets.items()},
            "row_exact": {kernel: target.row_exact for kernel, target in targets.items()},
            "drawn": self.drawn,
        }
        if self._transformers is not None:
            facts["transformers_threads"] = self._transformers.threads
        return facts

    def _model(self, kernel: str) -> Model:
        """The target with that kernel, decoding plainly."""
        if kernel not in self._models:
            config = self.config
            target, tokenizer, eos = load_target(config.target, dtype=config.dtype, kernel=kernel)
            most = max(config.max_rows)
            self._models[kernel] = Model(target, tokenizer, Autoregressive, eos=eos, max_rows=most)
        return self._models[kernel]

    def _of_transformers(self, spec: Spec) -> Method:
        config = self.config
        if self._transformers is None:
            is_tuned = not config.threads
            self._transformers = Transformers(config.target, config.dtype, tuned=is_tuned)
        return self._transformers.method(
            spec.kind, draft=self.drafter, assistant=config.assistant or ""
        )

    def _of_file(self, spec: Spec) -> Method:
        function, _, argument = spec.variant.partition(":")
        engines = runpy.run_path(spec.kind)
        is_there = callable(engines.get(function))
        require(is_there, "an engine", function, f"a function of `{spec.kind}`")
        method: Method = engines[function](argument, self._model(self.config.kernel))
        return method

    def _ours(self, spec: Spec) -> Method:
        config = self.config
        model = self._model(spec.variant or config.kernel)
        is_plain = spec.kind == "autoregressive"
        block_size = None if is_plain else config.block_size

        parts = []
        for part in parts_of(spec.kind):
            parts.append(self.drafter if part == "dflash" else part)
        new_drafter = drafters(
            "+".join(parts),
            model.target,
            config.target,
            block_size,
            tree_of(spec.kind, _TREE_NODES),
            tokenizer=model.tokenizer,
        )
        if getattr(new_drafter(), "drawn", None) is True:
            self.drawn.append(spec.name)

        is_adaptive = not is_plain and config.block_size is None
        return _timed(replace(model, new_drafter=new_drafter, adaptive=is_adaptive))


def _timed(model: Model) -> Method:
    """A method of ours."""

    def answer(prompts: list[list[int]], params: list[SamplingParams]) -> list[Answer]:
        started = time.perf_counter()
        firsts: dict[int, float] = {}  # when a prompt's first tokens were there
        answers: dict[int, Answer] = {}
        for chunk in model.stream(prompts, params):
            first = firsts.setdefault(chunk.index, time.perf_counter())
            if chunk.result is not None:
                ended = time.perf_counter()
                answers[chunk.index] = _answer(chunk.result, ended - started, ended - first)
        return [answers[index] for index in sorted(answers)]

    return answer


def _answer(result: Result, seconds: float, decode_seconds: float) -> Answer:
    stats = result.stats
    figures: Figures = {
        "finish_reason": result.finish_reason,
        "parts": stats.seconds,
        "num_drafted": stats.num_drafted,
        "num_accepted": stats.num_accepted,
    }
    steps = tuple(stats.accepted_lengths)
    return Answer(result.tokens, seconds, decode_seconds, steps, figures)
