"""Our methods beside every other engine that is installed, each engine in a process of its own.

Knows which engines there are and which results are already there. Does not know how an engine runs:
a function of an engines' file does.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from flashdraft.bench.config import THEIRS, BenchConfig
from flashdraft.bench.report import read_results
from flashdraft.bench.run import run_bench
from flashdraft.errors import InvalidParameter
from flashdraft.files import output_file, say

__all__ = ["run_peers"]


class _Engine(NamedTuple):
    """Another engine, as a function of the engines' file runs it."""

    function: str
    name: str
    package: str
    arguments: tuple[
        str, ...
    ] = ()  # a method for each; where there is none, one for each GGUF file


ENGINES = (
    _Engine("llama_cpp", "llama.cpp", "llama_cpp"),
    _Engine("openvino", "OpenVINO", "openvino_genai"),
    _Engine("ctranslate2", "CTranslate2", "ctranslate2", ("float32", "int8")),
)


def run_peers(config: BenchConfig, gguf: Sequence[Path], engines: Path) -> list[Path]:
    """Run our methods beside every engine that is installed, and name the others.

    Returns the results files: config.out with an engine's name in it. One that a run of the same
    settings wrote is not measured again, but one that it did not finish is. Each runs in a process
    of its own, because in one process the thread pools of engines slow each other down by half.
    transformers is an engine, too. Raises InvalidParameter for results of other settings, or if
    there is nothing to compare; DataError for a file that holds no results.
    """
    ours = [spec.text for spec in config.specs.values() if spec.kind not in THEIRS]
    theirs = [spec.text for spec in config.specs.values() if spec.kind in THEIRS]
    others = {"transformers": theirs}
    for engine in ENGINES:
        others[engine.function] = _methods_of(engine, gguf, engines)

    configs = []
    for name, methods in others.items():
        if ours and methods:
            configs.append(_config_beside(config, name, [*ours, *methods]))
    if not configs:
        raise InvalidParameter(
            "nothing to compare",
            hint="name a method of ours, and install an engine or name transformers",
        )

    # all files are looked at before the first run: what is refused costs no time
    to_measure = [one for one in configs if not _is_measured(one)]
    for one in to_measure:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            process.submit(run_bench, one, quiet=True).result()
    return [one.out for one in configs]


def _methods_of(engine: _Engine, gguf: Sequence[Path], file: Path) -> list[str]:
    """As `methods` names them; nothing, and a line that says why, where the engine cannot run."""
    arguments = engine.arguments or gguf
    missing = ""
    if find_spec(engine.package) is None:
        missing = f"{engine.package} is not installed"
    elif not arguments:
        missing = "it needs --gguf"
    if missing:
        print(f"{engine.name} is left out: {missing}")
        return []

    methods = []
    for argument in arguments:
        name = f"{engine.name} {_as_name(argument)}"
        methods.append(f"{name}={file}:{engine.function}:{argument}")
    return methods


def _as_name(text: str | Path) -> str:
    """A file's name in the name of a method, where = and , would end it."""
    return Path(text).stem.replace("=", "_").replace(",", "_")


def _config_beside(config: BenchConfig, engine: str, methods: Sequence[str]) -> BenchConfig:
    """The run of these methods, into the engine's own file."""
    names = ",".join(methods)
    out = config.out.with_stem(f"{config.out.stem}-{engine}")
    if engine == "transformers":
        return replace(config, methods=names, out=out)
    # no other engine reads these two, and an option that no method reads is refused
    return replace(config, methods=names, out=out, assistant=None, transformers_prompts=None)


def _is_measured(config: BenchConfig) -> bool:
    """Whether config.out holds the results of this very run, whole.

    What is left of one that was stopped is removed. Raises InvalidParameter for another run's.
    """
    out = output_file(config.out, inputs=[config.prompts])
    if not out.exists() or not out.stat().st_size:
        return False

    header, lines = read_results(out)
    _check_same_run(config, out, header)
    num_answers = header.get("answers", len(lines))
    if len(lines) == num_answers:
        return True
    say(f"{out}: {len(lines)} of {num_answers} answers; it is measured again")
    out.unlink()
    return False


def _check_same_run(config: BenchConfig, out: Path, header: Mapping[str, Any]) -> None:
    """Raises InvalidParameter for results of other settings or prompts.

    What a header does not tell, as those of older versions, is taken to be the same.
    """
    asked = json.loads(json.dumps(asdict(config), default=str))
    asked["prompts"] = hashlib.sha256(config.prompts.read_bytes()).hexdigest()
    held = dict(header.get("config", {}))
    held["prompts"] = header.get("prompts_sha256", asked["prompts"])
    for name, value in asked.items():
        if name != "out" and name in held and held[name] != value:
            got = f"`{out}` was measured with {name} {held[name]}, not {value}"
            raise InvalidParameter(got, hint="name another file with --out, or remove that one")
