"""The command that serves a model over HTTP. What a server is stands in `flashdraft.serve`."""

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

from typer import Argument

from flashdraft.cli.options import TARGET_HELP, ModelOptions, refuse_given
from flashdraft.errors import FlashDraftError, InvalidParameter
from flashdraft.serve.engine import EngineOptions, drafter_of, flags_of, launch, start
from flashdraft.serve.keys import read_keys
from flashdraft.serve.options import KEY, ServeOptions

_LOCAL = ("127.0.0.1", "::1", "localhost")
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")  # of the extra `serve`


def serve(
    model: ModelOptions,
    options: ServeOptions,
    elsewhere: EngineOptions,
    served: Annotated[str | None, Argument(metavar="[TARGET]", help=TARGET_HELP)] = None,
    passed: Annotated[
        list[str] | None, Argument(metavar="[-- OPTIONS]", help="with --engine: its own options")
    ] = None,
) -> None:
    """Serve a model by OpenAI's API, here or by vLLM or SGLang.

    Examples:
        flashdraft serve Qwen/Qwen3-8B --draft z-lab/Qwen3-8B-DFlash-b16 --device cuda
        flashdraft serve Qwen/Qwen3-8B --draft run/best --engine vllm --tensor-parallel 2
    """
    more = list(passed or ())
    if served is not None and served.startswith("-"):  # all that stands behind --
        more = [served, *more]
        served = None
    if served is not None:
        if model.target not in (ModelOptions.target, served):
            got = f"the target is `{served}`, and --target is `{model.target}`"
            raise InvalidParameter(got, hint="leave out one of the two")
        model = replace(model, target=served)

    key_file = None if options.api_key_file is None else Path(options.api_key_file)
    keys = read_keys(os.environ.get(KEY), key_file)
    if options.host not in _LOCAL and not keys:
        refused = f"{options.host} can be reached from elsewhere, and no API key is set"
        raise FlashDraftError(refused, hint=f"set {KEY}, or give --api-key-file")
    if elsewhere.engine is not None:
        _serve_elsewhere(elsewhere, model, options, keys, more)
        return

    refuse_given(elsewhere, "--engine is not given")
    if more:
        got = f"`{more[0]}` stands behind the target, and --engine is not given"
        raise InvalidParameter(got, hint="only another engine's own options stand there")
    _server_room().serve(model.load, model.target, keys, options)


def _serve_elsewhere(
    elsewhere: EngineOptions,
    model: ModelOptions,
    options: ServeOptions,
    keys: list[bytes],
    more: list[str],
) -> None:
    """Print the engine's command and become it."""
    assert elsewhere.engine is not None
    flags = flags_of(elsewhere.engine, model, options, elsewhere)
    draft = drafter_of(model.draft, model.target)
    block_size = model.block_size
    if draft is None and block_size is not None:
        got = f"block_size is {block_size}, but nothing drafts"
        raise InvalidParameter(got, hint="name a drafter by --draft")
    command = launch(elsewhere.engine, model.target, draft, block_size, flags, keys)
    command = command._replace(command=(*command.command, *more))
    print(command.shown())
    if not elsewhere.dry_run:
        start(elsewhere.engine, command)


def _server_room() -> ModuleType:
    """The code of the server. Raises FlashDraftError where the extra is not installed."""
    try:
        for package in _PACKAGES:
            import_module(package)
    except ImportError as error:
        got = f"serving needs {error.name}"
        raise FlashDraftError(got, hint="pip install 'flashdraft[serve]'") from None
    return import_module("flashdraft.serve.start")
