"""`flashdraft serve --engine`: another engine serves the target, with its drafter in that engine's
form.

Knows the engines' names for our options, and which of ours have none there. Does not know how they
serve: the process becomes theirs, so signals, exit codes, GPUs and machines are their own.
"""

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from flashdraft import hub
from flashdraft.errors import FlashDraftError, InvalidParameter
from flashdraft.export.order import read_target
from flashdraft.export.run import in_cache
from flashdraft.loading import shipped
from flashdraft.types import check_options, option

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["EngineOptions", "Launch", "drafter_of", "flags_of", "launch", "start"]

ENGINES = ("vllm", "sglang")


@dataclass(frozen=True)
class EngineOptions:
    """What is said of another engine."""

    engine: str | None = option(
        None,
        "have this engine serve, with the drafter in its form: vllm, sglang; what follows -- "
        "is its own",
        choices=ENGINES,
    )
    tensor_parallel: int | None = option(
        None, "with --engine: GPUs that share the target's layers", least=1, most=1024
    )
    context_length: int | None = option(
        None, "with --engine: tokens of a prompt and its answer, at most", least=1, most=2**31 - 1
    )
    dry_run: bool = option(False, "with --engine: print its command, and run nothing")

    def __post_init__(self) -> None:
        check_options(self)


class Launch(NamedTuple):
    """A command line and what its environment has besides ours."""

    command: tuple[str, ...]
    environment: dict[str, str]

    def shown(self) -> str:
        """As a user may run it, without keys."""
        words = [f"{name}=..." for name in self.environment]
        is_key = False
        for word in self.command:
            words.append("..." if is_key else shlex.quote(word))
            is_key = word == _KEY_FLAG
        return " ".join(words)


_KEY_FLAG = "--api-key"
_FLAGS = {  # of each engine: our option -> its own
    "vllm": {
        "host": "--host",
        "port": "--port",
        "dtype": "--dtype",
        "max_rows": "--max-num-seqs",
        "cache_bytes": "--kv-cache-memory-bytes",
        "cors_origin": "--allowed-origins",
        "served_model_name": "--served-model-name",
        "log_level": "--uvicorn-log-level",
        "tensor_parallel": "--tensor-parallel-size",
        "context_length": "--max-model-len",
    },
    "sglang": {
        "host": "--host",
        "port": "--port",
        "dtype": "--dtype",
        "max_rows": "--max-running-requests",
        "queue": "--max-queued-requests",
        "served_model_name": "--served-model-name",
        "log_level": "--log-level",
        "tensor_parallel": "--tp-size",
        "context_length": "--context-length",
    },
}
_ELSEWHERE = ("target", "draft", "block_size", "api_key_file", "engine", "dry_run")
_ALWAYS = ("host", "port")  # the engines' own defaults are others
_PLAIN = {  # the command without a drafter
    "vllm": ("vllm", "serve"),
    "sglang": ("sglang", "serve", "--model-path"),
}
_INSTALL = {"vllm": "pip install vllm", "sglang": "pip install sglang"}


def drafter_of(draft: str, target: str) -> str | None:
    """The drafter's folder or hub id; None for plain decoding.

    Raises InvalidParameter for one that has no weights.
    """
    if draft == "auto":
        built_in = hub.builtin_draft(target)
        return None if built_in is None else str(built_in)
    if draft == "autoregressive":
        return None
    if draft == "prompt_lookup" or "+" in draft:
        got = f"draft is {draft!r}, which is not handed to another engine"
        hint = "give one drafter's folder or hub id; the engine's own n-gram options go behind --"
        raise InvalidParameter(got, hint=hint)
    return shipped(draft, target)


def flags_of(engine: str, *options: "DataclassInstance") -> list[str]:
    """Our options in the engine's words; those at their default are left to the engine.

    Raises InvalidParameter for an option that it does not have.
    """
    names = _FLAGS[engine]
    flags: list[str] = []
    for group in options:
        for field in fields(group):
            value = getattr(group, field.name)
            is_usual = value == field.default or value == ()
            if field.name in _ELSEWHERE or (is_usual and field.name not in _ALWAYS):
                continue
            if field.name not in names:
                got = f"{field.name} is {value}, for which {engine} has no counterpart"
                hint = "leave it out; the engine's own options go behind --"
                raise InvalidParameter(got, hint=hint)
            flags += [names[field.name], _word(field.name, value)]
    return flags


def _word(name: str, value: Any) -> str:
    if name == "cors_origin":
        return json.dumps(list(value))
    if name == "port" and value == 0:
        hint = "name a port: another engine takes none that is free by itself"
        raise InvalidParameter("port is 0", hint=hint)
    if name == "dtype" and value == "float64":
        raise InvalidParameter("dtype is float64, which no such engine has", hint="give float32")
    return str(value)


def launch(
    engine: str,
    target: str,
    draft: str | None,
    block_size: int | None,
    flags: list[str],
    keys: list[bytes],
) -> Launch:
    """The engine's command for this target and drafter, which is exported into the cache first
    where it is not in the engine's form.

    block_size: nodes of a proposal; None: what the drafter was trained for. Prints what the drafter
    loses there. Raises FlashDraftError.
    """
    shape = read_target(target)
    if draft is None:
        command = [*_PLAIN[engine], shape.name]
    else:
        exported = in_cache(draft, engine, target)
        for loss in exported.losses:
            print(f"lost: {loss}", file=sys.stderr)
        for note in exported.notes:
            print(f"note: {note}", file=sys.stderr)
        command = list(exported.command)
        if block_size is not None:
            command = _with_block_size(command, block_size)

    if shape.name != target and "--served-model-name" not in flags:
        flags = [*flags, "--served-model-name", target]
    environment: dict[str, str] = {}
    if len(keys) > 1:
        got = f"{len(keys)} API keys are given, and {engine} is handed one"
        raise InvalidParameter(got, hint="put one of them in front of it, or a proxy")
    if keys and engine == "vllm":
        environment["VLLM_API_KEY"] = keys[0].decode()
    elif keys:
        flags = [*flags, _KEY_FLAG, keys[0].decode()]
    return Launch((*command, *flags), environment)


def _with_block_size(command: list[str], block_size: int) -> list[str]:
    """With so many nodes a proposal, the anchor included, as both engines are told."""
    changed = list(command)
    for place, word in enumerate(command[:-1]):
        value = command[place + 1]
        if word == "--speculative-config":
            told = json.loads(value)
            told["num_speculative_tokens"] = block_size - 1
            changed[place + 1] = json.dumps(told)
        elif word == "--speculative-num-draft-tokens":
            changed[place + 1] = str(block_size)
        elif word == "--speculative-num-steps":
            changed[place + 1] = str(block_size - 1)
    return changed


def start(engine: str, command: Launch) -> NoReturn:
    """Become the engine. Raises FlashDraftError where it is not installed."""
    words = list(command.command)
    program = _program(engine, words[0])
    words[0] = program
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, words, {**os.environ, **command.environment})


def _program(engine: str, name: str) -> str:
    """Its path: on $PATH, or beside this Python."""
    found = shutil.which(name)
    beside = Path(sys.executable).with_name(name)
    if found is None and beside.exists():
        found = str(beside)
    if found is None:
        got = f"{engine} is not installed: no program `{name}` is on the path"
        raise FlashDraftError(got, hint=f"{_INSTALL[engine]}, in an environment of its own")
    return found
