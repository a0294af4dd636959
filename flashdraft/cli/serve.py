"""The command that serves a model over HTTP. What a server is stands in `flashdraft.serve`."""

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

from typer import Argument

from flashdraft.cli.options import TARGET_HELP, ModelOptions
from flashdraft.errors import FlashDraftError, InvalidParameter
from flashdraft.serve.options import KEY, ServeOptions

_LOCAL = ("127.0.0.1", "::1", "localhost")
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")  # of the extra `serve`


def serve(
    model: ModelOptions,
    options: ServeOptions,
    served: Annotated[str | None, Argument(metavar="[TARGET]", help=TARGET_HELP)] = None,
) -> None:
    """Serve a model by OpenAI's API, and at / a page to chat.

    Examples:
        flashdraft serve
        flashdraft serve Qwen/Qwen3-8B --draft z-lab/Qwen3-8B-DFlash-b16 --device cuda
    """
    if served is not None:
        if model.target not in (ModelOptions.target, served):
            got = f"the target is `{served}`, and --target is `{model.target}`"
            raise InvalidParameter(got, hint="leave out one of the two")
        model = replace(model, target=served)

    server = _server_room()
    key_file = None if options.api_key_file is None else Path(options.api_key_file)
    keys = server.read_keys(os.environ.get(KEY), key_file)
    if options.host not in _LOCAL and not keys:
        refused = f"{options.host} can be reached from elsewhere, and no API key is set"
        raise FlashDraftError(refused, hint=f"set {KEY}, or give --api-key-file")
    server.serve(model.load, model.target, keys, options)


def _server_room() -> ModuleType:
    """The code of the server. Raises FlashDraftError where the extra is not installed."""
    try:
        for package in _PACKAGES:
            import_module(package)
    except ImportError as error:
        got = f"serving needs {error.name}"
        raise FlashDraftError(got, hint="pip install 'flashdraft[serve]'") from None
    return import_module("flashdraft.serve.start")
